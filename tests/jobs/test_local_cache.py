"""The local disk as a bounded cache of the bucket, on real servers and both databases: one promise a test."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backends import open_backend
from backends.base import Backend, ObjectInfo, ObjectReader
from backends.errors import AccessDenied, BackendError, BackendUnavailable, Misconfigured, ObjectArchived
from backends.settings import BucketSettings
from storage_provider import cache_restore
from storage_provider.failures import BucketFails, Stopped
from storage_provider.media_store import MediaStore
from tests.jobs.cache_site import DAY, HOUR, THUMBNAIL, CacheSite, OpenGate
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.memory_backend import MemoryBackend
from tests.servers import S3Server, make_bucket, make_client
from tests.temporary_files import temporary_files

on_real_servers = pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend_name"),
    [
        ("moto", "sqlite", "minio"),
        ("moto", "sqlite", "boto3"),
        pytest.param("minio", "postgres", "minio", marks=pytest.mark.servers),
        pytest.param("minio", "postgres", "boto3", marks=pytest.mark.servers),
    ],
    indirect=["s3_server", "synapse_database"],
)
on_each_database = pytest.mark.parametrize(
    "synapse_database", ["sqlite", pytest.param("postgres", marks=pytest.mark.servers)], indirect=True
)
on_sqlite = pytest.mark.parametrize("synapse_database", ["sqlite"], indirect=True)


@pytest.fixture
def site(tmp_path: Path, synapse_database: SynapseDatabase) -> CacheSite:
    return CacheSite(tmp_path / "store", synapse_database, MemoryBackend())


@pytest.fixture
def real_site(
    tmp_path: Path, s3_server: S3Server, synapse_database: SynapseDatabase, backend_name: str
) -> Iterator[CacheSite]:
    name = make_bucket(s3_server)
    settings = BucketSettings.parse(
        {
            "bucket": name,
            "endpoint_url": s3_server.endpoint,
            "access_key_id": s3_server.access_key,
            "secret_access_key": s3_server.secret_key,
            "backend": backend_name,
        }
    )
    backend: Backend = open_backend(settings)
    yield CacheSite(tmp_path / "store", synapse_database, backend, bucket_name=name)
    backend.close()


def bucket(site: CacheSite) -> MemoryBackend:
    assert isinstance(site.backend, MemoryBackend)
    return site.backend


def fill(site: CacheSite, number: int, size: int = 3000) -> dict[str, bytes]:
    """Local media with thumbnails and remote media, an hour between their last uses; returns the files."""
    chance = random.Random(number)
    for index in range(number):
        content, age = chance.randbytes(size), index * HOUR
        if index % 2:
            site.add(f"FsId{index:04}", content, origin="a.org", age=age)
        else:
            site.add(f"Local{index:04}", content, thumbnail=content[:100], age=age)
    return site.files()


def later_than_now(directory: Path) -> int:
    """Wait for a moment (ms) that is later than all files so far by the file system's clock, which is a coarse one."""
    moment, probe = int(time.time() * 1000) + 1, directory / "probe"
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns // 1_000_000 >= moment:
            return moment


def wipe(site: CacheSite) -> None:
    """The container has been started anew, with an empty disk."""
    for path in sorted(site.root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


# --- the way there and back ---


@on_real_servers
def test_what_a_lost_disk_held_comes_back(real_site: CacheSite) -> None:
    before = fill(real_site, 20)
    wipe(real_site)
    report = real_site.run_pass()
    assert real_site.files() == before
    assert (report.restored.files, report.evicted.files, report.limited_by) == (30, 0, None)
    assert report.kept.files == 30
    # The time of a file is the last use of its media.
    assert (real_site.root / path_of(0)).stat().st_mtime == pytest.approx(real_site.clock_ms / 1000, abs=0.01)
    assert real_site.run_pass().restored.files == 0


@on_real_servers
def test_least_recently_used_media_leaves_and_stays_away(real_site: CacheSite) -> None:
    before = fill(real_site, 20, size=4000)
    report = real_site.run_pass(local_cache={"max_size": 20 * 4096})
    # 30 files are too many; down to 18 that were used last.
    assert report.evicted.files == 12
    assert real_site.room.on_disk == 18 * 4096
    left = real_site.files()
    assert left == {path: before[path] for path in left}
    assert {path for path in left if "content" in path} == {path_of(index) for index in range(12)}
    again = real_site.run_pass(local_cache={"max_size": 20 * 4096})
    assert (again.evicted.files, again.restored.files) == (0, 0)
    # Also with more room: it was removed on purpose.
    assert real_site.run_pass(local_cache={"max_size": "1G"}).restored.files == 0


def path_of(index: int) -> str:
    return f"remote_content/a.org/Fs/Id/{index:04}" if index % 2 else f"local_content/Lo/ca/l{index:04}"


@on_real_servers
def test_all_is_healed_that_can_be(real_site: CacheSite) -> None:
    content = random.Random(1).randbytes(100_000)
    short_file = real_site.add("ShortFile", content)
    real_site.write(short_file, content[:5000])
    no_object = real_site.add("NoObject", content, thumbnail=b"thumbnail", in_bucket=False)
    wrong_object = real_site.add("WrongObject", content, origin="a.org")
    real_site.put(wrong_object, b"something else")
    report = real_site.run_pass()
    assert (report.mended.files, report.uploaded.files, report.replaced.files) == (1, 2, 1)
    assert real_site.files()[short_file] == content
    for path in (no_object, wrong_object, short_file, f"local_thumbnails/No/Ob/ject/{THUMBNAIL}"):
        assert real_site.backend.open(path).read(200_000) == real_site.files()[path]


# --- the stamp ---


@on_each_database
def test_upgrade_fetches_nothing(site: CacheSite) -> None:
    site.add("OnDisk", b"content", age=DAY)
    site.add("Offloaded", b"content", age=2 * DAY, on_disk=False)
    assert site.run_pass().restored.files == 0
    # From now on what is used comes back.
    site.clock_ms += HOUR
    later = site.add("Later", b"content", on_disk=False)
    assert site.run_pass().restored.files == 1
    assert later in site.files()


@on_sqlite
def test_stamp_of_a_clock_that_was_ahead_keeps_nothing_away_that_is_used_from_now_on(site: CacheSite) -> None:
    site.store.set_offloaded_before(site.clock_ms + 365 * DAY)
    site.run_pass()
    assert site.store.offloaded_before() == site.clock_ms
    site.add("OldMedia", b"content", age=HOUR, on_disk=False)
    used = site.add("UsedMedia", b"content", on_disk=False)
    site.run_pass()
    assert list(site.files()) == [used]


@on_sqlite
def test_interrupted_first_restore_goes_on_in_the_next_process(site: CacheSite) -> None:
    before = fill(site, 10)
    wipe(site)
    site.gate.before = lambda path: stop_after(site, 5)
    with pytest.raises(Stopped):
        site.run_pass(auto_restore_batch_size=1)
    assert 0 < len(site.files()) < len(before)
    site.stop.clear()
    site.gate.before = lambda path: None
    site.run_pass()
    assert site.files() == before


def stop_after(site: CacheSite, number: int) -> None:
    if len(site.gate.passed) >= number:
        site.stop.set()


@on_sqlite
def test_what_the_command_line_offloaded_stays_away(site: CacheSite) -> None:
    site.add("OldMedia", b"content", age=2 * HOUR, on_disk=False)
    recent = site.add("NewMedia", b"content", age=0, on_disk=False)
    site.store.set_offloaded_before(site.clock_ms - HOUR)
    site.run_pass()
    assert list(site.files()) == [recent]


@on_sqlite
def test_media_that_is_being_used_stays_though_its_row_does_not_say_so_yet(site: CacheSite) -> None:
    used = site.add("UsedMedia", b"content", age=2 * DAY)
    site.add("OtherMedia", b"content", age=2 * DAY)
    site.accessed = {"UsedMedia"}
    site.run_pass(local_cache={"max_age": "1d"})
    assert list(site.files()) == [used]
    site.accessed = set()
    site.run_pass(local_cache={"max_age": "1d"})
    assert list(site.files()) == []


@on_sqlite
def test_media_that_is_being_used_leaves_last_where_max_size_demands_it(site: CacheSite) -> None:
    used = site.add("UsedMedia", bytes(4096), age=2 * DAY)
    site.add("OtherMedia", bytes(4096), age=DAY)
    site.accessed = {"UsedMedia"}
    site.run_pass(local_cache={"max_size": 6000})
    assert list(site.files()) == [used]
    site.run_pass(local_cache={"max_size": 4000})
    assert list(site.files()) == []


@on_sqlite
def test_eviction_moves_the_stamp_before_it_removes_anything(site: CacheSite) -> None:
    site.add("OldMedia", b"content", age=2 * DAY)
    seen: list[int | None] = []
    site.gate.before = lambda path: seen.append(site.store.offloaded_before())
    site.store.set_offloaded_before(5)
    assert site.run_pass(local_cache={"max_age": "1d"}).evicted.files == 1
    assert seen == [site.clock_ms - DAY]


# --- what is restored ---


@on_each_database
def test_most_recently_used_media_is_restored_first(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    ages = [400 * DAY, 100 * DAY, 40 * DAY, 10 * DAY, 2 * DAY, 2 * HOUR, 0]
    paths = [site.add(f"{index}Media", b"content", age=age, on_disk=False) for index, age in enumerate(ages)]
    site.run_pass(auto_restore_batch_size=1)
    assert site.gate.passed == paths[::-1]


@on_each_database
def test_media_that_nobody_wants_is_not_restored(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("0Media", b"content", on_disk=False, quarantined_by="@admin:a.org")
    site.add("1Media", b"content", on_disk=False, url_cache="https://a.org")
    site.add("2Media", b"content", on_disk=False)
    site.put("local_content/no/ro/w", b"content")
    assert site.run_pass().restored.files == 1
    assert list(site.files()) == ["local_content/2M/ed/ia"]


@on_sqlite
def test_what_is_deleted_while_it_is_fetched_does_not_come_back(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("Deleted", b"content", on_disk=False)
    bucket(site).before = lambda operation, key: site.execute("DELETE FROM local_media_repository")
    assert site.run_pass().restored.files == 0
    # Not even for a moment.
    assert (site.files(), site.gate.passed) == ({}, [])


@on_sqlite
def test_what_is_deleted_while_it_gets_its_name_is_removed_again(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("Deleted", b"content", on_disk=False)
    site.gate.after = lambda path: site.execute("DELETE FROM local_media_repository")
    site.run_pass()
    assert site.files() == {}


@on_sqlite
def test_of_files_that_get_their_places_together_each_is_judged_alone(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    paths = [site.add(f"{index}Media", bytes([index]), on_disk=False) for index in range(5)]
    site.gate.in_use.add(paths[0])

    def disturb(path: str) -> None:
        site.execute("DELETE FROM local_media_repository WHERE media_id = '1Media'")
        site.execute("UPDATE local_media_repository SET quarantined_by = '@a:a.org' WHERE media_id = '2Media'")
        site.write(paths[3], b"somebody else's")

    site.gate.before = disturb
    report = site.run_pass()
    assert site.files() == {paths[3]: b"somebody else's", paths[4]: b"\4"}
    assert (report.restored.files, report.failed.count) == (1, 0)
    assert temporary_files(site.root, os.getpid()) == []


@on_sqlite
def test_what_waits_for_its_place_goes_when_the_pass_breaks_off(
    site: CacheSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_restore, "_LONGEST_WAIT_SECONDS", 3600)
    site.store.set_offloaded_before(0)
    # Twenty failures in a row end the pass, and a slow success may come between them.
    for index in range(80):
        site.add(f"{index:02}Media", b"content", on_disk=False)
    seen: list[int] = []

    def fail_later(operation: str, key: str) -> None:
        seen.append(len(temporary_files(site.root, os.getpid())))
        if len(seen) > 10:
            raise BackendUnavailable("away", operation=operation, key=key)

    bucket(site).before = fail_later
    with pytest.raises(BucketFails):
        site.run_pass(auto_restore_batch_size=1000)
    assert max(seen) > 5
    assert temporary_files(site.root, os.getpid()) == []


@on_each_database
def test_object_that_is_not_what_the_database_says_is_not_restored(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    paths = [site.add(f"{index}Media", b"content", on_disk=False) for index in range(3)]
    site.put(paths[0], b"short")
    site.put(paths[1], b"CONTENT")
    report = site.run_pass()
    assert list(site.files()) == [paths[2]]
    assert report.damaged.count == 2


@on_sqlite
def test_restore_stops_below_max_size_and_says_so(site: CacheSite) -> None:
    fill(site, 20, size=4000)
    wipe(site)
    report = site.run_pass(local_cache={"max_size": 20 * 4096})
    assert (report.restored.files, report.limited_by) == (18, "max_size")
    # Bands of ages follow each other, the newest first.
    assert {path for path in site.files() if "content" in path} >= {path_of(0), path_of(1)}
    assert site.run_pass(local_cache={"max_size": 20 * 4096}).evicted.files == 0


@on_sqlite
def test_restore_stops_below_max_size_whatever_else_comes_meanwhile(site: CacheSite) -> None:
    fill(site, 200, size=4000)
    wipe(site)
    cache = site.cache(local_cache={"max_size": 100 * 4096}, auto_restore_batch_size=2)
    # For each file that is restored, a user uploads one.
    site.gate.after = lambda path: site.room.add(4000)
    report = cache.run_pass()
    assert report.limited_by == "max_size"
    assert 45 <= report.restored.files <= 47
    assert site.room.on_disk == 2 * report.restored.files * 4096


@on_sqlite
def test_restore_leaves_min_free_space(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("AnyMedia", b"content", on_disk=False)
    _free, total = site.store.free_space()
    report = site.run_pass(local_cache={"min_free_space": total})
    assert (report.restored.files, report.limited_by) == (0, "min_free_space")
    assert report.over_limit


@on_sqlite
def test_small_file_is_restored_though_a_larger_one_does_not_fit(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("0Large", bytes(6 << 20), on_disk=False)
    small = site.add("1Small", b"content", on_disk=False)
    report = site.run_pass(local_cache={"max_size": "4M"})
    assert (list(site.files()), report.limited_by) == ([small], "max_size")


@on_sqlite
def test_missing_object_is_asked_for_once_a_day(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    path = site.add("Missing", b"content", on_disk=False, in_bucket=False)
    cache = site.cache()
    assert cache.run_pass().not_in_bucket == 1
    assert cache.run_pass().not_in_bucket == 0
    assert bucket(site).made("open") == [path]
    site.clock_ms += DAY
    assert cache.run_pass().not_in_bucket == 1


@on_sqlite
def test_file_that_could_not_be_proved_is_tried_again_a_day_later(site: CacheSite) -> None:
    path = site.add("OldMedia", b"content", age=2 * DAY, in_bucket=False)
    cache = site.cache(local_cache={"max_age": "1d"}, auto_restore=False)
    assert [cache.run_pass().not_in_bucket for _ in range(2)] == [1, 0]
    site.put(path, b"content")
    site.clock_ms += DAY
    assert cache.run_pass().evicted.files == 1


@on_sqlite
def test_number_of_files_under_way_is_the_batch_size(site: CacheSite) -> None:
    fill(site, 12)
    wipe(site)
    lock, under_way, most = threading.Lock(), [0], [0]

    class Counting(OpenGate):
        def __init__(self) -> None:
            super().__init__()
            self.after = lambda path: count(-1)

    def count(step: int) -> None:
        with lock:
            under_way[0] += step
            most[0] = max(most[0], under_way[0])

    site.gate = Counting()
    bucket(site).before = lambda operation, key: count(1) if operation == "open" else None
    assert site.run_pass(auto_restore_batch_size=2).restored.files == 18
    assert most[0] <= 2


# --- what is evicted ---


@on_each_database
def test_nothing_is_evicted_without_a_local_cache_block(site: CacheSite) -> None:
    before = fill(site, 10)
    free, total = site.store.free_space()
    assert free < total
    site.run_pass()
    assert site.files() == before


@on_each_database
def test_media_older_than_max_age_leaves(site: CacheSite) -> None:
    old = site.add("OldMedia", b"content", thumbnail=b"thumb", age=2 * DAY)
    site.add("OldRemote", b"content", origin="a.org", age=2 * DAY)
    used = site.add("UsedMedia", b"content", created_ts=1, age=DAY // 2)
    created = site.add("Created", b"content", last_access_ts=None, created_ts=site.clock_ms - HOUR)
    report = site.run_pass(local_cache={"max_age": "1d"})
    assert report.evicted.files == 3
    assert sorted(site.files()) == sorted([used, created])
    # Empty directories go, the first level of the layout stays.
    assert sorted(path.name for path in site.root.iterdir() if not path.name.startswith(".")) == [
        "local_content",
        "local_thumbnails",
        "remote_content",
    ]
    assert not (site.root / old).parent.exists()


@on_sqlite
def test_eviction_frees_min_free_space(site: CacheSite) -> None:
    site.add("OldMedia", b"content", age=DAY)
    _, total = site.store.free_space()
    report = site.run_pass(local_cache={"min_free_space": total}, auto_restore=False)
    assert (report.evicted.files, site.files()) == (1, {})


@on_sqlite
def test_what_did_not_fit_finds_room_after_the_next_pass(site: CacheSite) -> None:
    paths = [site.add(f"Number{age:02}", bytes(4096), age=age * DAY) for age in range(20)]
    limits = {"max_size": 20 * 4096}
    assert site.run_pass(local_cache=limits).evicted.files == 0
    report = site.run_pass(local_cache=limits, is_full=True)
    assert (report.evicted.files, site.room.on_disk) == (2, 18 * 4096)
    assert sorted(site.files()) == sorted(paths[:18])
    # It stays away, and is not taken for something that has to be restored.
    assert site.run_pass(local_cache=limits).restored.files == 0


@on_sqlite
def test_readers_find_room_though_the_bucket_fails_later_in_the_pass(site: CacheSite) -> None:
    for age in range(20):
        site.add(f"Number{age:02}", bytes(4096), age=age * DAY)
    cache = site.cache(local_cache={"max_size": 20 * 4096})

    def refuse(operation: str, key: str) -> None:
        if operation == "list":
            raise BackendUnavailable("it is away", operation="list", key=key)

    bucket(site).before = refuse
    with pytest.raises(BackendUnavailable):
        cache.run_pass(is_full=True)
    assert site.room.on_disk == 18 * 4096
    assert site.room.take(2 * 4096)


@on_each_database
def test_some_things_are_never_evicted(site: CacheSite) -> None:
    quarantined = site.add("Quarantined", b"content", age=9 * DAY, quarantined_by="@admin:a.org")
    in_use = site.add("InUse", b"content", age=9 * DAY)
    site.gate.in_use.add(in_use)
    site.add("evictable", b"content", age=9 * DAY)
    others = ["url_cache/2026/abc", "local_content/no/ro/w", "local_content/stray", "remote_content/a.org/x", "x"]
    for path in others:
        site.write(path, b"not ours")
        site.put(path, b"not ours")
    site.run_pass(local_cache={"max_age": "1d", "max_size": 0})
    assert sorted(site.files()) == sorted([quarantined, in_use, *others])


@on_sqlite
def test_what_came_lately_stays(site: CacheSite) -> None:
    path = site.add("OldMedia", b"content", age=9 * DAY)
    os.utime(site.root / path, (1, 1))
    site.clock_ms = int(time.time() * 1000) + 300_000
    assert site.run_pass(local_cache={"max_age": "1d"}).evicted.files == 0
    assert site.run_pass(local_cache={"max_age": "1d", "min_age": "1m"}).evicted.files == 1


@on_sqlite
def test_what_was_used_later_does_not_leave_for_what_is_too_new_on_the_disk_to_leave(
    site: CacheSite, tmp_path: Path
) -> None:
    site.clock_ms = int(time.time() * 1000)
    used = [site.add(f"Used{index:04}", bytes(4096), age=index) for index in range(20)]
    boundary = later_than_now(tmp_path)
    # As after a restore: nobody has used these for long.
    for index in range(20):
        site.add(f"Cold{index:04}", bytes(4096), age=300 * DAY)
    site.clock_ms = boundary + 60_000
    report = site.run_pass(local_cache={"max_size": 30 * 4096, "min_age": "1m"})
    assert (report.evicted.files, report.over_limit) == (0, True)
    assert set(used) <= set(site.files())
    site.clock_ms += HOUR
    assert site.run_pass(local_cache={"max_size": 30 * 4096, "min_age": "1m"}).evicted.files > 0
    assert set(used) <= set(site.files())


@on_sqlite
def test_media_that_cannot_leave_is_told_where_it_takes_the_room_of_the_rest(site: CacheSite) -> None:
    for index in range(20):
        site.add(f"Remote{index:02}", bytes(4096), origin="a.org", age=index, in_bucket=False)
    site.write("local_content/un/kn/own", bytes(4096))
    cache = site.cache(stored=("local",), local_cache={"max_size": 10 * 4096})
    # What was tried in vain is known to be immovable then.
    reports = [cache.run_pass() for _ in range(3)]
    assert [report.evicted.files for report in reports] == [0, 0, 0]
    assert reports[-1].over_limit
    assert "84.0 KiB on the disk cannot be removed" in str(reports[-1].out_of_reach)


@on_sqlite
def test_nothing_comes_back_that_is_older_than_what_leaves_in_the_same_pass(
    site: CacheSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A little more is freed than has to stay free.
    total, of_others = 4096 * 1000, 4096 * 871
    monkeypatch.setattr(MediaStore, "free_space", lambda store: (total - of_others - 4096 * len(site.files()), total))
    monkeypatch.setattr(cache_restore, "_TOO_LITTLE", 4096)
    site.store.set_offloaded_before(0)
    for index in range(30):
        site.add(f"Number{index:02}", bytes(4096), age=index * HOUR)
        site.add(f"Missing{index:02}", bytes(4096), age=2 * DAY + index * HOUR, on_disk=False)
    report = site.run_pass(local_cache={"min_free_space": "10%"})
    assert (report.evicted.files, report.restored.files) == (11, 0)


@pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend_name"),
    [("moto", "sqlite", "minio"), ("moto", "sqlite", "boto3")],
    indirect=["s3_server", "synapse_database"],
)
def test_object_in_an_archive_class_proves_nothing(real_site: CacheSite, s3_server: S3Server) -> None:
    path = real_site.add("OldMedia", b"content", age=2 * DAY)
    name = real_site.bucket_name
    client = make_client(s3_server)
    # What a lifecycle rule does after a while.
    client.copy_object(Bucket=name, Key=path, CopySource={"Bucket": name, "Key": path}, StorageClass="GLACIER")
    client.close()
    report = real_site.run_pass(local_cache={"max_age": "1d"})
    assert (report.evicted.files, report.damaged.count) == (0, 1)
    assert "GLACIER" in str(report)
    assert real_site.files() == {path: b"content"}


@on_sqlite
def test_object_that_turns_out_to_be_archived_proves_nothing(site: CacheSite) -> None:
    path = site.add("OldMedia", b"content", age=2 * DAY)
    read = site.add("ReadableMedia", b"readable", age=2 * DAY)

    class Tiered(MemoryBackend):
        """Has a class that others do not know, and tells only who reads that an object has left it."""

        def _info(self, key: str, content: bytes) -> ObjectInfo:
            return replace(super()._info(key, content), storage_class="COLD")

        def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ObjectReader:
            if key == path:
                raise ObjectArchived("archived", operation="open", key=key)
            return super().open(key, offset=offset, if_match=if_match)

    bucket = Tiered()
    bucket.objects |= {path: b"content", read: b"readable"}
    site.backend = bucket
    report = site.run_pass(local_cache={"max_age": "1d"})
    assert (report.evicted.files, report.damaged.count) == (1, 1)
    assert "its object is archived (COLD)" in str(report)
    assert site.files() == {path: b"content"}


@on_sqlite
def test_nothing_is_sent_over_an_object_that_the_listing_lacks(site: CacheSite) -> None:
    site.add("SomeMedia", b"content")
    listless = bucket(site)
    listless.list = lambda prefix="", *, start_after="": iter(())  # type: ignore[method-assign]
    listless.calls.clear()
    report = site.run_pass()
    assert report.listed and report.uploaded.files == 0
    assert listless.made("put") == []


@on_each_database
def test_media_that_is_used_at_the_last_moment_stays(site: CacheSite) -> None:
    used = site.add("UsedMedia", b"content", age=2 * DAY)
    quarantined = site.add("BadMedia", b"content", age=2 * DAY)

    def use(operation: str, key: str) -> None:
        site.execute("UPDATE local_media_repository SET last_access_ts = ? WHERE media_id = 'UsedMedia'", site.clock_ms)
        site.execute("UPDATE local_media_repository SET quarantined_by = 'x' WHERE media_id = 'BadMedia'")

    bucket(site).before = use
    site.run_pass(local_cache={"max_age": "1d"})
    assert sorted(site.files()) == sorted([used, quarantined])


@on_sqlite
def test_file_that_changes_after_it_was_proved_stays(site: CacheSite) -> None:
    path = site.add("OldMedia", b"content", age=2 * DAY)
    site.gate.before = lambda path: site.write(path, b"changed")
    assert site.run_pass(local_cache={"max_age": "1d"}).evicted.files == 0
    assert site.files() == {path: b"changed"}


@on_sqlite
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("wrong", [b"CONTENT", b"conten", b""])
class TestProof:
    """Where file and object differ, the database judges."""

    @pytest.fixture(autouse=True)
    def bucket_with_etags(self, site: CacheSite, opaque: bool) -> None:
        site.backend = MemoryBackend(opaque_etags=opaque)

    def evict(self, site: CacheSite) -> None:
        """Three passes, within a day; nothing but eviction."""
        cache = site.cache(local_cache={"max_age": "1d"}, auto_restore=False)
        self.reports = [cache.run_pass() for _ in range(3)]

    def test_right_file_replaces_the_wrong_object(self, site: CacheSite, wrong: bytes) -> None:
        path = site.add("OldMedia", b"content", age=2 * DAY)
        site.put(path, wrong)
        self.evict(site)
        assert [report.replaced.files for report in self.reports] == [1, 0, 0]
        assert [report.evicted.files for report in self.reports] == [0, 1, 0]
        assert bucket(site).objects == {path: b"content"}

    def test_right_object_replaces_the_damaged_file(self, site: CacheSite, wrong: bytes) -> None:
        path = site.add("OldMedia", b"content", age=2 * DAY)
        site.write(path, wrong)
        self.evict(site)
        assert [report.mended.files for report in self.reports] == [1, 0, 0]
        assert bucket(site).objects == {path: b"content"}

    def test_where_none_is_right_nothing_is_touched_and_it_is_told_once(self, site: CacheSite, wrong: bytes) -> None:
        path = site.add("OldMedia", b"content", age=2 * DAY)
        site.write(path, wrong)
        site.put(path, b"neither")
        self.evict(site)
        assert (site.files(), bucket(site).objects) == ({path: wrong}, {path: b"neither"})
        assert [report.damaged.count for report in self.reports] == [1, 0, 0]
        assert path in str(self.reports[0])

    def test_where_both_may_be_right_nothing_is_touched(self, site: CacheSite, wrong: bytes) -> None:
        path = site.add("OldMedia", b"content", age=2 * DAY, sha256=None, media_length=len(wrong))
        site.write(path, wrong[::-1])
        site.put(path, wrong)
        self.evict(site)
        if wrong:
            assert (site.files(), bucket(site).objects) == ({path: wrong[::-1]}, {path: wrong})


@on_sqlite
def test_file_without_an_object_is_not_evicted_but_stored(site: CacheSite) -> None:
    path = site.add("OldMedia", b"content", age=2 * DAY, in_bucket=False)
    cache = site.cache(local_cache={"max_age": "1d"})
    report = cache.run_pass()
    assert (report.evicted.files, report.uploaded.files, bucket(site).objects) == (0, 1, {path: b"content"})
    assert cache.run_pass().evicted.files == 1


@on_sqlite
def test_kind_of_media_that_does_not_go_into_the_bucket_is_not_sent_there(site: CacheSite) -> None:
    site.add("OldMedia", b"content", age=2 * DAY, in_bucket=False)
    site.add("OldRemote", b"content", origin="a.org", age=2 * DAY, in_bucket=False)
    for limits in ({"max_age": "1d"}, None):
        report = site.run_pass(stored=("remote",), local_cache=limits)
        assert report.evicted.files == 1 - report.uploaded.files - (limits is None)
    assert list(bucket(site).objects) == ["remote_content/a.org/Ol/dR/emote"]


@on_sqlite
def test_without_auto_restore_there_is_only_eviction(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    site.add("Missing", b"content", on_disk=False)
    unstored = site.add("NoObject", b"content", in_bucket=False)
    old = site.add("OldMedia", b"content", age=2 * DAY)
    report = site.run_pass(auto_restore=False, local_cache={"max_age": "1d"})
    assert (list(site.files()), report.evicted.files, report.listed) == ([unstored], 1, False)
    assert old in bucket(site).objects and unstored not in bucket(site).objects


# --- healing ---


@on_each_database
def test_damaged_file_is_replaced_in_one_step(site: CacheSite) -> None:
    path = site.add("Poisoned", b"content")
    site.write(path, b"")
    with (site.root / path).open("rb") as reader:
        assert site.run_pass().mended.files == 1
        assert reader.read() == b""
    assert site.files() == {path: b"content"}


@on_sqlite
def test_damaged_file_in_use_or_of_late_is_left(site: CacheSite) -> None:
    path = site.add("Poisoned", b"content")
    site.write(path, b"part")
    site.gate.in_use.add(path)
    assert site.run_pass().mended.files == 0
    site.gate.in_use.clear()
    site.clock_ms = int(time.time() * 1000)
    assert site.run_pass().mended.files == 0


@on_sqlite
def test_file_that_changes_while_it_is_mended_stays(site: CacheSite) -> None:
    path = site.add("Poisoned", b"content")
    site.write(path, b"part")
    site.gate.before = lambda path: site.write(path, b"changed")
    assert site.run_pass().mended.files == 0
    assert site.files() == {path: b"changed"}


@on_sqlite
def test_damaged_file_without_a_whole_object_is_told_once(site: CacheSite) -> None:
    path = site.add("Poisoned", b"content")
    site.write(path, b"part")
    site.put(path, b"other")
    cache = site.cache()
    assert [cache.run_pass().damaged.count for _ in range(2)] == [1, 0]
    assert site.files() == {path: b"part"}


@on_sqlite
def test_damaged_file_is_not_sent(site: CacheSite) -> None:
    path = site.add("Poisoned", b"content", in_bucket=False)
    site.write(path, b"CONTENT")
    report = site.run_pass()
    assert (report.uploaded.files, report.damaged.count, bucket(site).objects) == (0, 1, {})


@on_sqlite
def test_bucket_is_listed_once_a_day_whatever_is_started_anew(site: CacheSite) -> None:
    site.add("AnyMedia", b"content")
    assert [site.run_pass().listed for _ in range(3)] == [True, False, False]
    site.clock_ms += DAY
    assert [site.run_pass().listed for _ in range(2)] == [True, False]
    assert len(bucket(site).made("list")) == 2 * 4


@on_sqlite
def test_bucket_is_not_listed_before_there_are_files_to_compare_with_it(site: CacheSite) -> None:
    fill(site, 4)
    wipe(site)
    assert [site.run_pass().listed for _ in range(3)] == [False, True, False]


@on_sqlite
def test_listing_that_breaks_off_is_tried_again_an_hour_later(site: CacheSite) -> None:
    site.add("AnyMedia", b"content")

    def refuse(operation: str, key: str) -> None:
        if operation == "list":
            raise BackendUnavailable("it is away", operation="list", key=key)

    bucket(site).before = refuse
    cache = site.cache()
    with pytest.raises(BackendUnavailable):
        cache.run_pass()
    site.clock_ms += HOUR - 1
    assert not cache.run_pass().listed
    site.clock_ms += 1
    bucket(site).before = lambda operation, key: None
    assert cache.run_pass().listed


@on_sqlite
def test_what_was_tried_in_vain_is_not_sent_again_by_the_next_listing(site: CacheSite) -> None:
    path = site.add("AnyMedia", b"content", sha256="0" * 64, in_bucket=False)
    cache = site.cache()
    assert cache.run_pass().damaged.count == 1
    (site.root / ".s3_storage_provider" / "listed_at").unlink()
    site.clock_ms += HOUR
    report = cache.run_pass()
    assert (report.listed, report.damaged.count) == (True, 0)
    assert path in site.files()


@on_sqlite
def test_without_permission_to_list_the_rest_goes_on(site: CacheSite) -> None:
    before = fill(site, 4)
    wipe(site)
    site.store.set_offloaded_before(0)
    before[site.add("AnyMedia", b"content")] = b"content"

    def refuse(operation: str, key: str) -> None:
        if operation == "list":
            raise AccessDenied("no", operation=operation)

    bucket(site).before = refuse
    report = site.run_pass()
    assert (site.files(), report.listed, report.failed.count) == (before, False, 0)
    site.run_pass()
    assert len(bucket(site).made("list")) == 1


# --- trouble ---


@on_sqlite
@pytest.mark.parametrize("operation", ["open", "stat", "list"])
@pytest.mark.parametrize("kind", [BackendUnavailable, Misconfigured])
def test_bucket_that_is_away_ends_the_pass_and_the_next_one_goes_on(
    site: CacheSite, kind: type[BackendError], operation: str
) -> None:
    before = fill(site, 40)
    wipe(site)
    site.store.set_offloaded_before(0)
    old = {site.add(f"{index}OldMedia", b"content", age=9 * DAY) for index in range(30)}

    def fail(name: str, key: str) -> None:
        if name == operation:
            raise kind("away", operation=name, key=key)

    cache = site.cache(local_cache={"max_age": "8d"})
    bucket(site).before = fail
    with pytest.raises((kind, BucketFails)):
        cache.run_pass()
    if operation == "stat":
        assert set(site.files()) == old
    bucket(site).before = lambda name, key: None
    cache.run_pass()
    assert site.files() == before


@on_sqlite
def test_failure_of_one_file_does_not_stop_the_others(site: CacheSite) -> None:
    before = fill(site, 6)
    wipe(site)

    def fail(operation: str, key: str) -> None:
        if key == path_of(2):
            raise BackendUnavailable("away", operation=operation, key=key)

    bucket(site).before = fail
    report = site.run_pass()
    assert (set(before) - set(site.files()), report.failed.count) == ({path_of(2)}, 1)
    assert f"{path_of(2)}: away" in str(report)
    bucket(site).before = lambda operation, key: None
    site.run_pass()
    assert site.files() == before


@on_sqlite
def test_pass_ends_when_it_is_to_stop(site: CacheSite) -> None:
    fill(site, 4)
    site.stop.set()
    with pytest.raises(Stopped):
        site.run_pass(local_cache={"max_size": 0})
    assert len(site.files()) == 6


@on_sqlite
def test_report_is_one_line(site: CacheSite) -> None:
    fill(site, 4)
    wipe(site)
    line = str(site.run_pass())
    assert line.startswith("Local cache: restored 6 (24.0 KiB), healed 0, evicted 0 (0 Bytes), kept 6 (24.0 KiB); ")
    assert "\n" not in line


# --- what would like to get out of the store ---


@on_each_database
def test_rows_that_lead_out_of_the_store_are_refused(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    outside = site.root.parent / "outside"
    outside.write_bytes(b"untouched")
    names = ["ab/../../../../outside", "..", "../..", "....", "abcd..", "/etc/passwd", "ab\ncdef", "x" * 10_000]
    for name in names:
        site.database.add_local(name, media_length=9, last_access_ts=1)
        site.database.add_remote("a.org", f"id {name}", name, media_length=9, last_access_ts=1)
    site.database.add_remote("../..", "id", "outside", media_length=9, last_access_ts=1)
    report = site.run_pass(local_cache={"max_size": 0})
    # Of the ids one is short of a reason: "abcd.." is what it looks like in the middle.
    assert report.refused.count >= 2 * len(names) - 1
    assert site.files() == {}
    assert outside.read_bytes() == b"untouched"
    assert sorted(path.name for path in site.root.parent.iterdir() if path.is_file() and "db" not in path.name) == [
        "outside"
    ]


@on_sqlite
def test_keys_of_the_bucket_are_no_paths(site: CacheSite) -> None:
    site.store.set_offloaded_before(0)
    paths = [site.add("AnyMedia", b"content", on_disk=False), site.add("Another", b"content")]
    keys = [
        "local_content/../../outside",
        "local_content//etc/passwd",
        "/etc/passwd",
        "local_content/ab/cd/\x00\x1b[2J",
        "local_content/ab/cd/" + "x" * 10_000,
        "remote_content/../../../../x",
        "local_content/ab/cd/no row",
    ]
    bucket(site).objects.update(dict.fromkeys(keys, b"evil"))
    report = site.run_pass(local_cache={"max_size": "1G"})
    assert report.listed
    assert site.files() == dict.fromkeys(paths, b"content")
    assert not (site.root.parent / "outside").exists()


@on_each_database
def test_symbolic_links_are_not_followed(site: CacheSite, tmp_path: Path) -> None:
    site.store.set_offloaded_before(0)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "ed").mkdir()
    (outside / "ed" / "ia").write_bytes(b"not ours")
    directory = site.add("1Media", b"content", on_disk=False, age=9 * DAY)
    (site.root / "local_content").mkdir()
    (site.root / "local_content" / "1M").symlink_to(outside)
    file = site.add("2Media", b"content", on_disk=False)
    (site.root / file).parent.mkdir(parents=True)
    (site.root / file).symlink_to(outside / "ed" / "ia")
    tmp = site.root / ".s3_storage_provider" / "tmp"
    assert not tmp.exists()
    for limits in (None, {"max_size": 0}, {"max_age": "1d"}):
        site.run_pass(local_cache=limits)
    assert [path.name for path in sorted(outside.rglob("*"))] == ["ed", "ia"]
    assert (outside / "ed" / "ia").read_bytes() == b"not ours"
    assert (site.root / file).is_symlink()
    assert directory not in site.files()


@on_sqlite
def test_own_directory_behind_a_link_is_refused(site: CacheSite, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (site.root / ".s3_storage_provider").symlink_to(outside)
    site.add("AnyMedia", b"content", on_disk=False)
    with pytest.raises(OSError):
        site.run_pass()
    assert list(outside.iterdir()) == []

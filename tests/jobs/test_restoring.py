"""The way back: media that the database knows comes from the bucket into the media store."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_provider.media_store import MediaStore
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.media_site import EVERYWHERE, QUICKLY, WIDELY, MediaSite, now_ms, open_site
from tests.provider.fault_proxy import Request, gets
from tests.servers import S3Server


@pytest.fixture
def site(tmp_path: Path, s3_server: S3Server, synapse_database: SynapseDatabase, backend: str) -> Iterator[MediaSite]:
    with open_site(tmp_path, s3_server, synapse_database, backend) as site:
        site.write_homeserver_yaml(max_attempts=1)
        yield site


def offload(site: MediaSite) -> dict[str, bytes]:
    """Move all files into the bucket; returns them."""
    before = site.files()
    site.sync("--delete")
    assert site.files() == {}
    return before


def is_media(key: str) -> bool:
    return "_" in key.partition("/")[0]


@EVERYWHERE
def test_all_comes_back_and_nothing_is_overwritten(site: MediaSite) -> None:
    site.add_some(6)
    before = offload(site)
    path = next(iter(before))
    other = site.content(len(before[path]))
    site.write(path, other)
    done = site.run("restore", "--all")
    assert done.lines == [
        f"Restored {len(before) - 1} files",
        f"Restored {human(sum(map(len, before.values())) - len(before[path]))}",
        "Missing 0 files",
        "Failed 0 files",
    ]
    assert site.files() == before | {path: other}
    # A second run finds nothing to do.
    site.proxy.forget()
    assert site.run("restore", "--all").lines[0] == "Restored 0 files"
    assert site.proxy.of("GET") == []
    # What was used last is what its time says.
    assert (site.store / list(before)[1]).stat().st_mtime == 1


def human(size: int) -> str:
    return f"{size / 1024:.1f}K"


@WIDELY
def test_since_and_origin_choose(site: MediaSite) -> None:
    hour = 3_600_000
    site.add_local("OldMedia", last_access_ts=now_ms() - 30 * hour)
    recent = site.add_local("RecentMedia", last_access_ts=now_ms() - 5 * hour)
    created = site.add_local("CreatedMedia", created_ts=now_ms() - 5 * hour, last_access_ts=None)
    there = site.add_remote("a.org", "there", "FsidThere")
    site.add_remote("b.org", "elsewhere", "FsidElsewhere")
    before = offload(site)
    site.run("restore", "store", "--since", "1d")
    assert site.files() == {path: before[path] for path in sorted((recent, created))}
    site.run("restore", "store", "--origin", "a.org")
    assert site.files() == {path: before[path] for path in sorted((recent, created, there))}


@QUICKLY
def test_wrong_length_or_sha256_is_refused(site: MediaSite) -> None:
    short, other, fine, missing = (site.add_local(f"{name}Media") for name in ("Short", "Other", "Fine", "Missing"))
    before = offload(site)
    site.put(short, before[short][:-1])
    site.put(other, bytes(len(before[other])))
    site.client.delete_object(Bucket=site.bucket, Key=missing)
    done = site.run("restore", "--all", "--json", status=1)
    assert done.values == {"restored_files": 1, "restored_bytes": len(before[fine]), "missing": 1, "failed": 2}
    assert f"failed: {short}: the object has 2999 bytes, the database says 3000" in done.err
    assert f"failed: {other}: the object has not the SHA-256 that the database knows" in done.err
    assert f"not in the bucket: {missing}" in done.err
    assert site.files() == {fine: before[fine]}


@QUICKLY
def test_damaged_file_on_disk_is_told_and_left_alone(site: MediaSite) -> None:
    emptied, whole = site.add_local("EmptiedMedia"), site.add_local("WholeMedia")
    thumbnails = {"32-32-image-png-crop": b"thumbnail"}
    site.add_remote("a.org", "there", "FsidThere", thumbnails=thumbnails)
    before = offload(site)
    thumbnail = next(path for path in before if "thumbnail" in path)
    found = {emptied: b"", thumbnail: b"thumb"}
    for path, content in found.items():
        site.write(path, content)
    done = site.run("restore", "--all", "--json", status=1)
    assert (done.values["restored_files"], done.values["failed"]) == (2, 2)
    assert f"failed: {emptied}: is on disk, but damaged: it has 0 bytes, the database says 3000" in done.err
    assert f"failed: {thumbnail}: is on disk, but damaged: it has 5 bytes, the database says 9" in done.err
    assert site.files() == before | found and whole in before


@QUICKLY
def test_quarantined_media_and_what_the_database_does_not_know_stay_away(site: MediaSite) -> None:
    bad, removed, meanwhile, fine = (site.add_local(f"{name}Media") for name in ("Bad", "Gone", "While", "Fine"))
    before = offload(site)
    site.database.execute("UPDATE local_media_repository SET quarantined_by = 'me' WHERE media_id = ?", ("BadMedia",))
    site.database.execute("DELETE FROM local_media_repository WHERE media_id = ?", ("GoneMedia",))
    with site.proxy.hold(lambda request: gets(request) and request.key == meanwhile) as held:
        process = site.start("restore", "--all")
        held.wait()
        site.database.execute("DELETE FROM local_media_repository WHERE media_id = ?", ("WhileMedia",))
        held.release()
        site.finish(process)
    assert site.files() == {fine: before[fine]}
    assert {bad, removed} < set(before)


@QUICKLY
def test_keys_and_rows_that_lead_outside_write_nothing_there(site: MediaSite) -> None:
    fine = site.add_local("FineMedia")
    before = offload(site)
    for key in ("local_content/../../victim", "remote_content/a.org/../../../victim", "../victim", "victim"):
        site.client.put_object(Bucket=site.bucket, Key=key.replace("..", "%2e%2e"), Body=b"v")
    site.database.add_remote("a.org", "up", "....../victim")
    site.database.add_local(f"abcd{site.directory}/victim")
    site.database.add_thumbnail("", "FineMedia", 1, 1, "../../../../../victim", "crop", 1)
    done = site.run("restore", "--all", status=1)
    assert done.err.count(": refused: ") == 3
    assert site.files() == before and list(before) == [fine]
    assert not list(site.directory.rglob("victim"))


@QUICKLY
def test_symbolic_link_in_the_way_is_not_followed(site: MediaSite) -> None:
    site.add_local("SomeMedia")
    offload(site)
    outside = site.directory / "outside"
    outside.mkdir()
    (site.store / "local_content" / "So").symlink_to(outside)
    done = site.run("restore", "--all", status=1)
    assert done.err.startswith("failed: local_content/So/me/Media: ")
    assert list(outside.iterdir()) == []


@QUICKLY
def test_old_thumbnails_of_remote_media_come_back_under_their_names(site: MediaSite) -> None:
    """Synapse left the method out of them once, and still looks there."""
    name, old_name = "32-32-image-png-crop", "32-32-image-png"
    site.add_remote("a.org", "there", "FsidThere", thumbnails={name: b"thumbnail"})
    before = offload(site)
    path = next(path for path in before if path.endswith(name))
    old_path = path.removesuffix(name) + old_name
    site.put(old_path, before[path])
    site.client.delete_object(Bucket=site.bucket, Key=path)
    site.run("restore", "--all")
    content = before.pop(path)
    assert site.files() == {**before, old_path: content}
    # Under either name it is there.
    site.proxy.forget()
    assert site.run("restore", "--all").lines[0] == "Restored 0 files"
    assert site.proxy.of("GET") == []


@QUICKLY
def test_disk_that_gets_full_keeps_whole_files_only_and_is_told_once(site: MediaSite, small_disk: Path) -> None:
    site.add_some(60, size=400_000)
    before = offload(site)
    shutil.rmtree(site.store)
    site.store.symlink_to(small_disk)
    done = site.run("restore", "--all", "--workers", "4", status=1)
    assert done.err.count("the disk is full") == 1
    assert 0 < len(site.files()) < len(before)
    assert site.files().items() <= before.items()


@WIDELY
def test_killed_restore_leaves_whole_files_and_can_be_repeated(site: MediaSite) -> None:
    site.add_some(12, size=200_000)
    before = offload(site)
    for number in (3, 6):
        site.proxy.forget()
        with site.proxy.cut(100_000, lambda request: gets(request) and is_media(request.key)):
            process = site.start("restore", "--all", "--workers", "2")
            site.proxy.wait_for(functools.partial(has_seen, number))
            process.kill()
            process.communicate()
        assert site.files().items() <= before.items()
    site.run("restore", "--all")
    assert site.files() == before
    assert list((site.store / ".s3_storage_provider" / "tmp").iterdir()) == []


def has_seen(number: int, requests: list[Request]) -> bool:
    return len(requests) >= number


@QUICKLY
def test_stops_before_the_disk_is_full(site: MediaSite) -> None:
    site.add_some(4)
    offload(site)
    free, _ = MediaStore(site.store).free_space()
    site.write_homeserver_yaml(local_cache={"min_free_space": free * 2})
    done = site.run("restore", "--all", status=1)
    assert "stopped before the disk is full" in done.err and done.err.count("\n") == 1
    assert site.files() == {}
    assert [request for request in site.proxy.of("GET") if is_media(request.key)] == []


@QUICKLY
def test_bucket_that_fails_ends_it_early(site: MediaSite) -> None:
    site.add_some(60, size=10)
    offload(site)
    with site.proxy.slow_down(lambda request: gets(request) and is_media(request.key)):
        done = site.run("restore", "--all", "--workers", "2", status=3)
    assert done.err.count("failed: ") < 30
    assert "SlowDown" in done.err.splitlines()[-1]
    assert site.files() == {}


@QUICKLY
def test_objects_that_may_not_be_read_keep_nothing_else_away(site: MediaSite) -> None:
    unreadable = {site.add_local(f"Aaaa{index:02}media") for index in range(25)}
    last = site.add_local("ZzzzMedia")
    offload(site)
    with site.proxy.refuse(403, "AccessDenied", lambda request: request.key in unreadable):
        done = site.run("restore", "--all", "--workers", "1", status=1)
    assert done.err.count("failed: ") == len(unreadable)
    assert list(site.files()) == [last]


@QUICKLY
def test_content_of_each_origin_is_its_own(site: MediaSite) -> None:
    site.add_remote("a.org", "same", "FsidSame", b"a" * 100)
    site.add_remote("b.org", "same", "FsidSame", b"b" * 100)
    before = offload(site)
    site.run("restore", "--all")
    assert site.files() == before
    assert len({hashlib.sha256(content).hexdigest() for content in before.values()}) == 2

"""The local disk as a cache of the bucket, in a real Synapse: filled again, mended, bounded, and never trusting."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.provider.conftest import OpenSite
from tests.provider.fault_proxy import gets
from tests.provider.homeserver import Homeserver
from tests.provider.pictures import png
from tests.provider.site import Site, eventually

RESTORING = {"auto_restore": True, "auto_restore_monitor_interval": 1}
AT_ONCE = {"min_age": 0}
"""Limits that leave nothing alone for being new."""


def start_again(site: Site, **changes: Any) -> None:
    assert site.homeserver.stop() == 0
    site.homeserver.storage.update(changes)
    site.mark_log()
    site.homeserver.start()


def local_path(site: Site, media_id: str) -> Path:
    return site.homeserver.media_store / site.path(media_id)


def media_files(site: Site) -> dict[str, bytes]:
    """All media on the disk; what is being written or removed meanwhile is left out."""
    found = {}
    for path in site.homeserver.local_files():
        name = str(path.relative_to(site.homeserver.media_store))
        if not name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                found[name] = path.read_bytes()
    return found


def passes(site: Site) -> list[str]:
    return re.findall(r"^.*Local cache: restored.*$", site.log, re.MULTILINE)


def wait_for_passes(site: Site, more: int = 2) -> str:
    """Wait for passes that have begun from now on; returns the last one's line."""
    seen = len(passes(site))
    eventually("the next pass", lambda: len(passes(site)) >= seen + more)
    return passes(site)[-1]


def execute(site: Site, sql: str, *arguments: object) -> None:
    with contextlib.closing(sqlite3.connect(site.homeserver.directory / "homeserver.db", timeout=60)) as database:
        database.execute(sql, arguments)
        database.commit()


def age(site: Site, media_id: str, seconds: float) -> None:
    """Let media have been used last that long ago."""
    used = int((time.time() - seconds) * 1000)
    execute(
        site,
        "UPDATE local_media_repository SET created_ts = ?, last_access_ts = ? WHERE media_id = ?",
        used,
        used,
        media_id,
    )


@pytest.mark.parametrize(
    ("backend", "face", "database"),
    [
        ("minio", "moto", "sqlite"),
        pytest.param("minio", "minio", "postgres", marks=pytest.mark.servers),
        pytest.param("boto3", "minio", "postgres", marks=pytest.mark.servers),
    ],
)
def test_a_lost_disk_is_filled_again_and_every_file_is_served_from_the_first_second(
    open_site: OpenSite, backend: str, face: str, database: str
) -> None:
    site = open_site(backend, face, database, storage=RESTORING)
    contents = {}
    for number in range(200):
        content = os.urandom(1000 + number * 2000)
        contents[site.homeserver.upload(content)] = content
    picture = site.homeserver.upload(png(640, 480), "image/png")
    before = media_files(site)
    assert len(before) == 200 + 1 + 4
    assert site.homeserver.stop() == 0
    site.homeserver.wipe_media()
    site.mark_log()
    site.homeserver.start()
    for media_id, content in contents.items():
        assert site.homeserver.download(media_id).body == content
    eventually("everything is back", lambda: media_files(site) == before)
    assert site.homeserver.thumbnail(picture).status == 200
    wait_for_passes(site)
    site.proxy.forget()
    for media_id, content in contents.items():
        assert site.homeserver.download(media_id).body == content
    assert not any(map(gets, site.proxy.requests))
    assert site.trouble() == []


def test_what_goes_missing_later_comes_back(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING)
    media_id = site.homeserver.upload(b"content")
    wait_for_passes(site)
    local_path(site, media_id).unlink()
    eventually("it is back", local_path(site, media_id).exists)
    assert local_path(site, media_id).read_bytes() == b"content"


def test_without_auto_restore_nothing_comes_back_by_itself(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"auto_restore": False, "local_cache": AT_ONCE})
    media_id = site.upload_and_lose(b"content")
    wait_for_passes(site)
    assert media_files(site) == {}
    assert site.homeserver.download(media_id).body == b"content"


def test_without_restore_at_start_the_first_pass_comes_after_the_interval(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"auto_restore_startup": False})
    media_id = site.upload_and_lose(b"content")
    start_again(site, auto_restore_monitor_interval=3600)
    site.serves_others()
    assert passes(site) == []
    start_again(site, auto_restore_monitor_interval=1)
    eventually("it is back", local_path(site, media_id).exists)


def test_an_upgrade_fetches_nothing_of_what_is_not_on_the_disk(open_site: OpenSite) -> None:
    """A store that has been without this cache so far is left as it is: its disk may be full."""
    site = open_site("minio", storage={"auto_restore": False})
    old, kept = site.homeserver.upload(b"old"), site.homeserver.upload(b"kept")
    local_path(site, old).unlink()
    shutil.rmtree(site.homeserver.media_store / ".s3_storage_provider", ignore_errors=True)
    start_again(site, **RESTORING)
    wait_for_passes(site)
    assert media_files(site) == {site.path(kept): b"kept"}
    # Who asks for it gets it, and it stays: it is in use again.
    assert site.homeserver.download(old).body == b"old"
    eventually("it is on the disk", local_path(site, old).exists)


def test_deleted_and_quarantined_media_does_not_come_back(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING)
    deleted, quarantined, other = (site.homeserver.upload(content) for content in (b"deleted", b"quarantined", b"o"))
    execute(site, "DELETE FROM local_media_repository WHERE media_id = ?", deleted)
    execute(site, "UPDATE local_media_repository SET quarantined_by = 'admin' WHERE media_id = ?", quarantined)
    assert site.homeserver.stop() == 0
    site.homeserver.wipe_media()
    site.homeserver.start()
    eventually("the other one is back", local_path(site, other).exists)
    wait_for_passes(site)
    assert media_files(site) == {site.path(other): b"o"}


def test_what_the_command_line_has_removed_on_purpose_does_not_come_back(open_site: OpenSite, tmp_path: Path) -> None:
    site = open_site("minio", storage=RESTORING | {"prefix": ""})
    old, new = site.homeserver.upload(b"old"), site.homeserver.upload(b"new")
    age(site, old, 90 * 86_400)
    root = Path(__file__).parents[2]
    configuration = str(site.homeserver.directory / "homeserver.yaml")
    subprocess.run(
        [
            sys.executable,
            root / "scripts" / "s3_media_upload",
            "sync",
            "--homeserver-config-path",
            configuration,
            "--delete",
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert media_files(site) == {site.path(new): b"new"}
    wait_for_passes(site)
    assert media_files(site) == {site.path(new): b"new"}
    start_again(site)
    wait_for_passes(site)
    assert media_files(site) == {site.path(new): b"new"}


def test_a_bucket_that_is_away_at_the_start_delays_nothing_but_the_restore(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"connect_timeout": 1, "read_timeout": 2})
    lost, local = site.homeserver.upload(b"lost"), site.homeserver.upload(b"local")
    wait_for_passes(site)
    assert site.homeserver.stop() == 0
    local_path(site, lost).unlink()
    site.mark_log()
    with site.proxy.drop():
        site.homeserver.start()
        assert site.homeserver.download(local).body == b"local"
        site.wait_for_log("Local cache: .*failed 1|local cache of media is not up to date")
        assert not local_path(site, lost).exists()
    eventually("it is back", local_path(site, lost).exists)
    assert "Traceback" not in site.log


# --- damage ---


def test_a_damaged_file_is_replaced_by_its_whole_object_and_a_damaged_object_by_its_file(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"local_cache": AT_ONCE})
    file, thing = site.homeserver.upload(b"the file is damaged"), site.homeserver.upload(b"the object is damaged")
    wait_for_passes(site)
    local_path(site, file).write_bytes(b"short")
    site.client.put_object(Bucket=site.bucket, Key=site.key(thing), Body=b"short")
    (site.homeserver.media_store / ".s3_storage_provider" / "listed_at").unlink()
    eventually("the file is mended", lambda: local_path(site, file).read_bytes() == b"the file is damaged")
    eventually("the object is mended", lambda: site.content(site.key(thing)) == b"the object is damaged")
    assert local_path(site, thing).read_bytes() == b"the object is damaged"


def test_where_both_are_damaged_nothing_is_touched_and_it_is_told(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"local_cache": AT_ONCE})
    media_id = site.homeserver.upload(b"content")
    wait_for_passes(site)
    local_path(site, media_id).write_bytes(b"shorter")
    local_path(site, media_id).write_bytes(b"short")
    site.client.put_object(Bucket=site.bucket, Key=site.key(media_id), Body=b"broken")
    line = site.wait_for_log("Local cache: .*damaged 1")
    assert site.path(media_id) in line
    wait_for_passes(site)
    assert local_path(site, media_id).read_bytes() == b"short"
    assert site.content(site.key(media_id)) == b"broken"


def test_what_never_reached_the_bucket_is_sent(open_site: OpenSite) -> None:
    site = open_site(
        "minio", wrapper={"store_synchronous": False}, storage=RESTORING | {"local_cache": AT_ONCE, "max_attempts": 1}
    )
    wait_for_passes(site)
    with site.proxy.drop(lambda request: request.method == "PUT"):
        media_id = site.homeserver.upload(b"content")
        site.wait_for_log("put.*no answer|Media storage fails: put")
    assert not site.holds(media_id)
    # A pass may have listed the bucket meanwhile.
    (site.homeserver.media_store / ".s3_storage_provider" / "listed_at").unlink(missing_ok=True)
    eventually("it is in the bucket", lambda: site.holds(media_id))
    assert site.content(site.key(media_id)) == b"content"


def test_nothing_is_sent_beside_media_that_is_there_under_another_spelling_of_the_prefix(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"prefix": "media", "raw_prefix": True, "local_cache": AT_ONCE})
    media_id = site.homeserver.upload(b"content")
    keys = site.object_keys()
    assert keys == [f"media{site.path(media_id)}"]
    assert site.homeserver.stop() == 0
    # The bucket is listed by the next pass.
    shutil.rmtree(site.homeserver.media_store / ".s3_storage_provider")
    site.homeserver.storage.update(raw_prefix=False, check_on_startup="off")
    site.mark_log()
    site.homeserver.start()
    assert " ERROR " in site.wait_for_log("set `raw_prefix: true`")
    assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"more", "text/plain").status == 500
    assert site.homeserver.stop() == 0
    assert site.object_keys() == keys
    assert local_path(site, media_id).read_bytes() == b"content"
    assert passes(site) == []


# --- limits ---


def test_the_disk_stays_within_max_size_and_every_read_returns_the_right_bytes(open_site: OpenSite) -> None:
    limit = 8 << 20
    site = open_site("minio", storage=RESTORING | {"local_cache": {"max_size": limit, **AT_ONCE}})
    contents: dict[str, bytes] = {}
    chance = random.Random(7)
    # What was written since the last pass is on the disk besides.
    largest = 0
    for number in range(120):
        content = chance.randbytes(chance.choice([1000, 100_000, 600_000]))
        contents[site.homeserver.upload(content)] = content
        media_id = chance.choice(list(contents))
        assert site.homeserver.download(media_id).body == contents[media_id]
        if number % 30 == 29:
            wait_for_passes(site)
            largest = max(largest, sum(map(len, media_files(site).values())))
    assert sum(map(len, contents.values())) > 3 * limit
    assert 0 < largest <= limit
    for media_id, content in contents.items():
        assert site.homeserver.download(media_id).body == content
    assert site.trouble() == []


def test_what_was_not_used_for_max_age_leaves_the_disk_and_is_served_from_the_bucket(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"local_cache": {"max_age": "1d", **AT_ONCE}})
    old, new = site.homeserver.upload(b"old"), site.homeserver.upload(b"new")
    age(site, old, 2 * 86_400)
    eventually("the old one has left the disk", lambda: media_files(site) == {site.path(new): b"new"})
    wait_for_passes(site)
    assert media_files(site) == {site.path(new): b"new"}
    assert site.homeserver.download(old).body == b"old"


def test_what_is_not_whole_in_the_bucket_never_leaves_the_disk(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"auto_restore": False, "local_cache": {"max_age": "1d", **AT_ONCE}})
    wrong, missing = site.homeserver.upload(b"content"), site.homeserver.upload(b"missing")
    site.client.put_object(Bucket=site.bucket, Key=site.key(wrong), Body=b"0ther b")
    site.client.delete_object(Bucket=site.bucket, Key=site.key(missing))
    for each in (wrong, missing):
        age(site, each, 2 * 86_400)
    eventually("it has left the disk", lambda: not local_path(site, wrong).exists())
    # The right one has taken the place of the wrong one before.
    assert site.content(site.key(wrong)) == b"content"
    wait_for_passes(site)
    assert local_path(site, missing).read_bytes() == b"missing"


def test_media_that_is_new_on_the_disk_is_left_alone(open_site: OpenSite) -> None:
    site = open_site("minio", storage=RESTORING | {"local_cache": {"max_age": "1d", "min_age": "1h"}})
    media_id = site.homeserver.upload(b"content")
    age(site, media_id, 2 * 86_400)
    wait_for_passes(site)
    assert local_path(site, media_id).exists()


def test_a_full_disk_ends_the_restore_which_is_told_once_and_everything_is_served(
    open_site: OpenSite, small_disk: Path
) -> None:
    site = open_site("minio", storage={"auto_restore": False})
    contents = {}
    for _ in range(30):
        content = os.urandom(1 << 20)
        contents[site.homeserver.upload(content)] = content
    site.homeserver.config["media_store_path"] = str(small_disk)
    site.homeserver.media_store = small_disk
    start_again(site, **RESTORING, local_cache={"min_free_space": "4M", **AT_ONCE})
    site.wait_for_log("not all media that belongs on disk is restored")
    wait_for_passes(site)
    assert site.log.count("not all media that belongs on disk is restored") == 1
    assert 8 <= len(media_files(site)) <= 12
    for media_id, content in contents.items():
        assert site.homeserver.download(media_id).body == content
    assert shutil.disk_usage(small_disk).free >= 3 << 20
    assert site.trouble() == []


# --- several processes ---


def test_of_two_processes_on_one_directory_one_keeps_the_cache_and_the_other_takes_over(
    open_site: OpenSite, tmp_path: Path
) -> None:
    site = open_site("minio", storage=RESTORING)
    media_id = site.homeserver.upload(b"content")
    wait_for_passes(site)
    settings = {"media_store_path": str(site.homeserver.media_store), "server_name": "test.example"}
    directory = tmp_path / "second"
    directory.mkdir()
    with contextlib.closing(sqlite3.connect(site.homeserver.directory / "homeserver.db")) as database:
        database.execute("VACUUM INTO ?", (str(directory / "homeserver.db"),))
    shutil.copy(site.homeserver.directory / "signing.key", directory)
    second = Homeserver(directory, site.homeserver.storage, settings=settings)
    second.token = site.homeserver.token
    with second:
        wait_for_passes(site)
        assert "Local cache: restored" not in second.log
        assert second.download(media_id).body == b"content"
        assert site.homeserver.stop() == 0
        second.wait_for_log("Local cache: restored")
        local_path(site, media_id).unlink()
        eventually("it is back", local_path(site, media_id).exists)


# --- what is not to be trusted ---


def test_neither_keys_nor_rows_nor_links_lead_out_of_the_media_store(open_site: OpenSite, tmp_path: Path) -> None:
    site = open_site("minio", storage=RESTORING | {"prefix": ""})
    media_id = site.homeserver.upload(b"content")
    outside = tmp_path / "outside"
    outside.mkdir()
    names = ["../../outside", "/etc/outside", "..", "ab\x01cd\x02efgh", "x" * 10_000, "ab/../../../../outside"]
    keys = [
        "local_content/../../outside",
        "local_content/aa/bb/\x01",
        "local_content/" + "x" * 900,
        "remote_content/a/b",
    ]
    for number, name in enumerate(names):
        execute(
            site,
            "INSERT INTO remote_media_cache (media_origin, media_id, filesystem_id, media_length, created_ts, media_type)"
            " VALUES (?, ?, ?, 4, ?, 'text/plain')",
            "evil.example" if number % 2 else "../../../outside",
            f"media{number}",
            name,
            int(time.time() * 1000),
        )
    for key in keys:
        site.client.put_object(Bucket=site.bucket, Key=key, Body=b"evil")
    assert site.homeserver.stop() == 0
    site.homeserver.wipe_media()
    link = site.homeserver.media_store / "local_content" / media_id[:2]
    link.parent.mkdir()
    link.symlink_to(outside)
    (site.homeserver.media_store / "remote_content").mkdir()
    site.mark_log()
    site.homeserver.start()
    line = wait_for_passes(site)
    assert "refused 6" in line
    assert list(outside.iterdir()) == []
    assert list((site.homeserver.media_store / "remote_content").iterdir()) == []
    assert "Traceback" not in site.log
    link.unlink()
    start_again(site)
    eventually("what can be restored is", local_path(site, media_id).exists)
    assert "Traceback" not in site.log

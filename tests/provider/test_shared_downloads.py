"""Downloads in a real Synapse: one for all who ask, then a file on the local disk, and never a part of it."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.provider.conftest import QUICK, OpenSite
from tests.provider.fault_proxy import gets
from tests.provider.pictures import png
from tests.provider.site import Site, Task, eventually

PICTURE = png(900, 700)
LARGE = os.urandom(3 << 20)
BREAK = 1_000_000


@pytest.fixture(scope="module", params=QUICK)
def thumbnailing_site(request: pytest.FixtureRequest, open_lasting_site: OpenSite) -> Site:
    backend = request.param.partition("-")[0]
    return open_lasting_site(backend, settings={"dynamic_thumbnails": True})


@pytest.fixture
def site(thumbnailing_site: Site) -> Site:
    thumbnailing_site.proxy.wait_until_idle()
    thumbnailing_site.proxy.forget()
    thumbnailing_site.mark_log()
    return thumbnailing_site


def local_path(site: Site, media_id: str) -> Path:
    return site.homeserver.media_store / site.path(media_id)


def execute(site: Site, sql: str, *arguments: object) -> None:
    with contextlib.closing(sqlite3.connect(site.homeserver.directory / "homeserver.db", timeout=60)) as database:
        database.execute(sql, arguments)
        database.commit()


def test_fifty_clients_that_ask_for_one_file_at_once_cause_one_request(site: Site) -> None:
    content = os.urandom(40 << 20)
    media_id = site.upload_and_lose(content)
    site.proxy.forget()
    with site.proxy.hold(gets) as held:
        downloads = [Task(partial(site.homeserver.download, media_id)) for _ in range(50)]
        held.wait()
        held.release()
        assert all(download.result().body == content for download in downloads)
    assert sum(map(gets, site.proxy.requests)) == 1
    assert site.trouble() == []


@pytest.mark.parametrize("size", [0, 1000, 256 << 10, 3 << 20])
def test_a_file_that_was_fetched_is_on_the_disk_and_the_bucket_is_not_asked_again(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.upload_and_lose(content)
    assert site.homeserver.download(media_id).body == content
    eventually("it is on the disk", local_path(site, media_id).exists)
    assert local_path(site, media_id).read_bytes() == content
    eventually("nothing else is left", lambda: site.temporary_files() == [])
    site.proxy.forget()
    assert site.homeserver.download(media_id).body == content
    assert site.proxy.requests == []


def test_a_download_and_a_thumbnail_at_once_never_let_anybody_see_a_part(site: Site) -> None:
    media_id = site.homeserver.upload(PICTURE, "image/png")
    path = local_path(site, media_id)
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                seen.add(len(content))
                assert not content or content == PICTURE

    watching = Task(watch)
    try:
        for number in range(100):
            path.unlink()
            download = partial(site.homeserver.download, media_id)
            thumbnail = partial(site.homeserver.thumbnail, media_id, 40 + number, 40)
            orders = [(download, thumbnail), (thumbnail, download), (download, thumbnail, download, thumbnail)]
            for answer in [task.result() for task in map(Task, orders[number % 3])]:
                assert answer.status == 200
                assert answer.body == PICTURE or answer.body.startswith(b"\x89PNG")
            assert path.read_bytes() == PICTURE
    finally:
        over.set()
    watching.result()
    # Synapse itself opens an empty file there, which is gone in the same moment.
    assert seen <= {0, len(PICTURE)}
    # Synapse complains of clients that have a thumbnail and hang up before it has noticed that it is done.
    assert "storage_provider" not in "".join(site.trouble())


@pytest.mark.parametrize("order", [("download", "thumbnail"), ("thumbnail", "download")])
def test_a_bucket_that_fails_under_a_download_and_a_thumbnail_ends_both_and_leaves_nothing(
    site: Site, order: tuple[str, str]
) -> None:
    media_id = site.upload_and_lose(PICTURE, "image/png")
    ask = {
        "download": partial(site.homeserver.download, media_id),
        "thumbnail": partial(site.homeserver.thumbnail, media_id, 50, 50),
    }
    with site.proxy.cut(at=300_000, matches=gets) as cut:
        tasks = {name: Task(ask[name]) for name in order}
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            tasks["download"].result()
        assert tasks["thumbnail"].result().status >= 500
        assert cut.hits > 1
    eventually("nothing is left", lambda: site.temporary_files() == [])
    assert not local_path(site, media_id).exists()
    assert site.homeserver.download(media_id).body == PICTURE
    assert site.homeserver.thumbnail(media_id, 50, 50).status == 200


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM local_media_repository WHERE media_id = ?",
        "UPDATE local_media_repository SET quarantined_by = 'admin' WHERE media_id = ?",
    ],
    ids=["deleted", "quarantined"],
)
def test_media_that_was_deleted_or_quarantined_meanwhile_does_not_stay(site: Site, change: str) -> None:
    content = os.urandom(1 << 20)
    media_id = site.upload_and_lose(content)
    with site.proxy.hold(gets) as held:
        download = Task(partial(site.homeserver.download, media_id))
        held.wait()
        execute(site, change, media_id)
        held.release()
        assert download.result().body == content
    eventually("the download is over", lambda: site.temporary_files() == [])
    assert not local_path(site, media_id).exists()


def test_an_object_that_is_not_what_the_database_says_does_not_stay(site: Site) -> None:
    media_id = site.upload_and_lose(os.urandom(1 << 20))
    wrong = os.urandom(1 << 20)
    site.client.put_object(Bucket=site.bucket, Key=site.key(media_id), Body=wrong)
    assert site.homeserver.download(media_id).body == wrong
    eventually("the download is over", lambda: site.temporary_files() == [])
    assert not local_path(site, media_id).exists()


def test_without_read_through_nothing_stays(open_site: OpenSite) -> None:
    site = open_site("minio", storage={"local_cache": {"read_through": False}})
    for size in (1000, 3 << 20):
        content = os.urandom(size)
        media_id = site.upload_and_lose(content)
        assert site.homeserver.download(media_id).body == content
        eventually("the download is over", lambda: site.temporary_files() == [])
        assert not local_path(site, media_id).exists()


def test_with_less_than_min_free_space_nothing_stays(open_site: OpenSite) -> None:
    site = open_site("minio", storage={"local_cache": {"min_free_space": "100%"}})
    content = os.urandom(3 << 20)
    media_id = site.upload_and_lose(content)
    assert site.homeserver.download(media_id).body == content
    eventually("the download is over", lambda: site.temporary_files() == [])
    assert not local_path(site, media_id).exists()


def test_on_a_full_disk_everything_is_served_and_nothing_is_left(open_site: OpenSite, small_disk: Path) -> None:
    site = open_site("minio", storage={"auto_restore": False})
    contents = {site.homeserver.upload(content): content for content in map(os.urandom, (1000, 300_000, 5 << 20))}
    site.homeserver.wipe_media()
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert site.homeserver.stop() == 0
    site.homeserver.config["media_store_path"] = str(small_disk)
    site.homeserver.media_store = small_disk
    site.mark_log()
    site.homeserver.start()
    for media_id, content in contents.items():
        downloads = [Task(partial(site.homeserver.download, media_id)) for _ in range(5)]
        assert all(download.result().body == content for download in downloads)
        assert not local_path(site, media_id).exists()
    assert site.temporary_files() == []
    assert "Traceback" not in site.log


def test_a_killed_process_leaves_no_part_of_a_file(open_site: OpenSite) -> None:
    site = open_site("minio", storage={"auto_restore": False})
    media_id = site.upload_and_lose(LARGE)
    with (
        site.proxy.hold(lambda request: gets(request) and request.offset > 0) as held,
        site.proxy.cut(at=BREAK, matches=gets, times=1),
    ):
        download = Task(partial(site.homeserver.download, media_id))
        held.wait()
        (part,) = site.temporary_files()
        assert 0 < part.stat().st_size <= BREAK
        os.kill(site.homeserver.pid, signal.SIGKILL)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            download.result()
    site.homeserver.stop()
    assert not local_path(site, media_id).exists()
    assert site.temporary_files() == []
    site.homeserver.start()
    assert site.homeserver.download(media_id).body == LARGE


@pytest.fixture
def another_process(tmp_path: Path) -> Iterator[Path]:
    """A temporary file that somebody is writing."""
    path = tmp_path / "held"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def test_leftovers_of_a_crash_are_removed_at_the_start_and_what_others_write_is_not(
    open_site: OpenSite, another_process: Path
) -> None:
    site = open_site("minio", start=False)
    directory = site.homeserver.media_store / ".s3_storage_provider" / "tmp"
    directory.mkdir(parents=True)
    (directory / "1-left").write_bytes(b"part")
    (directory / "2-held").hardlink_to(another_process)
    site.homeserver.start()
    site.wait_for_log("Removed 1 temporary files")
    assert [path.name for path in site.temporary_files()] == ["2-held"]

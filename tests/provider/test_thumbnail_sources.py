"""`dynamic_thumbnails: true`: Synapse copies the picture out of the bucket, whole or not at all."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.provider.conftest import REAL, OpenSite
from tests.provider.fault_proxy import Request, gets
from tests.provider.pictures import png
from tests.provider.site import Site, Task

PICTURE = png(1800, 1200)
BREAK = 1_500_000


@pytest.fixture(scope="module", params=REAL)
def dynamic_site(request: pytest.FixtureRequest, open_lasting_site: OpenSite) -> Site:
    settings = {"dynamic_thumbnails": True}
    return open_lasting_site(request.param, "minio", "postgres", settings=settings, storage={"read_timeout": 3})


@pytest.fixture
def site(dynamic_site: Site) -> Site:
    dynamic_site.proxy.wait_until_idle()
    dynamic_site.mark_log()
    return dynamic_site


@pytest.fixture
def picture(site: Site) -> str:
    """A picture that only the bucket has."""
    assert len(PICTURE) > BREAK
    return site.upload_and_lose(PICTURE, "image/png")


def source_of(media_id: str) -> Callable[[Request], bool]:
    return lambda request: (
        gets(request) and request.key.endswith(f"local_content/{media_id[:2]}/{media_id[2:4]}/{media_id[4:]}")
    )


def test_a_thumbnail_of_any_size_is_made_from_a_source_in_the_bucket(site: Site, picture: str) -> None:
    answer = site.homeserver.thumbnail(picture, 50, 50)
    assert answer.status == 200
    assert answer.body.startswith(b"\x89PNG")
    assert (site.homeserver.media_store / site.path(picture)).read_bytes() == PICTURE
    assert any(key.endswith("/50-50-image-png-crop") for key in site.thumbnail_keys(picture))
    site.homeserver.wipe_media()
    assert site.homeserver.thumbnail(picture, 50, 50).body == answer.body
    # Synapse complains of clients that hang up before it has noticed that a thumbnail is sent.
    assert "storage_provider" not in "".join(site.trouble())


def test_a_source_that_breaks_off_once_is_taken_up_again(site: Site, picture: str) -> None:
    with site.proxy.cut(at=BREAK, matches=source_of(picture), times=1):
        assert site.homeserver.thumbnail(picture, 50, 50).status == 200
    assert (site.homeserver.media_store / site.path(picture)).read_bytes() == PICTURE


def test_a_source_that_stays_short_leaves_no_file_and_a_later_thumbnail_succeeds(site: Site, picture: str) -> None:
    with site.proxy.cut(at=BREAK, matches=source_of(picture)) as cut:
        assert site.homeserver.thumbnail(picture, 50, 50).status == 502
        assert cut.hits > 1
    assert not (site.homeserver.media_store / site.path(picture)).exists()
    assert site.homeserver.download(picture).body == PICTURE
    assert site.homeserver.thumbnail(picture, 50, 50).status == 200


def test_a_source_that_is_not_the_picture_is_not_left_for_synapse_to_send(site: Site, picture: str) -> None:
    # What is behind a picture bothers nobody who makes a thumbnail of it.
    site.client.put_object(Bucket=site.bucket, Key=site.key(picture), Body=PICTURE + b"HTTP/1.1 200 OK\r\n\r\n")
    assert site.homeserver.thumbnail(picture, 50, 50).status == 502
    assert not (site.homeserver.media_store / site.path(picture)).exists()
    site.client.put_object(Bucket=site.bucket, Key=site.key(picture), Body=PICTURE)
    assert site.homeserver.thumbnail(picture, 50, 50).status == 200


def test_a_source_that_hangs_leaves_no_file_and_a_later_thumbnail_succeeds(site: Site, picture: str) -> None:
    with (
        site.proxy.hold(lambda request: source_of(picture)(request) and request.offset > 0) as held,
        site.proxy.cut(at=BREAK, matches=source_of(picture), times=1),
    ):
        thumbnail = Task(lambda: site.homeserver.thumbnail(picture, 50, 50))
        held.wait()
        site.serves_others()
        assert thumbnail.is_pending
        assert thumbnail.result().status == 502
    assert not (site.homeserver.media_store / site.path(picture)).exists()
    assert site.homeserver.thumbnail(picture, 50, 50).status == 200


def test_a_disk_that_takes_no_more_of_a_source_leaves_no_file_and_a_later_thumbnail_succeeds(
    site: Site, picture: str
) -> None:
    # As a full disk, with another number: a file that grows beyond the limit is an OSError.
    unlimited = resource.prlimit(site.homeserver.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        assert site.homeserver.thumbnail(picture, 50, 50).status >= 500
    finally:
        resource.prlimit(site.homeserver.pid, resource.RLIMIT_FSIZE, unlimited)
    assert not (site.homeserver.media_store / site.path(picture)).exists()
    assert site.homeserver.thumbnail(picture, 50, 50).status == 200


def test_throttling_is_an_error_for_who_wants_a_thumbnail(site: Site, picture: str) -> None:
    with site.proxy.slow_down(gets):
        assert site.homeserver.thumbnail(picture, 50, 50).status >= 500
    assert not (site.homeserver.media_store / site.path(picture)).exists()
    assert site.homeserver.thumbnail(picture, 50, 50).status == 200


def test_a_thumbnail_is_made_behind_a_link_though_the_local_cache_is_not_kept(
    open_site: OpenSite, tmp_path: Path
) -> None:
    storage = {"auto_restore": True, "auto_restore_monitor_interval": 1}
    site = open_site("minio", start=False, settings={"dynamic_thumbnails": True}, storage=storage)
    elsewhere = tmp_path / "local_content"
    elsewhere.mkdir()
    site.homeserver.media_store.mkdir()
    (site.homeserver.media_store / "local_content").symlink_to(elsewhere)
    site.homeserver.start()
    media_id = site.homeserver.upload(PICTURE, "image/png")
    (site.homeserver.media_store / site.path(media_id)).unlink()
    site.proxy.forget()
    site.mark_log()
    site.wait_for_log("WARNING.*local_content is a symbolic link.*mount the directory there")
    assert site.proxy.requests == []
    assert site.homeserver.thumbnail(media_id, 50, 50).status == 200
    assert (site.homeserver.media_store / site.path(media_id)).read_bytes() == PICTURE

"""A bucket that throttles, is slow, hangs or is gone: errors within bounds, and everything else goes on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest

from tests.provider.conftest import REAL, OpenSite
from tests.provider.fault_proxy import Request, gets, puts
from tests.provider.site import Site, Task, eventually

pytestmark = pytest.mark.parametrize("shared_site", REAL, indirect=True)


def of(media_id: str) -> Callable[[Request], bool]:
    """Whether an object that belongs to the file is read."""
    return lambda request: gets(request) and request.key.endswith(media_id[4:])


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_throttling_is_an_error_for_who_downloads_and_ends_with_its_cause(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.upload_and_lose(content)
    with site.proxy.slow_down(of(media_id)) as fault:
        answer = site.homeserver.download(media_id)
    assert answer.status >= 500
    assert fault.hits == 3  # as often as `max_attempts` says
    assert site.homeserver.download(media_id).body == content
    assert [line for line in site.trouble() if "storage_provider" not in line] == []


def test_an_upload_that_the_bucket_does_not_take_fails_and_leaves_nothing_behind(site: Site) -> None:
    eventually("no download is still to get its place", lambda: site.temporary_files() == [])
    site.homeserver.wipe_media()
    with site.proxy.slow_down(puts):
        answer = site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain")
    assert answer.status >= 500
    assert site.homeserver.local_files() == []
    assert [line for line in site.trouble() if "storage_provider" not in line] == []


def test_a_bucket_that_resets_connections_is_an_error_and_not_a_missing_file(site: Site) -> None:
    media_id = site.upload_and_lose(b"there all the time")
    with site.proxy.drop(of(media_id)):
        assert site.homeserver.download(media_id).status >= 500
    assert site.homeserver.download(media_id).body == b"there all the time"


def test_failures_are_told_to_the_operator_but_not_file_by_file(site: Site) -> None:
    media_id = site.upload_and_lose(b"content")
    with site.proxy.drop(of(media_id)):
        for _ in range(4):
            assert site.homeserver.download(media_id).status >= 500
    ours = [line for line in site.homeserver.log.splitlines() if "Media storage fails" in line]
    assert ours
    assert sum(line in site.log for line in ours) <= 1
    assert not any(media_id[4:] in line for line in ours)


def test_while_the_bucket_is_slow_other_requests_are_answered(site: Site) -> None:
    content = os.urandom(1 << 20)
    media_id = site.upload_and_lose(content)
    with site.proxy.hold(of(media_id)) as held:
        download = Task(lambda: site.homeserver.download(media_id))
        held.wait()
        site.serves_others()
        assert download.is_pending
        held.release()
        assert download.result().body == content
    assert site.trouble() == []


def test_while_an_upload_is_slow_other_requests_are_answered(site: Site) -> None:
    with site.proxy.hold(puts, times=1) as held:
        upload = Task(lambda: site.homeserver.request("POST", "/_matrix/media/v3/upload", b"slow", "text/plain"))
        held.wait()
        site.serves_others()
        assert upload.is_pending
        held.release()
        assert upload.result().status == 200
    assert site.trouble() == []


def test_a_bucket_that_takes_three_seconds_for_everything_is_slow_and_no_more(site: Site) -> None:
    content = os.urandom(300_000)
    with site.proxy.delay(3):
        upload = Task(lambda: site.homeserver.request("POST", "/_matrix/media/v3/upload", content, "text/plain"))
        site.proxy.wait_for(lambda requests: any(map(puts, requests)))
        assert site.homeserver.request("GET", "/_matrix/client/v3/account/whoami").status == 200
        assert upload.is_pending
        media_id = upload.result().json()["content_uri"].rpartition("/")[2]
        site.homeserver.wipe_media()
        download = Task(lambda: site.homeserver.download(media_id))
        site.proxy.wait_for(lambda requests: any(map(gets, requests)))
        assert site.homeserver.request("GET", "/_matrix/client/v3/account/whoami").status == 200
        assert download.is_pending
        assert download.result().body == content
    assert site.trouble() == []


def test_more_slow_downloads_than_threads_leave_room_for_other_requests(site: Site) -> None:
    # 20 threads by default, half of which large downloads may take.
    contents = [os.urandom(1 << 20) for _ in range(24)]
    media_ids = [site.homeserver.upload(content) for content in contents]
    site.homeserver.wipe_media()

    def of_these(request: Request) -> bool:
        return any(of(media_id)(request) for media_id in media_ids)

    with (
        site.proxy.cut(at=600_000, matches=of_these),
        site.proxy.hold(lambda request: of_these(request) and request.offset > 0) as held,
    ):
        downloads = [Task(functools.partial(site.homeserver.download, media_id)) for media_id in media_ids]
        held.wait(10)
        site.serves_others()
        assert all(download.is_pending for download in downloads)
    # The bucket is well again, and none of them is the worse for it.
    for download, content in zip(downloads, contents, strict=True):
        assert download.result().body == content


@pytest.fixture(scope="module")
def hasty_site(shared_site: Site, open_lasting_site: OpenSite) -> Site:
    """A site of the same kind that waits for the bucket no longer than three seconds."""
    backend = shared_site.homeserver.storage["backend"]
    return open_lasting_site(backend, "minio", "postgres", storage={"read_timeout": 3})


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_download_from_a_bucket_that_hangs_is_an_error_and_others_are_served_meanwhile(
    hasty_site: Site, size: int
) -> None:
    content = os.urandom(size)
    media_id = hasty_site.upload_and_lose(content)
    with hasty_site.proxy.hold(of(media_id)) as held:
        download = Task(lambda: hasty_site.homeserver.download(media_id))
        held.wait()
        hasty_site.serves_others()
        assert download.is_pending
        assert download.result().status >= 500
        assert held.hits == 1  # whoever takes a request and says nothing is not asked again
    assert hasty_site.homeserver.download(media_id).body == content


def test_an_upload_to_a_bucket_that_hangs_is_an_error(hasty_site: Site) -> None:
    with hasty_site.proxy.hold(puts) as held:
        answer = hasty_site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain")
        assert answer.status >= 500
        assert held.hits == 1

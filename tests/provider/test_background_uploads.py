"""`store_synchronous: false`: uploads are answered first and stored afterwards."""

from __future__ import annotations

import functools
import os

import pytest

from tests.provider.conftest import REAL, OpenSite
from tests.provider.fault_proxy import puts
from tests.provider.site import Site, eventually


@pytest.fixture(scope="module", params=REAL)
def background_site(request: pytest.FixtureRequest, open_lasting_site: OpenSite) -> Site:
    # Of four threads one uploads.
    return open_lasting_site(
        request.param,
        "minio",
        "postgres",
        wrapper={"store_synchronous": False},
        storage={"threadpool_size": 4},
    )


@pytest.fixture
def site(background_site: Site) -> Site:
    if not background_site.homeserver.is_running:
        background_site.homeserver.start()
    background_site.mark_log()
    return background_site


def test_an_upload_is_answered_before_it_is_in_the_bucket_and_arrives_there(site: Site) -> None:
    content = os.urandom(1 << 20)
    with site.proxy.hold(puts) as held:
        media_id = site.homeserver.upload(content)
        held.wait()
        assert not site.holds(media_id)
    eventually("the file is in the bucket", lambda: site.holds(media_id))
    assert site.content(site.key(media_id)) == content
    assert site.trouble() == []


@pytest.mark.parametrize("size", [1 << 20, 20 << 20])
def test_an_upload_survives_the_deletion_of_its_file(site: Site, size: int) -> None:
    content = os.urandom(size)
    with site.proxy.hold(lambda request: request.method in ("PUT", "POST") and bool(request.key)) as held:
        media_id = site.homeserver.upload(content)
        held.wait()
        site.homeserver.wipe_media()
    eventually("the file is in the bucket", lambda: site.holds(media_id))
    assert site.homeserver.download(media_id).body == content
    assert site.trouble() == []


def test_an_upload_that_waits_for_its_turn_survives_the_deletion_of_its_file(site: Site) -> None:
    contents = [os.urandom(1000) for _ in range(3)]
    with site.proxy.hold(puts) as held:
        media_ids = [site.homeserver.upload(contents[0])]
        held.wait()
        media_ids += [site.homeserver.upload(content) for content in contents[1:]]
        site.homeserver.wipe_media()
        assert held.hits == 1  # the others have not begun
    for media_id, content in zip(media_ids, contents, strict=True):
        eventually("the file is in the bucket", functools.partial(site.holds, media_id))
        assert site.content(site.key(media_id)) == content
    assert site.trouble() == []


def test_an_upload_that_fails_keeps_the_local_file(site: Site) -> None:
    with site.proxy.slow_down(puts) as fault:
        media_id = site.homeserver.upload(b"content")
        fault.wait(3)
        site.wait_for_log("Error storing file")
    assert site.homeserver.download(media_id).body == b"content"
    # Synapse logs one, which says the least that there is.
    assert site.log.count("Traceback") == 1


def test_shutdown_waits_for_an_upload_in_flight(site: Site) -> None:
    content = os.urandom(1 << 20)
    with site.proxy.delay(3, puts) as delayed:
        media_id = site.homeserver.upload(content)
        delayed.wait()
        assert site.homeserver.stop() == 0
        assert site.content(site.key(media_id)) == content
    assert "Traceback" not in site.log

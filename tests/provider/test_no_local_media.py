"""`enable_local_media_storage: false`: the bucket holds the only copy."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from tests.provider.conftest import REAL, OpenSite
from tests.provider.fault_proxy import puts
from tests.provider.pictures import png
from tests.provider.site import Site, Task, eventually

SPAM = "this is what the test module takes for spam"

SETTINGS = {
    "enable_local_media_storage": False,
    "modules": [{"module": "tests.provider.probe.Probe", "config": {"spam": SPAM}}],
}


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module", params=["minio-quick", *REAL])
def diskless_site(request: pytest.FixtureRequest, temporary: Path, open_lasting_site: OpenSite) -> Site:
    backend, _, quick = request.param.partition("-")
    servers = ("moto", "sqlite") if quick else ("minio", "postgres")
    return open_lasting_site(backend, *servers, settings=SETTINGS, environment={"TMPDIR": str(temporary)})


@pytest.fixture
def site(diskless_site: Site) -> Site:
    diskless_site.mark_log()
    return diskless_site


def assert_disk_is_empty(site: Site, temporary: Path) -> None:
    # What was downloaded is removed behind the answer.
    eventually("nothing is left on the disk", lambda: not site.homeserver.local_files())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1000, 1 << 20, 20 << 20])
def test_a_file_goes_through_without_staying_on_disk(site: Site, temporary: Path, size: int) -> None:
    content = os.urandom(size)
    media_id = site.homeserver.upload(content)
    assert_disk_is_empty(site, temporary)
    assert site.content(site.key(media_id)) == content
    assert site.homeserver.download(media_id).body == content
    assert_disk_is_empty(site, temporary)
    assert site.trouble() == []


def test_a_picture_and_its_thumbnails_go_through_without_staying_on_disk(site: Site, temporary: Path) -> None:
    picture = png(640, 480)
    media_id = site.homeserver.upload(picture, "image/png")
    assert len(site.thumbnail_keys(media_id)) == 4
    for width, height, method in [(32, 32, "crop"), (640, 480, "scale")]:
        answer = site.homeserver.thumbnail(media_id, width, height, method)
        assert answer.status == 200
        assert answer.body.startswith(b"\x89PNG")
    assert site.homeserver.download(media_id).body == picture
    assert_disk_is_empty(site, temporary)
    assert site.trouble() == []


def test_many_uploads_at_once_are_not_mistaken_for_each_other(site: Site) -> None:
    contents = [os.urandom(50_000 + number) for number in range(16)]
    uploads = [Task(functools.partial(site.homeserver.upload, content)) for content in contents]
    for upload, content in zip(uploads, contents, strict=True):
        assert site.homeserver.download(upload.result()).body == content


def test_an_upload_that_fails_leaves_nothing_behind(site: Site, temporary: Path) -> None:
    with site.proxy.slow_down(puts):
        answer = site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain")
    assert answer.status >= 500
    assert_disk_is_empty(site, temporary)


def test_a_file_that_a_spam_checker_rejects_is_forgotten(site: Site, temporary: Path) -> None:
    keys = site.object_keys()
    for _ in range(5):
        answer = site.homeserver.request("POST", "/_matrix/media/v3/upload", SPAM.encode(), "text/plain")
        assert 400 <= answer.status < 500
    assert site.object_keys() == keys
    assert_disk_is_empty(site, temporary)
    assert site.homeserver.request("GET", "/_test/temporary").json() == {"count": 0}


def test_what_went_through_is_forgotten(site: Site) -> None:
    site.homeserver.upload(png(64, 64), "image/png")
    assert site.homeserver.request("GET", "/_test/temporary").json() == {"count": 0}


@pytest.mark.parametrize("flag", ["store_synchronous", "store_local", "store_remote"])
def test_synapse_refuses_to_start_where_media_would_be_lost(open_site: OpenSite, flag: str) -> None:
    site = open_site("minio", settings={"enable_local_media_storage": False}, wrapper={flag: False}, start=False)
    printed = site.homeserver.fail_to_start()
    assert f"enable_local_media_storage: false would lose media; set {flag}: true" in printed
    assert " ERROR " in site.wait_for_log(f"Media storage: enable_local_media_storage: .* set {flag}: true")


def test_dynamic_thumbnails_which_synapse_cannot_make_then_are_warned_of(open_site: OpenSite) -> None:
    site = open_site("minio", settings={"enable_local_media_storage": False, "dynamic_thumbnails": True})
    assert " WARNING " in site.wait_for_log("dynamic_thumbnails does not work together with")

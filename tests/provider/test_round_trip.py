"""What clients upload comes back from the bucket."""

from __future__ import annotations

import random

import pytest

from tests.provider.conftest import QUICK, REAL
from tests.provider.fault_proxy import gets
from tests.provider.pictures import png
from tests.provider.site import Site

pytestmark = pytest.mark.parametrize("shared_site", [*QUICK, *REAL], indirect=True)

SIZES = [0, 1 << 10, 1 << 20, 40 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_in_the_bucket_and_comes_back_from_it(site: Site, size: int) -> None:
    content = random.Random(size).randbytes(size)
    media_id = site.homeserver.upload(content)
    assert site.content(site.key(media_id)) == content
    site.homeserver.wipe_media()
    answer = site.homeserver.download(media_id)
    assert answer.status == 200
    assert answer.body == content
    assert int(answer.headers["Content-Length"]) == size
    assert site.trouble() == []


def test_a_picture_and_its_thumbnails_come_back_from_the_bucket(site: Site) -> None:
    picture = png(640, 480)
    media_id = site.homeserver.upload(picture, "image/png")
    assert site.content(site.key(media_id)) == picture
    sizes = [(32, 32, "crop"), (96, 96, "crop"), (320, 240, "scale"), (640, 480, "scale")]
    before = [site.homeserver.thumbnail(media_id, *size) for size in sizes]
    assert [answer.status for answer in before] == [200] * len(sizes)
    assert len(site.thumbnail_keys(media_id)) == len(sizes)
    site.homeserver.wipe_media()
    assert site.homeserver.download(media_id).body == picture
    after = [site.homeserver.thumbnail(media_id, *size) for size in sizes]
    assert [answer.body for answer in after] == [answer.body for answer in before]
    assert site.trouble() == []


def test_a_thumbnail_that_is_lost_altogether_is_made_anew_from_a_source_in_the_bucket(site: Site) -> None:
    picture = png(640, 480)
    media_id = site.homeserver.upload(picture, "image/png")
    before = site.homeserver.thumbnail(media_id)
    site.homeserver.wipe_media()
    for key in site.thumbnail_keys(media_id):
        site.client.delete_object(Bucket=site.bucket, Key=key)
    after = site.homeserver.thumbnail(media_id)
    assert (after.status, after.body) == (200, before.body)
    assert len(site.thumbnail_keys(media_id)) == 1
    copy = site.homeserver.media_store / site.path(media_id)
    assert copy.read_bytes() == picture


def test_a_file_that_is_gone_from_disk_and_bucket_is_a_404(site: Site) -> None:
    media_id = site.upload_and_lose(b"soon gone")
    site.client.delete_object(Bucket=site.bucket, Key=site.key(media_id))
    site.proxy.forget()
    answer = site.homeserver.download(media_id)
    assert answer.status == 404
    assert answer.json()["errcode"] == "M_NOT_FOUND"
    # Nothing is tried again that the server has answered.
    assert sum(map(gets, site.proxy.requests)) == 1
    assert site.trouble() == []


def test_a_file_that_nobody_uploaded_is_a_404(site: Site) -> None:
    assert site.homeserver.download("nobodyUploadedThis").status == 404
    assert site.homeserver.thumbnail("nobodyUploadedThis").status == 404
    assert not any(map(gets, site.proxy.requests))
    assert site.trouble() == []

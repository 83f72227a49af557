"""The bucket that is made up holds what it says, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from backends import open_backend
from backends.base import Backend
from backends.errors import ObjectNotFound
from backends.settings import BucketSettings
from storage_provider.media_paths import content_path
from tests.backends.scripted_server import ScriptedServer, from_request
from tests.bench.listed_bucket import EMPTY_ETAG, ListedBucket, NumberedMedia

MEDIA = NumberedMedia(4200)
KEYS = [content_path(media) for media in MEDIA]


@pytest.fixture(params=["minio", "boto3"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with ScriptedServer([from_request(ListedBucket(MEDIA).answer)]) as server:
        credentials = {"access_key_id": "key", "secret_access_key": "secret"}
        settings = {"bucket": "media", "endpoint_url": server.endpoint, "backend": request.param, **credentials}
        with closing(open_backend(BucketSettings.parse(settings))) as backend:
            yield backend


def test_media_is_in_the_order_of_its_keys() -> None:
    assert sorted(KEYS) == KEYS
    assert len(set(KEYS)) == 4200


def test_listing_has_every_key_once(backend: Backend) -> None:
    listed = list(backend.list())

    assert [info.key for info in listed] == KEYS
    assert {(info.size, info.etag) for info in listed} == {(0, EMPTY_ETAG)}


def test_listing_begins_where_it_is_asked_to(backend: Backend) -> None:
    remote = [key for key in KEYS if key.startswith("remote_content/")]

    assert [info.key for info in backend.list("remote_content/")] == remote
    assert [info.key for info in backend.list("remote_content/", start_after=remote[700])] == remote[701:]


def test_objects_can_be_asked_for_one_by_one(backend: Backend) -> None:
    assert backend.stat(KEYS[7]).etag == EMPTY_ETAG
    with closing(backend.open(KEYS[7])) as content:
        assert (content.info.size, content.read(1)) == (0, b"")
    with pytest.raises(ObjectNotFound):
        backend.stat("local_content/ab/cd/efgh")

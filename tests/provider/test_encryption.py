"""SSE-C over TLS with a private CA: what is in the bucket can be read with the key alone."""

from __future__ import annotations

import base64
import os

import pytest
from botocore.exceptions import ClientError

from tests.provider.conftest import OpenSite
from tests.provider.pictures import png
from tests.provider.site import Site

pytestmark = pytest.mark.servers

KEY = os.urandom(32)
ENCRYPTION = {"sse_customer_key": base64.b64encode(KEY).decode()}
OTHER_KEY = bytes(32)
# The smallest that goes in parts is 8 MiB and a byte.
SIZES = [0, 1000, 1 << 20, 9 << 20]


@pytest.fixture(scope="module", params=["minio-https", "ceph-https"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["minio", "boto3"])
def plain_site(request: pytest.FixtureRequest, face: str, open_lasting_site: OpenSite) -> Site:
    """Without encryption at first."""
    return open_lasting_site(request.param, face, "postgres", proxy=False)


@pytest.fixture(scope="module")
def plain_files(plain_site: Site) -> dict[str, bytes]:
    contents = [os.urandom(size) for size in SIZES]
    return {plain_site.homeserver.upload(content): content for content in contents}


@pytest.fixture
def site(plain_site: Site, plain_files: dict[str, bytes]) -> Site:
    """Encrypting, from its second start on."""
    if "sse_customer_key" not in plain_site.homeserver.storage:
        assert plain_site.homeserver.stop() == 0
        plain_site.homeserver.storage.update(ENCRYPTION)
        plain_site.homeserver.start()
    plain_site.mark_log()
    return plain_site


def get_with_key(site: Site, media_id: str, key: bytes) -> bytes:
    answer = site.client.get_object(
        Bucket=site.bucket, Key=site.key(media_id), SSECustomerAlgorithm="AES256", SSECustomerKey=key
    )
    return answer["Body"].read()


@pytest.mark.parametrize("size", SIZES)
def test_an_encrypted_file_comes_back_and_cannot_be_read_without_the_key(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.homeserver.upload(content)
    if size:  # MinIO gives out an empty object without asking for the key: there is nothing to decrypt
        with pytest.raises(ClientError):
            site.client.get_object(Bucket=site.bucket, Key=site.key(media_id))
        with pytest.raises(ClientError):
            get_with_key(site, media_id, OTHER_KEY)
    assert get_with_key(site, media_id, KEY) == content
    site.homeserver.wipe_media()
    assert site.homeserver.download(media_id).body == content
    assert site.trouble() == []


def test_encrypted_thumbnails_come_back(site: Site) -> None:
    media_id = site.homeserver.upload(png(320, 240), "image/png")
    before = site.homeserver.thumbnail(media_id).body
    for key in site.thumbnail_keys(media_id):
        with pytest.raises(ClientError):
            site.client.get_object(Bucket=site.bucket, Key=key)
    site.homeserver.wipe_media()
    assert site.homeserver.thumbnail(media_id).body == before
    assert site.trouble() == []


def test_files_from_before_the_encryption_are_still_served(site: Site, plain_files: dict[str, bytes]) -> None:
    site.homeserver.wipe_media()
    for media_id, content in plain_files.items():
        assert site.homeserver.download(media_id).body == content
    assert [line for line in site.trouble() if " ERROR " in line] == []


def test_a_missing_file_is_a_404(site: Site) -> None:
    media_id = site.upload_and_lose(b"content")
    site.client.delete_object(Bucket=site.bucket, Key=site.key(media_id))
    assert site.homeserver.download(media_id).status == 404


def test_no_probe_is_left_in_the_bucket(site: Site) -> None:
    site.homeserver.upload(b"content")
    assert [key for key in site.object_keys() if not key.startswith("media/local_")] == []

"""What the README asks to be allowed is enough."""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backends import BucketSettings, open_backend
from backends.base import Backend
from backends.errors import ObjectNotFound
from tests.servers import S3Server, minio_server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

README = Path(__file__).parents[2] / "README.md"
LARGE = bytes(11 << 20)

pytestmark = [
    pytest.mark.parametrize("s3_server", ["minio-https"], indirect=True, scope="session"),
    pytest.mark.parametrize("name", ["minio", "boto3"]),
]


def statements(bucket: str) -> list[dict[str, Any]]:
    """Those of the policy in the README, for another bucket."""
    found = re.search("```json\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    policy: dict[str, Any] = json.loads(found[1].replace("synapse-media", bucket))
    return list(policy["Statement"])


@pytest.fixture
def prefix() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def make(s3_server: S3Server, bucket: str, name: str, prefix: str) -> Iterator[Callable[..., Backend]]:
    """Makes backends with the credentials of one who may do that and nothing else."""
    user = f"user-{uuid.uuid4().hex[:12]}"
    secret = minio_server.add_user(s3_server, user, statements(bucket))
    with ExitStack() as stack:

        def make(**settings: Any) -> Backend:
            values = {
                "backend": name,
                "bucket": bucket,
                "prefix": prefix,
                "endpoint_url": s3_server.endpoint,
                "access_key_id": user,
                "secret_access_key": secret,
                "verify": s3_server.verify,
                "multipart_threshold": "5M",
                "multipart_chunksize": "5M",
            }
            backend = open_backend(BucketSettings.parse(values | settings))
            stack.callback(backend.close)
            return backend

        yield make


def test_policy_of_the_readme_allows_all_that_is_done(
    make: Callable[..., Backend], client: S3Client, bucket: str, prefix: str
) -> None:
    backend = make()
    backend.check()
    backend.put("small", io.BytesIO(b"small"), 5)
    backend.put("large", io.BytesIO(LARGE), len(LARGE))
    with backend.open("small") as reader:
        assert reader.read(6) == b"small"
    assert backend.stat("large").size == len(LARGE)
    assert [info.key for info in backend.list()] == ["large", "small"]
    # Who may not list the bucket is not told that there is no such object.
    with pytest.raises(ObjectNotFound):
        backend.stat("missing")
    with pytest.raises(ValueError):
        backend.put("ends early", io.BytesIO(LARGE[1:]), len(LARGE))
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/ends early")
    assert list(backend.delete(["large", "small"])) == []
    assert list(backend.list()) == []


def test_policy_of_the_readme_allows_to_encrypt(make: Callable[..., Backend]) -> None:
    backend = make(sse_customer_key="k" * 32)
    backend.check_encryption()
    backend.put("small", io.BytesIO(b"small"), 5)
    with backend.open("small") as reader:
        assert reader.read(6) == b"small"
    assert list(backend.delete(["small"])) == []
    assert list(backend.list()) == []

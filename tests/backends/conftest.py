"""What the contract needs of a server: a client that is not the code under test, a bucket, and many keys."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.servers import S3Server, make_bucket, make_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# More than a page of a listing and more than a batch of deletions, both of which hold 1,000.
MANY_KEYS = [f"{number:04}" for number in range(1005)]


@pytest.fixture(scope="session")
def client(s3_server: S3Server) -> Iterator[S3Client]:
    client = make_client(s3_server)
    yield client
    client.close()


@pytest.fixture(scope="session")
def bucket(s3_server: S3Server) -> str:
    """One bucket for all tests on a server; each test has a prefix of its own."""
    return make_bucket(s3_server)


@pytest.fixture(scope="session")
def many(client: S3Client, bucket: str) -> str:
    """The prefix below which `MANY_KEYS` lie, for tests that only read."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: client.put_object(Bucket=bucket, Key=f"many/{key}", Body=b""), MANY_KEYS))
    return "many"

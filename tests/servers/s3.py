"""What a test has to know of an S3 server, and a client that is not the code under test."""

import functools
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class S3Server:
    """One address of a running S3 server.

    `sse_c`: encrypts with the customer's key and acknowledges it. Where it does not, `sse_c_refused` tells the
    server that answers with an error from the one that ignores the headers and stores plain text.

    `storage_classes`: those beside STANDARD that can be written and read at once. An unknown one is an error on
    every server.

    `checks_signatures`: a wrong secret is an error.

    `domain`: buckets are also reachable as host names below it, at the endpoint's port.
    """

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    ca_file: str | None = None
    sse_c: bool = False
    sse_c_refused: bool = False
    storage_classes: tuple[str, ...] = ()
    checks_signatures: bool = True
    domain: str | None = None

    @property
    def verify(self) -> str | bool:
        """As boto3 and the setting `verify` take it."""
        return self.ca_file or True


def make_client(server: S3Server, *, addressing_style: Literal["path", "virtual"] = "path") -> "S3Client":
    """A boto3 client that any of the servers understands, untouched by the environment's proxies."""
    session = boto3.session.Session(
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
    )
    config = Config(
        proxies={},
        s3={"addressing_style": addressing_style},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"total_max_attempts": 3},
    )
    return session.client("s3", endpoint_url=server.endpoint, verify=server.verify, config=config)


def make_bucket(server: S3Server) -> str:
    """Creates a bucket with a name of its own and returns the name; it goes with the server's data."""
    name = f"test-{uuid.uuid4().hex[:16]}"
    _shared_client(server).create_bucket(Bucket=name)
    return name


# A client costs a tenth of a second, and nearly every test wants a bucket.
_shared_client = functools.cache(make_client)

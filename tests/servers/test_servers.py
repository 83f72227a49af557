"""Each server does what its description says, since the other tests take their expectations from it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import psycopg2
import pytest
from botocore.exceptions import ClientError

from tests.servers import FACES, PostgresServer, S3Server, make_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

S3_FACES = [face for face in FACES if face != "postgres"]
on_every_server = pytest.mark.parametrize("s3_server", S3_FACES, indirect=True)


class CustomerKey(TypedDict):
    SSECustomerAlgorithm: str
    SSECustomerKey: str


BODY = bytes(range(256)) * 16
SSE_C: CustomerKey = {
    "SSECustomerAlgorithm": "AES256",
    "SSECustomerKey": secrets.token_hex(16),
}


@pytest.fixture
def client(s3_server: S3Server) -> "Iterator[S3Client]":
    with closing(make_client(s3_server)) as client:
        yield client


@on_every_server
def test_stores_lists_and_returns(client: "S3Client", bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="a/b c", Body=BODY)
    listing = client.list_objects_v2(Bucket=bucket)
    assert [(entry["Key"], entry["Size"]) for entry in listing["Contents"]] == [("a/b c", len(BODY))]
    with client.get_object(Bucket=bucket, Key="a/b c")["Body"] as body:
        assert body.read() == BODY


@on_every_server
def test_sse_c_is_as_described(s3_server: S3Server, client: "S3Client", bucket: str) -> None:
    if s3_server.sse_c_refused:
        with pytest.raises(ClientError):
            client.put_object(Bucket=bucket, Key="a", Body=BODY, **SSE_C)
        return
    reply = client.put_object(Bucket=bucket, Key="a", Body=BODY, **SSE_C)
    if not s3_server.sse_c:
        assert "SSECustomerAlgorithm" not in set(reply)  # the stubs say that it is always there
        return
    assert reply["SSECustomerAlgorithm"] == "AES256"
    with pytest.raises(ClientError):
        client.get_object(Bucket=bucket, Key="a")
    with client.get_object(Bucket=bucket, Key="a", **SSE_C)["Body"] as body:
        assert body.read() == BODY


@on_every_server
def test_storage_classes_are_as_described(s3_server: S3Server, client: "S3Client", bucket: str) -> None:
    for storage_class in s3_server.storage_classes:
        client.put_object(Bucket=bucket, Key="a", Body=BODY, StorageClass=storage_class)  # type: ignore[arg-type]
        assert client.head_object(Bucket=bucket, Key="a")["StorageClass"] == storage_class
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="a", Body=BODY, StorageClass="NO_SUCH_CLASS")  # type: ignore[arg-type]
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


@on_every_server
def test_signatures_are_checked_as_described(s3_server: S3Server, bucket: str) -> None:
    with closing(make_client(replace(s3_server, secret_key="wrong-secret"))) as client:
        try:
            client.list_objects_v2(Bucket=bucket)
        except ClientError as error:
            assert s3_server.checks_signatures
            assert error.response["Error"]["Code"] == "SignatureDoesNotMatch"
        else:
            assert not s3_server.checks_signatures


@pytest.mark.parametrize("s3_server", ["minio", "minio-https", "ceph", "ceph-https", "swift"], indirect=True)
def test_buckets_are_host_names(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_resolver = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **keywords: Any) -> Any:
        return ask_resolver("127.0.0.1" if host.endswith(".localhost") else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    endpoint = s3_server.endpoint.replace("127.0.0.1", s3_server.domain or "")
    with closing(make_client(replace(s3_server, endpoint=endpoint), addressing_style="virtual")) as client:
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
    with closing(make_client(s3_server)) as client:
        assert client.head_object(Bucket=bucket, Key="a")["ContentLength"] == len(BODY)


def test_postgres_takes_synapse_database(postgres: PostgresServer, make_database: Callable[[], str]) -> None:
    with closing(psycopg2.connect(postgres.url(make_database()))) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW lc_collate")
        assert cursor.fetchone() == ("C",)


def test_a_killed_run_leaves_nothing_behind() -> None:
    """SIGKILL, which no handler of the run itself could see."""
    script = (
        "from tests.servers import ServerRun\n"
        "import time\n"
        "run = ServerRun()\n"
        # A worker in the same group stands for what servers fork.
        "server = run.start('sleeper', 'sh', '-c', 'sleep 600 & wait')\n"
        "print(run.directory, server.popen.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        directory, group = run.stdout.readline().split()
        assert Path(directory).is_dir()
        os.killpg(int(group), 0)
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while Path(directory).exists() or _group_has_members(int(group)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _group_has_members(group: int) -> bool:
    """Zombies aside, which may stay where no init process collects them."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            return True
    return False

"""The contract, kept by the backend on boto3, and what only botocore does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import BucketSettings, open_backend
from backends.base import Backend
from backends.errors import Misconfigured, SettingsError
from tests.backends.contract import SERVERS, SSE_KEY, BackendContract
from tests.backends.scripted_server import ScriptedServer, reply


@pytest.mark.parametrize("s3_server", SERVERS, indirect=True, scope="session")
class TestBoto3Backend(BackendContract):
    name = "boto3"


@pytest.fixture
def make() -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(**settings: Any) -> Backend:
        values: dict[str, Any] = {
            "bucket": "bucket",
            "backend": "boto3",
            "region_name": "eu-central-1",
            "access_key_id": "key-of-someone",
            "secret_access_key": "secret-of-someone",
            "addressing_style": "path",
        }
        made.append(open_backend(BucketSettings.parse(values | settings)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoint_url": "http://minio_server:9000"}, "endpoint_url: .*Invalid endpoint: http://minio_server:9000"),
        ({"region_name": "not_a_region"}, "region_name: .*'not_a_region'"),
    ],
)
def test_what_botocore_refuses_is_told_with_its_setting(
    make: Callable[..., Backend], settings: dict[str, str], words: str
) -> None:
    with pytest.raises(Misconfigured, match=words) as caught:
        make(**settings).check()
    assert isinstance(caught.value.__cause__, SettingsError)


@pytest.fixture(params=["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "profile"])
def environments_server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ScriptedServer]:
    """A server without TLS that botocore finds by itself."""
    with ScriptedServer([reply(200, "<ListBucketResult/>")]) as server:
        config = tmp_path / "config"
        config.write_text(f"[default]\nendpoint_url = {server.endpoint}\n" if request.param == "profile" else "")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        if request.param != "profile":
            monkeypatch.setenv(request.param, server.endpoint)
        yield server


def test_an_endpoint_of_the_environment_is_obeyed(
    make: Callable[..., Backend], environments_server: ScriptedServer
) -> None:
    make().check()
    assert len(environments_server.requests) == 1


def test_an_encryption_key_is_not_sent_in_the_clear_to_an_endpoint_of_the_environment(
    make: Callable[..., Backend], environments_server: ScriptedServer
) -> None:
    with pytest.raises(Misconfigured, match="set allow_insecure_sse: true") as caught:
        make(sse_customer_key=SSE_KEY).stat("key")
    assert isinstance(caught.value.__cause__, SettingsError)
    assert environments_server.requests == []
    make(sse_customer_key=SSE_KEY, allow_insecure_sse=True).check()
    assert len(environments_server.requests) == 1

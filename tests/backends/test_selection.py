"""Which backend `auto` means."""

from __future__ import annotations

from typing import Any

import pytest

from backends import BACKENDS, BucketSettings, open_backend
from backends.boto3_backend import Boto3Backend
from backends.minio_backend import MinioBackend
from backends.selection import choose_backend

ENDPOINT = "https://minio.example.com:9000"
KEYS = {"access_key_id": "key-of-someone", "secret_access_key": "secret-of-someone"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


def chosen(**settings: Any) -> tuple[str, str]:
    return choose_backend(BucketSettings.parse({"bucket": "media", **settings}))


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"endpoint_url": ENDPOINT, **KEYS}, "minio", "not AWS"),
        ({"endpoint_url": ENDPOINT, "access_key_id_path": "/a", "secret_access_key_path": "/b"}, "minio", "not AWS"),
        ({**KEYS}, "boto3", "AWS"),
        ({"endpoint_url": "https://s3.eu-central-1.amazonaws.com", **KEYS}, "boto3", "AWS"),
        ({"endpoint_url": "https://s3.cn-north-1.amazonaws.com.cn", **KEYS}, "boto3", "AWS"),
        ({"endpoint_url": "https://amazonaws.com.example.com", **KEYS}, "minio", "not AWS"),
        ({"endpoint_url": f"{ENDPOINT}/storage/s3", **KEYS}, "boto3", "path"),
        ({"endpoint_url": f"{ENDPOINT}/", **KEYS}, "minio", "not AWS"),
        ({"endpoint_url": ENDPOINT}, "boto3", "chain"),
        ({"endpoint_url": ENDPOINT, **KEYS, "backend": "boto3"}, "boto3", "configured"),
        ({**KEYS, "backend": "minio"}, "minio", "configured"),
    ],
)
def test_the_choice_and_its_reason(settings: dict[str, str], name: str, reason: str) -> None:
    backend, why = chosen(**settings)
    assert backend == name
    assert reason in why


def test_credentials_in_the_environment_are_found_by_minio_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-someone")
    assert chosen(endpoint_url=ENDPOINT)[0] == "minio"


def test_a_proxy_in_the_environment_means_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    backend, why = chosen(endpoint_url=ENDPOINT, **KEYS)
    assert backend == "boto3"
    assert "proxy" in why
    assert chosen(endpoint_url="http://minio.example.com:9000", **KEYS)[0] == "minio"
    monkeypatch.setenv("no_proxy", "example.com")
    assert chosen(endpoint_url=ENDPOINT, **KEYS)[0] == "minio"


def test_open_backend_makes_what_was_chosen() -> None:
    minio = open_backend(BucketSettings.parse({"bucket": "media", "endpoint_url": ENDPOINT, **KEYS}))
    assert type(minio) is MinioBackend
    boto3 = open_backend(BucketSettings.parse({"bucket": "media", **KEYS}))
    assert type(boto3) is Boto3Backend


@pytest.mark.parametrize("name", BACKENDS)
def test_every_name_in_the_table_can_be_opened(name: str) -> None:
    backend = open_backend(BucketSettings.parse({"bucket": "media", "backend": name, **KEYS}))
    assert name in type(backend).__name__.lower()
    assert "secret-of-someone" not in repr(backend)

"""A machine on which nobody has left credentials."""

from __future__ import annotations

from pathlib import Path

import pytest


def no_credentials(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let the SDKs find no credentials, and no metadata service either."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(directory))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(directory / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # minio-py asks this address instead of EC2's.
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/")

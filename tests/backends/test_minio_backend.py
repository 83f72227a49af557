"""The contract, kept by the backend on minio-py."""

from __future__ import annotations

import pytest

from tests.backends.contract import SERVERS, BackendContract


@pytest.mark.parametrize("s3_server", SERVERS, indirect=True, scope="session")
class TestMinioBackend(BackendContract):
    name = "minio"

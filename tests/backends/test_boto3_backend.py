"""The contract, kept by the backend on boto3."""

from __future__ import annotations

import pytest

from tests.backends.contract import SERVERS, BackendContract


@pytest.mark.parametrize("s3_server", SERVERS, indirect=True, scope="session")
class TestBoto3Backend(BackendContract):
    name = "boto3"

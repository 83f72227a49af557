"""Connections to Synapse's database: one test for each promise of `storage_provider.database`."""

from __future__ import annotations

import sys

import pytest

from storage_provider.database import DatabaseArguments, open_database
from storage_provider.errors import SynapseDbError


def test_missing_driver_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(SynapseDbError, match=r'pip install "enhanced-s3-storage-provider\[postgres\]"'):
        open_database(DatabaseArguments("psycopg2", {}))

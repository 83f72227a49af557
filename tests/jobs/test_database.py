"""Connections to Synapse's database: one test for each promise of `storage_provider.database`."""

from __future__ import annotations

import sqlite3
import sys

import psycopg2
import pytest

from storage_provider.database import DatabaseArguments, open_database
from storage_provider.errors import SynapseDbError
from tests.jobs.conftest import ENGINES, SynapseDatabase


def test_missing_driver_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(SynapseDbError, match=r'pip install "enhanced-s3-storage-provider\[postgres\]"'):
        open_database(DatabaseArguments("psycopg2", {}))


@pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)
def test_question_after_the_end_is_an_error_and_opens_nothing(
    synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(synapse_database.arguments)
    database.columns("local_media_repository")
    database.close()
    monkeypatch.setattr(psycopg2 if synapse_database.is_postgres else sqlite3, "connect", pytest.fail)
    with pytest.raises(SynapseDbError, match=r"database.* cannot be read: .*closed"):
        database.query("SELECT 1", ())
    database.close()

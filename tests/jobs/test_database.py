"""Connections to Synapse's database: one test for each promise of `storage_provider.database`."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest

from storage_provider.database import DatabaseArguments, open_database
from storage_provider.errors import SynapseDbError
from tests.jobs.conftest import ENGINES, SynapseDatabase

ROOT = Path(__file__).parents[2]


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


# SQLite crashes where a connection is closed under a thread that reads from it; hence a process of its own.
CLOSE_UNDER_A_READER = """
import sys, threading
from storage_provider.database import DatabaseArguments, open_database
from storage_provider.errors import SynapseDbError

COUNT = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 100000) SELECT count(*) FROM n"

database = open_database(DatabaseArguments("sqlite3", {"database": sys.argv[1]}))
reads, closes = threading.Event(), threading.Event()

def in_the_middle():
    reads.set()
    closes.wait()

def ask():
    try:
        while True:
            database.query(COUNT, ())
    except SynapseDbError:
        print("closed")

database._connection.set_progress_handler(in_the_middle, 1000)
threading.Thread(target=ask).start()
reads.wait()
closes.set()
database.close()
"""


def test_may_be_closed_while_a_thread_reads_from_it(tmp_path: Path) -> None:
    path = tmp_path / "homeserver.db"
    sqlite3.connect(path).close()
    command = [sys.executable, "-c", CLOSE_UNDER_A_READER, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")

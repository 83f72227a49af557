"""Synapse's database, with the schema that Synapse itself makes, on SQLite and on PostgreSQL."""

from __future__ import annotations

import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from storage_provider.database import DatabaseArguments
from tests.jobs.synapse_schema import make_schema
from tests.servers import PostgresServer

ENGINES = ["sqlite", pytest.param("postgres", marks=pytest.mark.servers)]
ENGINES_TO_ALTER = ["sqlite", pytest.param("postgres to alter", marks=pytest.mark.servers)]
"""For tests that change more than rows: PostgreSQL takes seconds to copy a database, so the others share one."""

TABLES = (
    "local_media_repository",
    "local_media_repository_thumbnails",
    "remote_media_cache",
    "remote_media_cache_thumbnails",
)


class SynapseDatabase:
    """A database as Synapse leaves it, and what fills it; SQL has `?` for arguments."""

    def __init__(self, arguments: DatabaseArguments) -> None:
        self.arguments = arguments
        self.is_postgres = arguments.engine == "psycopg2"
        self._placeholder = "%s" if self.is_postgres else "?"

    def connect(self) -> Any:
        module: Any = psycopg2 if self.is_postgres else sqlite3
        return module.connect(**self.arguments.arguments)

    def execute(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query; what it changes is committed."""
        with closing(self.connect()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(sql.replace("?", self._placeholder), arguments)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
            return list(rows)

    def insert(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        with closing(self.connect()) as connection, closing(connection.cursor()) as cursor:
            for row in rows:
                columns, places = ", ".join(row), ", ".join([self._placeholder] * len(row))
                cursor.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", tuple(row.values()))
            connection.commit()

    def add_local(self, media_id: str, **values: Any) -> None:
        row = {"media_id": media_id, "media_type": "image/png", "media_length": 1, "created_ts": 1000}
        self.insert("local_media_repository", [row | values])

    def add_remote(self, origin: str, media_id: str, filesystem_id: str | None, **values: Any) -> None:
        row = {"media_origin": origin, "media_id": media_id, "filesystem_id": filesystem_id, "media_length": 1}
        self.insert("remote_media_cache", [row | {"media_type": "image/png", "created_ts": 1000} | values])

    def add_thumbnail(
        self, origin: str, media_id: str, width: int, height: int, content_type: str, method: str, length: int
    ) -> None:
        row = {
            "media_id": media_id,
            "thumbnail_width": width,
            "thumbnail_height": height,
            "thumbnail_type": content_type,
            "thumbnail_method": method,
            "thumbnail_length": length,
        }
        if origin:
            self.insert("remote_media_cache_thumbnails", [row | {"media_origin": origin}])
        else:
            self.insert("local_media_repository_thumbnails", [row])


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synapse") / "homeserver.db"
    make_schema("sqlite3", {"database": str(path)})
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresServer, make_database: Callable[[], str]) -> str:
    name = make_database()
    make_schema("psycopg2", _arguments(postgres, name))
    return name


@pytest.fixture(scope="session")
def shared_postgres(postgres: PostgresServer, postgres_template: str) -> SynapseDatabase:
    return _copy(postgres, postgres_template)


@pytest.fixture
def synapse_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SynapseDatabase]:
    """A database of Synapse's on the engine that is this test's parameter, with no row in it."""
    if request.param == "sqlite":
        path = tmp_path / "homeserver.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield SynapseDatabase(DatabaseArguments("sqlite3", {"database": str(path)}))
        return
    if request.param == "postgres":
        shared: SynapseDatabase = request.getfixturevalue("shared_postgres")
        shared.execute(f"TRUNCATE {', '.join(TABLES)}")
        yield shared
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    own = _copy(server, request.getfixturevalue("postgres_template"))
    yield own
    _administer(server, f"DROP DATABASE {own.arguments.arguments['dbname']} WITH (FORCE)")


def _copy(server: PostgresServer, template: str) -> SynapseDatabase:
    name = f"synapse_{uuid.uuid4().hex[:16]}"
    _administer(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    return SynapseDatabase(DatabaseArguments("psycopg2", _arguments(server, name)))


def _arguments(server: PostgresServer, name: str) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "user": server.user, "dbname": name}


def _administer(server: PostgresServer, statement: str) -> None:
    with closing(psycopg2.connect(server.url("postgres"))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)

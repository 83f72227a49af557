"""SQL over a connection to Synapse's database, be it SQLite or PostgreSQL."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from storage_provider.errors import SynapseDbError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PostgresConnection

Row = tuple[Any, ...]

_ROWS_A_FETCH = 2000
_CONNECT_SECONDS = 10
_BUSY_SECONDS = 30

# What Synapse's configuration may hold for others than psycopg2: Twisted's pool (with `cp_…`), SQLite, Synapse itself.
_NOT_FOR_PSYCOPG2 = frozenset(
    {
        "allow_unsafe_locale",
        "check_same_thread",
        "idle_in_transaction_session_timeout",
        "statement_timeout",
        "synchronous_commit",
        "txn_limit",
    }
)


@dataclass(frozen=True)
class DatabaseArguments:
    """How to connect, as Synapse's configuration says it."""

    engine: Literal["sqlite3", "psycopg2"]
    arguments: Mapping[str, Any] = field(repr=False)


def open_database(arguments: DatabaseArguments) -> Database:
    """Connect to the database. Raises `SynapseDbError`; PostgreSQL is not asked for anything before the first question."""
    given = arguments.arguments
    return _Sqlite(given) if arguments.engine == "sqlite3" else _Postgres(given)


class Database(Protocol):
    """SQL with `?` for arguments; errors are `SynapseDbError`s.

    May be used from many threads at once; a question after `close` is an error. Nothing is ever written.
    """

    byte_order: str
    """What makes ORDER BY compare bytes."""

    def columns(self, table: str) -> set[str]:
        """The names of the columns of a table."""

    def query(self, sql: str, arguments: Row) -> list[Row]:
        """The answer to a question, as things are now."""

    def stream(self, sql: str, arguments: Row) -> Iterator[Row]:
        """An answer of any length, as things were when it began, over a connection of its own."""

    def close(self) -> None: ...


class _Sqlite:
    byte_order = ""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._path = Path(str(arguments.get("database") or "")).absolute()
        self._lock = threading.Lock()
        self._connection = self._connect()

    def columns(self, table: str) -> set[str]:
        with self._lock, self._as_database_error():
            described = self._connection.execute(f"SELECT * FROM {table} WHERE 1 = 0").description
            return {column[0] for column in described}

    def query(self, sql: str, arguments: Row) -> list[Row]:
        with self._lock, self._as_database_error():
            return self._connection.execute(sql, arguments).fetchall()

    def stream(self, sql: str, arguments: Row) -> Iterator[Row]:
        with contextlib.closing(self._connect()) as connection, self._as_database_error():
            cursor = connection.execute(sql, arguments)
            while rows := cursor.fetchmany(_ROWS_A_FETCH):
                yield from rows

    def close(self) -> None:
        # To close it under a thread that reads from it would crash the process.
        with self._lock:
            self._connection.close()

    def _connect(self) -> sqlite3.Connection:
        with self._as_database_error():
            return sqlite3.connect(
                f"{self._path.as_uri()}?mode=ro",
                uri=True,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )

    @contextlib.contextmanager
    def _as_database_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "no such table" in str(error):
                _refuse_foreign(f"The SQLite database {self._path}")
            raise SynapseDbError(f"The SQLite database {self._path} cannot be read: {error}") from None


class _Postgres:
    byte_order = ' COLLATE "C"'

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        try:
            import psycopg2  # noqa: F401 - not needed with SQLite
        except ImportError as error:
            raise SynapseDbError(
                f"The PostgreSQL database needs psycopg2, which cannot be loaded ({error}): run this in Synapse's Python "
                'environment, or install it here: pip install "enhanced-s3-storage-provider[postgres]"'
            ) from None
        given = {
            name: value
            for name, value in arguments.items()
            if name not in _NOT_FOR_PSYCOPG2 and not name.startswith("cp_")
        }
        # libpq takes a whole URL in `dbname` too, and quotes it in its errors.
        quoted = ("password", "sslpassword", "dsn", "dbname", "database")
        self._secrets = [
            str(value)
            for name, value in given.items()
            if value and name in quoted and ("password" in name or "=" in str(value) or "://" in str(value))
        ]
        self._arguments = {"connect_timeout": _CONNECT_SECONDS, "client_encoding": "UTF8", **given}
        self._lock = threading.Lock()
        self._connection: PostgresConnection | None = None
        self._is_closed = False

    def columns(self, table: str) -> set[str]:
        return {
            name
            for (name,) in self.query(
                # Unlike information_schema, this obeys the search path.
                "SELECT attname FROM pg_attribute WHERE attrelid = CAST(? AS regclass) AND attnum > 0",
                (table,),
            )
        }

    def query(self, sql: str, arguments: Row) -> list[Row]:
        with self._lock, self._as_database_error():
            if self._is_closed:
                raise SynapseDbError("The PostgreSQL database cannot be read: its connection has been closed")
            kept = self._connection
            if kept is not None and not kept.closed:
                try:
                    return _answer(kept, sql, arguments)
                except Exception:
                    # That it was lost meanwhile (a restart, a time-out while it was idle) shows only now.
                    if not kept.closed:
                        raise
            self._connection = self._connect()
            return _answer(self._connection, sql, arguments)

    def stream(self, sql: str, arguments: Row) -> Iterator[Row]:
        with (
            self._as_database_error(),
            contextlib.closing(self._connect()) as connection,
            _transaction(connection),
        ):
            with contextlib.closing(connection.cursor()) as cursor:
                # Whoever reads may take long over a row, and the server over sorting them all.
                cursor.execute("SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0")
            with contextlib.closing(connection.cursor("s3_media_upload")) as rows:
                rows.itersize = _ROWS_A_FETCH
                rows.execute(sql.replace("?", "%s"), arguments)
                yield from rows

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.close()

    def _connect(self) -> PostgresConnection:
        import psycopg2

        connection: PostgresConnection = psycopg2.connect(**self._arguments)
        # Said with BEGIN, not to the session.
        connection.set_session(readonly=True)
        return connection

    @contextlib.contextmanager
    def _as_database_error(self) -> Iterator[None]:
        import psycopg2
        import psycopg2.errors

        try:
            yield
        except psycopg2.errors.UndefinedTable:
            _refuse_foreign("The PostgreSQL database")
        except (psycopg2.Error, TypeError, ValueError) as error:
            raise SynapseDbError(f"The PostgreSQL database cannot be read: {self._told(str(error))}") from None

    def _told(self, reason: str) -> str:
        """What libpq says, without what is secret in it."""
        reason = " ".join(reason.split())
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        if reason.startswith("connection to server"):
            return reason
        # Where it finds a fault in a connection string, it quotes a part of that.
        return re.sub('"[^"]+"', lambda quoted: self._masked(quoted[0]), reason)

    def _masked(self, quoted: str) -> str:
        return '"***"' if any(quoted.strip('"') in secret for secret in self._secrets) else quoted


def _answer(connection: PostgresConnection, sql: str, arguments: Row) -> list[Row]:
    # Each question has a transaction of its own. Nothing is set for the session: behind
    # PgBouncer that might be Synapse's the next moment.
    with _transaction(connection), contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(sql.replace("?", "%s"), arguments)
        return cursor.fetchall()


@contextlib.contextmanager
def _transaction(connection: PostgresConnection) -> Iterator[None]:
    """End the transaction after the block: PgBouncer gives up its connection to the server where a client goes without."""
    try:
        yield
    finally:
        if not connection.closed:
            connection.rollback()


def _refuse_foreign(database: str) -> NoReturn:
    raise SynapseDbError(f"{database} holds no media tables: it is not Synapse's") from None

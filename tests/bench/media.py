"""Media to upload: files in a store as Synapse lays it out, and the rows of Synapse's database."""

from __future__ import annotations

import csv
import io
import os
import random
import string
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from storage_provider.database import DatabaseArguments
from storage_provider.media_paths import Media, content_path
from tests.jobs.conftest import TABLES, SynapseDatabase
from tests.jobs.synapse_schema import make_schema
from tests.servers import ServerPool, ServerUnavailable, make_database

_ORIGINS = ("a.example", "b.example:8448", "c.example")
_BEFORE_ALL = 1000
_ROWS_AT_ONCE = 10_000
_CHUNK_BYTES = 1 << 20


def make_synapse_database(pool: ServerPool, directory: Path) -> SynapseDatabase:
    """An empty database of Synapse's: on PostgreSQL where that is on the machine, else on SQLite."""
    arguments = DatabaseArguments("sqlite3", {"database": str(directory / "homeserver.db")})
    try:
        server = pool.start_postgres()
    except ServerUnavailable:
        pass
    else:
        place = {"host": server.host, "port": server.port, "user": server.user}
        arguments = DatabaseArguments("psycopg2", place | {"dbname": make_database(server)})
    make_schema(arguments.engine, arguments.arguments)
    return SynapseDatabase(arguments)


def random_media(number: int, seed: int = 4) -> Iterator[Media]:
    """Media with ids as Synapse makes them; every third comes from another server."""
    chance = random.Random(seed)
    for index in range(number):
        origin = _ORIGINS[index // 3 % len(_ORIGINS)] if index % 3 == 2 else ""
        yield Media(origin, "".join(chance.choices(string.ascii_letters, k=24)))


def write_files(store: Path, media: Iterable[Media], size: int) -> None:
    """Files of random content, each with its own."""
    chance = random.Random(5)
    for each in media:
        path = store / content_path(each)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                file.write(chance.randbytes(min(_CHUNK_BYTES, size - start)))


def write_empty_files(store: Path, media: Iterable[Media]) -> None:
    """The contents of media, in which nothing is, as quickly as can be."""
    made = ""
    for each in media:
        path = content_path(each)
        directory = path.rpartition("/")[0]
        if directory != made:
            (store / directory).mkdir(parents=True, exist_ok=True)
            made = directory
        os.close(os.open(store / path, os.O_CREAT | os.O_WRONLY))


def fill(database: SynapseDatabase, media: Iterable[Media], size: int) -> None:
    """Make these the only media that the database knows; used long ago."""
    for table in TABLES:
        database.execute(f"DELETE FROM {table}")
    common = {"media_type": "application/octet-stream", "media_length": size, "created_ts": _BEFORE_ALL}
    with closing(database.connect()) as connection:
        local: list[dict[str, Any]] = []
        remote: list[dict[str, Any]] = []
        for each in media:
            if each.is_local:
                local.append({"media_id": each.filesystem_id, **common})
            else:
                row = {"media_origin": each.origin, "media_id": each.filesystem_id, "filesystem_id": each.filesystem_id}
                remote.append(row | common)
            if len(local) + len(remote) >= _ROWS_AT_ONCE:
                _insert(database, connection, local, remote)
        _insert(database, connection, local, remote)
        connection.commit()


def _insert(
    database: SynapseDatabase, connection: Any, local: list[dict[str, Any]], remote: list[dict[str, Any]]
) -> None:
    for table, rows in (("local_media_repository", local), ("remote_media_cache", remote)):
        if not rows:
            continue
        columns = list(rows[0])
        with closing(connection.cursor()) as cursor:
            if database.is_postgres:
                text = io.StringIO()
                csv.DictWriter(text, columns).writerows(rows)
                text.seek(0)
                cursor.copy_expert(f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT csv)", text)
            else:
                places = ", ".join("?" * len(columns))
                values = [tuple(row.values()) for row in rows]
                cursor.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", values)
        rows.clear()

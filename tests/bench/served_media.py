"""The media that is served: rows of Synapse's database, objects in the bucket, and the control's files."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import string
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from storage_provider.media_paths import Media, content_path
from tests.servers import S3Server, make_client

_UPLOADS = 8


@dataclass(frozen=True)
class MediaSet:
    """Files of one size and one content; each has an object of its own."""

    ids: tuple[str, ...]
    content: bytes
    sha256: str

    @classmethod
    def make(cls, number: int, size: int, seed: int) -> MediaSet:
        chance = random.Random(seed)
        ids = ("".join(chance.choices(string.ascii_letters, k=24)) for _ in range(number))
        content = chance.randbytes(size)
        return cls(tuple(ids), content, hashlib.sha256(content).hexdigest())

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def paths(self) -> list[str]:
        """Where the files are in a media store, and the objects in the bucket."""
        return [content_path(Media("", media_id)) for media_id in self.ids]

    def upload(self, server: S3Server, bucket: str) -> None:
        """Put the objects into the bucket."""
        client = make_client(server)
        with ThreadPoolExecutor(_UPLOADS) as threads:
            for done in [
                threads.submit(client.put_object, Bucket=bucket, Key=path, Body=self.content) for path in self.paths
            ]:
                done.result()
        client.close()

    def write(self, store: Path) -> None:
        """Put the files into a media store, and let the system's cache know that they are read again and again.

        Each has its own content on the disk: one file with many names would be served from the processor's cache.
        """
        for path in self.paths:
            (store / path).parent.mkdir(parents=True, exist_ok=True)
            (store / path).write_bytes(self.content)
        for path in self.paths * 2:
            (store / path).read_bytes()


def insert_rows(database: Path, user: str, sets: Iterable[MediaSet]) -> None:
    """Make the files known to Synapse as its users' uploads, used just now."""
    now = int(time.time() * 1000)
    rows = [
        (media_id, "application/octet-stream", each.size, now, now, user, each.sha256, True)
        for each in sets
        for media_id in each.ids
    ]
    columns = "media_id, media_type, media_length, created_ts, last_access_ts, user_id, sha256, authenticated"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany(
            f"INSERT INTO local_media_repository ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


def copy_database(template: Path, directory: Path) -> None:
    """Give a homeserver that is to start in a directory a database of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(template, directory / "homeserver.db")

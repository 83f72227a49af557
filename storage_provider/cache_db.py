"""The command line's `cache.db`: which media was found unused, and whether it is still on the disk.

The table `media` is that of synapse-s3-storage-provider's `s3_media_upload`, so that either tool
goes on where the other one stopped; everything that is new stands beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from storage_provider.batches import in_batches
from storage_provider.media_paths import (
    Media,
    UnsafePath,
    content_path,
    parse_path,
    thumbnail_directory,
)

Kind = Literal["local", "remote"]
KINDS: tuple[Kind, ...] = ("local", "remote")
How = Literal["put", "read"]

_PAGE_ROWS = 1000

# Some builds of SQLite take no more than 999 arguments.
_ROWS_A_QUERY = 400

# Rows in one transaction: a commit waits for the disk twice.
_BATCH_ROWS = 10_000

# Enough for the inner pages of the indexes of a million rows, whose keys come in no order.
_CACHE_KIBIBYTES = 16_384

# Another run of either tool may be writing; the older one commits only at its end.
_BUSY_SECONDS = 30

# Tables, columns and the first two indexes are the older tool's. `media_on_disk` has the byte order of the path:
# server names hold no slash, and Synapse cuts all ids at the same places.
_SCHEMA = {
    "media": """
        CREATE TABLE media (
            origin TEXT NOT NULL,
            media_id TEXT NOT NULL,
            filesystem_id TEXT NOT NULL,
            type TEXT NOT NULL,
            known_deleted BOOLEAN NOT NULL
        )""",
    "media_id_idx": "CREATE UNIQUE INDEX media_id_idx ON media(origin, media_id)",
    "deleted_idx": "CREATE INDEX deleted_idx ON media(known_deleted)",
    "media_on_disk": """
        CREATE INDEX media_on_disk ON media(type, origin || '/' || filesystem_id, media_id) WHERE known_deleted = 0""",
    "media_deleted": "CREATE INDEX media_deleted ON media(origin, filesystem_id) WHERE known_deleted = 1",
    "proofs": """
        CREATE TABLE proofs (
            path TEXT NOT NULL PRIMARY KEY,
            etag TEXT NOT NULL,
            size INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            how TEXT NOT NULL
        ) WITHOUT ROWID""",
    "properties": "CREATE TABLE properties (name TEXT NOT NULL PRIMARY KEY, value) WITHOUT ROWID",
}

_COLUMNS = frozenset({"origin", "media_id", "filesystem_id", "type", "known_deleted"})

# Python 3.10 has no error codes for SQLite, so its texts are told apart.
_REASONS = {
    "not a database": "is not a SQLite database",
    "unable to open": "cannot be opened or created",
    "readonly": "may not be written",
    "is full": "cannot be written: its disk is full",
    "locked": "is in use by another process",
    "malformed": "is damaged; move it away, and update-db will write a new one",
}


class CacheDbError(Exception):
    """The cache cannot be used; the text is a sentence for the operator."""


class CachedMedia(NamedTuple):
    """A media row of Synapse's database, as the cache holds it."""

    origin: str
    """Empty for local media."""
    media_id: str
    filesystem_id: str
    kind: Kind

    @property
    def media(self) -> Media:
        return Media(self.origin, self.filesystem_id)


@dataclass(frozen=True)
class Proof:
    """A file with this size and time was found to be the object with this ETag."""

    path: str
    etag: str
    size: int
    mtime_ns: int
    how: How


class CacheDb:
    """An open `cache.db`, created where there is none; a context manager that closes itself.

    What a method writes is committed when it returns, but for proofs: they wait for others, and the
    last ones may be lost without harm. Every failure is a `CacheDbError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new_proofs: dict[str, Proof] = {}
        # Whoever knows the ids in it may ask for the media; SQLite would let everybody on the machine read them.
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o660))
        with self._as_cache_error():
            self._connection = sqlite3.connect(
                path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,  # transactions are begun where they are meant
            )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Write what waits, and close; may be called twice."""
        try:
            self.flush()
        finally:
            self._connection.close()

    def __enter__(self) -> CacheDb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- media ---

    def add(self, rows: Iterable[CachedMedia]) -> int:
        """Take rows in, and return how many are new.

        Known rows stay as they are, but for those whose `filesystem_id` has changed: Synapse has
        fetched that media anew, into another file, and it counts as new.
        """
        return self._write(
            """
            INSERT INTO media (origin, media_id, filesystem_id, type, known_deleted) VALUES (?, ?, ?, ?, 0)
            ON CONFLICT (origin, media_id) DO UPDATE
                SET filesystem_id = excluded.filesystem_id, type = excluded.type, known_deleted = 0
                WHERE filesystem_id <> excluded.filesystem_id
            """,
            ((row.origin, row.media_id, row.filesystem_id, row.kind) for row in rows),
        )

    def forget(self, rows: Iterable[CachedMedia]) -> None:
        """Remove rows that are gone from Synapse's database, and what was proved of their files."""
        self._end("DELETE FROM media WHERE origin = ? AND media_id = ? AND filesystem_id = ?", rows)

    def mark_deleted(self, rows: Iterable[CachedMedia]) -> None:
        """Note that no file of these is on the disk any more, and drop what was proved of their files."""
        self._end(
            """
            UPDATE media SET known_deleted = 1
            WHERE known_deleted = 0 AND origin = ? AND media_id = ? AND filesystem_id = ?
            """,
            rows,
        )

    def revive(self, media: Iterable[Media]) -> list[CachedMedia]:
        """Note that files of this media are on the disk again; returns the rows that were thought deleted."""
        revived = []
        for some in in_batches(media, _ROWS_A_QUERY):
            places = ", ".join(["(?, ?)"] * len(some))
            found = self._read(
                f"""
                WITH asked (origin, filesystem_id) AS (VALUES {places})
                SELECT m.origin, m.media_id, m.filesystem_id, m.type FROM asked CROSS JOIN media m
                ON m.known_deleted = 1 AND m.origin = asked.origin AND m.filesystem_id = asked.filesystem_id
                """,
                tuple(text for each in some for text in (each.origin, each.filesystem_id)),
            )
            revived += [CachedMedia(*row) for row in found]
        self._write(
            "UPDATE media SET known_deleted = 0 WHERE known_deleted = 1 AND origin = ? AND media_id = ?",
            ((row.origin, row.media_id) for row in revived),
        )
        return revived

    def undeleted(self, kind: Kind) -> Iterator[CachedMedia]:
        """The rows whose files may be on the disk, in byte order of `content_path`.

        A page is read at a time, so that rows may be changed while this runs; whether it shows the
        change depends on the page.
        """
        after, media_id = "", ""
        while page := self._read(
            """
            SELECT origin, media_id, filesystem_id, type FROM media
            WHERE known_deleted = 0 AND type = ? AND origin || '/' || filesystem_id >= ?
                AND (origin || '/' || filesystem_id > ? OR media_id > ?)
            ORDER BY origin || '/' || filesystem_id, media_id LIMIT ?
            """,
            (kind, after, after, media_id, _PAGE_ROWS),
        ):
            rows = [CachedMedia(*row) for row in page]
            yield from rows
            after, media_id = f"{rows[-1].origin}/{rows[-1].filesystem_id}", rows[-1].media_id

    def rows(self) -> Iterator[CachedMedia]:
        """All rows, deleted or not, in byte order of origin and media id, the local ones first.

        They may be changed while this runs.
        """
        origin, media_id = "", ""
        while page := self._read(
            """
            SELECT origin, media_id, filesystem_id, type FROM media
            WHERE (origin, media_id) > (?, ?) ORDER BY origin, media_id LIMIT ?
            """,
            (origin, media_id, _PAGE_ROWS),
        ):
            yield from (CachedMedia(*row) for row in page)
            origin, media_id = page[-1][:2]

    def count_undeleted(self) -> int:
        count: int = self._read("SELECT count(*) FROM media WHERE known_deleted = 0")[0][0]
        return count

    # --- proofs ---

    def proofs(self, paths: Iterable[str]) -> dict[str, Proof]:
        """What was proved last of the files with these paths, where something was."""
        found: dict[str, Proof] = {}
        for some in in_batches(paths, _ROWS_A_QUERY):
            places = ", ".join("?" * len(some))
            rows = self._read(
                f"SELECT path, etag, size, mtime_ns, how FROM proofs WHERE path IN ({places})", tuple(some)
            )
            found |= {row[0]: Proof(*row) for row in rows}
            found |= {path: self._new_proofs[path] for path in some if path in self._new_proofs}
        return found

    def record_proofs(self, proofs: Iterable[Proof]) -> None:
        self._new_proofs.update((proof.path, proof) for proof in proofs)
        if len(self._new_proofs) >= _PAGE_ROWS:
            self.flush()

    def forget_proofs(self, paths: Iterable[str]) -> None:
        """Drop what was proved of the files with these paths, since the contrary has been seen."""
        paths = list(paths)
        for path in paths:
            self._new_proofs.pop(path, None)
        self._write("DELETE FROM proofs WHERE path = ?", ((path,) for path in paths))

    def flush(self) -> None:
        """Write the proofs that wait."""
        proofs, self._new_proofs = self._new_proofs, {}
        self._write(
            "INSERT OR REPLACE INTO proofs (path, etag, size, mtime_ns, how) VALUES (?, ?, ?, ?, ?)",
            ((proof.path, proof.etag, proof.size, proof.mtime_ns, proof.how) for proof in proofs.values()),
        )

    # --- properties ---

    @property
    def unused_before(self) -> int | None:
        """The moment (ms) that the last update-db asked for; None where only the older tool has been here."""
        found = self._read("SELECT value FROM properties WHERE name = 'unused_before'")
        return found[0][0] if found else None

    @unused_before.setter
    def unused_before(self, ts_ms: int | None) -> None:
        self._write("INSERT OR REPLACE INTO properties (name, value) VALUES ('unused_before', ?)", [(ts_ms,)])

    @property
    def config_paths(self) -> tuple[Path, ...]:
        """The configuration files of Synapse that the last update-db was given; none where it found its own."""
        found = self._read("SELECT value FROM properties WHERE name = 'config_paths'")
        return tuple(Path(path) for path in json.loads(found[0][0])) if found else ()

    @config_paths.setter
    def config_paths(self, paths: Sequence[Path]) -> None:
        text = json.dumps([str(path) for path in paths])
        self._write("INSERT OR REPLACE INTO properties (name, value) VALUES ('config_paths', ?)", [(text,)])

    # --- inside ---

    def _prepare(self) -> None:
        self._read(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        existing = {name for (name,) in self._read("SELECT name FROM sqlite_master")}
        if existing and "media" not in existing:
            raise CacheDbError(f"{self.path} is a SQLite database, but not a cache of s3_media_upload")
        columns = {row[1] for row in self._read("PRAGMA table_info(media)")}
        if existing and not columns >= _COLUMNS:
            raise CacheDbError(f"{self.path} holds a table `media` that s3_media_upload did not make")
        missing = [statement for name, statement in _SCHEMA.items() if name not in existing]
        if missing:
            with self._transaction():
                for statement in missing:
                    # Another process may have been faster.
                    self._connection.execute(
                        statement.replace("TABLE", "TABLE IF NOT EXISTS").replace("INDEX", "INDEX IF NOT EXISTS")
                    )

    def _end(self, sql: str, rows: Iterable[CachedMedia]) -> None:
        """Run a statement for each row, and drop what was proved of its files."""
        for batch in in_batches(rows, _BATCH_ROWS):
            media = {row.media for row in batch}
            for path in list(self._new_proofs):
                parsed = parse_path(path)
                if parsed is not None and parsed.media in media:
                    del self._new_proofs[path]
            with self._transaction():
                self._connection.executemany(sql, [(row.origin, row.media_id, row.filesystem_id) for row in batch])
                self._connection.executemany(
                    "DELETE FROM proofs WHERE path = ? OR (path >= ? AND path < ?)", _paths(media)
                )

    def _read(self, sql: str, arguments: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._as_cache_error():
            return self._connection.execute(sql, arguments).fetchall()

    def _write(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> int:
        """Run a statement for each row; the number of rows of the table that were changed."""
        changed = 0
        for batch in in_batches(rows, _BATCH_ROWS):
            with self._transaction():
                before = self._connection.total_changes
                self._connection.executemany(sql, batch)
                changed += self._connection.total_changes - before
        return changed

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._as_cache_error():
            # A transaction that begins with reading could not always go on to writing.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # On a full disk SQLite has rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _as_cache_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            reason = next((reason for sign, reason in _REASONS.items() if sign in text), f"cannot be used: {text}")
            raise CacheDbError(f"{self.path} {reason}") from None


def _paths(media: Iterable[Media]) -> Iterator[tuple[str, str, str]]:
    """The path of the content, and those between which the paths of the thumbnails lie."""
    for each in media:
        with contextlib.suppress(UnsafePath):
            thumbnails = thumbnail_directory(each)
            # "0" is the character after "/".
            yield content_path(each), f"{thumbnails}/", f"{thumbnails}0"

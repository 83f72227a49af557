"""Where Synapse's database keeps media, in SQL that both PostgreSQL and SQLite understand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.database import Row

USED = "COALESCE(m.last_access_ts, m.created_ts)"

USED_OR_0 = f"COALESCE({USED}, 0)"

THUMBNAIL_NAME = (
    "CAST(t.thumbnail_width AS TEXT) || '-' || CAST(t.thumbnail_height AS TEXT) || '-' || "
    "replace(t.thumbnail_type, '/', '-') || '-' || t.thumbnail_method"
)


@dataclass(frozen=True)
class Tables:
    """Where local or remote media is; `m` stands for the media table and `t` for that of the thumbnails."""

    kind: Kind
    media: str
    thumbnails: str
    origin: str
    filesystem_id: str
    key_columns: tuple[str, ...]
    counts: str
    """What leaves out rows that the media store has no file for."""

    @property
    def identity(self) -> str:
        return f"{self.origin}, m.media_id, {self.filesystem_id}"

    @property
    def path(self) -> str:
        """What sorts like the path: Synapse cuts all ids at the same places, and no server name holds a slash."""
        return f"{self.origin} || '/' || {self.filesystem_id}" if self.kind == "remote" else self.filesystem_id

    @property
    def join(self) -> str:
        return self.match("t")

    def key_of(self, table: str) -> str:
        """The columns of the key in a table."""
        return ", ".join(f"{table}.{column}" for column in self.key_columns)

    def asked(self, rows: Sequence[CachedMedia]) -> tuple[str, Row]:
        """A table `asked` with the keys of rows, to be joined, and its arguments."""
        # Not "IN (VALUES …)": for pairs SQLite would read the whole table.
        values = ", ".join([f"({', '.join('?' * len(self.key_columns))})"] * len(rows))
        keys = tuple(value for row in rows for value in self.key(row))
        return f"WITH asked ({', '.join(self.key_columns)}) AS (VALUES {values})", keys

    def match(self, one: str, other: str = "m") -> str:
        """The condition that a row has the key of another table's row."""
        return " AND ".join(f"{one}.{column} = {other}.{column}" for column in self.key_columns)

    def key(self, row: CachedMedia) -> tuple[str, ...]:
        return (row.origin, row.media_id) if self.kind == "remote" else (row.media_id,)


LOCAL = Tables(
    kind="local",
    media="local_media_repository",
    thumbnails="local_media_repository_thumbnails",
    origin="''",
    filesystem_id="m.media_id",
    key_columns=("media_id",),
    # An upload that is awaited has no length. Synapse may be at work on its file.
    counts="m.url_cache IS NULL AND m.media_id IS NOT NULL AND m.media_length IS NOT NULL",
)
REMOTE = Tables(
    kind="remote",
    media="remote_media_cache",
    thumbnails="remote_media_cache_thumbnails",
    origin="m.media_origin",
    filesystem_id="m.filesystem_id",
    key_columns=("media_origin", "media_id"),
    counts=(
        "m.media_origin IS NOT NULL AND m.media_id IS NOT NULL AND m.filesystem_id IS NOT NULL "
        "AND m.media_length IS NOT NULL"
    ),
)


def used_between(tables: Tables, since: int, before: int | None) -> tuple[str, Row]:
    """The condition that media has a file and was used in a time, in milliseconds, and its arguments."""
    condition = f"{tables.counts} AND {USED_OR_0} >= ?"
    return (condition, (since,)) if before is None else (f"{condition} AND {USED_OR_0} < ?", (since, before))


def is_after(order: str, place: Row) -> str:
    """The condition that a row comes after a place in an order; no place is before all rows."""
    return f"({order}) > ({', '.join('?' * len(place))})" if place else "1 = 1"


def place_of(row: CachedMedia) -> tuple[str, str]:
    """Where a row stands in the order of `Tables.path` and media id."""
    return f"{row.origin}/{row.filesystem_id}" if row.kind == "remote" else row.filesystem_id, row.media_id

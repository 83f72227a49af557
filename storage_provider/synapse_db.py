"""The media rows of Synapse's database, PostgreSQL or SQLite, read and never written."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.database import Database, DatabaseArguments, Row, open_database
from storage_provider.media_paths import Media, in_thumbnail_order
from storage_provider.media_tables import (
    LOCAL,
    REMOTE,
    THUMBNAIL_NAME,
    USED,
    USED_OR_0,
    Tables,
    is_after,
    place_of,
    used_between,
)

# Some builds of SQLite take no more than 999 arguments, and a remote row needs two.
_ROWS_A_QUERY = 400

# For these PostgreSQL looks the thumbnails up in their index; for more it would read them all.
_MEDIA_AT_A_TIME = 2000

# A comparison with the disk is over by then. Moving files takes hours, and PostgreSQL vacuums nothing meanwhile.
_LONGEST_TRANSACTION_SECONDS = 60
# Or so many times as long as the database has sorted.
_SORTINGS = 10

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class MediaFacts:
    """What the database says of one media and its files."""

    length: int | None
    """Bytes; None while the upload is awaited."""
    sha256: str | None
    """In hex; None for media from before Synapse 1.128."""
    quarantined: bool
    thumbnail_lengths: Mapping[str, int]
    """By file name. A remote one without the method stands there too, where only one thumbnail can be meant."""


@dataclass(frozen=True)
class StoredMedia:
    """A media row whose file should exist, with its thumbnails."""

    row: CachedMedia
    length: int
    sha256: str | None
    last_access: int | None
    created_ts: int
    quarantined: bool
    thumbnail_lengths: Mapping[str, int]
    """By file name, in byte order. The files of old remote thumbnails may be named without the method."""

    @property
    def used(self) -> int:
        """When it was used last, in milliseconds."""
        return self.created_ts if self.last_access is None else self.last_access


class FileRow(NamedTuple):
    """What the database says of one file that should exist; light, as there are millions of them."""

    origin: str
    media_id: str
    filesystem_id: str
    thumbnail: str | None
    """The file name of a thumbnail, None for the content."""
    length: int
    sha256: str | None
    """In hex; None for thumbnails and for old media."""
    used: int
    """When the media was used last, in milliseconds."""
    quarantined: bool

    @property
    def row(self) -> CachedMedia:
        return CachedMedia(self.origin, self.media_id, self.filesystem_id, "remote" if self.origin else "local")


def connect(arguments: DatabaseArguments) -> SynapseDb:
    """Connect, and see that it is Synapse's database. Raises `SynapseDbError`."""
    database = open_database(arguments)
    try:
        return SynapseDb(database)
    except BaseException:
        database.close()
        raise


class SynapseDb:
    """Synapse's media rows; a context manager that closes its connection.

    An iterator streams over a connection of its own and shows the database as it was when it began; its transaction
    lasts as long as it does, where nothing else is said. The other methods ask anew each time. They may be called from
    many threads at once. Failures are `SynapseDbError`s.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # The column came with Synapse 1.128.
        self._sha256 = "m.sha256" if "sha256" in database.columns("local_media_repository") else "NULL"
        database.columns("remote_media_cache")

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> SynapseDb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- streams ---

    def unused_before(self, ts_ms: int, kind: Kind | None = None) -> Iterator[CachedMedia]:
        """Media that was last used before a moment, in byte order of origin and media id, the local rows first.

        Media of URL previews is left out, as it never leaves the disk, and uploads that are still awaited; quarantined
        media is not.
        """
        for tables in (LOCAL, REMOTE):
            if kind in (None, tables.kind):
                order = ", ".join(f"m.{column}{self._database.byte_order}" for column in tables.key_columns)
                sql = f"""
                    SELECT {tables.identity} FROM {tables.media} m WHERE {tables.counts} AND {USED} < ?
                    ORDER BY {order}
                """
                for origin, media_id, filesystem_id in self._database.stream(sql, (ts_ms,)):
                    yield CachedMedia(origin, media_id, filesystem_id, tables.kind)

    def selected_media(self, *, used_since: int | None = None, origin: str | None = None) -> Iterator[StoredMedia]:
        """Media whose files should exist, each once, in the order in which the database finds it soonest.

        `origin` takes the media of one server only, `""` the local media. Uploads that are still
        awaited have no file and are left out.

        It has no transaction while somebody works on what it yields, be it for hours: it reads many media at a time,
        each time as things are then.
        """
        for tables, condition, arguments in _selected(used_since, origin):
            after: Row = ()
            while media := self._next_media(tables, condition, arguments, after):
                yield from media
                after = tables.key(media[-1].row)

    def _next_media(self, tables: Tables, condition: str, arguments: Row, place: Row) -> list[StoredMedia]:
        """The next media in the order of the index of their keys, from the first one or after a place."""
        order = tables.key_of("m")
        sql = f"""
            WITH page AS (
                SELECT m.* FROM {tables.media} m WHERE {condition} AND {is_after(order, place)}
                ORDER BY {order} LIMIT {_MEDIA_AT_A_TIME}
            )
            SELECT {tables.identity}, m.media_length, {self._sha256}, m.last_access_ts, m.created_ts,
                m.quarantined_by IS NOT NULL, {THUMBNAIL_NAME}, t.thumbnail_length
            FROM page m LEFT JOIN {tables.thumbnails} t ON {tables.join}
            ORDER BY {order}, {self._order((THUMBNAIL_NAME,))}
        """
        rows = self._database.stream(sql, arguments + place)
        found = []
        for media, with_thumbnails in itertools.groupby(rows, lambda row: row[:-2]):
            server, media_id, filesystem_id, length, sha256, last_access, created_ts, quarantined = media
            stored = StoredMedia(
                CachedMedia(server, media_id, filesystem_id, tables.kind),
                length,
                sha256,
                last_access,
                created_ts,
                bool(quarantined),
                _lengths(row[-2:] for row in with_thumbnails),
            )
            found.append(stored)
        return found

    def contents(self, kind: Kind, *, used_since: int = 0, used_before: int | None = None) -> Iterator[FileRow]:
        """The contents of media whose files should exist, in byte order of `content_path`.

        After a minute, or somewhat more where the database is slow, its transaction ends with the row at hand, and the
        rest is read as things are then.
        """
        tables = REMOTE if kind == "remote" else LOCAL
        condition, arguments = used_between(tables, used_since, used_before)
        order = self._order((tables.path, "m.media_id"))

        def read(place: Row) -> Iterator[FileRow]:
            sql = f"""
                SELECT {tables.identity}, NULL, m.media_length, {self._sha256}, {USED_OR_0},
                    m.quarantined_by IS NOT NULL
                FROM {tables.media} m WHERE {condition} AND {is_after(order, place)}
                ORDER BY {order}
            """
            return map(FileRow._make, self._database.stream(sql, arguments + place))

        return _resumed(read, lambda row: place_of(row.row))

    def thumbnails(self, kind: Kind, *, used_since: int = 0, used_before: int | None = None) -> Iterator[FileRow]:
        """The thumbnails of media whose files should exist, in byte order of `thumbnail_directory`, `/` and name.

        Its transactions are those of `contents`.
        """
        tables = REMOTE if kind == "remote" else LOCAL
        condition, arguments = used_between(tables, used_since, used_before)
        order = self._order((tables.path, THUMBNAIL_NAME, "m.media_id"))

        def read(place: Row) -> Iterator[FileRow]:
            sql = f"""
                SELECT {tables.identity}, {THUMBNAIL_NAME}, t.thumbnail_length, NULL, {USED_OR_0},
                    m.quarantined_by IS NOT NULL
                FROM {tables.media} m JOIN {tables.thumbnails} t ON {tables.join}
                WHERE {condition} AND t.thumbnail_length IS NOT NULL AND ({THUMBNAIL_NAME}) IS NOT NULL
                    AND {is_after(order, place)}
                ORDER BY {order}
            """
            return map(FileRow._make, self._database.stream(sql, arguments + place))

        def place_of_thumbnail(row: FileRow) -> Row:
            path, media_id = place_of(row.row)
            return path, row.thumbnail, media_id

        # Rows that share a file come as one, so that their thumbnails are in one order.
        directories = (
            (media, list(group)) for media, group in itertools.groupby(_resumed(read, place_of_thumbnail), _file_of)
        )
        ordered = in_thumbnail_order(directories, lambda directory: Media(*directory[0]))
        return itertools.chain.from_iterable(group for _, group in ordered)

    def _order(self, columns: Iterable[str]) -> str:
        """What sorts by the bytes of columns."""
        return ", ".join(f"({column}){self._database.byte_order}" for column in columns)

    # --- questions, answered by the database as it is now ---

    def present(self, rows: Iterable[CachedMedia]) -> set[tuple[str, str]]:
        """The (origin, media id) of those that still exist and have the same file."""
        return self._find(rows, "1 = 1", ())

    def still_unused(self, rows: Iterable[CachedMedia], ts_ms: int) -> set[tuple[str, str]]:
        """The (origin, media id) of those that exist, have the same file and were last used before a moment."""
        return self._find(rows, f"{USED} < ?", (ts_ms,))

    def wanted(self, rows: Iterable[CachedMedia]) -> set[tuple[str, str]]:
        """The (origin, media id) of those that exist, have the same file and are not quarantined."""
        return self._find(rows, "m.quarantined_by IS NULL", ())

    def evictable(self, rows: Iterable[CachedMedia], ts_ms: int) -> set[tuple[str, str]]:
        """The (origin, media id) of those that are `still_unused` and not quarantined."""
        return self._find(rows, f"m.quarantined_by IS NULL AND {USED_OR_0} < ?", (ts_ms,))

    def facts_of_files(
        self, files: Collection[Media], likely: Iterable[Iterable[tuple[str, str]]] = ()
    ) -> dict[Media, MediaFacts]:
        """What is known of the media whose files these are; files that no row has are left out.

        A path does not tell the id of remote media: it is looked for among the `likely` ones, pairs of origin and
        media id, which is cheap, and else in all rows of that server. While some are not found, more likely ones
        are asked for.
        """
        rows = [CachedMedia("", file.filesystem_id, file.filesystem_id, "local") for file in files if file.is_local]
        remote = {file for file in files if not file.is_local}
        attempts = iter(likely)
        while remote and (pairs := next(attempts, None)) is not None:
            found = self._rows_among(remote, pairs)
            rows += found
            remote.difference_update(row.media for row in found)
        for file in remote:
            rows += self._rows_with(file)
        return {row.media: facts for row, facts in self.facts_of(rows).items()}

    def facts(self, row: CachedMedia) -> MediaFacts | None:
        """What is known of the row's media; None where the row is gone or has another file."""
        return self.facts_of([row]).get(row)

    def facts_of(self, rows: Iterable[CachedMedia]) -> dict[CachedMedia, MediaFacts]:
        """What is known of each row's media; rows that are gone or have another file are left out."""
        facts = {}
        for tables, some in _in_queries(rows):
            by_key = {tables.key(row): row for row in some}
            asked, keys = tables.asked(some)
            found = self._database.query(
                f"""
                {asked} SELECT {tables.identity}, m.media_length, {self._sha256}, m.quarantined_by IS NOT NULL
                FROM asked JOIN {tables.media} m ON {tables.match("asked")}
                """,
                keys,
            )
            thumbnails: dict[tuple[str, ...], list[Row]] = {}
            for *key, name, length in self._database.query(
                f"""
                {asked} SELECT {tables.key_of("t")}, {THUMBNAIL_NAME}, t.thumbnail_length
                FROM asked JOIN {tables.thumbnails} t ON {tables.match("t", "asked")}
                """,
                keys,
            ):
                thumbnails.setdefault(tuple(key), []).append((name, length))
            for origin, media_id, filesystem_id, length, sha256, quarantined in found:
                row = CachedMedia(origin, media_id, filesystem_id, tables.kind)
                if by_key.get(tables.key(row)) == row:
                    lengths = _lengths(thumbnails.get(tables.key(row), ()))
                    if tables.kind == "remote":
                        lengths |= {old: lengths[name] for name, old in legacy_names(lengths).items()}
                    facts[row] = MediaFacts(length, sha256, bool(quarantined), lengths)
        return facts

    def _rows_among(self, files: Collection[Media], likely: Iterable[tuple[str, str]]) -> list[CachedMedia]:
        """The rows of remote files, as far as they are among the likely ones."""
        origins = {file.origin for file in files}
        asked = [CachedMedia(origin, media_id, "", "remote") for origin, media_id in likely if origin in origins]
        rows = itertools.chain.from_iterable(
            self._rows(tables, some, "1 = 1", ()) for tables, some in _in_queries(asked)
        )
        return [row for row in rows if row.media in files]

    def _rows_with(self, file: Media) -> list[CachedMedia]:
        """The rows of a remote file, for which the database has no index."""
        if "\0" in file.origin + file.filesystem_id:
            return []
        found = self._database.query(
            "SELECT m.media_id FROM remote_media_cache m WHERE m.media_origin = ? AND m.filesystem_id = ?",
            (file.origin, file.filesystem_id),
        )
        return [CachedMedia(file.origin, media_id, file.filesystem_id, "remote") for (media_id,) in found]

    def _find(self, rows: Iterable[CachedMedia], condition: str, arguments: Row) -> set[tuple[str, str]]:
        found = set()
        for tables, some in _in_queries(rows):
            answer = self._rows(tables, some, condition, arguments)
            found |= {(row.origin, row.media_id) for row in answer.intersection(some)}
        return found

    def _rows(self, tables: Tables, asked: Sequence[CachedMedia], condition: str, arguments: Row) -> set[CachedMedia]:
        """The rows with the keys of others, as they are now."""
        table, keys = tables.asked(asked)
        answer = self._database.query(
            f"""
            {table} SELECT {tables.identity} FROM asked JOIN {tables.media} m ON {tables.match("asked")}
            WHERE {tables.counts} AND {condition}
            """,
            (*keys, *arguments),
        )
        return {CachedMedia(origin, media_id, file, tables.kind) for origin, media_id, file in answer}


def _selected(used_since: int | None, origin: str | None) -> Iterator[tuple[Tables, str, Row]]:
    for tables in (LOCAL, REMOTE):
        if origin is not None and bool(origin) != (tables.kind == "remote"):
            continue
        conditions = [tables.counts]
        arguments: list[Any] = []
        if used_since is not None:
            conditions.append(f"{USED} >= ?")
            arguments.append(used_since)
        if origin:
            conditions.append(f"{tables.origin} = ?")
            arguments.append(origin)
        yield tables, " AND ".join(conditions), tuple(arguments)


def _resumed(read: Callable[[Row], Iterator[_Item]], place: Callable[[_Item], Row]) -> Iterator[_Item]:
    """What is read from the first item on, and after a while anew after the place of the last one."""
    after: Row = ()
    while True:
        started, end = time.monotonic(), None
        for item in read(after):
            if end is None:
                # What comes first comes when all is sorted: where that takes long, it is not to be done often.
                now = time.monotonic()
                end = now + max(_LONGEST_TRANSACTION_SECONDS, _SORTINGS * (now - started))
            yield item
            if time.monotonic() >= end:
                after = place(item)
                break
        else:
            return


def _file_of(row: FileRow) -> tuple[str, str]:
    return row.origin, row.filesystem_id


def _in_queries(rows: Iterable[CachedMedia]) -> Iterator[tuple[Tables, list[CachedMedia]]]:
    """The rows that can exist, by kind and as many as one query takes."""
    asked = [row for row in rows if _can_exist(row)]
    for tables in (LOCAL, REMOTE):
        of_kind = [row for row in asked if row.kind == tables.kind]
        for start in range(0, len(of_kind), _ROWS_A_QUERY):
            yield tables, of_kind[start : start + _ROWS_A_QUERY]


def _can_exist(row: CachedMedia) -> bool:
    # PostgreSQL has no NUL in texts, and psycopg2 does not take one in a question either.
    return "\0" not in row.origin + row.media_id + row.filesystem_id


def _lengths(thumbnails: Iterable[Row]) -> dict[str, int]:
    return {name: length for name, length in thumbnails if name is not None and length is not None}


def legacy_names(names: Collection[str]) -> dict[str, str]:
    """What old files of remote thumbnails with these names are called, without the method, where one can be meant."""
    legacy = [name.rpartition("-")[0] for name in names]
    return {name: old for name, old in zip(names, legacy, strict=True) if legacy.count(old) == 1}

"""What there is to do: cache.db and the media store side by side, in the order of the paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storage_provider.batches import in_batches
from storage_provider.cache_db import KINDS, CacheDb, CachedMedia, Kind
from storage_provider.directories import FileState
from storage_provider.failures import Failed
from storage_provider.media_paths import Media, UnsafePath, content_path
from storage_provider.media_store import MediaStore
from storage_provider.media_walk import Unreadable, media_on_disk

# Media of the store that is looked for among the deleted at a time.
_MEDIA_AT_ONCE = 1000


@dataclass(frozen=True)
class OnDisk:
    """A row whose media has files on disk; `is_back` tells that they had been deleted."""

    row: CachedMedia
    files: tuple[tuple[str, FileState], ...]
    is_back: bool


@dataclass(frozen=True)
class NotOnDisk:
    """A row whose media has no file on disk (any more)."""

    row: CachedMedia


def candidates(
    store: MediaStore, cache: CacheDb, must_end: Callable[[], bool] = lambda: False
) -> Iterator[OnDisk | NotOnDisk | Failed]:
    """The rows that cache.db takes to be on disk, and those whose files have come back, in byte order of `content_path`.

    The store and the rows are each read once. That media is back is noted in cache.db, that it is
    gone is not. Paths that would leave the store, and what cannot be read, are `Failed`. With
    `must_end` it is over before the next media on disk, be it one of the rows or not.
    """
    for kind in KINDS:
        yield from _of_kind(store, cache, kind, must_end)


def _of_kind(
    store: MediaStore, cache: CacheDb, kind: Kind, must_end: Callable[[], bool]
) -> Iterator[OnDisk | NotOnDisk | Failed]:
    rows = _Rows(cache.undeleted(kind))
    on_disk = itertools.takewhile(lambda _: not must_end(), media_on_disk(store, local=kind == "local"))
    for entries in in_batches(on_disk, _MEDIA_AT_ONCE):
        back: dict[Media, list[CachedMedia]] = {}
        for row in cache.revive(entry.media for entry in entries if not isinstance(entry, Unreadable)):
            back.setdefault(row.media, []).append(row)
        for entry in entries:
            yield from map(_absent, rows.before(entry.order))
            if isinstance(entry, Unreadable):
                for row in rows.take(entry.covers):
                    yield Failed(_name(row), f"cannot be read: {entry.reason}")
                continue
            # What has come back may also be among the rows that were yet to be read.
            known = list(rows.at(entry.order))
            returned = back.get(entry.media, [])
            for row in dict.fromkeys([*known, *returned]):
                yield OnDisk(row, entry.files, row in returned)
    if must_end():
        # What was not looked at is not gone.
        return
    yield from map(_absent, rows.take(lambda _: True))


class _Rows:
    """Rows by their order, to be taken from the front."""

    def __init__(self, rows: Iterator[CachedMedia]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def before(self, order: str) -> Iterator[CachedMedia]:
        return self.take(lambda each: each < order)

    def at(self, order: str) -> Iterator[CachedMedia]:
        return self.take(lambda each: each == order)

    def take(self, fits: Callable[[str], bool]) -> Iterator[CachedMedia]:
        """The next rows, as long as their order fits."""
        while self._next is not None and fits(f"{self._next.origin}/{self._next.filesystem_id}"):
            yield self._next
            self._next = next(self._rows, None)


def _absent(row: CachedMedia) -> NotOnDisk | Failed:
    try:
        content_path(row.media)
    except UnsafePath as error:
        return Failed(_name(row), f"refused: {error}")
    return NotOnDisk(row)


def _name(row: CachedMedia) -> str:
    return f"{row.origin or 'local'} {row.media_id}"

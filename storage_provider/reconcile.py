"""Comparing what should be there with what is there, by walking ordered streams side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from backends.base import ObjectInfo
from storage_provider.cache_db import Kind
from storage_provider.media_paths import Media, UnsafePath, content_path, is_thumbnail, thumbnail_directory
from storage_provider.media_store import WalkedFile
from storage_provider.synapse_db import FileRow, SynapseDb


class OutOfOrder(Exception):
    """A stream that should be in byte order of the path is not: what was compared with it would be wrong."""


class ExpectedFile(NamedTuple):
    """A file that the database knows."""

    path: str
    row: FileRow


class Entry(NamedTuple):
    """What there is of one path."""

    path: str
    expected: FileRow | None
    """What the database says of it; None also where two rows claim the path, which Synapse never writes."""
    file: WalkedFile | None
    object: ObjectInfo | None


def expected_files(
    database: SynapseDb,
    media_root: str,
    *,
    used_since: int = 0,
    used_before: int | None = None,
    refuse: Callable[[FileRow], object] = lambda row: None,
) -> Iterator[ExpectedFile]:
    """The files below one of `MEDIA_ROOTS` that the database knows, in byte order of the path.

    Rows that would lead to a path which is none of Synapse's go to `refuse`. The moments are
    milliseconds; the later one is not included.
    """
    rows_of = database.thumbnails if "thumbnail" in media_root else database.contents
    kind: Kind = "remote" if media_root.startswith("remote") else "local"
    for row in rows_of(kind, used_since=used_since, used_before=used_before):
        path = _path(media_root, row)
        if path is None:
            refuse(row)
        else:
            yield ExpectedFile(path, row)


def reconcile(
    expected: Iterable[ExpectedFile], files: Iterable[WalkedFile], objects: Iterable[ObjectInfo] = ()
) -> Iterator[Entry]:
    """Walk up to three streams side by side; one entry for each path, in byte order.

    Raises `OutOfOrder`. Nothing but the entry at hand is held.
    """
    # Strings compare by code point, which is the byte order of their UTF-8.
    wanted, found, stored = _claimed_once(expected), iter(files), iter(objects)
    row, file, info = next(wanted, None), next(found, None), next(stored, None)
    while True:
        path = None if row is None else row.path
        if file is not None and (path is None or file.path < path):
            path = file.path
        if info is not None and (path is None or info.key < path):
            path = info.key
        if path is None:
            return
        of_row = of_file = of_object = None
        if row is not None and row.path == path:
            of_row, row = row.row, next(wanted, None)
        if file is not None and file.path == path:
            of_file, file = file, next(found, None)
            if file is not None and file.path <= path:
                raise OutOfOrder(f"the walk over the disk has {file.path!r} after {path!r}")
        if info is not None and info.key == path:
            of_object, info = info, next(stored, None)
            if info is not None and info.key <= path:
                raise OutOfOrder(f"the listing of the bucket has {info.key!r} after {path!r}")
        yield Entry(path, of_row, of_file, of_object)


def _claimed_once(expected: Iterable[ExpectedFile]) -> Iterator[ExpectedFile]:
    """Those whose path no other one has."""
    previous: ExpectedFile | None = None
    is_alone = True
    for each in expected:
        if previous is not None:
            if each.path < previous.path:
                raise OutOfOrder(f"the database has {each.path!r} after {previous.path!r}")
            is_repeated = each.path == previous.path
            if is_alone and not is_repeated:
                yield previous
            is_alone = not is_repeated
        previous = each
    if previous is not None and is_alone:
        yield previous


# What nearly all ids look like: no path made of them has to be looked at more closely.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{5,200}")
_PLAIN_SERVER = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*(?::[0-9]+)?")


def _path(media_root: str, row: FileRow) -> str | None:
    identifier, origin = row.filesystem_id, row.origin
    is_plain = _PLAIN_ID.fullmatch(identifier) and (
        not origin or (len(origin) < 200 and _PLAIN_SERVER.fullmatch(origin))
    )
    if is_plain:
        place = f"{origin}/{identifier[:2]}" if origin else identifier[:2]
        directory = f"{media_root}{place}/{identifier[2:4]}/{identifier[4:]}"
    else:
        media = Media(origin, identifier)
        try:
            directory = content_path(media) if row.thumbnail is None else thumbnail_directory(media)
        except UnsafePath:
            return None
    if row.thumbnail is None:
        return directory
    return f"{directory}/{row.thumbnail}" if is_thumbnail(row.thumbnail, bool(origin)) else None

"""The layout of Synapse's media directory, which the bucket repeats: media ids, server names and paths.

Paths are relative to the directory, with `/` between segments: the key of the object, without its
prefix, is the same string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

MEDIA_ROOTS = ("local_content/", "local_thumbnails/", "remote_content/", "remote_thumbnail/")
"""What media paths start with (Synapse 1.163, `synapse/media/filepath.py`); `url_cache` never leaves the disk."""

_Row = TypeVar("_Row")

_LONGEST_SEGMENT = 255

# Two characters, two characters and at least one more: Synapse cuts an id at these places.
_SHORTEST_ID = 5

LEVELS: dict[str, tuple[int | None, ...]] = {
    "local_content/": (2, 2),
    "local_thumbnails/": (2, 2, None),
    "remote_content/": (None, 2, 2),
    "remote_thumbnail/": (None, 2, 2, None),
}
"""The directories below each of `MEDIA_ROOTS`: the lengths of their names, None where any will do."""

# Each file in hand is asked about several times while it is moved, and there are as many as threads.
_PATHS_REMEMBERED = 128

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Synapse makes thumbnails of JPEG, PNG and WebP, by these two methods. Everything else that may lie beside
# them, such as files that are still being written, is not ours to move or to delete.
_THUMBNAIL = re.compile(r"(?:0|[1-9][0-9]{0,9})-(?:0|[1-9][0-9]{0,9})-[a-z]+-[a-z0-9]+(-crop|-scale)?")


class UnsafePath(ValueError):
    """An id, a server name or a path that does not have the shape of Synapse's."""


class Media(NamedTuple):
    """What one uploaded or downloaded file and its thumbnails are stored under."""

    origin: str
    """The server that it comes from; empty for local media."""
    filesystem_id: str
    """The media id for local media; for remote media a random one."""

    @property
    def is_local(self) -> bool:
        return not self.origin


@dataclass(frozen=True)
class MediaFile:
    """A path that has the shape of Synapse's."""

    media: Media
    thumbnail: str | None
    """The file name of a thumbnail; None for the content itself."""
    path: str


def content_path(media: Media) -> str:
    """The path of the content. Raises `UnsafePath`."""
    return "/".join(("local_content" if media.is_local else "remote_content", *_segments(media)))


def thumbnail_directory(media: Media) -> str:
    """The path of the directory with the thumbnails, without a slash at its end. Raises `UnsafePath`."""
    return "/".join(("local_thumbnails" if media.is_local else "remote_thumbnail", *_segments(media)))


@lru_cache(_PATHS_REMEMBERED)
def parse_path(path: str) -> MediaFile | None:
    """What a path or key stands for; None for everything that Synapse would not have written."""
    root, *segments = path.split("/")
    levels = LEVELS.get(f"{root}/")
    if levels is None or len(segments) != len(levels) + 1:
        return None
    if any(length not in (None, len(segment)) for length, segment in zip(levels, segments, strict=False)):
        return None
    is_remote = levels[0] is None
    thumbnail = segments.pop() if levels[-1] is None else None
    if thumbnail is not None and not is_thumbnail(thumbnail, is_remote):
        return None
    origin = segments.pop(0) if is_remote else ""
    if is_remote and not origin:
        return None
    media = Media(origin, "".join(segments))
    try:
        _segments(media)
    except UnsafePath:
        return None
    return MediaFile(media, thumbnail, path)


def in_thumbnail_order(rows: Iterable[_Row], media_of: Callable[[_Row], Media]) -> Iterator[_Row]:
    """Rows that come in the byte order of `content_path`, in that of `thumbnail_directory` plus `/`.

    They differ where an id is the beginning of another one: the content `…/ab` comes before
    `…/ab-c`, the thumbnails in `…/ab/` after those in `…/ab-c/`. What is held back is one row for
    each such beginning.
    """
    held: list[tuple[tuple[bool, str], _Row]] = []
    for row in rows:
        media = media_of(row)
        key = (not media.is_local, f"{media.origin}/{media.filesystem_id}/")
        while held and held[-1][0] <= key:
            yield held.pop()[1]
        held.append((key, row))
    while held:
        yield held.pop()[1]


def segments_of(path: str) -> list[str]:
    """The names that a path is made of. Raises `UnsafePath` where it does not have the shape of Synapse's."""
    if parse_path(path) is None:
        raise UnsafePath(f"{path!r} is no path of Synapse's media store")
    return path.split("/")


def is_safe(segment: str) -> bool:
    """Whether a name can be a part of a path, and of a key."""
    if segment.isascii() and segment.isalnum() and len(segment) <= _LONGEST_SEGMENT:
        return True
    if segment in ("", ".", "..") or "/" in segment or _CONTROL.search(segment):
        return False
    try:
        return len(segment.encode()) <= _LONGEST_SEGMENT
    except UnicodeEncodeError:  # a file name that is not UTF-8, and so cannot be a key
        return False


def is_thumbnail(name: str, is_remote: bool) -> bool:
    """Whether that is what Synapse calls a thumbnail's file."""
    match = _THUMBNAIL.fullmatch(name)
    # Only thumbnails of remote media once had names without the method.
    return match is not None and (is_remote or match[1] is not None)


def _segments(media: Media) -> list[str]:
    identifier = media.filesystem_id
    if len(identifier) < _SHORTEST_ID:
        raise UnsafePath(f"the id {identifier!r} is too short to be Synapse's")
    segments = [identifier[:2], identifier[2:4], identifier[4:]]
    if not media.is_local:
        segments.insert(0, media.origin)
    for segment in segments:
        if not is_safe(segment):
            raise UnsafePath(f"{segment!r} cannot be a part of a path in the media store")
    return segments

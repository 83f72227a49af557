"""What media there is on disk: one ordered walk over contents and thumbnails together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from storage_provider.directories import FileState, is_nothing, names_in, open_directory, regular_state
from storage_provider.media_paths import Media, is_safe, is_thumbnail
from storage_provider.media_store import MediaStore


@dataclass(frozen=True)
class MediaOnDisk:
    """A media that has files on disk."""

    media: Media
    files: tuple[tuple[str, FileState], ...]
    """Path and state: the content first, then the thumbnails in byte order."""

    @property
    def order(self) -> str:
        """What media is sorted by; it has the byte order of `content_path`."""
        return f"{self.media.origin}/{self.media.filesystem_id}"


@dataclass(frozen=True)
class Unreadable:
    """A part of the store that could not be looked into: nothing is known of the media in it."""

    order: str
    """What the order of all media in it begins with, or is."""
    is_one_media: bool
    reason: str

    def covers(self, order: str) -> bool:
        """Whether media of this order may lie in it."""
        return order == self.order if self.is_one_media else order.startswith(self.order)


# Descriptors of the same directory in the tree of the contents and in that of the thumbnails; None where it is missing.
_Pair = tuple[int | None, int | None]


def media_on_disk(store: MediaStore, *, local: bool) -> Iterator[MediaOnDisk | Unreadable]:
    """The local or the remote media of the store, in byte order of `content_path`.

    One directory of each level is held in memory. Media that appears or goes during the walk may be
    found or not. What cannot be read comes as an `Unreadable`, in the place of what it hides.
    """
    roots = ("local_content", "local_thumbnails") if local else ("remote_content", "remote_thumbnail")
    order = "/" if local else ""
    with ExitStack() as opened:
        found: list[int | None] = []
        for root in roots:
            try:
                found.append(opened.enter_context(store.directory((root,))))
            except OSError as error:
                if not is_nothing(error):
                    yield Unreadable(order, False, str(error.strerror))
                    return
                found.append(None)
        yield from _walk((found[0], found[1]), order, roots, (2, 2) if local else (None, 2, 2))


def _walk(
    pair: _Pair, order: str, paths: tuple[str, str], lengths: tuple[int | None, ...]
) -> Iterator[MediaOnDisk | Unreadable]:
    """Everything below a directory whose media has an order that begins with `order`; `lengths` are those of the names."""
    if not lengths:
        yield from _media(pair, order, paths)
        return
    try:
        names = _names(pair, os.DirEntry.is_dir, os.DirEntry.is_dir)
    except OSError as error:
        yield Unreadable(order, False, str(error.strerror))
        return
    length, *further = lengths
    # Python orders strings by code point, which is the byte order of their UTF-8. A directory counts with its slash;
    # where all names have one length that makes no difference.
    for name in sorted(names, key=None if length else lambda name: f"{name}/"):
        if length not in (None, len(name)) or not is_safe(name):
            continue
        inner_order = f"{order}{name}/" if length is None else order + name
        try:
            inner = _open(pair, name)
        except OSError as error:
            yield Unreadable(inner_order, False, str(error.strerror))
            continue
        try:
            yield from _walk(inner, inner_order, (f"{paths[0]}/{name}", f"{paths[1]}/{name}"), tuple(further))
        finally:
            _close(inner)


def _media(pair: _Pair, order: str, paths: tuple[str, str]) -> Iterator[MediaOnDisk | Unreadable]:
    """The media in a directory of the last level that both trees share."""
    try:
        names = _names(pair, os.DirEntry.is_file, os.DirEntry.is_dir)
    except OSError as error:
        yield Unreadable(order, False, str(error.strerror))
        return
    origin, _, begin = order.partition("/")
    for name in sorted(names):
        if not is_safe(name):
            continue
        try:
            files = _files(pair, name, paths, is_remote=bool(origin))
        except OSError as error:
            yield Unreadable(order + name, True, str(error.strerror))
            continue
        if files:
            yield MediaOnDisk(Media(origin, begin + name), tuple(files))


def _files(pair: _Pair, name: str, paths: tuple[str, str], *, is_remote: bool) -> list[tuple[str, FileState]]:
    contents, thumbnails = pair
    files = []
    if contents is not None and (state := _state(name, contents)) is not None:
        files.append((f"{paths[0]}/{name}", state))
    if thumbnails is None:
        return files
    try:
        directory = open_directory(name, thumbnails)
    except OSError as error:
        if is_nothing(error):
            return files
        raise
    try:
        for thumbnail in sorted(names_in(directory, os.DirEntry.is_file)):
            if is_thumbnail(thumbnail, is_remote) and (state := _state(thumbnail, directory)) is not None:
                files.append((f"{paths[1]}/{name}/{thumbnail}", state))
    finally:
        os.close(directory)
    return files


def _state(name: str, directory: int) -> FileState | None:
    try:
        return regular_state(name, directory)
    except FileNotFoundError:
        return None


def _names(pair: _Pair, of_contents: Callable[..., bool], of_thumbnails: Callable[..., bool]) -> set[str]:
    contents, thumbnails = pair
    names = set() if contents is None else set(names_in(contents, of_contents))
    return names if thumbnails is None else names.union(names_in(thumbnails, of_thumbnails))


def _open(pair: _Pair, name: str) -> _Pair:
    contents = _open_one(pair[0], name)
    try:
        return contents, _open_one(pair[1], name)
    except BaseException:
        _close((contents, None))
        raise


def _open_one(parent: int | None, name: str) -> int | None:
    if parent is None:
        return None
    try:
        return open_directory(name, parent)
    except OSError as error:
        if is_nothing(error):
            return None
        raise


def _close(pair: _Pair) -> None:
    for directory in pair:
        if directory is not None:
            os.close(directory)

"""One object on its way to all who ask for it: from the bucket into a file that readers follow while it grows.

The download runs at the bucket's pace, and each reader at its own: a reader that stalls holds no
thread and no connection. When the file is whole it is put in its place in the media store, so that
Synapse itself serves the next request.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from twisted.python.failure import Failure

from backends.base import ObjectInfo
from backends.errors import ObjectNotFound
from storage_provider.keeping import Whole
from storage_provider.proofs import Digest, LateDigest
from storage_provider.signals import Signal
from storage_provider.sources import CHUNK_BYTES, ChunkSource, ResumingReader
from storage_provider.temporary_files import TemporaryFile

if TYPE_CHECKING:
    from storage_provider.downloads import Downloads

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

# What it reads at once: little, so that the first bytes come early and a slow line lets readers go on often, and more
# where that is quick.
_SMALLEST_STEP = 64 << 10
_LARGEST_STEP = 256 << 10
_SLOW_SECONDS = 0.5

# So many steps stay in memory for readers that keep up, who need not read the file then: all of 1 MiB.
_PIECES = 5

# A download that is so far ahead of its readers gives way to those that somebody waits for.
_FAR_AHEAD_BYTES = 2 << 20

# Somebody else may take away the directories that were made for a file, or make a copy at the same path.
_PLACE_ATTEMPTS = 5


@dataclass(frozen=True)
class _Moved:
    """What a thread has brought."""

    end: int = 0
    """The bytes that there are by now, from the beginning of the object on."""
    pieces: tuple[bytes, ...] = ()
    """The last of them as they came, for readers that keep up."""
    error: Exception | None = None
    """What kept it from going on after these bytes."""


@dataclass(frozen=True)
class _Opened:
    """An object whose headers are in."""

    info: ObjectInfo
    moved: _Moved = _Moved()
    content: bytes | None = None
    """All of a small object."""
    reader: ResumingReader | None = None
    file: TemporaryFile | None = None
    """Where the content of a larger one goes; None where the disk has no room for it."""


class SharedDownload:
    """One object on its way from the bucket to all who ask for it.

    A method that says so runs in a thread; everything else belongs to the reactor's.
    """

    def __init__(self, downloads: Downloads, path: str) -> None:
        self.path = path
        self._downloads = downloads
        self._info: ObjectInfo | None = None
        self._content: bytes | None = None
        self._reader: ResumingReader | None = None
        self._file: TemporaryFile | None = None
        self._no_file: OSError | None = None
        self._error: Exception | None = None
        self._available = 0
        # Of the space that the disk has promised to the file, what is not written yet.
        self._promised = 0
        # A large object is hashed as it comes: hashed when it is whole, it would hold up the others that are to be kept.
        self._digest = hashlib.sha256()
        self._step_bytes = _SMALLEST_STEP
        self._changed = Signal()
        self._pieces: tuple[bytes, ...] = ()
        self._read_up_to = 0
        self._users = 0
        self._is_moving = True
        # What a turn that is under way has brought so far; its thread puts it here.
        self._beginning: _Opened | None = None
        self._so_far = _Moved()
        # About its place in the media store:
        self._copies = 0
        self._placements = 0
        self._attempts_left = _PLACE_ATTEMPTS
        self._is_to_stay = True
        self._is_preparing = False
        self._is_prepared = False
        self._place_error: Exception | None = None
        downloads.open_in_thread(self._open).addCallbacks(self._has_opened, self._has_failed)
        downloads.look_later(self)

    @property
    def info(self) -> ObjectInfo:
        """What the server says of the object, once that is known."""
        return _present(self._info)

    @property
    def _is_whole(self) -> bool:
        return self._info is not None and self._available == self._info.size

    # --- those who want it ---

    async def join(self) -> ChunkSource | None:
        """A source of the content; None where there is no such object. Raises `BackendError`."""
        self._users += 1
        try:
            while self._info is None and self._error is None:
                await self._changed.wait()
            if self._info is None:
                if isinstance(self._error, ObjectNotFound):
                    return None
                raise _present(self._error)
            if self._content is None and self._file is None:
                reader, self._reader = self._reader, None
                return self._downloads.straight_from_bucket(self._info, 0, reader, self._no_file)
            return DownloadSource(self._downloads, self)
        finally:
            self.leave()

    def enter(self) -> None:
        """Want it, until `leave`."""
        self._users += 1

    def leave(self) -> None:
        """Want it no longer; a download that nobody wants is given up."""
        self._users -= 1
        self._end_if_unused()

    async def read(self, offset: int) -> bytes | None:
        """What there is from an offset on, once there is something; `b""` at the end.

        None where the file does not hold it any more: the disk was full, or somebody cut it short.
        Raises `BackendError` when the rest cannot be had.
        """
        self._read_up_to = max(self._read_up_to, offset)
        while offset >= self._available and not self._is_whole and self._error is None:
            await self._changed.wait()
        if offset == self.info.size:
            return b""
        if isinstance(self._error, OSError):
            return None
        if offset >= self._available:
            raise _present(self._error)
        length = min(CHUNK_BYTES, self._available - offset)
        if self._content is not None:
            return self._content[offset : offset + length]
        begin = self._available
        for piece in reversed(self._pieces):
            begin -= len(piece)
            if begin <= offset:
                return piece[offset - begin :]
        descriptor = _present(self._file).file.fileno()
        chunk = self._downloads.read_cached(descriptor, length, offset)
        if chunk is None:
            chunk = await self._downloads.read_in_thread(lambda: os.pread(descriptor, length, offset))
        return chunk or None

    async def put_in_place(self) -> None:
        """Wait until the whole file is in the media store, where Synapse needs it now.

        Raises `BackendError` when it cannot be had, and `OSError` when the disk does not take it.
        """
        before = self._placements
        self._place_error = None
        self._attempts_left = _PLACE_ATTEMPTS
        self._copies += 1
        try:
            self.place_if_possible()
            while self._placements == before:
                if error := self._error or self._place_error:
                    raise error
                await self._changed.wait()
        finally:
            self._copies -= 1

    # --- from the bucket into the file ---

    def _open(self, seconds: float) -> _Opened:
        """Ask for the object, fetch its beginning, and go on with it for some seconds, where 0 is one step; in a thread."""
        backend = self._downloads.backend
        content = backend.open(self.path)
        info, reader = content.info, ResumingReader(backend, content.info, 0, content)
        if info.size <= CHUNK_BYTES:
            with contextlib.closing(reader):
                whole = reader.read(CHUNK_BYTES)
                return _Opened(info, _Moved(len(whole)), whole)
        file = self._make_room(info.size)
        if file is None:
            return _Opened(info, reader=reader)
        try:
            moved = self._transfer(reader, file, _Moved(), 0)
        except BaseException as error:
            reader.close()
            file.discard()
            if isinstance(error, OSError):
                return _Opened(info)
            raise
        beginning = self._beginning = _Opened(info, moved, reader=reader, file=file)
        return replace(beginning, moved=self._transfer(reader, file, moved, seconds)) if seconds else beginning

    def _make_room(self, size: int) -> TemporaryFile | None:
        """A file that there is room for on the disk, or None; in a thread."""
        store = self._downloads.store
        try:
            if self._downloads.free_space.promise(size):
                self._promised = size
                return store.temporary_file(self.path)
        except OSError as error:
            logger.debug("There is no room in %s: %s", store.root, error)
            self._no_file = error
        return None

    def _settle(self, size: int) -> None:
        self._promised -= size
        self._downloads.free_space.settle(size)

    def _has_opened(self, opened: _Opened) -> None:
        self._show_object(opened)
        if opened.content is None and opened.file is None:
            self._is_to_stay = False
            self._downloads.forget(self)
        self._has_moved(opened.moved)

    def _show_object(self, opened: _Opened) -> None:
        self._info = opened.info
        self._content, self._reader, self._file = opened.content, opened.reader, opened.file

    def _move(self) -> None:
        self._is_moving = True
        reader, file = _present(self._reader), _present(self._file)
        step = partial(self._transfer, reader, file, _Moved(self._available))
        is_waited_for = self._copies > 0 or self._available - self._read_up_to < _FAR_AHEAD_BYTES
        move = self._downloads.move_in_thread if is_waited_for else self._downloads.move_unhurriedly
        move(step).addCallbacks(self._has_moved, self._has_failed)
        self._downloads.look_later(self)

    def _transfer(self, reader: ResumingReader, file: TemporaryFile, before: _Moved, seconds: float) -> _Moved:
        """Move bytes into the file for so long, at least once; in a thread.

        An error is in the result, but for one before the first byte of the object, which is raised.
        """
        began = started = time.monotonic()
        end, pieces = before.end, deque(before.pieces, _PIECES)
        try:
            while chunk := reader.read(self._step_bytes):
                self._digest.update(chunk)
                file.write_at(chunk, end)
                self._settle(len(chunk))
                pieces.append(chunk)
                end += len(chunk)
                now = time.monotonic()
                self._step_bytes = _LARGEST_STEP if now - started < _SLOW_SECONDS else _SMALLEST_STEP
                if now - began >= seconds:
                    break
                self._so_far = _Moved(end, tuple(pieces))
                started = now
        except Exception as error:
            if not end:
                raise
            return _Moved(end, tuple(pieces), error)
        return _Moved(end, tuple(pieces))

    def look(self) -> None:
        """Show what has come, where the turn that brought it is not over."""
        # A reader that stalls would keep them in memory for ever; whoever comes later reads the file.
        self._pieces = ()
        if not self._is_moving:
            return
        self._downloads.look_later(self)
        if self._info is None and self._beginning is not None:
            self._show_object(self._beginning)
            self._show(self._beginning.moved)
        if self._info is not None:
            self._show(self._so_far)

    def _show(self, moved: _Moved) -> None:
        if moved.end > self._available:
            self._take(moved)
            self._changed.fire()

    def _take(self, moved: _Moved) -> None:
        self._available = moved.end
        keeps_up = self._read_up_to >= moved.end - sum(map(len, moved.pieces))
        self._pieces = moved.pieces if keeps_up else ()

    def _has_moved(self, moved: _Moved) -> None:
        self._take(moved)
        self._beginning, self._so_far = None, _Moved()
        if moved.error is not None:
            self._has_failed(Failure(moved.error))  # type: ignore[no-untyped-call]
            return
        self._is_moving = False
        if not self._is_whole and self._users and self._file is not None:
            self._move()
        self._changed.fire()
        self.place_if_possible()
        self._end_if_unused()

    def _has_failed(self, failure: Failure) -> None:
        error = failure.value
        self._error = error if isinstance(error, Exception) else RuntimeError(str(error))
        self._settle(self._promised)
        self._downloads.forget(self)
        if isinstance(error, OSError) and self._file is not None:
            logger.warning("The disk does not take a download, which goes on without it: %s", error)
            self._downloads.do_in_background(partial(self._free_room, self._file)).addBoth(self._has_stopped)
            self._changed.fire()
        else:
            self._changed.fire()
            self._has_stopped()

    def _free_room(self, file: TemporaryFile) -> None:
        """Let neither disk nor bucket wait for the readers, who need them no more; in a thread.

        The file stays open, since one of them may just be reading it.
        """
        _present(self._reader).close()
        os.ftruncate(file.file.fileno(), 0)

    def _has_stopped(self, _result: object = None) -> None:
        self._is_moving = False
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        """Free everything when nobody wants it, but for a whole file that is still to get its place."""
        if self._users or self._is_moving or self._is_preparing or (self._is_whole and self._is_to_stay):
            return
        self._downloads.forget(self)
        self._settle(self._promised)
        if self._reader is not None:
            self._reader.close()
        # Once: two threads at once would close what is somebody else's by then.
        file, self._file = self._file, None
        if file is None:
            return
        if self._placements:
            # No more than a name goes.
            file.discard()
        else:
            self._downloads.do_in_background(file.discard)

    # --- from the file into the media store ---

    def place_if_possible(self) -> None:
        """Give the whole file its place, unless the path is in use: then this is called again."""
        if not self._is_whole or self._is_preparing or not (self._copies or self._is_to_stay):
            return
        if self._is_prepared:
            if self._downloads.paths.is_free(self.path):
                self._place()
            return
        self._is_preparing = True
        if self._content is None:
            whole = Whole(self.path, _present(self._file), Digest(self.info.size, self._digest.hexdigest()))
        else:
            whole = Whole(self.path, self._file or self._content, LateDigest(self._content))
        prepare = self._downloads.keeping.prepare_at_once if self._copies else self._downloads.keeping.prepare
        prepare(whole).addCallbacks(self._has_prepared, self._has_not_prepared)

    def _has_prepared(self, file: TemporaryFile | None) -> None:
        self._is_preparing = False
        if file is None:
            self._is_to_stay = False
        else:
            self._file = file
            self._is_prepared = True
        self.place_if_possible()
        self._end_if_unused()

    def _has_not_prepared(self, failure: Failure) -> None:
        self._is_preparing = False
        error = failure.value
        self._cannot_place(error if isinstance(error, Exception) else RuntimeError(str(error)))

    def _place(self) -> None:
        """Give it its name, in one turn of the reactor: nobody can ask for the path meanwhile.

        That is no more than Synapse itself does there, who looks for files and opens them.
        """
        self._is_prepared = False
        try:
            self._link()
        except OSError as error:
            self._cannot_place(error)

    def _link(self) -> None:
        try:
            _present(self._file).link()
            if self._copies and not self._is_there():
                raise FileNotFoundError(errno.ENOENT, "its directory has been moved away", self.path)
        except FileNotFoundError as error:
            # Its directory has just been pruned, or moved.
            self._try_again(error)
        except FileExistsError as error:
            if self._copies and not self._is_there():
                (self._downloads.store.root / self.path).unlink(missing_ok=True)
                self._try_again(error)
            else:
                self._has_place()
        else:
            self._has_place()

    def _is_there(self) -> bool:
        state = self._downloads.store.state(self.path)
        return state is not None and state.size == self.info.size

    def _try_again(self, error: OSError) -> None:
        self._attempts_left -= 1
        if self._attempts_left:
            self.place_if_possible()
        else:
            self._cannot_place(error)

    def _has_place(self) -> None:
        self._placements += 1
        self._is_to_stay = False
        self._downloads.forget(self)
        self._changed.fire()
        self._end_if_unused()

    def _cannot_place(self, error: Exception) -> None:
        logger.debug("%s is not kept in the media store: %s", self.path, error)
        self._place_error = error
        self._is_to_stay = False
        self._changed.fire()
        self._end_if_unused()


class DownloadSource:
    """What one reader sees of a download, at its own pace."""

    def __init__(self, downloads: Downloads, download: SharedDownload) -> None:
        self._downloads = downloads
        self._download = download
        self._offset = 0
        self._rest: ChunkSource | None = None
        self._is_reading = False
        self._is_closed = False
        download.enter()

    async def read(self) -> bytes:
        self._is_reading = True
        try:
            chunk = await self._read()
        finally:
            self._is_reading = False
            if self._is_closed:
                self._free()
        self._offset += len(chunk)
        return chunk

    async def put_in_place(self) -> None:
        await self._download.put_in_place()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            # A thread that reads the file needs it to stay open.
            if not self._is_reading:
                self._free()

    async def _read(self) -> bytes:
        if self._rest is None:
            chunk = await self._download.read(self._offset)
            if chunk is not None:
                return chunk
            self._rest = self._downloads.straight_from_bucket(self._download.info, self._offset)
        return await self._rest.read()

    def _free(self) -> None:
        self._download.leave()
        if self._rest is not None:
            self._rest.close()


def _present(value: _Value | None) -> _Value:
    if value is None:
        raise RuntimeError("a download is not in the state that it should be in")
    return value

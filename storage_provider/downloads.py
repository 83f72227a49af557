"""The downloads of one bucket that are under way, one for each object, and the threads that they take turns in."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from synapse.module_api import ModuleApi
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from backends.base import Backend, ObjectInfo
from storage_provider.free_space import FreeSpace
from storage_provider.keeping import Keeping
from storage_provider.media_store import MediaStore
from storage_provider.paths_in_use import PathsInUse
from storage_provider.proofs import Fingerprint
from storage_provider.shared_download import SharedDownload
from storage_provider.sources import CHUNK_BYTES, BucketSource, ChunkSource, ResumingReader

# A thread goes on for so long before it returns to the reactor: a change of threads costs as much as moving 100 KiB.
_TURN_SECONDS = 0.01

# How often readers are shown what a turn that is still under way has brought.
_LOOK_SECONDS = 0.05

# Of those that nobody waits for, so few move at a time.
_UNHURRIED_AT_A_TIME = 2

# Linux only: https://man7.org/linux/man-pages/man2/preadv2.2.html
_NOT_WAITING: int | None = getattr(os, "RWF_NOWAIT", None)


@dataclass(frozen=True)
class Threads:
    """Who does what blocks; each kind of work keeps the others from waiting."""

    opening: ThreadPool
    moving: ThreadPool
    background: ThreadPool


class Downloads:
    """The downloads of one bucket that are under way; for the reactor's thread."""

    def __init__(
        self,
        module_api: ModuleApi,
        reactor: Any,
        backend: Backend,
        store: MediaStore,
        threads: Threads,
        *,
        choose_to_keep: Callable[[Mapping[str, Fingerprint]], Collection[str]],
        refute: Callable[[Mapping[str, Fingerprint]], Collection[str]],
    ) -> None:
        """`choose_to_keep` decides, in a thread, which of some whole files may stay in the media store.

        `refute` tells which of them must not, though Synapse asks for them there.
        """
        self.paths = PathsInUse(reactor, self._path_is_free)
        self.backend = backend
        self.store = store
        self.free_space = FreeSpace(store)
        self.keeping = Keeping(store, self.do_in_background, choose_to_keep, refute)
        self._module_api = module_api
        self._reactor = reactor
        self._threads = threads
        self._downloads: dict[str, SharedDownload] = {}
        self._to_look_at: set[SharedDownload] = set()
        self._to_look_at_next: set[SharedDownload] = set()
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._unhurried: deque[Callable[[], Deferred[Any]]] = deque()
        self._unhurried_moving = 0

    async def fetch(self, path: str) -> ChunkSource | None:
        """The content of an object; None where there is none.

        The path is in use until `paths.end` is called for it, but for None and errors. Raises
        `BackendError`.
        """
        self.paths.begin(path)
        source: ChunkSource | None = None
        try:
            source = await self._join(path)
        finally:
            if source is None:
                self.paths.end(path)
        return source

    async def _join(self, path: str) -> ChunkSource | None:
        placed = await self.paths.change(path)
        if placed is not None:
            # Synapse looked before it was there, and may be about to open that very file for writing.
            await self._module_api.defer_to_threadpool(self._threads.background, self.store.remove, path, placed)
        download = self._downloads.get(path)
        if download is None:
            download = self._downloads[path] = SharedDownload(self, path)
        return await download.join()

    def _path_is_free(self, path: str) -> None:
        if path in self._downloads:
            self._downloads[path].place_if_possible()

    # --- for a download ---

    def open_in_thread(self, function: Callable[[float], Any]) -> Deferred[Any]:
        """Call a function that opens an object with the seconds for which it may go on to read.

        While fewer than half of the moving threads are busy, one of them opens and reads on. Otherwise an opening
        thread does, for no more than one step (0): content that hangs must not keep others from being opened.
        """
        moving = self._threads.moving
        if len(moving.working) < moving.max // 2:
            return deferToThreadPool(self._reactor, moving, function, _TURN_SECONDS)
        return deferToThreadPool(self._reactor, self._threads.opening, function, 0)

    def move_in_thread(self, function: Callable[[float], Any]) -> Deferred[Any]:
        """Call a function with the seconds for which it may go on."""
        return deferToThreadPool(self._reactor, self._threads.moving, function, _TURN_SECONDS)

    def move_unhurriedly(self, function: Callable[[float], Any]) -> Deferred[Any]:
        """As `move_in_thread`, in its turn among those that nobody waits for."""
        moved: Deferred[Any] = Deferred()

        def move() -> Deferred[Any]:
            return self.move_in_thread(function).addBoth(self._unhurried_has_moved).chainDeferred(moved)

        self._unhurried.append(move)
        self._move_the_unhurried()
        return moved

    def _unhurried_has_moved(self, result: Any) -> Any:
        self._unhurried_moving -= 1
        self._move_the_unhurried()
        return result

    def _move_the_unhurried(self) -> None:
        while self._unhurried and self._unhurried_moving < _UNHURRIED_AT_A_TIME:
            self._unhurried_moving += 1
            self._unhurried.popleft()()

    def do_in_background(self, function: Callable[[], Any]) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._threads.background, function)

    def look_later(self, download: SharedDownload) -> None:
        """Have it look at what has come, in a while; one timer wakes the reactor for all of them."""
        if not self._to_look_at and not self._to_look_at_next:
            self._reactor.callLater(_LOOK_SECONDS, self._look)
        self._to_look_at_next.add(download)

    def _look(self) -> None:
        due, self._to_look_at, self._to_look_at_next = self._to_look_at, self._to_look_at_next, set()
        if self._to_look_at:
            self._reactor.callLater(_LOOK_SECONDS, self._look)
        for download in due:
            download.look()

    def read_cached(self, descriptor: int, length: int, offset: int) -> bytes | None:
        """What memory holds of a file; None where the disk would have to be waited for, or nobody can tell."""
        if _NOT_WAITING is None:
            return None
        try:
            count = os.preadv(descriptor, [self._buffer[:length]], offset, _NOT_WAITING)
        except OSError:
            return None
        return bytes(self._buffer[:count])

    async def read_in_thread(self, function: Callable[[], bytes]) -> bytes:
        return await self._module_api.defer_to_threadpool(self._threads.opening, function)

    def straight_from_bucket(
        self, info: ObjectInfo, offset: int, reader: ResumingReader | None = None, no_file: OSError | None = None
    ) -> ChunkSource:
        reader = reader or ResumingReader(self.backend, info, offset)
        return BucketSource(self._module_api, self._threads.moving, reader, no_file)

    def forget(self, download: SharedDownload) -> None:
        """Let nobody join it any more."""
        if self._downloads.get(download.path) is download:
            del self._downloads[download.path]

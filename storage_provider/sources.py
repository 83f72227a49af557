"""Where the chunks of a response come from."""

from __future__ import annotations

import errno
import logging
from typing import Protocol

from synapse.module_api import ModuleApi
from twisted.python.threadpool import ThreadPool

from backends.base import Backend, ObjectInfo, ObjectReader
from backends.errors import BackendUnavailable, ContentDamaged

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10

# Times that a connection may break with nothing read in between, before the object is given up.
_RESUMES = 2


class ChunkSource(Protocol):
    """Chunks of an object, in order; used from the reactor's thread only."""

    async def read(self) -> bytes:
        """The next chunk; `b""` at the end. Raises `BackendError` when the rest cannot be had."""

    async def put_in_place(self) -> None:
        """Put the whole object at its path in the media store, and return when it is there.

        Raises `BackendError` when it cannot be had, and `OSError` when the disk does not take it.
        """

    def close(self) -> None:
        """Free everything, also while a `read` is under way; may be called twice."""


class ResumingReader:
    """The content of an object from an offset on, taken up again where the connection broke.

    For one thread at a time. What was read never belongs to two objects: the ETag has to stay the same. A content
    that is found to be damaged is not taken up: the fault may lie in what was read before.
    """

    def __init__(self, backend: Backend, info: ObjectInfo, offset: int, reader: ObjectReader | None = None) -> None:
        """Without a `reader`, which starts at the offset, one is opened when it is needed."""
        self._backend = backend
        self._info = info
        self._offset = offset
        self._reader = reader
        self._is_closed = False

    def read(self, n: int) -> bytes:
        """Read `n` bytes, fewer only at the end. Raises `BackendError`."""
        if self._offset >= self._info.size:
            return b""
        for resumes_left in range(_RESUMES, -1, -1):
            try:
                chunk = self._opened().read(n)
            except BackendUnavailable as error:
                if not resumes_left or self._is_closed or isinstance(error, ContentDamaged):
                    raise
                logger.debug("Resuming %s at byte %d of %d: %s", self._info.key, self._offset, self._info.size, error)
                self._reader = None
            else:
                self._offset += len(chunk)
                return chunk
        return b""

    def give_up(self) -> None:
        """Let a `read` that is under way in another thread not begin anew."""
        self._is_closed = True

    def close(self) -> None:
        """Free the connection; not while a `read` is under way."""
        self._is_closed = True
        if self._reader is not None:
            self._reader.close()

    def _opened(self) -> ObjectReader:
        if self._reader is None:
            self._reader = self._backend.open(self._info.key, offset=self._offset, if_match=self._info.etag or None)
        return self._reader


class BucketSource:
    """Chunks straight from the bucket, each read by a thread that is free again before the next one is asked for."""

    def __init__(
        self, module_api: ModuleApi, threads: ThreadPool, reader: ResumingReader, no_file: OSError | None = None
    ) -> None:
        """`no_file` is why the content does not go into a file; None where the disk has no room for it."""
        self._module_api = module_api
        self._threads = threads
        self._reader = reader
        self._no_file = no_file
        self._is_reading = False
        self._is_closed = False

    async def read(self) -> bytes:
        self._is_reading = True
        try:
            return await self._module_api.defer_to_threadpool(self._threads, self._reader.read, CHUNK_BYTES)
        finally:
            self._is_reading = False
            if self._is_closed:
                self._reader.close()

    async def put_in_place(self) -> None:
        raise self._no_file or OSError(errno.ENOSPC, "there is no room for the file on the disk of the media store")

    def close(self) -> None:
        self._is_closed = True
        # A reader belongs to one thread at a time: if one is at it, `read` closes it afterwards.
        if self._is_reading:
            self._reader.give_up()
        else:
            self._reader.close()

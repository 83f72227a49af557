"""Where the chunks of a response come from."""

from __future__ import annotations

import logging
from typing import Protocol

from synapse.module_api import ModuleApi
from twisted.python.threadpool import ThreadPool

from backends.base import Backend, ObjectReader
from backends.errors import BackendUnavailable

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10

# Times that a connection may break with nothing read in between, before the object is given up.
_RESUMES = 2


class ChunkSource(Protocol):
    """Chunks of an object, in order; used from the reactor's thread only."""

    async def read(self) -> bytes:
        """The next chunk; `b""` at the end. Raises `BackendError` when the rest cannot be had."""

    def close(self) -> None:
        """Free everything, also while a `read` is under way; may be called twice."""


class BytesSource:
    """One chunk that is at hand."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self) -> bytes:
        content, self._content = self._content, b""
        return content

    def close(self) -> None:
        self._content = b""


class BucketSource:
    """Chunks straight from the bucket, each read by a thread that is free again before the next one is asked for.

    A broken connection is taken up again where it broke, as long as the object is still the same.
    """

    def __init__(self, module_api: ModuleApi, threads: ThreadPool, backend: Backend, reader: ObjectReader) -> None:
        self._module_api = module_api
        self._threads = threads
        self._backend = backend
        self._reader = reader
        self._offset = 0
        self._is_reading = False
        self._is_closed = False

    async def read(self) -> bytes:
        self._is_reading = True
        try:
            return await self._module_api.defer_to_threadpool(self._threads, self._read)
        finally:
            self._is_reading = False
            if self._is_closed:
                self._reader.close()

    def close(self) -> None:
        self._is_closed = True
        # A reader belongs to one thread at a time: if one is at it, `read` closes it afterwards.
        if not self._is_reading:
            self._reader.close()

    def _read(self) -> bytes:
        for resumes_left in range(_RESUMES, -1, -1):
            try:
                chunk = self._reader.read(CHUNK_BYTES)
            except BackendUnavailable as error:
                if not resumes_left or self._is_closed:
                    raise
                self._resume(error)
            else:
                self._offset += len(chunk)
                return chunk
        return b""

    def _resume(self, error: BackendUnavailable) -> None:
        info = self._reader.info
        logger.debug("Resuming %s at byte %d of %d: %s", info.key, self._offset, info.size, error)
        self._reader = self._backend.open(info.key, offset=self._offset, if_match=info.etag)

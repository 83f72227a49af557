"""A bucket in memory, for tests that need many of them, or faults at chosen moments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from backends.base import Backend, DeleteFailure, ObjectInfo, ObjectReader
from backends.errors import ObjectNotFound, PreconditionFailed


class MemoryBackend(Backend):
    """Keeps the contract over a dictionary; `before` is called with each operation and its key, and may raise."""

    def __init__(self, *, opaque_etags: bool = False) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], object] = lambda operation, key: None
        self._opaque_etags = opaque_etags

    def made(self, operation: str) -> list[str]:
        """The keys that an operation was called with."""
        return [key for name, key in self.calls if name == operation]

    def check(self) -> None:
        self._begin("check", "")

    def check_encryption(self) -> None:
        self._begin("check_encryption", "")

    def put(
        self,
        key: str,
        body: BinaryIO,
        size: int,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectInfo:
        self._begin("put", key)
        content = body.read(size)
        if len(content) != size:
            raise ValueError("the body ended early")
        self.objects[key] = content
        return self._info(key, content)

    def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ObjectReader:
        self._begin("open", key)
        content = self._content("open", key)
        info = self._info(key, content)
        if if_match is not None and info.etag != if_match:
            raise PreconditionFailed("another one", operation="open", key=key)
        return _Reader(info, content[offset:])

    def stat(self, key: str) -> ObjectInfo:
        self._begin("stat", key)
        return self._info(key, self._content("stat", key))

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        self._begin("list", prefix)
        for key in sorted(self.objects, key=lambda key: key.encode("utf-8", "surrogatepass")):
            if key.startswith(prefix) and key > start_after:
                yield self._info(key, self.objects[key])

    def delete(self, keys: Iterable[str]) -> Iterator[DeleteFailure]:
        for key in keys:
            self._begin("delete", key)
            self.objects.pop(key, None)
        yield from ()

    def close(self) -> None:
        pass

    def _begin(self, operation: str, key: str) -> None:
        self.calls.append((operation, key))
        self.before(operation, key)

    def _content(self, operation: str, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFound("there is no such object", operation=operation, key=key)
        return self.objects[key]

    def _info(self, key: str, content: bytes) -> ObjectInfo:
        etag = "opaque" if self._opaque_etags else hashlib.md5(content, usedforsecurity=False).hexdigest()
        return ObjectInfo(key, len(content), etag)


class _Reader(ObjectReader):
    def __init__(self, info: ObjectInfo, content: bytes) -> None:
        self.info = info
        self._content = content

    def read(self, n: int) -> bytes:
        data, self._content = self._content[:n], self._content[n:]
        return data

    def close(self) -> None:
        self._content = b""

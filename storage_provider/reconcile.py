"""Comparing what should be there with what is there, by walking ordered streams side by side."""

from __future__ import annotations

from collections.abc import Iterator

from backends.base import Backend, ObjectInfo
from backends.errors import AccessDenied, NotSupported

# What one page of a listing holds: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
_PAGE = 1000


class ListingRefused(Exception):
    """The server does not let us list; objects have to be asked for one by one."""


class ListingCursor:
    """Looks keys up in a listing of the bucket; keys that are asked for in byte order cost a page for a thousand.

    Where the next key lies beyond the page at hand, the listing starts again right before it: that
    costs no more than the following page, and skips what nobody asks for.
    """

    def __init__(self, backend: Backend, root: str) -> None:
        self._backend = backend
        self._root = root
        self._entries: Iterator[ObjectInfo] = iter(())
        self._looked_at = _PAGE
        self._current: ObjectInfo | None = None
        self._position = b""

    def find(self, key: str) -> ObjectInfo | None:
        """The object with that key, below the root, or None. Raises `ListingRefused`."""
        wanted = key.encode()
        may_skip = True
        if wanted < self._position:
            self._start_at(key)
            may_skip = False
        self._position = wanted
        while self._current is None or self._current.key.encode() < wanted:
            # Once: a page and more may lie between there and the key.
            if may_skip and self._looked_at >= _PAGE:
                self._start_at(key)
                may_skip = False
            if not self._advance():
                return None
        return self._current if self._current.key == key else None

    def rewind(self) -> None:
        """Forget what was read: the next answers are as the bucket is then."""
        self._looked_at = _PAGE
        self._current = None
        self._position = b""

    def _start_at(self, key: str) -> None:
        # The last key that is certainly before it and still close to it.
        before = key[:-1]
        self._entries = self._backend.list(self._root, start_after=before if before > self._root else "")
        self._looked_at = 0
        self._current = None

    def _advance(self) -> bool:
        """Go to the next object; False at the end of the listing."""
        try:
            self._current = next(self._entries, None)
        except (AccessDenied, NotSupported) as error:
            raise ListingRefused(str(error)) from error
        self._looked_at += 1
        return self._current is not None

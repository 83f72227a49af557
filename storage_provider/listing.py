"""Looking keys up in the listing of a bucket."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from backends.base import Backend, ObjectInfo
from backends.errors import AccessDenied, NotSupported, ObjectNotFound

# What one page of a listing holds: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
_PAGE = 1000

# Where a page answers fewer questions than this, asking for each object costs less: a server looks at
# a thousand objects for a page.
_WORTH_A_PAGE = 10


class ListingRefused(Exception):
    """The server does not let us list; objects have to be asked for one by one."""


def listing(backend: Backend, root: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
    """The objects below a root, in byte order of the key. Raises `ListingRefused`."""
    try:
        yield from backend.list(root, start_after=start_after)
    except (AccessDenied, NotSupported) as error:
        raise ListingRefused(str(error)) from error


@dataclass(frozen=True)
class _Page:
    """A part of the listing."""

    after: str
    """What all keys in it come after."""
    objects: list[ObjectInfo]
    is_last: bool

    def covers(self, key: str) -> bool:
        """Whether the key stands in it if it stands anywhere."""
        return self.after < key and (self.is_last or key <= self.objects[-1].key)


class ListingCursor:
    """Looks keys up in a listing of the bucket; keys that are asked for in byte order cost a page for a thousand.

    Where the next key lies beyond the page at hand, the listing starts again right before it: that
    costs no more than the following page, and skips what nobody asks for. With `read_ahead` the page
    after one that answers much is fetched before it is asked for. With `checks_gaps` some of the objects
    that a page lacks are asked for themselves: where one is there, the listing is none to go by.
    """

    def __init__(self, backend: Backend, root: str, *, read_ahead: bool = False, checks_gaps: bool = False) -> None:
        self._backend = backend
        self._root = root
        self._reads_ahead = read_ahead
        self._checks_gaps = checks_gaps
        self._gaps = 0
        self._page: _Page | None = None
        self._place = 0
        self._answers = 0
        self._ahead: Future[_Page] | None = None

    def prepare(self, key: str) -> None:
        """Begin to fetch the page where the key stands, which is going to be asked for."""
        if self._page is None and self._ahead is None:
            self._ahead = self._fetch_in_background(self._before(key))

    def find(self, key: str) -> ObjectInfo | None:
        """The object with that key, below the root, or None. Raises `ListingRefused`."""
        page = self._page
        if page is None or not page.covers(key):
            page = self._turn_to(key)
        objects = page.objects
        # Python orders strings by code point, which is the byte order of their UTF-8.
        if self._place and objects[self._place - 1].key >= key:
            self._place = 0
        while self._place < len(objects) and objects[self._place].key < key:
            self._place += 1
        self._answers += 1
        if self._reads_ahead and self._answers == _WORTH_A_PAGE and not page.is_last:
            self._ahead = self._fetch_in_background(objects[-1].key)
        found = objects[self._place] if self._place < len(objects) else None
        if found is not None and found.key == key:
            return found
        self._gaps += 1
        # More and more seldom, so that a page of nothing else costs ten requests.
        if self._checks_gaps and self._gaps.bit_count() == 1:
            self._check_gap(key)
        return None

    def find_all(self, keys: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        """Keys in byte order, each with its object, as long as listing is cheaper than asking for each.

        It ends early where the keys lie far apart. Raises `ListingRefused`.
        """
        for key in keys:
            page, answers = self._page, self._answers
            yield key, self.find(key)
            if page is not None and page is not self._page and answers < _WORTH_A_PAGE:
                return

    def _turn_to(self, key: str) -> _Page:
        ahead, self._ahead = self._ahead, None
        self._page = None
        if ahead is not None:
            page = ahead.result()
            if page.covers(key):
                return self._open(page)
        page = self._fetch(self._before(key))
        while not page.covers(key):
            # A page and more lies between there and the key.
            page = self._fetch(page.objects[-1].key)
        return self._open(page)

    def _check_gap(self, key: str) -> None:
        """Raise `ListingRefused` where an object is there that the listing lacks.

        MinIO lists nothing below a prefix that begins with a slash, and takes objects there
        (https://github.com/minio/minio/issues/17356). versitygw listed a directory after others that come later in
        byte order, until September 2025 (https://github.com/versity/versitygw/pull/1515): to begin there left it out.
        """
        try:
            self._backend.stat(key)
        except (ObjectNotFound, AccessDenied):
            # Who may not read objects may still send them.
            return
        raise ListingRefused(f"it lacks {key!r}, which is in the bucket")

    def _before(self, key: str) -> str:
        """What is certainly before the key, and close to it."""
        return max(key[:-1], self._root)

    def _open(self, page: _Page) -> _Page:
        self._page = page
        self._place = self._answers = self._gaps = 0
        return page

    def _fetch(self, after: str) -> _Page:
        entries = listing(self._backend, self._root, start_after=after if after > self._root else "")
        # No further than the page goes: the next one would be asked for.
        objects = list(itertools.islice(entries, _PAGE))
        return _Page(after, objects, len(objects) < _PAGE)

    def _fetch_in_background(self, after: str) -> Future[_Page]:
        fetched: Future[_Page] = Future()

        def fetch() -> None:
            try:
                fetched.set_result(self._fetch(after))
            except BaseException as error:
                fetched.set_exception(error)

        # Nobody waits for it at the end: what it would have found is not needed then.
        threading.Thread(target=fetch, name="listing", daemon=True).start()
        return fetched

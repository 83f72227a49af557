"""Following a listing from page to page, and refusing one that cannot be relied on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from backends.base import ObjectInfo
from backends.errors import BackendUnavailable, NotSupported
from backends.xml import ListedObject, ListingPage

Query = Mapping[str, str]
"""The parameters of a request for a page, as S3 names them."""

# A page without an object may come where there are many deleted ones, as a server looks only so far at a time.
_MOST_EMPTY_PAGES = 1000


def first_query(key_prefix: str, prefix: str = "", start_after: str = "") -> dict[str, str]:
    """What asks for the first page; `prefix` and `start_after` are relative to `key_prefix`."""
    # Keys may hold characters that XML cannot carry: url encoding makes them safe.
    query = {"list-type": "2", "encoding-type": "url", "prefix": key_prefix + prefix}
    if start_after:
        query["start-after"] = key_prefix + start_after
    return query


def list_objects(
    page_of: Callable[[Query], ListingPage], key_prefix: str, prefix: str, start_after: str
) -> Iterator[ObjectInfo]:
    """The objects of all pages, as `Backend.list` promises them; `page_of` makes one request."""
    query = first_query(key_prefix, prefix, start_after)
    last = (key_prefix + start_after).encode() if start_after else b""
    empty_pages = 0
    while True:
        page = page_of(query)
        empty_pages = 0 if page.entries else empty_pages + 1
        if empty_pages > _MOST_EMPTY_PAGES:
            raise BackendUnavailable("the listing goes on without an object", operation="list", key=prefix)
        for entry in page.entries:
            _check_order(key_prefix, prefix, last, entry)
            last = entry.key.encode()
            key = entry.key[len(key_prefix) :]
            if key:
                yield ObjectInfo(key, entry.size, entry.etag, entry.last_modified, entry.storage_class)
        if "marker" in query and not page.entries:
            raise NotSupported("the server's listing ends before it is complete", operation="list", key=prefix)
        if not page.is_truncated:
            return
        query = _next_query(prefix, query, page)


def _next_query(prefix: str, query: Query, page: ListingPage) -> dict[str, str]:
    asked = {name: query[name] for name in ("list-type", "encoding-type", "prefix") if name in query}
    if page.next_token and page.next_token != query.get("continuation-token"):
        return asked | {"continuation-token": page.next_token}
    if page.next_token or not page.entries:
        raise BackendUnavailable("the listing says that it goes on, but not where", operation="list", key=prefix)
    # A server that knows version 1 only has ignored "list-type".
    asked.pop("list-type", None)
    return asked | {"marker": page.entries[-1].key}


def _check_order(key_prefix: str, prefix: str, last: bytes, entry: ListedObject) -> None:
    reason = None
    if not entry.key.startswith(key_prefix + prefix):
        reason = f"the server listed {entry.key!r}, which does not start with the prefix asked for"
    elif entry.key.encode() <= last:
        reason = f"the server lists out of byte order: {entry.key!r} came after {last.decode()!r}"
    if reason is not None:
        raise NotSupported(reason, operation="list", key=prefix)

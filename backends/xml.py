"""The two replies that are read here rather than by the SDKs: listings and errors.

The SDKs' own parsers cost ten times the CPU on a listing, and turn errors into exceptions of which
each forgets something else. Replies come from the network: a document type, and with it every
entity, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from urllib.parse import unquote_plus
from xml.parsers import expat


class UnreadableReply(ValueError):
    """A reply that is not the XML that S3 sends."""


@dataclass(frozen=True)
class ListedObject:
    """One object of a listing; the key is the whole one, with the prefix."""

    key: str
    size: int
    etag: str
    last_modified: datetime | None
    storage_class: str


@dataclass
class ListingPage:
    """One page of a listing, in the server's order."""

    entries: list[ListedObject] = field(default_factory=list)
    is_truncated: bool = False
    next_token: str | None = None


@dataclass(frozen=True)
class ErrorReply:
    """An error in the server's words."""

    code: str
    message: str


def _read(body: bytes, record: str, on_record: Callable[[dict[str, str]], None]) -> dict[str, str]:
    """Call `on_record` with the leaves of each `record` element directly below the root; return the root's own.

    The root's name is returned as the value of `""`. Namespaces are ignored.
    """
    root: dict[str, str] = {}
    path: list[str] = []
    current: dict[str, str] = root
    text: list[str] = []

    def start(name: str, _attributes: dict[str, str]) -> None:
        nonlocal current
        name = name.rpartition(":")[2]
        if not path:
            root[""] = name
        elif len(path) == 1 and name == record:
            current = {}
        path.append(name)
        text.clear()

    def end(_name: str) -> None:
        nonlocal current
        name = path.pop()
        if len(path) == 1 and name == record:
            on_record(current)
            current = root
        elif len(path) == (2 if current is not root else 1):
            current[name] = "".join(text)
        text.clear()

    def refuse(*_declaration: object) -> None:
        raise UnreadableReply("the reply declares a document type")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(body, True)
    except expat.ExpatError as error:
        raise UnreadableReply(f"the reply is not XML: {error}") from None
    return root


def parse_error(body: bytes) -> ErrorReply | None:
    """The error that a reply holds, or None where it is something else."""
    if b"<Error" not in body[:1024]:
        return None
    try:
        root = _read(body, "", lambda _: None)
    except UnreadableReply:
        return None
    if root[""] != "Error" or not root.get("Code"):
        return None
    return ErrorReply(root["Code"], root.get("Message", ""))


def parse_listing(body: bytes) -> ListingPage:
    """A page of a listing of either version. Raises `UnreadableReply`."""
    page = ListingPage()
    rows: list[dict[str, str]] = []
    root = _read(body, "Contents", rows.append)
    if root[""] != "ListBucketResult":
        raise UnreadableReply(f"the reply is a {root['']}, not a ListBucketResult")
    decode = unquote_plus if root.get("EncodingType") == "url" else str
    try:
        for row in rows:
            page.entries.append(
                ListedObject(
                    decode(row["Key"]),
                    int(row["Size"]),
                    _etag(row.get("ETag", "")),
                    parse_time(row.get("LastModified")),
                    row.get("StorageClass") or "STANDARD",
                )
            )
    except (KeyError, ValueError) as error:
        raise UnreadableReply(f"an object in the listing has no usable {error}") from None
    page.is_truncated = root.get("IsTruncated") == "true"
    page.next_token = root.get("NextContinuationToken") or None
    return page


def _etag(text: str) -> str:
    """An ETag without its quotes; empty for one that could not be sent back in a header."""
    etag = text.strip('"')
    return etag if etag.isascii() and etag.isprintable() else ""


def parse_time(text: str | None) -> datetime | None:
    """The moment of an ISO 8601 time as S3 writes it (`2026-11-01T12:00:00.000Z`), in UTC; None without one."""
    if not text:
        return None
    # Taken apart by hand: strptime costs as much as the rest of the page, and 3.10's fromisoformat knows no Z.
    date, clock = text[:10].split("-"), text[11:19].split(":")
    return datetime(*map(int, (*date, *clock)), tzinfo=timezone.utc)  # type: ignore[arg-type,misc]

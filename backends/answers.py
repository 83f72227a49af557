"""What the headers of an answer say of an object."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from backends.base import ObjectInfo
from backends.errors import PreconditionFailed
from backends.xml import UnreadableReply

Headers = Mapping[str, str]
"""The headers of an answer, names in lower case."""

UPLOAD_MARK = "s3-storage-provider-upload"
"""Metadata that marks an upload in parts, so that one whose completion went unanswered can be recognised."""

_METADATA_HEADER = "x-amz-meta-"


def lowered(headers: Mapping[str, str]) -> Headers:
    """The headers of an answer as a backend gives them."""
    return {name.lower(): value for name, value in headers.items()}


def object_info(key: str, headers: Headers) -> ObjectInfo:
    """The object that an answer to GET or HEAD is about. Raises `UnreadableReply` when it tells of none."""
    if not headers.get("etag") and headers.get("content-type", "").startswith("text/html"):
        raise UnreadableReply("the answer is a page of HTML and no object")
    modified = headers.get("last-modified")
    total = headers.get("content-range", "").rpartition("/")[2] or headers.get("content-length", "")
    if not total.isdigit():
        raise UnreadableReply("the answer does not tell the object's size")
    metadata = {
        name[len(_METADATA_HEADER) :]: value
        for name, value in headers.items()
        if name.startswith(_METADATA_HEADER) and name != _METADATA_HEADER + UPLOAD_MARK
    }
    return ObjectInfo(
        key,
        int(total),
        bare_etag(headers.get("etag", "")),
        parsedate_to_datetime(modified) if modified else None,
        headers.get("x-amz-storage-class") or "STANDARD",
        metadata,
        headers.get("x-amz-archive-status", ""),
    )


def upload_mark(headers: Headers) -> str | None:
    """What the upload in parts that made the object was marked with."""
    return headers.get(_METADATA_HEADER + UPLOAD_MARK)


def bare_etag(text: str) -> str:
    """An ETag without its quotes, and without the mark of a weak one, which proxies that compress put on any answer."""
    return text.removeprefix("W/").strip('"')


def check_match(info: ObjectInfo, if_match: str | None) -> None:
    """Make sure that it is the object that was asked for: a server may ignore the condition."""
    if if_match is not None and info.etag not in ("", if_match):
        raise PreconditionFailed("the object has been replaced by another one", operation="open", key=info.key)


def check_range(headers: Headers, offset: int) -> None:
    """Make sure that the content starts where it was asked to: a server may ignore the range."""
    if offset and not headers.get("content-range", "").startswith(f"bytes {offset}-"):
        raise UnreadableReply(f"the content was asked for from byte {offset} on, but came otherwise")

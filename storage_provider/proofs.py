"""Proving that a file and an object are the same, by ETag or by reading both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Protocol

from backends.base import Backend, ObjectInfo
from backends.errors import ObjectArchived
from backends.multipart import part_size_for
from backends.settings import UNREADABLE_CLASSES
from storage_provider.bandwidth import Bandwidth
from storage_provider.failures import FileGone
from storage_provider.media_store import MediaStore

_CHUNK = 1 << 20

# Classes of AWS and Google whose objects can be read at once; what others call a class tells nothing.
_READABLE_CLASSES = frozenset(
    {
        "STANDARD",
        "STANDARD_IA",
        "ONEZONE_IA",
        "REDUCED_REDUNDANCY",
        "INTELLIGENT_TIERING",
        "GLACIER_IR",
        "EXPRESS_ONEZONE",
        "REGIONAL",
        "MULTI_REGIONAL",
        "NEARLINE",
        "COLDLINE",
    }
)

# Sizes of the parts with which this software, but for very large files, its ancestors and other tools upload.
_PART_SIZES = (8 << 20, 5 << 20)


class Verify(str, Enum):
    """How an object must be proved to be the file before the file is deleted."""

    PROOF = "proof"
    """By ETag or by our own checksummed upload, else by reading back."""
    FULL = "full"
    """By reading back, always."""
    SIZE = "size"
    """By its size alone."""


class Fingerprint(Protocol):
    """The bytes of a file or an object, as far as they are compared with what the database says."""

    @property
    def length(self) -> int:
        """How many they are."""

    @property
    def sha256(self) -> str:
        """In hex; it may take as long to tell as to read them."""


class LateDigest:
    """The `Fingerprint` of some bytes, which are hashed only when that is asked for."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def length(self) -> int:
        return len(self._content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()


@dataclass(frozen=True)
class Digest:
    """The `Fingerprint` of what has been read."""

    length: int
    sha256: str


def may_be_archived(info: ObjectInfo) -> bool:
    """Whether the file may be all that Synapse could serve at once, whatever proves that the object is the same."""
    return bool(info.archive_status) or info.storage_class.upper() not in _READABLE_CLASSES


def archive_of(backend: Backend, path: str, info: ObjectInfo) -> str | None:
    """Where an object lies that cannot be read before it has been restored; None where it can.

    Where its class does not tell, a byte of it is read. Raises `BackendError`.
    """
    if not may_be_archived(info):
        return None
    if info.archive_status or info.storage_class.upper() in UNREADABLE_CLASSES:
        return info.archive_status or info.storage_class
    try:
        with backend.open(path, offset=max(info.size - 1, 0), if_match=info.etag or None) as reader:
            reader.read(1)
    except ObjectArchived:
        return info.storage_class
    return None


def etag_proves(store: MediaStore, path: str, info: ObjectInfo) -> bool:
    """Whether the ETag is that of the file's content, in one piece or in parts of a usual size.

    False proves nothing: with encryption, and on some servers, ETags are no checksums.
    """
    etag, _, parts = info.etag.partition("-")
    if len(etag) != 32 or not set(etag) <= set("0123456789abcdef"):
        return False
    if not parts:
        return _etag_in_parts(store, path, None) == info.etag
    sizes = {*_PART_SIZES, part_size_for(info.size, _PART_SIZES[0])}
    fitting = [size for size in sizes if parts.isdigit() and -(-info.size // size) == int(parts)]
    return any(_etag_in_parts(store, path, size) == info.etag for size in fitting)


def digest_of_file(store: MediaStore, path: str) -> Digest:
    """The length and SHA-256 of a file."""
    with opened(store, path) as body:
        return _digest(iter(lambda: body.read(_CHUNK), b""))


def digest_of_object(backend: Backend, path: str, etag: str, bandwidth: Bandwidth) -> Digest:
    """The length and SHA-256 of what the bucket gives back for a key, if it still is the object with that ETag."""
    with backend.open(path, if_match=etag or None) as reader:

        def chunks() -> Iterator[bytes]:
            while chunk := reader.read(bandwidth.step):
                bandwidth.spend(len(chunk))
                yield chunk

        return _digest(chunks())


def _digest(chunks: Iterator[bytes]) -> Digest:
    length, sha256 = 0, hashlib.sha256()
    for chunk in chunks:
        length += len(chunk)
        sha256.update(chunk)
    return Digest(length, sha256.hexdigest())


def _etag_in_parts(store: MediaStore, path: str, part_size: int | None) -> str:
    """The ETag that a file gets in one piece (None), or in parts of that many bytes."""
    digests: list[bytes] = []
    with opened(store, path) as body:
        while not digests or part_size is not None:
            digest, length = hashlib.md5(usedforsecurity=False), 0
            while part_size is None or length < part_size:
                chunk = body.read(_CHUNK if part_size is None else min(_CHUNK, part_size - length))
                if not chunk:
                    break
                length += len(chunk)
                digest.update(chunk)
            if length == 0 and digests:
                break
            digests.append(digest.digest())
    if part_size is None:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def opened(store: MediaStore, path: str) -> closing[BinaryIO]:
    """A file, open for reading, that closes itself. Raises `FileGone`."""
    try:
        return closing(store.open(path))
    except FileNotFoundError as error:
        raise FileGone("it is gone") from error

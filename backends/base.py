"""The contract over one bucket, which every backend keeps and `tests/backends/contract.py` proves.

All methods block and may be called from many threads at once; callers bring their own threads.
Constructing a backend does no I/O: wrong credentials, and files that cannot be used, show at the first call.

Keys are relative to the configured prefix. A key that is empty, starts with `/`, has an empty,
`.` or `..` segment, or cannot be written in UTF-8 is a `ValueError` before any I/O.

Only subclasses of `BackendError` come out of a method, with the SDK's exception as `__cause__`.
Temporary faults are tried again within the call, `max_attempts` in all, but not after a read
time-out. Whatever the server does, an answer or an error comes within `connect_timeout +
read_timeout` (35 s) after the last byte that moved; looking up the host's name, and waiting for
memory behind other uploads, come on top. No message, nor anything in the chain of
causes, holds a credential or an encryption key.

SSE-C and the storage class come from the settings and go on every request that can carry them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import BinaryIO

from backends.errors import BackendError


@dataclass(frozen=True)
class ObjectInfo:
    """What the server says about an object."""

    key: str
    size: int
    """Bytes of the whole object, also where only a part of it was asked for."""
    etag: str
    """Without quotes. The MD5 of the content for a plain single PUT on most servers, opaque otherwise."""
    last_modified: datetime | None = None
    """In UTC; None after `put`, whose answer does not tell it."""
    storage_class: str = "STANDARD"
    """STANDARD where the server names none. MinIO lists every object as STANDARD, whatever it is."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The user's metadata, names in lower case; empty in listings, which do not carry it."""
    archive_status: str = ""
    """Where an object of the class INTELLIGENT_TIERING has sunk so deep that it cannot be read; empty in listings."""


@dataclass(frozen=True)
class DeleteFailure:
    """A key that the server would not delete, and why."""

    key: str
    error: BackendError


class ObjectReader(ABC):
    """The content of an object, from the offset to the end.

    A reader belongs to one thread at a time and holds a connection until it is closed or read to
    its end. It is a context manager that closes itself.
    """

    info: ObjectInfo

    @abstractmethod
    def read(self, n: int) -> bytes:
        """Read exactly `n` bytes, fewer only at the end of the object; `b""` after it.

        A content that ends before the announced length, and `n` bytes that take longer than
        `read_timeout`, are a `BackendUnavailable`: never a short object that looks whole. Where
        checksums are compared (`response_checksum_validation`), a wrong one is a `ContentDamaged`,
        and the last bytes are not given out.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the connection; may be called twice. Closing before the end does not read the rest."""

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """One bucket, or the part of it below a prefix."""

    @abstractmethod
    def check(self) -> None:
        """Prove endpoint, credentials and bucket with one cheap request (a listing of one key).

        Raises `BucketNotFound`, `AccessDenied`, `Misconfigured` or `BackendUnavailable`.
        """

    @abstractmethod
    def check_encryption(self) -> None:
        """Prove that the server encrypts with the configured key (SSE-C); nothing to do without one.

        A random object is stored, must be acknowledged as encrypted, must not be readable without
        the key, and is deleted again. Once it has succeeded it is not repeated. Raises
        `EncryptionNotApplied` when the server stores plain text.
        """

    @abstractmethod
    def put(
        self,
        key: str,
        body: BinaryIO,
        size: int,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectInfo:
        """Store the next `size` bytes of `body` under `key`, replacing what was there.

        One request up to `multipart_threshold` bytes, parts beyond, each with a checksum that the
        server verifies: a Content-MD5 over TLS, the signed SHA-256 without. Names and values of
        `metadata` are ASCII. When it raises, the key holds the old object or the new one, whole,
        never a part: a failed multipart upload is aborted, and a HEAD settles what a lost reply to
        its completion, or an answer without an ETag, leaves open. A `body` that ends early is a
        `ValueError`, and its own `OSError`s come out as they are; nothing is stored then.

        With SSE-C, `check_encryption` runs before the first object is sent, and an answer that does
        not acknowledge the encryption is an `EncryptionNotApplied`.
        """

    @abstractmethod
    def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ObjectReader:
        """Open an object for reading, from byte `offset` on; its `info` is known when this returns.

        With `if_match` (an ETag) another object than that one is a `PreconditionFailed`. An offset
        at or behind the end is a `RequestRejected`, but for 0 in an empty object. Raises
        `ObjectNotFound` only where the server said so: a 403 or a time-out is never "missing".
        With SSE-C configured, an object that was stored without it is read without it, and that is
        logged once.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Ask for the properties of an object.

        Raises `ObjectNotFound`; as the answer to a HEAD has no body, a missing bucket looks the
        same here. `check` tells them apart. Objects stored without SSE-C are handled as in `open`.
        """

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List the objects whose key starts with `prefix` (any string), in byte order of the UTF-8 key.

        Only keys after `start_after` come. One page is asked for at a time and held in memory.
        A server that lists out of order is a `NotSupported`, not a wrong answer. Keys come as the
        server tells them, also those that the other methods would refuse; an object named exactly
        like the configured prefix is left out. Nothing is asked for before the first `next()`.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> Iterator[DeleteFailure]:
        """Delete objects, and yield those that the server would not delete.

        The work is done as the iterator is consumed, up to 1,000 keys a request: `list(b.delete(keys))`.
        A key that is not there counts as deleted. Where the server refuses batches, the keys are
        deleted one by one. A failure that concerns all of them (no connection) is raised.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all connections; may be called twice.

        Calls under way and later ones fail with `BackendUnavailable`.
        """

"""Moving one file between the media store and the bucket, and proving that both are the same."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar, cast

from backends.base import Backend, ObjectInfo
from backends.errors import EXPIRED_CREDENTIALS, AccessDenied, BackendError, BucketNotFound
from backends.settings import UNREADABLE_CLASSES
from storage_provider.directories import FileState
from storage_provider.media_paths import parse_path
from storage_provider.media_store import MediaStore

if TYPE_CHECKING:
    from storage_provider.synapse_db import MediaFacts

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CHUNK = 1 << 20

# So long a reader waits at most for its turn where the bandwidth is bounded, however many there are.
_LONGEST_WAIT_SECONDS = 10
_MOST_WORKERS = 256
_SMALLEST_STEP = 4 << 10

# Sizes of the parts with which this software, its ancestors and other tools upload.
_PART_SIZES = (8 << 20, 5 << 20)

# Failures one after another, with no success between them, after which the bucket is given up.
_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class Failed:
    """Something could not be done with a file; nothing was lost."""

    path: str
    reason: str


class FileChanged(Exception):
    """The file was changed while it was in use."""


class FileGone(FileChanged):
    """There is no such file any more."""


class Damaged(Exception):
    """A content is not what the database says it should be."""


class NoLongerWanted(Exception):
    """The database does not know the media any more, or has quarantined it."""


class BucketFails(Exception):
    """So much went wrong in a row that going on would fail for every file."""


class Failures:
    """Tells a bucket that fails from files that do."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._unreadable_in_a_row = 0
        self._last: BackendError | None = None

    def forget(self) -> None:
        """Something has succeeded."""
        self._in_a_row = self._unreadable_in_a_row = 0

    def count(self, error: BackendError, backend: Backend) -> None:
        """Take a failure in. Raises `BucketFails` when it was one too many.

        Objects that may not be read can be many in a row (another encryption key, an owner of their own): where they
        are all that failed, and the bucket itself can be reached, there are never too many.
        """
        if error.retryable or isinstance(error, (AccessDenied, BucketNotFound)):
            self._in_a_row += 1
            self._unreadable_in_a_row += _is_unreadable_object(error)
            self._last = error
            if self._in_a_row >= _FAILURES_IN_A_ROW:
                if self._unreadable_in_a_row != self._in_a_row or not _is_reachable(backend):
                    raise BucketFails(f"the bucket fails again and again, last with: {error}") from error
                self.forget()

    def check(self, backend: Backend) -> None:
        """At the end of a run in which the bucket failed, see whether it still does. Raises `BucketFails`."""
        if self._last is None:
            return
        try:
            backend.check()
        except AccessDenied as error:
            # Who may not list is told so every time.
            if error.code in EXPIRED_CREDENTIALS:
                raise BucketFails(f"the bucket cannot be reached any more: {error}") from error
        except BackendError as error:
            raise BucketFails(f"the bucket cannot be reached any more: {error}") from error


def _is_unreadable_object(error: BackendError) -> bool:
    is_refusal = isinstance(error, AccessDenied) and error.code not in EXPIRED_CREDENTIALS
    return is_refusal and error.operation in ("open", "stat")


def _is_reachable(backend: Backend) -> bool:
    try:
        backend.check()
    except BackendError:
        return False
    return True


class Verify(str, Enum):
    """How an object must be proved to be the file before the file is deleted."""

    PROOF = "proof"
    """By ETag or by our own checksummed upload, else by reading back."""
    FULL = "full"
    """By reading back, always."""
    SIZE = "size"
    """By its size alone."""


class Stopped(Exception):
    """The run was asked to end."""


class Bandwidth:
    """Holds threads back so that together they move no more than a number of bytes a second."""

    def __init__(self, bytes_per_second: int | None, stop: threading.Event) -> None:
        self.step = _CHUNK if bytes_per_second is None else _step(bytes_per_second)
        """The bytes of an object to read at a time: a server takes a connection for dead that nobody reads from."""
        self._rate = bytes_per_second
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def spend(self, size: int, *, is_begun: bool = False) -> None:
        """Wait until `size` bytes may be moved.

        Raises `Stopped` when the run ends meanwhile, but not within a file that `is_begun`: it is finished.
        """
        if self._rate is None:
            return
        # In small steps, so that those who read objects take their turns between those of a large upload.
        for start in range(0, size, self.step):
            self._wait(min(self.step, size - start) / self._rate, is_begun)

    def _wait(self, seconds: float, is_begun: bool) -> None:
        """Wait for a turn of so many seconds to begin."""
        with self._lock:
            now = time.monotonic()
            starts = max(self._free_at, now)
            self._free_at = starts + seconds
        if is_begun:
            time.sleep(starts - now)
        elif self._stop.wait(starts - now):
            raise Stopped


def _step(bytes_per_second: int) -> int:
    return max(min(bytes_per_second * _LONGEST_WAIT_SECONDS // _MOST_WORKERS, _CHUNK), _SMALLEST_STEP)


class _CheckedBody:
    """A file that is read no faster than the bandwidth allows, and not to its end where it is not the expected one.

    A backend that cannot read all of a body stores nothing.
    """

    def __init__(self, body: BinaryIO, size: int, sha256: str | None, bandwidth: Bandwidth) -> None:
        self._body = body
        self._left = size
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._bandwidth = bandwidth
        self._is_begun = False

    def read(self, size: int = -1) -> bytes:
        data = self._body.read(size)
        self._bandwidth.spend(len(data), is_begun=self._is_begun)
        self._is_begun = True
        if self._sha256 is not None:
            self._digest.update(data)
            self._left -= len(data)
            if self._left == 0 and self._digest.hexdigest() != self._sha256:
                raise Damaged("the file is damaged: it has not the SHA-256 that the database knows")
        return data


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


def upload(
    backend: Backend,
    store: MediaStore,
    path: str,
    state: FileState,
    bandwidth: Bandwidth,
    *,
    sha256: str | None = None,
) -> ObjectInfo:
    """Send a file; returns what the server says of the object.

    Raises `FileChanged` when the file is not in `state` before and after: the object may then hold a
    mixture. Raises `FileGone` where there is none. With `sha256` a file that has another one is `Damaged`,
    and nothing is stored.
    """
    with _opened(store, path) as body:
        if FileState.of(body) != state:
            raise FileChanged("it changed before it was sent")
        checked = _CheckedBody(body, state.size, sha256, bandwidth)
        try:
            info = backend.put(path, cast(BinaryIO, checked), state.size)
        except ValueError as error:
            raise FileChanged(str(error)) from error
        if FileState.of(body) != state:
            raise FileChanged("it changed while it was sent")
    return info


def download(
    backend: Backend,
    store: MediaStore,
    path: str,
    bandwidth: Bandwidth,
    *,
    length: int | None,
    sha256: str | None,
    used_ms: int,
    is_wanted: Callable[[], bool],
) -> int:
    """Fetch an object into the store; returns its size in bytes.

    The file appears whole and under its name at once, with `used_ms` as its time, and never replaces
    another one (`FileExistsError`). Raises `Damaged` when the content has not the length or SHA-256
    given, and `NoLongerWanted` when it is not, right before it would appear.
    """
    with store.create(path) as new:
        size = fetch(backend, path, new.file, bandwidth, length=length, sha256=sha256)
        # It may take seconds, in which the database may change its mind.
        new.sync(used_ms / 1000)
        if not is_wanted():
            raise NoLongerWanted
    return size


def fetch(
    backend: Backend, path: str, target: BinaryIO, bandwidth: Bandwidth, *, length: int | None, sha256: str | None
) -> int:
    """Write the content of an object into `target`; returns its size.

    Raises `Damaged` when it has not the length or SHA-256 given.
    """
    digest = None if sha256 is None else hashlib.sha256()
    with backend.open(path) as reader:
        size = reader.info.size
        if length is not None and size != length:
            raise Damaged(f"the object has {size} bytes, the database says {length}")
        is_begun = False
        while chunk := reader.read(bandwidth.step):
            bandwidth.spend(len(chunk), is_begun=is_begun)
            is_begun = True
            if digest is not None:
                digest.update(chunk)
            target.write(chunk)
    if digest is not None and digest.hexdigest() != sha256:
        raise Damaged("the object has not the SHA-256 that the database knows")
    return size


def known_length(facts: MediaFacts, path: str) -> int | None:
    """The bytes that a file should have; None where the database does not tell."""
    thumbnail = _thumbnail(path)
    return facts.length if thumbnail is None else facts.thumbnail_lengths.get(thumbnail)


def known_sha256(facts: MediaFacts, path: str) -> str | None:
    """The SHA-256 that a file should have, in hex; None where the database does not tell, as for all thumbnails."""
    return facts.sha256 if _thumbnail(path) is None else None


def fits(facts: MediaFacts | None, path: str, content: Fingerprint) -> bool:
    """Whether a content is what the database says of the file; its SHA-256 is asked for only where that decides."""
    if facts is None or known_length(facts, path) != content.length:
        return False
    sha256 = known_sha256(facts, path)
    return sha256 is None or sha256 == content.sha256


def _thumbnail(path: str) -> str | None:
    parsed = parse_path(path)
    return None if parsed is None else parsed.thumbnail


def reason(error: Exception) -> str:
    """What went wrong, for the operator who is told the path beside it."""
    if isinstance(error, BackendError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def run_at_once(
    threads: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], *, at_most: int
) -> Generator[tuple[_Item, Future[_Result]], None, None]:
    """Do the work in the threads; yields items as they are done, and takes no more than that many at a time.

    When it ends, or is closed, nothing of the work is under way any more.
    """
    done: SimpleQueue[Future[_Result]] = SimpleQueue()
    running: dict[Future[_Result], _Item] = {}
    try:
        for item in items:
            future = threads.submit(work, item)
            running[future] = item
            future.add_done_callback(done.put)
            if len(running) >= at_most:
                ended = done.get()
                yield running.pop(ended), ended
        while running:
            ended = done.get()
            yield running.pop(ended), ended
    finally:
        for future in running:
            future.cancel()
        # What is begun is over when this is.
        wait(running)


def is_archived(info: ObjectInfo) -> bool:
    """Whether the file is all that Synapse could serve at once, whatever proves that the object is the same."""
    return info.storage_class in UNREADABLE_CLASSES


def etag_proves(store: MediaStore, path: str, info: ObjectInfo) -> bool:
    """Whether the ETag is that of the file's content, in one piece or in parts of a usual size.

    False proves nothing: with encryption, and on some servers, ETags are no checksums.
    """
    etag, _, parts = info.etag.partition("-")
    if len(etag) != 32 or not set(etag) <= set("0123456789abcdef"):
        return False
    if not parts:
        return _etag_in_parts(store, path, None) == info.etag
    sizes = [size for size in _PART_SIZES if parts.isdigit() and -(-info.size // size) == int(parts)]
    return any(_etag_in_parts(store, path, size) == info.etag for size in sizes)


def digest_of_file(store: MediaStore, path: str) -> Digest:
    """The length and SHA-256 of a file."""
    with _opened(store, path) as body:
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
    with _opened(store, path) as body:
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


def _opened(store: MediaStore, path: str) -> closing[BinaryIO]:
    try:
        return closing(store.open(path))
    except FileNotFoundError as error:
        raise FileGone("it is gone") from error

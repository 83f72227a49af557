"""Moving one file between the media store and the bucket, or many at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import BinaryIO, TypeVar, cast

from backends.base import Backend, ObjectInfo
from storage_provider.bandwidth import Bandwidth
from storage_provider.directories import FileState
from storage_provider.failures import Damaged, FileChanged, NoLongerWanted
from storage_provider.media_store import MediaStore
from storage_provider.proofs import opened

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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
    with opened(store, path) as body:
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

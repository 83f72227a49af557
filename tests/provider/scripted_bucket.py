"""A bucket in memory that does what a test tells it to, and threads that work when the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from synapse.logging.context import make_deferred_yieldable
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from backends.base import ObjectInfo, ObjectReader
from backends.errors import BackendUnavailable, ObjectNotFound


def broken() -> BackendUnavailable:
    return BackendUnavailable("the content broke off", operation="open", key="key")


class ScriptedReader(ObjectReader):
    """Breaks at the byte that it is told, and nowhere without one."""

    def __init__(
        self,
        info: ObjectInfo,
        content: bytes,
        offset: int,
        breaks_at: int | None,
        before_read: Callable[[int], None] | None,
    ) -> None:
        self.info = info
        self._before_read = before_read
        self.is_closed = False
        self._content = content
        self._offset = offset
        self._breaks_at = breaks_at

    def read(self, n: int) -> bytes:
        assert not self.is_closed, "read after it was closed"
        if self._before_read is not None:
            self._before_read(self._offset)
        chunk = self._content[self._offset : self._offset + n]
        if self._breaks_at is not None and self._offset + len(chunk) > self._breaks_at:
            self.close()
            raise broken()
        self._offset += len(chunk)
        return chunk

    @property
    def position(self) -> int:
        return self._offset

    @property
    def holds_connection(self) -> bool:
        return not self.is_closed and self._offset < len(self._content)

    def close(self) -> None:
        self.is_closed = True


class ScriptedBucket:
    """Objects by their keys; each reader that is opened breaks at the next of the places in `breaks_at`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.breaks_at: list[int | None] = []
        self.opened: list[tuple[int, str | None]] = []
        self.readers: list[ScriptedReader] = []
        self.error: Exception | None = None
        self.before_read: Callable[[int], None] | None = None
        """Called with the offset, by the thread that is about to read from there."""

    def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ScriptedReader:
        self.opened.append((offset, if_match))
        if self.error is not None:
            raise self.error
        if key not in self.objects:
            raise ObjectNotFound("there is no such object", operation="open", key=key)
        info = ObjectInfo(key, len(self.objects[key]), "etag")
        breaks_at = self.breaks_at.pop(0) if self.breaks_at else None
        self.readers.append(ScriptedReader(info, self.objects[key], offset, breaks_at, self.before_read))
        return self.readers[-1]


class ManualThreads:
    """A thread pool whose work is done by the thread that calls `work`."""

    max = 2

    def __init__(self) -> None:
        self.working: list[None] = [None]
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def callInThreadWithCallback(self, on_result: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        def run() -> None:
            try:
                result: Any = function(*args, **kwargs)
            except Exception:
                on_result(False, Failure())  # type: ignore[no-untyped-call]
            else:
                on_result(True, result)

        self._waiting.append(run)

    def work(self, jobs: int | None = None) -> int:
        """Do that many jobs, or all with those that they lead to; returns how many there were."""
        done = 0
        while self._waiting and done != jobs:
            self._waiting.popleft()()
            done += 1
        return done


class ImmediateReactor(Clock):
    """A reactor that is called from its own thread only, whose time passes when the test says so."""

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        function(*args)


class ManualModuleApi:
    """Synapse's `defer_to_threadpool`."""

    def __init__(self, reactor: ImmediateReactor) -> None:
        self._reactor: Any = reactor

    async def defer_to_threadpool(self, threads: Any, function: Callable[..., Any], *args: Any) -> Any:
        return await make_deferred_yieldable(deferToThreadPool(self._reactor, threads, function, *args))

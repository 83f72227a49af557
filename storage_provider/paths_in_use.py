"""Who is working on which file of the media store, so that no file changes under anybody's hands."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from twisted.internet.interfaces import IReactorFromThreads

from storage_provider.media_store import FileState
from storage_provider.signals import Signal

Result = TypeVar("Result")


class PathsInUse:
    """Keeps apart those who use a path and those who change what stands there.

    Synapse looks whether a file is there, asks us for it, and then, to make thumbnails of it, opens
    its path for writing, all in good faith that nothing is put there in between. So a path is in use
    from the moment that Synapse asks for it until it has taken or left the answer, and as long as it
    is being uploaded; nobody gives it to a file or takes it away then.

    Everything but `unless_in_use` belongs to the reactor's thread.
    """

    def __init__(self, reactor: IReactorFromThreads, on_free: Callable[[str], None]) -> None:
        """`on_free` is told of each path that nobody uses any more."""
        self._reactor = reactor
        self._on_free = on_free
        self._users: Counter[str] = Counter()
        self._changes: dict[str, _Change] = {}
        self._questions: set[Future[bool]] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    # --- those who use a path ---

    def begin(self, path: str) -> None:
        """Use a path, until as many calls of `end`."""
        self._users[path] += 1

    def end(self, path: str) -> None:
        self._users[path] -= 1
        if not self._users[path]:
            del self._users[path]
            self._on_free(path)

    @contextlib.contextmanager
    def used(self, path: str) -> Iterator[None]:
        """Use a path within the block."""
        self.begin(path)
        try:
            yield
        finally:
            self.end(path)

    async def change(self, path: str) -> FileState | None:
        """Wait for the end of a change that is under way; returns the state of the file that it put there.

        Who has begun to use the path meanwhile believes that nothing is there.
        """
        change = self._changes.get(path)
        if change is None:
            return None
        await change.ended.wait()
        return change.placed

    # --- those who change what stands there ---

    def is_free(self, path: str) -> bool:
        """Whether a file may be put there in this turn of the reactor."""
        return path not in self._users and path not in self._changes

    def unless_in_use(self, path: str, action: Callable[[], Result]) -> Result | None:
        """Let `action`, which puts a file at a path or removes it, run unless the path is in use (then None).

        For threads of the background; blocks them until the reactor has answered.
        """
        if not self._ask(lambda: self._begin_change(path)):
            return None
        result: Result | None = None
        try:
            result = action()
        finally:
            placed = result if isinstance(result, FileState) else None
            self._reactor.callFromThread(self._end_change, path, placed)
        return result

    def close(self) -> None:
        """Let nobody wait for an answer that the reactor, which is stopping, will not give."""
        with self._lock:
            self._is_closed = True
            questions, self._questions = self._questions, set()
        for question in questions:
            question.set_result(False)

    def _begin_change(self, path: str) -> bool:
        if not self.is_free(path):
            return False
        self._changes[path] = _Change()
        return True

    def _end_change(self, path: str, placed: FileState | None) -> None:
        change = self._changes.pop(path)
        change.placed = placed
        change.ended.fire()
        if path not in self._users:
            self._on_free(path)

    def _ask(self, question: Callable[[], bool]) -> bool:
        """The answer of the reactor's thread; False once it stops."""
        answer: Future[bool] = Future()
        with self._lock:
            if self._is_closed:
                return False
            self._questions.add(answer)

        def give_answer() -> None:
            with self._lock:
                if answer not in self._questions:
                    return
                self._questions.remove(answer)
            answer.set_result(question())

        self._reactor.callFromThread(give_answer)
        return answer.result()


class _Change:
    """A change that is under way."""

    def __init__(self) -> None:
        self.ended = Signal()
        self.placed: FileState | None = None

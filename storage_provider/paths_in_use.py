"""Who is working on which file of the media store, so that no file changes under anybody's hands."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

from twisted.internet.interfaces import IReactorFromThreads

from storage_provider.directories import FileState
from storage_provider.signals import Signal


class PathsInUse:
    """Keeps apart those who use a path and those who change what stands there.

    Synapse looks whether a file is there, asks us for it, and then, to make thumbnails of it, opens
    its path for writing, all in good faith that nothing is put there in between. So a path is in use
    from the moment that Synapse asks for it until it has taken or left the answer, and as long as it
    is being uploaded; nobody gives it to a file or takes it away then.

    Everything but `kept_free` belongs to the reactor's thread.
    """

    def __init__(self, reactor: IReactorFromThreads, on_free: Callable[[str], None]) -> None:
        """`on_free` is told of each path that nobody uses any more."""
        self._reactor = reactor
        self._on_free = on_free
        self._users: Counter[str] = Counter()
        self._changes: dict[str, _Change] = {}
        self._questions: set[Future[list[str]]] = set()
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

    @contextlib.contextmanager
    def kept_free(self, paths: Iterable[str]) -> Iterator[dict[str, FileState | None]]:
        """Those of the paths that nobody uses, to put files there or to remove them within the block.

        The state of each file that has been put there is to be noted beside its path. For threads of
        the background; blocks them until the reactor has answered.
        """
        kept: dict[str, FileState | None] = dict.fromkeys(self._ask(lambda: self._begin_changes(paths)))
        try:
            yield kept
        finally:
            if kept:
                self._reactor.callFromThread(self._end_changes, kept)

    def close(self) -> None:
        """Let nobody wait for an answer that the reactor, which is stopping, will not give."""
        with self._lock:
            self._is_closed = True
            questions, self._questions = self._questions, set()
        for question in questions:
            question.set_result([])

    def _begin_changes(self, paths: Iterable[str]) -> list[str]:
        free = [path for path in paths if self.is_free(path)]
        self._changes.update((path, _Change()) for path in free)
        return free

    def _end_changes(self, kept: Mapping[str, FileState | None]) -> None:
        for path, placed in kept.items():
            change = self._changes.pop(path)
            change.placed = placed
            change.ended.fire()
            if path not in self._users:
                self._on_free(path)

    def _ask(self, question: Callable[[], list[str]]) -> list[str]:
        """The answer of the reactor's thread; nothing once it stops."""
        answer: Future[list[str]] = Future()
        with self._lock:
            if self._is_closed:
                return []
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

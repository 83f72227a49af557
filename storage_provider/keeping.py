"""What takes time before whole downloads get their places in the media store; done for many of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

from backends.errors import ContentDamaged
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Fingerprint
from storage_provider.temporary_files import TemporaryFile

# So many files may wait for the disk together; the first of them waits for the last.
_MOST_AT_ONCE = 50

# A disk that does not keep up shall cost neither memory, as small contents wait there, nor open files without end.
_MOST_WAITING = 200


@dataclass(frozen=True)
class Whole:
    """All of an object, which has no place in the media store yet."""

    path: str
    content: TemporaryFile | bytes
    digest: Fingerprint


@dataclass(frozen=True)
class _Waiting:
    whole: Whole
    prepared: Deferred[TemporaryFile | None]


class Keeping:
    """Brings whole files to the disk, if they may stay; for the reactor's thread.

    Those that come while others are being brought go together next: to ask the database and to wait for the
    disk takes hardly more time for many than for one.
    """

    def __init__(
        self,
        store: MediaStore,
        do_in_background: Callable[[Callable[[], Any]], Deferred[Any]],
        choose: Callable[[Mapping[str, Fingerprint]], Collection[str]],
        refute: Callable[[Mapping[str, Fingerprint]], Collection[str]],
    ) -> None:
        """`choose` decides, in a thread, which of some files may stay, and `refute` which are not what they should be."""
        self._store = store
        self._do_in_background = do_in_background
        self._choose = choose
        self._refute = refute
        self._waiting: list[_Waiting] = []
        self._is_at_work = False

    def prepare(self, whole: Whole) -> Deferred[TemporaryFile | None]:
        """A file that needs no more than its name, in its turn; None where it is not to stay, or too many wait.

        Fails with an `OSError` when the disk does not take it. A file that was given is never closed.
        """
        if len(self._waiting) >= _MOST_WAITING:
            return succeed(None)
        waiting = _Waiting(whole, Deferred())
        self._waiting.append(waiting)
        self._go_on()
        return waiting.prepared

    def prepare_at_once(self, whole: Whole) -> Deferred[TemporaryFile | None]:
        """As `prepare` for a file that somebody waits for, be it to stay or not.

        Fails with a `ContentDamaged` where it is not what it should be: Synapse would send it from the disk from then on.
        """
        return self._do_in_background(partial(self._prepare, whole))

    def _go_on(self) -> None:
        if self._is_at_work or not self._waiting:
            return
        batch: dict[str, _Waiting] = {}
        later = []
        for waiting in self._waiting:
            # There may be two downloads of one path, when the first one could not be shared any more.
            if len(batch) < _MOST_AT_ONCE and waiting.whole.path not in batch:
                batch[waiting.whole.path] = waiting
            else:
                later.append(waiting)
        self._waiting = later
        self._is_at_work = True
        prepare = partial(self._prepare_all, [waiting.whole for waiting in batch.values()])
        self._do_in_background(prepare).addBoth(self._tell, list(batch.values()))

    def _tell(self, outcome: Any, batch: list[_Waiting]) -> None:
        self._is_at_work = False
        outcomes = [outcome] * len(batch) if isinstance(outcome, Failure) else outcome
        for waiting, each in zip(batch, outcomes, strict=True):
            if isinstance(each, Failure):
                waiting.prepared.errback(each)
            else:
                waiting.prepared.callback(each)
        self._go_on()

    def _prepare_all(self, files: list[Whole]) -> list[TemporaryFile | Failure | None]:
        """What has come of each; in a thread."""
        chosen = self._choose({whole.path: whole.digest for whole in files})
        begun = [(whole, _attempt(self._begin, whole) if whole.path in chosen else None) for whole in files]
        return [_attempt(_end, whole, file) if isinstance(file, TemporaryFile) else file for whole, file in begun]

    def _prepare(self, whole: Whole) -> TemporaryFile:
        if self._refute({whole.path: whole.digest}):
            reason = "the object is not what Synapse's database says"
            raise ContentDamaged(reason, operation="open", key=whole.path)
        return _end(whole, self._begin(whole))

    def _begin(self, whole: Whole) -> TemporaryFile:
        """Let the system begin to bring it to the disk."""
        file = self._store.temporary_file(whole.path) if isinstance(whole.content, bytes) else whole.content
        with _discarded_on_error(whole, file):
            if isinstance(whole.content, bytes):
                file.write_at(whole.content, 0)
            file.finish()
        return file


def _end(whole: Whole, file: TemporaryFile) -> TemporaryFile:
    """Wait until it is there."""
    with _discarded_on_error(whole, file):
        file.prepare(whole.path)
    return file


@contextlib.contextmanager
def _discarded_on_error(whole: Whole, file: TemporaryFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # The next attempt shall not take it for the whole.
        if file is not whole.content:
            file.discard()
        raise


def _attempt(step: Callable[..., TemporaryFile], *arguments: Any) -> TemporaryFile | Failure:
    try:
        return step(*arguments)
    except Exception:
        return Failure()  # type: ignore[no-untyped-call]

"""The uploads that a shutdown waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from synapse.logging.context import PreserveLoggingContext
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

# Nothing but these uploads still holds the media when Synapse stores in the background, but a
# supervisor that waited longer than this would kill the process anyway.
_LONGEST_WAIT_SECONDS = 20


class UploadsInFlight:
    """Counts uploads, and tells when there are none."""

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._count = 0
        self._none_left: Deferred[None] | None = None

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """An upload is under way within the block."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0 and self._none_left is not None:
                waiting, self._none_left = self._none_left, None
                with PreserveLoggingContext():
                    waiting.callback(None)

    def wait(self) -> Deferred[None] | None:
        """Fires when the last upload has ended, at the latest after 20 s; None where there is none."""
        if self._count == 0:
            return None
        self._none_left = Deferred()
        self._none_left.addTimeout(_LONGEST_WAIT_SECONDS, self._reactor, onTimeoutCancel=lambda *_: None)
        return self._none_left

"""Waiting for a moment, as many as want to."""

from __future__ import annotations

from synapse.logging.context import PreserveLoggingContext, make_deferred_yieldable
from twisted.internet.defer import Deferred


class Signal:
    """Something that happens, perhaps again and again; for the reactor's thread."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []

    async def wait(self) -> None:
        """Go on the next time that it happens."""
        deferred: Deferred[None] = Deferred()
        self._waiting.append(deferred)
        await make_deferred_yieldable(deferred)

    def fire(self) -> None:
        """Let everybody who waits go on."""
        waiting, self._waiting = self._waiting, []
        with PreserveLoggingContext():
            for deferred in waiting:
                if not deferred.called:
                    deferred.callback(None)

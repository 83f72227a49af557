"""Proving something once for all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


class SharedProof:
    """Something that is proved when it is first needed; a proof that failed is tried again by who comes later."""

    def __init__(self, prove: Callable[[], None]) -> None:
        self._prove = prove
        self._lock = threading.Lock()
        self._outcome: Future[None] | None = None

    def ensure(self) -> None:
        """Prove it, unless that is done. Raises what the proof raises.

        Whoever comes meanwhile waits and shares the outcome: one after another they would wait for a dead server many
        times.
        """
        with self._lock:
            outcome = self._outcome
            is_ours = outcome is None
            if outcome is None:
                outcome = self._outcome = Future()
        if not is_ours:
            outcome.result()
            return
        try:
            self._prove()
        except BaseException as error:
            with self._lock:
                self._outcome = None
            outcome.set_exception(error)
            raise
        outcome.set_result(None)

"""A bound on the bytes that all transfers together move in a second."""

from __future__ import annotations

import threading
import time

from storage_provider.failures import Stopped

# What is moved at a time where nothing bounds it.
_UNBOUND_STEP = 1 << 20

# So long a reader waits at most for its turn where the bandwidth is bounded, however many there are.
_LONGEST_WAIT_SECONDS = 10
_MOST_WORKERS = 256
_SMALLEST_STEP = 4 << 10


class Bandwidth:
    """Holds threads back so that together they move no more than a number of bytes a second."""

    def __init__(self, bytes_per_second: int | None, stop: threading.Event) -> None:
        self.step = _UNBOUND_STEP if bytes_per_second is None else _step(bytes_per_second)
        """The bytes of an object to read at a time: a server takes a connection for dead that nobody reads from."""
        self._rate = bytes_per_second
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def spend(self, size: int, *, is_begun: bool = False) -> None:
        """Wait until `size` bytes may be moved.

        Raises `Stopped` when the run ends meanwhile. Here that does not break off a file that `is_begun`.
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
    return max(min(bytes_per_second * _LONGEST_WAIT_SECONDS // _MOST_WORKERS, _UNBOUND_STEP), _SMALLEST_STEP)

"""A bound on the memory that bodies in flight take together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Bytes that may be held at once; who asks for more waits, in the order of asking.

    A request for more than all of it is granted alone, so that nothing waits for ever.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        """Wait until `size` bytes are free, and take them."""
        size = min(size, self._total)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    def release(self, size: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._free += min(size, self._total)
            self._changed.notify_all()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes within the block."""
        self.acquire(size)
        try:
            yield
        finally:
            self.release(size)

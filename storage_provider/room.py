"""How much is in the media store, and what may still be put there before `max_size` is reached."""

from __future__ import annotations

import threading

from storage_provider.cache_policy import space_of


class Room:
    """Counts what is added, in whole blocks, between the looks at the whole disk; for any thread.

    Before the first look there is no limit: in a process that does not keep the cache, nobody ever looks.
    """

    def __init__(self, max_size: int | None) -> None:
        self._max_size = max_size
        self._lock = threading.Lock()
        self._is_watched = False
        self._on_disk = 0
        self._added = 0

    @property
    def on_disk(self) -> int:
        """The bytes that are there, by the last look and what came since it began."""
        with self._lock:
            return self._on_disk

    def take(self, size: int) -> bool:
        """Count a file of that many bytes, if there is room for it."""
        space = space_of(size)
        with self._lock:
            if not self._has(space):
                return False
            self._count(space)
            return True

    def add(self, size: int) -> bool:
        """Count a file that is there already; tells whether there was room for it."""
        space = space_of(size)
        with self._lock:
            there_was = self._has(space)
            self._count(space)
            return there_was

    def begin_look(self) -> int:
        """Begin to look at the whole disk; returns what `settle` is to be told."""
        with self._lock:
            self._is_watched = True
            return self._added

    def settle(self, on_disk: int, begun: int) -> None:
        """Tell how many bytes a look has found that began at `begun`.

        What was added meanwhile is counted in any case: the look may have missed it, and to count it twice errs on
        the side of the limit.
        """
        with self._lock:
            self._on_disk = on_disk + self._added - begun

    def _has(self, space: int) -> bool:
        return self._max_size is None or not self._is_watched or self._on_disk + space <= self._max_size

    def _count(self, space: int) -> None:
        self._added += space
        self._on_disk += space

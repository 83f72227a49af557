"""The free space of the disk, as far as downloads may fill it."""

from __future__ import annotations

import threading

from storage_provider.media_store import MediaStore

# What stays free besides the files that are being downloaded, so that others can go on writing.
_RESERVE_BYTES = 16 << 20


class FreeSpace:
    """Promises space to downloads, to each what no other one is still to fill; for any thread."""

    def __init__(self, store: MediaStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._promised = 0

    def promise(self, size: int) -> bool:
        """Promise that many bytes, if they are free. Raises `OSError`."""
        with self._lock:
            free, _ = self._store.free_space()
            if free < self._promised + size + _RESERVE_BYTES:
                return False
            self._promised += size
            return True

    def settle(self, size: int) -> None:
        """Tell that so many of the promised bytes have been written, or never will be."""
        with self._lock:
            self._promised -= size

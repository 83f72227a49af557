"""The state in which a machine is before each measurement: that of a server which has run for a while."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_STEP_BYTES = 1 << 20

# More than any memory, and no more than ext4 takes with its smallest blocks; it is all hole and takes no room.
_FILE_BYTES = 2 << 40

# The system keeps some free.
_LEFT_BYTES = 256 << 20

# It also frees some while memory is filled.
_PASSES = 3


class Settling:
    """Has everything written, and free memory filled with cached files.

    A virtual machine may give free memory back to its host (`free page reporting`), and waits for each page when it
    is used again: to write a MiB into the page cache takes 2.5 ms of CPU then instead of 0.3. A server that has
    run for a while has no such memory, and to have it would tell of the host, not of the program.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is on a disk, whose files the system caches; it needs no room there.

        Without effect on tmpfs, or where a limit on the memory of this process leaves some free.
        """
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        os.truncate(self._file.fileno(), _FILE_BYTES)
        self._offset = 0
        self._buffer = memoryview(bytearray(_STEP_BYTES))

    def settle(self) -> None:
        os.sync()
        for _ in range(_PASSES):
            self._fill(_free_bytes() - _LEFT_BYTES)

    def _fill(self, size: int) -> None:
        for _ in range(0, size, _STEP_BYTES):
            os.preadv(self._file.fileno(), [self._buffer], self._offset)
            self._offset = (self._offset + _STEP_BYTES) % _FILE_BYTES

    def close(self) -> None:
        self._file.close()


def _free_bytes() -> int:
    found = re.search(r"^MemFree:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0

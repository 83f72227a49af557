"""Receiving an answer by a deadline, and its content in few pieces."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, cast

# Room for the headers and all of a small object at once.
_BUFFER_BYTES = 64 << 10

# How much longer than it should a socket may wait.
_TOLERANCE = 1.02

# The socket's buffer grows with what is waited for, and stays so.
_MOST_AT_ONCE = 1 << 20


def wakes_in_time(system: str, release: str) -> bool:
    """Whether no socket sleeps on with a full buffer, as those of Linux could before 5.12 (commit f969dc5a8857)."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return system == "Linux" and found is not None and (int(found[1]), int(found[2])) >= (5, 12)


_WAKES_IN_TIME = wakes_in_time(os.uname().sysname, os.uname().release)


class Deadline:
    """The moment by which something must have happened."""

    def __init__(self, seconds: float) -> None:
        self.restart(seconds)

    def restart(self, seconds: float) -> None:
        """Allow `seconds` from now."""
        self._ends = time.monotonic() + seconds

    def extend(self, seconds: float) -> None:
        """Allow `seconds` more."""
        self._ends += seconds

    def remaining(self) -> float:
        """Seconds left, never 0, which a socket takes for "do not wait" instead of "no time"."""
        return max(self._ends - time.monotonic(), 0.001)

    @property
    def passed(self) -> bool:
        """Whether there is no time left."""
        return time.monotonic() >= self._ends


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Let the socket wait for so long, or a little longer where it would do that already.

    To change it is a system call, at which threads may pass Python's lock on, which takes longer than to receive something.
    """
    current = sock.gettimeout()
    if current is None or not seconds <= current <= seconds * _TOLERANCE:
        sock.settimeout(seconds)


class ReceivingSocket:
    """Just enough of a socket for `http.client.HTTPResponse`, which calls nothing but makefile()."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        raw = self._sock.makefile(mode, buffering=0)  # type: ignore[call-overload]
        return _ReceivedFile(_Stream(raw, self._sock, self._deadline))


class _Stream(io.RawIOBase):
    """Bytes from a socket, by a deadline: a plain time-out starts again with each byte that trickles in."""

    def __init__(self, raw: Any, sock: socket.socket, deadline: Deadline) -> None:
        self._raw = raw
        self._sock = sock
        self._deadline = deadline
        # What OpenSSL has taken from the socket already would be waited for in vain.
        self.can_wait_for_all = (
            _WAKES_IN_TIME and isinstance(sock, socket.socket) and not isinstance(sock, ssl.SSLSocket)
        )
        self._waits_for_all = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._deadline.passed:
            raise TimeoutError("timed out")
        set_timeout(self._sock, self._deadline.remaining())
        if not self._waits_for_all:
            return cast(int, self._raw.readinto(buffer))
        _wake_at(self._sock, len(buffer))
        try:
            return cast(int, self._raw.readinto(buffer))
        finally:
            _wake_at(self._sock, 1)

    @contextlib.contextmanager
    def waiting_for_all(self) -> Iterator[None]:
        """Within the block, let what is read come in one piece, shorter only where the stream ends.

        It comes in a few pieces otherwise, and at each of them threads may pass Python's lock on.
        """
        self._waits_for_all = True
        try:
            yield
        finally:
            self._waits_for_all = False

    def close(self) -> None:
        self._raw.close()
        super().close()


def _wake_at(sock: socket.socket, count: int) -> None:
    """Let the socket count as readable when so many bytes are there, or it has ended.

    https://man7.org/linux/man-pages/man7/socket.7.html, SO_RCVLOWAT; since Linux 5.12 also when there is no room for more.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(count, _MOST_AT_ONCE))


class _ReceivedFile(io.BufferedReader):
    """A buffer for headers and small content; large pieces are received without it, after what it holds."""

    raw: _Stream

    def __init__(self, raw: _Stream) -> None:
        super().__init__(raw, _BUFFER_BYTES)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read so many bytes, fewer only at the end, as from any buffered file."""
        if size is None or size <= _BUFFER_BYTES or not self.raw.can_wait_for_all:
            return super().read(size)
        pieces = []
        with self.raw.waiting_for_all():
            # The first of them may come from the buffer, which is empty afterwards.
            while size > 0 and (piece := self.read1(size)):
                pieces.append(piece)
                size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

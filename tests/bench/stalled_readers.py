"""Clients that ask for files and then stop reading, and how long everybody else waits meanwhile."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from types import TracebackType

from tests.bench.served_media import MediaSet
from tests.provider.homeserver import Homeserver

_RECEIVE_BUFFER = 4096
_PATIENCE = 10
_UPLOAD_BYTES = 1 << 20


class Stall:
    """In force within a `with` block."""

    def __init__(self, homeserver: Homeserver, ids: list[str]) -> None:
        self._homeserver = homeserver
        self._ids = ids
        self._readers: list[socket.socket] = []
        self._stack = ExitStack()

    def __enter__(self) -> Stall:
        for media_id in self._ids:
            reader = self._stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            reader.settimeout(_PATIENCE)
            reader.connect(("127.0.0.1", self._homeserver.port))
            reader.sendall(
                f"GET {self._homeserver.download_path(media_id)} HTTP/1.1\r\nHost: test.example\r\n"
                f"Authorization: Bearer {self._homeserver.token}\r\n\r\n".encode()
            )
            self._readers.append(reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def longest_answer(self, media: MediaSet, seconds: float) -> float:
        """For so many seconds, download and upload in turns; the longest time in seconds that one of these took.

        What takes ten seconds is given up, and counts as ten.
        """
        longest, ends = 0.0, time.monotonic() + seconds
        upload = "/_matrix/media/v3/upload?filename=file"
        for media_id in media.ids:
            for method, path in (("GET", self._homeserver.download_path(media_id)), ("POST", upload)):
                longest = max(longest, self._seconds(method, path))
                if time.monotonic() > ends or longest >= _PATIENCE:
                    return longest
        return longest

    def _seconds(self, method: str, path: str) -> float:
        begun = time.monotonic()
        try:
            body = os.urandom(_UPLOAD_BYTES) if method == "POST" else None
            answer = self._homeserver.request(method, path, body, "application/octet-stream", timeout=_PATIENCE)
        except TimeoutError:
            return float(_PATIENCE)
        if answer.status != 200:
            raise RuntimeError(f"another client was answered {answer.status}: {answer.body[:300]!r}")
        return time.monotonic() - begun

    def check(self) -> None:
        """See that the readers really have an answer before them. Raises `RuntimeError`."""
        for reader in self._readers:
            begin = reader.recv(12)
            if begin != b"HTTP/1.1 200":
                raise RuntimeError(f"a reader that was to stall was answered {begin!r}")

"""Clients that download from a homeserver, in a process of their own: they must not be what limits it.

They let the kernel throw the bodies away (`MSG_TRUNC`), so that a gigabyte costs them a tenth of a second.
The process is this file as a script, with an `Order` as JSON on its standard input and an `Outcome` on its output.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field

_PIECE_BYTES = 1 << 20
_PACED_BUFFER = 256 << 10
_PACE_SECONDS = 0.01
_MOST_HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Order:
    """What is to be downloaded: each path once, by whichever client is free."""

    port: int
    token: str
    paths: list[str]
    length: int
    """Bytes that each of the files must have."""
    clients: int
    bytes_per_second: int | None = None
    """The most that one client takes."""
    patience: float = 120
    """Seconds after which everything has to be over."""


@dataclass
class Outcome:
    """What came of it; seconds, and a list has a value a file."""

    seconds: float = 0
    """From the first request to the last byte."""
    first_byte: list[float] = field(default_factory=list)
    """From a request to the first byte of the file."""
    whole: list[float] = field(default_factory=list)


class LoadFailed(Exception):
    """A client got something else than the whole file."""


def download_all(order: Order) -> Outcome:
    """Download, and wait for it. Raises `LoadFailed` when anything was not answered as it should be."""
    command = [sys.executable, "-I", "-S", __file__]
    done = subprocess.run(command, input=json.dumps(asdict(order)), capture_output=True, text=True)
    if done.returncode:
        raise LoadFailed(done.stderr.strip()[-500:])
    return Outcome(**json.loads(done.stdout))


class _Client:
    """One connection, kept alive, with one request at a time."""

    def __init__(self, order: Order, outcome: Outcome) -> None:
        self._order = order
        self._outcome = outcome
        self.socket = socket.socket()
        if order.bytes_per_second:
            # Before connecting, or the kernel promises the server more room than a slow network has.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER)
        self.socket.connect(("127.0.0.1", order.port))
        self.socket.setblocking(False)
        self._buffer = memoryview(bytearray(_PIECE_BYTES))
        self._head = b""
        self._left: int | None = None
        self._asked = 0.0
        self._path = ""

    def ask(self, path: str) -> None:
        self._path, self._head, self._left = path, b"", None
        self._asked = time.monotonic()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: test.example\r\nAuthorization: Bearer {self._order.token}\r\n\r\n".encode()
        )

    def may_read(self) -> int:
        """How many bytes the client wants at this moment."""
        if not self._order.bytes_per_second:
            return _PIECE_BYTES
        had = 0 if self._left is None else self._order.length - self._left
        due = self._order.bytes_per_second * (time.monotonic() - self._asked)
        return min(_PIECE_BYTES, max(0, int(due) - had))

    def read(self, wanted: int) -> bool:
        """Take what is there; tells whether the file is whole."""
        if self._left is None:
            return self._read_head()
        received = self.socket.recv_into(self._buffer, min(wanted, self._left), socket.MSG_TRUNC)
        return self._took(received)

    def _read_head(self) -> bool:
        received = self.socket.recv(4096)
        self._head += received
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            if not received or len(self._head) > _MOST_HEADER_BYTES:
                raise LoadFailed(f"{self._path}: no answer, but {self._head[:300]!r}")
            return False
        status, *lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        length = headers.get(b"content-length")
        if status.split()[1] != b"200" or length != b"%d" % self._order.length:
            raise LoadFailed(f"{self._path}: {status.decode()}, {length!r} bytes, {body[:300]!r}")
        self._left = self._order.length
        return bool(body) and self._took(len(body))

    def _took(self, received: int) -> bool:
        if self._left is None or not received:
            raise LoadFailed(f"{self._path}: {self._left} bytes are missing")
        now = time.monotonic()
        if self._left == self._order.length:
            self._outcome.first_byte.append(now - self._asked)
        self._left -= received
        if not self._left:
            self._outcome.whole.append(now - self._asked)
        return not self._left


def _run(order: Order) -> Outcome:
    outcome = Outcome()
    waiting = deque(order.paths)
    clients = [_Client(order, outcome) for _ in range(min(order.clients, len(waiting)))]
    begun = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.ask(waiting.popleft())
        while selector.get_map():
            if time.monotonic() - begun > order.patience:
                raise LoadFailed(f"{len(outcome.whole)} of {len(order.paths)} files within {order.patience:.0f} s")
            if order.bytes_per_second:
                time.sleep(_PACE_SECONDS)
            for key, _ in selector.select(1):
                client = key.data
                wanted = client.may_read()
                if not wanted or not client.read(wanted):
                    continue
                if waiting:
                    client.ask(waiting.popleft())
                else:
                    selector.unregister(client.socket)
    outcome.seconds = time.monotonic() - begun
    return outcome


def main() -> int:
    try:
        outcome = _run(Order(**json.load(sys.stdin)))
    except (LoadFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    json.dump(asdict(outcome), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

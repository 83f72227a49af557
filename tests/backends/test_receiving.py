"""What comes from a socket, when, and in how many pieces."""

from __future__ import annotations

import array
import fcntl
import io
import socket
import ssl
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backends.receiving import Deadline, ReceivingSocket, wakes_in_time
from tests.servers.tls import Certificates

PIECE = b"0123456789abcdef" * 6400


class Client(socket.socket):
    """The end of a connection at which is received, and counted how often."""

    times_received = 0
    most_waited_for = 0
    """How many bytes had to be there at once."""

    def recv_into(self, *arguments: Any) -> int:
        waits_for = self.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        self.most_waited_for = max(self.most_waited_for, waits_for)
        count = super().recv_into(*arguments)
        self.times_received += 1
        return count

    def wait_until_there(self, count: int) -> None:
        """Wait until so many bytes wait to be received, or some have been."""
        while waiting_bytes(self) < count and not self.times_received:
            pass


class Ends:
    """Both ends of a connection, and what reads from the client's."""

    def __init__(self, server: socket.socket, client: Client, deadline: Deadline) -> None:
        self.server = server
        self.client = client
        self.file: io.BufferedReader = ReceivingSocket(client, deadline).makefile("rb")


def waiting_bytes(sock: socket.socket) -> int:
    """How many bytes wait to be received."""
    waiting = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, waiting)
    return waiting[0]


@pytest.fixture
def deadline() -> Deadline:
    return Deadline(30)


@pytest.fixture
def ends(deadline: Deadline) -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listening, Client() as client:
        client.connect(listening.getsockname())
        client.settimeout(30)
        server, _ = listening.accept()
        with server:
            ends = Ends(server, client, deadline)
            with ends.file:
                yield ends


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def test_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline = Deadline(10)
    assert deadline.remaining() == 10
    now += 9
    assert deadline.remaining() == 1
    deadline.extend(5)
    assert deadline.remaining() == 6
    now += 6
    assert deadline.passed
    # A socket takes 0 for "do not wait".
    assert deadline.remaining() > 0
    deadline.restart(3)
    assert deadline.remaining() == 3


def test_a_large_piece_is_received_at_once_when_all_of_it_is_there(ends: Ends, threads: ThreadPoolExecutor) -> None:
    reading = threads.submit(ends.file.read, 2 * len(PIECE))
    ends.server.sendall(PIECE)
    ends.client.wait_until_there(len(PIECE))
    ends.server.sendall(PIECE)
    assert reading.result() == PIECE + PIECE
    assert ends.client.times_received == 1


def test_no_more_is_waited_for_at_once_than_a_socket_may_hold(ends: Ends, threads: ThreadPoolExecutor) -> None:
    content = PIECE * 50
    sending = threads.submit(ends.server.sendall, content)
    assert ends.file.read(len(content)) == content
    sending.result()
    assert ends.client.times_received > 1
    assert ends.client.most_waited_for == 1 << 20


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("Linux", "5.11.22-generic", False),
        ("Linux", "5.12.0", True),
        ("Linux", "4.19.0-27-amd64", False),
        ("Linux", "6.1.0-13-amd64", True),
        ("Linux", "something", False),
        ("Darwin", "24.1.0", False),
    ],
)
def test_pieces_are_waited_for_only_where_no_socket_sleeps_on_with_a_full_buffer(
    system: str, release: str, expected: bool
) -> None:
    assert wakes_in_time(system, release) is expected


def test_elsewhere_a_piece_comes_as_it_does(
    ends: Ends, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.receiving._WAKES_IN_TIME", False)
    file = ReceivingSocket(ends.client, Deadline(30)).makefile("rb")
    with file:
        sending = threads.submit(ends.server.sendall, PIECE)
        assert file.read(len(PIECE)) == PIECE
        sending.result()
    assert ends.client.most_waited_for == 1


def test_what_is_in_the_buffer_comes_first(ends: Ends) -> None:
    ends.server.sendall(b"header\n" + PIECE)
    assert ends.file.readline() == b"header\n"
    assert ends.file.read(len(PIECE)) == PIECE


def test_what_comes_after_a_large_piece_is_not_kept_waiting(ends: Ends) -> None:
    ends.server.sendall(PIECE)
    assert ends.file.read(len(PIECE)) == PIECE
    ends.server.sendall(b"next\n")
    assert ends.file.readline() == b"next\n"


def test_a_large_piece_that_breaks_off_is_what_there_is(ends: Ends, threads: ThreadPoolExecutor) -> None:
    reading = threads.submit(ends.file.read, 2 * len(PIECE))
    ends.server.sendall(PIECE)
    ends.client.wait_until_there(len(PIECE))
    ends.server.shutdown(socket.SHUT_WR)
    assert reading.result() == PIECE


def test_a_large_piece_that_stalls_ends_with_its_time(ends: Ends, deadline: Deadline) -> None:
    ends.server.sendall(PIECE)
    deadline.restart(0.1)
    with pytest.raises(TimeoutError):
        ends.file.read(2 * len(PIECE))


def test_a_large_piece_over_tls_is_not_waited_for_in_the_socket_alone(
    tmp_path: Path, deadline: Deadline, threads: ThreadPoolExecutor
) -> None:
    """OpenSSL may have taken a part of it from there already."""
    certificates = Certificates.create(tmp_path / "tls")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate_file, certificates.key_file)
    trusting = ssl.create_default_context(cafile=certificates.ca_file)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname(), timeout=30)
        server, _ = listening.accept()
    with client, server:
        sealed = threads.submit(seal, server, context, PIECE)
        with (
            trusting.wrap_socket(client, server_hostname="127.0.0.1") as sock,
            ReceivingSocket(sock, deadline).makefile("rb") as file,
        ):
            reading = threads.submit(file.read, len(PIECE))
            server.sendall(sealed.result()[:-100])
            while waiting_bytes(sock):
                pass
            server.sendall(sealed.result()[-100:])
            assert reading.result() == PIECE


def seal(server: socket.socket, context: ssl.SSLContext, content: bytes) -> bytes:
    """Begin to speak TLS as the server; what it would send as this content."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            server.sendall(outgoing.read())
            incoming.write(server.recv(1 << 16))
    server.sendall(outgoing.read())
    tls.write(content)
    return outgoing.read()

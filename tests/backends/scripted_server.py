"""An HTTP(S) server that answers the n-th request as the n-th line of its script says, and misbehaves on demand.

    with ScriptedServer([reply(503), drop_during_upload(), reply(200)]) as server:
        ...
        assert [request.method for request in server.requests] == ["PUT", "PUT", "PUT"]

The last line of the script is repeated for all further requests.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from types import TracebackType
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

# How long a test waits for something that should happen at once, and a server for its threads.
PATIENCE = 60


@dataclass
class Request:
    """A request as it came; the body only as far as it was read."""

    method: str
    target: str
    """As it stood in the request line: a path, or a whole URL where the server is used as a proxy."""
    headers: Message
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


@dataclass
class Exchange:
    """A request that waits for its answer, and the connection that it came on."""

    server: ScriptedServer
    connection: socket.socket
    stream: socket.SocketIO
    request: Request
    keep_alive: bool = field(default=True, init=False)

    def read_body(self, at_most: int | None = None) -> bytes:
        """Read the rest of the body, or a part of it."""
        headers = self.request.headers
        if headers.get("Transfer-Encoding") == "chunked":
            self.request.body += self._read_chunks()
        else:
            left = int(headers.get("Content-Length", 0)) - len(self.request.body)
            self.request.body += self._read(left if at_most is None else min(left, at_most))
        return self.request.body

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def close(self) -> None:
        """Close the connection in good order."""
        self.keep_alive = False

    def reset(self) -> None:
        """Close the connection like a machine that was switched off and on again: the client sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.keep_alive = False

    def wait_until_gone(self, for_seconds: float = PATIENCE) -> bool:
        """Wait until the client has closed the connection or the test is over; False when the time ran out first."""
        steps = max(1, round(for_seconds / 0.02))
        for _ in range(steps):
            if self.server.closing.is_set():
                return True
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1 << 16):
                return True
        return False

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            more = self.stream.read(length - len(data))
            if not more:
                raise ConnectionError("the client went away")
            data += more
        return bytes(data)

    def _read_line(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            line += self._read(1)
        return bytes(line)

    def _read_chunks(self) -> bytes:
        data = bytearray()
        while length := int(self._read_line(), 16):
            data += self._read(length)
            self._read_line()
        self._read_line()
        return bytes(data)


Behaviour = Callable[[Exchange], None]
"""What the server does with a request."""


class ScriptedServer:
    """Answers by its script, in threads of its own, and remembers what it was asked."""

    def __init__(self, script: Sequence[Behaviour], *, tls: ssl.SSLContext | None = None) -> None:
        self.script = list(script)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._tls = tls
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open at the moment."""
        return len(self._connections)

    def wait_for(self, condition: Callable[[ScriptedServer], bool]) -> None:
        """Wait until something is true of the requests or connections that have come."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), PATIENCE):
                raise AssertionError(f"it did not happen; the server saw {[str(each) for each in self.requests]}")

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        # A close() alone would not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._changed:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._note(lambda: self._connections.add(connection))
            # Clients that go away are what the tests are about.
            while self._answer(connection):
                pass
        except (OSError, ValueError):
            pass
        finally:
            # In this order: who waits for its end may send at once, and must not meet it half closed.
            connection.close()
            self._note(lambda: self._connections.discard(connection))

    def _answer(self, connection: socket.socket) -> bool:
        # Unbuffered: what follows the head is left to whoever reads on, a tunnel for instance.
        with connection.makefile("rb", buffering=0) as stream:
            head = bytearray()
            while not head.endswith(b"\r\n\r\n"):
                byte = stream.read(1)
                if not byte:
                    return False
                head += byte
            first, _, rest = bytes(head).partition(b"\r\n")
            method, target, _ = first.decode("latin-1").split(" ")
            request = Request(method, target, _parse_headers(rest))
            exchange = Exchange(self, connection, stream, request)
            self._note(lambda: self.requests.append(request))
            number = len(self.requests)
            self.script[min(number, len(self.script)) - 1](exchange)
            return exchange.keep_alive and not self.closing.is_set()

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


def _parse_headers(head: bytes) -> Message:
    message = Message()
    for line in head.decode("latin-1").split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            message[name] = value.strip()
    return message


# --- behaviours ---


def reply(
    status: int,
    body: bytes | str = b"",
    headers: Mapping[str, str] | None = None,
    *,
    length: int | None = None,
    close: bool = False,
) -> Behaviour:
    """Read the request and answer it. `length` is announced instead of the body's own, and the connection then closed."""
    content = body.encode() if isinstance(body, str) else body

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        with_body = b"" if exchange.request.method == "HEAD" else content
        told = {"Content-Length": str(len(content) if length is None else length), **(headers or {})}
        if close:
            told["Connection"] = "close"
        exchange.send(response_head(status, told) + with_body)
        if close or length is not None:
            exchange.close()

    return behave


def response_head(status: int, headers: Mapping[str, str]) -> bytes:
    """Status line and headers of an answer."""
    reason = http.HTTPStatus(status).phrase
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def error(
    status: int, code: str, message: str = "said the server", headers: Mapping[str, str] | None = None
) -> Behaviour:
    """An error as S3 words it."""
    return reply(status, error_xml(code, message), {"Content-Type": "application/xml", **(headers or {})})


def error_xml(code: str, message: str = "said the server") -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{escape(message)}</Message><RequestId>1</RequestId></Error>"
    )


def from_request(answer: Callable[[Request], Behaviour]) -> Behaviour:
    """An answer that depends on the request."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        answer(exchange.request)(exchange)

    return behave


def raw(data: bytes) -> Behaviour:
    """Read the request, send these bytes, whatever they are, and close."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        exchange.send(data)
        exchange.close()

    return behave


def drop() -> Behaviour:
    """Read the request, maybe do the work, and close without an answer."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        exchange.close()

    return behave


def drop_during_upload(after: int = 1000) -> Behaviour:
    """Reset the connection while the client is sending."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body(after)
        exchange.reset()

    return behave


def hang() -> Behaviour:
    """Read the request and say nothing until the client gives up."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        exchange.wait_until_gone()
        exchange.close()

    return behave


def stop_reading() -> Behaviour:
    """Leave the body unread until the client gives up."""

    def behave(exchange: Exchange) -> None:
        exchange.server.closing.wait(PATIENCE)
        exchange.close()

    return behave


def trickle(data: bytes, first: bytes = b"") -> Behaviour:
    """Send `first`, and then `data` over and over, a byte at a time, until the client gives up."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        exchange.send(first)
        while True:
            for byte in data:
                if exchange.wait_until_gone(0.02):
                    exchange.close()
                    return
                exchange.send(bytes([byte]))

    return behave


def after(event: threading.Event, behaviour: Behaviour) -> Behaviour:
    """Wait for the test before going on."""

    def behave(exchange: Exchange) -> None:
        exchange.read_body()
        if not event.wait(PATIENCE):
            raise AssertionError("the test never went on")
        behaviour(exchange)

    return behave


def tunnel(port: int) -> Behaviour:
    """As a proxy, answer CONNECT and pass bytes to and fro, wherever the client wanted to go."""

    def behave(exchange: Exchange) -> None:
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            exchange.send(response_head(200, {}))
            other = {exchange.connection: upstream, upstream: exchange.connection}
            while not exchange.server.closing.is_set():
                for source in select.select(list(other), [], [], 0.02)[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        exchange.close()
                        return
                    other[source].sendall(data)

    return behave

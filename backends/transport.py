"""The one HTTP client under every SDK: time limits, proxies, CA bundles, and what the last answer said.

The SDKs sign requests and know S3; they differ in how they wait, retry and report. So each of them
sends through this client, and waiting, retrying and reporting are the same whichever is in use.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Timeout, make_headers

from backends.answer_headers import Response
from backends.errors import SettingsError
from backends.receiving import Deadline, ReceivingSocket, set_timeout
from backends.settings import BucketSettings
from backends.xml import parse_error

# A socket's time-out spans the whole of one sendall(): sent at once, a part of 8 MiB would need
# a fast line. In slices of this size it is enough that something moves.
_SEND_BYTES = 64 << 10

# Firewalls and balancers forget connections that are idle, some without a word to either end (Docker Swarm's after
# 900 s), and a request on one of those is never answered.
_LONGEST_IDLE = 60


@dataclass(frozen=True)
class Answer:
    """What the last answer said, apart from the SDK's opinion of it."""

    status: int
    code: str | None = None
    message: str | None = None
    readable: bool = True
    """False where an error came with a body that is not S3's XML, such as a proxy's page."""


class _State(threading.local):
    """The call that the current thread is making."""

    deadline: Deadline | None = None
    """For the whole call, all attempts together; the time in which a body is being sent does not count."""
    reading: Deadline | None = None
    """For what is being read of the last answer."""
    headers: Mapping[str, str | bytes] | None = None
    """Of the last request; None where the attempt has made none."""
    answer: Answer | None = None
    error: Answer | None = None


class _OpenSockets:
    """The sockets of a transport, those that only a reader still holds included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._are_cut = False

    def add(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.add(sock)
            if self._are_cut:
                _shut_down(sock)

    def cut(self) -> None:
        """End whatever any thread is waiting for, also on sockets that are only being opened."""
        with self._lock:
            self._are_cut = True
            for sock in self._sockets:
                _shut_down(sock)


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket.shutdown(), which takes the TLS state away under the thread that uses it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _DeadlineConnection(HTTPConnection):
    """A connection that keeps to the deadline of the call that uses it."""

    state: _State
    sockets: _OpenSockets

    _held: bytes | None = None
    """The headers, once there are some, of a request whose body is still to come; None where nothing is held back."""
    _last_answered = 0.0
    """The moment at which the last answer was waited for."""

    @property
    def is_connected(self) -> bool:
        """Whether urllib3's pool may hand the connection out once more."""
        return time.monotonic() - self._last_answered < _LONGEST_IDLE and super().is_connected

    def connect(self) -> None:
        super().connect()
        self.sockets.add(self.sock)

    def _new_conn(self) -> socket.socket:
        # Every address of a host gets the whole connect_timeout; those of a dead one must not add up.
        host = self._dns_host
        try:
            found = socket.getaddrinfo(host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise NameResolutionError(host, self, error) from error
        except (OSError, UnicodeError):
            return super()._new_conn()
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        try:
            while True:
                self._dns_host = addresses.pop(0)
                try:
                    return super()._new_conn()
                except (ConnectTimeoutError, NewConnectionError):
                    if not addresses or (self.state.deadline is not None and self.state.deadline.passed):
                        raise
        finally:
            self._dns_host = host

    def request(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> None:
        """Send a request; its headers go with the beginning of its body, which saves the server from waking twice."""
        self._held = b"" if isinstance(body, bytes) and body else None
        super().request(method, url, body, *args, **kwargs)

    def send(self, data: Any) -> None:
        held, self._held = self._held, None
        if self.sock is None:
            self.connect()
        if held == b"":
            self._held = data
            return
        for piece in _pieces(held or b"", data):
            self._send_piece(piece)

    def _send_piece(self, piece: bytes | memoryview) -> None:
        deadline = self.state.deadline
        if deadline is None:
            super().send(piece)
            return
        started = time.monotonic()
        set_timeout(self.sock, deadline.remaining())
        super().send(piece)
        deadline.extend(time.monotonic() - started)

    def response_class(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # urllib3 has put the read time-out of this request there, or for a proxy's CONNECT that of connecting.
        seconds = cast(float, self.timeout)
        if self.state.deadline is not None:
            seconds = min(seconds, self.state.deadline.remaining())
        reading = Deadline(seconds)
        self.state.reading = reading
        self._last_answered = time.monotonic()
        source = cast(socket.socket, ReceivingSocket(sock, reading))
        return Response(source, *args, **kwargs)


def _pieces(headers: bytes, data: bytes) -> Iterator[bytes | memoryview]:
    """What is sent at a time; headers go with the beginning of the data, which is not copied but for that."""
    view, begun = memoryview(data), 0
    if headers:
        begun = max(_SEND_BYTES - len(headers), 0)
        yield headers + view[:begun]
    for start in range(begun, len(view), _SEND_BYTES):
        yield view[start : start + _SEND_BYTES]


class _DeadlineTLSConnection(_DeadlineConnection, HTTPSConnection):
    """The same over TLS."""

    def connect(self) -> None:
        super().connect()
        # urllib3 would warn of every request; whoever sets `verify: false` knows, and Synapse's log says so at the start.
        self.is_verified = True


def environment_proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL (`http_proxy`, `https_proxy`, `no_proxy`), or None."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass_environment(parts.netloc):  # type: ignore[attr-defined]
        return None
    proxies = urllib.request.getproxies_environment()
    return proxies.get(parts.scheme) or proxies.get("all")


def _tls_context(verify: bool | os.PathLike[str]) -> ssl.SSLContext:
    """Trust of the configured CA file, of the environment's, or of the system's and certifi's together."""
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    if verify is not True:
        return _trusting(os.fspath(verify), "verify")
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        if bundle := os.environ.get(variable):
            return _trusting(bundle, variable)
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _trusting(bundle: str, source: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        raise SettingsError((source,), f"cannot use {bundle} as CA file: {error.strerror or error}") from error


class Transport(urllib3.PoolManager):
    """Connections to one endpoint, shared by all threads of a backend.

    It is a PoolManager because minio-py asks for one. There is no upper bound on connections, so that a
    reader that stalls keeps nobody waiting; `max_pool_connections` of them are kept for the next request.
    """

    def __init__(self, settings: BucketSettings) -> None:
        super().__init__()
        self._settings = settings
        self._state = _State()
        self._lock = threading.Lock()
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self._pools: dict[str, HTTPConnectionPool] = {}
        self._sockets = _OpenSockets()

    @contextlib.contextmanager
    def call(self, seconds: float | None = None) -> Iterator[Deadline]:
        """Put everything that this thread requests within the block under one deadline.

        Without `seconds` it is the time that the contract promises. A block within another shares its deadline.
        """
        if self._state.deadline is not None:
            yield self._state.deadline
            return
        if seconds is None:
            seconds = self._settings.connect_timeout + self._settings.read_timeout
        deadline = Deadline(seconds)
        self._state.deadline = deadline
        try:
            yield deadline
        finally:
            self._state.deadline = None

    @property
    def reading(self) -> Deadline:
        """The deadline of what is read of this thread's last answer; a reader of its body starts it again."""
        if self._state.reading is None:
            raise RuntimeError("no answer has been read in this thread")
        return self._state.reading

    @property
    def answer(self) -> Answer | None:
        """What this thread's last request was answered; None where no answer came."""
        return self._state.answer

    @property
    def failure(self) -> Answer | None:
        """The answer that made the attempt fail; None where none came.

        An SDK may go on asking after an error, such as for the bucket's region: then the error counts.
        """
        return self._state.answer and (self._state.error or self._state.answer)

    @property
    def credentials_sent(self) -> list[str] | None:
        """What this thread's last request told of its credentials; None where the SDK failed before sending any."""
        if self._state.headers is None:
            return None
        sent: list[str] = []
        for name, value in self._state.headers.items():
            text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
            if name.lower() == "x-amz-security-token":
                sent.append(text)
            elif name.lower() == "authorization":
                sent += re.findall("Credential=([^/]+)/", text)
        return sent

    def forget_answer(self) -> None:
        """Start an attempt."""
        self._state.answer = self._state.error = self._state.headers = None

    def urlopen(self, method: str, url: str, redirect: bool = True, **options: Any) -> BaseHTTPResponse:  # type: ignore[override]
        """Send a request, once; an error's body is read and kept, so that the SDK can read it too."""
        self._state.answer = None
        self._state.headers = options.get("headers") or {}
        deadline = self._state.deadline
        remaining = deadline.remaining() if deadline else self._settings.read_timeout
        options |= {
            "redirect": False,
            "retries": False,
            "assert_same_host": False,
            "decode_content": False,
            "timeout": Timeout(
                connect=min(self._settings.connect_timeout, remaining),
                read=min(self._settings.read_timeout, remaining),
            ),
        }
        preload = options.pop("preload_content", True)
        response = self._send(method, url, preload_content=False, **options)
        if response.status < 300 and not preload:
            self._state.answer = Answer(response.status)
            return response
        # An answer that is cut short is none: what it says of the object might have been about the bucket.
        self._state.answer = _read_answer(response.status, response.data)
        response.release_conn()
        if response.status >= 300:
            self._state.error = self._state.answer
        return response

    def clear(self) -> None:
        """Do nothing: minio-py calls this when one of its clients is collected, whose successor uses the connections."""

    def close(self) -> None:
        """Close all connections for good; requests under way fail at once."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()
        self._sockets.cut()

    def _send(self, method: str, url: str, **options: Any) -> BaseHTTPResponse:
        """Send a request directly to a host that is known already, else in the way that the environment says.

        To look through the environment and to take the address apart takes a third of the time of a small request.
        """
        path = url.find("/", len("https://"))
        pool = self._pools.get(url[:path])
        if pool is not None:
            return pool.urlopen(method, url[path:], **options)
        proxy = environment_proxy(url)
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._open_manager(proxy)
            manager = self._managers[proxy]
        if proxy is None:
            self._pools[url[:path]] = manager.connection_from_url(url)
        return manager.urlopen(method, url, **options)

    def _open_manager(self, proxy: str | None) -> urllib3.PoolManager:
        options: dict[str, Any] = {"maxsize": self._settings.max_pool_connections, "block": False}
        # To read all CAs takes longer than many a run of the command line.
        if self._settings.is_https or (proxy or "").startswith("https:"):
            options["ssl_context"] = _tls_context(self._settings.verify)
            if self._settings.verify is False:
                options["cert_reqs"] = "CERT_NONE"
        manager = urllib3.PoolManager(**options) if proxy is None else _proxy_manager(proxy, options)
        manager.pool_classes_by_scheme = _pool_classes(self._state, self._sockets)
        return manager


def _proxy_manager(proxy: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    headers = None
    if parts.username is not None:
        headers = make_headers(proxy_basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return urllib3.ProxyManager(address, proxy_headers=headers, **options)


def _pool_classes(state: _State, sockets: _OpenSockets) -> dict[str, type[HTTPConnectionPool]]:
    shared = {"state": state, "sockets": sockets}
    plain = type("Connection", (_DeadlineConnection,), shared)
    tls = type("TLSConnection", (_DeadlineTLSConnection,), shared)
    return {
        "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TLSPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
    }


def _read_answer(status: int, body: bytes) -> Answer:
    """An error's code and message; a completion or batch delete may fail with a 200 and an error in the body."""
    error = parse_error(body)
    if error is not None:
        return Answer(status, error.code, error.message)
    return Answer(status, readable=status < 300 or not body.strip())

"""A proxy between Synapse and the bucket that misbehaves when a test tells it to.

The client signs the address that it was given, which is the proxy's, and the request is passed on
as it came, so that the signature stays valid.

A fault is in force within a `with` block; of several, the one that was set last comes first:

    with proxy.cut(at=1 << 20, times=1) as cut:
        ...
        cut.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
_PIECE_BYTES = 64 << 10
_WAIT_SECONDS = 60


@dataclass(frozen=True)
class Request:
    """What the proxy was asked for; names of headers in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def key(self) -> str:
        """The object's key; empty for a request about the bucket, such as a listing."""
        return unquote(urlsplit(self.target).path).lstrip("/").partition("/")[2]

    @property
    def offset(self) -> int:
        """The byte of the object from which on it is asked for."""
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)


Match = Callable[[Request], bool]


def everything(_request: Request) -> bool:
    return True


def gets(request: Request) -> bool:
    """Whether an object is read."""
    return request.method == "GET" and bool(request.key)


def puts(request: Request) -> bool:
    """Whether an object or a part of one is written."""
    return request.method == "PUT" and bool(request.key)


@dataclass
class _Exchange:
    """A request with its body as it came, and the way back."""

    request: Request
    raw: bytes
    client: asyncio.StreamWriter
    from_client: asyncio.StreamReader


@dataclass
class Fault:
    """A way to misbehave, for the requests that it matches."""

    matches: Match
    act: Callable[[FaultProxy, _Exchange, Fault], Awaitable[bool]]
    times: int | None = None
    """How often; for ever without a number."""
    hits: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None

    def takes(self, request: Request) -> bool:
        return (self.times is None or self.hits < self.times) and self.matches(request)

    def wait(self, hits: int = 1) -> None:
        """Wait until the fault has befallen that many requests."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.hits >= hits, _WAIT_SECONDS):
                raise TimeoutError(f"{self.hits} requests came to the fault instead of {hits}")

    def release(self) -> None:
        """Let go on what is held."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.released.set)


class FaultProxy:
    """Listens at `url` on 127.0.0.1, in a thread of its own, and passes requests on to `upstream` (plain http)."""

    def __init__(self, upstream: str) -> None:
        address = urlsplit(upstream)
        if address.scheme != "http" or address.port is None:
            raise ValueError(f"not an http address with a port: {upstream}")
        self._upstream = (str(address.hostname), address.port)
        self._faults: list[Fault] = []
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._in_flight = 0
        self._sent = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE_BYTES, backlog=512), self._loop
        ).result(_WAIT_SECONDS)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and drop all connections."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_WAIT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WAIT_SECONDS)
        self._loop.close()

    # --- what was seen ---

    @property
    def requests(self) -> list[Request]:
        with self._changed:
            return list(self._requests)

    @property
    def in_flight(self) -> int:
        """Requests whose answer has not ended."""
        return self._in_flight

    @property
    def sent(self) -> int:
        """Bytes of answers that the client's side has been given."""
        return self._sent

    def forget(self) -> None:
        """Begin to count anew."""
        with self._changed:
            self._requests.clear()

    def wait_for(self, what: Callable[[list[Request]], bool]) -> None:
        """Wait until the requests that came fulfil a condition."""
        with self._changed:
            if not self._changed.wait_for(lambda: what(self._requests), _WAIT_SECONDS):
                raise TimeoutError(f"after {len(self._requests)} requests")

    def wait_until_idle(self) -> None:
        """Wait until no answer is on its way."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._in_flight == 0, _WAIT_SECONDS):
                raise TimeoutError(f"{self._in_flight} answers have not ended")

    # --- faults ---

    def slow_down(self, matches: Match = everything) -> contextlib.AbstractContextManager[Fault]:
        """Answer 503 SlowDown."""
        return self._in_force(Fault(matches, _slow_down))

    def delay(self, seconds: float, matches: Match = everything) -> contextlib.AbstractContextManager[Fault]:
        """Let every request wait before it is passed on."""

        async def act(_proxy: FaultProxy, _exchange: _Exchange, _fault: Fault) -> bool:
            await asyncio.sleep(seconds)
            return False

        return self._in_force(Fault(matches, act))

    def hold(self, matches: Match = everything, times: int | None = None) -> contextlib.AbstractContextManager[Fault]:
        """Let requests wait until `release`, or until their client gives them up."""
        return self._in_force(Fault(matches, _hold, times))

    def cut(self, at: int, matches: Match = gets, times: int | None = None) -> contextlib.AbstractContextManager[Fault]:
        """Break answers off at that byte of the object, wherever they begin, without a word in their headers."""

        async def act(proxy: FaultProxy, exchange: _Exchange, _fault: Fault) -> bool:
            await proxy.pass_on(exchange, limit=max(at - exchange.request.offset, 0))
            return True

        return self._in_force(Fault(matches, act, times))

    def drop(self, matches: Match = everything, times: int | None = None) -> contextlib.AbstractContextManager[Fault]:
        """Reset the connection instead of answering."""

        async def act(_proxy: FaultProxy, exchange: _Exchange, _fault: Fault) -> bool:
            exchange.client.transport.abort()
            return True

        return self._in_force(Fault(matches, act, times))

    @contextlib.contextmanager
    def _in_force(self, fault: Fault) -> Iterator[Fault]:
        fault.loop = self._loop
        self._faults.insert(0, fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)
            fault.release()

    # --- in the thread ---

    async def pass_on(self, exchange: _Exchange, limit: int | None = None) -> bool:
        """Send the request to the bucket and its answer back, the body up to `limit`; tells whether to go on."""
        from_server, to_server = await asyncio.open_connection(*self._upstream, limit=_PIECE_BYTES)
        try:
            to_server.write(exchange.raw)
            await to_server.drain()
            head = await from_server.readuntil(b"\r\n\r\n")
            first, headers = _parse_head(head)
            exchange.client.write(head)
            left = limit
            async for piece in _body(from_server, exchange.request.method, first, headers):
                if left is not None:
                    piece, left = piece[:left], left - len(piece)
                exchange.client.write(piece)
                await exchange.client.drain()
                self._sent += len(piece)
                if left is not None and left <= 0:
                    return False
            await exchange.client.drain()
            return headers.get("connection", "").lower() != "close" and not first.startswith("HTTP/1.0")
        finally:
            to_server.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            goes_on = True
            while goes_on and (exchange := await _next_exchange(reader, writer)) is not None:
                self._count(exchange.request, +1)
                try:
                    goes_on = await self._answer(exchange)
                finally:
                    self._count(exchange.request, -1)
            # What was written reaches the client, and then the end of the connection.
            writer.close()
        except (OSError, EOFError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            if task is not None:
                self._tasks.discard(task)

    async def _answer(self, exchange: _Exchange) -> bool:
        for fault in list(self._faults):
            if fault.takes(exchange.request):
                with fault.changed:
                    fault.hits += 1
                    fault.changed.notify_all()
                if await fault.act(self, exchange, fault):
                    return False
                break
        return await self.pass_on(exchange)

    def _count(self, request: Request, step: int) -> None:
        with self._changed:
            if step > 0:
                self._requests.append(request)
            self._in_flight += step
            self._changed.notify_all()

    async def _close(self) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Transports that were aborted close at the loop's next turn.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def _slow_down(_proxy: FaultProxy, exchange: _Exchange, _fault: Fault) -> bool:
    body = b"" if exchange.request.method == "HEAD" else _SLOW_DOWN
    exchange.client.write(
        b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    await exchange.client.drain()
    return True


async def _hold(_proxy: FaultProxy, exchange: _Exchange, fault: Fault) -> bool:
    # A client sends nothing before it has its answer: what can be read is the end of the connection.
    gone = asyncio.ensure_future(exchange.from_client.read(1))
    released = asyncio.ensure_future(fault.released.wait())
    try:
        await asyncio.wait((gone, released), return_when=asyncio.FIRST_COMPLETED)
        return gone.done()
    finally:
        for waiting in (gone, released):
            waiting.cancel()
        await asyncio.gather(gone, released, return_exceptions=True)


async def _next_exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Exchange | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, headers = _parse_head(head)
    method, target, _ = first.split(" ", 2)
    if headers.get("expect") == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return _Exchange(Request(method, target, headers), head + body, writer, reader)


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first, {name.lower(): value.strip() for name, _, value in pairs}


async def _body(
    reader: asyncio.StreamReader, method: str, first: str, headers: Mapping[str, str]
) -> AsyncIterator[bytes]:
    """The body of an answer as it comes, chunk lines included."""
    if method == "HEAD" or first.split(" ")[1] in ("204", "304"):
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        size = None
        while size != 0:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left is None or left > 0:
        piece = await reader.read(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES))
        if not piece:
            return
        left = None if left is None else left - len(piece)
        yield piece

"""A proxy that makes a server near by look far away: every request waits before it is passed on.

It does not read what passes. HTTP/1.1 clients send a request only when the answer to the one before has
come, so the first bytes from a client after bytes from the server are a new request; and bytes are passed
on as they come, at little cost whatever the size. The connection itself, and the "100 Continue" that some
clients wait for before they send a body, cost nothing more.
"""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

_PATIENCE = 60
_INTERIM = b"HTTP/1.1 100 "

# What is held of a body while its request waits.
_MOST_HELD = 1 << 20


class DelayingProxy:
    """Listens at `url` on 127.0.0.1, in a thread of its own; `upstream` is plain http."""

    def __init__(self, upstream: str, seconds: float) -> None:
        address = urlsplit(upstream)
        if address.scheme != "http" or address.port is None:
            raise ValueError(f"not an http address with a port: {upstream}")
        self.address = (str(address.hostname), address.port)
        self.seconds = seconds
        self.requests = 0
        self.loop = asyncio.new_event_loop()
        self.open: set[asyncio.Transport] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="delaying-proxy", daemon=True)
        self._thread.start()
        listening = self.loop.create_server(lambda: _ClientSide(self), "127.0.0.1", 0, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(listening, self.loop).result(_PATIENCE)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> DelayingProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(_PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_PATIENCE)
        self.loop.close()

    async def _close(self) -> None:
        self._server.close()
        for transport in list(self.open):
            transport.abort()
        # What was aborted closes at the loop's next turn.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


class _Side(asyncio.Protocol):
    """One end of a connection; holds the other one back when its own client or server reads slowly."""

    other: _Side | None = None
    transport: asyncio.Transport

    def __init__(self, proxy: DelayingProxy) -> None:
        self.proxy = proxy

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.proxy.open.add(self.transport)

    def connection_lost(self, _reason: Exception | None) -> None:
        self.proxy.open.discard(self.transport)
        if self.other is not None:
            self.other.transport.close()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.transport.resume_reading()


class _ClientSide(_Side):
    """Where requests come from."""

    def __init__(self, proxy: DelayingProxy) -> None:
        super().__init__(proxy)
        self._held = bytearray()
        self._waits = True
        self._is_idle = True
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = self.proxy.loop.create_task(self._connect())

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._is_idle = False
            self._waits = True
            self.proxy.requests += 1
            self.proxy.loop.call_later(self.proxy.seconds, self._pass_on)
        if self._waits or self.other is None:
            self._held += data
            if len(self._held) > _MOST_HELD:
                self.transport.pause_reading()
        else:
            self.other.transport.write(data)

    def answered(self, data: bytes) -> None:
        """The server has sent this, which is at least the beginning of an answer."""
        self._is_idle = True
        self.transport.write(data)

    def _pass_on(self) -> None:
        if self.transport.is_closing():
            return
        if self.other is None:
            # Still connecting, which takes no time worth telling.
            self.proxy.loop.call_later(0.001, self._pass_on)
            return
        self._waits = False
        self.transport.resume_reading()
        self.other.transport.write(bytes(self._held))
        self._held.clear()

    async def _connect(self) -> None:
        try:
            _, self.other = await self.proxy.loop.create_connection(
                lambda: _ServerSide(self.proxy, self), *self.proxy.address
            )
        except OSError:
            self.transport.abort()
            return
        if self.transport.is_closing():
            self.other.transport.close()


class _ServerSide(_Side):
    """Where answers come from."""

    def __init__(self, proxy: DelayingProxy, client: _ClientSide) -> None:
        super().__init__(proxy)
        self.other = client
        self._client = client

    def data_received(self, data: bytes) -> None:
        is_interim_alone = data.startswith(_INTERIM) and not data.partition(b"\r\n\r\n")[2]
        if is_interim_alone:
            self._client.transport.write(data)
        else:
            self._client.answered(data)

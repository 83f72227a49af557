"""The server behind the proxy seems far away for every request, and once for each."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.backends.scripted_server import PATIENCE, Exchange, ScriptedServer, from_request, reply
from tests.bench.delaying_proxy import DelayingProxy

SECONDS = 0.05
BODY = bytes(range(256)) * (8 << 12)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer([from_request(lambda request: reply(200, request.body))]) as server:
        yield server


@pytest.fixture
def proxy(server: ScriptedServer) -> Iterator[DelayingProxy]:
    with DelayingProxy(server.endpoint, SECONDS) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: DelayingProxy) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=PATIENCE)) as client:
        yield client


def test_every_request_of_a_connection_waits(proxy: DelayingProxy, client: http.client.HTTPConnection) -> None:
    begun = time.monotonic()
    for number in range(4):
        client.request("PUT", f"/{number}", b"body")
        assert client.getresponse().read() == b"body"

    assert proxy.requests == 4
    assert time.monotonic() - begun >= 4 * SECONDS


def test_large_bodies_pass_whole_both_ways(proxy: DelayingProxy, client: http.client.HTTPConnection) -> None:
    client.request("PUT", "/large", BODY)

    assert client.getresponse().read() == BODY
    assert proxy.requests == 1


def test_body_that_waits_for_100_continue_is_no_request_of_its_own() -> None:
    def behave(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        exchange.read_body()
        exchange.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    head = b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    with ScriptedServer([behave]) as server, DelayingProxy(server.endpoint, SECONDS) as proxy, connect(proxy) as client:
        for _ in range(2):
            client.sendall(head)
            assert receive_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"body")
            assert receive_until(client, b"\r\n\r\n") == b"HTTP/1.1 204 No Content\r\n\r\n"

        assert proxy.requests == 2
    assert [request.body for request in server.requests] == [b"body", b"body"]


def test_connection_that_the_server_closes_ends_for_the_client() -> None:
    script = [reply(200, b"last", close=True)]
    with ScriptedServer(script) as server, DelayingProxy(server.endpoint, 0) as proxy, connect(proxy) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")

        assert receive_until(client, b"").endswith(b"\r\n\r\nlast")


def connect(proxy: DelayingProxy) -> socket.socket:
    address = urlsplit(proxy.url)
    return socket.create_connection((address.hostname or "", address.port or 0), PATIENCE)


def receive_until(client: socket.socket, end: bytes) -> bytes:
    """What comes until it ends so, or until the connection ends where `end` is empty."""
    data = b""
    while not (end and data.endswith(end)) and (more := client.recv(1 << 16)):
        data += more
    return data

"""What the environment says of proxies, certificates and the region, for both SDKs, and the time that a call may take."""

from __future__ import annotations

import base64
import io
import socket
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from urllib3.exceptions import InsecureRequestWarning

from backends import BACKENDS, BucketSettings, open_backend
from backends.base import Backend
from backends.errors import BackendUnavailable, Misconfigured
from backends.transport import _DeadlineConnection, environment_proxy
from tests.backends.contract import assert_kept_secret
from tests.backends.scripted_server import Behaviour, Exchange, ScriptedServer, reply, tunnel
from tests.servers.tls import Certificates

# A name that resolves nowhere: whoever answers for it is the proxy.
NOWHERE = "bucket.invalid"
EMPTY_LISTING = reply(200, "<ListBucketResult/>")
STORED = reply(200, b"", {"ETag": '"0123"'})


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.create(tmp_path_factory.mktemp("certificates") / "tls")


@pytest.fixture
def tls(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.certificate_file, certificates.key_file)
    return context


@pytest.fixture(params=list(BACKENDS))
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(endpoint: str, **settings: Any) -> Backend:
        values: dict[str, Any] = {
            "backend": request.param,
            "bucket": "bucket",
            "endpoint_url": endpoint,
            "access_key_id": "key-of-someone",
            "secret_access_key": "secret-of-someone",
            "addressing_style": "path",
            "max_attempts": 1,
        }
        made.append(open_backend(BucketSettings.parse(values | settings)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


# --- the region ---


@pytest.mark.parametrize(
    ("environment", "settings", "region"),
    [
        ({}, {}, "us-east-1"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": ""}, {}, "us-east-1"),
        ({"AWS_DEFAULT_REGION": "fr-par"}, {}, "fr-par"),
        ({"AWS_DEFAULT_REGION": "fr-par", "AWS_REGION": "nl-ams"}, {}, "nl-ams"),
        ({"AWS_DEFAULT_REGION": "fr-par", "AWS_REGION": "nl-ams"}, {"region_name": "pl-waw"}, "pl-waw"),
    ],
)
def test_region_outside_aws_is_the_configured_one_or_that_of_the_environment(
    make: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    settings: dict[str, str],
    region: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ScriptedServer([EMPTY_LISTING, STORED]) as server:
        backend = make(server.endpoint, **settings)
        backend.check()
        backend.put("key", io.BytesIO(b"body"), 4)
    # Credential=access key/date/region/service/aws4_request
    scopes = [request.headers["Authorization"].partition(",")[0].split("/") for request in server.requests]
    assert [scope[2] for scope in scopes] == [region, region]


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_a_region_of_the_environment_that_is_none_is_told_as_such(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "eu west/7")
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(Misconfigured, match=f"{variable}: 'eu west/7' is not the name of a region"):
            make(server.endpoint).check()
        assert server.requests == []


def test_a_region_that_boto3_does_not_take_is_told_as_such() -> None:
    settings = {"bucket": "media", "backend": "boto3", "region_name": "eu_west", "endpoint_url": "http://127.0.0.1:1"}
    keys = {"access_key_id": "key-of-someone", "secret_access_key": "secret-of-someone"}
    with pytest.raises(Misconfigured, match=r"region_name: .*'eu_west'"):
        open_backend(BucketSettings.parse(settings | keys)).check()


# --- proxies ---


def test_http_goes_through_the_proxy_of_the_environment(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer([EMPTY_LISTING, STORED]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        backend = make(f"http://{NOWHERE}:9000")
        backend.check()
        backend.put("key", io.BytesIO(b"content"), 7)
        listing, upload = proxy.requests
        assert listing.target.startswith(f"http://{NOWHERE}:9000/bucket?")
        assert (upload.method, upload.target) == ("PUT", f"http://{NOWHERE}:9000/bucket/key")
        assert upload.headers["Host"] == f"{NOWHERE}:9000"
        assert "Proxy-Authorization" not in upload.headers


def test_the_proxy_gets_the_credentials_of_its_url(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer([EMPTY_LISTING]) as proxy:
        monkeypatch.setenv("http_proxy", f"http://some%40one:pass%3Aword@127.0.0.1:{proxy.port}")
        make(f"http://{NOWHERE}").check()
        expected = base64.b64encode(b"some@one:pass:word").decode()
        assert proxy.requests[0].headers["Proxy-Authorization"] == f"Basic {expected}"


@pytest.mark.parametrize("credentials", ["", "someone:password@"], ids=["without credentials", "with credentials"])
def test_https_goes_through_a_tunnel(
    make: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
    tls: ssl.SSLContext,
    credentials: str,
) -> None:
    # "localhost" is in the certificate, and the tunnel's end is chosen by the proxy.
    with ScriptedServer([EMPTY_LISTING, STORED], tls=tls) as server, ScriptedServer([tunnel(server.port)]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{credentials}127.0.0.1:{proxy.port}")
        backend = make("https://localhost:4433", verify=certificates.ca_file)
        backend.check()
        backend.put("key", io.BytesIO(b"content"), 7)
        (connect,) = proxy.requests
        assert (connect.method, connect.target) == ("CONNECT", "localhost:4433")
        assert [request.method for request in server.requests] == ["GET", "PUT"]
        assert all("Proxy-Authorization" not in request.headers for request in server.requests)
        expected = f"Basic {base64.b64encode(credentials[:-1].encode()).decode()}" if credentials else None
        assert connect.headers["Proxy-Authorization"] == expected


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "other.example.com, 127.0.0.1", "*"])
def test_no_proxy_is_obeyed(make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, no_proxy: str) -> None:
    with ScriptedServer([EMPTY_LISTING]) as server, ScriptedServer([reply(502)]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        monkeypatch.setenv("no_proxy", no_proxy)
        make(server.endpoint).check()
        assert len(server.requests) == 1
        assert proxy.requests == []


@pytest.mark.parametrize(
    ("endpoint", "refusal"),
    [
        (f"http://{NOWHERE}", reply(407, "<html>who are you?</html>")),
        (f"http://{NOWHERE}", reply(502, "<html>who is that?</html>")),
        (f"https://{NOWHERE}", reply(407)),
        (f"https://{NOWHERE}", lambda exchange: exchange.close()),
    ],
    ids=["407", "502", "407 to a tunnel", "a tunnel that is closed"],
)
def test_a_proxy_that_refuses_is_a_temporary_fault(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, endpoint: str, refusal: Behaviour
) -> None:
    with ScriptedServer([refusal]) as proxy:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://someone:password@127.0.0.1:{proxy.port}")
        with pytest.raises(BackendUnavailable) as caught:
            make(endpoint).check()
        assert_kept_secret(caught.value, "password", "c29tZW9uZTpwYXNzd29yZA==", "secret-of-someone")
        assert len(proxy.requests) == 1


def test_a_proxy_that_hangs_does_not_hold_up_for_long(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(exchange: Any) -> None:
        exchange.wait_until_gone()
        exchange.close()

    with ScriptedServer([hang]) as proxy:
        monkeypatch.setenv("https_proxy", proxy.endpoint)
        # Were it to wait for read_timeout, the test would not end.
        with pytest.raises(BackendUnavailable):
            make(f"https://{NOWHERE}", connect_timeout=0.5, read_timeout=3600).check()
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, "http://a", None),
        ({"http_proxy": "http://p:1"}, "http://a", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "https://a", None),
        ({"HTTPS_PROXY": "http://p:1"}, "https://a", "http://p:1"),
        ({"all_proxy": "http://p:1"}, "https://a", "http://p:1"),
        ({"all_proxy": "http://p:1", "https_proxy": "http://p:2"}, "https://a", "http://p:2"),
        ({"https_proxy": "http://p:1", "no_proxy": ".example.com"}, "https://s3.example.com:9000/b", None),
        ({"https_proxy": "http://p:1", "no_proxy": "example.com:9000"}, "https://example.com:9000/b", None),
        ({"https_proxy": "http://p:1", "no_proxy": "ple.com"}, "https://example.com", "http://p:1"),
    ],
)
def test_the_proxy_for_a_url(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment_proxy(url) == proxy


# --- certificates ---


def test_a_private_ca_is_unknown_at_first(make: Callable[..., Backend], tls: ssl.SSLContext) -> None:
    with ScriptedServer([EMPTY_LISTING], tls=tls) as server:
        with pytest.raises(BackendUnavailable, match="certificate verify failed"):
            make(server.endpoint).check()
        assert server.requests == []


def test_verify_names_a_private_ca(
    make: Callable[..., Backend], tls: ssl.SSLContext, certificates: Certificates
) -> None:
    with ScriptedServer([EMPTY_LISTING], tls=tls) as server:
        make(server.endpoint, verify=certificates.ca_file).check()


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_the_environment_names_a_private_ca(
    make: Callable[..., Backend],
    tls: ssl.SSLContext,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, str(certificates.ca_file))
    with ScriptedServer([EMPTY_LISTING], tls=tls) as server:
        make(server.endpoint).check()


def test_verify_false_takes_any_certificate_without_a_warning_for_each_request(
    make: Callable[..., Backend], tls: ssl.SSLContext, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    with ScriptedServer([EMPTY_LISTING], tls=tls) as server:
        backend = make(server.endpoint, verify=False)
        backend.check()
        backend.check()
    assert [warning for warning in recwarn if issubclass(warning.category, InsecureRequestWarning)] == []


def test_the_warnings_of_others_about_certificates_stay(tls: ssl.SSLContext) -> None:
    with (
        ScriptedServer([EMPTY_LISTING], tls=tls) as server,
        urllib3.PoolManager(cert_reqs="CERT_NONE") as others,
        pytest.warns(InsecureRequestWarning),
    ):
        others.request("GET", server.endpoint)


def test_a_certificate_for_another_host_is_refused(
    make: Callable[..., Backend],
    tls: ssl.SSLContext,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with ScriptedServer([EMPTY_LISTING], tls=tls) as server:
        with pytest.raises(BackendUnavailable, match="certificate verify failed"):
            make(f"https://other.example.com:{server.port}", verify=certificates.ca_file).check()
        assert server.requests == []


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["absent", "no certificate"])
def test_an_unusable_ca_file_is_told_with_its_setting(
    make: Callable[..., Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Misconfigured, match=r"verify: cannot use .*ca\.pem as CA file") as caught:
        make("https://127.0.0.1:1", verify=str(path)).check()
    assert not caught.value.retryable
    monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
    with pytest.raises(Misconfigured, match=r"AWS_CA_BUNDLE: cannot use .*ca\.pem as CA file"):
        make("https://127.0.0.1:1").check()


# --- time ---


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("backends.transport.time.monotonic", lambda: self.now)


def test_the_addresses_of_a_dead_host_do_not_add_up(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 has eight addresses; 5 s for each, three times over, would be two minutes."""
    backend = make("http://dead.example.com", max_attempts=3)
    clock = Clock(monkeypatch)
    started = clock.now
    tried: list[str] = []

    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        hosts = [f"192.0.2.{number}" for number in range(20)] if host == "dead.example.com" else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    def connect(sock: socket.socket, address: tuple[str, int]) -> None:
        tried.append(address[0])
        clock.now += sock.gettimeout() or 0
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(BackendUnavailable):
        backend.check()
    assert clock.now - started <= 35
    assert tried == [f"192.0.2.{number}" for number in range(7)]


def test_connecting_counts_to_the_time_of_a_call(make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    really_connect, really_send = socket.socket.connect, _DeadlineConnection.send
    # The time that sending takes does not count, so none passes before it is over.
    sent = threading.Semaphore(0)

    def connect(sock: socket.socket, address: Any) -> None:
        clock.now += 4
        really_connect(sock, address)

    def send(connection: _DeadlineConnection, data: Any) -> None:
        really_send(connection, data)
        sent.release()

    monkeypatch.setattr(_DeadlineConnection, "send", send)

    def slow_refusal(exchange: Exchange) -> None:
        sent.acquire()
        clock.now += 26
        reply(503, close=True)(exchange)

    def slower_still(exchange: Exchange) -> None:
        sent.acquire()
        # 30 s are over, and 4 s of connecting.
        clock.now += 2
        exchange.send(b"HTTP/1.1 200 OK\r\n")
        if not exchange.wait_until_gone(10):
            exchange.send(b"Content-Length: 19\r\n\r\n<ListBucketResult/>")

    with ScriptedServer([slow_refusal, slower_still]) as server:
        backend = make(server.endpoint, max_attempts=3)
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr("backends.calls.random.uniform", lambda shortest, longest: 0)
        with pytest.raises(BackendUnavailable):
            backend.check()
        assert len(server.requests) == 2


def test_the_next_address_is_tried_where_one_is_dead(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        # Nobody listens on the first one.
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "two.example.com" else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with ScriptedServer([EMPTY_LISTING]) as server:
        make(f"http://two.example.com:{server.port}").check()
        assert server.requests[0].headers["Host"] == f"two.example.com:{server.port}"


def test_a_host_that_has_no_address_is_a_temporary_fault(make: Callable[..., Backend]) -> None:
    with pytest.raises(BackendUnavailable):
        make(f"http://{NOWHERE}").check()


# --- connections ---


def test_a_connection_is_used_again(make: Callable[..., Backend]) -> None:
    with ScriptedServer([EMPTY_LISTING]) as server:
        backend = make(server.endpoint)
        for _ in range(5):
            backend.check()
        assert server.connections == 1
        backend.close()
        server.wait_for(lambda server: server.connections == 0)


def test_a_connection_that_the_server_has_closed_meanwhile_costs_no_attempt(make: Callable[..., Backend]) -> None:
    def answer_and_close(exchange: Any) -> None:
        EMPTY_LISTING(exchange)
        exchange.close()

    with ScriptedServer([answer_and_close, EMPTY_LISTING]) as server:
        backend = make(server.endpoint)
        backend.check()
        server.wait_for(lambda server: server.connections == 0)
        backend.check()
        assert len(server.requests) == 2


@pytest.mark.parametrize(("idle", "connections"), [(59, 1), (61, 2)])
def test_a_connection_that_was_idle_for_long_is_not_used_again(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, idle: int, connections: int
) -> None:
    """A firewall may have forgotten it, which shows only when the time for an answer is over."""
    clock = Clock(monkeypatch)
    used: list[socket.socket] = []

    def answer(exchange: Exchange) -> None:
        used.append(exchange.connection)
        EMPTY_LISTING(exchange)

    with ScriptedServer([answer]) as server:
        backend = make(server.endpoint)
        backend.check()
        clock.now += idle
        backend.check()
        assert len(set(used)) == connections
        # What was idle has been closed.
        server.wait_for(lambda server: server.connections == 1)

"""Credentials out of files, and out of the environment."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3

from backends import BACKENDS, BucketSettings, open_backend
from backends.base import Backend
from backends.credentials import AccessKey, CredentialSource
from backends.errors import AccessDenied, Misconfigured, SettingsError
from tests.backends.contract import assert_kept_secret
from tests.backends.no_credentials import no_credentials
from tests.backends.scripted_server import PATIENCE, Behaviour, Request, ScriptedServer, error, from_request, reply

EXPIRED = ["ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
EMPTY_LISTING = reply(200, "<ListBucketResult/>")


class Files:
    """The three files, as something else renews them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.write("one")

    def write(self, which: str) -> None:
        for name in ("access_key_id", "secret_access_key", "session_token"):
            (self._directory / name).write_text(f"{name}-{which}\n")

    @property
    def settings(self) -> dict[str, str]:
        return {
            f"{name}_path": str(self._directory / name)
            for name in ("access_key_id", "secret_access_key", "session_token")
        }


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(params=list(BACKENDS))
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(server: ScriptedServer, **settings: Any) -> Backend:
        values = {"bucket": "bucket", "backend": request.param, "endpoint_url": server.endpoint}
        # A busy machine may be slow.
        values |= {"connect_timeout": 20, "read_timeout": 60, **settings}
        made.append(open_backend(BucketSettings.parse(values)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def signed_by(request: Request) -> tuple[str, str]:
    """The access key id and the session token of a request."""
    key = request.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
    return key, request.headers["x-amz-security-token"]


def expiring(files: Files, code: str) -> Behaviour:
    """Find the first credentials expired, which are renewed at that moment."""

    def answer(request: Request) -> Behaviour:
        if signed_by(request)[0] == "access_key_id-one":
            files.write("two")
            return error(403, code)
        return EMPTY_LISTING

    return from_request(answer)


@pytest.mark.parametrize("code", EXPIRED)
def test_files_are_read_again_when_the_credentials_have_expired(
    make: Callable[..., Backend], files: Files, code: str
) -> None:
    with ScriptedServer([expiring(files, code)]) as server:
        # Reading them again is no attempt of its own.
        backend = make(server, **files.settings, max_attempts=1)
        backend.check()
        assert [signed_by(request) for request in server.requests] == [
            ("access_key_id-one", "session_token-one"),
            ("access_key_id-two", "session_token-two"),
        ]
        backend.check()
        assert signed_by(server.requests[2])[0] == "access_key_id-two"


def test_the_client_that_had_the_old_credentials_takes_no_connection_with_it(
    make: Callable[..., Backend], files: Files
) -> None:
    with ScriptedServer([expiring(files, "ExpiredToken")]) as server:
        backend = make(server, **files.settings, max_attempts=1)
        backend.check()
        # minio-py's clients have a finalizer.
        gc.collect()
        backend.check()
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_head_whose_answer_cannot_say_so_notices_renewed_files_too(
    make: Callable[..., Backend], files: Files, status: int
) -> None:
    def answer(request: Request) -> Behaviour:
        if signed_by(request)[0] == "access_key_id-one":
            files.write("two")
            return reply(status)
        return reply(200, b"content", {"ETag": '"0123"'})

    with ScriptedServer([from_request(answer)]) as server:
        backend = make(server, **files.settings, max_attempts=1)
        assert backend.stat("key").size == 7
        assert len(server.requests) == 2


@pytest.mark.parametrize("refusal", [reply(403), error(403, "ExpiredToken")], ids=["without a code", "with a code"])
def test_a_refusal_costs_one_request_while_the_files_say_the_same(
    make: Callable[..., Backend], files: Files, refusal: Behaviour
) -> None:
    with ScriptedServer([refusal]) as server:
        with pytest.raises(AccessDenied):
            make(server, **files.settings).stat("key")
        assert len(server.requests) == 1


def test_credentials_that_another_call_has_renewed_are_used_by_all(make: Callable[..., Backend], files: Files) -> None:
    both_are_refused = threading.Barrier(2, timeout=PATIENCE)

    def answer(request: Request) -> Behaviour:
        if signed_by(request)[0] == "access_key_id-one":
            files.write("two")
            both_are_refused.wait()
            return error(403, "ExpiredToken")
        return EMPTY_LISTING

    with ScriptedServer([from_request(answer)]) as server, ThreadPoolExecutor(2) as threads:
        backend = make(server, **files.settings, max_attempts=1)
        for call in [threads.submit(backend.check) for _ in range(2)]:
            call.result(PATIENCE)
        assert len(server.requests) == 4


def test_files_are_read_again_once_per_call(make: Callable[..., Backend], files: Files) -> None:
    renewals = map(str, itertools.count())

    def answer(_: Request) -> Behaviour:
        files.write(next(renewals))
        return error(400, "ExpiredToken")

    with ScriptedServer([from_request(answer)]) as server:
        backend = make(server, **files.settings)
        for calls in (1, 2):
            with pytest.raises(AccessDenied) as caught:
                backend.check()
            assert caught.value.code == "ExpiredToken"
            assert len(server.requests) == 2 * calls


def test_nothing_is_tried_again_where_there_is_no_file(make: Callable[..., Backend]) -> None:
    with ScriptedServer([error(403, "ExpiredToken")]) as server:
        backend = make(server, access_key_id="key-of-someone", secret_access_key="secret-of-someone")
        with pytest.raises(AccessDenied):
            backend.check()
        assert len(server.requests) == 1


def test_a_refusal_that_is_not_about_expiry_does_not_read_files_again(
    make: Callable[..., Backend], files: Files
) -> None:
    with ScriptedServer([error(403, "AccessDenied")]) as server:
        with pytest.raises(AccessDenied):
            make(server, **files.settings).check()
        assert len(server.requests) == 1


def test_a_file_that_is_gone_is_told_with_its_setting(
    make: Callable[..., Backend], files: Files, tmp_path: Path
) -> None:
    (tmp_path / "secret_access_key").unlink()
    with ScriptedServer([EMPTY_LISTING]) as server:
        backend = make(server, **files.settings)
        with pytest.raises(Misconfigured, match=r"secret_access_key_path: cannot read .*: No such file") as caught:
            backend.check()
        assert isinstance(caught.value.__cause__, SettingsError)
        assert server.requests == []
        # Not remembered: it may come back.
        files.write("one")
        backend.check()


@pytest.mark.parametrize("content", [b"secret-of-\nsomeone-else", b"secret-of-someone-else\xff"])
def test_a_file_that_holds_no_credential_is_told_with_its_setting(
    make: Callable[..., Backend], files: Files, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "session_token").write_bytes(content)
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(Misconfigured, match=r"session_token_path: what .* holds must be printable") as caught:
            make(server, **files.settings).check()
        assert_kept_secret(caught.value, "secret-of-", "someone-else")
        assert server.requests == []


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_credentials_of_the_environment_that_cannot_be_sent_are_told_as_such(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    no_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-environment")
    monkeypatch.setenv(variable, "begin-of-'a\\secret\nend-of-it\n")
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(Misconfigured, match="white space, a line break") as caught:
            make(server).check()
        assert_kept_secret(caught.value, "begin-of", "secret", "end-of-it")
        assert server.requests == []


def test_no_credentials_at_all_are_told_with_the_remedy(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_credentials(monkeypatch, tmp_path)
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(AccessDenied, match="set access_key_id and secret_access_key, or AWS_ACCESS_KEY_ID"):
            make(server).check()
        assert server.requests == []


def test_an_unusable_profile_is_a_backend_error(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_credentials(monkeypatch, tmp_path)
    (tmp_path / "config").write_text("[profile x]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = absent\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "x")
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(AccessDenied):
            make(server).check()
        assert server.requests == []


@pytest.mark.parametrize(
    "line", ["aws_secret_access_key secret-of-the-file", "aws_secret_access_key = 100%secret-of-the-file"]
)
def test_a_file_of_credentials_that_cannot_be_read_is_told_without_what_it_holds(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    no_credentials(monkeypatch, tmp_path)
    (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = key-of-the-file\n{line}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with ScriptedServer([error(403, "AccessDenied")]) as server:
        with pytest.raises(AccessDenied) as caught:
            make(server).check()
        assert_kept_secret(caught.value, "secret-of-the-file")


@pytest.fixture
def service_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The token that the pods of a Kubernetes service account get; returns it."""
    no_credentials(monkeypatch, tmp_path)
    (tmp_path / "token").write_text("token-of-the-account")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/x")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    return "token-of-the-account"


def test_the_token_of_a_service_account_is_kept_secret_where_sts_is_out_of_reach(
    make: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    service_account: str,
) -> None:
    found = socket.getaddrinfo

    def nobody_listens_at_sts(host: str | bytes | None, port: Any, *arguments: Any, **options: Any) -> Any:
        there = ("127.0.0.1", 1) if str(host).startswith("sts.") else (host, port)
        return found(*there, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", nobody_listens_at_sts)
    caplog.set_level(logging.DEBUG)
    with ScriptedServer([EMPTY_LISTING]) as server:
        with pytest.raises(AccessDenied, match="no usable credentials") as caught:
            make(server).check()
        assert_kept_secret(caught.value, service_account)
        assert server.requests == []
    assert service_account not in caplog.text


def test_minio_exchanges_the_token_of_a_service_account_outside_the_url(
    monkeypatch: pytest.MonkeyPatch, service_account: str
) -> None:
    asked: list[tuple[str, str, Any]] = []
    really = urllib3.PoolManager.urlopen

    def urlopen(
        pool: urllib3.PoolManager, method: str, url: str, redirect: bool = True, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        if "amazonaws.com" not in url:
            return really(pool, method, url, redirect, **options)
        asked.append((method, url, options["body"]))
        assert options["headers"] == {"Content-Type": "application/x-www-form-urlencoded"}
        return urllib3.HTTPResponse(
            b"<R xmlns='https://sts.amazonaws.com/doc/2011-06-15/'><AssumeRoleWithWebIdentityResult><Credentials>"
            b"<AccessKeyId>key-of-the-role</AccessKeyId><SecretAccessKey>secret-of-the-role</SecretAccessKey>"
            b"<SessionToken>token-of-the-role</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>"
            b"</Credentials></AssumeRoleWithWebIdentityResult></R>",
            status=200,
        )

    with ScriptedServer([EMPTY_LISTING]) as server:
        values = {"bucket": "bucket", "backend": "minio", "endpoint_url": server.endpoint}
        with contextlib.closing(open_backend(BucketSettings.parse(values))) as backend:
            monkeypatch.setattr(urllib3.PoolManager, "urlopen", urlopen)
            backend.check()
        assert signed_by(server.requests[0]) == ("key-of-the-role", "token-of-the-role")
    ((method, url, form),) = asked
    assert (method, url) == ("POST", "https://sts.eu-central-1.amazonaws.com")
    assert f"WebIdentityToken={service_account}" in form and "RoleArn=" in form


@pytest.mark.parametrize(
    "printed",
    [
        "this is no JSON",
        '{"Version": 1, "AccessKeyId": "key-of-it", "SecretAccessKey": "secret-of-it", "SessionToken": "token-of-it", '
        '"Expiration": "2001-01-01T00:00:00Z"}',
    ],
    ids=["nothing usable", "expired"],
)
def test_a_process_that_gives_no_usable_credentials_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str
) -> None:
    no_credentials(monkeypatch, tmp_path)
    (tmp_path / "printed").write_text(printed)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/printed\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with ScriptedServer([EMPTY_LISTING]) as server:
        values = {"bucket": "bucket", "backend": "boto3", "endpoint_url": server.endpoint}
        with (
            contextlib.closing(open_backend(BucketSettings.parse(values))) as backend,
            pytest.raises(AccessDenied, match="no usable credentials") as caught,
        ):
            backend.check()
        assert_kept_secret(caught.value, "secret-of-it", "token-of-it")
        assert server.requests == []


def test_credentials_from_the_environment_are_used_and_kept_secret(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-environment")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-environment")

    def echo(request: Request) -> Behaviour:
        return error(403, "AccessDenied", str(request.headers.items()))

    with ScriptedServer([from_request(echo)]) as server:
        with pytest.raises(AccessDenied) as caught:
            make(server).check()
        assert signed_by(server.requests[0]) == ("key-of-the-environment", "token-of-the-environment")
        assert_kept_secret(caught.value, "key-of-the-environment", "token-of-the-environment")


def test_credentials_of_before_a_renewal_are_kept_secret_too(make: Callable[..., Backend], files: Files) -> None:
    def echo_the_old(request: Request) -> Behaviour:
        if signed_by(request)[0] == "access_key_id-one":
            files.write("two")
            return error(403, "ExpiredToken")
        return error(403, "AccessDenied", "access_key_id-one access_key_id-two session_token-one session_token-two")

    with ScriptedServer([from_request(echo_the_old)]) as server:
        with pytest.raises(AccessDenied) as caught:
            make(server, **files.settings).check()
        assert_kept_secret(
            caught.value, "access_key_id-one", "access_key_id-two", "session_token-one", "session_token-two"
        )


def test_settings_without_a_key_leave_it_to_the_sdk() -> None:
    assert CredentialSource(BucketSettings.parse({"bucket": "media"})).current() is None


def test_an_access_key_does_not_show_its_secrets() -> None:
    key = AccessKey("key-of-someone", "secret-of-someone", "token-of-someone")
    assert repr(key) == "AccessKey(access_key_id='key-of-someone')"

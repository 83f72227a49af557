"""Both SDKs against a server that misbehaves: the same exception, as many attempts, no hang, and no secret told."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast
from xml.sax.saxutils import escape

import pytest

from backends import BACKENDS, BucketSettings, open_backend
from backends.base import Backend
from backends.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    BucketNotFound,
    ContentDamaged,
    EncryptionNotApplied,
    NotSupported,
    ObjectArchived,
    ObjectNotFound,
    PreconditionFailed,
    RequestRejected,
    cause_chain,
)
from tests.backends.scripted_server import (
    PATIENCE,
    Behaviour,
    Exchange,
    Request,
    ScriptedServer,
    after,
    drop,
    drop_during_upload,
    error,
    error_xml,
    from_request,
    hang,
    raw,
    reply,
    response_head,
    stop_reading,
    trickle,
)

Result = TypeVar("Result")

ACCESS_KEY = "AKIASCRIPTEDACCESSKEY"
SECRET_KEY = "scripted/secret+access=key"
SESSION_TOKEN = "scripted//session+token=="
SSE_KEY = "a-key-of-32-characters-+/=-quite"
SECRETS = [
    ACCESS_KEY,
    SECRET_KEY,
    SESSION_TOKEN,
    SSE_KEY,
    base64.b64encode(SSE_KEY.encode()).decode(),
    SSE_KEY.encode().hex(),
]

CONTENT = b"the content of an object"
DATE = "Mon, 02 Nov 2026 12:00:00 GMT"
MARK = "x-amz-meta-s3-storage-provider-upload"
SSE_ALGORITHM = "x-amz-server-side-encryption-customer-algorithm"
HTML = "<!DOCTYPE html><html><body><h1>404 Not Found</h1><p>nginx</p></body></html>"
SUCCESS_PAGE = reply(200, HTML, {"Content-Type": "text/html"})
# Enough to fill the buffers of both sockets.
TOO_MUCH = 32 << 20

HANGING = {"connect_timeout": 2, "read_timeout": 1}
"""The time limits where a server hangs."""

Call = Callable[[Backend], object]


def put(backend: Backend, data: bytes = CONTENT) -> object:
    return backend.put("media/key", io.BytesIO(data), len(data))


# Longer than `multipart_threshold` below.
def put_parts(backend: Backend) -> object:
    return put(backend, CONTENT * 50)


def get(backend: Backend) -> object:
    with backend.open("media/key") as reader:
        return reader.read(1000)


def get_part(backend: Backend) -> object:
    with backend.open("media/key", offset=5) as reader:
        return reader.read(1000)


def get_if_match(backend: Backend) -> object:
    with backend.open("media/key", if_match="0123") as reader:
        return reader.read(1000)


def stat(backend: Backend) -> object:
    return backend.stat("media/key")


def listing(backend: Backend) -> object:
    return [info.key for info in backend.list()]


def check(backend: Backend) -> object:
    return backend.check()


def delete(backend: Backend) -> object:
    return list(backend.delete(["media/key", "other/key"]))


@dataclass(frozen=True)
class Fault:
    """What is called, how the server behaves, and what comes of it, the same for every backend."""

    name: str
    call: Call
    script: list[Behaviour]
    raises: type[BackendError]
    requests: int
    code: str | None = None
    status: int | None = None
    sse: bool = False
    hangs: bool = False
    """The server leaves it to the client to give up."""


def stored(content: bytes = CONTENT, **headers: str) -> Behaviour:
    """The answer to a GET or HEAD of an object that is there."""
    told = {"ETag": '"0123"', "Last-Modified": DATE}
    return reply(200, content, told | {name.replace("_", "-"): value for name, value in headers.items()})


def accepted(**headers: str) -> Behaviour:
    """The answer to a PUT that succeeded."""
    return reply(200, b"", {"ETag": '"0123"'} | {name.replace("_", "-"): value for name, value in headers.items()})


def encrypted() -> Behaviour:
    """The answer to a PUT that was encrypted."""
    return reply(200, b"", {"ETag": '"0123"', SSE_ALGORITHM: "AES256"})


def page(
    *keys: str, token: str | None = None, truncated: bool = False, before: str = "", encoding: str = ""
) -> Behaviour:
    """A page of a listing, of version 1 where it is truncated without a token."""
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-02T12:00:00.000Z</LastModified>"
        "<ETag>&quot;0123&quot;</ETag><Size>5</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    )
    goes_on = f"<IsTruncated>{str(truncated or token is not None).lower()}</IsTruncated>"
    if token is not None:
        goes_on += f"<NextContinuationToken>{token}</NextContinuationToken>"
    return reply(
        200,
        f'<?xml version="1.0"?>{before}<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix></Prefix><EncodingType>{encoding}</EncodingType>{goes_on}{entries}</ListBucketResult>",
        {"Content-Type": "application/xml"},
    )


# Where the length is not announced it may be any.
_UNTIL_CLOSED = {"Connection": "close"}
LONG_ERROR = response_head(404, _UNTIL_CLOSED) + error_xml("NoSuchKey").encode() + bytes(20 << 20)
LONG_ERROR_IN_CHUNKS = (
    response_head(404, {"Transfer-Encoding": "chunked"})
    + (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 20
    + b"0\r\n\r\n"
)
LONG_LISTING = response_head(200, _UNTIL_CLOSED) + b"<ListBucketResult>" + b" " * (20 << 20) + b"</ListBucketResult>"

ANSWERS = [
    (404, "NoSuchKey", get, ObjectNotFound, 1),
    (404, "NoSuchBucket", get, BucketNotFound, 1),
    (404, "NoSuchBucket", put, BucketNotFound, 1),
    (404, "NoSuchBucket", put_parts, BucketNotFound, 1),
    (404, "NoSuchBucket", listing, BucketNotFound, 1),
    (404, "NoSuchBucket", check, BucketNotFound, 1),
    (404, "NoSuchBucket", delete, BucketNotFound, 1),
    (404, None, get, ObjectNotFound, 1),
    (404, None, stat, ObjectNotFound, 1),
    (404, None, put, BucketNotFound, 1),
    (404, None, listing, BucketNotFound, 1),
    (403, "AccessDenied", get, AccessDenied, 1),
    (403, "AccessDenied", put, AccessDenied, 1),
    (403, "AccessDenied", listing, AccessDenied, 1),
    (403, "AccessDenied", delete, AccessDenied, 1),
    (403, "SignatureDoesNotMatch", check, AccessDenied, 1),
    (403, "InvalidAccessKeyId", check, AccessDenied, 1),
    (400, "ExpiredToken", get, AccessDenied, 1),
    (403, None, get, AccessDenied, 1),
    (403, None, stat, AccessDenied, 1),
    (403, None, put, AccessDenied, 1),
    (401, None, get, AccessDenied, 1),
    (403, "InvalidObjectState", get, ObjectArchived, 1),
    (412, "PreconditionFailed", get, PreconditionFailed, 1),
    (412, None, stat, PreconditionFailed, 1),
    (405, "MethodNotAllowed", put, NotSupported, 1),
    (501, "NotImplemented", put, NotSupported, 1),
    (400, "InvalidRequest", get, RequestRejected, 1),
    (400, None, stat, RequestRejected, 1),
    (400, "InvalidStorageClass", put, RequestRejected, 1),
    (416, "InvalidRange", get_part, RequestRejected, 1),
    (301, "PermanentRedirect", get, RequestRejected, 1),
    (413, None, put, RequestRejected, 1),
    (413, "EntityTooLarge", put, RequestRejected, 1),
    (500, "InternalError", get, BackendUnavailable, 3),
    (500, None, get, BackendUnavailable, 3),
    (500, None, stat, BackendUnavailable, 3),
    (500, "InternalError", put, BackendUnavailable, 3),
    (500, "InternalError", listing, BackendUnavailable, 3),
    (500, "InternalError", delete, BackendUnavailable, 3),
    (502, None, get, BackendUnavailable, 3),
    (503, "SlowDown", get, BackendUnavailable, 3),
    (503, "SlowDown", put, BackendUnavailable, 3),
    # CreateMultipartUpload, a POST.
    (503, "SlowDown", put_parts, BackendUnavailable, 3),
    (503, "SlowDown", listing, BackendUnavailable, 3),
    (503, "SlowDown", check, BackendUnavailable, 3),
    (503, "SlowDown", delete, BackendUnavailable, 3),
    (503, None, stat, BackendUnavailable, 3),
    (429, "TooManyRequests", get, BackendUnavailable, 3),
    (408, None, get, BackendUnavailable, 3),
    (400, "RequestTimeout", put, BackendUnavailable, 3),
    (400, "BadDigest", put, BackendUnavailable, 3),
    (400, "IncompleteBody", put, BackendUnavailable, 3),
    (403, "RequestTimeTooSkewed", get, AccessDenied, 1),
    (409, "OperationAborted", put, BackendUnavailable, 3),
]


def answer_fault(status: int, code: str | None, call: Call, raises: type[BackendError], requests: int) -> Fault:
    name = f"{call.__name__} {status} {code or 'without a body'}"
    behaviour = reply(status) if code is None else error(status, code)
    return Fault(name, call, [behaviour], raises, requests, code, status)


FAULTS = [
    *(answer_fault(*answer) for answer in ANSWERS),
    Fault("a page of HTML", get, [reply(404, HTML)], BackendUnavailable, 3, None, 404),
    Fault("a page of HTML for a put", put, [reply(403, HTML)], BackendUnavailable, 3, None, 403),
    Fault("a page of HTML for a put that is too large", put, [reply(413, HTML)], RequestRejected, 1, None, 413),
    Fault("a page of HTML for a deletion", delete, [reply(404, HTML)], BackendUnavailable, 3, None, 404),
    Fault(
        "a page of HTML for a single deletion",
        delete,
        [error(501, "NotImplemented"), reply(404, HTML)],
        BackendUnavailable,
        4,
        None,
        404,
    ),
    Fault("a page of HTML with status 200", get, [SUCCESS_PAGE], BackendUnavailable, 3, None, 200),
    Fault("a page of HTML with status 200 for a HEAD", stat, [SUCCESS_PAGE], BackendUnavailable, 3, None, 200),
    Fault("a page of HTML with status 200 for a put", put, [SUCCESS_PAGE], BackendUnavailable, 2),
    Fault("a page of HTML with status 200 for a put with SSE-C", put, [SUCCESS_PAGE], BackendUnavailable, 3, sse=True),
    Fault("a put's answer without an ETag, and nothing there", put, [reply(200), reply(404)], BackendUnavailable, 2),
    Fault("a put's answer without an ETag, and an unreadable one", put, [reply(200), stored(Last_Modified="9" * 99)], BackendUnavailable, 2),
    Fault(
        "503 with a Retry-After of ten hours",
        get,
        [error(503, "SlowDown", headers={"Retry-After": "36000"})],
        BackendUnavailable,
        3,
        "SlowDown",
        503,
    ),
    Fault("an error that is cut short", get, [reply(404, error_xml("NoSuchBucket")[:60], length=500)], BackendUnavailable, 3),
    Fault("a forbidden that is cut short", put, [reply(403, b"<Err", length=500)], BackendUnavailable, 3),
    Fault("an error that does not fit into memory", get, [raw(LONG_ERROR)], BackendUnavailable, 3),
    Fault("an error that does not fit into memory, in chunks", put, [raw(LONG_ERROR_IN_CHUNKS)], BackendUnavailable, 3),
    Fault("an error that is said to be a terabyte", get, [reply(404, HTML, length=1 << 40)], BackendUnavailable, 3),
    Fault("a listing that does not fit into memory", listing, [raw(LONG_LISTING)], BackendUnavailable, 3),
    Fault("a listing that is said to be a terabyte", listing, [reply(200, "<ListBucketResult>", length=1 << 40)], BackendUnavailable, 3),
    Fault("a connection dropped before the answer", get, [drop()], BackendUnavailable, 3),
    Fault("a connection dropped before a put's answer", put, [drop()], BackendUnavailable, 3),
    Fault("a connection dropped during the upload", lambda b: put(b, bytes(TOO_MUCH)), [drop_during_upload()], BackendUnavailable, 3),
    Fault("an answer that is no HTTP", get, [raw(b"SSH-2.0-x\r\n")], BackendUnavailable, 3),
    Fault("a hang before the headers", get, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a hang before a HEAD's headers", stat, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a hang after an upload", put, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a hang in a listing", listing, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a hang in a deletion", delete, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a hang at the start of an upload in parts", put_parts, [hang()], BackendUnavailable, 1, hangs=True),
    Fault("a server that stops reading", lambda b: put(b, bytes(TOO_MUCH)), [stop_reading()], BackendUnavailable, 1, hangs=True),
    Fault("headers that trickle", get, [trickle(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n")], BackendUnavailable, 1, hangs=True),
    Fault("a status line that trickles", put, [trickle(b"H")], BackendUnavailable, 1, hangs=True),
    Fault("a continue that never ends", put, [trickle(b"HTTP/1.1 100 Continue\r\n\r\n")], BackendUnavailable, 1, hangs=True),
    Fault(
        "an error that trickles",
        get,
        [trickle(b" ", response_head(500, {"Content-Length": "100000"}))],
        BackendUnavailable,
        1,
        hangs=True,
    ),
    Fault(
        "a listing that trickles",
        listing,
        [trickle(b" ", response_head(200, {"Content-Length": "100000"}))],
        BackendUnavailable,
        1,
        hangs=True,
    ),
    Fault("a listing that is no XML", listing, [reply(200, "hello")], BackendUnavailable, 3, None, 200),
    Fault("a listing that is empty", listing, [reply(200, "")], BackendUnavailable, 3, None, 200),
    Fault("a listing that is HTML", check, [reply(200, HTML)], BackendUnavailable, 3, None, 200),
    Fault("a listing that is other XML", check, [reply(200, "<a><b>c</b></a>")], BackendUnavailable, 3, None, 200),
    Fault(
        "a listing with a document type",
        listing,
        [page("media/&x;", before='<!DOCTYPE x [<!ENTITY x "y">]>')],
        BackendUnavailable,
        3,
        None,
        200,
    ),
    Fault("a listing that is cut short", listing, [reply(200, "<ListBucketResult>", length=1000)], BackendUnavailable, 3),
    Fault("a listing out of order", listing, [page("media/b", "media/a")], NotSupported, 1),
    Fault("a listing that repeats a key", listing, [page("media/a", "media/a")], NotSupported, 1),
    Fault(
        "a listing out of order over its pages",
        listing,
        [page("media/b", token="t"), page("media/a")],
        NotSupported,
        2,
    ),
    Fault("a listing of what was not asked for", lambda b: list(b.list("media/")), [page("media/a", "other/b")], NotSupported, 1),
    Fault("a listing in a circle", listing, [page("media/a", token="t"), page("media/b", token="t")], BackendUnavailable, 2),
    Fault("a listing that starts again", listing, [page("media/a", token="t"), page("media/a", token="u")], NotSupported, 2),
    Fault(
        "a listing that goes on nowhere",
        listing,
        [reply(200, "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")],
        BackendUnavailable,
        1,
    ),
    Fault("a listing of version 1 that starts again", listing, [page("media/a", truncated=True)], NotSupported, 2),
    Fault("a listing of version 1 that is cut off", listing, [page("media/a", truncated=True), page()], NotSupported, 2),
    Fault("a listing with a bad size", listing, [reply(200, "<ListBucketResult><Contents><Key>media/a</Key><Size>x</Size></Contents></ListBucketResult>")], BackendUnavailable, 3, None, 200),
    Fault("a condition that was ignored", get_if_match, [stored(ETag='"4567"')], PreconditionFailed, 1),
    Fault("a range that was ignored", get_part, [stored()], BackendUnavailable, 3, None, 200),
    Fault(
        "a range from elsewhere",
        get_part,
        [reply(206, CONTENT[4:], {"Content-Range": f"bytes 4-{len(CONTENT) - 1}/{len(CONTENT)}"})],
        BackendUnavailable,
        3,
        None,
        206,
    ),
    Fault(
        "an object of unknown size",
        get,
        [raw(response_head(200, {"Connection": "close"}) + CONTENT)],
        BackendUnavailable,
        3,
        None,
        200,
    ),
    Fault("a wrong SSE-C key as MinIO tells it", get, [error(403, "AccessDenied")], AccessDenied, 1, "AccessDenied", 403, sse=True),
    Fault("a wrong SSE-C key in a HEAD as MinIO tells it", stat, [reply(403)], AccessDenied, 1, None, 403, sse=True),
    # Asked again without the key: the object might be a plain one.
    Fault("a wrong SSE-C key as Ceph tells it", get, [error(400, "InvalidArgument")], RequestRejected, 2, "InvalidArgument", 400, sse=True),
    Fault("a wrong SSE-C key in a HEAD as Ceph tells it", stat, [reply(400)], RequestRejected, 2, None, 400, sse=True),
    # One to store the probe, one to remove it.
    Fault("a server that ignores SSE-C", put, [accepted(), reply(204)], EncryptionNotApplied, 2, sse=True),
    Fault("a server that only pretends to encrypt", put, [encrypted(), stored(), reply(204)], EncryptionNotApplied, 3, sse=True),
    Fault(
        "an answer to a put that does not acknowledge SSE-C",
        put,
        [encrypted(), reply(400), reply(204), accepted()],
        EncryptionNotApplied,
        4,
        sse=True,
    ),
    Fault("a hang in the proof of encryption", put, [hang()], BackendUnavailable, 2, sse=True, hangs=True),
    Fault("a refusal in the proof of encryption", put, [error(400, "InvalidRequest"), reply(204)], RequestRejected, 2, "InvalidRequest", 400, sse=True),
]  # fmt: skip


@pytest.fixture(params=list(BACKENDS))
def name(request: pytest.FixtureRequest) -> str:
    """Every backend."""
    backend: str = request.param
    return backend


@pytest.fixture
def make(name: str) -> Iterator[Callable[..., Backend]]:
    """Makes a backend that uses a scripted server and does not wait for long."""
    made: list[Backend] = []

    def make(server: ScriptedServer, *, sse: bool = False, **settings: Any) -> Backend:
        values: dict[str, Any] = {
            "backend": name,
            "bucket": "bucket",
            "endpoint_url": server.endpoint,
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "session_token": SESSION_TOKEN,
            # A busy machine may be slow; what waits for them to pass uses shorter ones.
            "connect_timeout": 20,
            "read_timeout": 20,
            "multipart_threshold": 1000,
        }
        if sse:
            values |= {"sse_customer_key": SSE_KEY, "allow_insecure_sse": True}
        backend = open_backend(BucketSettings.parse(values | settings))
        made.append(backend)
        # Making the SDK's client takes time too, which is not to count to the first call's.
        cast(Any, backend)._caller.client()
        return backend

    yield make
    for backend in made:
        backend.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr("backends.calls.random.uniform", lambda shortest, longest: 0)


@pytest.fixture(autouse=True)
def nothing_told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test here may leave a secret in the log, whatever its level, or on the terminal."""
    # A backend that was made earlier may have changed it.
    botocore = logging.getLogger("botocore")
    level = botocore.level
    botocore.setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    yield
    botocore.setLevel(level)
    told = "\n".join(map(logging.Formatter().format, caplog.get_records("call")))
    for secret in SECRETS:
        assert secret not in told
    out, err = capfd.readouterr()
    for secret in SECRETS:
        assert secret not in out + err


def answer_of(call: Callable[[], Result]) -> Result:
    """The result or error of a call that must end; one that hangs fails instead of holding up the tests."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        pytest.fail("the call hangs")
    if errors:
        raise errors[0]
    return results[0]


def error_of(call: Callable[[], object]) -> BackendError:
    """The error of a call that must fail, having looked for secrets in it."""
    with pytest.raises(BackendError) as caught:
        answer_of(call)
    assert_kept_secret(caught.value)
    return caught.value


def assert_kept_secret(error: BaseException) -> None:
    text = "\n".join(f"{each} {each!r} {each.args}" for each in cause_chain(error))
    for secret in SECRETS:
        assert secret not in text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_backend_tells_a_fault_alike(make: Callable[..., Backend], fault: Fault) -> None:
    with ScriptedServer(fault.script) as server:
        backend = make(server, sse=fault.sse, **(HANGING if fault.hangs else {}))
        error = error_of(lambda: fault.call(backend))
        assert type(error) is fault.raises
        assert error.retryable is (fault.raises is BackendUnavailable)
        assert (error.code, error.status) == (fault.code, fault.status)
        assert len(server.requests) == fault.requests, [str(request) for request in server.requests]
        assert error.__cause__ is None or not isinstance(error.__cause__, BackendError)


OVERCOME: list[tuple[Call, Behaviour]] = [
    (get, stored()),
    (stat, stored()),
    (put, accepted()),
    (listing, page("media/a")),
    (delete, reply(200, "<DeleteResult/>")),
]


@pytest.mark.parametrize(("call", "answer"), OVERCOME, ids=[call.__name__ for call, _ in OVERCOME])
def test_a_temporary_fault_is_overcome(make: Callable[..., Backend], call: Call, answer: Behaviour) -> None:
    with ScriptedServer([reply(503), drop(), answer]) as server:
        backend = make(server)
        answer_of(lambda: call(backend))
        assert len(server.requests) == 3


def test_max_attempts_counts_all_of_them(make: Callable[..., Backend]) -> None:
    for attempts in (1, 2, 5):
        with ScriptedServer([error(503, "SlowDown")]) as server:
            error_of(lambda server=server, attempts=attempts: get(make(server, max_attempts=attempts)))  # type: ignore[misc]
            assert len(server.requests) == attempts


def test_the_code_of_the_last_answer_is_kept(make: Callable[..., Backend]) -> None:
    with ScriptedServer([error(500, "InternalError"), drop(), error(503, "SlowDown", "please wait")]) as server:
        backend = make(server)
        told = error_of(lambda: get(backend))
        assert told.code == "SlowDown"
        assert "503 SlowDown: please wait" in str(told)


ESCAPES = "no\u009b31mmore\u202e\u2028\nERROR of another program"
TERMINAL_TITLE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "InvalidArgument", ESCAPES),
        error(400, ESCAPES),
        raw(f"{TERMINAL_TITLE}\r\n\r\n".encode()),
        stored(Last_Modified=TERMINAL_TITLE),
    ],
    ids=["message", "code", "status line", "date"],
)
def test_what_a_server_says_is_told_in_one_line_without_escapes(
    make: Callable[..., Backend], answer: Behaviour
) -> None:
    with ScriptedServer([answer]) as server:
        told = str(error_of(lambda: get(make(server))))
    assert told.isprintable()
    assert "ERROR of another program" in told or "]0;title" in told


def test_a_server_that_says_much_is_told_of_in_part(make: Callable[..., Backend]) -> None:
    with ScriptedServer([error(400, "InvalidArgument", "much " * 100_000)]) as server:
        assert 500 < len(str(error_of(lambda: get(make(server))))) < 2000


def test_slow_refusals_are_not_repeated_beyond_the_time(make: Callable[..., Backend]) -> None:
    """Each answer comes in time; all attempts together must too."""

    def slow(exchange: Exchange) -> None:
        exchange.wait_until_gone(0.9)
        error(503, "SlowDown")(exchange)

    with ScriptedServer([slow]) as server:
        backend = make(server, connect_timeout=1, read_timeout=1, max_attempts=100)
        error_of(lambda: get(backend))
        assert len(server.requests) <= 3


def test_a_fault_earlier_on_does_not_count_as_this_ones_cause(make: Callable[..., Backend]) -> None:
    """A caller that resumes within an `except` block gets all attempts, and an error about them alone."""
    with ScriptedServer([hang(), reply(503)]) as server:
        backend = make(server, **HANGING)

        def call() -> None:
            try:
                get(backend)
            except BackendUnavailable:
                get(backend)

        told = error_of(call)
        assert told.status == 503
        assert len(server.requests) == 4


def test_put_sends_a_checksum_for_the_server_to_verify(make: Callable[..., Backend]) -> None:
    with ScriptedServer([accepted()]) as server:
        put(make(server))
    (request,) = server.requests
    # Signed; over TLS, where signing a body costs more than it is worth, it is a Content-MD5.
    assert request.headers["x-amz-content-sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert request.body == CONTENT


def test_an_etag_that_the_answer_to_a_put_leaves_out_is_asked_for(make: Callable[..., Backend]) -> None:
    md5 = hashlib.md5(CONTENT).hexdigest()
    with ScriptedServer([reply(200), stored(ETag=f'"{md5}"')]) as server:
        backend = make(server)
        info = answer_of(lambda: backend.put("media/key", io.BytesIO(CONTENT), len(CONTENT)))
        assert (info.size, info.etag) == (len(CONTENT), md5)
        assert [request.method for request in server.requests] == ["PUT", "HEAD"]


def test_an_older_object_of_the_same_size_is_not_taken_for_what_was_sent(make: Callable[..., Backend]) -> None:
    with ScriptedServer([SUCCESS_PAGE, stored()]) as server:
        backend = make(server)
        assert type(error_of(lambda: put(backend))) is BackendUnavailable


def test_an_object_without_an_etag_is_an_object(make: Callable[..., Backend]) -> None:
    """Some proxies take it away."""
    with ScriptedServer([reply(200, CONTENT, {"Content-Type": "text/plain"})]) as server:
        backend = make(server)
        assert answer_of(lambda: get(backend)) == CONTENT
        assert answer_of(lambda: backend.stat("media/key")).size == len(CONTENT)


def test_a_page_of_html_that_was_stored_is_an_object(make: Callable[..., Backend]) -> None:
    with ScriptedServer([stored(HTML.encode(), Content_Type="text/html")]) as server:
        backend = make(server)
        assert answer_of(lambda: get(backend)) == HTML.encode()


def test_a_proxy_that_limits_bodies_is_told_with_the_remedy(make: Callable[..., Backend]) -> None:
    with ScriptedServer([reply(413, HTML)]) as server:
        backend = make(server)
        assert "client_max_body_size" in str(error_of(lambda: put(backend)))


def test_put_does_not_ask_whether_it_may_send(make: Callable[..., Backend]) -> None:
    """Nobody would wait for the answer, and some proxies refuse the question."""
    with ScriptedServer([accepted()]) as server:
        put(make(server))
    (request,) = server.requests
    assert "Expect" not in request.headers


@pytest.mark.parametrize("headers", [{"ETag": '"0123"'}, {"ETag": 'W/"0123"'}, {}], ids=str)
def test_an_object_that_may_be_the_one_that_was_named_is_read(
    make: Callable[..., Backend], headers: dict[str, str]
) -> None:
    with ScriptedServer([reply(200, CONTENT, headers)]) as server:
        backend = make(server)
        assert answer_of(lambda: get_if_match(backend)) == CONTENT
        assert server.requests[0].headers["If-Match"] == '"0123"'


def test_an_etag_that_a_proxy_has_marked_as_weak_is_told_as_it_was(make: Callable[..., Backend]) -> None:
    weak = {"ETag": 'W/"0123"'}
    with ScriptedServer([reply(200, b"", weak), reply(200, CONTENT, weak)]) as server:
        backend = make(server)
        info = answer_of(lambda: backend.put("media/key", io.BytesIO(CONTENT), len(CONTENT)))
        assert info.etag == "0123"
        assert answer_of(lambda: get_if_match(backend)) == CONTENT


# --- listings ---


def test_a_listing_that_goes_on_without_an_object_ends_in_an_error(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.listing._MOST_EMPTY_PAGES", 3)
    pages = [page(token="a"), page(token="b"), page(token="a"), page("media/a", token="b"), page(token="a"), page()]
    with ScriptedServer(pages) as server:
        assert listing(make(server)) == ["media/a"]
    with ScriptedServer([page(token="a"), page(token="b")] * 10) as server:
        assert "without an object" in str(error_of(lambda: listing(make(server))))
        assert len(server.requests) == 4


def test_a_page_of_the_longest_keys_is_read(make: Callable[..., Backend]) -> None:
    keys = [f"{number:03d}" + "\x01" * 1021 for number in range(1000)]
    encoded = page(*(key.replace("\x01", "%01") for key in keys), encoding="url")
    with ScriptedServer([encoded]) as server:
        assert listing(make(server)) == keys


def test_a_server_that_knows_version_1_of_listings_only_is_listed_to_the_end(make: Callable[..., Backend]) -> None:
    keys = [f"media/{name}" for name in ("a", "b c", "d&e+f", "g\u00e9", "h")]

    def answer(request: Request) -> Behaviour:
        later = [key for key in keys if key > request.query.get("marker", "")]
        return page(*later[:2], truncated=len(later) > 2)

    with ScriptedServer([from_request(answer)]) as server:
        assert answer_of(lambda: listing(make(server))) == keys
        assert len(server.requests) == 3
        # Not version 2, in which a marker means nothing.
        assert all("list-type" not in request.query for request in server.requests[1:])
        assert all(request.query["encoding-type"] == "url" for request in server.requests)


# --- readers ---


def test_a_content_that_is_cut_short_is_an_error(make: Callable[..., Backend]) -> None:
    with ScriptedServer([reply(200, CONTENT[:10], {"ETag": '"0123"'}, length=len(CONTENT))]) as server:
        reader = make(server).open("media/key")
        assert reader.read(4) == CONTENT[:4]
        told = error_of(lambda: reader.read(1000))
        assert type(told) is BackendUnavailable
        assert "14 bytes early" in str(told)
        assert len(server.requests) == 1
        reader.close()


def test_a_part_of_an_object_that_is_less_than_the_rest_is_an_error(make: Callable[..., Backend]) -> None:
    """As from a cache that answers with what it has: the lengths agree with each other, not with the object's."""
    headers = {"Content-Range": f"bytes 5-9/{len(CONTENT)}", "ETag": '"0123"'}
    with (
        ScriptedServer([reply(206, CONTENT[5:10], headers)]) as server,
        make(server).open("media/key", offset=5) as reader,
    ):
        assert reader.read(5) == CONTENT[5:10]
        assert type(error_of(lambda: reader.read(1000))) is BackendUnavailable


def test_a_content_that_is_reset_is_an_error(make: Callable[..., Backend]) -> None:
    def reset(exchange: Exchange) -> None:
        exchange.send(response_head(200, {"Content-Length": "1000"}) + CONTENT)
        exchange.reset()

    with ScriptedServer([reset]) as server, make(server).open("media/key") as reader:
        assert type(error_of(lambda: reader.read(1000))) is BackendUnavailable


@pytest.mark.parametrize("first", [b"", CONTENT], ids=["hanging", "after a part"])
def test_a_content_that_hangs_is_an_error(make: Callable[..., Backend], first: bytes) -> None:
    def stall(exchange: Exchange) -> None:
        exchange.send(response_head(200, {"Content-Length": "1000"}) + first)
        exchange.wait_until_gone()
        exchange.close()

    with ScriptedServer([stall]) as server, make(server, **HANGING).open("media/key") as reader:
        assert type(error_of(lambda: reader.read(1000))) is BackendUnavailable
        assert len(server.requests) == 1


def test_a_content_that_trickles_is_an_error(make: Callable[..., Backend]) -> None:
    head = response_head(200, {"Content-Length": "100000"})
    with ScriptedServer([trickle(b"x", head)]) as server, make(server, **HANGING).open("media/key") as reader:
        assert type(error_of(lambda: reader.read(1000))) is BackendUnavailable


def test_a_reader_that_pauses_for_long_goes_on(make: Callable[..., Backend]) -> None:
    """The time limit is for the server, not for whoever reads."""
    with (
        ScriptedServer([stored(bytes(1 << 20))]) as server,
        make(server, read_timeout=0.2).open("media/key") as reader,
    ):
        assert reader.read(10) == bytes(10)
        threading.Event().wait(0.5)
        assert reader.read(1 << 20) == bytes((1 << 20) - 10)


def test_closing_a_reader_early_frees_the_connection_without_reading_on(make: Callable[..., Backend]) -> None:
    def endless(exchange: Exchange) -> None:
        exchange.send(response_head(200, {"Content-Length": str(1 << 40)}))
        while True:
            exchange.send(bytes(1 << 16))

    with ScriptedServer([endless]) as server:
        reader = make(server).open("media/key")
        assert reader.read(10) == bytes(10)
        answer_of(reader.close)
        server.wait_for(lambda server: server.connections == 0)


@pytest.mark.parametrize("content", [b"", CONTENT], ids=["empty", "some"])
def test_a_reader_at_its_end_has_freed_the_connection(make: Callable[..., Backend], content: bytes) -> None:
    with ScriptedServer([stored(content), page()]) as server:
        backend = make(server)
        reader = backend.open("media/key")
        assert reader.read(1000) == content
        assert reader.read(1000) == b""
        backend.check()
        # That of an empty object is closed, which the server sees a moment later.
        server.wait_for(lambda server: server.connections == 1)
        reader.close()


# --- boto3's own checksums ---


STRONGER = {"request_checksum_calculation": "when_supported", "response_checksum_validation": "when_supported"}


def crc32(content: bytes) -> str:
    return base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()


def with_checksum_of(content: bytes) -> Behaviour:
    """The answer to a GET of an object that was stored with this content, and has another one by now perhaps."""
    return stored(CONTENT, x_amz_checksum_crc32=crc32(content), x_amz_checksum_type="FULL_OBJECT")


@pytest.mark.parametrize("name", ["boto3"])
def test_a_checksum_is_sent_where_it_is_asked_for(make: Callable[..., Backend]) -> None:
    with ScriptedServer([accepted()]) as server:
        put(make(server))
        put(make(server, **STRONGER))
        plain, checked = server.requests
        assert "x-amz-checksum-crc32" not in plain.headers
        assert checked.headers["x-amz-checksum-crc32"] == crc32(CONTENT)


@pytest.mark.parametrize("name", ["boto3"])
def test_a_checksum_is_asked_for_where_it_is_to_be_compared(make: Callable[..., Backend]) -> None:
    with ScriptedServer([with_checksum_of(CONTENT)]) as server:
        assert get(make(server)) == CONTENT
        assert get(make(server, **STRONGER)) == CONTENT
        plain, checked = server.requests
        assert "x-amz-checksum-mode" not in plain.headers
        assert checked.headers["x-amz-checksum-mode"] == "ENABLED"


@pytest.mark.parametrize("name", ["boto3"])
@pytest.mark.parametrize("n", [1000, len(CONTENT), 5])
def test_a_content_with_another_checksum_is_an_error(make: Callable[..., Backend], n: int) -> None:
    with ScriptedServer([with_checksum_of(b"another")]) as server, make(server, **STRONGER).open("media/key") as reader:
        told = error_of(lambda: b"".join(iter(lambda: reader.read(n), b"")))
        assert type(told) is ContentDamaged
        assert "the content is not the one that was stored: Expected checksum" in str(told)


def test_checksums_do_not_keep_a_connection_from_being_used_again(make: Callable[..., Backend]) -> None:
    with ScriptedServer([with_checksum_of(CONTENT), with_checksum_of(CONTENT), stored(), page()]) as server:
        backend = make(server, **STRONGER)
        for _ in range(3):
            assert get(backend) == CONTENT
        backend.check()
        assert server.connections == 1


# --- close ---


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}], ids=["keep-alive", "close"])
def test_close_ends_a_reader_that_waits(make: Callable[..., Backend], headers: dict[str, str]) -> None:
    def stall(exchange: Exchange) -> None:
        exchange.send(response_head(200, {"Content-Length": "1000", **headers}))
        exchange.wait_until_gone()
        exchange.close()

    with ScriptedServer([stall]) as server, ThreadPoolExecutor(1) as thread:
        backend = make(server, read_timeout=3600)
        reader = backend.open("media/key")
        reading = thread.submit(reader.read, 1000)
        answer_of(backend.close)
        with pytest.raises(BackendUnavailable):
            reading.result(PATIENCE)
        reader.close()


def test_close_ends_calls_under_way_and_refuses_later_ones(make: Callable[..., Backend]) -> None:
    with ScriptedServer([hang()]) as server, ThreadPoolExecutor(3) as threads:
        backend = make(server, read_timeout=3600)
        calls = [threads.submit(call, backend) for call in (get, put, listing)]
        server.wait_for(lambda server: len(server.requests) == 3)
        answer_of(backend.close)
        for call in calls:
            assert isinstance(call.exception(PATIENCE), BackendUnavailable)
        assert len(server.requests) == 3
        assert type(error_of(lambda: stat(backend))) is BackendUnavailable
        assert len(server.requests) == 3


# --- uploads in parts ---


CREATED = reply(200, "<InitiateMultipartUploadResult><UploadId>upload-1</UploadId></InitiateMultipartUploadResult>")
PART_TAKEN = reply(200, b"", {"ETag": '"0123"'})
COMPLETED = reply(200, '<CompleteMultipartUploadResult><ETag>"0123-1"</ETag></CompleteMultipartUploadResult>')
NOT_THERE = reply(404)
ABORTED = reply(204)


@dataclass(frozen=True)
class Upload:
    """How the server treats the requests of an upload in parts."""

    create: Behaviour = CREATED
    part: Behaviour = PART_TAKEN
    complete: Behaviour = COMPLETED
    head: Behaviour = NOT_THERE
    abort: Behaviour = ABORTED

    def script(self) -> list[Behaviour]:
        def behave(exchange: Exchange) -> None:
            getattr(self, step_of(exchange.request))(exchange)

        return [behave]


def step_of(request: Request) -> str:
    if request.method == "POST":
        return "create" if "uploads" in request.query else "complete"
    return {"PUT": "part", "HEAD": "head", "DELETE": "abort"}[request.method]


def steps(server: ScriptedServer) -> list[str]:
    return [step_of(request) for request in server.requests]


def ours(server: ScriptedServer, size: int) -> Behaviour:
    """The answer to a HEAD of the object that our upload has made."""

    def answer(_: Request) -> Behaviour:
        mark = server.requests[0].headers[MARK]
        return reply(200, b"", {"Content-Length": str(size), "ETag": '"0123-1"', MARK: mark})

    return from_request(answer)


def test_an_upload_in_parts(make: Callable[..., Backend]) -> None:
    with ScriptedServer(Upload().script()) as server:
        backend = make(server)
        info = answer_of(lambda: backend.put("media/key", io.BytesIO(CONTENT * 50), 1200, metadata={"a": "b"}))
        assert steps(server) == ["create", "part", "complete"]
        assert (info.size, info.etag, info.metadata) == (1200, "0123-1", {"a": "b"})
        assert server.requests[1].headers["x-amz-content-sha256"] == hashlib.sha256(CONTENT * 50).hexdigest()
        assert server.requests[1].body == CONTENT * 50


LOST = {
    "a lost reply": drop(),
    "a hang": hang(),
    "an error with status 200": reply(200, error_xml("InternalError")),
    "an error with status 500": error(500, "InternalError"),
    "an upload that is gone": error(404, "NoSuchUpload"),
    "a reply that is no XML": reply(200, "thanks"),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_completion_that_did_its_work_is_a_success(make: Callable[..., Backend], lost: str) -> None:
    with ScriptedServer([drop()]) as server:
        server.script = Upload(complete=LOST[lost], head=ours(server, 1200)).script()
        backend = make(server, **(HANGING if "hang" in lost else {}))
        info = answer_of(lambda: backend.put("media/key", io.BytesIO(CONTENT * 50), 1200))
        assert info.etag == "0123-1"
        assert steps(server)[-1] == "head"
        assert "abort" not in steps(server)


OTHERS = {
    "none": reply(404),
    "of another upload": reply(200, b"", {"Content-Length": "1200", "ETag": '"0123-1"', MARK: "0" * 32}),
    "of no upload": reply(200, b"", {"Content-Length": "1200", "ETag": '"0123"'}),
    "a forbidden one": reply(403),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("lost", LOST)
def test_a_completion_that_did_not_is_an_error_and_aborted(make: Callable[..., Backend], lost: str, other: str) -> None:
    with ScriptedServer(Upload(complete=LOST[lost], head=OTHERS[other]).script()) as server:
        backend = make(server, **(HANGING if "hang" in lost else {}))
        told = error_of(lambda: put_parts(backend))
        assert told.operation == "put"
        expected = RequestRejected if "gone" in lost else BackendUnavailable
        assert type(told) is expected
        completions = 1 if lost in ("a hang", "an upload that is gone") else 3
        assert steps(server) == ["create", "part", *["complete"] * completions, "head", "abort"]


def test_an_etag_that_the_completion_leaves_out_is_asked_for(make: Callable[..., Backend]) -> None:
    """Ceph does so when it is asked to complete an upload for the first time."""
    with ScriptedServer([drop()]) as server:
        completed = reply(200, "<CompleteMultipartUploadResult><ETag></ETag></CompleteMultipartUploadResult>")
        server.script = Upload(complete=completed, head=ours(server, 1200)).script()
        backend = make(server)
        info = answer_of(lambda: backend.put("media/key", io.BytesIO(CONTENT * 50), 1200))
        assert info.etag == "0123-1"
        assert steps(server) == ["create", "part", "complete", "head"]


@pytest.mark.parametrize("other", OTHERS)
def test_a_completion_without_an_etag_that_did_nothing_is_an_error_and_aborted(
    make: Callable[..., Backend], other: str
) -> None:
    completed = reply(200, "<html><body>Back soon</body></html>", {"Content-Type": "text/html"})
    with ScriptedServer(Upload(complete=completed, head=OTHERS[other]).script()) as server:
        backend = make(server)
        assert type(error_of(lambda: put_parts(backend))) is BackendUnavailable
        assert steps(server) == ["create", "part", "complete", "head", "abort"]


def test_an_object_with_our_mark_but_another_size_is_an_error(make: Callable[..., Backend]) -> None:
    with ScriptedServer([drop()]) as server:
        server.script = Upload(complete=drop(), head=ours(server, 1199)).script()
        backend = make(server)
        error_of(lambda: put_parts(backend))
        assert steps(server)[-2:] == ["head", "abort"]


def test_a_part_that_fails_aborts_the_upload(make: Callable[..., Backend]) -> None:
    with ScriptedServer(Upload(part=error(403, "AccessDenied")).script()) as server:
        backend = make(server)
        assert type(error_of(lambda: put_parts(backend))) is AccessDenied
        assert steps(server) == ["create", "part", "abort"]


def test_a_part_whose_answer_has_no_etag_is_sent_again(make: Callable[..., Backend]) -> None:
    with ScriptedServer(Upload(part=SUCCESS_PAGE).script()) as server:
        backend = make(server)
        assert type(error_of(lambda: put_parts(backend))) is BackendUnavailable
        assert steps(server) == ["create", "part", "part", "part", "abort"]


def test_a_part_that_hangs_aborts_the_upload(make: Callable[..., Backend]) -> None:
    with ScriptedServer(Upload(part=hang()).script()) as server:
        backend = make(server, **HANGING)
        assert type(error_of(lambda: put_parts(backend))) is BackendUnavailable
        assert steps(server) == ["create", "part", "abort"]


def test_an_abort_that_fails_is_warned_of_and_the_first_error_counts(
    make: Callable[..., Backend], caplog: pytest.LogCaptureFixture
) -> None:
    upload = Upload(part=error(403, "AccessDenied"), abort=error(500, "InternalError"))
    with ScriptedServer(upload.script()) as server:
        backend = make(server)
        assert type(error_of(lambda: put_parts(backend))) is AccessDenied
        assert steps(server) == ["create", "part", "abort", "abort", "abort"]
    assert [record.levelname for record in caplog.records if "left in the bucket" in record.getMessage()] == ["WARNING"]


def test_a_server_that_hangs_after_a_part_failed_holds_up_nothing(make: Callable[..., Backend]) -> None:
    with ScriptedServer(Upload(part=hang(), abort=hang()).script()) as server:
        backend = make(server, **HANGING)
        assert type(error_of(lambda: put_parts(backend))) is BackendUnavailable
        assert steps(server) == ["create", "part", "abort"]


class Watched(io.BytesIO):
    """A file that tells of each part that is read of it."""

    def __init__(self, data: bytes, on_read: Callable[[], object]) -> None:
        super().__init__(data)
        self._on_read = on_read

    def read(self, size: int | None = -1) -> bytes:
        self._on_read()
        return super().read(size)


def part_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("s3-part")}


def test_close_ends_more_parts_than_there_are_threads(make: Callable[..., Backend]) -> None:
    part, before = 5 << 20, part_threads()
    read = threading.Semaphore(0)
    errors: list[BackendError] = []
    with ScriptedServer(Upload(part=hang()).script()) as server:
        backend = make(server, read_timeout=3600, multipart_chunksize=part)

        def upload() -> None:
            body = Watched(bytes(4 * part), read.release)
            errors.append(error_of(lambda: backend.put("media/key", body, 4 * part)))

        uploads = [threading.Thread(target=upload, daemon=True) for _ in range(3)]
        for each in uploads:
            each.start()
        for _ in range(12):
            assert read.acquire(timeout=PATIENCE)
        server.wait_for(lambda server: steps(server).count("part") == 8)
        backend.close()
        for each in uploads:
            each.join(PATIENCE)
        assert [type(error) for error in errors] == [BackendUnavailable] * 3
        assert steps(server).count("part") == 8
    for thread in part_threads() - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_close_between_two_parts_is_told_as_such(make: Callable[..., Backend]) -> None:
    part, before = 5 << 20, part_threads()
    with ScriptedServer(Upload().script()) as server:
        backend = make(server, multipart_chunksize=part)
        parts = iter([lambda: None, backend.close])
        body = Watched(bytes(2 * part), lambda: next(parts)())
        assert "the backend is closed" in str(error_of(lambda: backend.put("media/key", body, 2 * part)))
        assert "abort" not in steps(server)
    for thread in part_threads() - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_part_that_does_not_acknowledge_sse_c_aborts_the_upload(make: Callable[..., Backend]) -> None:
    probe = iter([encrypted(), reply(400), reply(204)])
    upload = Upload().script()[0]

    def behave(exchange: Exchange) -> None:
        is_probe = "encryption-probe" in exchange.request.path
        (next(probe) if is_probe else upload)(exchange)

    with ScriptedServer([behave]) as server:
        backend = make(server, sse=True)
        assert type(error_of(lambda: put_parts(backend))) is EncryptionNotApplied
        assert steps(server)[3:] == ["create", "part", "abort"]


# --- encryption ---


def test_without_acknowledged_encryption_no_media_is_sent(make: Callable[..., Backend]) -> None:
    with ScriptedServer([accepted(), reply(204)]) as server:
        backend = make(server, sse=True)
        error_of(lambda: put(backend))
        assert [request.method for request in server.requests] == ["PUT", "DELETE"]
        assert all(CONTENT not in request.body for request in server.requests)
        assert server.requests[0].path == server.requests[1].path != "/bucket/media/key"


def test_threads_that_wait_for_the_proof_of_encryption_share_its_outcome(make: Callable[..., Backend]) -> None:
    go_on = threading.Event()
    script = [after(go_on, error(503, "SlowDown")), error(503, "SlowDown")]
    with ScriptedServer(script) as server, ThreadPoolExecutor(8) as threads:
        backend = make(server, sse=True, read_timeout=PATIENCE, max_attempts=1)
        calls = [threads.submit(put, backend) for _ in range(8)]
        server.wait_for(lambda server: len(server.requests) == 1)
        # The others have nothing to show that they wait; those that come later would make the test weaker, not wrong.
        threading.Event().wait(0.3)
        go_on.set()
        for call in calls:
            assert type(call.exception(PATIENCE)) is BackendUnavailable
        assert [request.method for request in server.requests] == ["PUT", "DELETE"]


def test_a_failed_proof_of_encryption_is_tried_again_by_the_next_call(make: Callable[..., Backend]) -> None:
    script = [error(503, "SlowDown"), reply(204), encrypted(), reply(400), reply(204), encrypted()]
    with ScriptedServer(script) as server:
        backend = make(server, sse=True, max_attempts=1)
        error_of(lambda: put(backend))
        put(backend)
        assert len(server.requests) == 6


def test_sse_c_goes_on_every_request_that_can_carry_it(make: Callable[..., Backend]) -> None:
    upload = Upload(part=encrypted(), head=reply(400))

    def behave(exchange: Exchange) -> None:
        method, query = exchange.request.method, exchange.request.query
        if method == "PUT" and "partNumber" not in query:
            encrypted()(exchange)
        elif method == "GET":
            (page() if "list-type" in query else stored())(exchange)
        elif method == "POST" and "delete" in query:
            reply(200, "<DeleteResult/>")(exchange)
        else:
            upload.script()[0](exchange)

    with ScriptedServer([behave]) as server:
        backend = make(server, sse=True)
        for call in (put, put_parts, get, listing, delete):
            answer_of(lambda call=call: call(backend))  # type: ignore[misc]
        upload = replace(upload, head=stored())
        answer_of(lambda: stat(backend))
        for request in server.requests:
            carries = SSE_ALGORITHM in request.headers
            is_about_content = request.method in ("PUT", "POST") and "delete" not in request.query
            is_about_content |= request.method == "GET" and "list-type" not in request.query
            is_about_content |= request.method == "HEAD" and "probe" not in request.path
            assert carries is is_about_content, request


# --- deleting ---


def test_failures_of_a_batch_are_told_one_by_one(make: Callable[..., Backend]) -> None:
    body = (
        "<DeleteResult>"
        "<Error><Key>media/key</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        "<Error><Key>other/key</Key><Code>InternalError</Code><Message>oops</Message></Error>"
        "<Error><Key>gone</Key><Code>NoSuchKey</Code><Message>gone</Message></Error>"
        "</DeleteResult>"
    )
    with ScriptedServer([reply(200, body)]) as server:
        backend = make(server)
        failures = list(backend.delete(["media/key", "other/key", "gone"]))
        assert [(failure.key, type(failure.error)) for failure in failures] == [
            ("media/key", AccessDenied),
            ("other/key", BackendUnavailable),
        ]
        assert server.requests[0].headers["Content-MD5"]


def test_where_batches_are_refused_keys_are_deleted_one_by_one(make: Callable[..., Backend]) -> None:
    script = [error(501, "NotImplemented"), reply(204), error(404, "NoSuchKey"), error(403, "AccessDenied"), reply(404)]
    with ScriptedServer(script) as server:
        failures = list(make(server).delete(["a", "b", "c", "d"]))
        assert [(failure.key, type(failure.error)) for failure in failures] == [("c", AccessDenied)]
        assert [request.method for request in server.requests] == ["POST", *["DELETE"] * 4]


def test_keys_that_xml_cannot_carry_are_deleted_one_by_one(make: Callable[..., Backend]) -> None:
    def answer(request: Request) -> Behaviour:
        return reply(204) if request.method == "DELETE" else reply(200, "<DeleteResult/>")

    with ScriptedServer([from_request(answer)]) as server:
        assert list(make(server).delete(["a", "b\x01", "c", "d\uffff"])) == []
        batch, *singles = server.requests
        assert re.findall(rb"<Key>(.*?)</Key>", batch.body) == [b"a", b"c"]
        assert [request.path for request in singles] == ["/bucket/b\x01", "/bucket/d\uffff"]


# --- secrets ---


def everything_of(request: Request) -> str:
    """What a careless server repeats."""
    told = [*SECRETS, *(f"{name}: {value}" for name, value in request.headers.items())]
    return " ".join(told)


ECHOES: dict[str, Callable[[Request], Behaviour]] = {
    "in the message": lambda request: error(403, "AccessDenied", everything_of(request)),
    "in the code": lambda request: error(403, SECRET_KEY, "no"),
    "in a temporary error": lambda request: error(503, "SlowDown", everything_of(request)),
    "in HTML": lambda request: reply(500, f"<html>{escape(everything_of(request))}</html>"),
    "in a listing": lambda request: reply(200, f"<x>{escape(everything_of(request))}</x>"),
    "in broken XML": lambda request: reply(200, f"<x>{escape(everything_of(request))}"),
    "in the root": lambda request: reply(200, f"<{ACCESS_KEY}>{escape(everything_of(request))}</{ACCESS_KEY}>"),
    "in the headers": lambda request: reply(
        400, b"", {"X-Echo": everything_of(request), "x-amz-error-message": everything_of(request)}
    ),
    "in the status line": lambda request: raw(f"HTTP/1.1 400 {SECRET_KEY}\r\nContent-Length: 0\r\n\r\n".encode()),
    "in what is no HTTP": lambda request: raw(f"{everything_of(request)}\r\n\r\n".encode()),
}


@pytest.mark.parametrize("call", [get, put, put_parts, stat, listing, delete, check], ids=lambda call: call.__name__)
@pytest.mark.parametrize("echo", ECHOES)
def test_secrets_that_the_server_repeats_are_not_told(make: Callable[..., Backend], echo: str, call: Call) -> None:
    with ScriptedServer([from_request(ECHOES[echo])]) as server:
        backend = make(server, sse=True)
        try:
            answer_of(lambda: call(backend))
        except BackendError as error:
            assert_kept_secret(error)
        assert not any(secret in repr(backend) for secret in SECRETS)


def test_an_error_that_is_not_the_servers_tells_no_secret(
    make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer([page()]) as server:
        backend = make(server, sse=True)

        def fail(*_: object) -> None:
            raise KeyError(SECRETS)

        monkeypatch.setattr(backend, "_list_page", fail)
        with pytest.raises(RuntimeError, match="KeyError") as caught:
            check(backend)
        assert_kept_secret(caught.value)


def test_failures_of_a_batch_do_not_tell_secrets(make: Callable[..., Backend]) -> None:
    def answer(request: Request) -> Behaviour:
        told = escape(everything_of(request))
        return reply(
            200,
            f"<DeleteResult><Error><Key>media/key</Key><Code>{SECRET_KEY}</Code><Message>{told}</Message></Error></DeleteResult>",
        )

    with ScriptedServer([from_request(answer)]) as server:
        (failure,) = make(server, sse=True).delete(["media/key"])
        assert_kept_secret(failure.error)
        assert failure.error.code is None or SECRET_KEY not in failure.error.code

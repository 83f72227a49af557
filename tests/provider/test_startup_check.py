"""What the check at the start finds, and in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from backends import open_backend
from backends.errors import AccessDenied
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.settings import ProviderSettings
from storage_provider.startup_check import Problem, find_problem
from tests.backends.no_credentials import no_credentials
from tests.backends.scripted_server import Behaviour, Request, ScriptedServer, error, from_request, reply
from tests.jobs.memory_backend import MemoryBackend
from tests.servers import S3Server, make_client
from tests.servers.process import free_port

pytestmark = pytest.mark.parametrize("s3_server", ["moto"], indirect=True)

Check = Callable[..., Problem | None]


@pytest.fixture
def check(s3_server: S3Server, bucket: str) -> Iterator[Check]:
    """Checks the settings for the test's bucket, changed as the test says."""
    with ExitStack() as stack:

        def check(**changes: Any) -> Problem | None:
            values = {
                "bucket": bucket,
                "backend": "minio",
                "endpoint_url": s3_server.endpoint,
                "access_key_id": s3_server.access_key,
                "secret_access_key": s3_server.secret_key,
            }
            settings = ProviderSettings.parse(values | changes)
            backend = open_backend(settings)
            stack.callback(backend.close)
            return find_problem(settings, backend)

        yield check


@pytest.fixture
def put(s3_server: S3Server, bucket: str) -> Iterator[Callable[[str], None]]:
    client = make_client(s3_server)

    def put(key: str) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=b"")

    yield put
    client.close()


def test_an_empty_bucket_is_well(check: Check) -> None:
    assert check() is None
    assert check(prefix="media") is None


@pytest.mark.parametrize("backend", ["minio", "boto3"])
def test_a_missing_bucket(check: Check, backend: str) -> None:
    problem = check(bucket="no-such-bucket", backend=backend)
    assert problem is not None
    assert "There is no bucket 'no-such-bucket'" in problem.text
    assert not problem.hides_media


def test_an_endpoint_where_nobody_listens(check: Check) -> None:
    problem = check(endpoint_url=f"http://127.0.0.1:{free_port()}", max_attempts=1)
    assert problem is not None
    assert "is `endpoint_url` right" in problem.text


@pytest.mark.parametrize("backend", ["minio", "boto3"])
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "AuthorizationHeaderMalformed", "correct `region_name`"),
        (400, "InvalidRegionName", "correct `region_name`"),
        (301, "PermanentRedirect", "correct `region_name`"),
        (403, "SecondLevelDomainForbidden", "set `addressing_style: virtual`"),
        (400, "PathStyleDomainForbidden", "set `addressing_style: virtual`"),
    ],
)
def test_an_error_that_a_setting_mends_names_it(check: Check, backend: str, status: int, code: str, words: str) -> None:
    with ScriptedServer([error(status, code)]) as server:
        problem = check(endpoint_url=server.endpoint, backend=backend)
    assert problem is not None
    assert words in problem.text


def test_an_endpoint_that_boto3_cannot_use(check: Check) -> None:
    problem = check(endpoint_url="http://minio_server:9000", backend="boto3")
    assert problem is not None
    assert "endpoint_url: boto3 cannot use it" in problem.text
    assert "access_key_id" not in problem.text


@pytest.mark.parametrize(
    ("prefix", "is_open"),
    [({"prefix": "media"}, True), ({"prefix": "media/"}, False), ({"prefix": "media", "raw_prefix": True}, False)],
)
def test_while_the_bucket_does_not_answer_a_prefix_of_two_spellings_may_hide_media(
    check: Check, prefix: dict[str, Any], is_open: bool
) -> None:
    problem = check(endpoint_url=f"http://127.0.0.1:{free_port()}", max_attempts=1, **prefix)
    assert problem is not None
    assert problem.may_hide_media is is_open
    assert ("`prefix: media/`" in problem.text) is is_open


@pytest.mark.parametrize(
    ("code", "status", "is_open"),
    [("AccessDenied", 403, False), (None, 403, False), ("SignatureDoesNotMatch", 403, True), (None, None, True)],
)
def test_who_may_not_list_is_served_and_who_has_no_credentials_yet_is_not(
    bucket: str, code: str | None, status: int | None, is_open: bool
) -> None:
    class RefusingBucket(MemoryBackend):
        def check(self) -> None:
            raise AccessDenied("refused", operation="list", code=code, status=status)

    problem = find_problem(ProviderSettings.parse({"bucket": bucket, "prefix": "media"}), RefusingBucket())
    assert problem is not None
    assert problem.may_hide_media is is_open


@pytest.mark.parametrize(
    ("code", "status", "is_open"),
    [("AccessDenied", 403, False), (None, 403, False), ("ExpiredToken", 403, True), (None, None, True)],
)
def test_credentials_that_are_missing_for_a_moment_do_not_tell_that_the_other_spelling_holds_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, code: str | None, status: int | None, is_open: bool
) -> None:
    def refuse(_settings: ProviderSettings) -> bool:
        raise AccessDenied("refused", operation="list", code=code, status=status)

    monkeypatch.setattr("storage_provider.startup_check._holds_media", refuse)
    problem = find_problem(ProviderSettings.parse({"bucket": bucket, "prefix": "media"}), MemoryBackend())
    assert (problem is not None and problem.may_hide_media) is is_open


@pytest.mark.parametrize(
    "wrong",
    [
        {"access_key_id": None, "access_key_id_path": "/no/such/file"},
        {"sse_customer_key_path": "/no/such/file", "allow_insecure_sse": True},
        {"endpoint_url": "https://127.0.0.1:1", "verify": "/no/such/file"},
    ],
    ids=["credentials", "encryption key", "CA file"],
)
def test_a_file_that_cannot_be_read_is_no_fault_of_the_credentials(check: Check, wrong: dict[str, Any]) -> None:
    problem = check(**wrong)
    assert problem is not None
    assert "/no/such/file: No such file" in problem.text or "/no/such/file as CA file: No such file" in problem.text
    assert "correct `access_key_id`" not in problem.text
    assert "refuses" not in problem.text


def test_no_credentials_at_all_are_not_said_to_be_refused(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_credentials(monkeypatch, tmp_path)
    problem = check(access_key_id=None, secret_access_key=None)
    assert problem is not None
    assert "There are no credentials for bucket" in problem.text
    assert "set access_key_id and secret_access_key" in problem.text
    assert "refuses" not in problem.text


@pytest.mark.parametrize("backend", ["minio", "boto3"])
def test_an_encryption_key_that_is_ignored(check: Check, backend: str) -> None:
    problem = check(backend=backend, sse_customer_key="k" * 32, allow_insecure_sse=True)
    assert problem is not None
    assert "does not encrypt with `sse_customer_key`" in problem.text
    assert "k" * 32 not in problem.text


@pytest.mark.parametrize("root", MEDIA_ROOTS)
def test_a_prefix_that_hides_all_media(check: Check, put: Callable[[str], None], root: str) -> None:
    put(f"media{root}AA/BB/CC")
    problem = check(prefix="media")
    assert problem is not None
    assert "raw_prefix: true" in problem.text
    assert problem.hides_media
    assert check(prefix="media", raw_prefix=True) is None


def test_a_prefix_that_hides_some_media(check: Check, put: Callable[[str], None]) -> None:
    put("medialocal_content/AA/BB/CC")
    put("media/local_content/AA/BB/CC")
    problem = check(prefix="media")
    assert problem is not None
    assert "Some media" in problem.text
    assert "`raw_prefix: true`" in problem.text
    assert not problem.hides_media


def test_a_prefix_with_its_slash_can_be_read_in_one_way_only(check: Check, put: Callable[[str], None]) -> None:
    put("medialocal_content/AA/BB/CC")
    assert check(prefix="media/") is None
    assert check(prefix="other") is None
    assert check() is None


@pytest.mark.parametrize("backend", ["minio", "boto3"])
def test_credentials_that_may_list_only_below_the_prefix_are_well(check: Check, backend: str) -> None:
    def answer(request: Request) -> Behaviour:
        is_allowed = request.query["prefix"].startswith("media/")
        return reply(200, "<ListBucketResult/>") if is_allowed else error(403, "AccessDenied")

    with ScriptedServer([from_request(answer)]) as server:
        assert check(endpoint_url=server.endpoint, backend=backend, prefix="media") is None
        # The other spelling has been looked for.
        assert "medialocal_" in [request.query["prefix"] for request in server.requests]


def test_keys_that_only_look_alike_are_no_media(check: Check, put: Callable[[str], None]) -> None:
    put("media-of-another-kind")
    put("medialocal_contents/AA")
    assert check(prefix="media") is None

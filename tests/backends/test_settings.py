"""Every setting that reaches a bucket: what is taken, what is refused, and in which words."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from backends import BucketSettings
from backends.errors import SettingsError

KEYS = {"access_key_id": "key-of-someone", "secret_access_key": "secret-of-someone"}
NUMBERS = ["max_pool_connections", "connect_timeout", "read_timeout", "max_attempts"]
SSE_KEY = "0123456789abcdef0123456789ABCDEF"


def parse(**values: Any) -> BucketSettings:
    return BucketSettings.parse({"bucket": "media", **values})


def complaint(**values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse(**values)
    return caught.value


def test_a_bucket_is_all_that_is_needed() -> None:
    settings = parse()
    assert settings.backend == "auto"
    assert settings.key_prefix == ""
    assert (settings.connect_timeout, settings.read_timeout, settings.max_attempts) == (5, 30, 3)
    assert settings.max_pool_connections == 50
    assert settings.verify is True
    assert settings.addressing_style == "auto"
    assert settings.multipart_threshold == settings.multipart_chunksize == 8 << 20
    assert settings.request_checksum_calculation == settings.response_checksum_validation == "when_required"
    assert settings.storage_class is None
    assert settings.sse_key() is None
    assert not settings.has_access_key
    assert not settings.uses_sse
    assert settings.is_aws
    assert settings.is_https


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        ({"bucket": None}, "bucket", "required, but missing"),
        ({"bucket": 5}, "bucket", "must be a string; put the value in quotes"),
        ({"bucket": ""}, "bucket", "must be the name of a bucket"),
        ({"bucket": "s3://media"}, "bucket", "without s3://"),
        ({"bucket": "media/synapse"}, "bucket", "without a path"),
        ({"backend": "boto"}, "backend", "must be one of auto, boto3, minio"),
        ({"prefix": "a/../b"}, "prefix", "must not hold '.' or '..' segments"),
        ({"prefix": 5}, "prefix", "put the value in quotes"),
        ({"raw_prefix": True}, "raw_prefix", "there is no prefix"),
        ({"raw_prefix": "yes", "prefix": "a"}, "raw_prefix", "boolean"),
        ({"endpoint_url": "minio.example.com:9000"}, "endpoint_url", "must be a URL such as https://"),
        ({"endpoint_url": "ftp://minio.example.com"}, "endpoint_url", "must be a URL such as https://"),
        ({"endpoint_url": "https://"}, "endpoint_url", "must be a URL such as https://"),
        ({"endpoint_url": "https://[::1"}, "endpoint_url", "must be a URL such as https://"),
        ({"endpoint_url": "https://example.com:port"}, "endpoint_url", "must be a URL such as https://"),
        (
            {"endpoint_url": "https://someone:secret-of-someone@example.com"},
            "endpoint_url",
            "must not hold credentials",
        ),
        ({"endpoint_url": "https://example.com/?a=b"}, "endpoint_url", "must not hold credentials, a query"),
        ({"endpoint_url": "https://example.com/#a"}, "endpoint_url", "or a fragment"),
        (
            {"endpoint_url": "https://example.com/s3", "backend": "minio"},
            "endpoint_url",
            "with a path; set backend: boto3",
        ),
        ({"region_name": "eu west/7"}, "region_name", "must be the name of a region, such as eu-central-1"),
        ({"region_name": "-eu"}, "region_name", "must be the name of a region"),
        ({"access_key_id": "key-of-someone"}, "secret_access_key", "go together; this one is missing"),
        ({"secret_access_key": "secret-of-someone"}, "access_key_id", "go together; this one is missing"),
        ({"secret_access_key_path": "/a"}, "access_key_id", "go together; this one is missing"),
        ({**KEYS, "secret_access_key": 12345678}, "secret_access_key", "must be a string; put the value in quotes"),
        ({**KEYS, "access_key_id_path": "/a"}, "access_key_id", "either access_key_id or access_key_id_path, not both"),
        ({**KEYS, "secret_access_key_path": "/a"}, "secret_access_key", "not both"),
        ({**KEYS, "session_token": "a", "session_token_path": "/a"}, "session_token", "not both"),
        ({"session_token": "secret-of-someone"}, "session_token", "needs access_key_id and secret_access_key"),
        ({"session_token_path": "/a"}, "session_token", "needs access_key_id and secret_access_key"),
        ({"sse_customer_key": SSE_KEY, "sse_customer_key_path": "/a"}, "sse_customer_key", "not both"),
        (
            {"sse_customer_key": SSE_KEY[1:]},
            "sse_customer_key",
            "must be 32 characters, or base64 of 32 bytes; it has 31",
        ),
        ({"sse_customer_key": base64.b64encode(b"short").decode()}, "sse_customer_key", "base64 of 32 bytes; it has 8"),
        ({"sse_customer_key": ""}, "sse_customer_key", "it has 0 characters"),
        ({"sse_customer_key": SSE_KEY, "endpoint_url": "http://a"}, "endpoint_url", "set allow_insecure_sse: true"),
        ({"sse_customer_key_path": "/a", "endpoint_url": "http://a"}, "endpoint_url", "in the clear over http"),
        ({"sse_customer_algo": "aws:kms"}, "sse_customer_algo", "AES256"),
        ({"allow_insecure_sse": 1}, "allow_insecure_sse", "boolean"),
        ({"storage_class": "GLACIER"}, "storage_class", "GLACIER cannot be read at once"),
        ({"storage_class": "deep_archive"}, "storage_class", "use GLACIER_IR or another class"),
        ({"storage_class": "two words"}, "storage_class", "must be the name of a storage class"),
        (
            {"access_key_id": True, "secret_access_key": "a"},
            "access_key_id",
            "must be a string; put the value in quotes",
        ),
        ({"region_name": 1.5}, "region_name", "must be a string; put the value in quotes"),
        ({"access_key_id": "", "secret_access_key": "a"}, "access_key_id", "go together; this one is missing"),
        *(({name: True}, name, "must be a number") for name in NUMBERS),
        ({"max_pool_connections": 0}, "max_pool_connections", "greater than or equal to 1"),
        ({"max_pool_connections": "many"}, "max_pool_connections", "integer"),
        ({"connect_timeout": 0}, "connect_timeout", "greater than 0"),
        ({"connect_timeout": 3601}, "connect_timeout", "less than or equal to 3600"),
        ({"read_timeout": -1}, "read_timeout", "greater than 0"),
        ({"read_timeout": float("nan")}, "read_timeout", "3600"),
        ({"read_timeout": float("inf")}, "read_timeout", "less than or equal to 3600"),
        ({"max_attempts": 0}, "max_attempts", "greater than or equal to 1"),
        ({"addressing_style": "dns"}, "addressing_style", "'auto', 'path' or 'virtual'"),
        ({"verify": ""}, "verify", "must be true, false or the path of a CA file"),
        ({"verify": 1}, "verify", "must be true, false or the path of a CA file"),
        ({"request_checksum_calculation": "never"}, "request_checksum_calculation", "'when_required'"),
        ({"response_checksum_validation": "never"}, "response_checksum_validation", "'when_required'"),
        ({"multipart_threshold": "8 million"}, "multipart_threshold", "must be a size such as 512K, 8M or 20G"),
        ({"multipart_threshold": True}, "multipart_threshold", "must be a size such as 512K, 8M or 20G"),
        ({"multipart_threshold": 0}, "multipart_threshold", "greater than or equal to 1"),
        ({"multipart_threshold": "1G"}, "multipart_threshold", "less than or equal to"),
        ({"multipart_chunksize": "1M"}, "multipart_chunksize", "greater than or equal to 5242880"),
        ({"multipart_chunksize": "65M"}, "multipart_chunksize", "less than or equal to"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_the_remedy(values: dict[str, Any], path: str, words: str) -> None:
    error = complaint(**values)
    assert error.path == (path,)
    assert words in error.reason
    assert str(error) == f"{path}: {error.reason}"
    # As half a sentence after the key.
    assert "\n" not in str(error)
    assert error.reason[0].islower() or error.reason.startswith(("GLACIER", "deep_archive"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("buckets", "bucket"),
        ("endpoint", "endpoint_url"),
        ("secret_key", "secret_access_key"),
        ("acces_key_id", "access_key_id"),
        ("region", "region_name"),
        ("storage-class", "storage_class"),
        ("sse_customer_algorithm", "sse_customer_algo"),
    ],
)
def test_an_unknown_setting_names_the_nearest_known_one(name: str, meant: str) -> None:
    error = complaint(**{name: "secret-of-someone"})
    assert error.path == (name,)
    assert error.reason == f"unknown setting; did you mean {meant!r}?"


def test_an_unknown_setting_that_resembles_none() -> None:
    assert complaint(zzz=1).reason == "unknown setting"


@pytest.mark.parametrize("values", [None, [], "bucket", 5])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    with pytest.raises(SettingsError, match="must be a mapping of settings"):
        BucketSettings.parse(values)


def test_a_null_counts_as_left_out() -> None:
    assert parse(prefix=None, endpoint_url=None, storage_class=None) == parse()


@pytest.mark.parametrize(
    "name",
    [
        "endpoint_url",
        "region_name",
        "access_key_id",
        "secret_access_key",
        "session_token",
        "access_key_id_path",
        "secret_access_key_path",
        "session_token_path",
    ],
)
def test_an_empty_string_counts_as_left_out(name: str) -> None:
    assert parse(**{name: ""}) == parse()


def test_numbers_that_need_no_quotes() -> None:
    settings = parse(region_name=1, access_key_id=1234567890, secret_access_key="secret-of-someone")
    assert settings.region_name == "1"
    assert settings.access_key_id is not None
    assert settings.access_key_id.get_secret_value() == "1234567890"


@pytest.mark.parametrize(
    ("size", "number"),
    [(5 << 20, 5 << 20), ("5M", 5 << 20), ("6m", 6 << 20), ("5120K", 5 << 20), ("5MB", 5 << 20), (" 7 M ", 7 << 20)],
)
def test_sizes_are_written_as_in_synapse(size: object, number: int) -> None:
    assert parse(multipart_chunksize=size).multipart_chunksize == number


@pytest.mark.parametrize(
    ("prefix", "raw", "joined"),
    [
        ("", False, ""),
        ("media", False, "media/"),
        ("media/", False, "media/"),
        ("a/b", False, "a/b/"),
        ("media", True, "media"),
        ("media/", True, "media/"),
        ("media-", True, "media-"),
    ],
)
def test_the_prefix_is_joined_with_one_slash_or_raw(prefix: str, raw: bool, joined: str) -> None:
    assert parse(prefix=prefix, raw_prefix=raw).key_prefix == joined


@pytest.mark.parametrize(
    ("url", "is_aws", "is_https"),
    [
        (None, True, True),
        ("https://s3.amazonaws.com", True, True),
        ("https://s3.eu-central-1.amazonaws.com", True, True),
        ("https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com", True, True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True, True),
        ("https://s3.eusc-de-east-1.amazonaws.eu", True, True),
        ("https://amazonaws.com.evil.example", False, True),
        ("https://notamazonaws.com", False, True),
        ("http://127.0.0.1:9000", False, False),
        ("https://minio.example.com/", False, True),
    ],
)
def test_which_endpoints_are_aws(url: str | None, is_aws: bool, is_https: bool) -> None:
    settings = parse(endpoint_url=url)
    assert (settings.is_aws, settings.is_https) == (is_aws, is_https)


def test_a_slash_at_the_end_of_the_endpoint_is_dropped() -> None:
    assert parse(endpoint_url="https://minio.example.com/s3/").endpoint_url == "https://minio.example.com/s3"


@pytest.mark.parametrize(("verify", "meaning"), [(True, True), (False, False), ("/etc/ca.pem", Path("/etc/ca.pem"))])
def test_verify_is_a_switch_or_a_file(verify: object, meaning: object) -> None:
    assert parse(verify=verify).verify == meaning


@pytest.mark.parametrize("name", ["STANDARD", "STANDARD_IA", "GLACIER_IR", "INTELLIGENT_TIERING", "my-class.1"])
def test_any_storage_class_that_can_be_read(name: str) -> None:
    assert parse(storage_class=name).storage_class == name


CREDENTIALS = ["access_key_id", "secret_access_key", "session_token"]


@pytest.mark.parametrize("name", CREDENTIALS)
def test_white_space_around_a_credential_is_dropped(name: str) -> None:
    """As at the end of a YAML block, or of a Kubernetes secret."""
    credential = getattr(parse(**{**KEYS, name: " key-of-someone\n"}), name)
    assert credential.get_secret_value() == "key-of-someone"


@pytest.mark.parametrize("name", CREDENTIALS)
@pytest.mark.parametrize("inside", ["\n", " ", "\t", "\x00", "\x7f", "\u00e9", "\u2603"])
def test_a_credential_that_cannot_be_sent_is_refused_and_not_shown(name: str, inside: str) -> None:
    error = complaint(**{**KEYS, name: f"secret-of-{inside}someone-else"})
    assert error.path == (name,)
    assert "no white space or line break" in error.reason
    assert "secret-of-" not in repr(error)
    assert "someone-else" not in repr(error)


# --- keys of encryption ---

KEY_FORMS = {
    "32 characters": (SSE_KEY, SSE_KEY.encode()),
    "32 characters that are base64 as well": ("A" * 32, b"A" * 32),
    "base64": (base64.b64encode(bytes(range(32))).decode(), bytes(range(32))),
    "base64 and a newline": (base64.b64encode(bytes(range(32))).decode() + "\n", bytes(range(32))),
    "32 characters and a newline": (SSE_KEY + "\n", SSE_KEY.encode()),
    "spaces at the ends": (" 123456789abcdef0123456789ABCDE ", b" 123456789abcdef0123456789ABCDE "),
}


@pytest.mark.parametrize("form", KEY_FORMS)
def test_forms_of_an_encryption_key(form: str, tmp_path: Path) -> None:
    text, key = KEY_FORMS[form]
    settings = parse(sse_customer_key=text)
    assert settings.uses_sse
    assert settings.sse_key() == key
    path = tmp_path / "key"
    path.write_text(text)
    assert parse(sse_customer_key_path=str(path)).sse_key() == key


def test_an_encryption_key_of_32_raw_bytes_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(range(224, 256)))
    assert parse(sse_customer_key_path=str(path)).sse_key() == bytes(range(224, 256))


def test_parsing_reads_no_file(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    settings = parse(
        access_key_id_path=absent,
        secret_access_key_path=absent,
        session_token_path=absent,
        sse_customer_key_path=absent,
        verify=absent,
    )
    assert settings.has_access_key
    assert settings.uses_sse
    with pytest.raises(SettingsError, match=r"sse_customer_key_path: cannot read .*absent: No such file"):
        settings.sse_key()


@pytest.mark.parametrize(("content", "words"), [("\n", "is empty"), (SSE_KEY[1:], "it has 31 characters")])
def test_a_file_that_holds_no_key(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(SettingsError, match=words) as caught:
        parse(sse_customer_key_path=str(path)).sse_key()
    assert caught.value.path == ("sse_customer_key_path",)


# --- secrets ---


def test_secrets_do_not_show_in_settings() -> None:
    settings = parse(**KEYS, session_token="token-of-someone", sse_customer_key=SSE_KEY)
    for text in (str(settings), repr(settings), repr(asdict(settings))):
        for secret in ("key-of-someone", "secret-of-someone", "token-of-someone", SSE_KEY):
            assert secret not in text


@pytest.mark.parametrize(
    "values",
    [
        {"secret_access_key": "secret-of-someone"},
        {"access_key_id": "secret-of-someone", "bucket": "a/b"},
        {**KEYS, "session_token": ["secret-of-someone"]},
        {"sse_customer_key": "secret-of-someone"},
        {"sse_customer_key": {"secret-of-someone": 1}},
        {"endpoint_url": "https://someone:secret-of-someone@example.com"},
        {"endpoint_url": "://someone:secret-of-someone@example.com"},
    ],
)
def test_secrets_do_not_show_in_complaints(values: dict[str, Any]) -> None:
    error: BaseException | None = complaint(**values)
    assert error is not None
    assert error.__suppress_context__ or error.__context__ is None
    assert "secret-of-someone" not in f"{error} {error!r} {error.__cause__!r}"

"""The settings that reach a bucket, with the same meaning in every backend."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import backends
from backends.errors import SettingsError
from backends.strict_settings import (
    Secret,
    StrictSettings,
    count,
    one_of,
    path,
    seconds,
    size,
    switch,
    text,
    text_or_number,
)

# Of botocore's partitions, those that the public can reach.
_AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu")

SSE_KEY_BYTES = 32

_CREDENTIALS = ("access_key_id", "secret_access_key", "session_token")
UNREADABLE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Storage classes whose objects cannot be read before they have been restored, which takes hours."""


def can_be_sent(credential: str) -> bool:
    """Whether it may stand in the header of a request, as credentials do."""
    return re.fullmatch("[!-~]+", credential) is not None


def parse_credential(text: str) -> str:
    """A credential without the white space around it, which files and YAML blocks end with.

    Raises `ValueError`, which does not show it, for one that cannot be sent.
    """
    credential = text.strip()
    if not can_be_sent(credential):
        raise ValueError("must be printable ASCII characters, with no white space or line break between them")
    return credential


def _secret(value: object) -> Secret:
    return Secret(text(value))


def _credential(value: object) -> Secret:
    return Secret(parse_credential(text(value)))


def _access_key_id(value: object) -> Secret:
    return _credential(text_or_number(value))


def _bucket(value: object) -> str:
    bucket = text(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        raise ValueError("must be the name of a bucket, without s3:// and without a path")
    return bucket


def _backend(value: object) -> str:
    names = ["auto", *backends.BACKENDS]
    if value not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return text(value)


def _prefix(value: object) -> str:
    prefix = text(value)
    if any(segment in (".", "..") for segment in prefix.split("/")):
        raise ValueError("must not hold '.' or '..' segments")
    return prefix


def _endpoint_url(value: object) -> str:
    url = text(value)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("must be a URL such as https://minio.example.com:9000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must not hold credentials, a query or a fragment")
    return url.rstrip("/")


def _region_name(value: object) -> str:
    # As synapse-s3-storage-provider has always taken it, and the id of the access key.
    region = text_or_number(value)
    if not is_region(region):
        raise ValueError("must be the name of a region, such as eu-central-1")
    return region


def _storage_class(value: object) -> str:
    name = text(value)
    if name.upper() in UNREADABLE_CLASSES:
        raise ValueError(
            f"{name} cannot be read at once, so Synapse could not serve the media; use GLACIER_IR or another class"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError("must be the name of a storage class")
    return name


def _verify(value: object) -> bool | Path:
    if not isinstance(value, (bool, Path)) and not (isinstance(value, str) and value):
        raise ValueError("must be true, false or the path of a CA file")
    return value if isinstance(value, bool) else path(value)


_ChecksumMode = Literal["when_required", "when_supported"]
_checksum_mode = one_of("when_required", "when_supported")


@dataclass(frozen=True)
class BucketSettings(StrictSettings):
    """Everything that is needed to reach one bucket; the README explains each key."""

    bucket: Annotated[str, _bucket]
    backend: Annotated[str, _backend] = "auto"
    prefix: Annotated[str, _prefix] = ""
    raw_prefix: Annotated[bool, switch] = False
    region_name: Annotated[str | None, _region_name] = None
    endpoint_url: Annotated[str | None, _endpoint_url] = None
    access_key_id: Annotated[Secret | None, _access_key_id] = None
    access_key_id_path: Annotated[Path | None, path] = None
    secret_access_key: Annotated[Secret | None, _credential] = None
    secret_access_key_path: Annotated[Path | None, path] = None
    session_token: Annotated[Secret | None, _credential] = None
    session_token_path: Annotated[Path | None, path] = None
    sse_customer_key: Annotated[Secret | None, _secret] = None
    sse_customer_key_path: Annotated[Path | None, path] = None
    sse_customer_algo: Annotated[Literal["AES256"], one_of("AES256")] = "AES256"
    allow_insecure_sse: Annotated[bool, switch] = False
    storage_class: Annotated[str | None, _storage_class] = None
    max_pool_connections: Annotated[int, count(1, 10_000)] = 50
    connect_timeout: Annotated[float, seconds(3600)] = 5
    read_timeout: Annotated[float, seconds(3600)] = 30
    max_attempts: Annotated[int, count(1, 100)] = 3
    addressing_style: Annotated[Literal["auto", "path", "virtual"], one_of("auto", "path", "virtual")] = "auto"
    verify: Annotated[bool | Path, _verify] = True
    request_checksum_calculation: Annotated[_ChecksumMode, _checksum_mode] = "when_required"
    response_checksum_validation: Annotated[_ChecksumMode, _checksum_mode] = "when_required"
    # One part is held in memory while it is sent: the upper bounds keep that small, the lower one is S3's.
    multipart_threshold: Annotated[int, size(1, 64 << 20)] = 8 << 20
    multipart_chunksize: Annotated[int, size(5 << 20, 64 << 20)] = 8 << 20

    # Templates leave these empty. Not the encryption key: without it media would be stored in the clear.
    may_be_empty: ClassVar[frozenset[str]] = frozenset(
        {"endpoint_url", "region_name", *_CREDENTIALS, *(f"{name}_path" for name in _CREDENTIALS)}
    )

    def __post_init__(self) -> None:
        """Raise `SettingsError` where settings contradict each other."""
        for name in (*_CREDENTIALS, "sse_customer_key"):
            if getattr(self, name) is not None and getattr(self, f"{name}_path") is not None:
                raise SettingsError((name,), f"give either {name} or {name}_path, not both")
        if self.has_access_key != self._given("secret_access_key"):
            missing = "secret_access_key" if self.has_access_key else "access_key_id"
            raise SettingsError((missing,), "access_key_id and secret_access_key go together; this one is missing")
        if self._given("session_token") and not self.has_access_key:
            raise SettingsError(("session_token",), "needs access_key_id and secret_access_key beside it")
        if self.backend == "minio" and urlsplit(self.endpoint_url or "").path:
            raise SettingsError(("endpoint_url",), "minio-py cannot use an endpoint with a path; set backend: boto3")
        if self.raw_prefix and not self.prefix:
            raise SettingsError(("raw_prefix",), "says how the prefix is joined, but there is no prefix")
        if self.sse_customer_key is not None:
            decode_sse_key(self.sse_customer_key.get_secret_value().encode(), "sse_customer_key")
        self.check_key_stays_secret(self.is_https)

    def check_key_stays_secret(self, is_https: bool) -> None:
        """Raise `SettingsError` where the encryption key would be sent in the clear, and that is not allowed."""
        if self.uses_sse and not is_https and not self.allow_insecure_sse:
            raise SettingsError(
                ("endpoint_url",),
                "the encryption key would be sent in the clear over http: use https, "
                "or set allow_insecure_sse: true where the network is trusted",
            )

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None or getattr(self, f"{name}_path") is not None

    @property
    def has_access_key(self) -> bool:
        """Whether the credentials come from these settings rather than from the environment."""
        return self._given("access_key_id")

    @property
    def uses_sse(self) -> bool:
        """Whether objects are encrypted with the customer's key."""
        return self._given("sse_customer_key")

    @property
    def is_https(self) -> bool:
        """Whether requests go over TLS; without an endpoint they do."""
        return self.endpoint_url is None or self.endpoint_url.startswith("https://")

    @property
    def is_aws(self) -> bool:
        """Whether the endpoint is Amazon's."""
        host = urlsplit(self.endpoint_url).hostname or "" if self.endpoint_url else "amazonaws.com"
        return f".{host}".endswith(_AWS_DOMAINS)

    @property
    def key_prefix(self) -> str:
        """What stands before every key: the prefix with exactly one slash after it, or raw."""
        if not self.prefix or self.raw_prefix:
            return self.prefix
        return self.prefix.rstrip("/") + "/"

    def sse_key(self) -> bytes | None:
        """The 32 bytes of the encryption key, read from its file where one is named; None without one.

        Raises `SettingsError` when the file cannot be read or holds no key.
        """
        if self.sse_customer_key is not None:
            return decode_sse_key(self.sse_customer_key.get_secret_value().encode(), "sse_customer_key")
        if self.sse_customer_key_path is not None:
            name = "sse_customer_key_path"
            return decode_sse_key(read_secret_file(self.sse_customer_key_path, name), name)
        return None


def is_region(name: str) -> bool:
    """Whether it can be the name of a region: it becomes a part of host names and signatures."""
    return re.fullmatch("[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?", name) is not None


def read_secret_file(path: Path, setting: str) -> bytes:
    """The content of a file that a `…_path` setting names, as it is.

    Raises `SettingsError` with the setting's name when it cannot be read or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError((setting,), f"cannot read {path}: {error.strerror}") from None
    if not content.strip():
        raise SettingsError((setting,), f"{path} is empty")
    return content


def decode_sse_key(text: bytes, setting: str) -> bytes:
    """The key of 32 bytes, from 32 characters or from base64; a final newline is dropped.

    Raises `SettingsError`, which tells the length but not the content.
    """
    for candidate in (text, text.strip()):
        if len(candidate) == SSE_KEY_BYTES:
            return candidate
    try:
        decoded = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        decoded = b""
    if len(decoded) != SSE_KEY_BYTES:
        raise SettingsError(
            (setting,),
            f"must be 32 characters, or base64 of 32 bytes; it has {len(text.strip())} characters",
        )
    return decoded

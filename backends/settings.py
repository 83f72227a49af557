"""The settings that reach a bucket, with the same meaning in every backend."""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

import backends
from backends.errors import SettingsError

_Settings = TypeVar("_Settings", bound="StrictSettings")

_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Of botocore's partitions, those that the public can reach.
_AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu")

SSE_KEY_BYTES = 32

_CREDENTIALS = ("access_key_id", "secret_access_key", "session_token")
# Templates leave these empty. Not the encryption key: without it media would be stored in the clear.
_MAY_BE_EMPTY = frozenset({"endpoint_url", "region_name", *_CREDENTIALS, *(f"{name}_path" for name in _CREDENTIALS)})

UNREADABLE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Storage classes whose objects cannot be read before they have been restored, which takes hours."""


def parse_size(value: object) -> object:
    """Bytes of a size as Synapse writes them: a number, or one with K, M, G or T (powers of 1,024)."""
    if isinstance(value, (bool, str)):
        match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)B?\s*", str(value).upper())
        if not match:
            raise ValueError("must be a size such as 512K, 8M or 20G")
        return int(match[1]) * _SIZE_UNITS[match[2]]
    return value


Size = Annotated[int, BeforeValidator(parse_size)]


def refuse_switch(value: object) -> object:
    """The value, which is to be a number: Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Count = Annotated[int, BeforeValidator(refuse_switch)]
Seconds = Annotated[float, BeforeValidator(refuse_switch)]


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


class StrictSettings(BaseModel):
    """A block of settings that refuses what it does not know and never shows a value in an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def parse(cls: type[_Settings], values: object) -> _Settings:
        """Settings from a parsed YAML mapping; a key whose value is null counts as left out.

        Raises `SettingsError` for the first thing that is wrong. Does no I/O.
        """
        if not isinstance(values, Mapping):
            raise SettingsError((), "must be a mapping of settings")
        given = {str(name): value for name, value in values.items() if value is not None}
        for name in given:
            if name not in cls.model_fields:
                raise SettingsError((name,), _unknown(name, list(cls.model_fields)))
        try:
            return cls(**given)
        except ValidationError as error:
            raise _first_error(error) from None


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting; did you mean {near[0]!r}?" if near else "unknown setting"


def _first_error(error: ValidationError) -> SettingsError:
    first = error.errors(include_url=False, include_context=True, include_input=False)[0]
    # Deeper locations only name the branches of a union.
    path = tuple(str(step) for step in first["loc"][:1])
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, SettingsError):
        return SettingsError(path + inner.path, inner.reason)
    if first["type"] == "missing":
        return SettingsError(path, "required, but missing")
    if first["type"] == "string_type":
        return SettingsError(path, "must be a string; put the value in quotes")
    if first["type"] == "extra_forbidden":
        return SettingsError(path, "unknown setting")
    return SettingsError(path, str(inner) if inner else first["msg"][:1].lower() + first["msg"][1:])


class BucketSettings(StrictSettings):
    """Everything that is needed to reach one bucket; the README explains each key."""

    bucket: str
    backend: str = "auto"
    prefix: str = ""
    raw_prefix: StrictBool = False
    region_name: str | None = None
    endpoint_url: str | None = None
    access_key_id: SecretStr | None = None
    access_key_id_path: Path | None = None
    secret_access_key: SecretStr | None = None
    secret_access_key_path: Path | None = None
    session_token: SecretStr | None = None
    session_token_path: Path | None = None
    sse_customer_key: SecretStr | None = None
    sse_customer_key_path: Path | None = None
    sse_customer_algo: Literal["AES256"] = "AES256"
    allow_insecure_sse: StrictBool = False
    storage_class: str | None = None
    max_pool_connections: Count = Field(50, ge=1, le=10_000)
    connect_timeout: Seconds = Field(5, gt=0, le=3600)
    read_timeout: Seconds = Field(30, gt=0, le=3600)
    max_attempts: Count = Field(3, ge=1, le=100)
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    verify: StrictBool | Path = True
    request_checksum_calculation: Literal["when_required", "when_supported"] = "when_required"
    response_checksum_validation: Literal["when_required", "when_supported"] = "when_required"
    # One part is held in memory while it is sent: the upper bounds keep that small, the lower one is S3's.
    multipart_threshold: Size = Field(8 << 20, ge=1, le=64 << 20)
    multipart_chunksize: Size = Field(8 << 20, ge=5 << 20, le=64 << 20)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_left_out(cls, values: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in values.items() if value != "" or name not in _MAY_BE_EMPTY}

    @field_validator("region_name", "access_key_id", mode="before")
    @classmethod
    def _number_is_text(cls, value: object) -> object:
        # As synapse-s3-storage-provider has always taken these two.
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("bucket")
    @classmethod
    def _bucket_is_a_name(cls, bucket: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
            raise ValueError("must be the name of a bucket, without s3:// and without a path")
        return bucket

    @field_validator("backend")
    @classmethod
    def _backend_is_known(cls, backend: str) -> str:
        names = ["auto", *backends.BACKENDS]
        if backend not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return backend

    @field_validator("prefix")
    @classmethod
    def _prefix_has_no_dots(cls, prefix: str) -> str:
        if any(segment in (".", "..") for segment in prefix.split("/")):
            raise ValueError("must not hold '.' or '..' segments")
        return prefix

    @field_validator(*_CREDENTIALS)
    @classmethod
    def _credential_can_be_sent(cls, credential: SecretStr) -> SecretStr:
        return SecretStr(parse_credential(credential.get_secret_value()))

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_url(cls, url: str) -> str:
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

    @field_validator("region_name")
    @classmethod
    def _region_is_a_name(cls, region: str) -> str:
        if not is_region(region):
            raise ValueError("must be the name of a region, such as eu-central-1")
        return region

    @field_validator("storage_class")
    @classmethod
    def _storage_class_is_readable(cls, name: str) -> str:
        if name.upper() in UNREADABLE_CLASSES:
            raise ValueError(
                f"{name} cannot be read at once, so Synapse could not serve the media; use GLACIER_IR or another class"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError("must be the name of a storage class")
        return name

    @field_validator("verify", mode="before")
    @classmethod
    def _verify_is_a_switch_or_a_file(cls, verify: object) -> object:
        if not isinstance(verify, (bool, Path)) and not (isinstance(verify, str) and verify):
            raise ValueError("must be true, false or the path of a CA file")
        return verify

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> BucketSettings:
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
        return self

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

"""The settings of the storage provider: how to reach the bucket, and how to behave in front of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, field_validator

from backends.errors import SettingsError
from backends.settings import BucketSettings, Count, Size, StrictSettings, parse_size

_MISPLACED = {
    "store_local": (
        "version 1.6 removed local files after their upload where it was false; `local_cache` keeps the disk small "
        "now. Leave `store_local: true` beside `module`: false there keeps users' media out of the bucket"
    ),
    "store_remote": (
        "version 1.6 sent nothing to the bucket where it was false. The `store_remote` that Synapse reads stands "
        "beside `module`: whether cached media of other homeservers goes into the bucket"
    ),
    "store_synchronous": "it never had an effect here; the one that Synapse reads stands beside `module`",
    "media_retention": (
        "`local_cache: {max_age: …}` replaces its local_media_lifetime. Nothing replaces its remote_media_lifetime, "
        "after which version 1.6 deleted from the bucket. "
        "Synapse's own `media_retention`, at the top level of homeserver.yaml, deletes media for good"
    ),
}
"""Keys that version 1.6 read inside `config`, and what has come of them."""

_EXTRA_ARGS = {
    "StorageClass": "storage_class",
    "SSECustomerKey": "sse_customer_key",
    "SSECustomerAlgorithm": "sse_customer_algo",
}
"""Arguments of boto3 that older configurations hold, and the settings that they are."""

_SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}

_SHORTEST_MAX_AGE = 3600


def parse_duration(value: object) -> object:
    """Seconds of a duration as Synapse writes them: a number of seconds, or one with s, m (minutes), h, d, w or y."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*([smhdwy]?)\s*", value)
        if not match:
            raise ValueError("must be a duration such as 10m, 12h, 7d or 1y")
        return int(match[1]) * _SECONDS[match[2] or "s"]
    if isinstance(value, bool):
        raise ValueError("must be a duration such as 10m, 12h, 7d or 1y")
    return math.ceil(value) if isinstance(value, float) and math.isfinite(value) else value


Duration = Annotated[int, BeforeValidator(parse_duration)]


def parse_switch(value: object) -> object:
    """A switch as enhanced-s3-storage-provider 1.x took it, with or without quotes."""
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _SWITCHES:
        raise ValueError("must be true or false")
    return _SWITCHES[str(value).lower()]


Switch = Annotated[bool, BeforeValidator(parse_switch)]


class LocalCacheSettings(StrictSettings):
    """What belongs on local disk."""

    max_age: Duration | None = None
    """Seconds."""
    max_size: Size | None = Field(None, ge=0)
    """Bytes."""
    min_free_space: str | int = "10%"
    """Bytes, or a share of the disk in percent."""
    min_age: Duration = Field(600, ge=0)
    """Seconds."""
    read_through: StrictBool = True

    @field_validator("max_age")
    @classmethod
    def _max_age_is_not_minutes(cls, seconds: int) -> int:
        if seconds < _SHORTEST_MAX_AGE:
            raise ValueError("must be at least 1h; `m` means minutes here, not months as in s3_media_upload")
        return seconds

    @field_validator("min_free_space", mode="before")
    @classmethod
    def _min_free_space_is_size_or_share(cls, value: object) -> str | int:
        if isinstance(value, str) and value.strip().endswith("%"):
            share = value.strip()[:-1].strip()
            if not share.isdecimal() or int(share) > 100:
                raise ValueError("must be a size such as 20G, or a share of the disk such as 10%")
            return f"{int(share)}%"
        try:
            size = parse_size(value)
        except ValueError:
            size = None
        if not isinstance(size, int) or size < 0:
            raise ValueError("must be a size such as 20G, or a share of the disk such as 10%")
        return size


class ProviderSettings(BucketSettings):
    """Everything that the `config` block of the storage provider may hold."""

    threadpool_size: Count = Field(20, ge=1, le=1000)
    check_on_startup: Literal["warn", "fail", "off"] = "warn"
    auto_restore: Switch = True
    auto_restore_startup: Switch = True
    auto_restore_monitor_interval: Duration = Field(300, ge=1)
    auto_restore_batch_size: Count = Field(50, ge=1, le=10_000)
    local_cache: Annotated[LocalCacheSettings, BeforeValidator(LocalCacheSettings.parse)] | None = None
    delete_from_bucket: StrictBool = True
    misplaced: tuple[str, ...] = Field((), exclude=True)
    """Keys that were found inside `config` and ignored, each with what to do instead."""

    @classmethod
    def parse(cls, values: object) -> ProviderSettings:
        if not isinstance(values, Mapping):
            return super().parse(values)
        if "misplaced" in values:
            raise SettingsError(("misplaced",), "unknown setting")
        kept = {name: value for name, value in values.items() if name not in _MISPLACED}
        ignored = tuple(f"{name}: {_MISPLACED[name]}" for name in values if name in _MISPLACED)
        return super().parse(_take_over_extra_args(kept) | {"misplaced": ignored})

    @field_validator("check_on_startup", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML 1.1, which Synapse reads, takes an unquoted `off` for false.
        return "off" if value is False else value


def _take_over_extra_args(values: dict[str, Any]) -> dict[str, Any]:
    extra = values.pop("extra_args", None) or {}
    if not isinstance(extra, Mapping):
        raise SettingsError(("extra_args",), "must be a mapping")
    for name, value in extra.items():
        if name not in _EXTRA_ARGS:
            known = ", ".join(_EXTRA_ARGS)
            raise SettingsError(("extra_args", str(name)), f"is not supported; only {known} are")
        setting = _EXTRA_ARGS[name]
        if values.get(setting, value) != value:
            raise SettingsError(("extra_args", str(name)), f"contradicts {setting}; give it once")
        values[setting] = value
    return values

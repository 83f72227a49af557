"""The settings of the storage provider: how to reach the bucket, and how to behave in front of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from backends.errors import SettingsError
from backends.settings import BucketSettings
from backends.strict_settings import Reader, StrictSettings, count, one_of, parse_size, size, switch, within

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


def parse_duration(value: object) -> int:
    """Seconds of a duration as Synapse writes them: a number of seconds, or one with s, m (minutes), h, d, w or y."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*([smhdwy]?)\s*", value)):
        return int(match[1]) * _SECONDS[match[2] or "s"]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return math.ceil(value)
    raise ValueError("must be a duration such as 10m, 12h, 7d or 1y")


def _duration(least: int) -> Reader[int]:
    return lambda value: within(parse_duration(value), least)


def _max_age(value: object) -> int:
    seconds = parse_duration(value)
    if seconds < _SHORTEST_MAX_AGE:
        raise ValueError("must be at least 1h; `m` means minutes here, not months as in s3_media_upload")
    return seconds


def _size_or_share(value: object) -> str | int:
    if isinstance(value, str) and value.strip().endswith("%"):
        share = value.strip()[:-1].strip()
        if share.isdecimal() and int(share) <= 100:
            return f"{int(share)}%"
    else:
        with suppress(ValueError):
            if (bytes_ := parse_size(value)) >= 0:
                return bytes_
    raise ValueError("must be a size such as 20G, or a share of the disk such as 10%")


def _lenient_switch(value: object) -> bool:
    """A switch as enhanced-s3-storage-provider 1.x took it, with or without quotes."""
    if isinstance(value, bool):
        return value
    if str(value).lower() not in _SWITCHES:
        raise ValueError("must be true or false")
    return _SWITCHES[str(value).lower()]


def _check_on_startup(value: object) -> str:
    # YAML 1.1, which Synapse reads, takes an unquoted `off` for false.
    return one_of("warn", "fail", "off")("off" if value is False else value)


@dataclass(frozen=True)
class LocalCacheSettings(StrictSettings):
    """What belongs on local disk."""

    max_age: Annotated[int | None, _max_age] = None
    """Seconds."""
    max_size: Annotated[int | None, size(0)] = None
    """Bytes."""
    min_free_space: Annotated[str | int, _size_or_share] = "10%"
    """Bytes, or a share of the disk in percent."""
    min_age: Annotated[int, _duration(0)] = 600
    """Seconds."""
    read_through: Annotated[bool, switch] = True


@dataclass(frozen=True)
class ProviderSettings(BucketSettings):
    """Everything that the `config` block of the storage provider may hold."""

    threadpool_size: Annotated[int, count(1, 1000)] = 20
    check_on_startup: Annotated[Literal["warn", "fail", "off"], _check_on_startup] = "warn"
    auto_restore: Annotated[bool, _lenient_switch] = True
    auto_restore_startup: Annotated[bool, _lenient_switch] = True
    auto_restore_monitor_interval: Annotated[int, _duration(1)] = 300
    auto_restore_batch_size: Annotated[int, count(1, 10_000)] = 50
    local_cache: Annotated[LocalCacheSettings | None, LocalCacheSettings.parse] = None
    delete_from_bucket: Annotated[bool, switch] = True
    misplaced: tuple[str, ...] = ()
    """Keys that were found inside `config` and ignored, each with what to do instead."""

    @classmethod
    def parse(cls, values: object) -> ProviderSettings:
        if not isinstance(values, Mapping):
            return super().parse(values)
        kept = {name: value for name, value in values.items() if name not in _MISPLACED}
        ignored = tuple(f"{name}: {_MISPLACED[name]}" for name in values if name in _MISPLACED)
        return replace(super().parse(_take_over_extra_args(kept)), misplaced=ignored)


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

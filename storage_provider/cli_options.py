"""The options of the command line that several commands share, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from backends.strict_settings import parse_size
from storage_provider.proofs import Verify

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DAYS = {"d": 1, "m": 30, "y": 365}
_SECONDS = {"s": 1, "h": 3600}


class DurationType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A time span as this command has always taken it: `m` is a month of 30 days."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if not number.isdecimal() or unit not in {**_DAYS, **_SECONDS}:
            self.fail(
                f"{value!r} is not a duration: give a whole number and s, h, d, m (months) or y, such as 2m", param, ctx
            )
        try:
            duration = timedelta(seconds=int(number) * (_SECONDS.get(unit) or 86_400 * _DAYS[unit]))
            # It is counted back from now, to a year that there has been.
            (datetime.now() - duration).timestamp()
        except (OverflowError, ValueError):
            self.fail(f"{value!r} is too long ago", param, ctx)
        return duration


class SizeType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes, such as 512K, 8M or 20G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(size, int) or size <= 0:
            self.fail("must be more than nothing", param, ctx)
        return size


DURATION, SIZE = DurationType(), SizeType()


def _together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


config_options = _together(
    click.option(
        "--homeserver-config-path",
        "config_paths",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Synapse's configuration; may be given several times, as to Synapse.  [default: homeserver.yaml]",
    ),
    click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True),
)
bucket_options = _together(
    click.option("--provider-index", type=click.IntRange(0), help="Which of several S3 providers, from 0."),
    click.option("--backend", help="minio or boto3."),
    click.option("--prefix", help="What the keys start with; nothing is put between it and the path."),
    click.option("--endpoint-url", help="The address of the S3 service."),
    click.option("--region-name", help="The region of the bucket."),
    click.option("--storage-class", help="For new objects."),
    click.option("--sse-customer-key", help="Encryption key (SSE-C); others can see it in the list of processes."),
    click.option("--sse-customer-key-path", type=click.Path(path_type=Path), help="A file with the encryption key."),
    click.option(
        "--sse-customer-algo", "--sse-customer-algorithm", default="AES256", show_default=True, help="For SSE-C."
    ),
    click.option("--workers", type=click.IntRange(1, 256), help="Transfers at a time.  [default: minio 32, boto3 16]"),
    click.option("--max-bandwidth", type=SIZE, help="Bytes a second, such as 20M."),
    click.option("--json", "as_json", is_flag=True, help="Results as JSON."),
)
delete_options = _together(
    click.option("--delete", is_flag=True, help="Remove files from the disk that are proved to be in the bucket."),
    click.option(
        "--verify",
        type=click.Choice([choice.value for choice in Verify]),
        default=Verify.PROOF.value,
        show_default=True,
        help="How to prove it: by checksum where the server tells one and else by reading back, "
        "always by reading back (full), or by the size alone.",
    ),
)

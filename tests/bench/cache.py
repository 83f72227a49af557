"""Measures the local cache of the storage provider, in a real Synapse.

    bounded  ten times as much media as the disk may hold is written and read at random
    many     a pass over as much media as a big homeserver has; memory of the Synapse process

In the first one, every answer is compared with what was written.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from tests.bench import cache_bounds, cache_memory
from tests.bench.conditions import server_version
from tests.bench.options import Options, finish
from tests.bench.report import Row, Samples, say, value
from tests.servers import S3Server, ServerPool, ServerUnavailable

_MIB = 1 << 20

_MOST_GROWTH_MIB = 10
"""What counts as flat: from 100,000 to 1,000,000 it is twelve bytes a media."""

_BACKENDS = ("minio", "boto3")


def bounded(options: Options, server: S3Server, directory: Path) -> list[Row]:
    sizes = cache_bounds.QUICK if options.quick else cache_bounds.WHOLE
    found = cache_bounds.measure(server, directory, sizes)
    limit = sizes.max_size // _MIB
    what = f"`max_size` of {limit:,} MiB, {found.written / _MIB:,.0f} MiB of media"
    return [
        value(
            f"{what}: the most on the disk, without what is younger than `min_age`",
            _one(f"{found.seconds:.0f} s, {sizes.clients} clients", "MiB", found.most_settled / _MIB),
            at_most=limit,
        ),
        value(f"{what}: the most on the disk, everything", _one("", "MiB", found.most / _MIB)),
        value(f"{what}: wrong answers", _one(f"{found.reads:,} reads", "answers", found.wrong), at_most=0),
        value(
            f"{what}: on the disk of {found.read_at_last} old files that were read at last",
            _one("", "files", found.kept_at_last),
            at_least=found.read_at_last,
        ),
    ]


def many(options: Options, server: S3Server, directory: Path) -> list[Row]:
    few, most = (2_000, 20_000) if options.quick else (100_000, 1_000_000)
    rows = []
    for backend in _BACKENDS:
        first, last = (cache_memory.measure(directory, backend, number) for number in (few, most))
        told = f"idle {last.idle_mib:.0f} MiB"
        for number, each in ((few, first), (most, last)):
            told += f", {number:,} media {each.beyond_idle_mib:.0f} MiB more in {each.seconds:.0f} s"
        what = f"a pass over {most:,} media, {backend}"
        rows += [
            value(f"{what}: memory beyond idle", _one(told, "MiB", last.beyond_idle_mib)),
            value(
                f"… more than for {few:,} media",
                _one("", "MiB", last.beyond_idle_mib - first.beyond_idle_mib),
                at_most=_MOST_GROWTH_MIB,
            ),
            value(f"{what}: longest block of the reactor", _one("", "ms", last.longest_block_ms)),
        ]
    return rows


def _one(name: str, unit: str, measured: float) -> Samples:
    return Samples(name, unit, (measured,))


PARTS: dict[str, Callable[[Options, S3Server, Path], Sequence[Row]]] = {"bounded": bounded, "many": many}

_NOTES = (
    "Database: SQLite. “bounded”: files of 30 KiB to 16 MiB are uploaded and read through Synapse; the disk is looked at four "
    "times a second, in whole blocks.",
    "“a pass over … media”: so many rows, and as many objects, in a bucket that a server of the benchmark's own makes up. A tenth "
    "is on the disk, has not been used for long and is evicted; a hundredth was used lately and is restored; all else is in the "
    "bucket alone, whose listing is compared with the database at the end.",
)


def main() -> int:
    options = Options.parse("cache", __doc__, tuple(PARTS))
    try:
        with closing(ServerPool()) as pool, tempfile.TemporaryDirectory(prefix="bench-cache-") as name:
            server, directory = pool.start_s3("minio"), Path(name)
            rows = [row for part in options.parts for row in PARTS[part](options, server, directory)]
            return finish(options, "The local cache", rows, [server_version(server)], directory, _NOTES)
    except ServerUnavailable as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

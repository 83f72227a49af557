"""Measures s3_media_upload against the one of synapse-s3-storage-provider.

The time is that of the whole process, its start-up included. Every run has a bucket and a cache.db of its own;
`update`, which fills cache.db, is not measured. Parts:

  fast      many small files to a fast server
  distant   the same, with a server that takes 20 ms longer for every request
  again     `upload` once more, when all is there, to either server
  delete    `upload --delete`
  large     a few large files
  memory    a database and a bucket of a million
"""

from __future__ import annotations

import compileall
import contextlib
import functools
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.conditions import database_version, server_version
from tests.bench.delaying_proxy import DelayingProxy
from tests.bench.environments import ROOT
from tests.bench.measured import CommandFailed, Measured
from tests.bench.media import fill, make_synapse_database, random_media, write_files
from tests.bench.options import Options, finish
from tests.bench.report import Row, Samples, alternate, ratio, say, value
from tests.bench.upload_memory import measure_memory
from tests.bench.upload_site import BOTO3, MINIO, THEIRS, Job, Site, Tool, WrongResult
from tests.servers import S3Server, ServerPool, ServerUnavailable

_FILE_BYTES = 30 << 10
_LARGE_FILES = 4
_DELAY_SECONDS = 0.020
_CONTESTANTS = (THEIRS, MINIO, BOTO3)


@dataclass(frozen=True)
class Numbers:
    """How much there is to do."""

    files: int
    large_bytes: int
    few_rows: int
    many_rows: int


WHOLE = Numbers(files=3000, large_bytes=256 << 20, few_rows=100_000, many_rows=1_000_000)
QUICK = Numbers(files=300, large_bytes=64 << 20, few_rows=2_000, many_rows=20_000)


@dataclass(frozen=True)
class Bench:
    """What all parts work with."""

    site: Site
    options: Options
    numbers: Numbers

    def small_files(self) -> Path:
        """A store with many small files; only the database's rows are made anew if it is there already."""
        media = list(random_media(self.numbers.files))
        fill(self.site.database, media, _FILE_BYTES)
        store = self.site.directory / "small"
        if not store.exists():
            say(f"Writing {len(media):,} files of {_FILE_BYTES >> 10} KiB …")
            write_files(store, media, _FILE_BYTES)
        return store

    def what(self, does: str) -> str:
        return f"{self.numbers.files:,} files of {_FILE_BYTES >> 10} KiB, {does}"

    def compare(
        self, part: str, what: str, run: Callable[[Tool], Measured], rounds: int, minio: float, boto3: float
    ) -> tuple[list[Row], dict[Tool, list[Measured]]]:
        """Measure theirs and both of ours, which must be so many times faster; the rows, and all that was measured."""
        runs: dict[Tool, list[Measured]] = {tool: [] for tool in _CONTESTANTS}

        def seconds(tool: Tool) -> float:
            measured = run(tool)
            runs[tool].append(measured)
            return measured.seconds

        contestants = {tool.name: functools.partial(seconds, tool) for tool in _CONTESTANTS}
        samples = alternate(contestants, self.options.rounds_or(rounds), "s", part)
        for tool, measured in runs.items():
            cpu = statistics.median(each.cpu_seconds for each in measured)
            samples[tool.name] = replace(samples[tool.name], note=f"{cpu:.2f} s of CPU")
        theirs = samples[THEIRS.name]
        rows = [
            ratio(f"{what}: {tool.name}", theirs, samples[tool.name], at_least=target)
            for tool, target in ((MINIO, minio), (BOTO3, boto3))
        ]
        return rows, runs


def fast(bench: Bench) -> list[Row]:
    """`upload` of small files to a server near by."""
    store = bench.small_files()

    def run(tool: Tool) -> Measured:
        return _upload_all(bench, bench.site.job(tool, store))

    return bench.compare("fast", bench.what("`upload`"), run, 5, minio=5, boto3=2.5)[0]


def distant(bench: Bench) -> list[Row]:
    """`upload` of small files to a server far away."""
    store = bench.small_files()
    with DelayingProxy(bench.site.server.endpoint, _DELAY_SECONDS) as proxy:

        def run(tool: Tool) -> Measured:
            return _upload_all(bench, bench.site.job(tool, store, proxy.url))

        what = bench.what(f"`upload`, {_DELAY_SECONDS * 1000:.0f} ms more a request")
        return bench.compare("distant", what, run, 2, minio=30, boto3=15)[0]


def again(bench: Bench) -> list[Row]:
    """`upload` when everything is in the bucket already, by the same program, near by and far away."""
    store = bench.small_files()
    jobs = {tool: bench.site.job(tool, store) for tool in _CONTESTANTS}
    for tool, job in jobs.items():
        say(f"again: {tool.name} uploads for the first time …")
        _upload_all(bench, job)

    what = bench.what("`upload` when all is there")
    near = bench.compare("again", what, lambda tool: jobs[tool].upload(), 5, minio=20, boto3=20)[0]
    with DelayingProxy(bench.site.server.endpoint, _DELAY_SECONDS) as proxy:

        def run_far_away(tool: Tool) -> Measured:
            return replace(jobs[tool], endpoint=proxy.url).upload()

        what = f"{what}, {_DELAY_SECONDS * 1000:.0f} ms more a request"
        far_away = bench.compare("again", what, run_far_away, 2, minio=20, boto3=20)[0]
    return near + far_away


def delete(bench: Bench) -> list[Row]:
    """`upload --delete` of small files that are not in the bucket yet."""
    master = bench.small_files()

    def run(tool: Tool) -> Measured:
        store = bench.site.new_directory("store")
        shutil.copytree(master, store, dirs_exist_ok=True)
        job = bench.site.job(tool, store)
        job.update()
        measured = job.upload("--delete")
        job.check_objects(bench.numbers.files)
        job.check_no_files()
        return measured

    return bench.compare("delete", bench.what("`upload --delete`"), run, 5, minio=5, boto3=5)[0]


def large(bench: Bench) -> list[Row]:
    """`upload` of large files, and the memory that it takes."""
    size = bench.numbers.large_bytes
    media = list(random_media(_LARGE_FILES, seed=6))
    fill(bench.site.database, media, size)
    store = bench.site.new_directory("large")
    say(f"Writing {_LARGE_FILES} files of {size >> 20} MiB …")
    write_files(store, media, size)

    def run(tool: Tool) -> Measured:
        job = bench.site.job(tool, store)
        job.update()
        measured = job.upload()
        job.check_objects(_LARGE_FILES)
        job.empty_bucket()
        return measured

    what = f"{_LARGE_FILES} files of {size >> 20} MiB, `upload`"
    rows, runs = bench.compare("large", what, run, 3, minio=1, boto3=1)
    for tool in (MINIO, BOTO3, THEIRS):
        samples = Samples("", "MiB", tuple(measured.peak_mib for measured in runs[tool]))
        rows.append(value(f"{what}, peak memory: {tool.name}", samples, at_most=None if tool is THEIRS else 250))
    return rows


def memory(bench: Bench) -> list[Row]:
    """`sync --delete` of as many media as a big homeserver has."""
    return measure_memory(bench.site, (MINIO, BOTO3), bench.numbers.few_rows, bench.numbers.many_rows)


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    part.__name__: part for part in (fast, distant, again, delete, large, memory)
}

_NOTES = (
    "Times are those of the whole process, its start-up included. Each run has a bucket and a cache.db that are new; "
    "`update`, which fills cache.db, ran before and is not in them. Every result was looked at: so many objects in "
    "the bucket, no file left after `--delete`.",
    f"“{_DELAY_SECONDS * 1000:.0f} ms more a request”: a proxy holds every request for so long before it passes it on. "
    "Opening a connection takes no longer. As theirs needs minutes for it, there are fewer rounds.",
    "“when all is there”: by the program that has uploaded it, with the cache.db of that run.",
    "“peak memory” is the process's largest resident set. `sync --delete` has as many rows in Synapse's database as there "
    "are objects in the bucket, which a server of the benchmark's own makes up while it is listed; every tenth of the media "
    "is on the disk, as an empty file, and is removed. cache.db is new.",
)


def _upload_all(bench: Bench, job: Job) -> Measured:
    job.update()
    measured = job.upload()
    job.check_objects(bench.numbers.files)
    return measured


def main() -> int:
    options = Options.parse("upload", __doc__, list(PARTS))
    # A plain `kill` cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # As pip does it for what it installs, so that no run is the one that compiles.
    for package in ("backends", "storage_provider"):
        compileall.compile_dir(ROOT / package, quiet=1)
    try:
        with _site() as (site, versions):
            bench = Bench(site, options, QUICK if options.quick else WHOLE)
            rows = [row for part in options.parts for row in PARTS[part](bench)]
            return finish(options, "s3_media_upload", rows, versions, site.directory, _NOTES)
    except (CommandFailed, ServerUnavailable, WrongResult) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _site() -> Iterator[tuple[Site, list[str]]]:
    """A site on what the machine has, and the versions of that."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-bench-")))
        pool = ServerPool()
        stack.callback(pool.close)
        say("Starting the servers …")
        server = _fast_server(pool)
        database = make_synapse_database(pool, directory)
        yield Site(directory, server, database), [server_version(server), database_version(database)]


def _fast_server(pool: ServerPool) -> S3Server:
    """MinIO where it is on the machine, else Ceph. Raises `ServerUnavailable`."""
    try:
        return pool.start_s3("minio")
    except ServerUnavailable as error:
        say(f"{error}; Ceph instead …")
        return pool.start_s3("ceph")


if __name__ == "__main__":
    sys.exit(main())

"""Whether the disk keeps to `max_size` while much more than that is written and read."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage_provider.cache_policy import space_of
from storage_provider.media_paths import Media, content_path
from tests.bench import contestant
from tests.bench.report import say
from tests.provider.homeserver import Homeserver
from tests.servers import S3Server, make_bucket

_LOOK_SECONDS = 0.25
_READS_A_WRITE = 2

_SIZES = (30 << 10, 300 << 10, 4 << 20, 16 << 20)
"""Of files, in bytes; each is as likely as the others."""

# Of the limit; after a pass there is a tenth of it free, and what is read at last needs more.
_READ_AT_LAST = 0.15
_LARGEST_READ_AT_LAST = 4 << 20
_PATIENCE = 60


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    max_size: int
    """Bytes, as in the settings."""
    written: int
    """Bytes, all files together."""
    min_age_seconds: int
    clients: int = 8


WHOLE = Sizes(max_size=1 << 30, written=10 << 30, min_age_seconds=10)
QUICK = Sizes(max_size=64 << 20, written=640 << 20, min_age_seconds=2)


@dataclass(frozen=True)
class Found:
    """What was seen."""

    seconds: float
    written: int
    """Bytes."""
    most: int
    """Bytes that were on the disk at once."""
    most_settled: int
    """The same without what had been put there within `min_age`."""
    reads: int
    wrong: int
    """Answers that were not what had been written."""
    read_at_last: int
    """Old files that were read when all was written."""
    kept_at_last: int
    """How many of them are on the disk."""


def measure(server: S3Server, directory: Path, sizes: Sizes) -> Found:
    """Write and read at random, then read some old files, which belong on the disk then."""
    cache = {"max_size": sizes.max_size, "min_age": f"{sizes.min_age_seconds}s", "min_free_space": 0}
    homeserver = contestant.ours(
        directory / "bounded", server, make_bucket(server), "minio", auto_restore_monitor_interval=1, local_cache=cache
    ).homeserver
    with homeserver:
        users = _Users(homeserver, sizes)
        watch = _Watch(homeserver.media_store, sizes.min_age_seconds)
        begun = time.monotonic()
        with watch, ThreadPoolExecutor(sizes.clients) as threads:
            for done in [threads.submit(users.write_and_read, seed) for seed in range(sizes.clients)]:
                done.result()
            seconds = time.monotonic() - begun
            read, kept = users.read_old_files()
        return Found(seconds, users.written, watch.most, watch.most_settled, users.reads, users.wrong, read, kept)


@dataclass
class _Users:
    """What they have written, by media id, as its SHA-256."""

    homeserver: Homeserver
    sizes: Sizes
    written: int = 0
    reads: int = 0
    wrong: int = 0
    _contents: dict[str, bytes] = field(default_factory=dict)
    _lengths: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write_and_read(self, seed: int) -> None:
        """In turns, until enough has been written."""
        chance = random.Random(seed)
        while self.written < self.sizes.written:
            self._write(chance.randbytes(chance.choice(_SIZES)))
            for _ in range(_READS_A_WRITE):
                with self._lock:
                    media_id = chance.choice(list(self._contents))
                self._read(media_id)

    def read_old_files(self) -> tuple[int, int]:
        """Read files that are not on the disk, as long as it takes until they are; how many, and how many are in the end."""
        chosen, size = [], 0
        for media_id, length in self._lengths.items():
            if (
                length <= _LARGEST_READ_AT_LAST
                and not self._has(media_id)
                and size < self.sizes.max_size * _READ_AT_LAST
            ):
                chosen.append(media_id)
                size += length
        ends = time.monotonic() + _PATIENCE
        while time.monotonic() < ends and (left := [each for each in chosen if not self._has(each)]):
            for media_id in left:
                self._read(media_id)
            # They are kept, or a pass makes room for them, after they were answered.
            time.sleep(_LOOK_SECONDS)
        return len(chosen), sum(map(self._has, chosen))

    def _write(self, content: bytes) -> None:
        media_id = self.homeserver.upload(content)
        with self._lock:
            self.written += len(content)
            self._contents[media_id] = hashlib.sha256(content).digest()
            self._lengths[media_id] = len(content)
            if len(self._contents) % 200 == 0:
                say(f"bounded: {len(self._contents):,} files, {self.written >> 20:,} MiB written")

    def _read(self, media_id: str) -> None:
        answer = self.homeserver.download(media_id)
        is_right = answer.status == 200 and hashlib.sha256(answer.body).digest() == self._contents[media_id]
        with self._lock:
            self.reads += 1
            self.wrong += not is_right

    def _has(self, media_id: str) -> bool:
        return (self.homeserver.media_store / content_path(Media("", media_id))).exists()


class _Watch:
    """Looks again and again at what is in a directory, in a thread, within a `with` block."""

    def __init__(self, directory: Path, min_age_seconds: int) -> None:
        self.most = self.most_settled = 0
        self._directory = directory
        self._min_age_seconds = min_age_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            young_since = time.time() - self._min_age_seconds
            files = list(_files(self._directory))
            settled = (file for file in files if file.st_ctime < young_since)
            self.most = max(self.most, sum(map(_space, files)))
            self.most_settled = max(self.most_settled, sum(map(_space, settled)))


def _files(directory: Path) -> Iterator[os.stat_result]:
    for place, _, names in os.walk(directory):
        for name in names:
            # It may go at any moment.
            with suppress(FileNotFoundError):
                yield Path(place, name).stat()


def _space(file: os.stat_result) -> int:
    return space_of(file.st_size)

"""Moving one file, bounds on moving many, and what an ETag proves."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backends.base import Backend, ObjectInfo
from backends.errors import AccessDenied, BackendError, BackendUnavailable, ObjectNotFound, RequestRejected
from storage_provider.media_store import MediaStore
from storage_provider.synapse_db import MediaFacts
from storage_provider.transfers import (
    Bandwidth,
    BucketFails,
    Digest,
    Failures,
    Stopped,
    digest_of_object,
    download,
    etag_proves,
    fetch,
    fits,
    run_at_once,
)
from tests.jobs.memory_backend import MemoryBackend

PATH = "local_content/Ab/cd/Efgh"
UNBOUND = Bandwidth(None, threading.Event())
THUMBNAIL = "32-32-image-png-crop"
THUMBNAIL_PATH = f"local_thumbnails/Ab/cd/Efgh/{THUMBNAIL}"


class Waits(threading.Event):
    """Notes for how long it would be waited."""

    def __init__(self, *, is_over: bool = False) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._is_over = is_over

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0)
        return self._is_over


def test_bandwidth_spreads_bytes_over_time() -> None:
    waits = Waits()
    bandwidth = Bandwidth(1000, waits)
    for _ in range(4):
        bandwidth.spend(4000)
    assert [round(seconds) for seconds in waits.seconds] == [0, 4, 8, 12]


def test_bandwidth_without_a_bound_waits_for_nothing() -> None:
    waits = Waits(is_over=True)
    Bandwidth(None, waits).spend(1 << 40)
    assert waits.seconds == []


def test_end_of_the_run_ends_the_waiting() -> None:
    with pytest.raises(Stopped):
        Bandwidth(1, Waits(is_over=True)).spend(1 << 40)


def count(failures: Failures, error: BackendError, times: int, backend: Backend | None = None) -> None:
    for _ in range(times):
        failures.count(error, backend or MemoryBackend())


def test_large_upload_lets_readers_take_turns_with_it() -> None:
    waits = Waits()
    Bandwidth(1_000_000, waits).spend(8 << 20)
    turns = [after - before for before, after in itertools.pairwise(waits.seconds)]
    assert max(turns) * 256 <= 10
    assert round(waits.seconds[-1]) == 8


@pytest.mark.parametrize("bytes_per_second", [110_000, 1_000_000, 1 << 30])
def test_reader_of_an_object_waits_at_most_ten_seconds_for_its_turn(
    bytes_per_second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend()
    backend.objects[PATH] = bytes(2 << 20)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)

    class Counts(Bandwidth):
        def spend(self, size: int, *, is_begun: bool = False) -> None:
            assert size * 256 / bytes_per_second <= 10
            super().spend(size, is_begun=is_begun)

    bandwidth = Counts(bytes_per_second, Waits())
    digest_of_object(backend, PATH, "", bandwidth)
    assert fetch(backend, PATH, io.BytesIO(), bandwidth, length=None, sha256=None) == 2 << 20


@pytest.mark.parametrize("kind", [BackendUnavailable, AccessDenied])
def test_bucket_is_given_up_after_failures_in_a_row(kind: type[BackendError]) -> None:
    failures = Failures()
    error = kind("so it is", operation="put", key="k")
    count(failures, error, 19)
    failures.forget()
    count(failures, error, 19)
    with pytest.raises(BucketFails, match="so it is"):
        count(failures, error, 1)


@pytest.mark.parametrize("kind", [ObjectNotFound, RequestRejected])
def test_failures_of_files_are_not_those_of_the_bucket(kind: type[BackendError]) -> None:
    count(Failures(), kind("so it is", operation="put", key="k"), 100)


@pytest.mark.parametrize("operation", ["open", "stat"])
def test_objects_that_may_not_be_read_are_no_failure_of_a_bucket_that_can_be_reached(operation: str) -> None:
    backend = MemoryBackend()
    count(Failures(), AccessDenied("so it is", operation=operation, key="k", code="AccessDenied"), 100, backend)
    assert backend.calls == [("check", "")] * 5


def test_objects_that_may_not_be_read_are_too_many_where_the_bucket_may_not_be_either() -> None:
    backend = MemoryBackend()
    refusal = AccessDenied("so it is", operation="open", key="k")

    def refuse(_operation: str, _key: str) -> None:
        raise refusal

    backend.before = refuse
    with pytest.raises(BucketFails, match="so it is"):
        count(Failures(), refusal, 20, backend)


@pytest.mark.parametrize(
    "other",
    [
        BackendUnavailable("other", operation="open", key="k"),
        AccessDenied("other", operation="put", key="k"),
        AccessDenied("other", operation="open", key="k", code="ExpiredToken"),
    ],
    ids=["unavailable", "put", "expired"],
)
def test_objects_that_may_not_be_read_excuse_no_other_failure(other: BackendError) -> None:
    failures, backend = Failures(), MemoryBackend()
    count(failures, other, 1, backend)
    refusal = AccessDenied("so it is", operation="open", key="k")
    count(failures, refusal, 18, backend)
    with pytest.raises(BucketFails):
        count(failures, refusal, 1, backend)
    assert backend.calls == []


def test_download_is_on_the_disk_when_it_is_asked_whether_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend()
    backend.objects[PATH] = b"content"
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: done.append("synced"))

    def is_wanted() -> bool:
        done.append("asked")
        return True

    known: dict[str, Any] = {"length": 7, "sha256": None, "used_ms": 1_600_000_000_500}
    assert download(backend, MediaStore(tmp_path), PATH, UNBOUND, is_wanted=is_wanted, **known) == 7
    assert done == ["synced", "asked"]
    assert (tmp_path / PATH).stat().st_mtime == 1_600_000_000.5


def in_parts(content: bytes, size: int) -> str:
    digests = [hashlib.md5(content[start : start + size]).digest() for start in range(0, len(content), size)]
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def test_etag_proves_equal_content_and_nothing_else(tmp_path: Path) -> None:
    content = bytes(range(256)) * (9 << 12)
    store = MediaStore(tmp_path)
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    plain = hashlib.md5(content).hexdigest()

    def proves(etag: str) -> bool:
        return etag_proves(store, PATH, ObjectInfo(PATH, len(content), etag))

    assert proves(plain)
    assert proves(in_parts(content, 8 << 20))
    assert proves(in_parts(content, 5 << 20))
    for etag in (
        in_parts(content, 6 << 20),
        in_parts(content[:-1] + b"x", 8 << 20),
        hashlib.md5(content[:-1]).hexdigest(),
        "",
        plain[:-1],
        plain + "-",
        plain + "-x",
        plain + "-0",
        plain + "-2",
        "0" * 32,
    ):
        assert not proves(etag), etag


def test_etag_of_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.touch()
    empty = ObjectInfo(PATH, 0, hashlib.md5().hexdigest())
    assert etag_proves(MediaStore(tmp_path), PATH, empty)
    assert not etag_proves(MediaStore(tmp_path), PATH, ObjectInfo(PATH, 0, hashlib.md5(b"x").hexdigest()))


def test_work_at_once_takes_no_more_than_that_many_and_all_in_the_end() -> None:
    lock, taken, most = threading.Lock(), [0], [0]

    def items() -> Iterator[int]:
        for number in range(50):
            with lock:
                taken[0] += 1
                most[0] = max(most[0], taken[0])
            yield number

    def done() -> None:
        with lock:
            taken[0] -= 1

    found = set()
    with ThreadPoolExecutor(4) as threads:
        for number, future in run_at_once(threads, lambda number: number * 2, items(), at_most=3):
            done()
            assert future.result() == number * 2
            found.add(number)
    assert found == set(range(50))
    # Three under way, and the one that has just been handed over.
    assert most[0] <= 4


def test_work_at_once_hands_over_failures_with_what_failed() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        return number

    with ThreadPoolExecutor(2) as threads:
        failed = [
            number
            for number, future in run_at_once(threads, work, range(5), at_most=2)
            if future.exception() is not None
        ]
    assert failed == [2]


def test_work_at_once_that_is_given_up_begins_nothing_more() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        results = run_at_once(threads, begun.append, range(1000), at_most=5)
        next(results)
        results.close()
    assert len(begun) <= 6


class OnlyLength:
    length = 3

    @property
    def sha256(self) -> str:
        raise AssertionError("it is hashed")


@pytest.mark.parametrize(
    ("facts", "path", "digest", "fit"),
    [
        (MediaFacts(3, "right", False, {}), PATH, Digest(3, "right"), True),
        (MediaFacts(3, None, False, {}), PATH, Digest(3, "any"), True),
        (MediaFacts(3, "right", False, {}), PATH, Digest(3, "wrong"), False),
        (MediaFacts(3, None, False, {}), PATH, Digest(2, "any"), False),
        (None, PATH, Digest(3, "right"), False),
        (MediaFacts(3, "right", False, {THUMBNAIL: 7}), THUMBNAIL_PATH, Digest(7, "any"), True),
        (MediaFacts(3, "right", False, {THUMBNAIL: 7}), THUMBNAIL_PATH, Digest(3, "right"), False),
        (MediaFacts(3, "right", False, {}), THUMBNAIL_PATH, Digest(3, "right"), False),
    ],
)
def test_content_fits_what_the_database_says(facts: MediaFacts | None, path: str, digest: Digest, fit: bool) -> None:
    assert fits(facts, path, digest) is fit


@pytest.mark.parametrize(
    ("facts", "path", "fit"),
    [
        (MediaFacts(3, None, False, {}), PATH, True),
        (MediaFacts(2, "right", False, {}), PATH, False),
        (MediaFacts(2, "right", False, {THUMBNAIL: 3}), THUMBNAIL_PATH, True),
        (None, PATH, False),
    ],
)
def test_content_is_not_hashed_where_that_decides_nothing(facts: MediaFacts | None, path: str, fit: bool) -> None:
    assert fits(facts, path, OnlyLength()) is fit


def test_end_of_the_run_does_not_end_a_file_that_is_begun() -> None:
    Bandwidth(1 << 40, Waits(is_over=True)).spend(1 << 20, is_begun=True)


class Checked:
    """A bucket of which only the check is asked."""

    def __init__(self, error: BackendError | None) -> None:
        self._error = error
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(
    ("error", "gives_up"),
    [
        (None, False),
        (BackendUnavailable("down", operation="check"), True),
        (AccessDenied("expired", operation="check", code="ExpiredToken"), True),
        # Who may not list can reach the bucket all the same.
        (AccessDenied("no", operation="check", code="AccessDenied"), False),
    ],
)
def test_bucket_that_failed_is_looked_at_again_in_the_end(error: BackendError | None, gives_up: bool) -> None:
    bucket: Any = Checked(error)
    failures = Failures()
    failures.check(bucket)
    assert bucket.checks == 0
    failures.count(BackendUnavailable("down", operation="put", key="k"), bucket)
    if gives_up:
        with pytest.raises(BucketFails):
            failures.check(bucket)
    else:
        failures.check(bucket)
    assert bucket.checks == 1

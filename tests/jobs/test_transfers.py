"""Moving one file, bounds on moving many, and what an ETag proves."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from backends.base import ObjectInfo
from backends.errors import AccessDenied, BackendError, BackendUnavailable, ObjectNotFound, RequestRejected
from storage_provider.media_store import MediaStore
from storage_provider.transfers import Bandwidth, BucketFails, Failures, Stopped, etag_proves

PATH = "local_content/Ab/cd/Efgh"


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
        bandwidth.spend(500_000)
    assert [round(seconds, -1) for seconds in waits.seconds] == [0, 500, 1000, 1500]


def test_bandwidth_without_a_bound_waits_for_nothing() -> None:
    waits = Waits(is_over=True)
    Bandwidth(None, waits).spend(1 << 40)
    assert waits.seconds == []


def test_end_of_the_run_ends_the_waiting() -> None:
    with pytest.raises(Stopped):
        Bandwidth(1, Waits(is_over=True)).spend(1 << 40)


@pytest.mark.parametrize("kind", [BackendUnavailable, AccessDenied])
def test_bucket_is_given_up_after_failures_in_a_row(kind: type[BackendError]) -> None:
    failures = Failures()
    error = kind("so it is", operation="put", key="k")
    for _ in range(19):
        failures.count(error)
    failures.forget()
    for _ in range(19):
        failures.count(error)
    with pytest.raises(BucketFails, match="so it is"):
        failures.count(error)


@pytest.mark.parametrize("kind", [ObjectNotFound, RequestRejected])
def test_failures_of_files_are_not_those_of_the_bucket(kind: type[BackendError]) -> None:
    failures = Failures()
    for _ in range(100):
        failures.count(kind("so it is", operation="put", key="k"))


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

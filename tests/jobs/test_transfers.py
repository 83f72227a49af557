"""Moving one file, and many at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage_provider.bandwidth import Bandwidth
from storage_provider.media_store import MediaStore
from storage_provider.transfers import download, run_at_once
from tests.jobs.memory_backend import MemoryBackend

PATH = "local_content/Ab/cd/Efgh"
UNBOUND = Bandwidth(None, threading.Event())


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

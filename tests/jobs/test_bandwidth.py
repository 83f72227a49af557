"""The bound on what is moved in a second."""

from __future__ import annotations

import io
import itertools
import threading
import time

import pytest

from storage_provider.bandwidth import Bandwidth
from storage_provider.failures import Stopped
from storage_provider.proofs import digest_of_object
from storage_provider.transfers import fetch
from tests.jobs.memory_backend import MemoryBackend

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
        bandwidth.spend(4000)
    assert [round(seconds) for seconds in waits.seconds] == [0, 4, 8, 12]


def test_bandwidth_without_a_bound_waits_for_nothing() -> None:
    waits = Waits(is_over=True)
    Bandwidth(None, waits).spend(1 << 40)
    assert waits.seconds == []


def test_end_of_the_run_ends_the_waiting() -> None:
    with pytest.raises(Stopped):
        Bandwidth(1, Waits(is_over=True)).spend(1 << 40)


def test_end_of_the_run_does_not_end_a_file_that_is_begun() -> None:
    Bandwidth(1 << 40, Waits(is_over=True)).spend(1 << 20, is_begun=True)


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

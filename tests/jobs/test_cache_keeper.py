"""The thread that runs the passes over the local cache."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any, cast

import pytest

from backends.errors import BackendUnavailable
from storage_provider.cache_keeper import CacheKeeper
from storage_provider.cache_report import PassReport
from storage_provider.errors import SynapseDbError
from storage_provider.failures import Stopped
from storage_provider.local_cache import LocalCache
from storage_provider.media_store import MediaStore
from tests.jobs.cache_site import CacheSite, settings
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.memory_backend import MemoryBackend

PATIENCE = 30
"""Seconds after which something counts as hanging."""

NEVER = "1y"


class ScriptedCache:
    """Does in each pass what it is told, and tells of it."""

    def __init__(self, *, has_work: bool = True) -> None:
        self.has_work = has_work
        self.scan_seconds = 0.0
        self.begun: Queue[int] = Queue()
        self.prepared = threading.Event()
        self.acts: list[Callable[[], object]] = []
        self.finds_something_to_remove = True
        self.was_full: list[bool] = []
        """Whether it was told so, a value a pass."""
        self._number = 0

    def prepare(self) -> None:
        self.prepared.set()

    def run_pass(self, *, is_full: bool = False) -> PassReport:
        self.was_full.append(is_full)
        self._number += 1
        self.begun.put(self._number)
        if self.acts:
            self.acts.pop(0)()
        report = PassReport()
        if is_full and self.finds_something_to_remove:
            report.evicted.add(4096)
        return report


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path)


Make = Callable[..., CacheKeeper]


@pytest.fixture
def make(store: MediaStore) -> Iterator[Make]:
    """Makes keepers, which end with the test."""
    made: list[CacheKeeper] = []

    def make_keeper(cache: ScriptedCache, **config: Any) -> CacheKeeper:
        may_begin = config.pop("may_begin", lambda: True)
        stop = config.pop("stop", None) or threading.Event()
        given = settings(**{"auto_restore_monitor_interval": NEVER, **config})
        made.append(CacheKeeper(cast(LocalCache, cache), store, given, stop, may_begin))
        return made[-1]

    yield make_keeper
    for keeper in made:
        keeper.stop()


def raise_(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def test_first_pass_begins_at_start(make: Make) -> None:
    cache = ScriptedCache()
    make(cache).start()
    assert cache.begun.get(timeout=PATIENCE) == 1


def test_disks_whose_free_space_nobody_looks_at_are_told_once(
    make: Make, store: MediaStore, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (store.root / "remote_content").mkdir()
    mounted = store.root / "local_content"
    mounted.mkdir()
    cache = ScriptedCache()
    subprocess.run(["mount", "--bind", small_disk, mounted], check=True)
    try:
        with caplog.at_level(logging.WARNING):
            make(cache, auto_restore_monitor_interval=1).start()
            for _ in range(2):
                cache.begun.get(timeout=PATIENCE)
    finally:
        subprocess.run(["umount", mounted], check=True)
    (told,) = [record.message for record in caplog.records if "min_free_space" in record.message]
    assert told.endswith("does not see how full those of local_content are")


def test_passes_follow_each_other_at_the_interval(make: Make) -> None:
    cache = ScriptedCache()
    make(cache, auto_restore_monitor_interval=1).start()
    assert [cache.begun.get(timeout=PATIENCE) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("config", [{"auto_restore_startup": False}, {"auto_restore": False, "local_cache": {}}])
def test_without_a_restore_at_start_the_first_pass_waits(make: Make, config: dict[str, Any]) -> None:
    cache = ScriptedCache()
    keeper = make(cache, **config)
    keeper.start()
    # The stamp does not wait.
    assert cache.prepared.wait(PATIENCE)
    assert cache.begun.empty()
    keeper.wake()
    assert cache.begun.get(timeout=PATIENCE) == 1
    assert cache.was_full == [True]


def test_no_pass_begins_before_it_may_and_nobody_is_asked_afterwards(make: Make) -> None:
    cache, asked = ScriptedCache(), Queue[int]()
    answers = [lambda: True, lambda: False, raise_(BackendUnavailable("it is away", operation="list"))]

    def may_begin() -> bool:
        asked.put(len(answers))
        return bool(answers.pop()())

    make(cache, may_begin=may_begin, auto_restore_monitor_interval=1).start()
    for left in (3, 2):
        assert asked.get(timeout=PATIENCE) == left
        assert cache.begun.empty()
    assert [cache.begun.get(timeout=PATIENCE) for _ in range(2)] == [1, 2]
    assert asked.get(timeout=PATIENCE) == 1
    assert asked.empty()


def test_there_is_no_thread_without_work(make: Make) -> None:
    before = threading.active_count()
    keeper = make(ScriptedCache(has_work=False), auto_restore=False)
    keeper.start()
    assert threading.active_count() == before
    keeper.stop()


def test_waking_starts_the_next_pass_which_makes_room(make: Make) -> None:
    cache = ScriptedCache()
    keeper = make(cache)
    keeper.start()
    for number in range(1, 4):
        assert cache.begun.get(timeout=PATIENCE) == number
        keeper.wake()
    assert cache.was_full[:3] == [False, True, True]


def test_pass_at_its_time_makes_no_room(make: Make) -> None:
    cache = ScriptedCache()
    keeper = make(cache, auto_restore_monitor_interval=1)
    keeper.start()
    assert [cache.begun.get(timeout=PATIENCE) for _ in range(2)] == [1, 2]
    assert cache.was_full[:2] == [False, False]


def test_what_finds_no_room_during_a_pass_finds_it_after_the_next_one(make: Make) -> None:
    cache = ScriptedCache()
    keeper = make(cache)
    cache.acts = [keeper.wake]
    keeper.start()
    assert [cache.begun.get(timeout=PATIENCE) for _ in range(2)] == [1, 2]
    assert cache.was_full[:2] == [False, True]


def waits_of(
    make: Make, monkeypatch: pytest.MonkeyPatch, cache: ScriptedCache, *woken: bool
) -> list[tuple[float, float]]:
    """How long the keeper would wait after each pass, and at least when it is woken; `woken` ends each of these."""
    keeper, waits, outcomes = make(cache, auto_restore_monitor_interval=300), list[tuple[float, float]](), list(woken)
    ended = threading.Event()

    def wait(seconds: float, *, at_least: float = 0.0) -> bool:
        waits.append((seconds, at_least))
        if outcomes:
            return outcomes.pop(0)
        keeper.stop()
        ended.set()
        return False

    monkeypatch.setattr(keeper, "_wait", wait)
    keeper.start()
    assert ended.wait(PATIENCE)
    return waits[: len(woken) + 1]


@pytest.mark.parametrize(
    ("scan_seconds", "expected"),
    [(1.0, (300, 20.0)), (10.0, (300, 200.0)), (100.0, (2000.0, 300)), (3600.0, (3600, 300))],
)
def test_even_a_woken_one_rests_after_a_long_comparison_but_not_for_hours(
    make: Make, monkeypatch: pytest.MonkeyPatch, scan_seconds: float, expected: tuple[float, float]
) -> None:
    cache = ScriptedCache()
    cache.scan_seconds = scan_seconds
    assert waits_of(make, monkeypatch, cache) == [expected]


def test_one_that_was_woken_in_vain_is_not_woken_before_its_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ScriptedCache()
    cache.finds_something_to_remove = False
    assert waits_of(make, monkeypatch, cache, True, False) == [(300, 0.0), (300, 300), (300, 0.0)]


def test_one_that_was_woken_to_good_purpose_may_be_woken_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of(make, monkeypatch, ScriptedCache(), True) == [(300, 0.0), (300, 0.0)]


def test_woken_one_waits_for_the_end_of_the_rest(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make(ScriptedCache())
    now, waits = [0.0], list[float]()
    monkeypatch.setattr("storage_provider.cache_keeper.time.monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        waits.append(seconds)
        now[0] += 3
        keeper._is_woken = True

    monkeypatch.setattr(keeper._condition, "wait", wait)
    assert keeper._wait(100, at_least=7)
    assert waits == [100, 4, 1]


@pytest.mark.parametrize(
    "error",
    [BackendUnavailable("it is away", operation="list"), SynapseDbError("it is away"), OSError(5, "it is away")],
)
def test_failure_is_one_warning_and_the_next_pass_tries_again(
    make: Make, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    cache = ScriptedCache()
    cache.acts = [raise_(error)]
    keeper = make(cache)
    keeper.start()
    cache.begun.get(timeout=PATIENCE)
    keeper.wake()
    assert cache.begun.get(timeout=PATIENCE) == 2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "it is away" in record.getMessage()
    assert record.exc_info is None


def test_unexpected_failure_is_told_in_full_and_does_not_end_the_thread(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScriptedCache()
    cache.acts = [raise_(RuntimeError("unheard of"))]
    keeper = make(cache)
    keeper.start()
    cache.begun.get(timeout=PATIENCE)
    keeper.wake()
    assert cache.begun.get(timeout=PATIENCE) == 2
    assert [record.exc_info is not None for record in caplog.records if record.levelno >= logging.WARNING] == [True]


def test_pass_is_one_line_and_a_limit_is_told_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keeper = make(ScriptedCache())
    limited = PassReport(limited_by="max_size")
    for report in (limited, limited, PassReport(), limited):
        keeper._tell(report)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.startswith("Local cache: restored")]) == 4
    assert len([line for line in lines if "max_size" in line]) == 2


def test_limits_that_cannot_be_kept_to_are_one_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    keeper = make(ScriptedCache())
    beyond = PassReport(out_of_reach="84 KiB cannot be removed")
    for report in (beyond, beyond, PassReport(), beyond):
        keeper._tell(report)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["Local cache: 84 KiB cannot be removed"] * 2


def test_stop_ends_a_pass_and_the_thread(make: Make) -> None:
    cache, stop = ScriptedCache(), threading.Event()

    def until_stopped() -> None:
        assert stop.wait(PATIENCE)
        raise Stopped

    cache.acts = [until_stopped]
    keeper = make(cache, stop=stop)
    keeper.start()
    cache.begun.get(timeout=PATIENCE)
    keeper.stop()
    assert keeper._thread is not None and not keeper._thread.is_alive()
    keeper.stop()


def test_stop_does_not_wait_for_the_interval(make: Make) -> None:
    cache = ScriptedCache()
    keeper = make(cache)
    keeper.start()
    cache.begun.get(timeout=PATIENCE)
    keeper.stop()
    assert keeper._thread is not None and not keeper._thread.is_alive()


def test_one_process_works_and_another_one_takes_over(
    make: Make, store: MediaStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ScriptedCache(), ScriptedCache()
    keeper = make(first)
    keeper.start()
    first.begun.get(timeout=PATIENCE)
    waiting = make(second)
    waiting.start()
    waiting.wake()
    assert second.begun.empty()
    keeper.stop()
    while second.begun.empty():
        waiting.wake()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("synapse_database", ["sqlite"], indirect=True)
def test_lost_disk_is_filled_by_a_real_cache(tmp_path: Path, synapse_database: SynapseDatabase) -> None:
    site = CacheSite(tmp_path / "store", synapse_database, MemoryBackend())
    path = site.add("AnyMedia", b"content", on_disk=False)
    placed = threading.Event()
    site.gate.after = lambda path: placed.set()
    keeper = CacheKeeper(site.cache(), site.store, settings(), site.stop)
    keeper.start()
    assert placed.wait(PATIENCE)
    keeper.stop()
    assert site.files() == {path: b"content"}

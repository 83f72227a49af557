"""The budget of memory that bodies in flight share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.memory import MemoryBudget

PATIENCE = 30


class Waiter(threading.Thread):
    """A thread that asks for memory, and tells when it waits and when it has it."""

    def __init__(self, budget: MemoryBudget, size: int) -> None:
        super().__init__(daemon=True)
        self.stops = threading.Semaphore(0)
        """Once for each time that it begins to wait, and at its end."""
        self._has_it = False
        self._budget = budget
        self._size = size
        self.start()

    def run(self) -> None:
        self._budget.acquire(self._size)
        self._has_it = True
        self.stops.release()

    def is_waiting(self) -> bool:
        """Whether it comes to wait, or does so again, rather than to an end."""
        assert self.stops.acquire(timeout=PATIENCE)
        return not self._has_it

    def is_served(self) -> bool:
        self.join(PATIENCE)
        return self._has_it


def stops() -> None:
    thread = threading.current_thread()
    assert isinstance(thread, Waiter)
    thread.stops.release()


class WatchedLock:
    """A lock that tells when a `Waiter` has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            stops()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class WatchedCondition(threading.Condition):
    """A condition that tells when a `Waiter` waits for it, as it has the lock until it does."""

    def wait(self, timeout: float | None = None) -> bool:
        stops()
        return super().wait(timeout)


def watched_budget(total: int) -> MemoryBudget:
    budget = MemoryBudget(total)
    vars(budget).update(_turn=WatchedLock(), _changed=WatchedCondition())
    return budget


def test_who_asks_for_more_than_is_free_waits() -> None:
    budget = watched_budget(10)
    budget.acquire(6)
    budget.acquire(4)
    waiter = Waiter(budget, 5)
    assert waiter.is_waiting()
    budget.release(4)
    assert waiter.is_waiting()
    budget.release(6)
    assert waiter.is_served()


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    budget = watched_budget(10)
    budget.acquire(6)
    large = Waiter(budget, 10)
    assert large.is_waiting()
    small = Waiter(budget, 1)
    assert small.is_waiting()
    budget.release(6)
    assert large.is_served()
    assert small.is_waiting()
    budget.release(10)
    assert small.is_served()


def test_more_than_all_of_it_is_granted_alone() -> None:
    budget = watched_budget(10)
    budget.acquire(1)
    giant = Waiter(budget, 1000)
    assert giant.is_waiting()
    budget.release(1)
    assert giant.is_served()
    other = Waiter(budget, 1)
    assert other.is_waiting()
    budget.release(1000)
    assert other.is_served()
    budget.release(1)
    # All of it is there again, and no more.
    budget.acquire(10)
    last = Waiter(budget, 1)
    assert last.is_waiting()
    budget.release(10)
    assert last.is_served()


def test_a_reservation_ends_with_its_block() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(KeyError), budget.reserve(10):
        raise KeyError
    with budget.reserve(10):
        pass


def test_the_bound_holds_with_many_threads() -> None:
    budget = MemoryBudget(10)
    lock = threading.Lock()
    used, most = 0, 0

    def work(size: int) -> None:
        nonlocal used, most
        for _ in range(50):
            with budget.reserve(size):
                with lock:
                    used += size
                    most = max(most, used)
                with lock:
                    used -= size

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert used == 0
    assert most <= 10

"""Sending a file in parts, without a server."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from backends.memory import MemoryBudget
from backends.multipart import Part, part_size_for, read_exactly, send_parts

PATIENCE = 30


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


class Parts:
    """Takes parts, holding each back until it is let go, and knows how much was there at once."""

    def __init__(self) -> None:
        self.taken: dict[int, bytes] = {}
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.in_flight = 0
        self.most_in_flight = 0
        self.fails: set[int] = set()

    def send(self, number: int, data: bytes) -> Part:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.started.release()
        assert self.go_on.wait(PATIENCE)
        with self._lock:
            self.in_flight -= 1
            self.taken[number] = data
        if number in self.fails:
            raise ConnectionError(f"part {number}")
        return Part(number, f"etag-{number}")

    def sent_by(self, executor: ThreadPoolExecutor) -> Callable[[int, bytes], Future[Part]]:
        return lambda number, data: executor.submit(self.send, number, data)


def test_parts_come_back_in_order_and_hold_everything(executor: ThreadPoolExecutor) -> None:
    parts = Parts()
    parts.go_on.set()
    body = io.BytesIO(b"before" + bytes(range(100)) + b"behind")
    body.seek(6)
    sent = send_parts(body, 100, 7, submit=parts.sent_by(executor), memory=MemoryBudget(1000))
    assert sent == [Part(number, f"etag-{number}") for number in range(1, 16)]
    assert b"".join(parts.taken[part.number] for part in sent) == bytes(range(100))
    assert body.read() == b"behind"


def test_no_more_than_four_parts_of_a_file_are_in_flight(executor: ThreadPoolExecutor) -> None:
    parts = Parts()
    body = io.BytesIO(bytes(100))
    done = ThreadPoolExecutor(1)
    sending = done.submit(send_parts, body, 100, 5, submit=parts.sent_by(executor), memory=MemoryBudget(1000))
    for _ in range(4):
        assert parts.started.acquire(timeout=PATIENCE)
    assert not parts.started.acquire(timeout=0.1)
    assert body.tell() == 20
    parts.go_on.set()
    assert len(sending.result(PATIENCE)) == 20
    assert parts.most_in_flight <= 4
    done.shutdown()


def test_parts_of_all_files_together_keep_to_the_budget(executor: ThreadPoolExecutor) -> None:
    parts = Parts()
    memory = MemoryBudget(10)
    bodies = [io.BytesIO(bytes(20)) for _ in range(3)]
    done = ThreadPoolExecutor(3)
    sending = [done.submit(send_parts, body, 20, 5, submit=parts.sent_by(executor), memory=memory) for body in bodies]
    for _ in range(2):
        assert parts.started.acquire(timeout=PATIENCE)
    assert not parts.started.acquire(timeout=0.1)
    assert sum(body.tell() for body in bodies) == 10
    parts.go_on.set()
    for each in sending:
        assert len(each.result(PATIENCE)) == 4
    assert parts.most_in_flight <= 2
    done.shutdown()


def test_the_first_error_ends_it_when_nothing_is_in_flight(executor: ThreadPoolExecutor) -> None:
    parts = Parts()
    parts.fails = {1}
    parts.go_on.set()
    memory = MemoryBudget(20)
    with pytest.raises(ConnectionError, match="part 1"):
        send_parts(io.BytesIO(bytes(1000)), 1000, 5, submit=parts.sent_by(executor), memory=memory)
    assert parts.in_flight == 0
    assert len(parts.taken) < 200
    # Everything has been given back.
    memory.acquire(20)


def test_a_body_that_ends_early_ends_it_too(executor: ThreadPoolExecutor) -> None:
    parts = Parts()
    parts.go_on.set()
    memory = MemoryBudget(20)
    with pytest.raises(ValueError, match="3 bytes early"):
        send_parts(io.BytesIO(bytes(12)), 15, 5, submit=parts.sent_by(executor), memory=memory)
    assert parts.in_flight == 0
    memory.acquire(20)


def test_the_part_size_grows_with_the_file() -> None:
    assert part_size_for(1, 5) == 5
    assert part_size_for(5_000, 5) == 5
    assert part_size_for(5_001, 5) == 10
    assert part_size_for(5 << 40, 8 << 20) * 10_000 >= 5 << 40
    assert part_size_for(5 << 40, 8 << 20) <= 5 << 30


@pytest.mark.parametrize("chunk_size", [5 << 20, 8 << 20, 64 << 20])
def test_files_of_usual_sizes_are_sent_in_no_more_than_1000_parts(chunk_size: int) -> None:
    """Scaleway takes no more."""
    for size in (1 << 30, 8 << 30, 50 << 30):
        assert -(-size // part_size_for(size, chunk_size)) <= 1000
    # Larger ones are not worth the memory that so few parts would take.
    assert part_size_for(600 << 30, chunk_size) <= 80 << 20


def test_read_exactly() -> None:
    body = io.BytesIO(b"abcdef")
    assert read_exactly(body, 4) == b"abcd"
    assert read_exactly(body, 0) == b""
    with pytest.raises(ValueError, match="1 bytes early"):
        read_exactly(body, 3)

"""Sending one large file in parts: some at a time, within the memory budget, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import BinaryIO

from backends.memory import MemoryBudget

logger = logging.getLogger(__name__)

# S3's own limit: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_MAX_PARTS = 10_000
# Scaleway's: https://www.scaleway.com/en/docs/object-storage/api-cli/multipart-uploads/
_FEWER_PARTS = 1000
# Each is held in memory, so that larger ones are for files that would not fit otherwise.
_LARGE_PART = 64 << 20

# More hide no more latency for one file, and several files share the budget anyway.
_PARTS_AT_A_TIME = 4


@dataclass(frozen=True)
class Part:
    """A part that the server has; numbers start at 1."""

    number: int
    etag: str


def part_size_for(size: int, chunk_size: int) -> int:
    """The chunk size, doubled until the file fits into 1,000 parts, or where those would be large into 10,000."""
    while size > chunk_size * (_FEWER_PARTS if chunk_size < _LARGE_PART else _MAX_PARTS):
        chunk_size *= 2
    return chunk_size


def send_parts(
    body: BinaryIO,
    size: int,
    chunk_size: int,
    *,
    submit: Callable[[int, bytes], Future[Part]],
    memory: MemoryBudget,
) -> list[Part]:
    """Send the next `size` bytes of `body` in parts, and return them in order.

    `submit` has a part sent in another thread. The first error of a part or of `body` is raised
    once no part is in flight any more; what had not been started is not sent.
    """
    chunk_size = part_size_for(size, chunk_size)
    parts: list[Part] = []
    in_flight: set[Future[Part]] = set()

    def collect(wait_for_all: bool) -> None:
        nonlocal in_flight
        done, in_flight = wait(in_flight) if wait_for_all else wait(in_flight, return_when=FIRST_COMPLETED)
        parts.extend(future.result() for future in done)

    try:
        for number, start in enumerate(range(0, size, chunk_size), 1):
            if len(in_flight) >= _PARTS_AT_A_TIME:
                collect(wait_for_all=False)
            length = min(chunk_size, size - start)
            in_flight.add(_submit(body, length, number, submit, memory))
        collect(wait_for_all=True)
    except BaseException:
        for future in in_flight:
            future.cancel()
        wait(in_flight)
        raise
    return sorted(parts, key=lambda part: part.number)


def _submit(
    body: BinaryIO,
    length: int,
    number: int,
    submit: Callable[[int, bytes], Future[Part]],
    memory: MemoryBudget,
) -> Future[Part]:
    memory.acquire(length)
    try:
        data = read_exactly(body, length)
        future = submit(number, data)
    except BaseException:
        memory.release(length)
        raise
    # Also called when the part is cancelled before it started.
    future.add_done_callback(lambda _: memory.release(length))
    return future


def read_exactly(body: BinaryIO, length: int) -> bytes:
    """The next `length` bytes. Raises `ValueError` when the body ends before."""
    data = body.read(length)
    while len(data) < length:
        more = body.read(length - len(data))
        if not more:
            raise ValueError(f"the body ended {length - len(data)} bytes early; did the file change?")
        data += more
    return data

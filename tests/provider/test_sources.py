"""Where the chunks of a response come from: each once, in order, and nothing kept open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred, ensureDeferred, succeed

from backends.base import ObjectInfo, ObjectReader
from backends.errors import BackendUnavailable, ContentDamaged, PreconditionFailed
from storage_provider.sources import CHUNK_BYTES, BucketSource, ResumingReader

CONTENT = b"".join(bytes([number]) * CHUNK_BYTES for number in range(4)) + b"rest"
INFO = ObjectInfo("key", len(CONTENT), "etag")


def broken() -> BackendUnavailable:
    return BackendUnavailable("the content broke off", operation="open", key="key")


class Reader(ObjectReader):
    """Breaks where it is told to."""

    def __init__(self, offset: int, breaks_at: int | None) -> None:
        self.info = INFO
        self.closed = 0
        self.error = broken()
        self._offset = offset
        self._breaks_at = breaks_at

    def read(self, n: int) -> bytes:
        assert not self.closed, "read after it was closed"
        chunk = CONTENT[self._offset : self._offset + n]
        if self._breaks_at is not None and self._offset + len(chunk) > self._breaks_at:
            self.close()
            raise self.error
        self._offset += len(chunk)
        return chunk

    def close(self) -> None:
        self.closed += 1


class Bucket:
    """Opens readers, each of which breaks at the next of the given places."""

    def __init__(self, *breaks_at: int | None) -> None:
        self._breaks_at = list(breaks_at)
        self.opened: list[tuple[int, str | None]] = []
        self.readers: list[Reader] = []
        self.error: Exception | None = None

    def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> Reader:
        assert key == "key"
        self.opened.append((offset, if_match))
        if self.error is not None:
            raise self.error
        self.readers.append(Reader(offset, self._breaks_at.pop(0) if self._breaks_at else None))
        return self.readers[-1]


class Threads:
    """Does in no thread what the source asks a thread to do; a test may let it wait."""

    def __init__(self) -> None:
        self.waiting: Deferred[None] = succeed(None)

    async def defer_to_threadpool(self, _pool: object, work: Callable[..., bytes], *arguments: int) -> bytes:
        await self.waiting
        return work(*arguments)


def make(bucket: Bucket, threads: Threads | None = None) -> BucketSource:
    reader = ResumingReader(cast(Any, bucket), INFO, 0, bucket.open("key"))
    return BucketSource(cast(Any, threads or Threads()), cast(Any, None), reader)


def read(source: BucketSource) -> Deferred[bytes]:
    return ensureDeferred(cast(Any, source.read()))


def now(reading: Deferred[bytes]) -> bytes:
    """What was read; raises what reading raised."""
    results: list[Any] = []
    reading.addBoth(results.append)
    if isinstance(results[0], bytes):
        return results[0]
    raise results[0].value


def read_all(source: BucketSource) -> bytes:
    content = b""
    while chunk := now(read(source)):
        assert len(chunk) <= CHUNK_BYTES
        content += chunk
    return content


def test_an_object_comes_in_chunks_and_in_order() -> None:
    bucket = Bucket()
    assert read_all(make(bucket)) == CONTENT
    assert bucket.opened == [(0, None)]


def test_a_broken_connection_is_taken_up_again_where_it_broke_and_only_in_the_same_object() -> None:
    bucket = Bucket(2 * CHUNK_BYTES + 1)
    assert read_all(make(bucket)) == CONTENT
    assert bucket.opened == [(0, None), (2 * CHUNK_BYTES, "etag")]


def test_a_connection_that_breaks_again_and_again_is_taken_up_as_long_as_it_brings_something() -> None:
    bucket = Bucket(*(number * CHUNK_BYTES + 1 for number in range(1, 5)))
    assert read_all(make(bucket)) == CONTENT
    assert len(bucket.opened) == 5


def test_a_connection_that_brings_nothing_is_given_up() -> None:
    bucket = Bucket(*[CHUNK_BYTES + 1] * 10)
    source = make(bucket)
    assert now(read(source)) == CONTENT[:CHUNK_BYTES]
    with pytest.raises(BackendUnavailable):
        now(read(source))
    assert len(bucket.opened) == 3
    assert all(reader.closed for reader in bucket.readers)


def test_an_object_that_has_been_replaced_is_given_up_at_once() -> None:
    bucket = Bucket(CHUNK_BYTES + 1)
    source = make(bucket)
    now(read(source))
    bucket.error = PreconditionFailed("it is another one", operation="open", key="key")
    with pytest.raises(PreconditionFailed):
        now(read(source))
    assert len(bucket.opened) == 2


def test_a_content_that_is_damaged_is_given_up_at_once() -> None:
    bucket = Bucket(CHUNK_BYTES + 1)
    source = make(bucket)
    now(read(source))
    bucket.readers[0].error = ContentDamaged("it has another checksum", operation="open", key="key")
    with pytest.raises(ContentDamaged):
        now(read(source))
    assert len(bucket.opened) == 1


def test_what_is_read_from_an_offset_on_is_opened_when_it_is_needed() -> None:
    bucket = Bucket()
    reader = ResumingReader(cast(Any, bucket), INFO, CHUNK_BYTES)
    assert bucket.opened == []
    assert reader.read(10) == CONTENT[CHUNK_BYTES : CHUNK_BYTES + 10]
    assert bucket.opened == [(CHUNK_BYTES, "etag")]


def test_closing_closes_the_reader() -> None:
    bucket = Bucket()
    source = make(bucket)
    now(read(source))
    source.close()
    source.close()
    assert bucket.readers[0].closed


def test_closing_while_a_thread_reads_closes_the_reader_afterwards() -> None:
    bucket, threads = Bucket(), Threads()
    source = make(bucket, threads)
    threads.waiting = Deferred()
    reading = read(source)
    source.close()
    assert not bucket.readers[0].closed
    threads.waiting.callback(None)
    now(reading)
    assert bucket.readers[0].closed


def test_what_was_closed_is_not_taken_up_again() -> None:
    bucket, threads = Bucket(1), Threads()
    source = make(bucket, threads)
    threads.waiting = Deferred()
    reading = read(source)
    source.close()
    threads.waiting.callback(None)
    with pytest.raises(BackendUnavailable):
        now(reading)
    assert len(bucket.opened) == 1

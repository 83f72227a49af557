"""The loop from a source to a consumer, whatever the consumer does meanwhile."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from synapse.logging.context import SENTINEL_CONTEXT, current_context
from synapse.media._base import ConsumerRequestedStopError
from synapse.media.media_storage import MultipartFileConsumer
from synapse.util.file_consumer import BackgroundFileConsumer
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from backends.errors import BackendUnavailable
from storage_provider.responder import ChunkResponder, WrongLength

CHUNKS = [b"one", b"two", b"three"]
BROKEN = BackendUnavailable("the content broke off", operation="open", key="key")


class ListedChunks:
    """A source whose chunks the test knows; an exception among them is raised."""

    def __init__(self, *chunks: bytes | Exception | Deferred[bytes]) -> None:
        self._chunks: Iterator[bytes | Exception | Deferred[bytes]] = iter(chunks)
        self.reads = 0
        self.closed = 0
        self.placed: Deferred[None] = Deferred()

    async def read(self) -> bytes:
        self.reads += 1
        chunk = next(self._chunks, b"")
        if isinstance(chunk, Exception):
            raise chunk
        return await chunk if isinstance(chunk, Deferred) else chunk

    async def put_in_place(self) -> None:
        await self.placed

    def close(self) -> None:
        self.closed += 1


class Transport:
    aborted = 0

    def abortConnection(self) -> None:
        self.aborted += 1


class Client:
    """A request as far as a responder sees it; strict about the order of calls, as Twisted's is."""

    def __init__(self, pause_after: int | None = None, stop_after: int | None = None) -> None:
        self.transport = Transport()
        self.producer: Any = None
        self.registered = self.unregistered = 0
        self.written: list[bytes] = []
        self._pause_after = pause_after
        self._stop_after = stop_after

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert self.producer is None
        assert streaming
        self.producer = producer
        self.registered += 1

    def unregisterProducer(self) -> None:
        assert self.producer is not None, "unregistered twice"
        self.producer = None
        self.unregistered += 1

    def write(self, data: bytes) -> None:
        assert self.producer is not None, "written to after the end"
        self.written.append(data)
        if len(self.written) == self._pause_after:
            self.producer.pauseProducing()
        if len(self.written) == self._stop_after:
            self.producer.stopProducing()


class AnnouncingClient(Client):
    """A client that has been told how many bytes come, as all of Synapse's are, and that counts them as Twisted does."""

    def __init__(self, announced: int, method: bytes = b"GET") -> None:
        super().__init__()
        self.method = method
        self.responseHeaders = Headers({"Content-Length": [str(announced)]})
        self.sentLength = 0

    def write(self, data: bytes) -> None:
        super().write(data)
        self.sentLength += len(data)


def send(
    source: ListedChunks,
    client: Any,
    clock: Clock | None = None,
    local_path: Path = Path("/no/such/file"),
    on_taken: Callable[[], None] = lambda: None,
) -> Deferred[Any]:
    """Sends as Synapse does: within the responder's context."""
    responder = ChunkResponder(cast(Any, clock or Clock()), source, local_path, on_taken=on_taken)

    async def respond() -> None:
        with responder:
            await responder.write_to_consumer(client)

    return ensureDeferred(respond())


def failure(sending: Deferred[Any]) -> Exception:
    """What the sending ended with; it must have ended."""
    ended: list[Any] = []
    sending.addErrback(ended.append)
    assert len(ended) == 1
    assert isinstance(ended[0], Failure)
    return cast(Exception, ended[0].value)


def assert_done(sending: Deferred[Any]) -> None:
    done: list[Any] = []
    sending.addCallback(done.append)
    assert done == [None]


@pytest.fixture(autouse=True)
def no_log_context_is_left_behind() -> Iterator[None]:
    yield
    assert current_context() is SENTINEL_CONTEXT


def test_all_chunks_are_sent_in_order_and_the_source_is_closed() -> None:
    source, client = ListedChunks(*CHUNKS), Client()
    assert_done(send(source, client))
    assert client.written == CHUNKS
    assert (client.registered, client.unregistered) == (1, 1)
    assert source.closed == 1
    assert client.transport.aborted == 0


def test_an_empty_file_is_sent_as_nothing() -> None:
    client = Client()
    assert_done(send(ListedChunks(), client))
    assert b"".join(client.written) == b""
    assert client.unregistered == 1


def test_a_client_that_pauses_is_given_no_more_and_nothing_more_is_read() -> None:
    source, client = ListedChunks(*CHUNKS), Client(pause_after=1)
    sending = send(source, client)
    assert not sending.called
    assert client.written == CHUNKS[:1]
    assert source.reads == 1
    client.producer.resumeProducing()
    assert_done(sending)
    assert client.written == CHUNKS


def test_a_client_that_pauses_and_resumes_while_a_chunk_is_read_gets_each_chunk_once() -> None:
    waiting: Deferred[bytes] = Deferred()
    source, client = ListedChunks(b"one", waiting, b"three"), Client()
    sending = send(source, client)
    client.producer.pauseProducing()
    client.producer.resumeProducing()
    client.producer.pauseProducing()
    waiting.callback(b"two")
    assert not sending.called
    assert client.written == [b"one", b"two"]
    client.producer.resumeProducing()
    assert_done(sending)
    assert client.written == CHUNKS


def test_a_client_that_hangs_up_is_no_error_of_the_storage() -> None:
    source, client = ListedChunks(*CHUNKS), Client(stop_after=2)
    assert isinstance(failure(send(source, client)), ConsumerRequestedStopError)
    assert client.written == CHUNKS[:2]
    assert client.unregistered == 1
    assert source.closed == 1
    assert client.transport.aborted == 0


def test_a_client_that_hangs_up_while_it_is_paused_ends_the_sending_at_once() -> None:
    source, client = ListedChunks(*CHUNKS), Client(pause_after=1)
    sending = send(source, client)
    client.producer.stopProducing()
    assert isinstance(failure(sending), ConsumerRequestedStopError)
    assert client.unregistered == 1
    assert source.closed == 1


def test_a_client_that_hangs_up_while_a_chunk_is_read_gets_none_of_it() -> None:
    waiting: Deferred[bytes] = Deferred()
    source, client = ListedChunks(b"one", waiting), Client()
    sending = send(source, client)
    client.producer.stopProducing()
    waiting.callback(b"two")
    assert isinstance(failure(sending), ConsumerRequestedStopError)
    assert client.written == [b"one"]


def test_an_error_of_the_bucket_after_a_client_has_hung_up_is_no_error_of_the_storage() -> None:
    waiting: Deferred[bytes] = Deferred()
    source, client = ListedChunks(b"one", waiting), Client()
    sending = send(source, client)
    client.producer.stopProducing()
    waiting.errback(BROKEN)
    assert isinstance(failure(sending), ConsumerRequestedStopError)
    assert client.transport.aborted == 0


def test_a_client_that_stalls_is_given_up_after_as_long_as_synapse_waits_for_its_own_files() -> None:
    clock = Clock()
    source, client = ListedChunks(*CHUNKS), Client(pause_after=2)
    sending = send(source, client, clock)
    clock.advance(89)
    assert not sending.called
    clock.advance(2)
    assert isinstance(failure(sending), TimeoutError)
    assert client.transport.aborted == 1
    assert client.unregistered == 1
    assert source.closed == 1
    assert clock.getDelayedCalls() == []


def test_the_time_for_a_chunk_starts_anew_with_each() -> None:
    clock = Clock()
    client = Client()
    sending = send(ListedChunks(*CHUNKS), client, clock)
    assert_done(sending)
    client = Client(pause_after=1)
    sending = send(ListedChunks(*CHUNKS), client, clock)
    for _ in range(2):
        clock.advance(80)
        assert not sending.called
        client._pause_after = len(client.written) + 1
        client.producer.resumeProducing()
    client.producer.resumeProducing()
    assert_done(sending)
    assert clock.getDelayedCalls() == []


def test_bytes_that_cannot_be_had_end_the_clients_connection() -> None:
    source, client = ListedChunks(b"one", BROKEN), Client()
    assert failure(send(source, client)) is BROKEN
    assert client.written == [b"one"]
    assert client.transport.aborted == 1
    assert client.unregistered == 1
    assert source.closed == 1


def test_behind_a_multipart_answer_it_is_the_clients_connection_that_ends() -> None:
    client = Client()

    class Multipart(Client):
        wrapped_consumer = client

    multipart = Multipart()
    assert failure(send(ListedChunks(b"one", BROKEN), multipart)) is BROKEN
    assert client.transport.aborted == 1
    assert multipart.transport.aborted == 0


def test_as_many_bytes_as_announced_are_no_error() -> None:
    client = AnnouncingClient(announced=11)
    assert_done(send(ListedChunks(*CHUNKS), client))
    assert client.written == CHUNKS
    assert client.transport.aborted == 0


def test_more_bytes_than_announced_are_not_sent_and_end_the_clients_connection() -> None:
    client = AnnouncingClient(announced=10)
    assert isinstance(failure(send(ListedChunks(*CHUNKS), client)), WrongLength)
    assert client.written == CHUNKS[:2]
    assert client.transport.aborted == 1
    assert client.unregistered == 1


def test_fewer_bytes_than_announced_end_the_clients_connection() -> None:
    client = AnnouncingClient(announced=12)
    assert isinstance(failure(send(ListedChunks(*CHUNKS), client)), WrongLength)
    assert client.transport.aborted == 1
    assert client.unregistered == 1


@pytest.mark.parametrize(("announced", "is_right"), [(10, False), (11, True), (12, False)])
def test_what_is_announced_of_a_multipart_answer_is_all_of_it(announced: int, is_right: bool) -> None:
    boundary = b"--boundary--"
    client = AnnouncingClient(announced + len(boundary))

    class Multipart(Client):
        wrapped_consumer = client

        def write(self, data: bytes) -> None:
            client.write(data)

        def registerProducer(self, producer: Any, streaming: bool) -> None:
            super().registerProducer(producer, streaming)
            client.registerProducer(producer, streaming)

        def unregisterProducer(self) -> None:
            super().unregisterProducer()
            client.write(boundary)
            client.unregisterProducer()

    sending = send(ListedChunks(*CHUNKS), Multipart())
    if is_right:
        assert_done(sending)
    else:
        assert isinstance(failure(sending), WrongLength)
    assert client.transport.aborted == (0 if is_right else 1)


@pytest.mark.parametrize("chunks", [[], CHUNKS])
def test_a_multipart_answer_of_synapse_is_whole_be_the_file_empty_or_not(chunks: list[bytes]) -> None:
    client = AnnouncingClient(0)
    length = len(b"".join(chunks))
    multipart = MultipartFileConsumer(cast(Any, None), cast(Any, client), "text/plain", {}, "inline", length)
    announced = multipart.content_length()
    client.responseHeaders = Headers({"Content-Length": [str(announced)]})
    assert_done(send(ListedChunks(*chunks), multipart))
    assert client.sentLength == announced
    assert client.transport.aborted == 0


def test_a_client_that_asks_for_the_headers_alone_costs_no_object() -> None:
    source, client = ListedChunks(*CHUNKS), AnnouncingClient(announced=11, method=b"HEAD")
    assert_done(send(source, client))
    assert (source.reads, source.closed) == (0, 1)
    assert client.written == []
    assert client.transport.aborted == 0


def test_a_client_whose_connection_is_gone_needs_no_end() -> None:
    client = Client()
    client.transport = cast(Any, None)
    assert failure(send(ListedChunks(BROKEN), client)) is BROKEN
    assert client.unregistered == 1


def test_a_response_that_is_never_sent_closes_its_source_and_counts_as_taken() -> None:
    source, taken = ListedChunks(*CHUNKS), Counter[str]()
    with ChunkResponder(cast(Any, Clock()), source, Path("/no/such/file"), on_taken=lambda: taken.update(["once"])):
        assert not taken
    assert source.closed == 1
    assert source.reads == 0
    assert taken["once"] == 1


def test_a_response_counts_as_taken_once_as_soon_as_it_is_sent() -> None:
    taken = Counter[str]()
    client = Client(pause_after=1)
    sending = send(ListedChunks(*CHUNKS), client, on_taken=lambda: taken.update(["once"]))
    assert taken["once"] == 1
    client.producer.resumeProducing()
    assert_done(sending)
    assert taken["once"] == 1


# --- Synapse's own copy, which a thread of the reactor's pool writes ---


class Pool:
    """The reactor's thread pool, whose threads begin when the test says so."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._work: list[Any] = []

    def callInThreadWithCallback(self, on_result: Any, work: Any, *args: Any, **kwargs: Any) -> None:
        def run() -> None:
            try:
                result: Any = work(*args, **kwargs)
            except Exception:
                on_result(False, Failure())  # type: ignore[no-untyped-call]
            else:
                on_result(True, result)

        self._work.append(run)

    @property
    def has_work(self) -> bool:
        return bool(self._work)

    def begin(self) -> None:
        for work in self._work:
            thread = threading.Thread(target=work)
            self._reactor.threads.append(thread)
            thread.start()
        self._work.clear()


class Reactor(Clock):
    """Time that stands still, and calls from threads that wait until the test lets them in."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(self)
        self.threads: list[threading.Thread] = []
        self._called = threading.Condition()
        self._calls: list[Any] = []

    def getThreadPool(self) -> Pool:
        return self.pool

    def callFromThread(self, call: Any, *args: Any) -> None:
        with self._called:
            self._calls.append(lambda: call(*args))
            self._called.notify_all()

    def run_until(self, sending: Deferred[Any]) -> None:
        """Let calls of threads in until the sending has ended."""
        while not sending.called:
            with self._called:
                assert self._called.wait_for(lambda: bool(self._calls), 30), "nothing happens any more"
                calls, self._calls = self._calls, []
            for call in calls:
                call()
        for thread in self.threads:
            thread.join(30)


class FullDisk:
    """A file on a disk that takes a few writes and then none."""

    def __init__(self, path: Path, writes: int) -> None:
        self._file = path.open("wb")
        self._writes = writes

    def write(self, data: bytes) -> int:
        self._writes -= 1
        if self._writes < 0:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def reactor() -> Reactor:
    return Reactor()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def test_where_synapse_begins_a_copy_the_whole_file_is_put_in_its_place(reactor: Reactor, copy: Path) -> None:
    source, there_when_taken = ListedChunks(), list[bool]()
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(source, consumer, reactor, copy, on_taken=lambda: there_when_taken.append(copy.exists()))
    # Nobody shall take Synapse's empty file for the content.
    assert there_when_taken == [False]
    assert not sending.called
    copy.write_bytes(b"whole")
    source.placed.callback(None)
    reactor.pool.begin()
    assert_done(sending)
    reactor.run_until(consumer.wait())
    assert copy.read_bytes() == b"whole"
    assert source.reads == 0


def test_a_copy_holds_none_of_synapses_threads_while_the_file_is_on_its_way(reactor: Reactor, copy: Path) -> None:
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(ListedChunks(), consumer, reactor, copy)
    assert not reactor.pool.has_work
    sending.cancel()
    assert isinstance(failure(sending), CancelledError)
    reactor.pool.begin()
    reactor.run_until(consumer.wait())


def test_a_file_that_cannot_be_put_in_its_place_ends_the_copy_with_that_error(reactor: Reactor, copy: Path) -> None:
    source = ListedChunks()
    file = copy.open("wb")
    sending = send(source, BackgroundFileConsumer(file, cast(Any, reactor)), reactor, copy)
    source.placed.errback(BROKEN)
    assert failure(sending) is BROKEN
    reactor.pool.begin()
    for thread in reactor.threads:
        thread.join(30)
    assert file.closed
    assert not copy.exists()


def test_a_file_that_the_store_does_not_take_is_copied_as_synapse_would(reactor: Reactor, copy: Path) -> None:
    source = ListedChunks(*CHUNKS)
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(source, consumer, reactor, copy)
    source.placed.errback(OSError(errno.ENOTDIR, "Not a directory"))
    assert not copy.exists()  # nobody sees a part of it
    reactor.pool.begin()
    reactor.run_until(sending)
    assert_done(sending)
    reactor.pool.begin()
    reactor.run_until(consumer.wait())
    assert copy.read_bytes() == b"".join(CHUNKS)
    assert list(copy.parent.iterdir()) == [copy]


def test_a_file_that_there_is_no_room_for_is_not_copied(reactor: Reactor, copy: Path) -> None:
    source = ListedChunks(*CHUNKS)
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(source, consumer, reactor, copy)
    source.placed.errback(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(failure(sending), OSError)
    assert source.reads == 0
    reactor.pool.begin()
    reactor.run_until(consumer.wait())


def test_a_copy_that_cannot_be_made_either_leaves_nothing(reactor: Reactor, copy: Path) -> None:
    source = ListedChunks(b"one", BROKEN)
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(source, consumer, reactor, copy)
    source.placed.errback(OSError(errno.EPERM, "Operation not permitted"))
    reactor.pool.begin()
    reactor.run_until(sending)
    assert failure(sending) is BROKEN
    reactor.pool.begin()
    reactor.run_until(consumer.wait())
    assert list(copy.parent.iterdir()) == []


def test_a_copy_elsewhere_is_whole_when_the_sending_ends(reactor: Reactor, copy: Path) -> None:
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    chunks = [bytes([number]) * 1000 for number in range(20)]
    sending = send(ListedChunks(*chunks), consumer, reactor)
    reactor.pool.begin()
    reactor.run_until(sending)
    assert_done(sending)
    assert copy.read_bytes() == b"".join(chunks)


def test_a_copy_elsewhere_that_stays_short_ends_with_an_error(reactor: Reactor, copy: Path) -> None:
    consumer = BackgroundFileConsumer(copy.open("wb"), cast(Any, reactor))
    sending = send(ListedChunks(b"one", BROKEN), consumer, reactor)
    reactor.pool.begin()
    reactor.run_until(sending)
    assert failure(sending) is BROKEN


@pytest.mark.parametrize("count", [3, 20])
def test_a_disk_that_is_full_ends_a_copy_elsewhere(reactor: Reactor, copy: Path, count: int) -> None:
    consumer = BackgroundFileConsumer(cast(Any, FullDisk(copy, writes=1)), cast(Any, reactor))
    sending = send(ListedChunks(*[b"chunk"] * count), consumer, reactor)
    assert not sending.called  # nobody writes yet
    reactor.pool.begin()
    reactor.run_until(sending)
    assert isinstance(failure(sending), OSError)

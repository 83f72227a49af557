"""Sending a source of chunks to whoever asked, at their pace."""

from __future__ import annotations

import contextlib
import errno
import logging
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from synapse.logging.context import PreserveLoggingContext, make_deferred_yieldable
from synapse.media._base import ConsumerRequestedStopError, Responder
from synapse.util.file_consumer import BackgroundFileConsumer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IConsumer, IPushProducer, IReactorTime
from zope.interface import implementer  # type: ignore[import-untyped]

from storage_provider.sources import ChunkSource

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long a client may take for what it has been sent; as long as Synapse waits for its own files.
_STALLED_SECONDS = 90


class WrongLength(Exception):
    """The client has been told to expect another number of bytes."""

    def __init__(self) -> None:
        super().__init__("the object has not as many bytes as Synapse's database says")


class ChunkResponder(Responder):
    """A response made of a source's chunks, which is closed with the response.

    `local_path` is where the file belongs in the media store. Where Synapse makes a copy there, to make
    thumbnails of it, the whole file is put in its place instead. Nothing has been answered then, so
    errors of the bucket are told to the client within `copy_errors`. `on_taken` is called once, as
    soon as the response has been written, or left without that.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        source: ChunkSource,
        local_path: Path,
        copy_errors: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_taken: Callable[[], None] = lambda: None,
    ) -> None:
        self._reactor = reactor
        self._source = source
        self._local_path = local_path
        self._copy_errors = copy_errors
        self._on_taken: Callable[[], None] | None = on_taken

    async def write_to_consumer(self, consumer: IConsumer) -> None:
        if isinstance(consumer, BackgroundFileConsumer):
            with self._copy_errors():
                if _file_name(consumer) == self._local_path:
                    await self._put_in_place(consumer)
                else:
                    self._take()
                    await self._send_copy(consumer)
            return
        self._take()
        if getattr(_request(consumer), "method", None) == b"HEAD":
            # Twisted drops all that is written: a whole object would be fetched for nothing.
            return
        feed = _Feed(cast(_Consumer, consumer))
        try:
            await self._send(feed)
        except BaseException as error:
            if feed.is_stopped:
                raise ConsumerRequestedStopError("the client has gone") from error
            _abort(consumer)
            raise
        finally:
            feed.finish()
        if not feed.has_sent_all:
            _abort(consumer)
            raise WrongLength

    async def _put_in_place(self, consumer: BackgroundFileConsumer) -> None:
        """Put the whole file where Synapse has begun to write a copy, and let it find that done."""
        # Synapse has opened it in this very turn; nobody has seen that it is empty.
        self._local_path.unlink(missing_ok=True)
        self._take()
        try:
            try:
                await self._source.put_in_place()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    # The copy would not fit either, and hold one of Synapse's threads until that shows.
                    raise
                logger.debug("%s cannot be put in its place, and is copied there: %s", self._local_path, error)
                await self._copy_into_place()
        finally:
            # Not before: a consumer with a producer holds one of Synapse's threads.
            _Feed(cast(_Consumer, consumer)).finish()

    async def _copy_into_place(self) -> None:
        """Write the file beside its place, as Synapse itself could: behind a link, or without locks and hard links."""
        temporary = self._local_path.with_name(f".{uuid.uuid4().hex}")
        try:
            # Synapse has made the directory.
            await self._send_copy(BackgroundFileConsumer(temporary.open("xb"), cast(Any, self._reactor)))
            temporary.replace(self._local_path)
        finally:
            temporary.unlink(missing_ok=True)

    async def _send_copy(self, consumer: BackgroundFileConsumer) -> None:
        """Send to a file, which is written behind our back by a thread that a full disk may end at any time."""
        feed = _Feed(cast(_Consumer, consumer))
        with PreserveLoggingContext():
            consumer.wait().addBoth(feed.consumer_ended)
        try:
            await self._send(feed)
            await consumer.wait()
        except BaseException as error:
            feed.finish()
            if isinstance(error, Exception):
                # Where the thread has failed as well, somebody must take its error, or it is logged as unhandled.
                with contextlib.suppress(Exception):
                    await consumer.wait()
            raise

    async def _send(self, feed: _Feed) -> None:
        is_begun = False
        while not feed.is_stopped and ((chunk := await self._source.read()) or not is_begun):
            # Of an empty file too: with it Synapse's multipart answers begin.
            await feed.write(chunk, self._reactor)
            is_begun = True
        if feed.is_stopped:
            raise ConsumerRequestedStopError("the client has gone")
        feed.finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._source.close()
        self._take()

    def _take(self) -> None:
        on_taken, self._on_taken = self._on_taken, None
        if on_taken is not None:
            on_taken()


def _file_name(consumer: Any) -> Path | None:
    """The file that a `BackgroundFileConsumer` writes (Synapse 1.163); None where it does not tell."""
    name = getattr(getattr(consumer, "_file_obj", None), "name", None)
    return Path(name) if isinstance(name, str) else None


def _request(consumer: Any) -> Any:
    """The request behind a consumer, which may be a part of a multipart answer."""
    return getattr(consumer, "wrapped_consumer", consumer)


def _abort(consumer: Any) -> None:
    """End the client's connection, so that it does not take what was sent for the whole.

    Synapse has sent a Content-Length and would finish the request as if nothing had happened;
    the client would wait for the rest until its own time-out.
    """
    transport = getattr(_request(consumer), "transport", None)
    if transport is not None:
        transport.abortConnection()


class _Consumer(Protocol):
    """Twisted's `IConsumer`, in a form that type checkers know."""

    def registerProducer(self, producer: object, streaming: bool) -> None: ...

    def unregisterProducer(self) -> None: ...

    def write(self, data: bytes) -> None: ...


@implementer(IPushProducer)
class _Feed:
    """A consumer's wishes (go on, wait, stop), as something to await."""

    def __init__(self, consumer: _Consumer) -> None:
        self._consumer: _Consumer | None = consumer
        self._request = _request(consumer)
        self._announced = _announced_length(self._request)
        self._is_paused = False
        self._resumed: Deferred[None] | None = None
        consumer.registerProducer(self, True)

    @property
    def is_stopped(self) -> bool:
        """Whether the consumer wants no more."""
        return self._consumer is None

    @property
    def has_sent_all(self) -> bool:
        """Whether the client, at the end, has got what it has been told to expect, as far as that can be told."""
        return self._announced is None or self._request.sentLength == self._announced

    async def write(self, chunk: bytes, reactor: IReactorTime) -> None:
        """Write, and wait until the consumer has room for more, or has gone.

        Raises `TimeoutError` when it takes too long, and `WrongLength` instead of writing what the client would take for
        the beginning of the next answer.
        """
        if self._announced is not None and self._request.sentLength + len(chunk) > self._announced:
            raise WrongLength
        if self._consumer is not None:
            self._consumer.write(chunk)
        if self._is_paused and self._consumer is not None:
            self._resumed = Deferred()
            self._resumed.addTimeout(_STALLED_SECONDS, reactor, onTimeoutCancel=_stalled)
            await make_deferred_yieldable(self._resumed)

    def finish(self) -> None:
        """Unregister, once: Twisted answers a second time with a traceback."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.unregisterProducer()

    def consumer_ended(self, result: Result) -> Result:
        """A consumer that has ended by itself resumes nothing; the next write tells why it has."""
        self._wake()
        return result

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        self._is_paused = False
        self._wake()

    def stopProducing(self) -> None:
        self.finish()
        self._wake()

    def _wake(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None and not resumed.called:
            with PreserveLoggingContext():
                resumed.callback(None)


def _announced_length(request: Any) -> int | None:
    """The bytes that a request's answer was announced to have; None where it was not, as for a copy into a file."""
    headers = getattr(request, "responseHeaders", None)
    values = None if headers is None else headers.getRawHeaders("Content-Length")
    return int(values[0]) if values else None


def _stalled(_result: object, seconds: float) -> None:
    raise TimeoutError(f"the client took nothing for {seconds:.0f} s")

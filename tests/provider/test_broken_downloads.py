"""Answers of the bucket that break off: taken up again unnoticed, or the client is told at once."""

from __future__ import annotations

import contextlib
import http.client
import os

import pytest

from tests.provider.conftest import REAL
from tests.provider.fault_proxy import gets
from tests.provider.site import Site, Task

pytestmark = pytest.mark.parametrize("shared_site", REAL, indirect=True)

LARGE = os.urandom(6 << 20)
BREAK = (5 << 20) + 12_345


def aborted_download(site: Site, media_id: str) -> bytes:
    """What a client got before it was cut off."""
    with site.reader(media_id) as connection, connection.makefile("rb") as stream:
        length = 0
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        assert length == len(LARGE)
        received = b""
        # Ends, one way or the other, as soon as the server ends the connection; else the test hangs and fails.
        try:
            while len(received) < length and (piece := stream.read(min(length - len(received), 64 << 10))):
                received += piece
        except ConnectionResetError:
            pass
        return received


def all_that_comes(site: Site, media_id: str) -> bytes:
    """What a client that does not hang up gets on its connection until that ends."""
    received = b""
    with site.reader(media_id) as connection, contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(64 << 10):
            received += piece
    return received


def test_an_answer_that_breaks_off_once_is_taken_up_again_where_it_broke(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    site.proxy.forget()
    with site.proxy.cut(at=BREAK, times=1) as cut:
        answer = site.homeserver.download(media_id)
    assert cut.hits == 1
    assert answer.body == LARGE
    first, second = filter(gets, site.proxy.requests)
    assert "range" not in first.headers
    # Chunks that were whole are not asked for again.
    assert 0 < second.offset <= BREAK
    assert second.headers["if-match"]
    assert site.trouble() == []


@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_small_answer_that_breaks_off_once_is_asked_for_again_or_an_error(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.upload_and_lose(content)
    with site.proxy.cut(at=size // 2, times=1):
        answer = site.homeserver.download(media_id)
    assert answer.status >= 500 or answer.body == content
    assert site.homeserver.download(media_id).body == content


def test_an_answer_that_always_breaks_off_ends_the_clients_connection(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    with site.proxy.cut(at=BREAK) as cut:
        received = aborted_download(site, media_id)
        assert len(received) < len(LARGE)
        assert LARGE.startswith(received)
        assert 1 < cut.hits < 10
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            site.homeserver.download(media_id)
    site.proxy.wait_until_idle()
    assert site.homeserver.download(media_id).body == LARGE


def test_a_bucket_that_goes_away_in_the_middle_ends_the_clients_connection(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    with site.proxy.drop(lambda request: request.offset > 0), site.proxy.cut(at=BREAK, times=1):
        received = aborted_download(site, media_id)
    assert len(received) < len(LARGE)
    assert LARGE.startswith(received)


def test_an_object_that_is_replaced_meanwhile_is_never_mixed_with_the_old_one(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    with (
        site.proxy.hold(lambda request: gets(request) and request.offset > 0) as resumed,
        site.proxy.cut(at=BREAK, times=1),
    ):
        download = Task(lambda: aborted_download(site, media_id))
        resumed.wait()
        site.client.put_object(Bucket=site.bucket, Key=site.key(media_id), Body=bytes(len(LARGE)))
        resumed.release()
        received = download.result()
    assert len(received) < len(LARGE)
    assert LARGE.startswith(received)
    # Whoever asks from now on gets the new one.
    assert site.homeserver.download(media_id).body == bytes(len(LARGE))


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_what_an_object_has_beyond_the_announced_length_is_not_sent_as_the_next_answer(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.upload_and_lose(content)
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    site.client.put_object(Bucket=site.bucket, Key=site.key(media_id), Body=content + forged)
    assert forged not in all_that_comes(site, media_id)
    assert "not as many bytes as Synapse's database says" in site.log


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_an_object_that_is_shorter_than_announced_ends_the_clients_connection(site: Site, size: int) -> None:
    content = os.urandom(size)
    media_id = site.upload_and_lose(content)
    site.client.put_object(Bucket=site.bucket, Key=site.key(media_id), Body=content[: size // 2])
    # Were the connection not ended, this would wait for the rest in vain.
    all_that_comes(site, media_id)
    assert "not as many bytes as Synapse's database says" in site.log

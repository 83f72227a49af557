"""Clients that stop reading or hang up cost the others nothing."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack
from functools import partial

import pytest

from tests.provider.conftest import REAL
from tests.provider.fault_proxy import gets
from tests.provider.site import Site, Task, eventually, until_quiet

pytestmark = pytest.mark.parametrize("shared_site", REAL, indirect=True)

STALLED = 48
HUNG_UP = 60
LARGE = os.urandom(24 << 20)
# So that its thread pools are as large as they will be: `threadpool_size`, Twisted's own, parts of uploads.
WARM_UP = 24
# Synapse has a pool of its own for files that are on the disk (1.163), of up to 50, which fills as there is need.
SENDERS = 20


def warm_up(site: Site) -> None:
    media_ids = [site.homeserver.upload(LARGE[: 1 << 20]) for _ in range(WARM_UP)]
    site.homeserver.wipe_media()
    tasks = [Task(partial(site.homeserver.download, media_id)) for media_id in media_ids]
    tasks += [
        Task(lambda: site.homeserver.request("POST", "/_matrix/media/v3/upload", LARGE[: 9 << 20], "text/plain"))
        for _ in range(4)
    ]
    assert {task.result().status for task in tasks} == {200}


def test_clients_that_stop_reading_cost_neither_threads_nor_memory_and_others_are_served(site: Site) -> None:
    warm_up(site)
    media_id = site.upload_and_lose(LARGE)
    site.proxy.forget()
    threads, memory = site.process_status("Threads"), site.process_status("VmRSS")
    with ExitStack() as stack:
        for _ in range(STALLED):
            stack.enter_context(site.reader(media_id, receive_buffer=4096))
        site.proxy.wait_for(lambda requests: any(map(gets, requests)))
        until_quiet(lambda: site.proxy.sent)
        # Nobody keeps the bucket waiting: the file is on the disk.
        assert sum(map(gets, site.proxy.requests)) == 1
        assert site.proxy.in_flight == 0
        assert site.process_status("Threads") <= threads + SENDERS
        assert site.process_status("VmRSS") - memory <= STALLED << 10
        site.serves_others()
        other = site.homeserver.upload(LARGE)
        (site.homeserver.media_store / site.path(other)).unlink()
        assert site.homeserver.download(other).body == LARGE
    site.proxy.wait_until_idle()
    assert site.trouble() == []


def test_a_slow_client_gets_the_whole_file(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    with site.reader(media_id, receive_buffer=4096) as connection:
        until_quiet(lambda: site.proxy.sent)
        assert site.proxy.in_flight == 0
        with connection.makefile("rb") as stream:
            while stream.readline().strip():
                pass
            assert stream.read(len(LARGE)) == LARGE
    assert site.trouble() == []


@pytest.mark.parametrize("manner", ["reset", "end"])
def test_clients_that_hang_up_in_the_middle_leave_nothing_behind(site: Site, manner: str) -> None:
    warm_up(site)
    media_id = site.upload_and_lose(LARGE)
    site.proxy.forget()
    site.mark_log()
    threads = site.process_status("Threads")
    with ExitStack() as stack:
        readers = [stack.enter_context(site.reader(media_id)) for _ in range(HUNG_UP)]
        for reader in readers:
            assert len(reader.recv(64 << 10)) > 0
        for reader in readers:
            if manner == "reset":
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reader.close()
    site.proxy.wait_until_idle()
    assert site.homeserver.download(media_id).body == LARGE
    # Some connections to the bucket are kept for later, those that were cut are not.
    eventually("connections are closed", lambda: site.open_sockets() < HUNG_UP)
    assert site.process_status("Threads") <= threads + SENDERS
    assert site.trouble() == []


def test_clients_that_hang_up_before_the_bucket_answers_leave_nothing_behind(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    site.mark_log()
    with site.proxy.hold(gets) as held:
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(site.reader(media_id))
            held.wait(1)
        eventually("Synapse notices that they have gone", lambda: site.log.count("lost before response was sent") == 5)
        held.release()
    site.proxy.wait_until_idle()
    assert site.homeserver.download(media_id).body == LARGE
    assert [line for line in site.trouble() if "already disconnected" not in line] == []


def test_a_client_that_asks_for_the_headers_alone_gets_them(site: Site) -> None:
    media_id = site.upload_and_lose(LARGE)
    answer = site.homeserver.request("HEAD", site.homeserver.download_path(media_id))
    assert (answer.status, answer.headers["Content-Length"], answer.body) == (200, str(len(LARGE)), b"")
    site.proxy.wait_until_idle()
    assert site.trouble() == []

"""A homeserver, its bucket, and what lies between them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tests.provider.fault_proxy import FaultProxy
from tests.provider.homeserver import Homeserver
from tests.servers import S3Server
from tests.temporary_files import temporary_files

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Result = TypeVar("Result")

PATIENCE = 60
"""Seconds after which something counts as hanging; nothing that works comes near it."""

# What Synapse and Twisted log when the rules of log contexts or of consumers were broken, and never else.
_BROKEN_RULES = re.compile(r"CRITICAL|Unhandled|logging context|log context|LoggingContext|was never awaited")
_TROUBLE = re.compile(r"^.*(?: ERROR | WARNING synapse\.|Traceback).*$", re.MULTILINE)


def eventually(what: str, is_so: Callable[[], bool]) -> None:
    """Wait until something is so that tells nobody when it happens."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE} s: {what}")
        time.sleep(0.05)


def until_quiet(number: Callable[[], int]) -> int:
    """Wait until a number has not changed for a second; returns it."""
    deadline = time.monotonic() + PATIENCE
    seen, since = number(), time.monotonic()
    while time.monotonic() < since + 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still changing: {seen}")
        time.sleep(0.05)
        now = number()
        if now != seen:
            seen, since = now, time.monotonic()
    return seen


class Task(Generic[Result]):
    """Something that a thread does while the test goes on."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    @property
    def is_pending(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Result:
        """Wait for what the work returns; raises what it raised."""
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError("it hangs")
        if self._error is not None:
            raise self._error
        return self._results[0]


@dataclass
class Site:
    """One homeserver with one bucket; `proxy` stands between them where there is one."""

    homeserver: Homeserver
    server: S3Server
    bucket: str
    client: S3Client
    _proxy: FaultProxy | None = None
    _mark: int = field(default=0)

    @property
    def proxy(self) -> FaultProxy:
        if self._proxy is None:
            raise RuntimeError("this site has no proxy")
        return self._proxy

    def close(self) -> None:
        """Stop; nothing in the whole log may tell of broken rules."""
        status = self.homeserver.stop()
        if self._proxy is not None:
            self._proxy.close()
        self.client.close()
        if not self.homeserver.has_started:
            return
        broken = [line for line in self.homeserver.log.splitlines() if _BROKEN_RULES.search(line)]
        if broken or status:
            stderr = self.homeserver.stderr[-2000:]
            raise AssertionError(f"Synapse ended with status {status}; log: {broken}; stderr: {stderr}")

    def temporary_files(self) -> list[Path]:
        """What has no place in the media store."""
        homeserver = self.homeserver
        return temporary_files(homeserver.media_store, homeserver.pid if homeserver.is_running else None)

    # --- the log ---

    def mark_log(self) -> None:
        """What the log holds so far is of no interest any more."""
        self._mark = len(self.homeserver.log)

    @property
    def log(self) -> str:
        """What was logged since the mark."""
        return self.homeserver.log[self._mark :]

    def wait_for_log(self, pattern: str) -> str:
        """Wait for a line since the mark that holds the pattern; returns the line."""
        return self.homeserver.wait_for_log(pattern, self._mark)

    def trouble(self) -> list[str]:
        """The lines since the mark that an operator would worry about."""
        return [match[0] for match in _TROUBLE.finditer(self.log)]

    # --- the bucket ---

    def object_keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def key(self, media_id: str) -> str:
        """Where the object of an uploaded file is."""
        return f"{self.homeserver.storage.get('prefix', '')}/{self.path(media_id)}".lstrip("/")

    def path(self, media_id: str) -> str:
        """Where the file is in the media store."""
        return f"local_content/{media_id[:2]}/{media_id[2:4]}/{media_id[4:]}"

    def thumbnail_keys(self, media_id: str) -> list[str]:
        return self.object_keys(self.key(media_id).replace("/local_content/", "/local_thumbnails/") + "/")

    def content(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def holds(self, media_id: str) -> bool:
        return self.object_keys(self.key(media_id)) == [self.key(media_id)]

    # --- the client ---

    def upload_and_lose(self, content: bytes, content_type: str = "application/octet-stream") -> str:
        """Upload a file, wait for it to be in the bucket, and lose the local disk."""
        media_id = self.homeserver.upload(content, content_type)
        eventually("the file is in the bucket", lambda: self.holds(media_id))
        self.homeserver.wipe_media()
        return media_id

    def serves_others(self) -> None:
        """Let other people upload and download, and ask whether the homeserver is well."""
        content = os.urandom(100_000)
        media_id = self.homeserver.upload(content)
        (self.homeserver.media_store / self.path(media_id)).unlink()
        answer = self.homeserver.download(media_id)
        assert (answer.status, answer.body) == (200, content)
        assert self.homeserver.request("GET", "/health").status == 200
        assert self.homeserver.request("GET", "/_matrix/client/v3/account/whoami").status == 200

    @contextlib.contextmanager
    def reader(self, media_id: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        """A client that has asked for a file, and has read nothing yet."""
        with socket.socket() as connection:
            connection.settimeout(PATIENCE)
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.connect(("127.0.0.1", self.homeserver.port))
            connection.sendall(
                f"GET {self.homeserver.download_path(media_id)} HTTP/1.1\r\nHost: test.example\r\n"
                f"Authorization: Bearer {self.homeserver.token}\r\n\r\n".encode()
            )
            yield connection

    # --- the process ---

    def process_status(self, name: str) -> int:
        """A number from /proc: `Threads`, or `VmRSS` in KiB."""
        text = Path(f"/proc/{self.homeserver.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise LookupError(name)
        return int(found[1])

    def open_sockets(self) -> int:
        count = 0
        for descriptor in Path(f"/proc/{self.homeserver.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += str(descriptor.readlink()).startswith("socket:")
        return count


def copy_sqlite(template: Path, directory: Path) -> Mapping[str, Any]:
    """The database block for a copy of a prepared database."""
    directory.mkdir(parents=True, exist_ok=True)
    database = directory / "homeserver.db"
    shutil.copy(template, database)
    return {"name": "sqlite3", "args": {"database": str(database)}}

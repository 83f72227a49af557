"""A real Synapse with this storage provider, as a process of its own, and a client for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import yaml
from signedjson.key import generate_signing_key, write_signing_keys

from tests.servers.process import free_port

ROOT = Path(__file__).parents[2]

_START_SECONDS = 120
_STOP_SECONDS = 60
_LOG_SECONDS = 60

_LOG_FORMAT = "%(asctime)s %(name)s %(lineno)d %(levelname)s %(request)s %(message)s"


@dataclass(frozen=True)
class Answer:
    """What the homeserver answered to a request."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body)


class Homeserver:
    """Synapse in a directory, with one user who is logged in once it has started.

    `storage` is the `config` block of the provider, `wrapper` what stands beside it, `settings`
    more of homeserver.yaml, `database` its database block (SQLite without one), `python` what runs it.
    """

    def __init__(
        self,
        directory: Path,
        storage: Mapping[str, Any],
        *,
        wrapper: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        database: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        log_level: str = "INFO",
        python: str | Path = sys.executable,
    ) -> None:
        self.directory = directory
        self.media_store = directory / "media_store"
        self.log_file = directory / "homeserver.log"
        self.port = free_port()
        self.token = ""
        self.has_started = False
        self._environment = dict(environment or {})
        self._python = str(python)
        self._process: subprocess.Popen[bytes] | None = None
        provider = {
            "module": "s3_storage_provider.S3StorageProviderBackend",
            "store_local": True,
            "store_remote": True,
            "store_synchronous": True,
            **(wrapper or {}),
            "config": dict(storage),
        }
        sqlite = {"name": "sqlite3", "args": {"database": str(directory / "homeserver.db")}}
        self.config: dict[str, Any] = {
            "server_name": "test.example",
            "pid_file": str(directory / "homeserver.pid"),
            "signing_key_path": str(directory / "signing.key"),
            "log_config": str(directory / "log.yaml"),
            "media_store_path": str(self.media_store),
            "listeners": [
                {
                    "port": self.port,
                    "bind_addresses": ["127.0.0.1"],
                    "type": "http",
                    "resources": [{"names": ["client", "federation"]}],
                }
            ],
            "database": dict(database or sqlite),
            "media_storage_providers": [provider],
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "macaroon_secret_key": "test",
            "form_secret": "test",
            "registration_shared_secret": "test",
            "report_stats": False,
            "suppress_key_server_warning": True,
            "trusted_key_servers": [],
            "max_upload_size": "100M",
            "rc_registration": {"per_second": 1000, "burst_count": 1000},
            "rc_message": {"per_second": 1000, "burst_count": 1000},
            "rc_login": {"address": {"per_second": 1000, "burst_count": 1000}},
            "remote_media_download_burst_count": "1000M",
            **(settings or {}),
        }
        self._log_config = {
            "version": 1,
            "formatters": {"precise": {"format": _LOG_FORMAT}},
            "handlers": {
                "file": {"class": "logging.FileHandler", "filename": str(self.log_file), "formatter": "precise"}
            },
            "loggers": {"synapse.storage.SQL": {"level": "INFO"}},
            "root": {"level": log_level, "handlers": ["file"]},
            "disable_existing_loggers": False,
        }

    def __enter__(self) -> Homeserver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the homeserver is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def storage(self) -> dict[str, Any]:
        """The provider's `config` block, to be changed before a start."""
        return cast("dict[str, Any]", self.config["media_storage_providers"][0]["config"])

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def wait_for_log(self, pattern: str, start: int = 0, seconds: float = _LOG_SECONDS) -> str:
        """Wait for a line that holds the pattern, from that place of the log on; returns the line."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(f"^.*{pattern}.*$", self.log[start:], re.MULTILINE)
            if found:
                return found[0]
            time.sleep(0.05)
        raise TimeoutError(f"no line of the log holds {pattern!r}:\n{self.log[start:][-3000:]}")

    def launch(self) -> subprocess.Popen[bytes]:
        """Write the configuration and start the process, without waiting for anything."""
        self.directory.mkdir(parents=True, exist_ok=True)
        key = self.directory / "signing.key"
        if not key.exists():
            with key.open("w") as stream:
                write_signing_keys(stream, [generate_signing_key("a_test")])
        (self.directory / "homeserver.yaml").write_text(yaml.safe_dump(self.config))
        (self.directory / "log.yaml").write_text(yaml.safe_dump(self._log_config))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (self.directory / "stderr.log").open("ab") as stderr:
            self._process = subprocess.Popen(
                [self._python, "-m", "synapse.app.homeserver", "-c", str(self.directory / "homeserver.yaml")],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **self._environment},
            )
        return self._process

    def start(self) -> None:
        """Start, wait until requests are answered, and log a user in."""
        process = self.launch()
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Synapse did not start:\n{self.stderr[-3000:]}\n{self.log[-3000:]}")
            time.sleep(0.1)
        self.has_started = True
        if not self.token:
            self.token = self._register()

    def fail_to_start(self) -> str:
        """Start, wait until it has given up, and return what it printed."""
        process = self.launch()
        try:
            status = process.wait(_START_SECONDS)
        finally:
            self.stop()
        if status == 0:
            raise RuntimeError("Synapse ended without an error")
        return self.stderr

    def stop(self) -> int:
        """End the process; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(_STOP_SECONDS)
        finally:
            process.kill()
            process.wait()

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr.log").read_text(errors="replace")

    def wipe_media(self) -> None:
        """Lose the local disk, as a container does."""
        shutil.rmtree(self.media_store, ignore_errors=True)
        # What is being put in its place at this moment may stay.
        self.media_store.mkdir(exist_ok=True)

    def local_files(self) -> list[Path]:
        return sorted(path for path in self.media_store.rglob("*") if path.is_file())

    # --- the client ---

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        timeout: float = 60,
    ) -> Answer:
        """One request; an error status is an answer like any other."""
        headers = {"Content-Type": content_type}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.read(), dict(response.getheaders()))

    def upload(self, content: bytes, content_type: str = "application/octet-stream") -> str:
        """Upload a file as a client does; returns its media id."""
        answer = self.request("POST", "/_matrix/media/v3/upload?filename=file", content, content_type)
        if answer.status != 200:
            raise RuntimeError(f"upload failed: {answer.status} {answer.body!r}")
        return cast(str, answer.json()["content_uri"].rpartition("/")[2])

    def download_path(self, media_id: str) -> str:
        return f"/_matrix/client/v1/media/download/test.example/{media_id}"

    def download(self, media_id: str, timeout: float = 60) -> Answer:
        """Fetch a file by the authenticated endpoint."""
        return self.request("GET", self.download_path(media_id), timeout=timeout)

    def thumbnail(self, media_id: str, width: int = 32, height: int = 32, method: str = "crop") -> Answer:
        query = f"width={width}&height={height}&method={method}"
        return self.request("GET", f"/_matrix/client/v1/media/thumbnail/test.example/{media_id}?{query}")

    def _register(self) -> str:
        body = {"username": f"u{uuid.uuid4().hex[:8]}", "password": "x", "auth": {"type": "m.login.dummy"}}
        answer = self.request("POST", "/_matrix/client/v3/register", json.dumps(body).encode())
        return cast(str, answer.json()["access_token"])

    def _is_healthy(self) -> bool:
        try:
            return self.request("GET", "/health", timeout=5).status == 200
        except OSError:
            return False

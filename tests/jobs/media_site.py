"""A media store, Synapse's database and a bucket, and the command that stands between them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from storage_provider.media_paths import Media, content_path, thumbnail_directory
from tests.jobs.command_server import ROOT as ROOT
from tests.jobs.command_server import CommandServer, ForkedRun
from tests.jobs.conftest import SynapseDatabase
from tests.provider.fault_proxy import Fault, FaultProxy, Match, Request, everything, puts
from tests.servers import S3Server, make_bucket, make_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SCRIPT = ROOT / "scripts" / "s3_media_upload"

PATIENCE = 60
"""Seconds after which something counts as hanging; nothing that works comes near it."""

_OWN = ".s3_storage_provider"

_PLACES = ("s3_server", "synapse_database", "backend")
_INDIRECT = ["s3_server", "synapse_database"]

QUICKLY = pytest.mark.parametrize(_PLACES, [("moto", "sqlite", "minio")], indirect=_INDIRECT)
"""On what is always there."""

EVERYWHERE = pytest.mark.parametrize(
    _PLACES,
    [
        ("moto", "sqlite", "minio"),
        ("moto", "sqlite", "boto3"),
        pytest.param("minio", "postgres", "minio", marks=pytest.mark.servers),
        pytest.param("minio", "postgres", "boto3", marks=pytest.mark.servers),
        pytest.param("ceph", "postgres", "minio", marks=pytest.mark.servers),
        pytest.param("ceph", "postgres", "boto3", marks=pytest.mark.servers),
    ],
    indirect=_INDIRECT,
)
"""On what operators have, with both backends."""

WIDELY = pytest.mark.parametrize(
    _PLACES,
    [
        ("moto", "sqlite", "minio"),
        pytest.param("minio", "postgres", "boto3", marks=pytest.mark.servers),
        pytest.param("ceph", "postgres", "minio", marks=pytest.mark.servers),
    ],
    indirect=_INDIRECT,
)
"""On what operators have, with one backend each."""

ENCRYPTED = pytest.mark.parametrize(
    _PLACES,
    [
        ("ministack", "sqlite", "minio"),
        ("ministack", "sqlite", "boto3"),
        pytest.param("minio-https", "sqlite", "minio", marks=pytest.mark.servers),
        pytest.param("minio-https", "sqlite", "boto3", marks=pytest.mark.servers),
    ],
    indirect=_INDIRECT,
)
"""On servers that encrypt with the customer's key."""


class SiteProxy(FaultProxy):
    """A proxy with the faults that concern what is sent to the bucket."""

    def __enter__(self) -> SiteProxy:
        return self

    def refuse(self, status: int, code: str, matches: Match = everything) -> contextlib.AbstractContextManager[Fault]:
        """Answer with an error, as S3 words it."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        return self._answer_with(status, {}, body, matches)

    def swallow(self, matches: Match = puts) -> contextlib.AbstractContextManager[Fault]:
        """Acknowledge objects and drop them."""
        return self._answer_with(200, {"ETag": '"0123456789abcdef0123456789abcdef"'}, b"", matches)

    def shorten(self, matches: Match = puts) -> contextlib.AbstractContextManager[Fault]:
        """Keep only the first half of what is sent."""

        async def act(proxy: FaultProxy, exchange: Any, _fault: Fault) -> bool:
            head, _, body = exchange.raw.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
            kept = body[: len(body) // 2]
            exchange.raw = b"\r\n".join([*lines, b"Content-Length: %d" % len(kept), b"", kept])
            return not await proxy.pass_on(exchange)

        return self._in_force(Fault(matches, act))

    def of(self, *methods: str) -> list[Request]:
        """The requests with these methods that were about Synapse's media."""
        return [each for each in self.requests if each.method in methods and "_" in each.key.partition("/")[0]]

    @property
    def listings(self) -> list[Request]:
        return [each for each in self.requests if lists(each) and "max-keys" not in each.query]

    def _answer_with(
        self, status: int, headers: Mapping[str, str], body: bytes, matches: Match
    ) -> contextlib.AbstractContextManager[Fault]:
        async def act(_proxy: FaultProxy, exchange: Any, _fault: Fault) -> bool:
            told = {**headers, "Content-Length": str(len(body)), "Connection": "close"}
            lines = [f"HTTP/1.1 {status} So", *(f"{name}: {value}" for name, value in told.items()), "", ""]
            content = b"" if exchange.request.method == "HEAD" else body
            exchange.client.write("\r\n".join(lines).encode() + content)
            await exchange.client.drain()
            return True

        return self._in_force(Fault(matches, act))


def lists(request: Request) -> bool:
    """Whether the bucket is listed."""
    return request.method == "GET" and "list-type" in request.query


def heads(request: Request) -> bool:
    return request.method == "HEAD"


@dataclass(frozen=True)
class Result:
    """What a run of the command came to."""

    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.status}\n--- stdout\n{self.out}--- stderr\n{self.err}"

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def values(self) -> dict[str, Any]:
        """The one line of JSON that `--json` puts out."""
        (line,) = self.lines
        values: dict[str, Any] = json.loads(line)
        return values


@dataclass
class MediaSite:
    """A working directory with a store in it; the command runs there, as a process of its own."""

    directory: Path
    database: SynapseDatabase
    server: S3Server
    bucket: str
    client: S3Client
    backend: str
    between: SiteProxy | None = None
    environment: dict[str, str] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(4))
    secrets: list[str] = field(default_factory=list)
    """What must not be printed, beside the server's own secret."""
    _runs: int = 0

    def __post_init__(self) -> None:
        self.store.mkdir()

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def proxy(self) -> SiteProxy:
        if self.between is None:
            raise RuntimeError(f"there is no proxy in front of {self.server.name}")
        return self.between

    @property
    def endpoint(self) -> str:
        """Where the command is told to find the bucket."""
        return self.server.endpoint if self.between is None else self.between.url

    # --- media ---

    def content(self, size: int = 3000) -> bytes:
        return self.random.randbytes(size)

    def add_local(
        self, media_id: str, content: bytes | None = None, thumbnails: Mapping[str, bytes] | None = None, **row: Any
    ) -> str:
        """Put a row and its files there; returns the path of the content."""
        content = self.content() if content is None else content
        values = {"media_length": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.database.add_local(media_id, **(values | row))
        return self._add_files(Media("", media_id), media_id, content, thumbnails)

    def add_remote(
        self,
        origin: str,
        media_id: str,
        filesystem_id: str,
        content: bytes | None = None,
        thumbnails: Mapping[str, bytes] | None = None,
        **row: Any,
    ) -> str:
        content = self.content() if content is None else content
        values = {"media_length": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.database.add_remote(origin, media_id, filesystem_id, **(values | row))
        return self._add_files(Media(origin, filesystem_id), media_id, content, thumbnails)

    def add_thumbnail(self, media: Media, media_id: str, name: str, content: bytes) -> str:
        """Put a thumbnail there, with its row."""
        width, height, kind, subtype, method = name.split("-")
        self.database.add_thumbnail(
            media.origin, media_id, int(width), int(height), f"{kind}/{subtype}", method, len(content)
        )
        path = f"{thumbnail_directory(media)}/{name}"
        self.write(path, content)
        return path

    def add_some(self, number: int, size: int = 3000) -> dict[str, bytes]:
        """Put local media with thumbnails and remote media there; returns the files."""
        for index in range(number):
            if index % 3 == 2:
                self.add_remote("a.org", f"Remote{index:04}", f"Fs{index:04}xyz", self.content(size))
            else:
                thumbnails = {"32-32-image-png-crop": self.content(100)} if index % 3 == 0 else None
                self.add_local(f"Local{index:04}x", self.content(size), thumbnails)
        return self.files()

    def write(self, path: str, content: bytes) -> Path:
        target = self.store / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return target

    def _add_files(self, media: Media, media_id: str, content: bytes, thumbnails: Mapping[str, bytes] | None) -> str:
        path = content_path(media)
        self.write(path, content)
        for name, thumbnail in (thumbnails or {}).items():
            self.add_thumbnail(media, media_id, name, thumbnail)
        return path

    # --- what is where ---

    def files(self) -> dict[str, bytes]:
        """All files of the store by their path, but for this package's own."""
        found = (path for path in self.store.rglob("*") if path.is_file() and not path.is_symlink())
        paths = {str(path.relative_to(self.store)): path for path in found}
        return {name: path.read_bytes() for name, path in sorted(paths.items()) if not name.startswith(_OWN)}

    def directories(self) -> list[str]:
        """All directories of the store, but for this package's own."""
        found = (str(path.relative_to(self.store)) for path in self.store.rglob("*") if path.is_dir())
        return sorted(path for path in found if not path.startswith(_OWN))

    def objects(self, **read: Any) -> dict[str, bytes]:
        """The content of all objects, byte by byte as the bucket gives them out."""
        keys = [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])]
        return {key: self.client.get_object(Bucket=self.bucket, Key=key, **read)["Body"].read() for key in sorted(keys)}

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    # --- configuration ---

    def write_database_yaml(self) -> None:
        """As the older tool wants it."""
        arguments = dict(self.database.arguments.arguments)
        content = arguments if self.database.is_postgres else {"sqlite": arguments}
        (self.directory / "database.yaml").write_text(yaml.safe_dump(content))

    def write_homeserver_yaml(self, name: str = "homeserver.yaml", **config: Any) -> Path:
        """Everything that the command needs, as Synapse has it; `config` is added to the provider's."""
        path = self.directory / name
        path.write_text(yaml.safe_dump(self.homeserver_settings(**config)))
        return path

    def homeserver_settings(self, **config: Any) -> dict[str, Any]:
        engine = self.database.arguments.engine
        credentials = {"access_key_id": self.server.access_key, "secret_access_key": self.server.secret_key}
        provider: dict[str, Any] = {"bucket": self.bucket, "endpoint_url": self.endpoint, "backend": self.backend}
        provider |= credentials
        if self.server.ca_file is not None:
            provider["verify"] = self.server.ca_file
        provider["local_cache"] = {"min_free_space": 0}
        return {
            "media_store_path": "store",
            "database": {"name": engine, "args": {"cp_min": 1, **self.database.arguments.arguments}},
            "media_storage_providers": [
                {"module": "s3_storage_provider.S3StorageProviderBackend", "config": provider | config}
            ],
        }

    # --- the command ---

    def start(self, *arguments: object) -> ForkedRun:
        """Begin a run; warnings are errors in it."""
        self._runs += 1
        given = ["--no-progress", *map(str, arguments)]
        return _command_server().start(given, self.directory, self._environment(), self.directory / f"run-{self._runs}")

    def start_script(self, *arguments: object, **popen: Any) -> subprocess.Popen[str]:
        """Begin a run of the script itself, as a shell does."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]
        place: dict[str, Any] = {"cwd": self.directory, "env": self._environment(), "text": True}
        return subprocess.Popen(command, **(place | pipes | popen))

    def finish(self, process: ForkedRun | subprocess.Popen[str], status: int | None = 0) -> Result:
        """Wait for a run, which must end with that exit code and never in a traceback."""
        out, err = process.communicate(timeout=PATIENCE)
        result = self._checked(Result(process.returncode or 0, out or "", err or ""))
        if status is not None and result.status != status:
            raise AssertionError(f"not {status}, but {result}")
        return result

    def run(self, *arguments: object, status: int | None = 0) -> Result:
        return self.finish(self.start(*arguments), status)

    def run_script(self, *arguments: object, status: int | None = 0, **popen: Any) -> Result:
        """A run of the script itself, as a shell does it."""
        return self.finish(self.start_script("--no-progress", *arguments, **popen), status)

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")}
        environment = inherited | {
            "PYTHONPATH": str(ROOT),
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self.server.ca_file is not None:
            environment["AWS_CA_BUNDLE"] = self.server.ca_file
        return environment | self.environment

    def _checked(self, result: Result) -> Result:
        for word in ("Traceback", "Exception ignored", "Warning:"):
            if word in result.err:
                raise AssertionError(f"there is a {word}: {result}")
        for secret in (self.server.secret_key, *self.secrets):
            if len(secret) > 4 and secret in result.out + result.err:
                raise AssertionError(f"a secret was printed: {result}")
        return result

    def run_each(self, commands: Sequence[Sequence[object]]) -> list[Result]:
        """Many short runs, one after another, whatever their exit codes."""
        return [self.run(*arguments, status=None) for arguments in commands]

    def update(self, age: str = "0d") -> None:
        """What the nightly job begins with."""
        self.write_database_yaml()
        self.run("update-db", age)

    def upload(self, *options: object, status: int | None = 0) -> Result:
        """`upload` as the older tool is called."""
        place = ("store", self.bucket, "--endpoint-url", self.endpoint, "--backend", self.backend)
        return self.run("upload", *place, *options, status=status)

    def sync(self, *options: object, status: int | None = 0) -> Result:
        """Everything in one go, with what is in homeserver.yaml; the values of its summary."""
        return self.run("sync", "--older-than", "0d", "--json", *options, status=status)


def now_ms() -> int:
    return int(time.time() * 1000)


# One for all tests: to load the program takes longer than most runs.
_command_server = functools.cache(CommandServer)


@contextlib.contextmanager
def open_site(
    directory: Path, server: S3Server, database: SynapseDatabase, backend: str = "minio"
) -> Iterator[MediaSite]:
    """A site with a bucket of its own; plain http goes through a proxy."""
    with contextlib.ExitStack() as stack:
        client = make_client(server)
        stack.callback(client.close)
        between = stack.enter_context(SiteProxy(server.endpoint)) if server.endpoint.startswith("http:") else None
        yield MediaSite(directory, database, server, make_bucket(server), client, backend, between)

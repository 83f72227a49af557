"""The programs that upload, and the place in which each of them is run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from storage_provider.media_paths import MEDIA_ROOTS
from tests.bench.environments import OURS, PEER, ROOT
from tests.bench.measured import Measured, run_measured
from tests.jobs.conftest import SynapseDatabase
from tests.servers import S3Server, make_bucket, make_client

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_KEYS_A_DELETION = 1000


@dataclass(frozen=True)
class Tool:
    """An `s3_media_upload`, with the options that make it what it is."""

    name: str
    command: tuple[Path, ...]
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


THEIRS = Tool("theirs", (PEER.python, PEER.directory / "bin" / "s3_media_upload"))
_SCRIPT = (OURS.python, ROOT / "scripts" / "s3_media_upload")
MINIO, BOTO3 = (
    Tool(f"ours with {name}", _SCRIPT, ("--backend", name), {"PYTHONPATH": str(ROOT)}) for name in ("minio", "boto3")
)


class WrongResult(Exception):
    """A program ended without an error and had not done what it was asked to do."""


@dataclass
class Site:
    """A server, Synapse's database, and room for files."""

    directory: Path
    server: S3Server
    database: SynapseDatabase
    client: S3Client = field(init=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.client = make_client(self.server)

    def new_directory(self, name: str) -> Path:
        """An empty directory that nobody has had before."""
        directory = self.directory / f"{name.replace(' ', '-')}-{next(self._numbers)}"
        directory.mkdir()
        return directory

    def job(self, tool: Tool, store: Path, endpoint: str | None = None) -> Job:
        """A tool in a working directory of its own, with a bucket and a cache.db that are new."""
        directory = self.new_directory(tool.name)
        arguments = dict(self.database.arguments.arguments)
        content = {"postgres" if self.database.is_postgres else "sqlite": arguments}
        (directory / "database.yaml").write_text(yaml.safe_dump(content))
        return Job(self, tool, store, directory, make_bucket(self.server), endpoint or self.server.endpoint)

    def environment(self) -> dict[str, str]:
        """What every program sees, theirs and ours alike; nothing of the caller's own AWS configuration."""
        inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR")}
        return inherited | {
            "HOME": str(self.directory),
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "AWS_DEFAULT_REGION": self.server.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True)
class Job:
    """One tool's way of bringing a store into a bucket."""

    site: Site
    tool: Tool
    store: Path
    directory: Path
    bucket: str
    endpoint: str

    def run(self, *arguments: object) -> Measured:
        command = (*map(str, self.tool.command), "--no-progress", *map(str, arguments))
        # What was written before is not to be written meanwhile.
        os.sync()
        return run_measured(command, self.directory, {**self.site.environment(), **self.tool.environment})

    def write_homeserver_yaml(self) -> None:
        """What `sync` needs: Synapse's configuration, as far as it concerns media."""
        database = self.site.database.arguments
        server = self.site.server
        provider = {
            "bucket": self.bucket,
            "endpoint_url": self.endpoint,
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
        }
        settings = {
            "media_store_path": str(self.store),
            "database": {"name": database.engine, "args": dict(database.arguments)},
            "media_storage_providers": [{"module": "s3_storage_provider.S3StorageProviderBackend", "config": provider}],
        }
        (self.directory / "homeserver.yaml").write_text(yaml.safe_dump(settings))

    def update(self) -> None:
        """Note in cache.db what there is to upload."""
        self.run("update", self.store, "0d")

    def upload(self, *options: object) -> Measured:
        place = (self.store, self.bucket, "--endpoint-url", self.endpoint)
        return self.run("upload", *place, *self.tool.options, *options)

    def check_objects(self, number: int) -> None:
        """See that the bucket holds so many objects. Raises `WrongResult`."""
        found = len(self._keys())
        if found != number:
            raise WrongResult(f"{self.tool.name} left {found} objects in the bucket, not {number}")

    def check_no_files(self) -> None:
        """See that nothing is left in the store. Raises `WrongResult`."""
        left = sum(1 for root in MEDIA_ROOTS for path in (self.store / root).rglob("*") if path.is_file())
        if left:
            raise WrongResult(f"{self.tool.name} left {left} files on the disk")

    def empty_bucket(self) -> None:
        keys = self._keys()
        for start in range(0, len(keys), _KEYS_A_DELETION):
            some = keys[start : start + _KEYS_A_DELETION]
            self.site.client.delete_objects(Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in some]})

    def _keys(self) -> list[str]:
        pages = self.site.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

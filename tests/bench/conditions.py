"""What a benchmark was run on and with: machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.bench.environments import OURS, PEER, PEER_PACKAGE, ROOT
from tests.jobs.conftest import SynapseDatabase
from tests.servers import S3Server, minio_server
from tests.servers.process import which

# What the measurements depend on most; Synapse and everything shared is of one version in both environments.
_PACKAGES = ("matrix-synapse", "twisted", "boto3", "botocore", "minio", "urllib3", "psycopg2-binary")


def conditions(server_versions: Iterable[str], directory: Path) -> list[str]:
    """Date, machine and versions; `directory` is where files and servers keep their data."""
    ours, theirs = OURS.versions(), PEER.versions()
    installed = [f"{name} {ours[name]}" for name in _PACKAGES if name in ours]
    return [
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {_machine()}",
        f"data on {_file_system(directory)}, server and clients on the same machine",
        f"{PEER_PACKAGE} {theirs[PEER_PACKAGE]} (“theirs”) and this package at {_commit()} (“ours”)",
        f"Python {ours['python']}, {', '.join(installed)}",
        ", ".join(server_versions),
    ]


def server_version(server: S3Server) -> str:
    """The program behind an S3 server, with its version."""
    if server.name.startswith("ceph"):
        # "ceph version 16.2.15 (…) pacific (stable)"
        return f"Ceph RGW {_output(which('radosgw') or 'radosgw', '--version').split()[2]}"
    minio = minio_server.program()
    if minio is None:
        raise FileNotFoundError("minio")
    # What `go install` builds does not know its version; Go's own note in the program does.
    built = re.search(rb"mod\tgithub\.com/minio/minio\t(\S+)", Path(minio).read_bytes())
    return f"MinIO {built[1].decode() if built else _output(minio, '--version').split()[2]}, a single drive"


def database_version(database: SynapseDatabase) -> str:
    """The program behind Synapse's database, with its version."""
    name, query = (
        ("PostgreSQL", "SHOW server_version") if database.is_postgres else ("SQLite", "SELECT sqlite_version()")
    )
    return f"{name} {database.execute(query)[0][0]} for Synapse's database"


def _machine() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    gibibytes = f"{int(memory[1]) / (1 << 20):.0f} GiB" if memory else "unknown"
    return f"{model[1] if model else platform.machine()}, {cores} cores, {gibibytes} of memory, {platform.release()}"


def _file_system(directory: Path) -> str:
    """The type of the file system that holds a directory: the longest mount point above it."""
    resolved = directory.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(above)[1] if above else "an unknown file system"


def _commit() -> str:
    try:
        return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

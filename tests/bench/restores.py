"""Ways to get a lost media store back, each of which tells how many seconds it took."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

from backends import open_backend
from storage_provider.media_store import MediaStore
from storage_provider.restoring import Restore, Restored
from storage_provider.settings import ProviderSettings
from storage_provider.synapse_db import DatabaseArguments, connect
from storage_provider.transfers import Bandwidth
from tests.bench.environments import PEER
from tests.bench.served_media import MediaSet
from tests.servers import S3Server

_SERIAL_DOWNLOADS = Path(__file__).with_name("serial_downloads.py")

# As the command line has it.
_WORKERS = {"minio": 32, "boto3": 16}


class RestoreFailed(Exception):
    """Not everything came back."""


def download_serially(server: S3Server, bucket: str, media: MediaSet, store: Path) -> float:
    """What users of their software do: boto3's `download_file`, one after another."""
    _lose(store)
    order = {
        "client": {
            "endpoint_url": server.endpoint,
            "region_name": server.region,
            "aws_access_key_id": server.access_key,
            "aws_secret_access_key": server.secret_key,
        },
        "bucket": bucket,
        "keys": media.paths,
        "store": str(store),
    }
    done = subprocess.run(
        [PEER.python, "-I", _SERIAL_DOWNLOADS], input=json.dumps(order), capture_output=True, text=True, check=True
    )
    _check(media, store)
    return float(done.stdout)


def restore_by_library(
    server: S3Server, bucket: str, media: MediaSet, store: Path, database: Path, backend: str
) -> float:
    """What `s3_media_upload restore` does."""
    _lose(store)
    settings = ProviderSettings.parse(
        {
            "bucket": bucket,
            "endpoint_url": server.endpoint,
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "backend": backend,
        }
    )
    stop = threading.Event()
    begun = time.monotonic()
    with (
        closing(open_backend(settings)) as opened,
        connect(DatabaseArguments("sqlite3", {"database": str(database)})) as rows,
    ):
        job = Restore(
            backend=opened,
            store=MediaStore(store),
            database=rows,
            bandwidth=Bandwidth(None, stop),
            stop=stop,
            workers=_WORKERS[backend],
            used_since=None,
            origin=None,
            min_free=0,
        )
        failed = [event for event in job.run() if not isinstance(event, Restored)]
    seconds = time.monotonic() - begun
    if failed:
        raise RestoreFailed(f"{len(failed)} files, such as {failed[0]}")
    _check(media, store)
    return seconds


def _lose(store: Path) -> None:
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)


def _check(media: MediaSet, store: Path) -> None:
    missing = [path for path in media.paths if (store / path).stat().st_size != media.size]
    if missing or (store / media.paths[-1]).read_bytes() != media.content:
        raise RestoreFailed(f"{len(missing)} of {len(media.ids)} files are not whole")

"""Ways to get a lost media store back, each of which tells how many seconds it took."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.bench.contestant import Contestant, lose_files
from tests.bench.environments import PEER
from tests.bench.served_media import MediaSet
from tests.servers import S3Server

_SERIAL_DOWNLOADS = Path(__file__).with_name("serial_downloads.py")


class RestoreFailed(Exception):
    """Not everything came back."""


def download_serially(server: S3Server, bucket: str, media: MediaSet, store: Path) -> float:
    """What users of their software do: boto3's `download_file`, one after another."""
    store.mkdir(parents=True, exist_ok=True)
    lose_files(store)
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


def restore_in_synapse(each: Contestant, media: MediaSet) -> float:
    """What Synapse's log tells of the pass with which it begins after its disk was lost, comparing and listing included."""
    begin = len(each.homeserver.log)
    each.restart()
    each.take_longest_block()
    line = each.homeserver.wait_for_log("Local cache: restored", begin)
    found = re.search(r"restored (\d+) .*; ([\d.]+) s$", line)
    if found is None or int(found[1]) != len(media.ids):
        raise RestoreFailed(f"not all was restored, but {line}")
    _check(media, each.homeserver.media_store)
    return float(found[2])


def _check(media: MediaSet, store: Path) -> None:
    missing = [path for path in media.paths if (store / path).stat().st_size != media.size]
    if missing or (store / media.paths[-1]).read_bytes() != media.content:
        raise RestoreFailed(f"{len(missing)} of {len(media.ids)} files are not whole")

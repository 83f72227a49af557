"""The memory that a pass over the local cache takes with as many media as a big homeserver has."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from storage_provider.database import DatabaseArguments
from storage_provider.media_store import MediaStore
from tests.backends.scripted_server import ScriptedServer, from_request
from tests.bench import contestant
from tests.bench.contestant import Contestant
from tests.bench.listed_bucket import ListedBucket, NumberedMedia
from tests.bench.media import fill, write_empty_files
from tests.bench.report import say
from tests.jobs.conftest import SynapseDatabase
from tests.servers import S3Server

_ON_DISK = 10
"""Every tenth media is on the disk, unused for long."""

_USED_LATELY = 100
"""Every hundredth was used lately; none of those is on the disk."""

_INTERVAL_SECONDS = 5
_LONGEST_PASS_SECONDS = 3600


class WrongPass(Exception):
    """The pass did something else than what there was to do."""


@dataclass(frozen=True)
class Pass:
    """What one pass took."""

    idle_mib: float
    """The memory of Synapse before it."""
    beyond_idle_mib: float
    """At its peak."""
    seconds: float
    longest_block_ms: float
    """For how long the reactor stood still at the most."""


def measure(directory: Path, backend: str, number: int) -> Pass:
    """Let Synapse make one pass over so many media."""
    media = NumberedMedia(number)
    with ScriptedServer([from_request(ListedBucket(media).answer)]) as server:
        listed = S3Server("listed", server.endpoint, "key", "secret")
        each = contestant.ours(
            directory / f"many-{backend}-{number}",
            listed,
            "media",
            backend,
            auto_restore_startup=False,
            auto_restore_monitor_interval=_INTERVAL_SECONDS,
            local_cache={"max_age": "30d", "min_age": 0, "min_free_space": 0},
        )
        try:
            return _measure(each, media)
        finally:
            each.end()


def _measure(each: Contestant, media: NumberedMedia) -> Pass:
    homeserver = each.homeserver
    say(f"many: making {len(media):,} rows …")
    with homeserver:
        pass
    database = SynapseDatabase(DatabaseArguments("sqlite3", {"database": str(homeserver.directory / "homeserver.db")}))
    fill(database, media, 0)
    now_ms = int(time.time() * 1000)
    for table in ("local_media_repository", "remote_media_cache"):
        database.execute(f"UPDATE {table} SET last_access_ts = ? WHERE rowid % ? = 0", (now_ms, _USED_LATELY))
    write_empty_files(homeserver.media_store, media[::_ON_DISK])
    # As though the cache had been here for long: what was used lately and is not on the disk belongs there.
    MediaStore(homeserver.media_store).set_offloaded_before(0)
    begin = len(homeserver.log)
    homeserver.start()
    each.take_longest_block()
    idle = each.memory_mib()
    each.forget_peak_memory()
    line = homeserver.wait_for_log("Local cache: restored", begin, _LONGEST_PASS_SECONDS)
    beyond_idle, block = each.memory_mib("VmHWM") - idle, each.take_longest_block()
    say(f"many: {len(media):,} media, {beyond_idle:.0f} MiB beyond idle: {line.partition('Local cache: ')[2]}")
    found = re.search(r"restored (\d+) .*evicted (\d+) .*; ([\d.]+) s$", line)
    expected = (len(media) // _USED_LATELY, len(media) // _ON_DISK)
    if found is None or (int(found[1]), int(found[2])) != expected:
        raise WrongPass(f"{expected[0]} were to be restored and {expected[1]} to be evicted, but: {line}")
    return Pass(idle, beyond_idle, float(found[3]), block)

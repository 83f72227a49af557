"""The memory that `sync --delete` takes with as many media as a big homeserver has.

As many rows in Synapse's database and objects in the bucket, and a tenth of that on the disk, where most media
has been removed before: `sync` reads all rows into cache.db, compares them with the disk, lists the bucket,
proves the objects of what is on the disk, asks the database again, and removes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tests.backends.scripted_server import ScriptedServer, from_request
from tests.bench.listed_bucket import ListedBucket, NumberedMedia
from tests.bench.measured import Measured
from tests.bench.media import fill, write_empty_files
from tests.bench.report import Row, Samples, say, value
from tests.bench.upload_site import Job, Site, Tool, WrongResult

_MOST_MIB = 150
_MOST_GROWTH_MIB = 10
"""What counts as flat: from 100,000 to 1,000,000 it is twelve bytes a row."""

_ON_DISK = 10
"""Every tenth media is on the disk."""


def measure_memory(site: Site, tools: Iterable[Tool], few: int, many: int) -> list[Row]:
    """The peak with many media, and what it is more than with a few."""
    rows = []
    for tool in tools:
        first, last = (_sync(site, tool, number) for number in (few, many))
        what = f"`sync --delete` of {many:,} media, peak memory: {tool.name}"
        measured = f"{few:,} media {first.peak_mib:.0f} MiB in {first.seconds:.0f} s ({first.cpu_seconds:.0f} s of CPU)"
        measured += (
            f", {many:,} media {last.peak_mib:.0f} MiB in {last.seconds:.0f} s ({last.cpu_seconds:.0f} s of CPU)"
        )
        rows.append(value(what, Samples(measured, "MiB", (last.peak_mib,)), at_most=_MOST_MIB))
        growth = Samples("", "MiB", (last.peak_mib - first.peak_mib,))
        rows.append(value(f"… more than for {few:,} media", growth, at_most=_MOST_GROWTH_MIB))
    return rows


def _sync(site: Site, tool: Tool, number: int) -> Measured:
    media = NumberedMedia(number)
    say(f"memory: making {number:,} rows …")
    fill(site.database, media, 0)
    store = site.new_directory("store")
    write_empty_files(store, media[::_ON_DISK])
    bucket = ListedBucket(media)
    with ScriptedServer([from_request(bucket.answer)]) as server:
        job = Job(site, tool, store, site.new_directory(tool.name), "media", server.endpoint)
        job.write_homeserver_yaml()
        measured = job.run("sync", "--older-than", "0d", "--delete", "--json", *tool.options)
    deleted = json.loads(measured.output)["deleted_files"]
    if deleted != number // _ON_DISK:
        raise WrongResult(f"{tool.name} removed {deleted} files, not {number // _ON_DISK}")
    if bucket.pages < number // 1000:
        raise WrongResult(f"{tool.name} read {bucket.pages} pages of the bucket's listing, which is not all of it")
    say(f"memory: {tool.name}, {number:,} media: {measured.peak_mib:.0f} MiB, {measured.seconds:.0f} s")
    return measured

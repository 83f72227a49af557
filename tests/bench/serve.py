"""Measures the storage provider inside a real Synapse against synapse-s3-storage-provider and Synapse's own.

    first    downloads of files that lie in the bucket alone; CPU of the Synapse process
    again    the second download of the same files
    shared   many clients ask for one large file at once
    slow     many clients take large files at a low rate; memory of the Synapse process
    stalled  many clients stop reading; how others fare
    restore  a lost media store is fetched back

In all of them a ticker inside Synapse tells for how long the reactor stood still. The control is Synapse's own
provider `file_system`, with its files in another directory of the same disk.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.bench import restores
from tests.bench.conditions import server_version
from tests.bench.contestant import Contestant
from tests.bench.options import Options, finish
from tests.bench.report import Row, Samples, alternate, ratio, say, value
from tests.bench.serve_site import MIB, QUICK, WHOLE, ServeSite, open_site
from tests.bench.served_media import MediaSet
from tests.bench.stalled_readers import Stall
from tests.servers import ServerUnavailable

CLIENTS = {1: 1.0, 8: 1.3, 32: 1.3}
"""How many, and what their throughput must be, in that of theirs."""

MOST_SECONDS = 1.0
"""Within which others are answered while some clients have stopped reading."""

_GB = 1e9
_SLOW = 4 * MIB
_ROUNDS = 5
_SLOW_ROUNDS = 2
_STALLED_ROUNDS = 2
_RESTORE_ROUNDS = 3


# --- first: downloads from the bucket ---


def first(site: ServeSite, options: Options) -> list[Row]:
    rows = []
    for clients, target in CLIENTS.items():
        ids = list(site.small.ids[: min(len(site.small.ids), 64 * clients)])
        what = f"1 MiB files, {_clients(clients)}"
        runs = {each.name: partial(_first_downloads, each, site.small, ids, clients, what) for each in site.all}
        speed = alternate(runs, options.rounds_or(_ROUNDS), "MiB/s", what, site.settle)
        rows.append(ratio(f"{what}: throughput", speed["ours"], speed["theirs"], at_least=target))
        rows.append(Row(f"{what}: throughput of the control", str(speed["control"]), ""))
        rows.append(_cpu(site, what))
    rows.append(_hashing())
    return rows


def _first_downloads(each: Contestant, media: MediaSet, ids: list[str], clients: int, what: str) -> float:
    each.wipe()
    before = each.cpu_seconds()
    outcome = each.download(media, ids, clients, what)
    size = len(ids) * media.size
    each.noted[what].append((each.cpu_seconds() - before) / (size / _GB))
    return size / MIB / outcome.seconds


def _cpu(site: ServeSite, what: str) -> Row:
    control = statistics.median(site.control.noted[what])
    beyond = [
        Samples(each.name, "s/GB", tuple(seconds - control for seconds in each.noted[what]))
        for each in (site.ours, site.theirs)
    ]
    return ratio(f"{what}: CPU beyond the control's {control:.2f} s/GB", *beyond, at_most=0.5)


def _hashing() -> Row:
    block = bytes(256 << 10)
    blocks = 200
    seconds = []
    for _ in range(_ROUNDS):
        begun = time.process_time()
        for _ in range(blocks):
            hashlib.sha256(block)
        seconds.append((time.process_time() - begun) / (blocks * len(block) / _GB))
    what = "SHA-256 of what is downloaded into a file, as it may be kept; theirs keeps nothing"
    return value(what, Samples("", "s/GB", tuple(seconds)))


# --- again: the second download ---


def again(site: ServeSite, options: Options) -> list[Row]:
    rows = []
    for name in ("ours", "theirs"):
        with site.counted(name) as (each, requests):
            for media, size in ((site.small, "1 MiB"), (site.tiny, "30 KiB")):
                ids = list(media.ids[:32])
                each.download(media, ids, 8)
                requests.forget()
                each.download(media, ids, 8)
                found = Samples("", "requests", (requests.of_objects,))
                target = 0 if name == "ours" else None
                rows.append(value(f"second download of 32 files of {size}, {name}", found, at_most=target))
    what = "second download, 8 clients"
    ids = list(site.small.ids[:256])
    site.control.wipe()
    site.small.write(site.control.homeserver.media_store)
    runs: dict[str, Callable[[], float]] = {
        each.name: partial(_second_downloads, each, site.small, ids, what) for each in (site.theirs, site.ours)
    }
    runs["local"] = partial(_again, site.control, site.small, ids, what)
    speed = alternate(runs, options.rounds_or(_ROUNDS), "MiB/s", what, site.settle)
    rows.append(ratio(f"{what}: throughput against local files", speed["ours"], speed["local"], at_least=0.95))
    rows.append(ratio(f"{what}: throughput against theirs", speed["ours"], speed["theirs"]))
    return rows


def _second_downloads(each: Contestant, media: MediaSet, ids: list[str], what: str) -> float:
    each.wipe()
    return _again(each, media, ids, what)


def _again(each: Contestant, media: MediaSet, ids: list[str], what: str) -> float:
    each.download(media, ids, 8, f"{what} (the first)")
    return len(ids) * media.size / MIB / each.download(media, ids, 8, what).seconds


# --- shared: one file, many clients ---


def shared(site: ServeSite, options: Options) -> list[Row]:
    media, clients = site.large, len(site.large.ids)
    what = f"{_clients(clients)}, one file of {media.size // MIB} MiB"
    rows = []
    for name in ("ours", "theirs"):
        with site.counted(name) as (each, requests):
            each.download(media, [media.ids[0]] * clients, clients)
            found = Samples("", "GETs", (requests.gets,))
            rows.append(value(f"{what}, {name}", found, at_most=1 if name == "ours" else None))
    runs = {each.name: partial(_one_file, each, media, clients, what) for each in site.all}
    speed = alternate(runs, options.rounds_or(_ROUNDS), "MiB/s", what, site.settle)
    rows.append(ratio(f"{what}: throughput", speed["ours"], speed["theirs"], at_least=3))
    rows.append(Row(f"{what}: throughput of the control", str(speed["control"]), ""))
    first_bytes = [Samples(each.name, "ms", tuple(each.noted[what])) for each in (site.theirs, site.ours)]
    rows.append(ratio(f"{what}: time to the first byte, theirs to ours", *first_bytes, at_least=1))
    return rows


def _one_file(each: Contestant, media: MediaSet, clients: int, what: str) -> float:
    each.wipe()
    # Another file in each round, should anything remember the last one.
    media_id = media.ids[len(each.noted[what]) % len(media.ids)]
    outcome = each.download(media, [media_id] * clients, clients, what)
    each.noted[what].append(statistics.median(outcome.first_byte) * 1000)
    return clients * media.size / MIB / outcome.seconds


# --- slow: many large files at a low rate ---


def slow(site: ServeSite, options: Options) -> list[Row]:
    media = site.large
    what = f"{_clients(len(media.ids))}, {media.size // MIB} MiB each at {_SLOW // MIB} MiB/s"
    runs = {each.name: partial(_memory, each, site, what) for each in site.all}
    memory = alternate(runs, options.rounds_or(_SLOW_ROUNDS), "MiB", what, site.settle)
    return [
        value(f"{what}: memory beyond idle, ours", memory["ours"], at_most=60),
        value(f"{what}: memory beyond idle, theirs", memory["theirs"]),
        value(f"{what}: memory beyond idle, the control", memory["control"]),
        *(
            value(f"{what}: all files, {each.name}", Samples("", "s", tuple(each.noted[what])))
            for each in (site.ours, site.theirs, site.control)
        ),
    ]


def _memory(each: Contestant, site: ServeSite, what: str) -> float:
    # What was taken before is not given back by Python: only a new process shows what this costs.
    each.restart()
    small = list(site.small.ids[:64])
    each.download(site.small, small, 32)
    each.download(site.large, [site.large.ids[0]], 1)
    each.wipe()
    idle = each.memory_mib()
    each.forget_peak_memory()
    outcome = each.download(site.large, list(site.large.ids), len(site.large.ids), what, bytes_per_second=_SLOW)
    each.noted[what].append(outcome.seconds)
    return each.memory_mib("VmHWM") - idle


# --- stalled: clients that stop reading ---


def stalled(site: ServeSite, options: Options) -> list[Row]:
    rows = []
    media = site.stalled
    for kind, ids in (("different files", list(media.ids)), ("one file", [media.ids[0]] * len(media.ids))):
        what = f"{len(ids)} stalled readers of {media.size // MIB} MiB, {kind}"
        # Theirs serves nobody then, and each round would wait for that.
        runs = {each.name: partial(_answers, each, site, ids, what) for each in (site.ours, site.control)}
        longest = alternate(runs, options.rounds_or(_STALLED_ROUNDS), "s", what, site.settle)
        rows.append(value(f"{what}: longest answer to others, ours", longest["ours"], at_most=MOST_SECONDS))
        rows.append(value(f"{what}: longest answer to others, the control", longest["control"]))
        theirs = alternate({"theirs": partial(_answers, site.theirs, site, ids, what)}, 1, "s", what, site.settle)[
            "theirs"
        ]
        rows.append(value(f"{what}: longest answer to others, theirs", theirs))
    return rows


def _answers(each: Contestant, site: ServeSite, ids: list[str], what: str) -> float:
    each.wipe()
    each.take_longest_block()
    with Stall(each.homeserver, ids) as stall:
        seconds = stall.longest_answer(site.small, site.sizes.watched_seconds)
        each.note_block(what)
        if each is not site.theirs:
            stall.check()
    if each is site.theirs:
        # Its threads go on waiting for the readers that have gone.
        each.restart()
    return seconds


# --- restore: a lost disk ---


def restore(site: ServeSite, options: Options) -> list[Row]:
    media, store = site.tiny, site.scratch / "media_store"
    what = f"restore of {len(media.ids):,} files of 30 KiB"
    runs: dict[str, Callable[[], float]] = {
        "download_file": partial(restores.download_serially, site.server, site.bucket, media, store)
    }
    for backend in ("minio", "boto3"):
        runs[backend] = partial(_restore, site, site.restoring(backend), f"{what}, {backend}")
    seconds = alternate(runs, options.rounds_or(_RESTORE_ROUNDS), "s", what, site.settle)
    return [
        ratio(f"{what}, {backend}", seconds["download_file"], seconds[backend], at_least=target)
        for backend, target in (("minio", 4), ("boto3", 2.5))
    ]


def _restore(site: ServeSite, each: Contestant, what: str) -> float:
    seconds = restores.restore_in_synapse(each, site.tiny)
    site.ours.blocks[what].append(each.take_longest_block())
    each.end()
    site.control.restart()
    site.control.take_longest_block()
    time.sleep(seconds)
    site.control.note_block(what)
    return seconds


# --- in all of them: the reactor ---


def blocks(site: ServeSite) -> list[Row]:
    """How long the reactors stood still, by occasion and in all."""
    rows = []
    worst: dict[str, float] = {}
    for what in site.control.blocks.keys() & site.ours.blocks.keys():
        found = [Samples(each.name, "ms", tuple(each.blocks[what])) for each in site.all if each.blocks[what]]
        for samples in found:
            worst[samples.name] = max(worst.get(samples.name, 0), *samples.values)
        rows.append(Row(f"longest block of the reactor: {what}", ", ".join(map(str, found)), ""))
    told = ", ".join(f"{name} {longest:.0f} ms" for name, longest in worst.items())
    beyond = Samples(told, "ms", (worst["ours"] - worst["control"],))
    return [value("longest block of the reactor of all, beyond the control's", beyond, at_most=50), *rows]


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"


PARTS: dict[str, Callable[[ServeSite, Options], list[Row]]] = {
    "first": first,
    "again": again,
    "shared": shared,
    "slow": slow,
    "stalled": stalled,
    "restore": restore,
}

_NOTES = (
    "Database: SQLite, a copy for each homeserver. The media was put into the bucket and the database directly.",
    "Clients: one process beside Synapse, with a connection for each client that is kept alive.",
    "Before each round, free memory is filled with cached files, as on a server that has run for a while. A virtual machine "
    "that gives free memory back to its host pays for each page when it is used again, and only what keeps files uses any.",
)


def main() -> int:
    options = Options.parse("serve", __doc__, tuple(PARTS))
    try:
        with open_site(QUICK if options.quick else WHOLE) as site:
            rows = [row for part in options.parts for row in PARTS[part](site, options)]
            rows += blocks(site)
            versions = [server_version(site.server)]
            return finish(options, "The storage provider in Synapse", rows, versions, site.scratch, _NOTES)
    except ServerUnavailable as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

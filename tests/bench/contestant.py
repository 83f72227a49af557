"""A Synapse with one storage provider, and what the kernel and its own reactor tell of it."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.environments import OURS, PEER, ROOT, Environment
from tests.bench.load import Order, Outcome, download_all
from tests.bench.served_media import MediaSet
from tests.provider.homeserver import Homeserver
from tests.servers import S3Server

_IN_SYNAPSE = ROOT / "tests" / "bench" / "in_synapse"

# What the provider keeps in the media store for itself; it goes with the disk, but not under a running Synapse.
_OWN_DIRECTORY = ".s3_storage_provider"

_LOST = "lost-"

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# A process that takes less than so much of a core for so long has done the work that answers leave behind.
_REST_SECONDS = 0.3
_REST_CPU_SECONDS = 0.03
_MOST_RESTS = 30


class Contestant:
    """One of those that are compared, with what was noted of it beside the speed: by subject, a value a round."""

    def __init__(self, name: str, homeserver: Homeserver) -> None:
        self.name = name
        self.homeserver = homeserver
        self.noted: dict[str, list[float]] = defaultdict(list)
        self.blocks: dict[str, list[float]] = defaultdict(list)
        """By occasion, for how many milliseconds the reactor stood still at the longest."""

    def restart(self) -> None:
        """Begin as a new process with an empty disk."""
        self.end()
        self.homeserver.media_store.mkdir(parents=True, exist_ok=True)
        lose_files(self.homeserver.media_store)
        self.homeserver.start()

    def end(self) -> None:
        """Kill the process: with readers that have stalled, theirs would need a minute and a half to end."""
        if self.homeserver.is_running:
            os.kill(self.homeserver.pid, signal.SIGKILL)
        self.homeserver.stop()

    def wipe(self) -> None:
        """Lose the local files while Synapse runs, so that the provider is asked for them."""
        lose_files(self.homeserver.media_store, but=_OWN_DIRECTORY)

    def download(
        self,
        media: MediaSet,
        ids: list[str],
        clients: int,
        occasion: str | None = None,
        *,
        bytes_per_second: int | None = None,
    ) -> Outcome:
        """Download; with an occasion, how long the reactor stood still meanwhile is noted."""
        order = Order(
            self.homeserver.port,
            self.homeserver.token,
            [self.homeserver.download_path(media_id) for media_id in ids],
            media.size,
            clients,
            bytes_per_second,
        )
        self.take_longest_block()
        outcome = download_all(order)
        self._come_to_rest()
        if occasion is not None:
            self.note_block(occasion)
        return outcome

    def _come_to_rest(self) -> None:
        """Wait until files have been kept and closed, so that this is counted too."""
        for _ in range(_MOST_RESTS):
            before = self.cpu_seconds()
            time.sleep(_REST_SECONDS)
            if self.cpu_seconds() - before <= _REST_CPU_SECONDS:
                return

    # --- what its process tells ---

    def note_block(self, occasion: str) -> None:
        self.blocks[occasion].append(self.take_longest_block())

    def take_longest_block(self) -> float:
        """For how many milliseconds the reactor stood still since it was last asked, at the longest."""
        answer = self.homeserver.request("GET", "/_bench/longest_block")
        if answer.status != 200:
            raise RuntimeError(f"{self.name}: {answer.status} {answer.body[:300]!r}")
        return float(answer.json()["seconds"]) * 1000

    def cpu_seconds(self) -> float:
        """What the process has used so far, all threads together."""
        fields = Path(f"/proc/{self.homeserver.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def memory_mib(self, name: str = "VmRSS") -> float:
        """`VmRSS`, or `VmHWM`: the most since `forget_peak_memory`."""
        found = re.search(rf"^{name}:\s+(\d+) kB$", self._proc("status").read_text(), re.MULTILINE)
        if found is None:
            raise LookupError(name)
        return int(found[1]) / 1024

    def forget_peak_memory(self) -> None:
        self._proc("clear_refs").write_text("5")

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.homeserver.pid}/{name}")


def lose_files(directory: Path, but: str | None = None) -> None:
    """Empty a directory, of all but one name; what was in it lies beside it then.

    It is not deleted before all is over: for minutes after many deletions, ext4 takes longer to make files.
    """
    lost = Path(tempfile.mkdtemp(prefix=_LOST, dir=directory.parent))
    for path in directory.iterdir():
        if path.name != but:
            path.rename(lost / path.name)


def ours(directory: Path, server: S3Server, bucket: str, backend: str, **config: Any) -> Contestant:
    """This package; `config` is what is set beside what reaches the bucket."""
    storage = _storage(server, bucket) | {"backend": backend} | config
    return _contestant("ours", OURS, directory, storage, {}, [ROOT])


def theirs(directory: Path, server: S3Server, bucket: str) -> Contestant:
    return _contestant("theirs", PEER, directory, _storage(server, bucket), {}, [])


def control(directory: Path, files: Path) -> Contestant:
    """Synapse with the provider that it brings along, which has its files in another directory."""
    return _contestant("control", OURS, directory, {"directory": str(files)}, {"module": "file_system"}, [])


def _storage(server: S3Server, bucket: str) -> dict[str, Any]:
    return {
        "bucket": bucket,
        "endpoint_url": server.endpoint,
        "region_name": server.region,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
    }


def _contestant(
    name: str,
    environment: Environment,
    directory: Path,
    storage: Mapping[str, Any],
    wrapper: Mapping[str, Any],
    sources: list[Path],
) -> Contestant:
    homeserver = Homeserver(
        directory,
        storage,
        wrapper=wrapper,
        settings={"modules": [{"module": "reactor_ticker.ReactorTicker", "config": {}}]},
        # Theirs has the name of ours, so each sees no more than its own.
        environment={"PYTHONPATH": os.pathsep.join(map(str, [_IN_SYNAPSE, *sources]))},
        python=environment.python,
    )
    return Contestant(name, homeserver)

"""Runs a command and tells how long it took and how much memory it needed, its start-up included.

The command is started by a small process of its own (this file, as a script): what the kernel reports as a
process's peak memory is never less than that of the process which started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_OUTPUT_TAIL = 3000


class CommandFailed(Exception):
    """The command ended with an error; the message ends with what it said."""


@dataclass(frozen=True)
class Measured:
    """What a run of a command took."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str
    """What it wrote to stdout and stderr."""


def run_measured(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Measured:
    """Run a command in a directory. Raises `CommandFailed`."""
    result, log = directory / "measured.json", directory / "measured.log"
    words = [sys.executable, "-I", "-S", __file__, str(result), *command]
    with log.open("wb") as output:
        subprocess.run(words, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    said = log.read_text(errors="replace")
    found = json.loads(result.read_text())
    if found.pop("status"):
        raise CommandFailed(f"{' '.join(words[5:])} failed: {said[-_OUTPUT_TAIL:]}")
    return Measured(**found, output=said)


def main(result: str, command: list[str]) -> None:
    begun = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    found = {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

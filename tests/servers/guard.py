"""Ends the servers of a test run whose own process is gone, and removes their files.

Run as a script, with the run's directory as argument and a pipe as standard input. The pipe's other end
belongs to the test run alone, so it closes when that run ends for whatever reason, SIGKILL and the
out-of-memory killer included. A death signal on each server (PR_SET_PDEATHSIG) would not do: it is lost when
a server drops its privileges, as Swift does, and does not reach the workers that a server forks.

Standard library only, and no import of its own package: it is started with ``python -I``.
"""

import os
import shutil
import signal
import sys
import time

GRACE = 5.0
"""Seconds between the polite signal and SIGKILL."""


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send(group: int, signal_number: int) -> None:
    try:
        os.killpg(group, signal_number)
    except (ProcessLookupError, PermissionError):
        return


def main() -> None:
    directory = sys.argv[1]
    # An interrupt is for the test run, which then closes the pipe when it has put things away itself.
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    groups: dict[int, int] = {}
    for line in sys.stdin:
        verb, group, signal_number = line.split()
        if verb == "started":
            groups[int(group)] = int(signal_number)
        else:
            groups.pop(int(group), None)
    for group, signal_number in groups.items():
        send(group, signal_number)
    deadline = time.monotonic() + GRACE
    while any(map(group_is_alive, groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in groups:
        send(group, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

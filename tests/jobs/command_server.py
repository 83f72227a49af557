"""Runs of the command that are forked off one process, which has loaded the program: ten times cheaper.

Each run is a process with a working directory, an environment and signals of its own, as if it were
started by a shell. What loading itself does is seen only by real starts of the script.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ForkedRun:
    """A run that was begun; used like a `subprocess.Popen`."""

    def __init__(self, waiter: int, pid: int, directory: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._directory = directory
        self._waiter: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._waiter = os.pidfd_open(waiter)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        # It may have ended just now, and its waiter has not told yet.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        if self._wait(timeout) is None:
            self.kill()
            raise TimeoutError(f"it hangs: {(self._directory / 'err').read_text()}")
        return (self._directory / "out").read_text(), (self._directory / "err").read_text()

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None:
            if self._waiter is not None:
                if not select.select([self._waiter], [], [], seconds)[0]:
                    return None
                os.close(self._waiter)
                self._waiter = None
            self.returncode = int((self._directory / "status").read_text())
        return self.returncode


class CommandServer:
    """The process that has loaded the program; it ends with this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.jobs.command_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, arguments: Sequence[str], working_directory: Path, environment: Mapping[str, str], own: Path
    ) -> ForkedRun:
        """Begin a run; what it puts out goes into files in the directory `own`."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("there are no pipes to the process")
        own.mkdir(parents=True)
        # It may be killed before it has opened them.
        for name in ("out", "err"):
            (own / name).touch()
        request = [list(arguments), str(working_directory), dict(environment), str(own)]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        waiter, pid = map(int, self._process.stdout.readline().split())
        return ForkedRun(waiter, pid, own)


def serve() -> None:
    import backends.boto3_backend
    import backends.minio_backend  # noqa: F401
    from storage_provider.cli import main

    gc.freeze()
    # Nobody waits for those who wait for the runs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        arguments, working_directory, environment, own = json.loads(line)
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child := os.fork():
            print(os.getpid(), child, flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            (Path(own) / "status").write_text(str(status))
            os._exit(0)
        os.chdir(working_directory)
        os.environ.clear()
        os.environ.update(environment)
        for descriptor, place in ((0, "/dev/null"), (1, f"{own}/out"), (2, f"{own}/err")):
            file = os.open(place, os.O_RDWR | os.O_CREAT)
            os.dup2(file, descriptor)
            os.close(file)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        try:
            main(arguments, prog_name="s3_media_upload")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
            # To take down all that was loaded would last longer than the run.
            os._exit(status)


if __name__ == "__main__":
    warnings.simplefilter("error")
    serve()

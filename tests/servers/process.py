"""Starts, watches and ends the processes of one test run."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from tests.servers import guard
from tests.servers.tls import Certificates

LOG_TAIL = 2000
"""How much of a failed server's log goes into the error: enough for a reason, short enough for a summary."""


class ServerFailed(Exception):
    """A server is installed and did not start; the message ends with the end of its log."""


@dataclass(frozen=True)
class ServerProcess:
    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    stop_signal: int

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:].strip()


class ServerRun:
    """The directory and the processes of one test run; leaving it as a context manager ends and removes them.

    Every process leads a session of its own, so that a Ctrl-C in the terminal reaches the test run alone, which
    still needs its servers while it cleans up. `guard` ends them should the test run die before it can.
    """

    def __init__(self) -> None:
        # Short, since Unix sockets below it may have paths of 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="s3-tests-"))
        # PostgreSQL and Swift run as users of their own and have to get through to their data.
        self.directory.chmod(0o755)
        (self.directory / "tmp").mkdir(mode=0o777)
        (self.directory / "tmp").chmod(0o1777)
        self._processes: list[ServerProcess] = []
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            text=True,
        )

    def __enter__(self) -> "ServerRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def certificates(self) -> Certificates:
        return Certificates.create(self.directory / "tls")

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a server's process sees: nothing of the caller's proxies, credentials and Python settings."""
        return {
            "PATH": _search_path(),
            "HOME": str(self.directory),
            "TMPDIR": str(self.directory / "tmp"),
            "LC_ALL": "C.UTF-8",
            **(extra or {}),
        }

    def call(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> str:
        """Runs a set-up command to its end and returns its standard output."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words,
                env=self.environment(env),
                cwd=cwd or self.directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=timeout,
                **_identity(user),
            )
        except subprocess.TimeoutExpired as error:
            raise ServerFailed(f"{words[0]} did not end within {timeout:.0f} s") from error
        if done.returncode:
            output = (done.stdout + done.stderr).decode(errors="replace")[-LOG_TAIL:].strip()
            raise ServerFailed(f"{' '.join(words)} ended with status {done.returncode}: {output}")
        return done.stdout.decode()

    def start(
        self,
        name: str,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: Path | None = None,
        stop_signal: int = signal.SIGTERM,
    ) -> ServerProcess:
        """Starts a process that stays, with its output in `<name>.log`."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [str(word) for word in command],
                env=self.environment(env),
                cwd=cwd or self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_identity(user),
            )
        process = ServerProcess(name, popen, log, stop_signal)
        self._processes.append(process)
        self._tell_guard("started", process)
        return process

    def stop(self, *processes: ServerProcess, grace: float = 10) -> None:
        """Ends processes together with all that they have forked; one that ended already is no error."""
        for process in processes:
            guard.send(process.popen.pid, process.stop_signal)
        deadline = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            guard.send(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
            self._tell_guard("stopped", process)
            self._processes.remove(process)

    def close(self) -> None:
        """Ends everything that still runs and removes the directory; may be called twice."""
        self.stop(*self._processes)
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            self._guard.stdin.close()
            self._guard.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _tell_guard(self, verb: str, process: ServerProcess) -> None:
        if self._guard.stdin is None:
            raise RuntimeError("the guard was started without a pipe")
        self._guard.stdin.write(f"{verb} {process.popen.pid} {process.stop_signal}\n")
        self._guard.stdin.flush()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody has, and that the kernel gives to nobody else for a minute.

    A short connection, closed from the port's own side, leaves the port in TIME_WAIT: neither another run that
    asks for a free port nor an outgoing connection gets it, while a server, which sets SO_REUSEADDR, may bind it.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()
            client.recv(1)
    return port


def wait_until(what: str, ready: Callable[[], bool], *processes: ServerProcess, timeout: float = 60) -> None:
    """Polls until `ready`; a process that ends meanwhile is an error at once, with its log."""
    deadline = time.monotonic() + timeout
    while not ready():
        for process in processes:
            status = process.popen.poll()
            if status is not None:
                raise ServerFailed(f"{process.name} ended with status {status}: {process.log_tail()}")
        if time.monotonic() > deadline:
            logs = "; ".join(f"{process.name}: {process.log_tail()}" for process in processes)
            raise ServerFailed(f"{what} was not ready after {timeout:.0f} s: {logs}")
        time.sleep(0.05)


def port_answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def http_answers(url: str, ca_file: str | None = None) -> bool:
    """Whether an HTTP server gives any answer at all that is not a server error."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if ca_file is not None:
        context = ssl.create_default_context(cafile=ca_file)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        with error:
            return error.code < 500
    except OSError:
        return False


def which(program: str) -> str | None:
    """As `shutil.which`; servers often lie where only root's path leads."""
    return shutil.which(program, path=_search_path())


def programs_missing(*programs: str, remedy: str) -> str | None:
    """Names the programs that the machine does not have, with what installs them; `None` when all are there."""
    absent = [program for program in programs if which(program) is None]
    return f"{', '.join(absent)} not found; {remedy}" if absent else None


def user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def own_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def give_to(user: str, directory: Path) -> None:
    """Makes a user the owner of a directory and of all below it."""
    entry = pwd.getpwnam(user)
    os.chown(directory, entry.pw_uid, entry.pw_gid)
    for parent, directories, files in os.walk(directory):
        for name in directories + files:
            os.chown(Path(parent, name), entry.pw_uid, entry.pw_gid)


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class _Identity(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _identity(user: str | None) -> _Identity:
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

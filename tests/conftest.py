"""Fixtures that give tests real servers, started when first asked for and shared by the whole run.

- `start_server("minio")` is the S3 server of that name (`tests.servers.FACES` lists the names).
- `s3_server` is the one that the test is parametrised with:
  `@pytest.mark.parametrize("s3_server", ["moto", "minio"], indirect=True)`.
- `make_bucket(server)` is the name of a new bucket there; `bucket` is one on `s3_server`.
- `postgres` is a PostgreSQL server and `make_database()` the name of a new database on it.
- `small_disk` is an empty directory on a disk of its own, of 16 MiB; without the right to mount one the test is skipped.

A test that needs a server from outside PyPI carries the marker `servers`. It comes by itself with the fixtures `postgres`
and `make_database`, and with a parameter `s3_server` or `server_name`; a test that calls `start_server` with such a
name states it. Where the server is not on the machine the test is skipped, and the end of the run says what was missing;
`S3_TESTS_REQUIRED=minio,ceph` makes it a failure.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.servers import FACES, SERVERS, PostgresServer, S3Server, ServerPool, ServerUnavailable

POOL = pytest.StashKey[ServerPool]()
REQUIRED = pytest.StashKey[frozenset[str]]()
CURRENT_ITEM = pytest.StashKey[pytest.Item]()

SERVER_PARAMETERS = ("s3_server", "server_name")
DATABASE_FIXTURES = {"postgres", "make_database"}


def pytest_configure(config: pytest.Config) -> None:
    names = os.environ.get("S3_TESTS_REQUIRED", "").replace(",", " ").split()
    unknown = [name for name in names if name not in SERVERS]
    if unknown:
        raise pytest.UsageError(f"S3_TESTS_REQUIRED: no server {unknown[0]!r}; there are {', '.join(SERVERS)}")
    config.stash[REQUIRED] = frozenset(names)
    config.stash[POOL] = ServerPool()


def pytest_unconfigure(config: pytest.Config) -> None:
    if POOL in config.stash:
        config.stash[POOL].close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _needs_real_server(item):
            item.add_marker(pytest.mark.servers)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[CURRENT_ITEM] = item


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    unavailable = config.stash[POOL].unavailable
    if unavailable:
        terminalreporter.section("servers")
        for error in unavailable.values():
            terminalreporter.write_line(f"not run, for lack of the server: {error.server.name} ({error.reason})")


@pytest.fixture(scope="session")
def start_server(pytestconfig: pytest.Config) -> Callable[[str], S3Server]:
    """Starts the S3 server of that name, or takes the one that already runs."""

    def start(face: str) -> S3Server:
        _prepare(pytestconfig, face)
        with _failure_or_skip(pytestconfig):
            return pytestconfig.stash[POOL].start_s3(face)

    return start


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest, start_server: Callable[[str], S3Server]) -> S3Server:
    """The S3 server whose name is this test's parameter."""
    face: str = request.param
    return start_server(face)


@pytest.fixture(scope="session")
def make_bucket() -> Callable[[S3Server], str]:
    """Creates a bucket that no other test has, and returns its name."""
    return servers.make_bucket


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """A new bucket on the test's server."""
    return servers.make_bucket(s3_server)


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> PostgresServer:
    _prepare(pytestconfig, "postgres")
    with _failure_or_skip(pytestconfig):
        return pytestconfig.stash[POOL].start_postgres()


@pytest.fixture(scope="session")
def make_database(postgres: PostgresServer) -> Callable[[], str]:
    """Creates a database that no other test has, and returns its name."""
    return lambda: servers.make_database(postgres)


def _needs_real_server(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    if DATABASE_FIXTURES & set(item.fixturenames):
        return True
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    faces = (parameters.get(name) for name in SERVER_PARAMETERS)
    return any(isinstance(face, str) and face in FACES and not FACES[face].embedded for face in faces)


def _prepare(config: pytest.Config, face: str) -> None:
    """Keeps a run without servers from starting one, on account of a test that does not say that it needs it."""
    if face not in FACES:
        raise LookupError(f"no server {face!r}; there are {', '.join(FACES)}")
    item = config.stash.get(CURRENT_ITEM, None)
    if not FACES[face].embedded and item is not None and item.get_closest_marker("servers") is None:
        pytest.fail(f"{item.nodeid} needs {face} and so the marker `servers`", pytrace=False)


@contextlib.contextmanager
def _failure_or_skip(config: pytest.Config) -> Iterator[None]:
    try:
        yield
        return
    except ServerUnavailable as caught:
        error = caught
    # Out here, so that pytest does not show the one exception as the cause of the other.
    if error.server.name in config.stash[REQUIRED]:
        pytest.fail(f"S3_TESTS_REQUIRED names a server that is not to be had: {error}", pytrace=False)
    pytest.skip(f"no server: {error}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine allows no mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)

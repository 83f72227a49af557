"""Starts real servers for a test run; `SERVERS` lists them.

A *server* is one set of programs, and what `S3_TESTS_REQUIRED` names. It may have several *faces*, which is what
a test asks for: "minio" is MinIO over http, "minio-https" the same programs over https.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.servers import (
    ceph_server,
    minio_server,
    ministack_server,
    moto_server,
    postgres_server,
    swift_server,
)
from tests.servers.postgres_server import PostgresServer, make_database
from tests.servers.process import ServerFailed, ServerProcess, ServerRun
from tests.servers.s3 import S3Server, make_bucket, make_client

__all__ = [
    "FACES",
    "SERVERS",
    "PostgresServer",
    "S3Server",
    "Server",
    "ServerFailed",
    "ServerPool",
    "ServerProcess",
    "ServerRun",
    "ServerUnavailable",
    "make_bucket",
    "make_client",
    "make_database",
]


@dataclass(frozen=True)
class Server:
    """`embedded`: comes from PyPI with the tests' own requirements, so it is always there.

    `missing` says what the machine lacks to run it, and what would bring that.
    """

    name: str
    faces: tuple[str, ...]
    embedded: bool
    missing: Callable[[], str | None]
    start: Callable[[ServerRun], Iterable[S3Server | PostgresServer]]


SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server("moto", ("moto",), True, moto_server.missing, moto_server.start),
        Server(
            "ministack",
            ("ministack", "ministack-https"),
            True,
            ministack_server.missing,
            ministack_server.start,
        ),
        Server("minio", ("minio", "minio-https"), False, minio_server.missing, minio_server.start),
        Server("ceph", ("ceph", "ceph-https"), False, ceph_server.missing, ceph_server.start),
        Server("swift", ("swift",), False, swift_server.missing, swift_server.start),
        Server("postgres", ("postgres",), False, postgres_server.missing, postgres_server.start),
    )
}

FACES: dict[str, Server] = {face: server for server in SERVERS.values() for face in server.faces}


class ServerUnavailable(Exception):
    """The server of this name is not on the machine, or did not start; `reason` says why and what helps."""

    def __init__(self, server: Server, reason: str) -> None:
        super().__init__(f"{server.name}: {reason}")
        self.server = server
        self.reason = reason


class ServerPool:
    """Starts each server when it is first asked for, and remembers it, or why it is not to be had."""

    def __init__(self) -> None:
        self._run: ServerRun | None = None
        self._started: dict[str, S3Server | PostgresServer] = {}
        self.unavailable: dict[str, ServerUnavailable] = {}

    def start(self, face: str) -> S3Server | PostgresServer:
        if face in self._started:
            return self._started[face]
        server = FACES[face]
        if server.name in self.unavailable:
            raise self.unavailable[server.name]
        try:
            reason = server.missing()
            if reason is not None:
                raise ServerUnavailable(server, reason)
            if self._run is None:
                self._run = ServerRun()
            try:
                started = server.start(self._run)
            except ServerFailed as error:
                raise ServerUnavailable(server, f"did not start: {error}") from error
        except ServerUnavailable as error:
            self.unavailable[server.name] = error
            raise
        self._started.update((each.name, each) for each in started)
        return self._started[face]

    def start_s3(self, face: str) -> S3Server:
        server = self.start(face)
        if not isinstance(server, S3Server):
            raise TypeError(f"{face} is no S3 server")
        return server

    def start_postgres(self) -> PostgresServer:
        server = self.start("postgres")
        if not isinstance(server, PostgresServer):
            raise TypeError("the face postgres is no PostgreSQL server")
        return server

    def close(self) -> None:
        if self._run is not None:
            self._run.close()

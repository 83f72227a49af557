"""PostgreSQL, for Synapse's database: no fsync, no passwords, on loopback."""

import os
import signal
import uuid
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psycopg2

from tests.servers.process import (
    ServerRun,
    free_port,
    give_to,
    port_answers,
    user_exists,
    wait_until,
)

REMEDY = "apt-get install postgresql"


@dataclass(frozen=True)
class PostgresServer:
    name: str
    host: str
    port: int
    user: str

    def url(self, database: str) -> str:
        return f"postgresql://{self.user}@{self.host}:{self.port}/{database}"


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`; Debian keeps one for each version and has none of them on the path."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: float(folder.parent.name),
        reverse=True,
    )
    for folder in folders:
        if os.access(folder / "initdb", os.X_OK) and os.access(folder / "postgres", os.X_OK):
            return folder
    return None


def missing() -> str | None:
    if programs() is None:
        return f"initdb, postgres not found; {REMEDY}"
    if os.geteuid() == 0 and not user_exists("postgres"):
        return f"no user postgres, and PostgreSQL refuses to run as root; {REMEDY}"
    return None


def start(run: ServerRun) -> tuple[PostgresServer, ...]:
    folder = programs()
    if folder is None:
        raise FileNotFoundError("postgres")
    user = "postgres" if os.geteuid() == 0 else None
    home = run.directory / "postgres"
    home.mkdir()
    if user is not None:
        give_to(user, home)
    data = home / "data"
    run.call(
        *(folder / "initdb", "-D", data, "-U", "postgres", "-A", "trust"),
        *("-E", "UTF8", "--no-locale", "-N"),
        user=user,
        cwd=home,
    )
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
    }
    process = run.start(
        "postgres",
        *(folder / "postgres", "-D", data),
        *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
        user=user,
        cwd=home,
        # "Fast" shutdown. At SIGTERM it would wait for its clients to go.
        stop_signal=signal.SIGINT,
    )
    server = PostgresServer("postgres", "127.0.0.1", port, "postgres")
    wait_until("postgres", lambda: port_answers(port) and _accepts(server), process)
    return (server,)


def make_database(server: PostgresServer) -> str:
    """Creates a database as Synapse wants it and returns its name."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    with closing(psycopg2.connect(server.url("postgres"))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    return name


def _accepts(server: PostgresServer) -> bool:
    try:
        psycopg2.connect(server.url("postgres")).close()
    except psycopg2.OperationalError:
        return False  # "the database system is starting up"
    return True

"""Homeservers with a bucket: `open_site` and `open_lasting_site` start any, `site` is one that many tests share.

A shared site stands for a backend: "minio" and "boto3" run against MinIO with PostgreSQL,
"minio-quick" and "boto3-quick" against moto with SQLite, which is always there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from tests.provider.fault_proxy import FaultProxy
from tests.provider.homeserver import Homeserver
from tests.provider.site import Site, copy_sqlite
from tests.servers import PostgresServer, S3Server, make_bucket, make_client

with warnings.catch_warnings():
    # Twisted and Synapse warn of themselves while they are imported; later imports are silent.
    warnings.simplefilter("ignore")
    import synapse.module_api  # noqa: F401

QUICK = ["minio-quick", "boto3-quick"]
REAL = [pytest.param("minio", marks=pytest.mark.servers), pytest.param("boto3", marks=pytest.mark.servers)]


class OpenSite:
    """Makes sites, and stops them when the `stack` is left."""

    def __init__(
        self,
        stack: ExitStack,
        request: pytest.FixtureRequest,
        start_server: Callable[[str], S3Server],
        directories: pytest.TempPathFactory,
    ) -> None:
        self._stack = stack
        self._request = request
        self._start_server = start_server
        self._directories = directories

    def __call__(
        self,
        backend: str,
        face: str = "moto",
        database: str = "sqlite",
        *,
        start: bool = True,
        proxy: bool = True,
        storage: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Site:
        """A homeserver with a bucket on the S3 server `face`, started unless told otherwise.

        More of the provider's `config` block goes into `storage`; `options` are `Homeserver`'s.
        """
        server = self._start_server(face)
        directory = self._directories.mktemp(f"{backend}-{face}")
        template, block = self._copy_database(database, directory)
        between = FaultProxy(server.endpoint) if proxy else None
        bucket = make_bucket(server)
        values = {
            "bucket": bucket,
            "backend": backend,
            "endpoint_url": between.url if between else server.endpoint,
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "region_name": server.region,
            "prefix": "media",
            "verify": server.verify,
            # What it does in the background would be seen among the requests of a test.
            "auto_restore": False,
            **(storage or {}),
        }
        homeserver = Homeserver(directory, values, database=block, **options)
        homeserver.token = template.token
        site = Site(homeserver, server, bucket, make_client(server), between)
        self._stack.callback(site.close)
        if start:
            homeserver.start()
        return site

    def _copy_database(self, kind: str, directory: Path) -> tuple[Template, Mapping[str, Any]]:
        template: Template = self._request.getfixturevalue(f"{kind}_template")
        if kind == "sqlite":
            return template, copy_sqlite(Path(template.name), directory)
        postgres: PostgresServer = self._request.getfixturevalue("postgres")
        return template, _copy_postgres(postgres, template.name, f"copy_{directory.name}".replace("-", "_"))


@dataclass(frozen=True)
class Template:
    """A database with Synapse's tables and one user, to be copied: making it takes longer than the rest of a start."""

    name: str
    token: str


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    directory = tmp_path_factory.mktemp("sqlite-template")
    return Template(str(directory / "homeserver.db"), _prepare_database(directory, None))


@pytest.fixture(scope="session")
def postgres_template(
    postgres: PostgresServer, make_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Template:
    name = make_database()
    token = _prepare_database(tmp_path_factory.mktemp("postgres-template"), _postgres_block(postgres, name))
    return Template(name, token)


@pytest.fixture
def open_site(
    request: pytest.FixtureRequest,
    start_server: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OpenSite]:
    """Makes sites for one test."""
    with ExitStack() as stack:
        yield OpenSite(stack, request, start_server, tmp_path_factory)


@pytest.fixture(scope="module")
def open_lasting_site(
    request: pytest.FixtureRequest,
    start_server: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OpenSite]:
    """Makes sites that last until the end of the module."""
    with ExitStack() as stack:
        yield OpenSite(stack, request, start_server, tmp_path_factory)


@pytest.fixture(scope="session")
def shared_site(
    request: pytest.FixtureRequest,
    start_server: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    backend, _, quick = request.param.partition("-")
    servers = ("moto", "sqlite") if quick else ("minio", "postgres")
    with ExitStack() as stack:
        yield OpenSite(stack, request, start_server, tmp_path_factory)(backend, *servers)


@pytest.fixture
def site(shared_site: Site) -> Site:
    """The site that this test's parameter names, with all that came before forgotten."""
    shared_site.proxy.wait_until_idle()
    shared_site.proxy.forget()
    shared_site.mark_log()
    return shared_site


def _prepare_database(directory: Path, database: Mapping[str, Any] | None) -> str:
    unused = {
        "bucket": "unused",
        "endpoint_url": "http://127.0.0.1:9",
        "access_key_id": "unused",
        "secret_access_key": "unused",
        "check_on_startup": "off",
    }
    with Homeserver(directory, unused, database=database) as homeserver:
        return homeserver.token


def _postgres_block(server: PostgresServer, name: str) -> Mapping[str, Any]:
    arguments = {"host": server.host, "port": server.port, "user": server.user, "dbname": name}
    return {"name": "psycopg2", "args": {**arguments, "cp_min": 1, "cp_max": 5}}


def _copy_postgres(server: PostgresServer, template: str, copy: str) -> Mapping[str, Any]:
    with closing(psycopg2.connect(server.url("postgres"))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {copy} TEMPLATE {template}")
    return _postgres_block(server, copy)

"""What Synapse's database knows of a file, asked before the file may stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from storage_provider.database import DatabaseArguments
from storage_provider.known_media import KnownMedia, database_arguments
from storage_provider.proofs import Digest
from storage_provider.synapse_db import SynapseDb
from tests.jobs.conftest import ENGINES, ENGINES_TO_ALTER, SynapseDatabase
from tests.servers.process import free_port

SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
OTHER_SHA256 = "0" * 64
DIGEST = Digest(7, SHA256)

LOCAL = "local_content/ab/cd/ef"
LOCAL_THUMBNAIL = "local_thumbnails/ab/cd/ef/32-32-image-png-crop"
REMOTE = "remote_content/a.org/gh/ij/kl"
REMOTE_THUMBNAIL = "remote_thumbnail/a.org/gh/ij/kl/32-32-image-png-crop"
LEGACY_THUMBNAIL = "remote_thumbnail/a.org/gh/ij/kl/32-32-image-png"

on_each_database = pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)
of_each_kind = pytest.mark.parametrize("path", [LOCAL, REMOTE])


@pytest.fixture
def accessed() -> list[str]:
    """The media of other servers that was accessed just now."""
    return []


@pytest.fixture
def known(synapse_database: SynapseDatabase, accessed: list[str]) -> Iterator[KnownMedia]:
    with closing(
        KnownMedia(synapse_database.arguments, lambda: [("a.org", media_id) for media_id in accessed])
    ) as known:
        yield known


def add(database: SynapseDatabase, path: str, **values: Any) -> None:
    values = {"media_length": DIGEST.length, "sha256": SHA256} | values
    if path.startswith("local"):
        database.add_local("abcdef", **values)
    else:
        database.add_remote("a.org", "its id", "ghijkl", **values)


def is_known(known: KnownMedia, path: str, digest: Digest) -> bool:
    return known.known_of({path: digest}) == {path}


@on_each_database
class TestAFile:
    @of_each_kind
    def test_is_known_when_length_and_sha256_are_those_of_its_row(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        path: str,
    ) -> None:
        add(synapse_database, path)
        assert is_known(known, path, DIGEST)
        assert not is_known(known, path, Digest(DIGEST.length + 1, SHA256))
        assert not is_known(known, path, Digest(DIGEST.length, OTHER_SHA256))

    @of_each_kind
    def test_whose_row_tells_no_sha256_is_known_by_its_length(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        path: str,
    ) -> None:
        add(synapse_database, path, sha256=None)
        assert is_known(known, path, DIGEST)
        assert not is_known(known, path, Digest(DIGEST.length + 1, SHA256))

    @of_each_kind
    def test_is_refuted_when_its_row_tells_something_else(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        path: str,
    ) -> None:
        longer, other = Digest(DIGEST.length + 1, SHA256), Digest(DIGEST.length, OTHER_SHA256)
        thumbnail = LOCAL_THUMBNAIL if path == LOCAL else REMOTE_THUMBNAIL
        # Of what the database does not tell anything is believed.
        assert known.refuted_of({path: longer}) == set()
        add(synapse_database, path)
        assert known.refuted_of({path: DIGEST, thumbnail: longer}) == set()
        assert known.refuted_of({path: longer, "no path": longer}) == {path}
        assert known.refuted_of({path: other}) == {path}
        known.close()
        assert known.refuted_of({path: longer}) == set()

    @of_each_kind
    def test_is_asked_for_anew_each_time(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        path: str,
    ) -> None:
        assert not is_known(known, path, DIGEST)
        add(synapse_database, path)
        assert is_known(known, path, DIGEST)
        table = "local_media_repository" if path == LOCAL else "remote_media_cache"
        synapse_database.execute(f"UPDATE {table} SET quarantined_by = '@admin:test'")
        assert not is_known(known, path, DIGEST)
        synapse_database.execute(f"UPDATE {table} SET quarantined_by = NULL")
        assert is_known(known, path, DIGEST)
        synapse_database.execute(f"DELETE FROM {table}")
        assert not is_known(known, path, DIGEST)

    def test_of_another_server_is_found_with_and_without_the_id_that_was_accessed(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        accessed: list[str],
    ) -> None:
        add(synapse_database, REMOTE)
        synapse_database.add_remote("a.org", "another id", "another file", media_length=1)
        accessed += ["another id"]
        assert is_known(known, REMOTE, DIGEST)
        accessed += ["its id"]
        assert is_known(known, REMOTE, DIGEST)

    def test_of_another_server_is_looked_for_again_once_synapse_has_noted_its_id(
        self,
        synapse_database: SynapseDatabase,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """For a thumbnail it does so after it has answered; to go through all media of that server takes long."""
        add(synapse_database, REMOTE)
        noted: list[list[tuple[str, str]]] = [[], [("a.org", "its id")]]
        monkeypatch.setattr(SynapseDb, "_rows_with", pytest.fail)
        with closing(KnownMedia(synapse_database.arguments, lambda: noted.pop(0))) as known:
            assert is_known(known, REMOTE, DIGEST)

    def test_that_was_replaced_by_another_download_is_not_known(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        accessed: list[str],
    ) -> None:
        accessed += ["its id"]
        synapse_database.add_remote("a.org", "its id", "mnopqr", media_length=DIGEST.length, sha256=SHA256)
        assert not is_known(known, REMOTE, DIGEST)

    def test_is_known_for_itself_when_many_are_asked_for(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        accessed: list[str],
    ) -> None:
        add(synapse_database, LOCAL)
        add(synapse_database, REMOTE)
        for number in range(10):
            synapse_database.add_remote("b.org", f"id{number}", f"ghijk{number}", media_length=number)
        accessed += ["its id"]
        unknown = {"remote_content/a.org/gh/ij/k1": DIGEST, "local_content/xy/xy/xy": DIGEST}
        others = {f"remote_content/b.org/gh/ij/k{number}": Digest(number, OTHER_SHA256) for number in range(5)}
        wrong = {f"remote_content/b.org/gh/ij/k{number}": DIGEST for number in (5, 6)}
        fitting = {LOCAL: DIGEST, REMOTE: DIGEST, **others}
        assert known.known_of({**unknown, **fitting, **wrong}) == set(fitting)

    @pytest.mark.parametrize("origin", ["", "a.org"])
    def test_that_is_a_thumbnail_is_known_by_its_length(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
        origin: str,
    ) -> None:
        content, thumbnail = (REMOTE, REMOTE_THUMBNAIL) if origin else (LOCAL, LOCAL_THUMBNAIL)
        media_id = "its id" if origin else "abcdef"
        add(synapse_database, content, media_length=1000)
        assert not is_known(known, thumbnail, DIGEST)
        synapse_database.add_thumbnail(origin, media_id, 32, 32, "image/png", "crop", DIGEST.length)
        assert is_known(known, thumbnail, DIGEST)
        assert is_known(known, thumbnail, Digest(DIGEST.length, OTHER_SHA256))
        assert not is_known(known, thumbnail, Digest(DIGEST.length + 1, SHA256))
        assert not is_known(known, thumbnail.replace("32-32", "96-96"), DIGEST)

    def test_that_is_a_thumbnail_of_old_is_known_without_its_method(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
    ) -> None:
        add(synapse_database, REMOTE)
        synapse_database.add_thumbnail("a.org", "its id", 32, 32, "image/png", "crop", DIGEST.length)
        assert is_known(known, LEGACY_THUMBNAIL, DIGEST)

    @pytest.mark.parametrize(
        "path",
        ["", "url_cache/2026-01-01/ab", "local_content/../../etc", "local_content/ab/cd/ef/gh", "\0", REMOTE + "\0"],
    )
    def test_with_a_path_that_is_not_synapses_is_not_known(self, known: KnownMedia, path: str) -> None:
        assert not is_known(known, path, DIGEST)

    def test_can_be_asked_for_by_many_threads_at_once(
        self,
        synapse_database: SynapseDatabase,
        known: KnownMedia,
    ) -> None:
        add(synapse_database, LOCAL)
        answers: list[bool] = []
        threads = [
            threading.Thread(target=lambda: answers.extend(is_known(known, LOCAL, DIGEST) for _ in range(20)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [True] * 160


@pytest.mark.parametrize("synapse_database", ENGINES_TO_ALTER[1:], indirect=True)
def test_a_connection_that_the_database_has_ended_is_made_anew(
    synapse_database: SynapseDatabase,
    known: KnownMedia,
) -> None:
    add(synapse_database, LOCAL)
    assert is_known(known, LOCAL, DIGEST)
    synapse_database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    is_known(known, LOCAL, DIGEST)
    assert is_known(known, LOCAL, DIGEST)


def test_what_a_database_that_is_away_knows_is_nothing() -> None:
    away = DatabaseArguments("psycopg2", {"host": "127.0.0.1", "port": free_port(), "user": "nobody", "dbname": "none"})
    with closing(KnownMedia(away, lambda: ())) as known:
        assert not is_known(known, LOCAL, DIGEST)


def homeserver(*databases: tuple[str, dict[str, Any], list[str]]) -> Any:
    configured = [
        SimpleNamespace(config={"name": name, "args": arguments}, databases=names)
        for name, arguments, names in databases
    ]
    return SimpleNamespace(config=SimpleNamespace(database=SimpleNamespace(databases=configured)))


def test_the_database_is_the_one_with_the_main_tables() -> None:
    hs = homeserver(("psycopg2", {"dbname": "state"}, ["state"]), ("psycopg2", {"dbname": "synapse"}, ["main"]))
    assert database_arguments(hs) == DatabaseArguments("psycopg2", {"dbname": "synapse"})
    hs = homeserver(("sqlite3", {"database": "homeserver.db"}, ["main", "state"]))
    assert database_arguments(hs) == DatabaseArguments("sqlite3", {"database": "homeserver.db"})
    with pytest.raises(RuntimeError, match="no database"):
        database_arguments(cast(Any, homeserver()))


def test_the_database_may_have_no_arguments() -> None:
    hs = homeserver(("psycopg2", {}, ["main"]))
    del hs.config.database.databases[0].config["args"]
    assert database_arguments(hs) == DatabaseArguments("psycopg2", {})

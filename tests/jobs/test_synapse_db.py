"""Synapse's database, with Synapse's schema: one test for each promise of `storage_provider.synapse_db`."""

from __future__ import annotations

import itertools
import random
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from storage_provider import synapse_db
from storage_provider.cache_db import KINDS, CachedMedia
from storage_provider.database import DatabaseArguments
from storage_provider.errors import SynapseDbError
from storage_provider.media_paths import Media
from storage_provider.synapse_db import FileRow, MediaFacts, SynapseDb, connect
from tests.jobs.conftest import ENGINES, ENGINES_TO_ALTER, TABLES, SynapseDatabase
from tests.servers import PostgresServer
from tests.servers.process import free_port

with warnings.catch_warnings():
    # Synapse and Twisted warn of themselves while they are imported.
    warnings.simplefilter("ignore")
    from synapse.media.filepath import MediaFilePaths

ROOT = Path(__file__).parents[2]
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

on_each_database = pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)
on_each_database_to_alter = pytest.mark.parametrize("synapse_database", ENGINES_TO_ALTER, indirect=True)
on_sqlite = pytest.mark.parametrize("synapse_database", ENGINES[:1], indirect=True)
on_postgres = pytest.mark.parametrize("synapse_database", ENGINES[1:], indirect=True)
on_postgres_to_alter = pytest.mark.parametrize("synapse_database", ENGINES_TO_ALTER[1:], indirect=True)


@pytest.fixture
def database(synapse_database: SynapseDatabase) -> Iterator[SynapseDb]:
    with connect(synapse_database.arguments) as database:
        yield database


def local(media_id: str) -> CachedMedia:
    return CachedMedia("", media_id, media_id, "local")


def remote(origin: str, media_id: str, filesystem_id: str) -> CachedMedia:
    return CachedMedia(origin, media_id, filesystem_id, "remote")


def add_many(synapse_database: SynapseDatabase, number: int) -> None:
    """That many rows, half of them local, in no order and no two alike."""
    numbers = (
        f"generate_series(1, {number // 2}) AS n(x)"
        if synapse_database.is_postgres
        else f"(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < {number // 2}) SELECT x FROM n)"
    )
    identifier = "'abcdefghijklmnopqrstuvwxyz' || CAST((x * 7919) & 1048575 AS TEXT)"
    synapse_database.execute(
        f"""
        INSERT INTO remote_media_cache (media_origin, media_id, filesystem_id, media_length, created_ts)
        SELECT 'media.example.org', {identifier}, {identifier}, 1, x FROM {numbers}
        """
    )
    synapse_database.execute(
        f"INSERT INTO local_media_repository (media_id, media_length, created_ts) SELECT {identifier}, 1, x FROM {numbers}"
    )


def add_many_thumbnails(synapse_database: SynapseDatabase) -> None:
    """One of each media."""
    of_each = "thumbnail_width, thumbnail_height, thumbnail_type, thumbnail_method, thumbnail_length"
    for table, columns in (("local_media_repository", "media_id"), ("remote_media_cache", "media_origin, media_id")):
        synapse_database.execute(
            f"""
            INSERT INTO {table}_thumbnails ({columns}, {of_each})
            SELECT {columns}, 32, 32, 'image/png', 'crop', 1 FROM {table}
            """
        )


@on_each_database
class TestUnusedMedia:
    def test_is_what_was_last_used_before_the_moment(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("never used", created_ts=999)
        synapse_database.add_local("never used, new", created_ts=1000)
        synapse_database.add_local("used long ago", created_ts=1, last_access_ts=999)
        synapse_database.add_local("used", created_ts=1, last_access_ts=1000)
        synapse_database.add_remote("a.org", "old", "old file", created_ts=999)
        synapse_database.add_remote("a.org", "used", "used file", created_ts=1, last_access_ts=2000)
        found = list(database.unused_before(1000))
        assert sorted(found[:2], key=str) == [local("never used"), local("used long ago")]
        assert found[2:] == [remote("a.org", "old", "old file")]

    def test_can_be_had_of_one_kind(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef")
        synapse_database.add_remote("a.org", "id", "ghijkl")
        assert list(database.unused_before(9999, "local")) == [local("abcdef")]
        assert list(database.unused_before(9999, "remote")) == [remote("a.org", "id", "ghijkl")]

    def test_of_url_previews_is_left_out_and_quarantined_is_not(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("preview", url_cache="https://example.org")
        synapse_database.add_local("quarantined", quarantined_by="@admin:test")
        synapse_database.add_remote("a.org", "quarantined", "its file", quarantined_by="@admin:test")
        assert list(database.unused_before(9999)) == [
            local("quarantined"),
            remote("a.org", "quarantined", "its file"),
        ]

    def test_without_a_file_is_left_out(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("awaited", media_length=None)
        synapse_database.add_remote("a.org", "no file", None)
        assert list(database.unused_before(9999)) == []

    def test_is_asked_anew_for_each_iterator(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        assert list(database.unused_before(9999)) == []
        synapse_database.add_local("abcdef")
        assert list(database.unused_before(9999)) == [local("abcdef")]


@on_each_database
class TestQuestions:
    def test_present_is_what_has_a_row_with_that_file(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("abcdef")
        synapse_database.add_remote("a.org", "id", "ghijkl")
        synapse_database.add_remote("b.org", "id", "another file")
        asked = [
            *[local("abcdef"), local("gone"), remote("a.org", "id", "ghijkl"), remote("b.org", "id", "ghijkl")],
            *[remote("c.org", "id", "ghijkl"), remote("a.org", "abcdef", "abcdef"), local("with\0nul")],
        ]
        assert database.present(asked) == {("", "abcdef"), ("a.org", "id")}

    def test_still_unused_is_what_was_not_used_meanwhile(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        rows = [local("abcdef"), local("created"), remote("a.org", "id", "ghijkl"), remote("b.org", "id", "mnopqr")]
        synapse_database.add_local("abcdef", created_ts=1)
        synapse_database.add_local("created", created_ts=1000)
        synapse_database.add_remote("a.org", "id", "ghijkl", created_ts=1)
        synapse_database.add_remote("b.org", "id", "mnopqr", created_ts=1)
        assert database.still_unused(rows, 1000) == {("", "abcdef"), ("a.org", "id"), ("b.org", "id")}
        synapse_database.execute("UPDATE local_media_repository SET last_access_ts = 1000")
        synapse_database.execute("UPDATE remote_media_cache SET last_access_ts = 1000 WHERE media_origin = 'a.org'")
        assert database.still_unused(rows, 1000) == {("b.org", "id")}
        synapse_database.execute("UPDATE remote_media_cache SET filesystem_id = 'new' WHERE media_origin = 'b.org'")
        assert database.still_unused(rows, 1000) == set()

    def test_see_the_present_while_an_iterator_shows_the_past(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        for number in range(5):
            synapse_database.add_local(f"abcdef{number}")
        rows = database.selected_media()
        first = next(rows).row
        synapse_database.execute("DELETE FROM local_media_repository")
        assert database.present([first, local("abcdef4")]) == set()
        assert len(list(rows)) == 4

    def test_may_be_about_any_number_of_rows(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        asked = [local(f"abcdef{number}") for number in range(1500)]
        asked += [remote("a.org", f"id{number}", f"file{number}") for number in range(1500)]
        synapse_database.insert(
            "local_media_repository",
            [{"media_id": row.media_id, "media_length": 1, "created_ts": 1} for row in asked[:1500:2]],
        )
        synapse_database.insert(
            "remote_media_cache",
            [
                {
                    "media_origin": row.origin,
                    "media_id": row.media_id,
                    "filesystem_id": row.filesystem_id,
                    "media_length": 1,
                    "created_ts": 1,
                }
                for row in asked[1500::2]
            ],
        )
        expected = {(row.origin, row.media_id) for row in asked[::2]}
        assert database.present(asked) == expected
        assert database.still_unused(asked, 1000) == expected
        assert database.present([]) == set()

    def test_are_answered_without_reading_the_whole_table(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_many(synapse_database, 20_000)
        if synapse_database.is_postgres:
            synapse_database.execute("ANALYZE remote_media_cache")
            synapse_database.execute("ANALYZE local_media_repository")
        asked: list[tuple[str, tuple[Any, ...]]] = []
        query = database._database.query

        def noted(sql: str, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
            asked.append((sql, arguments))
            return query(sql, arguments)

        monkeypatch.setattr(database._database, "query", noted)
        # So few that PostgreSQL too finds the index cheaper than the table.
        rows = [local(f"abcdef{number}") for number in range(10)]
        rows += [remote("media.example.org", f"id{number}", f"file{number}") for number in range(10)]
        database.present(rows)
        database.still_unused(rows, 1000)
        database.facts(rows[0])
        database.facts(next(database.unused_before(1 << 50, "remote")))
        assert len(asked) == 8
        for sql, arguments in asked:
            explain = "EXPLAIN" if synapse_database.is_postgres else "EXPLAIN QUERY PLAN"
            plan = "\n".join(str(step[-1]) for step in query(f"{explain} {sql}", arguments))
            assert "SCAN m" not in plan
            assert "Seq Scan on remote_media_cache m" not in plan
            assert "Seq Scan on local_media_repository m" not in plan

    def test_may_hold_anything(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        nasty = "'; DROP TABLE local_media_repository; -- %s ? \\ \" é 😀"
        synapse_database.add_local(nasty)
        synapse_database.add_remote(nasty, nasty, nasty)
        rows = [local(nasty), remote(nasty, nasty, nasty)]
        assert list(database.unused_before(9999)) == rows
        assert database.present(rows) == {("", nasty), (nasty, nasty)}
        assert database.facts(rows[1]) == MediaFacts(1, None, False, {})

    def test_wanted_is_what_is_not_quarantined(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef")
        synapse_database.add_local("bad", quarantined_by="@admin:test")
        synapse_database.add_remote("a.org", "id", "ghijkl")
        synapse_database.add_remote("a.org", "bad", "mnopqr", quarantined_by="@admin:test")
        asked = [local("abcdef"), local("bad"), local("gone")]
        asked += [remote("a.org", "id", "ghijkl"), remote("a.org", "bad", "mnopqr"), remote("a.org", "id", "another")]
        assert database.wanted(asked[:5]) == {("", "abcdef"), ("a.org", "id")}
        assert database.wanted(asked[5:]) == set()

    def test_evictable_is_what_is_unused_and_not_quarantined(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("unused", created_ts=999)
        synapse_database.add_local("never", created_ts=None)
        synapse_database.add_local("used", created_ts=1, last_access_ts=1000)
        synapse_database.add_local("bad", created_ts=999, quarantined_by="@admin:test")
        asked = [local(name) for name in ("unused", "never", "used", "bad", "gone")]
        assert database.evictable(asked, 1000) == {("", "unused"), ("", "never")}


@on_each_database
class TestFacts:
    def test_are_the_rows(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef", media_length=17, sha256=SHA256)
        synapse_database.add_remote("a.org", "id", "ghijkl", media_length=18, quarantined_by="@admin:test")
        assert database.facts(local("abcdef")) == MediaFacts(17, SHA256, False, {})
        assert database.facts(remote("a.org", "id", "ghijkl")) == MediaFacts(18, None, True, {})

    def test_of_an_awaited_upload_have_no_length(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef", media_length=None)
        assert database.facts(local("abcdef")) == MediaFacts(None, None, False, {})

    def test_are_none_where_the_row_is_gone_or_has_another_file(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_remote("a.org", "id", "ghijkl")
        for row in [
            local("abcdef"),
            remote("a.org", "id", "another"),
            remote("b.org", "id", "ghijkl"),
            local("\0abcde"),
        ]:
            assert database.facts(row) is None

    def test_name_thumbnails_as_synapse_names_their_files(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse = MediaFilePaths("/store")
        synapse_database.add_local("abcdef")
        synapse_database.add_remote("a.org", "id", "ghijkl")
        kinds = [(32, 32, "image/png", "crop"), (640, 480, "image/jpeg", "scale"), (1, 1, "image/webp", "scale")]
        names: dict[str, dict[str, int]] = {"": {}, "a.org": {}}
        for length, kind in enumerate(kinds, 100):
            synapse_database.add_thumbnail("", "abcdef", *kind, length)
            synapse_database.add_thumbnail("a.org", "id", *kind, length)
            names[""][Path(synapse.local_media_thumbnail_rel("abcdef", *kind)).name] = length
            names["a.org"][Path(synapse.remote_media_thumbnail_rel("a.org", "ghijkl", *kind)).name] = length
            names["a.org"][Path(synapse.remote_media_thumbnail_rel_legacy("a.org", "ghijkl", *kind[:3])).name] = length
        assert database.facts(local("abcdef")) == MediaFacts(1, None, False, names[""])
        assert database.facts(remote("a.org", "id", "ghijkl")) == MediaFacts(1, None, False, names["a.org"])

    def test_name_no_old_thumbnail_that_could_be_either_of_two(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_remote("a.org", "id", "ghijkl")
        synapse_database.add_thumbnail("a.org", "id", 32, 32, "image/png", "crop", 1)
        synapse_database.add_thumbnail("a.org", "id", 32, 32, "image/png", "scale", 2)
        facts = database.facts(remote("a.org", "id", "ghijkl"))
        assert facts is not None
        assert facts.thumbnail_lengths == {"32-32-image-png-crop": 1, "32-32-image-png-scale": 2}


@on_each_database
class TestFactsOfAFile:
    def test_are_those_of_the_media_that_has_it(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef", media_length=17)
        for number in range(3):
            synapse_database.add_remote("a.org", f"id{number}", f"ghijk{number}", media_length=number)
            synapse_database.add_remote("b.org", f"id{number}", f"ghijk{number}", media_length=number + 10)
        local, remote = Media("", "abcdef"), Media("a.org", "ghijk1")
        facts = {local: MediaFacts(17, None, False, {}), remote: MediaFacts(1, None, False, {})}
        for likely in ([], ["id1"], ["id0", "id2", "another", "\0"]):
            pairs = [("a.org", media_id) for media_id in likely]
            assert database.facts_of_files([local, remote], [pairs]) == facts
            assert database.facts_of_files([local, remote], [[], pairs]) == facts
            assert database.facts_of_files([local]) == {local: facts[local]}

    def test_are_none_where_no_row_has_it(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_remote("a.org", "id", "ghijkl")
        unknown = [Media("", "ghijkl"), Media("a.org", "another"), Media("b.org", "ghijkl"), Media("a.org", "\0bcdef")]
        likely = [("a.org", "id"), ("a.org", "ghijkl"), ("b.org", "id")]
        assert database.facts_of_files(unknown, [likely]) == {}


@on_each_database
class TestFiles:
    """Contents and thumbnails, one row each; `tests/jobs/test_reconcile.py` tries their order."""

    def test_come_with_what_is_known_of_them(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef", media_length=5, sha256=SHA256, created_ts=7, last_access_ts=9)
        synapse_database.add_thumbnail("", "abcdef", 32, 32, "image/png", "crop", 3)
        synapse_database.add_remote("a.org", "id", "ghijkl", created_ts=7, quarantined_by="@admin:test")
        synapse_database.add_thumbnail("a.org", "id", 32, 32, "image/png", "scale", 4)
        assert list(database.contents("local")) == [("", "abcdef", "abcdef", None, 5, SHA256, 9, False)]
        assert list(database.contents("remote")) == [("a.org", "id", "ghijkl", None, 1, None, 7, True)]
        crop, scale = "32-32-image-png-crop", "32-32-image-png-scale"
        assert list(database.thumbnails("local")) == [("", "abcdef", "abcdef", crop, 3, None, 9, False)]
        assert list(database.thumbnails("remote")) == [("a.org", "id", "ghijkl", scale, 4, None, 7, True)]
        assert [row.row for row in database.contents("remote")] == [remote("a.org", "id", "ghijkl")]

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ({}, ["never", "new", "old"]),
            ({"used_since": 1000}, ["new"]),
            ({"used_before": 1000}, ["never", "old"]),
            ({"used_since": 999, "used_before": 1000}, ["old"]),
            ({"used_since": 1001}, []),
        ],
    )
    def test_may_be_those_of_a_time(
        self, synapse_database: SynapseDatabase, database: SynapseDb, times: dict[str, int], expected: list[str]
    ) -> None:
        for name, used in (("old", 999), ("new", 1000), ("never", None)):
            synapse_database.add_local(name, created_ts=used, last_access_ts=None)
            synapse_database.add_thumbnail("", name, 32, 32, "image/png", "crop", 1)
            synapse_database.add_remote("a.org", f"id {name}", name, created_ts=used)
        for rows in (database.contents("local", **times), database.contents("remote", **times)):
            assert [row.filesystem_id for row in rows] == expected
        assert [row.media_id for row in database.thumbnails("local", **times)] == expected

    def test_leave_out_what_has_none(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("awaited", media_length=None)
        synapse_database.add_local("preview", url_cache="https://example.org")
        synapse_database.add_remote("a.org", "no file", None)
        for media_id in ("awaited", "preview"):
            synapse_database.add_thumbnail("", media_id, 32, 32, "image/png", "crop", 1)
        assert [*database.contents("local"), *database.contents("remote"), *database.thumbnails("local")] == []

    def test_are_the_same_however_often_they_are_read_anew(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill_with_thumbnails(synapse_database)

        def files() -> list[FileRow]:
            return [row for kind in KINDS for rows in (database.contents, database.thumbnails) for row in rows(kind)]

        at_once = files()
        monkeypatch.setattr(synapse_db, "_LONGEST_TRANSACTION_SECONDS", 0)
        monkeypatch.setattr(synapse_db, "_SORTINGS", 0)
        assert files() == at_once

    def test_are_not_sorted_for_every_row_where_that_takes_longer_than_a_transaction_may_last(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = fill(synapse_database)
        now = [0.0]
        monkeypatch.setattr("storage_provider.synapse_db.time.monotonic", lambda: now[0])
        stream, streams = database._database.stream, []

        def slow(sql: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
            streams.append(sql)
            now[0] += 90
            return stream(sql, arguments)

        monkeypatch.setattr(database._database, "stream", slow)
        found = []
        for row in database.contents("remote"):
            found.append(row)
            now[0] += 30
        assert len(found) == sum(row.kind == "remote" for row in rows)
        # Each time for 900 seconds.
        assert len(streams) == -(-len(found) // 30)

    def test_are_as_things_are_then_once_somebody_has_worked_on_them_for_long(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(9):
            synapse_database.add_local(f"abcdef{number}")
            synapse_database.add_thumbnail("", f"abcdef{number}", 32, 32, "image/png", "crop", 5)
        monkeypatch.setattr(synapse_db, "_LONGEST_TRANSACTION_SECONDS", 0)
        monkeypatch.setattr(synapse_db, "_SORTINGS", 0)
        contents, thumbnails = database.contents("local"), database.thumbnails("local")
        assert (next(contents).media_id, next(thumbnails).media_id) == ("abcdef0", "abcdef0")
        synapse_database.execute("DELETE FROM local_media_repository")
        assert list(contents) == []
        # To see where the thumbnails of a media end takes those of the next.
        assert len(list(thumbnails)) <= 2


IDS = [f"ab{second}d{rest}" for second in "-.0aé" for rest in ["e", "e-x", "e.x", "e0", "eé", "e😀", "E"]]
ORIGINS = ["a.org", "a.org-x", "a.org.x", "a.org0", "a.org:80", "[::1]", "A.org", "ä.org", "😀.org"]


def fill(synapse_database: SynapseDatabase) -> list[CachedMedia]:
    """Rows that bytes, letters and languages sort differently; the result is in no order."""
    rows = [local(identifier) for identifier in IDS]
    rows += [
        remote(origin, f"{number}", identifier) for origin in ORIGINS for number, identifier in enumerate(IDS[::3])
    ]
    random.Random(1).shuffle(rows)
    for row in rows:
        if row.kind == "local":
            synapse_database.add_local(row.media_id)
        else:
            synapse_database.add_remote(row.origin, row.media_id, row.filesystem_id)
    return rows


def fill_with_thumbnails(synapse_database: SynapseDatabase) -> None:
    """The same rows, each with two thumbnails, and two that have one path."""
    rows = fill(synapse_database)
    for media_id in ("one", "two"):
        synapse_database.add_remote("b.org", media_id, "shared")
        rows.append(remote("b.org", media_id, "shared"))
    for row in rows:
        for kind in [(640, 480, "image/png", "scale"), (32, 32, "image/png", "crop")]:
            synapse_database.add_thumbnail(row.origin, row.media_id, *kind, 5)


@on_each_database
class TestSelectedMedia:
    def test_is_each_once_however_many_are_read_at_a_time(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = fill(synapse_database)
        for number in (1, 7, 2000):
            monkeypatch.setattr(synapse_db, "_MEDIA_AT_A_TIME", number)
            found = [stored.row for stored in database.selected_media()]
            assert sorted(found, key=str) == sorted(rows, key=str)

    def test_is_found_without_reading_the_whole_table_each_time(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_many(synapse_database, 20_000)
        add_many_thumbnails(synapse_database)
        if synapse_database.is_postgres:
            for table in TABLES:
                synapse_database.execute(f"ANALYZE {table}")
        asked: list[tuple[str, tuple[Any, ...]]] = []
        stream = database._database.stream

        def noted(sql: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
            asked.append((sql, arguments))
            return stream(sql, arguments)

        monkeypatch.setattr(database._database, "stream", noted)
        # So few that PostgreSQL too finds the index cheaper than the table.
        monkeypatch.setattr(synapse_db, "_MEDIA_AT_A_TIME", 5)
        for origin in ("", "media.example.org"):
            asked.clear()
            assert len(list(itertools.islice(database.selected_media(origin=origin), 11))) == 11
            sql, arguments = asked[-1]
            explain = "EXPLAIN" if synapse_database.is_postgres else "EXPLAIN QUERY PLAN"
            plan = "\n".join(str(step[-1]) for step in database._database.query(f"{explain} {sql}", arguments))
            if synapse_database.is_postgres:
                assert "Seq Scan" not in plan
            else:
                assert "SEARCH m USING INDEX" in plan

    def test_comes_with_what_is_known_of_the_media(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("abcdef", media_length=5, sha256=SHA256, created_ts=7, last_access_ts=9)
        synapse_database.add_remote("a.org", "id", "ghijkl", created_ts=7, quarantined_by="@admin:test")
        found = list(database.selected_media())
        assert [stored.row for stored in found] == [local("abcdef"), remote("a.org", "id", "ghijkl")]
        facts = [
            (stored.length, stored.sha256, stored.last_access, stored.created_ts, stored.used, stored.quarantined)
            for stored in found
        ]
        assert facts == [(5, SHA256, 9, 7, 9, False), (1, None, None, 7, 7, True)]

    def test_comes_with_the_thumbnails_in_byte_order(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        for identifier in ("abcdef", "abcdeg", "abcdeh"):
            synapse_database.add_local(identifier)
            synapse_database.add_remote("a.org", identifier, f"file of {identifier}")
        kinds = [(640, 480, "image/png", "scale"), (32, 32, "image/png", "crop"), (320, 240, "image/jpeg", "scale")]
        for length, kind in enumerate(kinds):
            synapse_database.add_thumbnail("", "abcdef", *kind, length)
            synapse_database.add_thumbnail("a.org", "abcdeh", *kind, length + 10)
        names = ["32-32-image-png-crop", "320-240-image-jpeg-scale", "640-480-image-png-scale"]
        found = [list(stored.thumbnail_lengths.items()) for stored in database.selected_media()]
        of_local, of_remote = list(zip(names, (1, 2, 0), strict=True)), list(zip(names, (11, 12, 10), strict=True))
        assert found == [of_local, [], [], [], [], of_remote]

    def test_comes_with_the_same_thumbnails_however_many_are_read_at_a_time(
        self, synapse_database: SynapseDatabase, database: SynapseDb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill_with_thumbnails(synapse_database)
        at_once = list(database.selected_media())
        for number in (1, 7):
            monkeypatch.setattr(synapse_db, "_MEDIA_AT_A_TIME", number)
            assert list(database.selected_media()) == at_once

    def test_leaves_out_what_has_no_file(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("awaited", media_length=None)
        synapse_database.add_local("preview", url_cache="https://example.org")
        synapse_database.add_remote("a.org", "no file", None)
        assert list(database.selected_media()) == []

    @pytest.mark.parametrize(
        ("selection", "expected"),
        [
            ({"used_since": 1000}, ["used", "new", "r used"]),
            ({"used_since": 1001}, ["used"]),
            ({"origin": ""}, ["used", "old", "new"]),
            ({"origin": "a.org"}, ["r old", "r used"]),
            ({"origin": "b.org"}, []),
            ({"origin": "a.org", "used_since": 1000}, ["r used"]),
            ({"origin": "", "used_since": 1000}, ["used", "new"]),
        ],
    )
    def test_may_be_of_a_selection(
        self, synapse_database: SynapseDatabase, database: SynapseDb, selection: dict[str, Any], expected: list[str]
    ) -> None:
        synapse_database.add_local("used", created_ts=1, last_access_ts=1001)
        synapse_database.add_local("old", created_ts=1, last_access_ts=999)
        synapse_database.add_local("new", created_ts=1000)
        synapse_database.add_remote("a.org", "r used", "file 1", created_ts=1, last_access_ts=1000)
        synapse_database.add_remote("a.org", "r old", "file 2", created_ts=1)
        found = [stored.row.media_id for stored in database.selected_media(**selection)]
        assert sorted(found) == sorted(expected)


@on_each_database_to_alter
class TestOtherSchemas:
    def test_hold_the_same_media_where_the_columns_sort_otherwise(
        self, synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(synapse_db, "_MEDIA_AT_A_TIME", 5)
        rows = fill(synapse_database)
        remote_ids = "SELECT filesystem_id FROM remote_media_cache ORDER BY filesystem_id"
        if synapse_database.is_postgres:
            for table, column in [
                ("local_media_repository", "media_id"),
                ("remote_media_cache", "media_id"),
                ("remote_media_cache", "media_origin"),
                ("remote_media_cache", "filesystem_id"),
                ("remote_media_cache_thumbnails", "thumbnail_method"),
            ]:
                synapse_database.execute(f'ALTER TABLE {table} ALTER COLUMN {column} TYPE text COLLATE "und-x-icu"')
            in_their_order = [row[0] for row in synapse_database.execute(remote_ids)]
            assert in_their_order != sorted(in_their_order)
        with connect(synapse_database.arguments) as database:
            found = [stored.row for stored in database.selected_media()]
        assert sorted(found, key=str) == sorted(rows, key=str)

    def test_before_synapse_1_128_has_no_sha256(self, synapse_database: SynapseDatabase) -> None:
        for table in ("local_media_repository", "remote_media_cache"):
            synapse_database.execute(f"ALTER TABLE {table} DROP COLUMN sha256")
        synapse_database.add_local("abcdef", media_length=5)
        with connect(synapse_database.arguments) as database:
            assert database.facts(local("abcdef")) == MediaFacts(5, None, False, {})
            assert [stored.sha256 for stored in database.selected_media()] == [None]


@on_each_database
class TestTheDatabase:
    def test_is_never_written(self, synapse_database: SynapseDatabase, database: SynapseDb) -> None:
        synapse_database.add_local("abcdef")
        statement = "DELETE FROM local_media_repository WHERE media_id = ?"
        with pytest.raises(SynapseDbError):
            database._database.query(statement, ("abcdef",))
        assert synapse_database.execute("SELECT media_id FROM local_media_repository") == [("abcdef",)]

    def test_can_be_written_by_synapse_while_it_is_read(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        add_many(synapse_database, 10_000)  # more than are fetched at once
        rows = database.unused_before(9999, "local")
        next(rows)
        synapse_database.execute("UPDATE local_media_repository SET last_access_ts = 5")
        synapse_database.add_local("another")
        assert len(list(rows)) == 4999

    def test_has_no_open_connection_after_an_iterator_was_given_up(
        self, synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(10):
            synapse_database.add_local(f"abcdef{number}")
        opened: list[Any] = []
        module: Any = psycopg2 if synapse_database.is_postgres else sqlite3
        original = module.connect

        def connected(*args: Any, **kwargs: Any) -> Any:
            opened.append(original(*args, **kwargs))
            return opened[-1]

        monkeypatch.setattr(module, "connect", connected)
        with connect(synapse_database.arguments) as database:
            for rows in (database.unused_before(9999), database.selected_media()):
                next(rows)
                rows.close()  # type: ignore[union-attr]
        assert len(opened) == 3
        for connection in opened:
            with pytest.raises((psycopg2.InterfaceError, sqlite3.ProgrammingError)):
                connection.cursor().execute("SELECT 1")

    @pytest.mark.parametrize("method", ["unused_before", "selected_media"])
    def test_does_not_show_in_memory_however_large_it_is(self, synapse_database: SynapseDatabase, method: str) -> None:
        number = 200_000
        add_many(synapse_database, number)
        growth, rows = self.memory_of_a_stream(synapse_database.arguments, method)
        assert rows == number
        # Half of them are local. All rows at once take more than 60 MiB in Python, and 20 MiB in libpq.
        assert growth < 12 << 20

    @staticmethod
    def memory_of_a_stream(arguments: DatabaseArguments, method: str) -> tuple[int, int]:
        """The growth of a process of its own, since much of the memory is not Python's; and the number of rows."""
        script = f"""
import resource
from storage_provider.database import DatabaseArguments
from storage_provider.synapse_db import connect
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with connect(DatabaseArguments({arguments.engine!r}, {dict(arguments.arguments)!r})) as database:
    list(database.{method}({"0" if method == "unused_before" else "origin='nobody'"}))
    before = peak()
    count = sum(1 for _ in database.{method}({"10**15" if method == "unused_before" else ""}))
    print((peak() - before) * 1024, count)
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert not done.stderr
        growth, count = done.stdout.split()
        return int(growth), int(count)


class TestSqlite:
    @on_sqlite
    def test_may_lie_anywhere(self, synapse_database: SynapseDatabase, tmp_path: Path) -> None:
        synapse_database.add_local("abcdef")
        path = tmp_path / "a?b#c%20d é" / "home server.db"
        path.parent.mkdir()
        shutil.copy(str(synapse_database.arguments.arguments["database"]), path)
        with connect(DatabaseArguments("sqlite3", {"database": str(path)})) as database:
            assert list(database.unused_before(9999)) == [local("abcdef")]

    @on_sqlite
    def test_may_be_relative_to_the_working_directory(
        self, synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = Path(str(synapse_database.arguments.arguments["database"]))
        monkeypatch.chdir(path.parent)
        with connect(DatabaseArguments("sqlite3", {"database": path.name, "cp_min": 1})) as database:
            assert list(database.unused_before(9999)) == []

    @on_sqlite
    def test_is_read_with_what_a_running_synapse_has_not_moved_into_it_yet(
        self, synapse_database: SynapseDatabase
    ) -> None:
        with closing(synapse_database.connect()) as synapse:
            synapse.execute("PRAGMA wal_autocheckpoint = 0")
            synapse.execute(
                "INSERT INTO local_media_repository (media_id, media_length, created_ts) VALUES ('abcdef', 1, 1)"
            )
            synapse.commit()
            with connect(synapse_database.arguments) as database:
                assert list(database.unused_before(9999)) == [local("abcdef")]

    def test_that_is_missing_is_an_error_and_not_created(self, tmp_path: Path) -> None:
        path = tmp_path / "homeserver.db"
        with pytest.raises(SynapseDbError, match=r"homeserver\.db cannot be read: unable to open"):
            connect(DatabaseArguments("sqlite3", {"database": str(path)}))
        assert not path.exists()

    @pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
    def test_that_is_not_synapses_is_an_error(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "homeserver.db"
        path.write_bytes(content)
        with pytest.raises(SynapseDbError, match=r"homeserver\.db (holds no media tables|cannot be read)"):
            connect(DatabaseArguments("sqlite3", {"database": str(path)}))


PASSWORD = "s3cret=P4ss word"


class TestPostgres:
    @on_postgres
    @pytest.mark.parametrize("name", ["dbname", "database"])
    def test_takes_the_arguments_that_synapse_gives(self, synapse_database: SynapseDatabase, name: str) -> None:
        given = dict(synapse_database.arguments.arguments)
        given[name] = given.pop("dbname")
        given |= {"port": str(given["port"]), "password": 12345, "sslmode": "disable", "keepalives_idle": 10}
        given |= {"cp_min": 5, "cp_max": 10, "cp_reconnect": True, "txn_limit": 0, "allow_unsafe_locale": True}
        with connect(DatabaseArguments("psycopg2", given)) as database:
            assert list(database.unused_before(9999)) == []

    @on_postgres_to_alter
    def test_takes_a_search_path(self, synapse_database: SynapseDatabase) -> None:
        synapse_database.execute("CREATE SCHEMA elsewhere")
        for table in ("local_media_repository", "remote_media_cache"):
            synapse_database.execute(f"ALTER TABLE {table} SET SCHEMA elsewhere")
        given = {**synapse_database.arguments.arguments, "options": "-c search_path=elsewhere"}
        with connect(DatabaseArguments("psycopg2", given)) as database:
            assert list(database.unused_before(9999)) == []
        with pytest.raises(SynapseDbError, match="holds no media tables"):
            connect(synapse_database.arguments)

    @on_postgres
    def test_says_nothing_to_the_session_that_outlasts_a_transaction(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        """Behind PgBouncer the session may be Synapse's the next moment."""
        list(database.unused_before(9999))
        sent: list[str] = []
        names = ["default_transaction_read_only", "statement_timeout", "idle_in_transaction_session_timeout"]
        for name in names:
            sent += [value for (value,) in database._database.query(f"SHOW {name}", ())]
        (isolation,) = database._database.query("SHOW transaction_read_only", ())
        assert (sent, isolation) == (["off", "0", "0"], ("on",))

    @on_postgres_to_alter
    def test_streams_as_long_as_it_takes(self, synapse_database: SynapseDatabase) -> None:
        """Time-outs that operators set for Synapse do not count."""
        synapse_database.add_local("abcdef")
        name = synapse_database.arguments.arguments["dbname"]
        synapse_database.execute(f"ALTER DATABASE {name} SET statement_timeout = 200")
        with connect(synapse_database.arguments) as database:
            slow = "SELECT 1 FROM pg_sleep(0.4)"
            assert list(database._database.stream(slow, ())) == [(1,)]
            with pytest.raises(SynapseDbError, match="timeout"):
                database._database.query(slow, ())

    @on_postgres_to_alter
    def test_can_be_upgraded_while_somebody_works_on_selected_media(
        self, synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(synapse_db, "_MEDIA_AT_A_TIME", 5)
        rows = fill(synapse_database)
        with connect(synapse_database.arguments) as database:
            media = database.selected_media()
            next(media)
            synapse_database.execute("SET lock_timeout = '1s'; ALTER TABLE local_media_repository ADD COLUMN more INT")
            assert len(list(media)) == len(rows) - 1

    @on_postgres
    def test_is_left_without_an_open_transaction(
        self, synapse_database: SynapseDatabase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else PgBouncer closes its own connection, which Synapse might have used next."""
        synapse_database.add_local("abcdef")
        synapse_database.add_local("abcdeg")
        left: list[int] = []

        class Noting(psycopg2.extensions.connection):
            def close(self) -> None:
                left.append(self.info.transaction_status)
                super().close()

        monkeypatch.setattr(psycopg2, "connect", partial(psycopg2.connect, connection_factory=Noting))
        with connect(synapse_database.arguments) as database:
            assert database.present([local("abcdef")]) == {("", "abcdef")}
            assert len(list(database.contents("local"))) == 2
            given_up = database.contents("local")
            next(given_up)
            given_up.close()  # type: ignore[attr-defined]
            with pytest.raises(SynapseDbError, match="division by zero"):
                list(database._database.stream("SELECT 1/0", ()))
        assert left == [psycopg2.extensions.TRANSACTION_STATUS_IDLE] * 4

    @on_postgres
    def test_that_was_lost_between_two_questions_is_connected_anew(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("abcdef")
        synapse_database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        assert database.present([local("abcdef")]) == {("", "abcdef")}

    @on_postgres
    def test_that_is_lost_again_and_again_is_an_error(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.add_local("abcdef")
        with pytest.raises(SynapseDbError, match="The PostgreSQL database cannot be read"):
            database._database.query("SELECT pg_terminate_backend(pg_backend_pid())", ())
        assert database.present([local("abcdef")]) == {("", "abcdef")}

    @on_postgres
    def test_that_is_lost_within_an_iterator_is_an_error(
        self, synapse_database: SynapseDatabase, database: SynapseDb
    ) -> None:
        synapse_database.insert(
            "local_media_repository",
            [{"media_id": f"abcdef{number}", "media_length": 1, "created_ts": 1} for number in range(5000)],
        )
        rows = database.unused_before(9999)
        next(rows)
        synapse_database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        with pytest.raises(SynapseDbError):
            list(rows)

    def test_that_is_not_synapses_is_an_error(self, postgres: PostgresServer, make_database: Callable[[], str]) -> None:
        given = {"host": postgres.host, "port": postgres.port, "user": postgres.user, "dbname": make_database()}
        with pytest.raises(SynapseDbError, match="holds no media tables: it is not Synapse's"):
            connect(DatabaseArguments("psycopg2", given))

    @pytest.mark.parametrize(
        "given",
        [{"dbname": "missing"}, {"sslmode": "require"}, {"user": "nobody_known"}, {"no_such_option": PASSWORD}],
    )
    def test_that_refuses_is_an_error_without_the_password(
        self, postgres: PostgresServer, given: dict[str, Any]
    ) -> None:
        arguments = {"host": postgres.host, "port": postgres.port, "user": "postgres", "password": PASSWORD, **given}
        with pytest.raises(SynapseDbError) as caught:
            connect(DatabaseArguments("psycopg2", arguments))
        self.is_one_sentence(caught.value)

    @pytest.mark.parametrize(
        "given",
        [
            {"host": "127.0.0.1", "port": "PORT", "password": PASSWORD},
            {"host": "127.0.0.1", "port": "not a port", "password": PASSWORD},
            {"dsn": f"postgresql://user:{PASSWORD}@[127.0.0.1"},
            {"dsn": f"host=127.0.0.1 port=PORT password='{PASSWORD}"},
            {"dbname": f"postgresql://user:{PASSWORD}@127.0.0.1:x:y/synapse"},
            {"dsn": "postgresql://user:100%s3cret@127.0.0.1/synapse"},
            {"dsn": "host=127.0.0.1 port=PORT password=P4ss s3cret"},
            {"host": ["a", "list"], "password": PASSWORD},
        ],
    )
    def test_that_cannot_be_reached_is_an_error_without_the_password(self, given: dict[str, Any]) -> None:
        given = {
            name: value.replace("PORT", str(free_port())) if isinstance(value, str) else value
            for name, value in given.items()
        }
        with pytest.raises(SynapseDbError) as caught:
            connect(DatabaseArguments("psycopg2", given))
        self.is_one_sentence(caught.value)

    @staticmethod
    def is_one_sentence(error: SynapseDbError) -> None:
        text = str(error)
        assert text.startswith("The PostgreSQL database cannot be read: ")
        assert "\n" not in text
        assert PASSWORD not in text
        assert "s3cret" not in text
        assert error.__suppress_context__


def test_arguments_do_not_show_the_password() -> None:
    assert PASSWORD not in repr(DatabaseArguments("psycopg2", {"password": PASSWORD}))

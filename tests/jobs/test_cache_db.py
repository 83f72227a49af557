"""The command line's cache.db: one test for each promise of `storage_provider.cache_db`."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import string
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider import cache_db
from storage_provider.cache_db import CacheDb, CacheDbError, CachedMedia, Kind, Proof
from storage_provider.media_paths import Media, content_path, thumbnail_directory
from tests.jobs.old_cache import OLD_SCHEMA

# What s3_media_upload of synapse-s3-storage-provider 1.7.0 does with it.
OLD_INSERT = "INSERT OR IGNORE INTO media (origin, media_id, filesystem_id, type, known_deleted) VALUES (?, ?, ?, ?, ?)"
OLD_MARK = "UPDATE media SET known_deleted = ? WHERE origin = ? AND media_id = ?"
OLD_LIST = "SELECT origin, media_id, filesystem_id, type FROM media WHERE NOT known_deleted"
OLD_COUNT = "SELECT COALESCE(count(*), 0) FROM media WHERE NOT known_deleted"

LOCAL = CachedMedia("", "abcdefgh", "abcdefgh", "local")
REMOTE = CachedMedia("a.org", "remote id", "ABCDefgh", "remote")
OTHER = CachedMedia("b.org", "remote id", "IJKLmnop", "remote")

nasty_ids = st.text("-./0aé😀", min_size=5, max_size=9)
nasty_rows = st.one_of(
    st.builds(lambda id_: CachedMedia("", id_, id_, "local"), nasty_ids),
    st.builds(CachedMedia, st.text("-.0aé😀", min_size=1, max_size=4), nasty_ids, nasty_ids, st.just("remote")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def cache(path: Path) -> Iterator[CacheDb]:
    with CacheDb(path) as cache:
        yield cache


@pytest.fixture
def old(path: Path) -> Iterator[sqlite3.Connection]:
    """The older tool's connection to the same file."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD_SCHEMA)
        yield connection


def undeleted(cache: CacheDb) -> list[CachedMedia]:
    return [*cache.undeleted("local"), *cache.undeleted("remote")]


def made_up(number: int, kind: Kind = "remote") -> Iterator[CachedMedia]:
    chance = random.Random(number)
    for _ in range(number):
        identifier = "".join(chance.choices(string.ascii_letters, k=24))
        origin = chance.choice(["a.org", "a.org-x", "b.org"]) if kind == "remote" else ""
        yield CachedMedia(origin, identifier, identifier, kind)


class TestTheOlderToolsFile:
    def test_is_taken_over_as_it_is(self, path: Path, old: sqlite3.Connection) -> None:
        rows = [("", "local1", "local1", "local", False), ("", "local2", "local2", "local", True)]
        rows += [("a.org", "m1", "abcdef", "remote", False), ("a.org", "m2", "ghijkl", "remote", True)]
        with old:
            old.executemany(OLD_INSERT, rows)
        with CacheDb(path) as cache:
            assert undeleted(cache) == [CachedMedia(*rows[0][:4]), CachedMedia(*rows[2][:4])]  # type: ignore[arg-type]
            assert cache.count_undeleted() == 2
            assert cache.unused_before is None
            assert cache.config_paths == ()
        assert sorted(old.execute("SELECT * FROM media")) == sorted(rows)

    def test_goes_on_working_for_the_older_tool(self, path: Path, old: sqlite3.Connection) -> None:
        with CacheDb(path) as cache:
            cache.add([LOCAL, REMOTE])
            cache.mark_deleted([LOCAL])
            cache.record_proofs([Proof("p", "e", 1, 2, "put")])
        old.executescript(OLD_SCHEMA)
        with old:
            inserted = [
                old.execute(OLD_INSERT, (row.origin, row.media_id, row.filesystem_id, row.kind, False)).rowcount
                for row in (LOCAL, REMOTE, OTHER)
            ]
            old.execute(OLD_MARK, (True, REMOTE.origin, REMOTE.media_id))
        assert inserted == [0, 0, 1]
        assert old.execute(OLD_LIST).fetchall() == [(OTHER.origin, OTHER.media_id, OTHER.filesystem_id, "remote")]
        assert old.execute(OLD_COUNT).fetchone() == (1,)
        with CacheDb(path) as cache:
            assert undeleted(cache) == [OTHER]

    def test_of_either_origin_has_the_same_table(self, path: Path, cache: CacheDb, tmp_path: Path) -> None:
        def table(connection: sqlite3.Connection) -> list[Any]:
            indexes = ("media_id_idx", "deleted_idx")
            return [
                connection.execute("PRAGMA table_info(media)").fetchall(),
                *(connection.execute(f"PRAGMA index_info({name})").fetchall() for name in indexes),
                [row[1:4] for row in connection.execute("PRAGMA index_list(media)") if row[1] in indexes],
            ]

        with closing(sqlite3.connect(path)) as ours, closing(sqlite3.connect(tmp_path / "old.db")) as theirs:
            theirs.executescript(OLD_SCHEMA)
            assert table(ours) == table(theirs)

    def test_that_it_has_just_created_is_taken_over(self, path: Path) -> None:
        path.touch()
        with CacheDb(path) as cache:
            assert undeleted(cache) == []


def test_a_new_file_is_not_for_everybody_to_read(path: Path) -> None:
    umask = os.umask(0o022)
    try:
        with CacheDb(path) as cache:
            cache.add([LOCAL])
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


class TestRows:
    def test_are_added_once_and_counted_when_new(self, cache: CacheDb) -> None:
        assert cache.add([LOCAL, REMOTE]) == 2
        assert cache.add([LOCAL, REMOTE, OTHER]) == 1
        assert undeleted(cache) == [LOCAL, REMOTE, OTHER]

    def test_that_are_known_deleted_stay_so_when_they_are_added_again(self, cache: CacheDb) -> None:
        cache.add([LOCAL, REMOTE])
        cache.mark_deleted([LOCAL, REMOTE])
        assert cache.add([LOCAL, REMOTE]) == 0
        assert cache.count_undeleted() == 0

    def test_whose_media_was_fetched_anew_get_the_new_file(self, cache: CacheDb) -> None:
        anew = CachedMedia(REMOTE.origin, REMOTE.media_id, "another file", "remote")
        cache.add([REMOTE])
        cache.mark_deleted([REMOTE])
        assert cache.add([anew]) == 1
        assert undeleted(cache) == [anew]

    def test_survive_a_reopening(self, path: Path) -> None:
        with CacheDb(path) as cache:
            cache.add([LOCAL, REMOTE])
            cache.mark_deleted([LOCAL])
        with CacheDb(path) as cache:
            assert undeleted(cache) == [REMOTE]

    def test_are_there_when_the_call_returns(self, path: Path, cache: CacheDb) -> None:
        cache.add([LOCAL, REMOTE])
        cache.mark_deleted([REMOTE])
        with closing(sqlite3.connect(path)) as other:
            assert other.execute(OLD_LIST).fetchall() == [("", LOCAL.media_id, LOCAL.filesystem_id, "local")]

    def test_can_be_marked_deleted_and_revived_by_their_file(self, cache: CacheDb) -> None:
        cache.add([LOCAL, REMOTE, OTHER])
        cache.mark_deleted([LOCAL, REMOTE])
        assert undeleted(cache) == [OTHER]
        assert cache.revive([LOCAL.media, OTHER.media, Media("a.org", "unknown")]) == [LOCAL]
        assert undeleted(cache) == [LOCAL, OTHER]

    def test_are_marked_and_forgotten_only_with_the_same_file(self, cache: CacheDb) -> None:
        cache.add([LOCAL, REMOTE])
        changed = CachedMedia(REMOTE.origin, REMOTE.media_id, "another file", "remote")
        cache.mark_deleted([changed])
        cache.forget([changed])
        assert undeleted(cache) == list(cache.rows()) == [LOCAL, REMOTE]
        cache.forget([REMOTE])
        assert list(cache.rows()) == [LOCAL]

    def test_are_all_told_deleted_or_not(self, cache: CacheDb) -> None:
        rows = [*made_up(2500), LOCAL]
        cache.add(rows)
        cache.mark_deleted(rows[::3])
        assert sorted(cache.rows(), key=str) == sorted(rows, key=str)

    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(nasty_rows, max_size=20, unique_by=lambda row: (row.origin, row.media_id)))
    def test_come_in_byte_order_of_the_path(self, rows: list[CachedMedia]) -> None:
        def key(row: CachedMedia) -> bytes:
            return f"{row.origin}/{row.filesystem_id}".encode()

        with tempfile.TemporaryDirectory() as directory, CacheDb(Path(directory) / "cache.db") as cache:
            cache.add(rows)
            for kind in ("local", "remote"):
                of_kind = [row for row in rows if row.kind == kind]
                assert [key(row) for row in cache.undeleted(kind)] == sorted(map(key, of_kind))

    def test_come_in_the_order_of_content_path_over_many_pages(self, cache: CacheDb) -> None:
        rows = [*made_up(3500), *made_up(2500, "local")]
        cache.add(rows)
        cache.mark_deleted(rows[::5])
        left = [row for number, row in enumerate(rows) if number % 5]
        assert undeleted(cache) == sorted(left, key=lambda row: content_path(row.media).encode())

    def test_that_share_a_file_all_come(self, cache: CacheDb) -> None:
        rows = [CachedMedia("a.org", f"{number:05}", "the same file", "remote") for number in range(2500)]
        cache.add(rows)
        assert undeleted(cache) == rows

    def test_may_be_changed_while_they_are_listed(self, cache: CacheDb) -> None:
        rows = sorted(made_up(3500), key=lambda row: content_path(row.media))
        cache.add(rows)
        listed = []
        for number, row in enumerate(cache.undeleted("remote"), 1):
            listed.append(row)
            if number % 350 == 0:
                cache.mark_deleted(listed[-350:])
        assert listed == rows
        assert cache.count_undeleted() == 0


class TestProofs:
    PATH = content_path(LOCAL.media)
    PROOF = Proof(PATH, "etag", 5, 1_700_000_000_123_456_789, "read")

    def test_are_known_at_once_and_after_a_reopening(self, path: Path) -> None:
        with CacheDb(path) as cache:
            assert cache.proofs([self.PATH]) == {}
            cache.record_proofs([self.PROOF])
            assert cache.proofs([self.PATH]) == {self.PATH: self.PROOF}
        with CacheDb(path) as cache:
            assert cache.proofs([self.PATH]) == {self.PATH: self.PROOF}

    def test_are_written_when_that_is_asked_for(self, path: Path, cache: CacheDb) -> None:
        cache.record_proofs([self.PROOF])
        cache.flush()
        with CacheDb(path) as other:
            assert other.proofs([self.PATH]) == {self.PATH: self.PROOF}

    def test_are_replaced_by_newer_ones(self, path: Path) -> None:
        newer = Proof(self.PATH, "other", 6, 7, "put")
        with CacheDb(path) as cache:
            cache.record_proofs([self.PROOF])
            cache.flush()
            cache.record_proofs([newer])
            assert cache.proofs([self.PATH]) == {self.PATH: newer}
        with CacheDb(path) as cache:
            assert cache.proofs([self.PATH]) == {self.PATH: newer}

    @pytest.mark.parametrize("flushed", [True, False])
    def test_are_gone_when_they_are_disproved(self, path: Path, flushed: bool) -> None:
        other = Proof("local_content/ot/he/r", "etag", 6, 7, "read")
        with CacheDb(path) as cache:
            cache.record_proofs([self.PROOF, other])
            if flushed:
                cache.flush()
            cache.forget_proofs([self.PATH])
            assert cache.proofs([self.PATH, other.path]) == {other.path: other}
        with CacheDb(path) as cache:
            assert cache.proofs([self.PATH, other.path]) == {other.path: other}

    @pytest.mark.parametrize("flushed", [True, False])
    @pytest.mark.parametrize("method", ["mark_deleted", "forget"])
    def test_go_with_the_files(self, path: Path, method: str, flushed: bool) -> None:
        neighbour = Media("", LOCAL.filesystem_id + "-x")
        gone = [self.PATH, f"{thumbnail_directory(LOCAL.media)}/32-32-image-png-crop"]
        stay = [content_path(neighbour), f"{thumbnail_directory(neighbour)}/32-32-image-png-crop"]
        with CacheDb(path) as cache:
            cache.add([LOCAL])
            cache.record_proofs([Proof(path, "e", 1, 1, "put") for path in gone + stay])
            if flushed:
                cache.flush()
            getattr(cache, method)([LOCAL])
            assert [path not in cache.proofs(gone + stay) for path in gone + stay] == [True, True, False, False]
        with CacheDb(path) as cache:
            assert [path not in cache.proofs(gone + stay) for path in gone + stay] == [True, True, False, False]

    def test_of_unsafe_rows_are_no_error(self, cache: CacheDb) -> None:
        unsafe = CachedMedia("..", "../..", "../../etc/passwd", "remote")
        cache.add([unsafe])
        cache.mark_deleted([unsafe])
        assert cache.count_undeleted() == 0


class TestProperties:
    def test_are_kept(self, path: Path) -> None:
        with CacheDb(path) as cache:
            cache.unused_before = 1_700_000_000_000
            cache.config_paths = (Path("/etc/homeserver.yaml"), Path("/etc/conf.d"))
        with CacheDb(path) as cache:
            assert cache.unused_before == 1_700_000_000_000
            assert cache.config_paths == (Path("/etc/homeserver.yaml"), Path("/etc/conf.d"))
            cache.unused_before = 5
            assert cache.unused_before == 5


class TestSize:
    """A million rows must cost no more memory than a few, and no more time for each."""

    def test_does_not_show_in_memory(self, cache: CacheDb) -> None:
        # As a list, these rows take 11 MB.
        assert peak_of(lambda: cache.add(made_up(60_000))) < 6 << 20
        for rows in (cache.undeleted("remote"), cache.rows()):
            assert peak_of(lambda rows=rows: sum(1 for _ in rows)) < 2 << 20  # type: ignore[misc]

    @pytest.mark.parametrize(
        "work",
        [
            pytest.param(lambda cache, rows: [*cache.undeleted("remote")], id="undeleted"),
            pytest.param(lambda cache, rows: [*cache.rows()], id="rows"),
            pytest.param(lambda cache, rows: cache.mark_deleted(rows), id="mark_deleted"),
            pytest.param(lambda cache, rows: cache.forget(rows), id="forget"),
            pytest.param(
                lambda cache, rows: (cache.mark_deleted(rows), cache.revive(row.media for row in rows)), id="revive"
            ),
        ],
    )
    def test_costs_the_same_for_each_row(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[CacheDb, list[CachedMedia]], object]
    ) -> None:
        steps = [
            self._steps(tmp_path / f"{number}.db", list(made_up(number)), monkeypatch, work)
            for number in (2_500, 10_000)
        ]
        # Four times the rows; without an index it would be sixteen times the work.
        assert steps[1] < 6 * steps[0]

    @staticmethod
    def _steps(
        path: Path,
        rows: list[CachedMedia],
        monkeypatch: pytest.MonkeyPatch,
        work: Callable[[CacheDb, list[CachedMedia]], object],
    ) -> int:
        """How many hundreds of instructions SQLite's virtual machine runs for it."""
        counted = itertools.count()

        def connected(connection: sqlite3.Connection) -> None:
            connection.set_progress_handler(lambda: next(counted) < 0, 100)

        on_connect(monkeypatch, connected)
        with CacheDb(path) as cache:
            cache.add(rows)
            cache.mark_deleted(rows[:10])
            start = next(counted)
            work(cache, rows)
            return next(counted) - start


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def on_connect(monkeypatch: pytest.MonkeyPatch, action: Callable[[sqlite3.Connection], object]) -> None:
    connect = sqlite3.connect

    def connected(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **kwargs)
        action(connection)
        return connection

    monkeypatch.setattr(cache_db.sqlite3, "connect", connected)  # type: ignore[attr-defined]


class TestTroubles:
    """Each is one sentence that names the file."""

    def test_a_file_that_is_no_database(self, path: Path) -> None:
        path.write_bytes(b"not a database" * 1000)
        with pytest.raises(CacheDbError, match=r"cache\.db is not a SQLite database"):
            CacheDb(path)

    @pytest.mark.parametrize("name", [".", "missing/cache.db"])
    def test_a_path_that_cannot_be_opened(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(CacheDbError, match="cannot be opened or created"):
            CacheDb(tmp_path / name)

    @pytest.mark.parametrize(
        ("table", "complaint"),
        [
            ("local_media_repository (media_id TEXT)", "not a cache of s3_media_upload"),
            ("media (id TEXT, origin TEXT)", "a table `media` that s3_media_upload did not make"),
        ],
    )
    def test_a_database_of_something_else_is_left_as_it_is(self, path: Path, table: str, complaint: str) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"CREATE TABLE {table}")
            connection.commit()
        before = path.read_bytes()
        with pytest.raises(CacheDbError, match=complaint):
            CacheDb(path)
        assert path.read_bytes() == before

    def test_another_process_that_does_not_end(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_db, "_BUSY_SECONDS", 0)
        with CacheDb(path) as cache, closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(CacheDbError, match="in use by another process"):
                cache.add([LOCAL])
            other.execute("ROLLBACK")
            assert cache.add([LOCAL]) == 1

    def test_a_file_that_may_not_be_written(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with CacheDb(path) as cache:
            cache.add([LOCAL])
        on_connect(monkeypatch, lambda connection: connection.execute("PRAGMA query_only = 1"))
        with CacheDb(path) as cache:
            assert undeleted(cache) == [LOCAL]
            with pytest.raises(CacheDbError, match="may not be written"):
                cache.add([REMOTE])

    def test_a_full_disk_loses_nothing_that_was_written(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = list(made_up(30_000))
        with monkeypatch.context() as patch:
            on_connect(patch, lambda connection: connection.execute("PRAGMA max_page_count = 1200"))
            with CacheDb(path) as cache:
                with pytest.raises(CacheDbError, match="disk is full"):
                    cache.add(rows)
                written = cache.count_undeleted()
                assert 0 < written < len(rows)
                cache.forget(list(cache.undeleted("remote"))[:10])
        with CacheDb(path) as cache:
            assert cache.count_undeleted() == written - 10
            assert cache.add(rows) == len(rows) - written + 10

    def test_a_damaged_file(self, path: Path) -> None:
        with CacheDb(path) as cache:
            cache.add(made_up(3000))
        content = bytearray(path.read_bytes())
        content[4096 * 4 :] = b"\xff" * (len(content) - 4096 * 4)
        path.write_bytes(content)
        with pytest.raises(CacheDbError, match=r"cache\.db is damaged"), CacheDb(path) as cache:
            list(cache.rows())

    def test_a_source_of_rows_that_fails_keeps_what_came_before(self, cache: CacheDb) -> None:
        def rows() -> Iterator[CachedMedia]:
            yield from made_up(10_000)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            cache.add(rows())
        assert cache.count_undeleted() == 10_000
        assert cache.add([LOCAL]) == 1

    def test_a_row_that_cannot_be_written_leaves_the_others_unwritten_and_the_file_usable(
        self, path: Path, cache: CacheDb
    ) -> None:
        with pytest.raises(UnicodeEncodeError):
            cache.add([LOCAL, CachedMedia("", "\ud800bcdef", "\ud800bcdef", "local")])
        assert cache.add([LOCAL, REMOTE]) == 2
        with closing(sqlite3.connect(path)) as other:
            assert other.execute(OLD_COUNT).fetchone() == (2,)

    def test_closing_twice_is_none(self, path: Path) -> None:
        cache = CacheDb(path)
        cache.close()
        cache.close()
        with pytest.raises(CacheDbError):
            cache.count_undeleted()

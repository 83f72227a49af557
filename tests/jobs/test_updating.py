"""cache.db in step with Synapse's database."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider.cache_db import CacheDb, CachedMedia
from storage_provider.synapse_db import SynapseDb, connect
from storage_provider.updating import update
from tests.jobs.conftest import ENGINES, SynapseDatabase

_ids = st.text("ab", min_size=1, max_size=3)
_rows = st.builds(
    lambda origin, media_id, file: CachedMedia(
        origin, media_id, file if origin else media_id, "remote" if origin else "local"
    ),
    st.sampled_from(["", "a.org", "a.org-x", "b.org"]),
    _ids,
    _ids,
)


def by_id(row: CachedMedia) -> tuple[str, str]:
    return row.origin, row.media_id


class Present:
    """A database with these rows, which counts for how many it was asked."""

    def __init__(self, rows: dict[tuple[str, str], CachedMedia]) -> None:
        self._rows = rows
        self.asked = 0

    def present(self, rows: list[CachedMedia]) -> set[tuple[str, str]]:
        self.asked += len(rows)
        return {by_id(row) for row in rows if self._rows.get(by_id(row)) == row}


@settings(max_examples=60, deadline=None)
@given(
    known=st.lists(_rows, unique_by=by_id, max_size=10),
    unused=st.lists(_rows, unique_by=by_id, max_size=10),
    used=st.lists(_rows, unique_by=by_id, max_size=10),
)
def test_unused_rows_come_in_and_gone_ones_leave(
    known: list[CachedMedia], unused: list[CachedMedia], used: list[CachedMedia]
) -> None:
    now = {by_id(row): row for row in [*used, *unused]}
    before = {by_id(row): row for row in known}
    database: Any = Present(now)
    with tempfile.TemporaryDirectory() as directory, CacheDb(Path(directory) / "cache.db") as cache:
        cache.add(known)
        added = update(cache, database, iter(sorted(unused, key=by_id)), lambda: False)
        kept = {key: row for key, row in before.items() if now.get(key) == row}
        expected = kept | {by_id(row): row for row in unused}
        assert {by_id(row): row for row in cache.rows()} == expected
        assert added == sum(1 for row in unused if before.get(by_id(row)) != row)


def test_nobody_is_asked_for_rows_that_are_known_and_unused(tmp_path: Path) -> None:
    rows = [CachedMedia("a.org", f"{number:05}", f"{number:05}", "remote") for number in range(3000)]
    database: Any = Present({by_id(row): row for row in rows})
    with CacheDb(tmp_path / "cache.db") as cache:
        assert update(cache, database, iter(rows), lambda: False) == 3000
        assert update(cache, database, iter(rows), lambda: False) == 0
        assert database.asked == 0
        assert update(cache, database, iter(rows[5:]), lambda: False) == 0
        assert database.asked == 5
        assert len(list(cache.rows())) == 3000


def test_early_end_forgets_nothing(tmp_path: Path) -> None:
    rows = [CachedMedia("", f"{number:05}", f"{number:05}", "local") for number in range(100)]
    database: Any = Present({})
    with CacheDb(tmp_path / "cache.db") as cache:
        cache.add(rows)
        moments = iter([False] * 10 + [True] * 1000)
        update(cache, database, iter(rows[:20]), lambda: next(moments))
        assert list(cache.rows()) == rows


@pytest.fixture
def database(synapse_database: SynapseDatabase) -> Iterator[SynapseDb]:
    with connect(synapse_database.arguments) as database:
        yield database


@pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)
def test_both_databases_have_the_order_of_cache_db(
    synapse_database: SynapseDatabase, database: SynapseDb, tmp_path: Path
) -> None:
    for name in ("a", "B", "a-b", "aé", "a_", "Ab"):
        synapse_database.add_local(f"{name}12345")
        for origin in ("a.org", "A.org", "a.org-x", "a-b.org"):
            synapse_database.add_remote(origin, f"{name}12345", f"fs{name}12345")
    rows = list(database.unused_before(1 << 50))
    assert len(rows) == 30
    with CacheDb(tmp_path / "cache.db") as cache:
        cache.add(rows)
        assert list(cache.rows()) == rows

"""Keeping cache.db in step with Synapse's database, by walking both side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from storage_provider.batches import in_batches
from storage_provider.cache_db import CacheDb, CachedMedia
from storage_provider.synapse_db import SynapseDb

_ROWS_AT_ONCE = 10_000


def update(cache: CacheDb, database: SynapseDb, unused: Iterable[CachedMedia], must_end: Callable[[], bool]) -> int:
    """Take in the rows that are unused, forget those that are gone from the database; returns how many are new.

    `unused` comes in byte order of origin and media id. Nothing is written of rows that are known
    already. It may end early, and is then continued by the next one.
    """
    added = 0
    for rows in in_batches(_differences(iter(unused), cache.rows(), must_end), _ROWS_AT_ONCE):
        added += cache.add(row for row, is_unused in rows if is_unused)
        # They may have been used since, or be gone.
        known = [row for row, is_unused in rows if not is_unused]
        present = database.present(known)
        cache.forget(row for row in known if (row.origin, row.media_id) not in present)
    return added


def _differences(
    unused: Iterator[CachedMedia], known: Iterator[CachedMedia], must_end: Callable[[], bool]
) -> Iterator[tuple[CachedMedia, bool]]:
    """Rows that are only among the unused ones (True), or only among the known ones (False)."""
    here, there = next(unused, None), next(known, None)
    while here is not None and there is not None and not must_end():
        key, other = (here.origin, here.media_id), (there.origin, there.media_id)
        if key == other:
            if here != there:
                yield here, True
            here, there = next(unused, None), next(known, None)
        elif key < other:
            yield here, True
            here = next(unused, None)
        else:
            yield there, False
            there = next(known, None)
    only_unused = ((row, True) for row in _from(here, unused))
    only_known = ((row, False) for row in _from(there, known))
    yield from itertools.takewhile(lambda _: not must_end(), itertools.chain(only_unused, only_known))


def _from(first: CachedMedia | None, rest: Iterator[CachedMedia]) -> Iterator[CachedMedia]:
    return iter(()) if first is None else itertools.chain([first], rest)

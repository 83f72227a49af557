"""Restoring: fetches media that belongs on disk and is not there, most recently used first."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from storage_provider.cache_pass import CachePass
from storage_provider.cache_policy import PathMarks, space_of
from storage_provider.directories import FileState
from storage_provider.failures import DiskFull
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.reconcile import ExpectedFile, expected_files
from storage_provider.temporary_files import TemporaryFile
from storage_provider.transfers import run_at_once

# With less room than that, no further files are looked for that might fit.
_TOO_LITTLE = 1 << 20

# So long a file that is fetched may wait for others that get their places together with it.
_LONGEST_WAIT_SECONDS = 0.1

_Result = TypeVar("_Result")


class CacheRestore:
    """Fetches what is missing, as long as there is room."""

    def __init__(self, work: CachePass, missing: PathMarks, batch: int) -> None:
        """`missing` holds at least the paths that are; `batch` is how many files are under way at once."""
        self._work = work
        self._missing = missing
        self._batch = batch
        # One half of a batch is fetched while the other half waits to be placed.
        self._half = max(batch // 2, 1)
        self._under_way = 0
        self._is_over = False
        self._fetched: deque[tuple[ExpectedFile, TemporaryFile]] = deque()
        """What the threads have brought, and what waits for its place."""
        self._place_at = 0.0
        self._placed: list[tuple[ExpectedFile, FileState]] = []
        """What was put there, and nobody has looked at since."""

    def run(self, begin: int, end: int | None) -> bool:
        """Fetch what was used in that time; False where nothing more can be fetched."""
        for root in MEDIA_ROOTS:
            if self._is_over:
                break
            self._fetch_all(self._wanted(root, begin, end))
        return not self._is_over

    def _wanted(self, root: str, begin: int, end: int | None) -> Iterator[ExpectedFile]:
        work = self._work
        expected = expected_files(work.database, root, used_since=begin, used_before=end)
        for wanted in work.gently(expected):
            if self._is_over:
                return
            if wanted.row.quarantined or wanted.path not in self._missing or wanted.path in work.in_vain:
                continue
            if work.store.is_vacant(wanted.path) and self._reserve(space_of(wanted.row.length)):
                yield wanted

    def _reserve(self, space: int) -> bool:
        free, _ = self._work.store.free_space()
        room, limit = self._work.policy.room(self._work.room.on_disk + self._under_way, free - self._under_way)
        if space <= room:
            self._under_way += space
            return True
        self._work.report.limited_by = limit
        self._is_over = room < _TOO_LITTLE
        return False

    def _fetch_all(self, wanted: Iterator[ExpectedFile]) -> None:
        fetched = run_at_once(self._work.threads, self._fetch, wanted, at_most=self._half)
        try:
            with contextlib.closing(fetched):
                for each, future in fetched:
                    if not self._outcome(each.path, future.result):
                        self._under_way -= space_of(each.row.length)
                    if len(self._fetched) >= self._half or time.monotonic() >= self._place_at:
                        self._place_fetched()
                self._place_fetched()
        finally:
            for _, temporary in self._fetched:
                temporary.discard()
            # Also what was placed right before the end.
            self._remove_deleted()

    def _fetch(self, wanted: ExpectedFile) -> bool:
        """Fetch one file, which then waits for its place; in a thread."""
        self._work.check_stop()
        self._fetched.append((wanted, self._work.fetch_anew(wanted.path, wanted.row)))
        return True

    def _place_fetched(self) -> None:
        """Give the files their places: many at once, since Synapse and its database have to be asked before."""
        self._place_at = time.monotonic() + _LONGEST_WAIT_SECONDS
        work = self._work
        with contextlib.ExitStack() as opened:
            fetched = []
            while self._fetched:
                wanted, temporary = self._fetched.popleft()
                fetched.append((wanted, opened.enter_context(temporary)))
            files = {wanted.path: (wanted, temporary) for wanted, temporary in fetched if self._sync(wanted, temporary)}
            with work.gate.kept_free(files) as kept:
                known = work.database.wanted(files[path][0].row.row for path in kept)
                for path in kept:
                    wanted, temporary = files[path]
                    if (wanted.row.origin, wanted.row.media_id) in known:
                        kept[path] = self._place(wanted, temporary)
        self._under_way -= sum(space_of(wanted.row.length) for wanted, _ in fetched)
        if len(self._placed) >= self._batch:
            self._remove_deleted()

    def _sync(self, wanted: ExpectedFile, temporary: TemporaryFile) -> bool:
        def sync() -> bool:
            temporary.sync()
            return True

        return self._outcome(wanted.path, sync) is not None

    def _place(self, wanted: ExpectedFile, temporary: TemporaryFile) -> FileState | None:
        state = self._outcome(wanted.path, lambda: temporary.place(wanted.path))
        if state is not None:
            self._placed.append((wanted, state))
            self._work.room.add(state.size)
            self._work.report.restored.add(space_of(state.size))
        return state

    def _outcome(self, path: str, work: Callable[[], _Result]) -> _Result | None:
        """As `CachePass.outcome`; when the disk is full this is over."""

        def telling_full_disk() -> _Result:
            try:
                return work()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskFull from error
                raise

        try:
            return self._work.outcome(path, telling_full_disk)
        except DiskFull:
            self._work.report.limited_by = "full disk"
            self._is_over = True
            return None

    def _remove_deleted(self) -> None:
        """Take back what Synapse was deleting in the moment in which it was put there.

        It removes the file before the row, so that the row may still be there right before a file is placed.
        """
        placed, self._placed = self._placed, []
        present = self._work.database.present(each.row.row for each, _ in placed)
        for each, state in placed:
            if (each.row.origin, each.row.media_id) not in present:
                self._work.remove(each.path, state)

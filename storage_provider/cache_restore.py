"""Restoring: fetches media that belongs on disk and is not there, most recently used first."""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from storage_provider.cache_pass import CachePass
from storage_provider.cache_policy import PathMarks, space_of
from storage_provider.media_store import MEDIA_ROOTS, FileState
from storage_provider.reconcile import ExpectedFile, expected_files
from storage_provider.transfers import run_at_once

# With less room than that, no further files are looked for that might fit.
_TOO_LITTLE = 1 << 20


class DiskIsFull(Exception):
    """The operating system says so."""


class Restore:
    """Fetches what is missing, as long as there is room."""

    def __init__(self, work: CachePass, missing: PathMarks, on_disk: int, batch: int) -> None:
        """`missing` holds at least the paths that are; `batch` is how many files are under way at once."""
        self._work = work
        self._missing = missing
        self._batch = batch
        self._on_disk = on_disk
        self._under_way = 0
        self._is_over = False
        self._placed: deque[tuple[ExpectedFile, FileState]] = deque()
        """What the threads have put there, and nobody has looked at since."""

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
            if work.store.state(wanted.path) is None and self._reserve(space_of(wanted.row.length)):
                yield wanted

    def _reserve(self, space: int) -> bool:
        free, _ = self._work.store.free_space()
        room, limit = self._work.policy.room(self._on_disk + self._under_way, free - self._under_way)
        if space <= room:
            self._under_way += space
            return True
        self._work.report.limited_by = limit
        self._is_over = room < _TOO_LITTLE
        return False

    def _fetch_all(self, wanted: Iterator[ExpectedFile]) -> None:
        work = self._work
        fetched = run_at_once(work.threads, self._fetch, wanted, at_most=self._batch)
        try:
            with contextlib.closing(fetched):
                for each, future in fetched:
                    self._under_way -= space_of(each.row.length)
                    self._note(each, future)
                    if len(self._placed) >= self._batch:
                        self._remove_deleted()
        finally:
            # Also what was placed while the end was already being made.
            self._remove_deleted()

    def _note(self, wanted: ExpectedFile, future: Future[FileState | None]) -> None:
        try:
            state = self._work.result(wanted.path, future)
        except DiskIsFull:
            self._work.report.limited_by = "full disk"
            self._is_over = True
            return
        if state is not None:
            self._on_disk += space_of(state.size)
            self._work.report.restored.add(space_of(state.size))

    def _fetch(self, wanted: ExpectedFile) -> FileState | None:
        """Fetch one file; None where somebody is using its path."""
        work, path, row = self._work, wanted.path, wanted.row
        work.check_stop()
        try:
            state = work.fetch_anew(path, row, lambda temporary: temporary.place(path, work.mtime(row)))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskIsFull from error
            raise
        if state is not None:
            self._placed.append((wanted, state))
        return state

    def _remove_deleted(self) -> None:
        """Take back what Synapse was deleting in the moment in which it was put there.

        It removes the file before the row, so that the row may still be there right before a file is placed.
        """
        placed = [self._placed.popleft() for _ in range(len(self._placed))]
        present = self._work.database.present(each.row.row for each, _ in placed)
        for each, state in placed:
            if (each.row.origin, each.row.media_id) not in present:
                self._work.remove(each.path, state)

"""Healing: replaces damaged files, and sends what never reached the bucket or is wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backends.errors import ObjectNotFound
from storage_provider.cache_pass import CachePass
from storage_provider.directories import FileState
from storage_provider.failures import Damaged
from storage_provider.listing import ListingRefused, listing
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.reconcile import expected_files, reconcile
from storage_provider.synapse_db import FileRow
from storage_provider.transfers import run_at_once

_FILES_PER_WORKER = 4


@dataclass(frozen=True)
class DamagedFile:
    """A file whose size is not what the database says."""

    path: str
    row: FileRow
    state: FileState


@dataclass(frozen=True)
class _Unstored:
    """A file that looks whole, and has no object or one of another size."""

    path: str
    row: FileRow
    state: FileState
    is_replacement: bool


def mend_files(work: CachePass, damaged: list[DamagedFile]) -> None:
    """Replace damaged files by their objects, where those are whole."""

    def mend(file: DamagedFile) -> FileState | None:
        work.check_stop()
        return work.mend(file.path, file.row, file.state)

    for file, future in run_at_once(work.threads, mend, damaged, at_most=_at_most(work)):
        state = work.result(file.path, future)
        if state is not None:
            work.report.mended.add(state.size)


def mend_objects(work: CachePass) -> None:
    """List the bucket, and send what is missing there or wrong, where the file on disk is right.

    Goes as far as the server allows: without the permission to list nothing is done.
    """

    def send(file: _Unstored) -> bool:
        work.check_stop()
        if not file.is_replacement and _is_there(work, file.path):
            return False
        if not work.upload_if_right(file.path, file.row, file.state):
            raise Damaged(f"the file is damaged, and the object {'too' if file.is_replacement else 'does not exist'}")
        return True

    for root in MEDIA_ROOTS:
        try:
            for file, future in run_at_once(work.threads, send, _unstored(work, root), at_most=_at_most(work)):
                if work.result(file.path, future):
                    tally = work.report.replaced if file.is_replacement else work.report.uploaded
                    tally.add(file.state.size)
        except ListingRefused:
            return
    work.report.listed = True


def _unstored(work: CachePass, root: str) -> Iterator[_Unstored]:
    expected = expected_files(work.database, root)
    entries = reconcile(expected, work.store.walk_files(root), listing(work.backend, root))
    for path, row, file, info in work.gently(entries):
        if row is None or file is None or row.quarantined or file.placed_ms >= work.young_since:
            continue
        if file.state.size != row.length or path in work.in_vain:
            continue
        if info is None:
            if row.row.kind in work.stored:
                yield _Unstored(path, row, file.state, is_replacement=False)
        elif info.size != row.length:
            yield _Unstored(path, row, file.state, is_replacement=True)


def _is_there(work: CachePass, path: str) -> bool:
    """Whether an object is there that the listing lacks, as some servers' do (see `ListingCursor`)."""
    try:
        work.backend.stat(path)
    except ObjectNotFound:
        return False
    return True


def _at_most(work: CachePass) -> int:
    return work.workers * _FILES_PER_WORKER

"""The local disk as a bounded cache of the bucket: one pass evicts, restores and heals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from backends.base import Backend
from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.cache_eviction import evict
from storage_provider.cache_healing import DamagedFile, mend_files, mend_objects
from storage_provider.cache_pass import CachePass, Gate
from storage_provider.cache_policy import AgeHistogram, CachePolicy, PathMarks, bands, bytes_to_leave, space_of
from storage_provider.cache_report import PassReport
from storage_provider.cache_restore import CacheRestore
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.media_store import MediaStore
from storage_provider.reconcile import Entry, expected_files, reconcile
from storage_provider.room import Room
from storage_provider.settings import ProviderSettings
from storage_provider.synapse_db import FileRow, SynapseDb

_HOUR_MS = 3600 * 1000
_DAY_MS = 24 * _HOUR_MS

# So much is mended in one pass; the next one finds the rest.
_DAMAGED_FILES_IN_A_PASS = 1000


@dataclass
class _Scan:
    """What comparing the database with the disk has come to, in flat memory."""

    ages: AgeHistogram
    """Of the files that may be evicted, now or when they are older than `min_age`."""
    bands: list[tuple[int, int | None]]
    missing: PathMarks = field(default_factory=PathMarks)
    bands_with_missing: set[int] = field(default_factory=set)
    damaged: list[DamagedFile] = field(default_factory=list)
    holds_settled_files: bool = False
    """Whether there is anything to compare with the bucket: after the disk was lost there is not."""


class LocalCache:
    """Keeps on disk what belongs there. One process of those that share a media store may do it at a time."""

    def __init__(
        self,
        backend: Backend,
        store: MediaStore,
        connect: Callable[[], SynapseDb],
        settings: ProviderSettings,
        room: Room,
        *,
        stored: Collection[Kind],
        gate: Gate,
        stop: threading.Event,
        workers: int,
        is_accessed: Callable[[CachedMedia], bool] = lambda row: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`stored` are the kinds of media that Synapse stores in this bucket; `workers` threads do transfers.

        `is_accessed` tells of media that is being used and whose row does not say so yet.
        """
        self._backend = backend
        self._store = store
        self._connect = connect
        self._settings = settings
        self._room = room
        self._stored = frozenset(stored)
        self._gate = gate
        self._stop = stop
        self._workers = workers
        self._is_accessed = is_accessed
        self._clock = clock
        self._in_vain = PathMarks()
        self._in_vain_since = self._now()
        self._listing_broke_off: int | None = None
        self.scan_seconds = 0.0
        """How long the last comparison of database and disk took, of the pass under way if there is one."""

    @property
    def has_work(self) -> bool:
        """Whether the settings leave anything to do."""
        return self._settings.auto_restore or self._settings.local_cache is not None

    def prepare(self) -> None:
        """Decide, where it never was, from when on media is to be restored.

        A store that holds media has been without this cache so far: what was unused until now stays
        where it is. An empty one has lost its disk, or is new: all may come back, also when the first
        restore is interrupted. A moment that lies in the future, by a clock that was ahead once, is
        replaced: until then nothing would come back.

        Raises `MediaStoreError` where directories are links, behind which all media would be taken for lost, and `OSError`.
        """
        self._store.check()
        before = self._store.offloaded_before()
        if before is None:
            self._store.set_offloaded_before(self._now() if self._store.holds_media() else 0)
        elif before > self._now() + _DAY_MS:
            self._store.set_offloaded_before(self._now())

    def run_pass(self, *, is_full: bool = False) -> PassReport:
        """Scan, evict, restore, heal; `is_full` tells that `max_size` has kept something away since the last pass.

        Raises `BackendError` and `BucketFails`, `SynapseDbError`, `MediaStoreError` and `OSError`,
        and `Stopped`; what was done until then is complete.
        """
        started = time.monotonic()
        self.prepare()
        _, total = self._store.free_space()
        policy = CachePolicy.of(self._settings.local_cache, bytes_to_leave(self._settings, total))
        with (
            self._connect() as database,
            ThreadPoolExecutor(self._workers, thread_name_prefix="s3-media-cache") as threads,
        ):
            work = CachePass(
                self._backend,
                self._store,
                database,
                policy,
                self._room,
                self._gate,
                self._is_accessed,
                self._stored,
                self._settings.auto_restore,
                threads,
                self._workers,
                self._stop,
                self._in_vain,
                self._now(),
            )
            self._run(work, is_full)
        work.report.seconds = time.monotonic() - started
        return work.report

    def _run(self, work: CachePass, is_full: bool) -> None:
        report, store = work.report, self._store
        self._forget_after_a_day(work)
        begun = work.room.begin_look()
        scan = self._scan(work)
        plan = work.policy.plan(scan.ages, report.kept.size, store.free_space()[0], is_full=is_full)
        try:
            if plan is not None:
                evict(work, plan)
        finally:
            # Also where the bucket fails, now or later in the pass: readers find room as far as there is some.
            on_disk = report.kept.size - report.evicted.size
            work.room.settle(on_disk, begun)
        free, _ = store.free_space()
        report.over_limit = work.policy.excess(on_disk, free) > 0
        report.out_of_reach = work.policy.out_of_reach(on_disk, report.immovable.size, free)
        if work.heals:
            self._restore(work, scan)
            mend_files(work, scan.damaged)
            if scan.holds_settled_files and self._listing_is_due(work.now):
                self._listing_broke_off = work.now
                mend_objects(work)
                work.check_stop()
                self._listing_broke_off = None
                store.set_listed_at(work.now)
        report.kept.files += report.restored.files - report.evicted.files
        report.kept.size += report.restored.size - report.evicted.size

    def _forget_after_a_day(self, work: CachePass) -> None:
        if not _was_within(_DAY_MS, self._in_vain_since, work.now):
            self._in_vain.clear()
            self._in_vain_since = work.now

    # --- scan ---

    def _scan(self, work: CachePass) -> _Scan:
        started = time.monotonic()
        since = self._belongs_since(work)
        scan = _Scan(AgeHistogram(work.now), bands(work.now, since))
        try:
            for root in MEDIA_ROOTS:
                expected = expected_files(work.database, root, refuse=lambda row: _refuse(work, row))
                for entry in work.gently(reconcile(expected, self._store.walk_files(root))):
                    _take_in(work, scan, since, entry)
        finally:
            self.scan_seconds = time.monotonic() - started
        return scan

    # --- restore ---

    def _restore(self, work: CachePass, scan: _Scan) -> None:
        restore = CacheRestore(work, scan.missing, self._settings.auto_restore_batch_size)
        # Eviction may have moved the stamp since the scan: what is older than what it removed stays away too.
        since = self._belongs_since(work)
        for index, (begin, end) in enumerate(scan.bands):
            if index in scan.bands_with_missing and not restore.run(max(begin, since), end):
                return

    # --- inside ---

    def _belongs_since(self, work: CachePass) -> int:
        return work.policy.belongs_since(work.now, self._store.offloaded_before() or 0)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _listing_is_due(self, now: int) -> bool:
        """Once a day, or an hour after one that broke off."""
        if _was_within(_HOUR_MS, self._listing_broke_off, now):
            return False
        return not _was_within(_DAY_MS, self._store.listed_at(), now)


def _was_within(span: int, moment: int | None, now: int) -> bool:
    """False also for a moment of a clock that was ahead."""
    return moment is not None and moment <= now < moment + span


def _take_in(work: CachePass, scan: _Scan, since: int, entry: Entry) -> None:
    path, row, file, _ = entry
    if file is None:
        if row is not None and row.used >= since and not row.quarantined and path not in work.in_vain:
            scan.missing.add(path)
            begins = (index for index, (begin, _) in enumerate(scan.bands) if row.used >= begin)
            scan.bands_with_missing.add(next(begins))
        return
    size = file.state.size
    work.report.kept.add(space_of(size))
    if row is None or row.quarantined:
        work.report.immovable.add(space_of(size))
        return
    is_settled = file.placed_ms < work.young_since
    scan.holds_settled_files |= is_settled
    if path in work.in_vain:
        work.report.immovable.add(space_of(size))
        return
    # Also what may not be removed yet: in its stead, media would leave that was used later.
    scan.ages.add(work.used(row), size)
    is_damaged = is_settled and size != row.length
    if is_damaged and work.heals and len(scan.damaged) < _DAMAGED_FILES_IN_A_PASS:
        scan.damaged.append(DamagedFile(path, row, file.state))


def _refuse(work: CachePass, row: FileRow) -> None:
    work.report.refused.add(f"{row.origin or 'local'} {row.media_id!r}")

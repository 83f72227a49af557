"""What the commands do, and how they tell of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from storage_provider.batches import in_batches
from storage_provider.cache_db import KINDS, CacheDb, CachedMedia
from storage_provider.candidates import NotOnDisk, OnDisk, candidates
from storage_provider.cli_output import Output, Progress, readable_size
from storage_provider.cli_setup import Run, connect
from storage_provider.failures import Failed
from storage_provider.media_store import MediaStore
from storage_provider.offload import Offload
from storage_provider.offload_events import Deleted, Event, Gone, Kept, Uploaded
from storage_provider.proofs import Verify

if TYPE_CHECKING:
    from storage_provider.database import DatabaseArguments
    from storage_provider.synapse_db import SynapseDb

DONE, SOME_FAILED, WRONG_USE, UNREACHABLE = 0, 1, 2, 3
"""Exit codes: all done; some files failed; wrong use or settings; bucket or database out of reach, or interrupted."""

_PROOFS = {"etag": "checksum", "put": "our own upload", "read": "reading back", "size": "size alone"}


def update(
    output: Output,
    cache: CacheDb,
    duration: timedelta,
    arguments: DatabaseArguments,
    config_paths: Sequence[Path],
    must_end: Callable[[], bool] = lambda: False,
) -> None:
    """Bring cache.db up to date with Synapse's database."""
    from storage_provider.updating import update

    before = datetime.now() - duration
    unused_before = int(before.timestamp() * 1000)
    output.line("Syncing files that haven't been accessed since:", before.isoformat(" "))
    with connect(arguments) as database:

        def unused() -> Generator[CachedMedia, None, None]:
            for kind in KINDS:
                output.line("  Syncing", kind, "media")
                yield from database.unused_before(unused_before, kind)

        with contextlib.closing(unused()) as rows:
            added = update(cache, database, rows, must_end)
    cache.unused_before = unused_before
    cache.config_paths = tuple(path.resolve() for path in config_paths)
    output.line("Synced", added, "new rows")


def check_deleted(output: Output, cache: CacheDb, store: MediaStore) -> int:
    """Bring cache.db up to date with what is on disk; returns the exit code."""
    total = _count_undeleted(cache, store)
    if not output.progress:
        output.line("Checking on ", total, " undeleted files")
    back = deleted = failed = 0
    with output.bar(total) as bar:
        for entries in in_batches(candidates(store, cache), 1000):
            gone = [entry.row for entry in entries if isinstance(entry, NotOnDisk)]
            cache.mark_deleted(gone)
            deleted += len(gone)
            back += sum(1 for entry in entries if isinstance(entry, OnDisk) and entry.is_back)
            for entry in entries:
                if isinstance(entry, Failed):
                    failed += 1
                    output.complain(f"failed: {entry.path}: {entry.reason}")
            bar.advance(len(entries))
    if back:
        output.complain(f"{back} media that had been deleted are on disk again")
    output.line("Updated", deleted, "as deleted")
    return SOME_FAILED if failed else DONE


def _count_undeleted(cache: CacheDb, store: MediaStore) -> int:
    """The media that cache.db takes to be on disk. Raises `MediaStoreError` where all of it seems to be gone at once."""
    total = cache.count_undeleted()
    if total:
        store.check_is_mounted()
    return total


def offload(
    run: Run,
    cache: CacheDb,
    database: SynapseDb | None,
    *,
    delete: bool,
    verify: Verify,
    limit: int | None = None,
) -> int:
    """Send and delete; returns the exit code."""
    total = _count_undeleted(cache, run.store)
    run.check_bucket()
    if not run.output.progress:
        run.output.line("Uploading ", total, " files")
    job = Offload(
        backend=run.backend,
        store=run.store,
        cache=cache,
        database=database,
        bandwidth=run.bandwidth,
        must_end=run.must_end,
        workers=run.workers,
        delete=delete,
        verify=verify,
        unused_before=cache.unused_before,
        limit=limit,
    )
    summary = _Summary(run.output, total)
    try:
        with run.output.bar(total) as bar:
            for event in job.run():
                summary.add(event, bar)
    finally:
        summary.tell()
    if run.stop.is_set():
        run.output.complain("Interrupted; what was begun is finished, the next run goes on.")
        return UNREACHABLE
    return SOME_FAILED if summary.failed else DONE


class _Summary:
    """What a run has done, in numbers; what needs an operator is told at once."""

    def __init__(self, output: Output, media: int) -> None:
        self._output = output
        self.media = media
        self.uploaded_media = self.uploaded_files = self.uploaded_bytes = self.replaced = 0
        self.deleted_media = self.deleted_files = self.deleted_bytes = 0
        self.kept = self.failed = 0
        self.proofs: dict[str, int] = {}

    def add(self, event: Event, bar: Progress) -> None:
        if isinstance(event, Uploaded):
            self._add_uploaded(event)
            bar.count_file(event.size)
        elif isinstance(event, Deleted):
            self.deleted_files += 1
            self.deleted_bytes += event.size
            self.proofs[event.proof] = self.proofs.get(event.proof, 0) + 1
        elif isinstance(event, Kept):
            self.kept += 1
        elif isinstance(event, Failed):
            self.failed += 1
            self._output.complain(f"failed: {event.path}: {event.reason}")
        elif isinstance(event, Gone):
            bar.advance(event.media)
        else:
            self.uploaded_media += event.uploaded_files > 0
            self.deleted_media += event.deleted_files > 0
            if event.is_back:
                self.media += 1
                bar.expect_more(1)
            bar.advance(1)

    def _add_uploaded(self, event: Uploaded) -> None:
        self.uploaded_files += 1
        self.uploaded_bytes += event.size
        if event.replaced:
            self.replaced += 1
            self._output.complain(
                f"replaced: {event.path}: the object was not the file, which is right by the database"
            )

    def tell(self) -> None:
        line = self._output.line
        line("Uploaded", self.uploaded_media, "media out of", self.media)
        line("Uploaded", self.uploaded_files, "files")
        line("Uploaded", readable_size(self.uploaded_bytes))
        line("Deleted", self.deleted_media, "media")
        line("Deleted", self.deleted_files, "files")
        line("Deleted", readable_size(self.deleted_bytes))
        if self.proofs:
            proofs = ", ".join(f"{count} by {_PROOFS[proof]}" for proof, count in sorted(self.proofs.items()))
            line("Proved before deletion:", proofs)
        if self.kept:
            line("Kept", self.kept, "files that are in use again or changed")
        if self.failed:
            line("Failed", self.failed, "files")
        self._output.result(
            {
                "media": self.media,
                "uploaded_media": self.uploaded_media,
                "uploaded_files": self.uploaded_files,
                "uploaded_bytes": self.uploaded_bytes,
                "replaced": self.replaced,
                "deleted_media": self.deleted_media,
                "deleted_files": self.deleted_files,
                "deleted_bytes": self.deleted_bytes,
                "kept": self.kept,
                "failed": self.failed,
                "proofs": self.proofs,
            }
        )


def restore(run: Run, database: SynapseDb, since: timedelta | None, origin: str | None) -> int:
    """Fetch what is missing; returns the exit code."""
    from storage_provider import restoring
    from storage_provider.cache_policy import bytes_to_leave

    run.check_bucket()
    used_since = None if since is None else int((time.time() - since.total_seconds()) * 1000)
    _, disk_bytes = run.store.free_space()
    job = restoring.Restore(
        backend=run.backend,
        store=run.store,
        database=database,
        bandwidth=run.bandwidth,
        stop=run.stop,
        workers=run.workers,
        used_since=used_since,
        origin=origin,
        min_free=bytes_to_leave(run.settings, disk_bytes),
    )
    restored = size = missing = failed = 0
    with run.output.bar(None, "files") as bar:
        for event in job.run():
            if isinstance(event, restoring.Restored):
                restored += 1
                size += event.size
                bar.count_file(event.size)
                bar.advance(1)
            elif isinstance(event, restoring.Missing):
                missing += 1
                run.output.complain(f"not in the bucket: {event.path}")
            else:
                failed += 1
                run.output.complain(f"failed: {event.path}: {event.reason}")
    run.output.line("Restored", restored, "files")
    run.output.line("Restored", readable_size(size))
    run.output.line("Missing", missing, "files")
    run.output.line("Failed", failed, "files")
    run.output.result({"restored_files": restored, "restored_bytes": size, "missing": missing, "failed": failed})
    if run.stop.is_set():
        run.output.complain("Interrupted; the next run goes on.")
        return UNREACHABLE
    return SOME_FAILED if missing or failed else DONE

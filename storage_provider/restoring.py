"""The way back: fetching media that the database knows from the bucket into the media store."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from backends.base import Backend
from backends.errors import BackendError, ObjectNotFound
from storage_provider.bandwidth import Bandwidth
from storage_provider.failures import Damaged, DiskFull, Failed, Failures, NoLongerWanted, Stopped
from storage_provider.media_paths import UnsafePath, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore
from storage_provider.synapse_db import StoredMedia, SynapseDb, legacy_names
from storage_provider.transfers import download

_FILES_IN_A_ROUND = 1000


@dataclass(frozen=True)
class Restored:
    """A file is back on disk."""

    path: str
    size: int


@dataclass(frozen=True)
class Missing:
    """The database knows it, the bucket has it not."""

    path: str


Event = Restored | Missing | Failed


@dataclass(frozen=True)
class _Wanted:
    media: StoredMedia
    paths: tuple[str, ...]
    """Where it belongs, and where it may be instead."""
    length: int
    sha256: str | None
    is_content: bool


@dataclass
class Restore:
    """One run over the media of the database; what is on disk is left alone, so that it can be repeated."""

    backend: Backend
    store: MediaStore
    database: SynapseDb
    bandwidth: Bandwidth
    stop: threading.Event
    workers: int
    used_since: int | None
    origin: str | None
    min_free: int
    _failures: Failures = field(default_factory=Failures, init=False)

    def run(self) -> Iterator[Event]:
        """Fetch what is missing. Ends early with a `Failed` when the disk gets full, and raises `BucketFails`."""
        self.store.remove_stale_temporary_files()
        wanted = self._wanted()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="restore") as threads:
            while round_ := list(itertools.islice(wanted, _FILES_IN_A_ROUND)):
                yield from (each for each in round_ if isinstance(each, Failed))
                try:
                    yield from self._fetch(threads, [each for each in round_ if isinstance(each, _Wanted)])
                except DiskFull as full:
                    yield Failed(str(self.store.root), str(full))
                    return

    def _wanted(self) -> Iterator[_Wanted | Failed]:
        for stored in self.database.selected_media(used_since=self.used_since, origin=self.origin):
            if self.stop.is_set():
                return
            if stored.quarantined:
                continue
            try:
                files = list(_files(stored))
            except UnsafePath as error:
                yield Failed(f"{stored.row.origin or 'local'} {stored.row.media_id}", f"refused: {error}")
                continue
            for file in files:
                try:
                    sizes = self._sizes_on_disk(file)
                except (UnsafePath, OSError) as error:
                    yield Failed(file.paths[0], f"refused: {error}")
                    continue
                if not sizes:
                    yield file
                elif file.length not in sizes.values():
                    path, size = next(iter(sizes.items()))
                    said = f"it has {size} bytes, the database says {file.length}"
                    yield Failed(path, f"is on disk, but damaged: {said}; remove it to have it restored")

    def _sizes_on_disk(self, file: _Wanted) -> dict[str, int]:
        """The bytes of what there is on disk, by path."""
        states = ((path, self.store.state(path)) for path in file.paths)
        return {path: state.size for path, state in states if state is not None}

    def _fetch(self, threads: ThreadPoolExecutor, round_: list[_Wanted]) -> Iterator[Event]:
        running: dict[Future[Event | None], _Wanted] = {
            threads.submit(self._fetch_one, wanted): wanted for wanted in round_
        }
        full: DiskFull | None = None
        try:
            for future in as_completed(running):
                event: Event | None = None
                try:
                    event = future.result()
                    self._failures.forget()
                except DiskFull as error:
                    full = error
                except BackendError as error:
                    self._failures.count(error, self.backend)
                    event = Failed(running[future].paths[0], error.reason)
                if event is not None:
                    yield event
        finally:
            for future in running:
                future.cancel()
        if full is not None:
            raise full

    def _fetch_one(self, wanted: _Wanted) -> Event | None:
        if self.stop.is_set():
            return None
        free, _ = self.store.free_space()
        if free - wanted.length < self.min_free:
            raise DiskFull(f"stopped before the disk is full: {free} bytes are free, {self.min_free} are to stay so")
        for path in wanted.paths:
            try:
                return Restored(path, self._download(wanted, path))
            except ObjectNotFound:
                continue
            except (Stopped, NoLongerWanted, FileExistsError):
                return None
            except Damaged as error:
                return Failed(path, str(error))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskFull("stopped, since the disk is full") from error
                return Failed(path, error.strerror or str(error))
        # Synapse makes a thumbnail anew when it is asked for one.
        return Missing(wanted.paths[0]) if wanted.is_content else None

    def _download(self, wanted: _Wanted, path: str) -> int:
        return download(
            self.backend,
            self.store,
            path,
            self.bandwidth,
            length=wanted.length,
            sha256=wanted.sha256,
            used_ms=wanted.media.used,
            is_wanted=lambda: self._is_wanted(wanted),
        )

    def _is_wanted(self, wanted: _Wanted) -> bool:
        """Whether the database still is of that mind: its rows were read when the run began."""
        facts = self.database.facts(wanted.media.row)
        return facts is not None and not facts.quarantined


def _files(stored: StoredMedia) -> Iterator[_Wanted]:
    yield _Wanted(stored, (content_path(stored.row.media),), stored.length, stored.sha256, is_content=True)
    directory = thumbnail_directory(stored.row.media)
    legacy = {} if stored.row.kind == "local" else legacy_names(stored.thumbnail_lengths)
    for name, length in stored.thumbnail_lengths.items():
        names = (name, legacy[name]) if name in legacy else (name,)
        yield _Wanted(stored, tuple(f"{directory}/{each}" for each in names), length, None, is_content=False)

"""Moving media into the bucket, and freeing the disk of what is proved to be there.

Media is handled in rounds of bounded size. In each round: what is on disk is looked up in the
listing, what is missing there is sent, and, where deletion is asked for, every file is proved
against the bucket as it is after that, checked to be still unused, and removed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TypeVar

from backends.base import Backend, ObjectInfo
from backends.errors import BackendError, ObjectNotFound
from storage_provider.cache_db import CacheDb, CachedMedia, How, Proof
from storage_provider.media_store import (
    MEDIA_ROOTS,
    FileState,
    MediaStore,
    UnsafePath,
    parse_path,
)
from storage_provider.reconcile import ListingCursor, ListingRefused
from storage_provider.synapse_db import SynapseDb
from storage_provider.transfers import (
    Bandwidth,
    Digest,
    Failed,
    Failures,
    FileChanged,
    Stopped,
    Verify,
    digest_of_file,
    digest_of_object,
    etag_proves,
    fits,
    reason,
    upload,
)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MEDIA_IN_A_ROUND = 1000


@dataclass(frozen=True)
class Uploaded:
    """A file was sent; `replaced` tells that the object there was not the file, and wrong by the database."""

    path: str
    size: int
    replaced: bool = False


@dataclass(frozen=True)
class Deleted:
    """A file was removed from the disk; `proof` is how its object was proved (etag, put, read, size)."""

    path: str
    size: int
    proof: str


@dataclass(frozen=True)
class Kept:
    """A file was left where it is, for a reason that is no failure."""

    path: str
    reason: str


@dataclass(frozen=True)
class MediaDone:
    """All that could be done for a media in this run."""

    row: CachedMedia
    uploaded_files: int
    deleted_files: int


Event = Uploaded | Deleted | Kept | Failed | MediaDone


@dataclass
class _File:
    """A file of the round, and what is known of its object."""

    path: str
    state: FileState
    info: ObjectInfo | None = None
    is_looked_up: bool = False
    """Whether `info` is what the listing says; otherwise the object has to be asked for."""
    recorded: Proof | None = None
    """What an earlier run found out."""
    sent: ObjectInfo | None = None
    """The answer to our own upload in this run."""
    proof: str | None = None
    is_done: bool = False
    """Whether nothing more is to be done with it in this run."""


@dataclass
class _Media:
    row: CachedMedia
    files: list[_File]
    uploaded: int = 0
    deleted: int = 0


_Job = tuple[_Media, _File]


@dataclass(frozen=True)
class _Difference:
    """File and object are not the same."""

    file: Digest
    object: Digest


@dataclass
class Offload:
    """One run over the media that cache.db names.

    `database` decides where file and object differ, and whether media is still unused; without it
    nothing is deleted or replaced. `limit` counts the media that something was sent or removed of.
    After `ends_at`, a moment of the monotonic clock, nothing new is begun.
    """

    backend: Backend
    store: MediaStore
    cache: CacheDb
    database: SynapseDb | None
    bandwidth: Bandwidth
    stop: threading.Event
    workers: int
    delete: bool = False
    verify: Verify = Verify.PROOF
    unused_before: int | None = None
    limit: int | None = None
    ends_at: float | None = None
    _left: int | None = field(default=None, init=False)
    _failures: Failures = field(default_factory=Failures, init=False)
    _listing_is_refused: bool = field(default=False, init=False)
    _listings: dict[str, ListingCursor] = field(default_factory=dict, init=False)

    def run(self) -> Iterator[Event]:
        """Do it, and tell what was done. Raises `BucketFails`; each round leaves everything consistent."""
        self._left = self.limit
        self._listings = {root: ListingCursor(self.backend, root) for root in MEDIA_ROOTS}
        with ThreadPoolExecutor(self.workers, thread_name_prefix="transfer") as threads:
            for entry in self._rounds():
                if isinstance(entry, Failed):
                    yield entry
                    continue
                yield from self._transfer(threads, entry)
                if self.delete:
                    yield from self._prove(threads, entry)
                    yield from self._remove(entry)
                if self._left is not None:
                    self._left -= sum(1 for media in entry if media.uploaded or media.deleted)
                yield from (MediaDone(media.row, media.uploaded, media.deleted) for media in entry)

    # --- what there is to do ---

    def _rounds(self) -> Iterator[list[_Media] | Failed]:
        """Media with files on disk, in the order of the listing; those without are noted as deleted."""
        round_: list[_Media] = []
        gone: list[CachedMedia] = []
        for row in itertools.chain(self.cache.undeleted("local"), self.cache.undeleted("remote")):
            if self._must_end() or self._left == 0:
                break
            try:
                files = self._files(row)
            except (UnsafePath, OSError) as error:
                yield Failed(f"{row.origin or 'local'} {row.media_id}", f"refused: {error}")
                continue
            if files:
                round_.append(_Media(row, files))
            else:
                gone.append(row)
            if len(gone) >= _MEDIA_IN_A_ROUND:
                self.cache.mark_deleted(gone)
                gone = []
            if len(round_) >= min(_MEDIA_IN_A_ROUND, self._left or _MEDIA_IN_A_ROUND):
                yield round_
                round_ = []
        self.cache.mark_deleted(gone)
        if round_ and not self._must_end():
            yield round_

    def _must_end(self) -> bool:
        return self.stop.is_set() or (self.ends_at is not None and time.monotonic() >= self.ends_at)

    def _files(self, row: CachedMedia) -> list[_File]:
        files = []
        for path in self.store.files_of(row.media):
            state = self.store.state(path)
            if state is not None:
                files.append(_File(path, state))
        return files

    def _look_up(self, file: _File) -> None:
        if not self._listing_is_refused:
            root = file.path[: file.path.index("/") + 1]
            try:
                file.info = self._listings[root].find(file.path)
                file.is_looked_up = True
                return
            except ListingRefused:
                self._listing_is_refused = True
        file.is_looked_up = False

    def _object(self, file: _File) -> ObjectInfo | None:
        if file.is_looked_up:
            return file.info
        try:
            return self.backend.stat(file.path)
        except ObjectNotFound:
            return None

    # --- sending ---

    def _transfer(self, threads: ThreadPoolExecutor, round_: list[_Media]) -> Iterator[Event]:
        files = [(media, file) for media in round_ for file in media.files]
        for _, file in files:
            self._look_up(file)
        differing: list[tuple[_Media, _File, _Difference]] = []
        for (media, file), outcome in self._at_once(threads, files, self._send):
            if isinstance(outcome, _Difference):
                differing.append((media, file, outcome))
            elif isinstance(outcome, Uploaded):
                media.uploaded += 1
                if not self.delete and file.sent is not None:
                    # For the run that deletes.
                    self._record(file, file.sent, "put")
                yield outcome
            elif outcome is not None:
                file.is_done = True
                yield outcome
        for media, file, difference in differing:
            yield self._judge(media, file, difference)

    def _send(self, file: _File) -> Uploaded | _Difference | None:
        """Make sure that there is an object of the file's size."""
        info = self._object(file)
        if info is None:
            file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth)
            return Uploaded(file.path, file.state.size)
        file.info, file.is_looked_up = info, True
        return None if info.size == file.state.size else self._difference(file, info)

    def _difference(self, file: _File, info: ObjectInfo) -> _Difference | None:
        """Read both; None where they are the same after all."""
        ours = digest_of_file(self.store, file.path)
        theirs = digest_of_object(self.backend, file.path, info.etag, self.bandwidth)
        return None if ours == theirs else _Difference(ours, theirs)

    def _judge(self, media: _Media, file: _File, difference: _Difference) -> Event:
        """Let the database say which of two is right, and put it in the place of the other if it is the file."""
        file.is_done = True
        if self.database is None:
            return Failed(file.path, "file and object differ; only Synapse's database could tell which is right")
        facts = self.database.facts(media.row)
        file_is_right, object_is_right = (
            fits(facts, file.path, difference.file),
            fits(facts, file.path, difference.object),
        )
        if file_is_right == object_is_right:
            which = "both could be" if file_is_right else "neither is"
            return Failed(file.path, f"file and object differ, and {which} right by Synapse's database")
        if object_is_right:
            return Failed(file.path, "the file is damaged, the object is whole: remove the file to have it served")
        try:
            file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth)
        except (BackendError, FileChanged, OSError) as error:
            return Failed(file.path, reason(error))
        file.is_done = False
        media.uploaded += 1
        return Uploaded(file.path, file.state.size, replaced=True)

    # --- proving ---

    def _prove(self, threads: ThreadPoolExecutor, round_: list[_Media]) -> Iterator[Event]:
        files = [(media, file) for media in round_ for file in media.files if not file.is_done]
        # What was sent is looked up again: a server may acknowledge what it does not keep.
        for cursor in self._listings.values():
            cursor.rewind()
        for _, file in files:
            if file.sent is not None:
                self._look_up(file)
            else:
                file.recorded = self.cache.proof(file.path)
        differing: list[tuple[_Media, _File, _Difference]] = []
        for (media, file), outcome in self._at_once(threads, files, self._prove_one):
            if isinstance(outcome, _Difference):
                differing.append((media, file, outcome))
            elif isinstance(outcome, str):
                file.proof = outcome
                if file.info is not None and outcome in ("put", "read"):
                    self._record(file, file.info, "put" if outcome == "put" else "read")
            elif outcome is not None:
                yield outcome
        for media, file, difference in differing:
            if file.sent is not None:
                yield Failed(file.path, "the object is not what was sent")
            else:
                # What replaces the object now is proved by the next run.
                yield self._judge(media, file, difference)

    def _prove_one(self, file: _File) -> str | Failed | _Difference:
        """How the object is proved to be the file."""
        info = self._object(file)
        if info is None:
            return Failed(file.path, "the object is not in the bucket, though it was sent")
        file.info = info
        if info.size == file.state.size:
            if self.verify is Verify.SIZE:
                return "size"
            if self.verify is Verify.PROOF and (proof := self._cheap_proof(file, info)):
                return proof
        return self._difference(file, info) or "read"

    def _cheap_proof(self, file: _File, info: ObjectInfo) -> str | None:
        if file.sent is not None and info.etag and info.etag == file.sent.etag:
            return "put"
        known = file.recorded
        if known is not None and info.etag:
            now = (info.etag, info.size, file.state.mtime_ns)
            if (known.etag, known.size, known.mtime_ns) == now:
                return known.how
        return "etag" if etag_proves(self.store, file.path, info) else None

    def _record(self, file: _File, info: ObjectInfo, how: How) -> None:
        """Keep what was expensive to find out, for files that stay."""
        self.cache.record_proofs([Proof(file.path, info.etag, info.size, file.state.mtime_ns, how)])

    # --- deleting ---

    def _remove(self, round_: list[_Media]) -> Iterator[Event]:
        candidates = [media for media in round_ if any(file.proof for file in media.files)]
        if not candidates:
            return
        unused = self._still_unused([media.row for media in candidates])
        if self.unused_before is not None:
            self.store.set_offloaded_before(self.unused_before)
        gone = []
        for media in candidates:
            proved = [file for file in media.files if file.proof]
            if (media.row.origin, media.row.media_id) not in unused:
                yield from (Kept(file.path, "in use again, or gone from Synapse's database") for file in proved)
                continue
            for file in proved:
                yield self._remove_one(media, file)
            if media.deleted == len(media.files):
                gone.append(media.row)
        self.cache.mark_deleted(gone)

    def _remove_one(self, media: _Media, file: _File) -> Event:
        try:
            removed = self.store.remove(file.path, file.state)
        except OSError as error:
            return Failed(file.path, f"cannot be removed: {error.strerror}")
        if not removed:
            return Kept(file.path, "it changed meanwhile")
        media.deleted += 1
        return Deleted(file.path, file.state.size, file.proof or "")

    def _still_unused(self, rows: Sequence[CachedMedia]) -> set[tuple[str, str]]:
        if self.database is None or self.unused_before is None:
            return set()
        return self.database.still_unused(rows, self.unused_before)

    # --- many at once ---

    def _at_once(
        self, threads: ThreadPoolExecutor, jobs: Iterable[_Job], work: Callable[[_File], _Result]
    ) -> Iterator[tuple[_Job, _Result | Failed | None]]:
        """The results as they come, failures among them; None for what was not begun before the end."""

        def run(file: _File) -> _Result | None:
            return None if self._must_end() else work(file)

        running = {threads.submit(run, file): (media, file) for media, file in jobs}
        try:
            for future in as_completed(running):
                media, file = running[future]
                outcome = self._result(file, future)
                yield (media, file), outcome
        finally:
            for future in running:
                future.cancel()

    def _result(self, file: _File, future: Future[_Result | None]) -> _Result | Failed | None:
        try:
            result = future.result()
        except Stopped:
            return None
        except BackendError as error:
            self._failures.count(error)
            return Failed(file.path, reason(error))
        except (FileChanged, OSError) as error:
            return Failed(file.path, reason(error))
        self._failures.forget()
        return result


def undeleted_in_batches(cache: CacheDb) -> Iterator[list[CachedMedia]]:
    """What cache.db takes to be on disk, some at a time."""
    return _in_batches(itertools.chain(cache.undeleted("local"), cache.undeleted("remote")))


def forget_absent(cache: CacheDb, database: SynapseDb) -> None:
    """Take out of cache.db what is gone from Synapse's database."""
    for rows in _in_batches(cache.rows()):
        present = database.present(rows)
        cache.forget(row for row in rows if (row.origin, row.media_id) not in present)


def _in_batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, _MEDIA_IN_A_ROUND)):
        yield batch


def has_files(store: MediaStore, row: CachedMedia) -> bool:
    """Whether anything of a media is on disk; also where that cannot be told, so that nothing is forgotten."""
    try:
        return bool(store.files_of(row.media))
    except (UnsafePath, OSError):
        return True


def find_again(store: MediaStore, cache: CacheDb) -> int:
    """Take up media that was deleted and is on disk again, or has got new thumbnails; returns how many."""
    media = (parsed.media for root in MEDIA_ROOTS for path in store.walk(root) if (parsed := parse_path(path)))
    distinct = (each for each, _ in itertools.groupby(media))
    return cache.revive(distinct)

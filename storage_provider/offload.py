"""Moving media into the bucket, and freeing the disk of what is proved to be there.

Media is handled in rounds of bounded size. In each round: what is on disk is looked up in the
listing, what is missing there is sent, and, where deletion is asked for, every file is proved
against the bucket as it is after that, checked to be still unused, and removed. What is in use again
is not read for a proof. While a round is being finished, the next one is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backends.base import Backend, ObjectInfo
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import CacheDb, CachedMedia
from storage_provider.candidates import NotOnDisk, candidates
from storage_provider.failures import Damaged, Failed
from storage_provider.file_jobs import FileJobs
from storage_provider.judgement import Difference, damage, known_sha256, neither, objection
from storage_provider.media_store import MediaStore
from storage_provider.object_lookup import ObjectLookup
from storage_provider.offload_events import Deleted, Event, Gone, Kept, MediaDone, Uploaded
from storage_provider.offload_files import File, MediaFiles
from storage_provider.proofs import Verify, archive_of, digest_of_file, digest_of_object, etag_proves, may_be_archived
from storage_provider.removals import Removals
from storage_provider.transfers import upload

if TYPE_CHECKING:
    from storage_provider.synapse_db import SynapseDb

_MEDIA_IN_A_ROUND = 1000


@dataclass(frozen=True)
class _Begun:
    """A round whose files are being sent."""

    media: list[MediaFiles]
    sending: dict[Future[Uploaded | Difference | Failed | None], File]
    failed: list[Failed]
    """What was found out before."""


@dataclass
class Offload:
    """One run over the media that cache.db names.

    `database` decides where file and object differ, and whether media is still unused; without it
    nothing is deleted or replaced. `limit` counts the media that something was sent or removed of.
    Once `must_end` says so, nothing new is begun.
    """

    backend: Backend
    store: MediaStore
    cache: CacheDb
    database: SynapseDb | None
    bandwidth: Bandwidth
    must_end: Callable[[], bool]
    workers: int
    delete: bool = False
    verify: Verify = Verify.PROOF
    unused_before: int | None = None
    limit: int | None = None
    _left: int | None = field(default=None, init=False)
    _lookup: ObjectLookup = field(init=False)
    _jobs: FileJobs = field(init=False)

    def __post_init__(self) -> None:
        self._lookup = ObjectLookup(self.backend)
        self._jobs = FileJobs(self.backend, self.workers, self.must_end)

    def run(self) -> Iterator[Event]:
        """Do it, and tell what was done. Raises `BucketFails`; each round leaves everything consistent."""
        self._left = self.limit
        self._lookup.prepare(self.cache)
        with self._jobs:
            begun: _Begun | None = None
            for entry in self._rounds():
                if not isinstance(entry, list):
                    yield entry
                    continue
                next_ = self._begin(entry)
                if begun is not None:
                    yield from self._finish(begun)
                begun = next_
                if self._left is not None:
                    # How much of the limit is left shows when the round is finished.
                    yield from self._finish(begun)
                    begun = None
            if begun is not None:
                yield from self._finish(begun)
        self._jobs.check()

    def _finish(self, begun: _Begun) -> Iterator[Event]:
        yield from self._end_sending(begun)
        if self.delete and not self.must_end():
            yield from self._prove(begun.media)
            yield from self._remove(begun.media)
        self._record(begun.media)
        if self._left is not None:
            self._left -= sum(1 for media in begun.media if media.uploaded or media.deleted)
        yield from (MediaDone(media.row, media.uploaded, media.deleted, media.is_back) for media in begun.media)

    # --- what there is to do ---

    def _rounds(self) -> Iterator[list[MediaFiles] | Failed | Gone]:
        """Media with files on disk, in the order of the listing; those without are noted as deleted."""
        round_: list[MediaFiles] = []
        gone: list[CachedMedia] = []
        for entry in candidates(self.store, self.cache, self.must_end):
            if self.must_end() or self._left == 0:
                break
            if isinstance(entry, Failed):
                yield entry
            elif isinstance(entry, NotOnDisk):
                gone.append(entry.row)
            else:
                files = [File(entry.row, path, state) for path, state in entry.files]
                round_.append(MediaFiles(entry.row, entry.is_back, files))
            if len(gone) >= _MEDIA_IN_A_ROUND:
                yield self._note_gone(gone)
                gone = []
            if len(round_) >= min(_MEDIA_IN_A_ROUND, self._left or _MEDIA_IN_A_ROUND):
                yield round_
                round_ = []
        if gone:
            yield self._note_gone(gone)
        if round_ and not self.must_end():
            yield round_

    def _note_gone(self, rows: list[CachedMedia]) -> Gone:
        self.cache.mark_deleted(rows)
        return Gone(len(rows))

    # --- sending ---

    def _begin(self, round_: list[MediaFiles]) -> _Begun:
        files = [file for media in round_ for file in media.files]
        self._lookup.look(files)
        unsettled = [file for file in files if file.info is None or file.info.size != file.state.size]
        self._ask_for_facts(unsettled)
        failed, to_send = [], []
        for file in unsettled:
            damaged = None
            if file.facts is not None and file.told_by is not None and file.info is None:
                damaged = damage(file.facts, file.path, file.state.size)
            if damaged is None:
                to_send.append(file)
            else:
                file.is_done = True
                failed.append(Failed(file.path, damaged))
        return _Begun(round_, self._jobs.submit(to_send, self._send), failed)

    def _ask_for_facts(self, files: Iterable[File]) -> None:
        if self.database is None:
            return
        files = list(files)
        facts = self.database.facts_of(dict.fromkeys(file.row for file in files))
        for file in files:
            file.facts = facts.get(file.row)

    def _send(self, file: File) -> Uploaded | Difference | Failed | None:
        """Make sure that there is an object of the file's size."""
        info = self._lookup.ask(file)
        if info is not None:
            return None if info.size == file.state.size else self._difference_in_size(file, info)
        sha256 = None
        if file.facts is not None:
            if damaged := damage(file.facts, file.path, file.state.size):
                raise Damaged(damaged)
            sha256 = known_sha256(file.facts, file.path)
        file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth, sha256=sha256)
        return Uploaded(file.path, file.state.size)

    def _end_sending(self, begun: _Begun) -> Iterator[Event]:
        yield from begun.failed
        differing: list[tuple[File, Difference]] = []
        for file, outcome in self._jobs.outcomes(begun.sending):
            if isinstance(outcome, Difference):
                differing.append((file, outcome))
            elif isinstance(outcome, Uploaded):
                yield outcome
            elif outcome is not None:
                file.is_done = True
                yield outcome
        yield from self._settle(differing)

    def _difference_in_size(self, file: File, info: ObjectInfo) -> Difference | Failed | None:
        """Read both, if that can tell which is right."""
        if self.database is None:
            return Failed(file.path, "file and object differ; only Synapse's database could tell which is right")
        against = neither(file.facts, file.path, file.state.size, info.size)
        return self._difference(file, info) if against is None else Failed(file.path, against)

    def _difference(self, file: File, info: ObjectInfo) -> Difference | None:
        """Read both; None where they are the same after all."""
        ours = digest_of_file(self.store, file.path)
        theirs = digest_of_object(self.backend, file.path, info.etag, self.bandwidth)
        return None if ours == theirs else Difference(ours, theirs)

    def _settle(self, differing: list[tuple[File, Difference]]) -> Iterator[Event]:
        """Let the database say which of two is right, and put the file in the place of the object where it is."""
        self._ask_for_facts(file for file, _ in differing)
        right: list[File] = []
        for file, difference in differing:
            file.is_done = True
            if against := objection(file.facts, file.path, difference):
                yield Failed(file.path, against)
            else:
                right.append(file)
        for file, outcome in self._jobs.outcomes(self._jobs.submit(right, self._replace)):
            if isinstance(outcome, Uploaded):
                file.is_done = False
            if outcome is not None:
                yield outcome

    def _replace(self, file: File) -> Uploaded:
        sha256 = None if file.facts is None else known_sha256(file.facts, file.path)
        file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth, sha256=sha256)
        return Uploaded(file.path, file.state.size, replaced=True)

    # --- proving ---

    def _prove(self, round_: list[MediaFiles]) -> Iterator[Event]:
        files = [file for media in round_ for file in media.files if not file.is_done]
        self._prove_sent([file for file in files if file.sent is not None])
        # To read is costly, and in vain for what is in use again.
        unused, used = self._parted([media for media in round_ if media.unproved])
        for file in (file for media in used for file in media.files if not file.is_done):
            file.proof = None
            yield _kept(file)
        to_read = [file for media in unused for file in media.unproved]
        self._prepare_reading(to_read)
        differing: list[tuple[File, Difference]] = []
        for file, outcome in self._jobs.outcomes(self._jobs.submit(to_read, self._prove_by_reading)):
            if isinstance(outcome, Difference):
                differing.append((file, outcome))
            elif isinstance(outcome, str):
                file.proof = outcome
            elif outcome is not None:
                yield outcome
        for file in (file for file, _ in differing if file.sent):
            file.is_done = True
            yield Failed(file.path, "the object is not what was sent")
        # What replaces the object now is proved by the next run.
        yield from self._settle([(file, difference) for file, difference in differing if not file.sent])

    def _prove_sent(self, files: Sequence[File]) -> None:
        """See again what there is: a server may acknowledge what it does not keep."""
        self._lookup.look_again(files)
        for file in files:
            if file.info is None or not file.is_in_place:
                # A listing may lag behind what was sent; the object itself does not.
                file.told_by = None
            elif not may_be_archived(file.info):
                file.proof = file.cheap_proof(self.verify)

    def _prepare_reading(self, files: Sequence[File]) -> None:
        recorded = self.cache.proofs(file.path for file in files if file.sent is None)
        for file in files:
            file.recorded = recorded.get(file.path)
            if file.sent is None and file.told_by == "listing":
                # It may still list what is gone. Who has not sent the object himself asks for it before he trusts that.
                file.told_by = None

    def _prove_by_reading(self, file: File) -> str | Failed | Difference:
        """How the object is proved to be the file by reading the file, and the object where that does not do."""
        info = self._lookup.ask(file)
        if info is None:
            return Failed(
                file.path, f"the object is not in the bucket, though it was {'sent' if file.sent else 'there'}"
            )
        if archive := archive_of(self.backend, file.path, info):
            return Failed(file.path, f"the object is archived ({archive}) and cannot be read at once")
        if proof := file.cheap_proof(self.verify):
            return proof
        if info.size == file.state.size and self.verify is Verify.PROOF and etag_proves(self.store, file.path, info):
            return "etag"
        return self._difference(file, info) or "read"

    def _record(self, round_: list[MediaFiles]) -> None:
        """Keep what was expensive to find out, for files that stay and for the run that deletes."""
        proofs, disproved = [], []
        for file in (file for media in round_ for file in media.files if not file.is_removed):
            proof = file.lasting_proof
            if proof is not None and proof != file.recorded:
                proofs.append(proof)
            elif file.recorded is not None and file.is_done:
                # It differs from its object, though ETag, size and time are the old ones: one of them rots on its disk.
                disproved.append(file.path)
        self.cache.record_proofs(proofs)
        if disproved:
            self.cache.forget_proofs(disproved)

    # --- deleting ---

    def _remove(self, round_: list[MediaFiles]) -> Iterator[Event]:
        candidates = [media for media in round_ if any(file.proof for file in media.files)]
        if not candidates:
            return
        # It may have been used while it was proved.
        unused, used = self._parted(candidates)
        if self.unused_before is not None:
            self.store.set_offloaded_before(self.unused_before)
        proved = [file for media in unused for file in media.files if file.proof]
        with self.store.removals() as removals:
            yield from (_remove(removals, file) for file in sorted(proved, key=lambda file: file.path))
        self.cache.mark_deleted([media.row for media in unused if media.deleted == len(media.files)])
        yield from (_kept(file) for media in used for file in media.files if file.proof)

    def _parted(self, round_: Sequence[MediaFiles]) -> tuple[list[MediaFiles], list[MediaFiles]]:
        """The media that is still unused, and the other."""
        if not round_:
            return [], []
        found: set[tuple[str, str]] = set()
        if self.database is not None and self.unused_before is not None:
            found = self.database.still_unused([media.row for media in round_], self.unused_before)
        unused = [media for media in round_ if (media.row.origin, media.row.media_id) in found]
        used = [media for media in round_ if (media.row.origin, media.row.media_id) not in found]
        return unused, used


def _remove(removals: Removals, file: File) -> Deleted | Kept | Failed:
    try:
        file.is_removed = removals.remove(file.path, file.state)
    except OSError as error:
        return Failed(file.path, f"cannot be removed: {error.strerror}")
    if not file.is_removed:
        return Kept(file.path, "it changed meanwhile")
    return Deleted(file.path, file.state.size, file.proof or "")


def _kept(file: File) -> Kept:
    return Kept(file.path, "in use again, or gone from Synapse's database")

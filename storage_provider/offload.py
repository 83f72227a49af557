"""Moving media into the bucket, and freeing the disk of what is proved to be there.

Media is handled in rounds of bounded size. In each round: what is on disk is looked up in the
listing, what is missing there is sent, and, where deletion is asked for, every file is proved
against the bucket as it is after that, checked to be still unused, and removed. What is in use again
is not read for a proof. While a round is being finished, the next one is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from backends.base import Backend, ObjectInfo
from backends.errors import BackendError, ObjectNotFound
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import KINDS, CacheDb, CachedMedia, How, Proof
from storage_provider.candidates import NotOnDisk, candidates
from storage_provider.directories import FileState
from storage_provider.failures import Damaged, Failed, Failures, FileChanged, FileGone, Stopped, reason
from storage_provider.judgement import Difference, damage, known_sha256, neither, objection
from storage_provider.listing import ListingCursor, ListingRefused
from storage_provider.media_paths import MEDIA_ROOTS, UnsafePath, content_path
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Verify, archive_of, digest_of_file, digest_of_object, etag_proves, may_be_archived
from storage_provider.removals import Removals
from storage_provider.transfers import upload

if TYPE_CHECKING:
    from storage_provider.synapse_db import MediaFacts, SynapseDb

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
class Gone:
    """So many media that were taken to be on disk are not."""

    media: int


@dataclass(frozen=True)
class MediaDone:
    """All that could be done for a media in this run."""

    row: CachedMedia
    uploaded_files: int
    deleted_files: int
    is_back: bool = False
    """Whether it had been deleted, and was on disk again."""


Event = Uploaded | Deleted | Kept | Failed | Gone | MediaDone


@dataclass
class _File:
    """A file of the round, and what is known of its object."""

    row: CachedMedia
    path: str
    state: FileState
    info: ObjectInfo | None = None
    told_by: Literal["listing", "object"] | None = None
    """Whom `info` is from; None where the object has to be asked for."""
    facts: MediaFacts | None = None
    """What the database says, where it was asked."""
    recorded: Proof | None = None
    """What an earlier run found out."""
    sent: ObjectInfo | None = None
    """The answer to our own upload in this run."""
    proof: str | None = None
    is_done: bool = False
    """Whether nothing more is to be done with it in this run."""
    is_removed: bool = False


@dataclass
class _Media:
    row: CachedMedia
    is_back: bool
    files: list[_File]

    @property
    def uploaded(self) -> int:
        """So many files were sent."""
        return sum(file.sent is not None for file in self.files)

    @property
    def unproved(self) -> list[_File]:
        """The files that have yet to be proved, where they are to be removed."""
        return [file for file in self.files if file.proof is None and not file.is_done]

    @property
    def deleted(self) -> int:
        """So many files were removed."""
        return sum(file.is_removed for file in self.files)


@dataclass(frozen=True)
class _Begun:
    """A round whose files are being sent."""

    media: list[_Media]
    sending: dict[Future[Uploaded | Difference | Failed | None], _File]
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
    _failures: Failures = field(default_factory=Failures, init=False)
    _listing_is_refused: bool = field(default=False, init=False)

    def run(self) -> Iterator[Event]:
        """Do it, and tell what was done. Raises `BucketFails`; each round leaves everything consistent."""
        self._left = self.limit
        listings = self._listings()
        self._prepare(listings)
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="transfer")
        begun: _Begun | None = None
        try:
            for entry in self._rounds():
                if not isinstance(entry, list):
                    yield entry
                    continue
                next_ = self._begin(threads, entry, listings)
                if begun is not None:
                    yield from self._finish(threads, begun)
                begun = next_
                if self._left is not None:
                    # How much of the limit is left shows when the round is finished.
                    yield from self._finish(threads, begun)
                    begun = None
            if begun is not None:
                yield from self._finish(threads, begun)
        finally:
            threads.shutdown(cancel_futures=True)
        self._failures.check(self.backend)

    def _finish(self, threads: ThreadPoolExecutor, begun: _Begun) -> Iterator[Event]:
        yield from self._end_sending(threads, begun)
        if self.delete and not self.must_end():
            yield from self._prove(threads, begun.media)
            yield from self._remove(begun.media)
        self._record(begun.media)
        if self._left is not None:
            self._left -= sum(1 for media in begun.media if media.uploaded or media.deleted)
        yield from (MediaDone(media.row, media.uploaded, media.deleted, media.is_back) for media in begun.media)

    # --- what there is to do ---

    def _rounds(self) -> Iterator[list[_Media] | Failed | Gone]:
        """Media with files on disk, in the order of the listing; those without are noted as deleted."""
        round_: list[_Media] = []
        gone: list[CachedMedia] = []
        for entry in candidates(self.store, self.cache, self.must_end):
            if self.must_end() or self._left == 0:
                break
            if isinstance(entry, Failed):
                yield entry
            elif isinstance(entry, NotOnDisk):
                gone.append(entry.row)
            else:
                files = [_File(entry.row, path, state) for path, state in entry.files]
                round_.append(_Media(entry.row, entry.is_back, files))
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

    # --- asking the bucket ---

    def _listings(self, *, again: bool = False) -> dict[str, ListingCursor]:
        """What is in the bucket below each root; `again` is for a look at a few of the keys."""
        return {
            root: ListingCursor(self.backend, root, read_ahead=not again, checks_gaps=not again) for root in MEDIA_ROOTS
        }

    def _prepare(self, listings: Mapping[str, ListingCursor]) -> None:
        """Begin to list where the first contents stand, while the disk is being read."""
        for kind in KINDS:
            first = next(self.cache.undeleted(kind), None)
            if first is not None:
                with suppress(UnsafePath):
                    path = content_path(first.media)
                    listings[_root_of(path)].prepare(path)

    def _look_up(self, files: Iterable[_File], listings: Mapping[str, ListingCursor]) -> None:
        """See what the listing says of objects, where that is cheaper than asking for each."""
        by_root: dict[str, dict[str, _File]] = {root: {} for root in listings}
        for file in files:
            file.info = file.told_by = None
            by_root[_root_of(file.path)][file.path] = file
        for root, wanted in by_root.items():
            if self._listing_is_refused:
                return
            try:
                for path, info in listings[root].find_all(wanted):
                    wanted[path].info, wanted[path].told_by = info, "listing"
            except ListingRefused:
                self._listing_is_refused = True
                # It may lack more than what has shown that it is none to go by.
                for file in wanted.values():
                    if file.info is None:
                        file.told_by = None

    def _object(self, file: _File) -> ObjectInfo | None:
        if file.told_by is None:
            try:
                file.info = self.backend.stat(file.path)
            except ObjectNotFound:
                file.info = None
            file.told_by = "object"
        return file.info

    # --- sending ---

    def _begin(
        self, threads: ThreadPoolExecutor, round_: list[_Media], listings: Mapping[str, ListingCursor]
    ) -> _Begun:
        files = [file for media in round_ for file in media.files]
        self._look_up(files, listings)
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
        return _Begun(round_, self._submit(threads, to_send, self._send), failed)

    def _ask_for_facts(self, files: Iterable[_File]) -> None:
        if self.database is None:
            return
        files = list(files)
        facts = self.database.facts_of(dict.fromkeys(file.row for file in files))
        for file in files:
            file.facts = facts.get(file.row)

    def _send(self, file: _File) -> Uploaded | Difference | Failed | None:
        """Make sure that there is an object of the file's size."""
        info = self._object(file)
        if info is not None:
            return None if info.size == file.state.size else self._difference_in_size(file, info)
        sha256 = None
        if file.facts is not None:
            if damaged := damage(file.facts, file.path, file.state.size):
                raise Damaged(damaged)
            sha256 = known_sha256(file.facts, file.path)
        file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth, sha256=sha256)
        return Uploaded(file.path, file.state.size)

    def _end_sending(self, threads: ThreadPoolExecutor, begun: _Begun) -> Iterator[Event]:
        yield from begun.failed
        differing: list[tuple[_File, Difference]] = []
        for file, outcome in self._outcomes(begun.sending):
            if isinstance(outcome, Difference):
                differing.append((file, outcome))
            elif isinstance(outcome, Uploaded):
                yield outcome
            elif outcome is not None:
                file.is_done = True
                yield outcome
        yield from self._settle(threads, differing)

    def _difference_in_size(self, file: _File, info: ObjectInfo) -> Difference | Failed | None:
        """Read both, if that can tell which is right."""
        if self.database is None:
            return Failed(file.path, "file and object differ; only Synapse's database could tell which is right")
        against = neither(file.facts, file.path, file.state.size, info.size)
        return self._difference(file, info) if against is None else Failed(file.path, against)

    def _difference(self, file: _File, info: ObjectInfo) -> Difference | None:
        """Read both; None where they are the same after all."""
        ours = digest_of_file(self.store, file.path)
        theirs = digest_of_object(self.backend, file.path, info.etag, self.bandwidth)
        return None if ours == theirs else Difference(ours, theirs)

    def _settle(self, threads: ThreadPoolExecutor, differing: list[tuple[_File, Difference]]) -> Iterator[Event]:
        """Let the database say which of two is right, and put the file in the place of the object where it is."""
        self._ask_for_facts(file for file, _ in differing)
        right: list[_File] = []
        for file, difference in differing:
            file.is_done = True
            if against := objection(file.facts, file.path, difference):
                yield Failed(file.path, against)
            else:
                right.append(file)
        for file, outcome in self._outcomes(self._submit(threads, right, self._replace)):
            if isinstance(outcome, Uploaded):
                file.is_done = False
            if outcome is not None:
                yield outcome

    def _replace(self, file: _File) -> Uploaded:
        sha256 = None if file.facts is None else known_sha256(file.facts, file.path)
        file.sent = upload(self.backend, self.store, file.path, file.state, self.bandwidth, sha256=sha256)
        return Uploaded(file.path, file.state.size, replaced=True)

    # --- proving ---

    def _prove(self, threads: ThreadPoolExecutor, round_: list[_Media]) -> Iterator[Event]:
        files = [file for media in round_ for file in media.files if not file.is_done]
        self._prove_sent([file for file in files if file.sent is not None])
        # To read is costly, and in vain for what is in use again.
        unused, used = self._parted([media for media in round_ if media.unproved])
        for file in (file for media in used for file in media.files if not file.is_done):
            file.proof = None
            yield _kept(file)
        to_read = [file for media in unused for file in media.unproved]
        self._prepare_reading(to_read)
        differing: list[tuple[_File, Difference]] = []
        for file, outcome in self._outcomes(self._submit(threads, to_read, self._prove_by_reading)):
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
        yield from self._settle(threads, [(file, difference) for file, difference in differing if not file.sent])

    def _prove_sent(self, files: Sequence[_File]) -> None:
        """See again what there is: a server may acknowledge what it does not keep."""
        self._look_up(files, self._listings(again=True))
        for file in files:
            if file.info is None or not _is_in_place(file):
                # A listing may lag behind what was sent; the object itself does not.
                file.told_by = None
            elif not may_be_archived(file.info):
                file.proof = self._cheap_proof(file)

    def _prepare_reading(self, files: Sequence[_File]) -> None:
        recorded = self.cache.proofs(file.path for file in files if file.sent is None)
        for file in files:
            file.recorded = recorded.get(file.path)
            if file.sent is None and file.told_by == "listing":
                # It may still list what is gone. Who has not sent the object himself asks for it before he trusts that.
                file.told_by = None

    def _cheap_proof(self, file: _File) -> str | None:
        """How the object is proved to be the file by what is known of it, or None."""
        info = file.info
        if info is None or info.size != file.state.size or self.verify is Verify.FULL:
            return None
        if self.verify is Verify.SIZE:
            return "size"
        if file.sent is not None:
            return "put" if info.etag and info.etag == file.sent.etag else None
        known = file.recorded
        if known is not None and info.etag:
            now = (info.etag, info.size, file.state.mtime_ns)
            if (known.etag, known.size, known.mtime_ns) == now:
                return known.how
        return None

    def _prove_by_reading(self, file: _File) -> str | Failed | Difference:
        """How the object is proved to be the file by reading the file, and the object where that does not do."""
        info = self._object(file)
        if info is None:
            return Failed(
                file.path, f"the object is not in the bucket, though it was {'sent' if file.sent else 'there'}"
            )
        if archive := archive_of(self.backend, file.path, info):
            return Failed(file.path, f"the object is archived ({archive}) and cannot be read at once")
        if proof := self._cheap_proof(file):
            return proof
        if info.size == file.state.size and self.verify is Verify.PROOF and etag_proves(self.store, file.path, info):
            return "etag"
        return self._difference(file, info) or "read"

    def _record(self, round_: list[_Media]) -> None:
        """Keep what was expensive to find out, for files that stay and for the run that deletes."""
        proofs, disproved = [], []
        for file in (file for media in round_ for file in media.files if not file.is_removed):
            proof = _lasting_proof(file)
            if proof is not None and proof != file.recorded:
                proofs.append(proof)
            elif file.recorded is not None and file.is_done:
                # It differs from its object, though ETag, size and time are the old ones: one of them rots on its disk.
                disproved.append(file.path)
        self.cache.record_proofs(proofs)
        if disproved:
            self.cache.forget_proofs(disproved)

    # --- deleting ---

    def _remove(self, round_: list[_Media]) -> Iterator[Event]:
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

    def _parted(self, round_: Sequence[_Media]) -> tuple[list[_Media], list[_Media]]:
        """The media that is still unused, and the other."""
        if not round_:
            return [], []
        found: set[tuple[str, str]] = set()
        if self.database is not None and self.unused_before is not None:
            found = self.database.still_unused([media.row for media in round_], self.unused_before)
        unused = [media for media in round_ if (media.row.origin, media.row.media_id) in found]
        used = [media for media in round_ if (media.row.origin, media.row.media_id) not in found]
        return unused, used

    # --- many at once ---

    def _submit(
        self, threads: ThreadPoolExecutor, files: Iterable[_File], work: Callable[[_File], _Result]
    ) -> dict[Future[_Result], _File]:
        def run(file: _File) -> _Result:
            if self.must_end():
                raise Stopped
            return work(file)

        return {threads.submit(run, file): file for file in files}

    def _outcomes(
        self, running: Mapping[Future[_Result], _File]
    ) -> Iterator[tuple[_File, _Result | Failed | Kept | None]]:
        """The results as they come, failures among them; None for what was not begun before the end."""
        for future in as_completed(running):
            outcome = self._result(running[future], future)
            yield running[future], outcome

    def _result(self, file: _File, future: Future[_Result]) -> _Result | Failed | Kept | None:
        try:
            result = future.result()
        except Stopped:
            return None
        except FileGone as error:
            return Kept(file.path, str(error))
        except BackendError as error:
            self._failures.count(error, self.backend)
            return Failed(file.path, reason(error))
        except (FileChanged, Damaged, OSError) as error:
            return Failed(file.path, reason(error))
        self._failures.forget()
        return result


def _remove(removals: Removals, file: _File) -> Deleted | Kept | Failed:
    try:
        file.is_removed = removals.remove(file.path, file.state)
    except OSError as error:
        return Failed(file.path, f"cannot be removed: {error.strerror}")
    if not file.is_removed:
        return Kept(file.path, "it changed meanwhile")
    return Deleted(file.path, file.state.size, file.proof or "")


def _kept(file: _File) -> Kept:
    return Kept(file.path, "in use again, or gone from Synapse's database")


def _is_in_place(file: _File) -> bool:
    """Whether the object is the one that was sent, by what is known of it."""
    if file.info is None or file.sent is None:
        return False
    return (file.info.etag, file.info.size) == (file.sent.etag, file.sent.size)


def _lasting_proof(file: _File) -> Proof | None:
    """What a later run need not find out again."""
    if file.proof in ("put", "read") and file.info is not None:
        how: How = "put" if file.proof == "put" else "read"
        return Proof(file.path, file.info.etag, file.info.size, file.state.mtime_ns, how)
    if file.sent is not None and file.proof is None and not file.is_done:
        return Proof(file.path, file.sent.etag, file.sent.size, file.state.mtime_ns, "put")
    return None


def _root_of(path: str) -> str:
    return path[: path.index("/") + 1]

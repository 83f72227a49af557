"""What all steps of a pass over the local cache share: their surroundings, and the work on one file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from backends.base import Backend
from backends.errors import BackendError, BackendUnavailable, BucketNotFound, Misconfigured, ObjectNotFound
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.cache_policy import CachePolicy, PathMarks
from storage_provider.cache_report import PassReport
from storage_provider.directories import FileState
from storage_provider.failures import Damaged, Failures, FileChanged, NoLongerWanted, Stopped, reason
from storage_provider.judgement import fits
from storage_provider.media_paths import UnsafePath
from storage_provider.media_store import MediaStore
from storage_provider.proofs import digest_of_file
from storage_provider.room import Room
from storage_provider.synapse_db import FileRow, SynapseDb
from storage_provider.temporary_files import TemporaryFile
from storage_provider.transfers import fetch, upload

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# The scan holds Python's lock, which Synapse's reactor waits for up to 5 ms at a time: it gives way often.
_ENTRIES_AT_A_TIME = 64
_BREATH_SECONDS = 0.0001


class Gate(Protocol):
    """Keeps away from files that somebody works on: uploads, downloads, thumbnailing."""

    def kept_free(self, paths: Iterable[str]) -> AbstractContextManager[dict[str, FileState | None]]:
        """Those of the paths that nobody uses, to put files there or to remove them within the block.

        The state of each file that has been put there is to be noted beside its path.
        """


class UntilStopped(Bandwidth):
    """As fast as it goes until the end is wanted; a file that is begun is broken off then, as Synapse ends as well."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(None, stop)

    def spend(self, size: int, *, is_begun: bool = False) -> None:
        if self._stop.is_set():
            raise Stopped


@dataclass
class CachePass:
    """The surroundings of one pass."""

    backend: Backend
    store: MediaStore
    database: SynapseDb
    policy: CachePolicy
    room: Room
    gate: Gate
    is_accessed: Callable[[CachedMedia], bool]
    """Whether media is being used, which its row does not say yet."""
    stored: frozenset[Kind]
    """The kinds of media that go into the bucket."""
    heals: bool
    threads: ThreadPoolExecutor
    workers: int
    stop: threading.Event
    in_vain: PathMarks
    """What the bucket was asked about without use: it is not asked again for a day."""
    now: int
    report: PassReport = field(default_factory=PassReport)
    _failures: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        self.bandwidth = UntilStopped(self.stop)

    @property
    def young_since(self) -> int:
        """What was put on disk at this moment or later is left alone."""
        return self.now - self.policy.min_age

    def gently(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items, with pauses in which Synapse goes on. Raises `Stopped`."""
        for number, item in enumerate(items):
            if number % _ENTRIES_AT_A_TIME == 0 and self.stop.wait(_BREATH_SECONDS):
                raise Stopped
            yield item

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def result(self, path: str, future: Future[_Result]) -> _Result | None:
        """What came of the work that a thread did on a file, as `outcome`."""
        return self.outcome(path, future.result)

    def outcome(self, path: str, work: Callable[[], _Result]) -> _Result | None:
        """What comes of the work on a file; None where nothing does, after that has been noted.

        Raises `BucketFails`, and `SynapseDbError` at once.
        """
        try:
            result = work()
        except (Stopped, NoLongerWanted, FileExistsError):
            return None
        except ObjectNotFound:
            self._failures.forget()
            self.in_vain.add(path)
            self.report.not_in_bucket += 1
            return None
        except BackendError as error:
            if not isinstance(error, (BackendUnavailable, BucketNotFound, Misconfigured)):
                self.in_vain.add(path)
            self.report.failed.add(f"{path}: {reason(error)}")
            self._failures.count(error, self.backend)
            return None
        except Damaged as error:
            self._failures.forget()
            self.in_vain.add(path)
            self.report.damaged.add(f"{path}: {error}")
            return None
        except (UnsafePath, OSError) as error:
            self.in_vain.add(path)
            self.report.failed.add(f"{path}: {reason(error)}")
            return None
        except FileChanged:
            return None
        self._failures.forget()
        return result

    def used(self, row: FileRow) -> int:
        """When a media was used last: now, where it is being used and its row does not say so yet."""
        return self.now if self.is_accessed(row.row) else row.used

    # --- the work on one file ---

    def fetch_anew(self, path: str, row: FileRow) -> TemporaryFile:
        """Download an object into a file that is finished, and has no place in the store yet.

        Raises `Damaged` when it is not what the database says.
        """
        temporary = self.store.temporary_file(path)
        try:
            fetch(self.backend, path, temporary.file, self.bandwidth, length=row.length, sha256=row.sha256)
            temporary.finish(self.mtime(row))
        except BaseException:
            temporary.discard()
            raise
        return temporary

    def mend(self, path: str, row: FileRow, state: FileState) -> FileState | None:
        """Replace a damaged file by its object; None where somebody uses the path or it has changed meanwhile.

        Raises as `fetch_anew`, and `NoLongerWanted` when the database does not want it any more.
        """
        with self.fetch_anew(path, row) as temporary, self.gate.kept_free([path]) as kept:
            if path not in kept:
                return None
            if not self.database.wanted([row.row]):
                raise NoLongerWanted
            kept[path] = temporary.replace(path, state)
            return kept[path]

    def remove(self, path: str, state: FileState) -> bool:
        """Remove a file unless somebody uses it or it has changed."""
        with self.gate.kept_free([path]) as kept:
            return path in kept and self.store.remove(path, state)

    def upload_if_right(self, path: str, row: FileRow, state: FileState) -> bool:
        """Send a file that is what the database says; False where it is not."""
        facts = self.database.facts(row.row)
        if facts is None or facts.quarantined:
            raise NoLongerWanted
        if not fits(facts, path, digest_of_file(self.store, path)):
            return False
        upload(self.backend, self.store, path, state, self.bandwidth)
        return True

    def mtime(self, row: FileRow) -> float:
        """Seconds; never in the future, whatever the row says."""
        return max(min(row.used, self.now), 0) / 1000

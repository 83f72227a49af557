"""What all steps of a pass over the local cache share: their surroundings, and the work on one file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from backends.base import Backend
from backends.errors import BackendError, BackendUnavailable, BucketNotFound, ObjectNotFound
from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.cache_policy import CachePolicy, PathMarks
from storage_provider.cache_report import PassReport
from storage_provider.media_store import FileState, MediaStore, TemporaryFile, UnsafePath
from storage_provider.synapse_db import FileRow, SynapseDb
from storage_provider.transfers import (
    Bandwidth,
    Damaged,
    Failures,
    FileChanged,
    NoLongerWanted,
    Stopped,
    digest_of_file,
    fetch,
    fits,
    reason,
    upload,
)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# The scan holds Python's lock, which Synapse's reactor waits for up to 5 ms at a time: it gives way often.
_ENTRIES_AT_A_TIME = 64
_BREATH_SECONDS = 0.0001


class Gate(Protocol):
    """Keeps away from files that somebody works on: uploads, downloads, thumbnailing."""

    def unless_in_use(self, path: str, action: Callable[[], _Result]) -> _Result | None:
        """Run `action`, which gives a file its name or takes one away; None where the path is in use."""


class UntilStopped(Bandwidth):
    """As fast as it goes, until the end is wanted."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(None, stop)
        self._ended = stop

    def spend(self, size: int, *, is_begun: bool = False) -> None:
        if self._ended.is_set():
            raise Stopped


@dataclass
class CachePass:
    """The surroundings of one pass."""

    backend: Backend
    store: MediaStore
    database: SynapseDb
    policy: CachePolicy
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
    """What the bucket was asked about without use: it is not asked again before the next full listing."""
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
        """What came of the work on a file; None where nothing did, after that has been noted.

        Raises `BucketFails`, and `SynapseDbError` at once.
        """
        try:
            result = future.result()
        except (Stopped, NoLongerWanted, FileExistsError):
            return None
        except ObjectNotFound:
            self._failures.forget()
            self.in_vain.add(path)
            self.report.not_in_bucket += 1
            return None
        except BackendError as error:
            if not isinstance(error, (BackendUnavailable, BucketNotFound)):
                self.in_vain.add(path)
            self.report.failed.add(f"{path}: {reason(error)}")
            self._failures.count(error)
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

    def is_wanted(self, row: FileRow) -> bool:
        """Whether the database knows the media at this moment, and has not quarantined it."""
        return bool(self.database.wanted([row.row]))

    def fetch_anew(
        self, path: str, row: FileRow, place: Callable[[TemporaryFile], FileState | None]
    ) -> FileState | None:
        """Download an object, and let `place` put it in the store; None where somebody uses the path.

        Raises `Damaged` when it is not what the database says, `NoLongerWanted` when that does not
        want it any more.
        """

        def place_if_wanted() -> FileState | None:
            if not self.is_wanted(row):
                raise NoLongerWanted
            return place(temporary)

        with self.store.temporary_file() as temporary:
            fetch(self.backend, path, temporary.file, self.bandwidth, length=row.length, sha256=row.sha256)
            # Before anybody has to wait for the path.
            temporary.sync(self.mtime(row))
            return self.gate.unless_in_use(path, place_if_wanted)

    def mend(self, path: str, row: FileRow, state: FileState) -> FileState | None:
        """Replace a damaged file by its object; None also where it has changed meanwhile."""
        return self.fetch_anew(path, row, lambda temporary: temporary.replace(path, state, self.mtime(row)))

    def remove(self, path: str, state: FileState) -> bool:
        """Remove a file unless somebody uses it or it has changed."""
        return bool(self.gate.unless_in_use(path, lambda: self.store.remove(path, state)))

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

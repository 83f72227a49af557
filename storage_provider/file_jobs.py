"""Work on many files at once, in which a file that fails is told apart from a bucket that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import TypeVar

from backends.base import Backend
from backends.errors import BackendError
from storage_provider.failures import Damaged, Failed, Failures, FileChanged, FileGone, Stopped, reason
from storage_provider.offload_events import Kept
from storage_provider.offload_files import File

_Result = TypeVar("_Result")


class FileJobs:
    """Threads that work on files; a context manager, at whose end nothing is under way any more.

    Once `must_end` says so, nothing new is begun.
    """

    def __init__(self, backend: Backend, workers: int, must_end: Callable[[], bool]) -> None:
        self._backend = backend
        self._must_end = must_end
        self._failures = Failures()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="transfer")

    def __enter__(self) -> FileJobs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def check(self) -> None:
        """At the end of a run, see whether a bucket that failed still does; raises `BucketFails` then."""
        self._failures.check(self._backend)

    def submit(self, files: Iterable[File], work: Callable[[File], _Result]) -> dict[Future[_Result], File]:
        """Begin the work on each of the files."""

        def run(file: File) -> _Result:
            if self._must_end():
                raise Stopped
            return work(file)

        return {self._threads.submit(run, file): file for file in files}

    def outcomes(
        self, running: Mapping[Future[_Result], File]
    ) -> Iterator[tuple[File, _Result | Failed | Kept | None]]:
        """The results as they come, failures among them; None for what was not begun before the end.

        Raises `BucketFails` when so much went wrong in a row that the bucket must be at fault.
        """
        for future in as_completed(running):
            outcome = self._outcome(running[future], future)
            yield running[future], outcome

    def _outcome(self, file: File, future: Future[_Result]) -> _Result | Failed | Kept | None:
        try:
            result = future.result()
        except Stopped:
            return None
        except FileGone as error:
            return Kept(file.path, str(error))
        except BackendError as error:
            self._failures.count(error, self._backend)
            return Failed(file.path, reason(error))
        except (FileChanged, Damaged, OSError) as error:
            return Failed(file.path, reason(error))
        self._failures.forget()
        return result

"""What goes wrong while files are moved, and when it is so much that the bucket must be at fault."""

from __future__ import annotations

from dataclasses import dataclass

from backends.base import Backend
from backends.errors import EXPIRED_CREDENTIALS, AccessDenied, BackendError, BucketNotFound, Misconfigured

# Failures one after another, with no success between them, after which the bucket is given up.
_FAILURES_IN_A_ROW = 20


@dataclass(frozen=True)
class Failed:
    """Something could not be done with a file; nothing was lost."""

    path: str
    reason: str


class FileChanged(Exception):
    """The file was changed while it was in use."""


class FileGone(FileChanged):
    """There is no such file any more."""


class Damaged(Exception):
    """A content is not what the database says it should be."""


class NoLongerWanted(Exception):
    """The database does not know the media any more, or has quarantined it."""


class Stopped(Exception):
    """The run was asked to end."""


class DiskFull(Exception):
    """There is no room for another file."""


class BucketFails(Exception):
    """So much went wrong in a row that going on would fail for every file."""


class Failures:
    """Tells a bucket that fails from files that do."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._unreadable_in_a_row = 0
        self._last: BackendError | None = None

    def forget(self) -> None:
        """Something has succeeded."""
        self._in_a_row = self._unreadable_in_a_row = 0

    def count(self, error: BackendError, backend: Backend) -> None:
        """Take a failure in. Raises `BucketFails` when it was one too many, and `Misconfigured` as it is.

        Objects that may not be read can be many in a row (another encryption key, an owner of their own): where they
        are all that failed, and the bucket itself can be reached, there are never too many.
        """
        if error.retryable or isinstance(error, (AccessDenied, BucketNotFound, Misconfigured)):
            self._in_a_row += 1
            self._unreadable_in_a_row += _is_unreadable_object(error)
            self._last = error
            if self._in_a_row >= _FAILURES_IN_A_ROW:
                if isinstance(error, Misconfigured):
                    raise error
                if self._unreadable_in_a_row != self._in_a_row or not _is_reachable(backend):
                    raise BucketFails(f"the bucket fails again and again, last with: {error}") from error
                self.forget()

    def check(self, backend: Backend) -> None:
        """At the end of a run in which the bucket failed, see whether it still does; raises as `count`."""
        if self._last is None:
            return
        try:
            backend.check()
        except Misconfigured:
            raise
        except AccessDenied as error:
            # Who may not list is told so every time.
            if error.code in EXPIRED_CREDENTIALS:
                raise BucketFails(f"the bucket cannot be reached any more: {error}") from error
        except BackendError as error:
            raise BucketFails(f"the bucket cannot be reached any more: {error}") from error


def _is_unreadable_object(error: BackendError) -> bool:
    is_refusal = isinstance(error, AccessDenied) and error.code not in EXPIRED_CREDENTIALS
    return is_refusal and error.operation in ("open", "stat")


def _is_reachable(backend: Backend) -> bool:
    try:
        backend.check()
    except BackendError:
        return False
    return True


def reason(error: Exception) -> str:
    """What went wrong, for the operator who is told the path beside it."""
    if isinstance(error, BackendError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)

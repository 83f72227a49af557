"""When failures are those of the bucket, and when those of files."""

from __future__ import annotations

from typing import Any

import pytest

from backends.base import Backend
from backends.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    Misconfigured,
    ObjectNotFound,
    RequestRejected,
)
from storage_provider.failures import BucketFails, Failures
from tests.jobs.memory_backend import MemoryBackend


def count(failures: Failures, error: BackendError, times: int, backend: Backend | None = None) -> None:
    for _ in range(times):
        failures.count(error, backend or MemoryBackend())


@pytest.mark.parametrize("kind", [BackendUnavailable, AccessDenied])
def test_bucket_is_given_up_after_failures_in_a_row(kind: type[BackendError]) -> None:
    failures = Failures()
    error = kind("so it is", operation="put", key="k")
    count(failures, error, 19)
    failures.forget()
    count(failures, error, 19)
    with pytest.raises(BucketFails, match="so it is"):
        count(failures, error, 1)


def test_settings_that_cannot_be_used_any_more_are_told_as_such() -> None:
    failures = Failures()
    error = Misconfigured("no such file", operation="put", key="k")
    count(failures, error, 19)
    with pytest.raises(Misconfigured):
        count(failures, error, 1)
    bucket: Any = Checked(error)
    with pytest.raises(Misconfigured):
        failures.check(bucket)


@pytest.mark.parametrize("kind", [ObjectNotFound, RequestRejected])
def test_failures_of_files_are_not_those_of_the_bucket(kind: type[BackendError]) -> None:
    count(Failures(), kind("so it is", operation="put", key="k"), 100)


@pytest.mark.parametrize("operation", ["open", "stat"])
def test_objects_that_may_not_be_read_are_no_failure_of_a_bucket_that_can_be_reached(operation: str) -> None:
    backend = MemoryBackend()
    count(Failures(), AccessDenied("so it is", operation=operation, key="k", code="AccessDenied"), 100, backend)
    assert backend.calls == [("check", "")] * 5


def test_objects_that_may_not_be_read_are_too_many_where_the_bucket_may_not_be_either() -> None:
    backend = MemoryBackend()
    refusal = AccessDenied("so it is", operation="open", key="k")

    def refuse(_operation: str, _key: str) -> None:
        raise refusal

    backend.before = refuse
    with pytest.raises(BucketFails, match="so it is"):
        count(Failures(), refusal, 20, backend)


@pytest.mark.parametrize(
    "other",
    [
        BackendUnavailable("other", operation="open", key="k"),
        AccessDenied("other", operation="put", key="k"),
        AccessDenied("other", operation="open", key="k", code="ExpiredToken"),
    ],
    ids=["unavailable", "put", "expired"],
)
def test_objects_that_may_not_be_read_excuse_no_other_failure(other: BackendError) -> None:
    failures, backend = Failures(), MemoryBackend()
    count(failures, other, 1, backend)
    refusal = AccessDenied("so it is", operation="open", key="k")
    count(failures, refusal, 18, backend)
    with pytest.raises(BucketFails):
        count(failures, refusal, 1, backend)
    assert backend.calls == []


class Checked:
    """A bucket of which only the check is asked."""

    def __init__(self, error: BackendError | None) -> None:
        self._error = error
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(
    ("error", "gives_up"),
    [
        (None, False),
        (BackendUnavailable("down", operation="check"), True),
        (AccessDenied("expired", operation="check", code="ExpiredToken"), True),
        # Who may not list can reach the bucket all the same.
        (AccessDenied("no", operation="check", code="AccessDenied"), False),
    ],
)
def test_bucket_that_failed_is_looked_at_again_in_the_end(error: BackendError | None, gives_up: bool) -> None:
    bucket: Any = Checked(error)
    failures = Failures()
    failures.check(bucket)
    assert bucket.checks == 0
    failures.count(BackendUnavailable("down", operation="put", key="k"), bucket)
    if gives_up:
        with pytest.raises(BucketFails):
            failures.check(bucket)
    else:
        failures.check(bucket)
    assert bucket.checks == 1

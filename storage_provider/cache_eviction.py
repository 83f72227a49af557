"""Eviction: removes files that the policy does not keep, once each is proved to be whole in the bucket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from backends.errors import ObjectNotFound
from storage_provider.cache_pass import CachePass
from storage_provider.cache_policy import EvictionPlan, space_of
from storage_provider.directories import FileState
from storage_provider.failures import Damaged
from storage_provider.judgement import fits
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.proofs import archive_of, digest_of_file, digest_of_object, etag_proves
from storage_provider.reconcile import expected_files, reconcile
from storage_provider.synapse_db import FileRow
from storage_provider.transfers import run_at_once, upload

# So few that little time passes between asking database and bucket about a file and removing it.
_FILES_IN_A_ROUND = 200


@dataclass(frozen=True)
class _Candidate:
    path: str
    row: FileRow
    state: FileState


class _Finding(Enum):
    """What the comparison of a file with its object came to."""

    SAME = auto()
    OBJECT_REPLACED = auto()
    OBJECT_UPLOADED = auto()
    FILE_REPLACED = auto()


def evict(work: CachePass, plan: EvictionPlan) -> None:
    """Remove what the plan names, in rounds of bounded size."""
    for root in MEDIA_ROOTS:
        candidates = _candidates(work, plan, root)
        while round_ := list(itertools.islice(candidates, _FILES_IN_A_ROUND)):
            _remove(work, plan, list(_proved(work, round_)))
            work.check_stop()


def _candidates(work: CachePass, plan: EvictionPlan, root: str) -> Iterator[_Candidate]:
    expected = expected_files(work.database, root, used_before=plan.before)
    for path, row, file, _ in work.gently(reconcile(expected, work.store.walk_files(root))):
        if row is None or file is None or row.quarantined:
            continue
        if (
            file.placed_ms < work.young_since
            and path not in work.in_vain
            and plan.takes(work.used(row), file.state.size)
        ):
            yield _Candidate(path, row, file.state)


def _proved(work: CachePass, round_: list[_Candidate]) -> Iterator[_Candidate]:
    """Those whose object is the same; objects and files that are wrong are put right meanwhile."""

    def compare(candidate: _Candidate) -> _Finding | None:
        return _compare(work, candidate)

    report = work.report
    for candidate, future in run_at_once(work.threads, compare, round_, at_most=len(round_)):
        finding = work.result(candidate.path, future)
        if finding is _Finding.SAME:
            yield candidate
        elif finding is _Finding.OBJECT_REPLACED:
            report.replaced.add(candidate.state.size)
        elif finding is _Finding.OBJECT_UPLOADED:
            report.uploaded.add(candidate.state.size)
        elif finding is _Finding.FILE_REPLACED:
            report.mended.add(candidate.row.length)


def _compare(work: CachePass, candidate: _Candidate) -> _Finding | None:
    """Compare a file with its object as both are now; where they differ the database judges.

    What has been put right is left to the next pass.
    """
    work.check_stop()
    path, row, state = candidate.path, candidate.row, candidate.state
    try:
        info = work.backend.stat(path)
    except ObjectNotFound:
        if work.heals and row.row.kind in work.stored and work.upload_if_right(path, row, state):
            return _Finding.OBJECT_UPLOADED
        raise
    if archive := archive_of(work.backend, path, info):
        raise Damaged(f"its object is archived ({archive}) and cannot be read at once")
    if info.size == state.size and etag_proves(work.store, path, info):
        return _Finding.SAME
    ours = digest_of_file(work.store, path)
    theirs = digest_of_object(work.backend, path, info.etag, work.bandwidth)
    if ours == theirs:
        return _Finding.SAME
    facts = work.database.facts(row.row)
    if facts is None or facts.quarantined:
        return None
    file_is_right, object_is_right = fits(facts, path, ours), fits(facts, path, theirs)
    if file_is_right == object_is_right:
        raise Damaged(f"file and object differ, and {'both' if file_is_right else 'none'} may be right")
    if file_is_right:
        upload(work.backend, work.store, path, state, work.bandwidth)
        return _Finding.OBJECT_REPLACED
    return None if work.mend(path, row, state) is None else _Finding.FILE_REPLACED


def _remove(work: CachePass, plan: EvictionPlan, proved: list[_Candidate]) -> None:
    if not proved:
        return
    # Before the first removal: what is gone must be known to be gone on purpose.
    work.store.set_offloaded_before(plan.before)
    evictable = work.database.evictable([candidate.row.row for candidate in proved], plan.before)
    for path, row, state in ((each.path, each.row, each.state) for each in proved):
        if (row.origin, row.media_id) not in evictable or work.used(row) >= plan.before:
            continue
        try:
            removed = work.remove(path, state)
        except OSError as error:
            work.in_vain.add(path)
            work.report.failed.add(f"{path}: cannot be removed: {error.strerror}")
            continue
        if removed:
            work.report.evicted.add(space_of(state.size))

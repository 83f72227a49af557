"""Whole downloads are brought to the disk together, and each fares by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from backends.errors import ContentDamaged
from storage_provider.keeping import Keeping, Whole
from storage_provider.media_paths import UnsafePath
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Fingerprint, LateDigest
from storage_provider.temporary_files import TemporaryFile
from tests.temporary_files import temporary_files

CONTENT = b"content"


def path_of(number: int) -> str:
    return f"local_content/AB/CD/file{number}"


class World:
    """Keeping for a real directory, in a thread that the test moves."""

    def __init__(self, root: Path) -> None:
        self.store = MediaStore(root)
        self.keeping = Keeping(
            self.store, self._do_in_background, self._choose, lambda contents: contents.keys() & self.refuted
        )
        self.refused: set[str] = set()
        self.refuted: set[str] = set()
        self.questions: list[list[str]] = []
        self.outcomes: dict[str, list[object]] = {}
        self.choosing_fails = False
        self._jobs: list[tuple[Callable[[], Any], Deferred[Any]]] = []

    def _do_in_background(self, job: Callable[[], Any]) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()
        self._jobs.append((job, done))
        return done

    def _choose(self, contents: Mapping[str, Fingerprint]) -> Collection[str]:
        self.questions.append(list(contents))
        if self.choosing_fails:
            raise ArithmeticError
        return contents.keys() - self.refused

    @property
    def temporary(self) -> list[Path]:
        return temporary_files(self.store.root, os.getpid())

    def prepare(self, *numbers: int, at_once: bool = False) -> None:
        for number in numbers:
            path = path_of(number)
            whole = Whole(path, CONTENT, LateDigest(CONTENT))
            prepared = self.keeping.prepare_at_once(whole) if at_once else self.keeping.prepare(whole)
            prepared.addBoth(self.outcomes.setdefault(path, []).append)

    def work(self) -> int:
        """Do what was begun by now; how many jobs that is."""
        jobs, self._jobs = self._jobs, []
        for job, done in jobs:
            try:
                result = job()
            except Exception:
                done.errback()
            else:
                done.callback(result)
        return len(jobs)

    def outcome(self, number: int) -> object:
        (outcome,) = self.outcomes[path_of(number)]
        return outcome

    def file(self, number: int) -> TemporaryFile:
        outcome = self.outcome(number)
        assert isinstance(outcome, TemporaryFile)
        return outcome


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for outcomes in world.outcomes.values():
        for outcome in outcomes:
            if isinstance(outcome, TemporaryFile):
                outcome.discard()
    assert world.temporary == []


def test_a_file_needs_no_more_than_its_name(world: World) -> None:
    world.prepare(0)
    world.work()
    world.file(0).link()
    assert (world.store.root / path_of(0)).read_bytes() == CONTENT


def test_what_comes_while_others_are_brought_goes_together_next(world: World) -> None:
    world.prepare(0, 1, 2)
    assert world.work() == 1
    assert world.work() == 1
    assert world.questions == [[path_of(0)], [path_of(1), path_of(2)]]
    assert world.work() == 0
    assert all(world.file(number) for number in range(3))


def test_not_too_many_wait_for_one_another(world: World) -> None:
    world.prepare(*range(130))
    while world.work():
        pass
    assert [len(asked) for asked in world.questions] == [1, 50, 50, 29]
    assert all(world.file(number) for number in range(130))


def test_what_comes_to_a_disk_that_does_not_keep_up_is_not_kept(world: World) -> None:
    world.prepare(*range(1 + 200 + 1))
    assert world.outcome(201) is None
    while world.work():
        pass
    assert all(world.file(number) for number in range(201))
    world.prepare(202)
    world.work()
    assert world.file(202)


def test_two_contents_of_one_path_are_asked_for_one_after_the_other(world: World) -> None:
    world.prepare(0, 1, 1)
    while world.work():
        pass
    assert world.questions == [[path_of(0)], [path_of(1)], [path_of(1)]]
    assert len(world.outcomes[path_of(1)]) == 2


def test_what_is_not_chosen_is_none_and_the_others_are_prepared(world: World) -> None:
    world.refused.add(path_of(1))
    world.prepare(0, 1, 2)
    while world.work():
        pass
    assert world.outcome(1) is None
    assert world.file(2)
    assert len(world.temporary) == 2


def test_what_the_disk_does_not_take_fails_alone(world: World) -> None:
    blocking = world.store.root / "local_content" / "AB"
    blocking.parent.mkdir()
    blocking.write_bytes(b"no directory")
    other = "local_content/XY/CD/other"
    world.prepare(0, 1)
    for path in ("no path of media", other):
        prepared = world.keeping.prepare(Whole(path, CONTENT, LateDigest(CONTENT)))
        prepared.addBoth(world.outcomes.setdefault(path, []).append)
    while world.work():
        pass
    for path, error in ((path_of(0), OSError), (path_of(1), OSError), ("no path of media", UnsafePath)):
        (outcome,) = world.outcomes[path]
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.value, error)
    assert isinstance(world.outcomes[other][0], TemporaryFile)
    assert len(world.temporary) == 1


def test_where_nobody_can_choose_all_fail_and_the_next_ones_are_asked_for(world: World) -> None:
    world.choosing_fails = True
    world.prepare(0)
    world.work()
    outcome = world.outcome(0)
    assert isinstance(outcome, Failure)
    assert isinstance(outcome.value, ArithmeticError)
    world.choosing_fails = False
    world.prepare(1)
    world.work()
    assert world.file(1)


def test_a_file_that_somebody_waits_for_does_not_wait_for_others(world: World) -> None:
    world.refused.add(path_of(2))
    world.prepare(0, 1)
    world.prepare(2, at_once=True)
    assert world.work() == 2
    # Nor is anybody asked whether it may stay.
    assert world.questions == [[path_of(0)]]
    assert world.file(2)
    world.work()


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_file_that_was_given_stays_open_whatever_comes_of_it(world: World, is_refused: bool) -> None:
    (world.store.root / "local_content").write_bytes(b"no directory")
    if is_refused:
        world.refused.add(path_of(0))
    with MediaStore(world.store.root).temporary_file("remote_content/a.org/AB/CD/efgh") as file:
        file.write_at(CONTENT, 0)
        prepared = world.keeping.prepare(Whole(path_of(0), file, LateDigest(CONTENT)))
        outcomes: list[object] = []
        prepared.addBoth(outcomes.append)
        world.work()
        assert (outcomes == [None]) is is_refused
        assert not file.file.closed


def test_a_file_that_is_not_what_it_should_be_is_not_prepared_though_somebody_waits_for_it(world: World) -> None:
    world.refuted = {path_of(1)}
    world.prepare(1, 2, at_once=True)
    world.work()
    outcome = world.outcome(1)
    assert isinstance(outcome, Failure)
    assert isinstance(outcome.value, ContentDamaged)
    world.file(2).discard()
    assert world.temporary == []

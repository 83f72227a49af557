"""Who waits for the check of the bucket, and what it comes to."""

from __future__ import annotations

from typing import Any, cast

import pytest
from synapse.api.errors import SynapseError
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.python.failure import Failure

from storage_provider.bucket_check import BucketCheck
from storage_provider.settings import ProviderSettings
from storage_provider.startup_check import Problem
from tests.provider.scripted_bucket import ImmediateReactor, ManualThreads


class Answers:
    """Takes the place of the questions to the bucket."""

    def __init__(self) -> None:
        self.next: Problem | Exception | None = None
        self.count = 0

    def __call__(self, *_arguments: object) -> Problem | None:
        self.count += 1
        if isinstance(self.next, Exception):
            raise self.next
        return self.next


class World:
    def __init__(self, answers: Answers, **settings: Any) -> None:
        self.answers = answers
        self.threads = ManualThreads()
        parsed = ProviderSettings.parse({"bucket": "media", "prefix": "media", **settings})
        threads, reactor = cast(Any, self.threads), ImmediateReactor()
        self.check = BucketCheck(parsed, [], cast(Any, None), reactor, threads)

    def ask(self) -> list[int | None]:
        """Will hold the status of the refusal, or None where there is none."""
        told: list[int | None] = []
        asking: Deferred[None] = ensureDeferred(cast(Any, self.check.refuse_while_media_is_hidden()))
        asking.addCallbacks(lambda _: told.append(None), lambda failure: told.append(_status(failure)))
        return told


def _status(failure: Failure) -> int:
    assert isinstance(failure.value, SynapseError)
    return failure.value.code


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr("storage_provider.bucket_check.find_problem", answers)
    return answers


def test_all_who_come_before_the_answer_wait_for_the_same_check_and_nobody_later(answers: Answers) -> None:
    world = World(answers)
    first, second = world.ask(), world.ask()
    assert (first, second) == ([], [])
    world.threads.work()
    assert (first, second, answers.count) == ([None], [None], 1)
    assert world.ask() == [None]
    assert answers.count == 1


def test_a_check_that_could_not_tell_is_repeated_for_the_next_one_who_asks(answers: Answers) -> None:
    world = World(answers)
    for answer, status in [
        (Problem("no answer", may_hide_media=True), 502),
        (Problem("no answer", may_hide_media=True), 502),
        (Problem("another spelling", hides_media=True), 500),
    ]:
        answers.next = answer
        told = world.ask()
        world.threads.work()
        assert told == [status]
    assert world.ask() == [500]
    assert answers.count == 3


def test_a_check_that_breaks_is_told_and_lets_nobody_wait_for_ever(
    answers: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(answers)
    answers.next = RuntimeError("nobody has thought of this")
    told = world.ask()
    world.threads.work()
    assert told == [502]
    assert "nobody has thought of this" in caplog.text


@pytest.mark.parametrize("settings", [{"check_on_startup": "off"}, {"prefix": "media/"}, {"raw_prefix": True}])
def test_nobody_waits_where_the_prefix_is_clear_or_nothing_is_to_be_asked(
    answers: Answers, settings: dict[str, Any]
) -> None:
    assert World(answers, **settings).ask() == [None]
    assert answers.count == 0

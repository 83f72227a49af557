"""Nobody changes what stands at a path that somebody uses, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred, ensureDeferred

from storage_provider.directories import FileState
from storage_provider.paths_in_use import PathsInUse
from tests.provider.site import PATIENCE, Task

PATH = "local_content/AB/CD/efgh"
OTHER = "local_content/AB/CD/ijkl"
STATE = FileState(1, 2, 3)


class Reactor:
    """Lets calls of threads wait until the test lets them in."""

    def __init__(self) -> None:
        self._called = threading.Condition()
        self._calls: list[Callable[[], Any]] = []

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        with self._called:
            self._calls.append(lambda: function(*args))
            self._called.notify_all()

    def turn(self) -> None:
        """Wait for a call, and let in all that there are."""
        with self._called:
            assert self._called.wait_for(lambda: bool(self._calls), PATIENCE), "nobody calls"
            calls, self._calls = self._calls, []
        for call in calls:
            call()


def unless_in_use(paths: PathsInUse, path: str, action: Callable[[], Any]) -> Any:
    """What comes of a change; None where the path is in use."""
    with paths.kept_free([path]) as kept:
        if path not in kept:
            return None
        result = action()
        kept[path] = result if isinstance(result, FileState) else None
        return result


class World:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.freed: list[str] = []
        self.paths = PathsInUse(cast(Any, self.reactor), self.freed.append)

    def change(self, path: str, action: Callable[[], Any] = lambda: "done") -> Any:
        """What comes of a change that another thread makes."""
        begun: list[bool] = []

        def act() -> Any:
            begun.append(True)
            return action()

        changing = Task(lambda: unless_in_use(self.paths, path, act))
        self.reactor.turn()
        result = changing.result()
        if begun:
            self.reactor.turn()
        return result

    def held_change(self, path: str, result: object = None) -> tuple[Task[Any], threading.Event]:
        """A change that is under way until the event is set."""
        begun, end = threading.Event(), threading.Event()

        def act() -> object:
            begun.set()
            assert end.wait(PATIENCE)
            return result

        changing = Task(lambda: unless_in_use(self.paths, path, act))
        self.reactor.turn()
        assert begun.wait(PATIENCE)
        return changing, end


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.paths.close()


def waiting_for_change(world: World, path: str) -> Deferred[FileState | None]:
    return ensureDeferred(cast(Any, world.paths.change(path)))


def result_of(deferred: Deferred[Any]) -> object:
    results: list[object] = []
    deferred.addBoth(results.append)
    assert results, "it is not over"
    return results[0]


def test_a_path_is_free_until_it_is_used_and_after_the_last_one_has_ended(world: World) -> None:
    paths = world.paths
    assert paths.is_free(PATH)
    paths.begin(PATH)
    paths.begin(PATH)
    paths.end(PATH)
    assert not paths.is_free(PATH)
    assert world.freed == []
    paths.end(PATH)
    assert paths.is_free(PATH)
    assert world.freed == [PATH]


def test_a_path_is_used_within_a_block_whatever_happens_in_it(world: World) -> None:
    with pytest.raises(RuntimeError), world.paths.used(PATH):
        assert not world.paths.is_free(PATH)
        raise RuntimeError
    assert world.paths.is_free(PATH)
    assert world.freed == [PATH]


def test_other_paths_are_of_no_concern(world: World) -> None:
    with world.paths.used(OTHER):
        assert world.paths.is_free(PATH)
        assert world.change(PATH) == "done"


def test_nothing_is_done_to_a_path_that_is_in_use(world: World) -> None:
    actions: list[str] = []
    with world.paths.used(PATH):
        assert world.change(PATH, lambda: actions.append("done")) is None
    assert actions == []
    assert world.change(PATH) == "done"


def test_two_changes_of_one_path_are_not_made_at_once(world: World) -> None:
    changing, end = world.held_change(PATH)
    assert not world.paths.is_free(PATH)
    second = Task(lambda: unless_in_use(world.paths, PATH, lambda: "done"))
    world.reactor.turn()
    assert second.result() is None
    end.set()
    changing.result()
    world.reactor.turn()
    assert world.paths.is_free(PATH)
    assert world.freed == [PATH]


def test_of_many_paths_those_are_left_out_that_are_in_use(world: World) -> None:
    def change() -> list[str]:
        with world.paths.kept_free([OTHER, PATH]) as kept:
            kept[PATH] = STATE
            return list(kept)

    with world.paths.used(OTHER):
        changing = Task(change)
        world.reactor.turn()
        assert changing.result() == [PATH]
        waiting = waiting_for_change(world, PATH)
        world.reactor.turn()
        assert result_of(waiting) == STATE
        assert world.freed == [PATH]


def test_who_uses_a_path_meanwhile_learns_what_was_put_there_when_it_is_there(world: World) -> None:
    changing, end = world.held_change(PATH, STATE)
    world.paths.begin(PATH)
    waiting = [waiting_for_change(world, PATH) for _ in range(2)]
    assert not any(each.called for each in waiting)
    end.set()
    assert changing.result() == STATE
    world.reactor.turn()
    assert [result_of(each) for each in waiting] == [STATE, STATE]
    assert world.freed == []  # it is still in use
    world.paths.end(PATH)
    assert world.freed == [PATH]


def test_a_change_that_put_nothing_there_is_told_as_nothing(world: World) -> None:
    changing, end = world.held_change(PATH, True)
    waiting = waiting_for_change(world, PATH)
    end.set()
    changing.result()
    world.reactor.turn()
    assert result_of(waiting) is None


def test_where_nothing_changes_nobody_waits(world: World) -> None:
    assert result_of(waiting_for_change(world, PATH)) is None
    world.change(PATH, lambda: STATE)
    assert result_of(waiting_for_change(world, PATH)) is None


def test_a_change_that_fails_leaves_the_path_free(world: World) -> None:
    def fail() -> None:
        raise OSError("no")

    changing = Task(lambda: unless_in_use(world.paths, PATH, fail))
    world.reactor.turn()
    with pytest.raises(OSError, match="no"):
        changing.result()
    world.reactor.turn()
    assert world.paths.is_free(PATH)
    assert world.change(PATH) == "done"


def test_at_the_end_nobody_waits_for_an_answer_and_nothing_more_is_changed(world: World) -> None:
    actions: list[str] = []
    asking = [Task(lambda: unless_in_use(world.paths, PATH, lambda: actions.append("done"))) for _ in range(3)]
    with world.reactor._called:
        assert world.reactor._called.wait_for(lambda: len(world.reactor._calls) == 3, PATIENCE)
    world.paths.close()
    assert [each.result() for each in asking] == [None] * 3
    assert unless_in_use(world.paths, PATH, lambda: actions.append("done")) is None
    # What was asked before the end is not begun after it either.
    world.reactor.turn()
    assert world.paths.is_free(PATH)
    assert actions == []

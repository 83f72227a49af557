"""How much may be put into the media store."""

from __future__ import annotations

from storage_provider.room import Room

BLOCK = 4096


def watched(max_size: int | None) -> Room:
    room = Room(max_size)
    room.begin_look()
    return room


def test_there_is_always_some_without_max_size() -> None:
    room = watched(None)
    assert all(room.take(BLOCK) for _ in range(10))
    assert room.on_disk == 10 * BLOCK


def test_ends_at_max_size_counted_in_whole_blocks() -> None:
    room = watched(2 * BLOCK)
    assert [room.take(1), room.take(BLOCK), room.take(1)] == [True, True, False]
    assert room.on_disk == 2 * BLOCK


def test_nothing_is_refused_while_nobody_looks_at_the_disk() -> None:
    room = Room(BLOCK)
    assert all(room.take(BLOCK) for _ in range(3))
    room.begin_look()
    assert not room.take(BLOCK)


def test_what_is_there_already_counts_though_there_was_no_room() -> None:
    room = watched(2 * BLOCK)
    assert [room.add(BLOCK), room.add(2 * BLOCK)] == [True, False]
    assert room.on_disk == 3 * BLOCK


def test_a_look_tells_what_is_on_the_disk() -> None:
    room = watched(3 * BLOCK)
    room.add(3 * BLOCK)
    room.settle(BLOCK, room.begin_look())
    assert room.on_disk == BLOCK
    assert room.take(2 * BLOCK)


def test_what_came_during_a_look_counts_besides() -> None:
    room = watched(10 * BLOCK)
    room.add(BLOCK)
    begun = room.begin_look()
    room.add(2 * BLOCK)
    assert room.take(BLOCK)
    room.settle(5 * BLOCK, begun)
    assert room.on_disk == 8 * BLOCK

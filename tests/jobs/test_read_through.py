"""Which downloads stay on the disk, and what they take of its room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage_provider.known_media import KnownMedia
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Digest
from storage_provider.read_through import ReadThrough
from storage_provider.room import Room
from storage_provider.settings import ProviderSettings
from tests.jobs.conftest import SynapseDatabase

SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
DIGEST = Digest(100, SHA256)
BLOCK = 4096
"""What a file of that length takes on the disk."""

PATH = "local_content/ab/cd/ef"


@dataclass
class World:
    """Makes what is tested, and counts how often it asked for room."""

    store: MediaStore
    known: KnownMedia
    asked_for_room: list[bool] = field(default_factory=list)

    def read_through(self, room: int | None = None, **local_cache: Any) -> ReadThrough:
        """`room` are the bytes that may be added; None for no limit."""
        settings = ProviderSettings.parse({"bucket": "bucket", "local_cache": {"min_free_space": 0} | local_cache})
        self.room = Room(room)
        self.room.begin_look()
        return ReadThrough(settings, self.store, self.room, self.known, lambda: self.asked_for_room.append(True))


@pytest.fixture
def world(synapse_database: SynapseDatabase, tmp_path: Path) -> Iterator[World]:
    synapse_database.add_local("abcdef", media_length=DIGEST.length, sha256=SHA256)
    with closing(KnownMedia(synapse_database.arguments, list)) as known:
        yield World(MediaStore(tmp_path), known)


def stays(read_through: ReadThrough, path: str = PATH, digest: Digest = DIGEST) -> bool:
    return read_through.choose({path: digest}) == {path}


pytestmark = pytest.mark.parametrize("synapse_database", ["sqlite"], indirect=True)


def test_what_the_database_knows_stays(world: World) -> None:
    assert stays(world.read_through())
    assert world.asked_for_room == []


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("local_content/gh/ij/kl", DIGEST),
        ("url_cache/ab/cd/ef", DIGEST),
        (PATH, Digest(DIGEST.length - 1, SHA256)),
        (PATH, Digest(DIGEST.length, "0" * 64)),
    ],
    ids=["unknown", "no path of media", "other length", "other content"],
)
def test_anything_else_does_not_stay_and_takes_no_room(world: World, path: str, digest: Digest) -> None:
    read_through = world.read_through(BLOCK)
    assert not stays(read_through, path, digest)
    assert world.asked_for_room == []
    assert stays(read_through)


def test_quarantined_media_does_not_stay(world: World, synapse_database: SynapseDatabase) -> None:
    synapse_database.execute("UPDATE local_media_repository SET quarantined_by = '@admin:test'")
    assert not stays(world.read_through())


def test_nothing_stays_where_the_database_cannot_be_asked(world: World) -> None:
    world.known.close()
    assert not stays(world.read_through())


def test_nothing_stays_of_what_min_free_space_is_for(world: World) -> None:
    _, total = world.store.free_space()
    assert not stays(world.read_through(min_free_space=total))
    assert world.asked_for_room == [True]


def test_without_a_limit_there_is_always_room(world: World) -> None:
    read_through = world.read_through()
    assert all(stays(read_through) for _ in range(3))


@pytest.mark.parametrize("add", [lambda each: stays(each), lambda each: each.count(DIGEST.length)])
def test_what_is_added_takes_room_until_more_is_asked_for(world: World, add: Callable[[ReadThrough], object]) -> None:
    read_through = world.read_through(2 * BLOCK)
    add(read_through)
    assert stays(read_through)
    assert world.asked_for_room == []
    assert not stays(read_through)
    assert world.asked_for_room == [True]
    world.room.settle(BLOCK, world.room.begin_look())
    assert stays(read_through)


def test_what_was_uploaded_counts_even_where_there_is_no_room_and_asks_for_more(world: World) -> None:
    read_through = world.read_through(BLOCK)
    read_through.count(BLOCK + 1)
    assert world.asked_for_room == [True]
    # It has taken more than there was.
    assert not stays(read_through)


def test_what_does_not_fit_takes_nothing(world: World, synapse_database: SynapseDatabase) -> None:
    larger = Digest(BLOCK + 1, SHA256)
    synapse_database.add_local("ghijkl", media_length=larger.length, sha256=SHA256)
    read_through = world.read_through(2 * BLOCK - 1)
    assert not stays(read_through, "local_content/gh/ij/kl", larger)
    assert world.asked_for_room == [True]
    assert stays(read_through)


def test_of_many_those_stay_that_are_known_and_fit(world: World, synapse_database: SynapseDatabase) -> None:
    for number in range(3):
        synapse_database.add_local(f"abcde{number}", media_length=DIGEST.length, sha256=SHA256)
    known = {f"local_content/ab/cd/e{number}" for number in range(3)}
    read_through = world.read_through(2 * BLOCK)
    chosen = read_through.choose(dict.fromkeys(["local_content/gh/ij/kl", *sorted(known)], DIGEST))
    assert len(chosen) == 2
    assert chosen < known
    assert world.asked_for_room == [True]

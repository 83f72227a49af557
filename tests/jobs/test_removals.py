"""Removing many files one after another; `tests/jobs/test_media_store.py` tries what holds for each of them."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from storage_provider.directories import FileState
from storage_provider.media_paths import Media, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    (tmp_path / "media").mkdir()
    return MediaStore(tmp_path / "media")


def write(store: MediaStore, path: str) -> FileState:
    file = store.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(path.encode())
    return FileState.of_status(file.stat())


def paths_of(chosen: random.Random, number: int) -> list[str]:
    """Files in few directories, so that they have many in common."""
    media = {
        Media(chosen.choice(["", "a.org", "b.org"]), "".join(chosen.choices("ab", k=4)) + chosen.choice("cdef"))
        for _ in range(number)
    }
    thumbnails = [f"{thumbnail_directory(each)}/{size}-{size}-image-png-crop" for each in media for size in (32, 96)]
    return [*map(content_path, media), *thumbnails]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("in_order", [True, False])
def test_takes_each_file_and_no_other_and_leaves_no_empty_directory(
    store: MediaStore, seed: int, in_order: bool
) -> None:
    chosen = random.Random(seed)
    states = {path: write(store, path) for path in paths_of(chosen, 30)}
    removed = chosen.sample(sorted(states), len(states) // 2)
    if in_order:
        removed.sort()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with store.removals() as removals:
        for path in removed:
            assert removals.remove(path, states[path])
            assert not removals.remove(path, states[path])
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    left = {str(file.relative_to(store.root)) for file in store.root.rglob("*") if file.is_file()}
    assert left == set(states) - set(removed)
    empty = [each for each in store.root.rglob("*") if each.is_dir() and not any(each.iterdir())]
    assert {each.parent for each in empty} <= {store.root}


def test_goes_on_where_a_directory_has_gone_meanwhile(store: MediaStore) -> None:
    first, gone, last = (content_path(Media("", name)) for name in ("aabbc", "aabbd", "aacce"))
    states = {path: write(store, path) for path in (first, gone, last)}
    with store.removals() as removals:
        assert removals.remove(first, states[first])
        shutil.rmtree((store.root / gone).parent)
        assert not removals.remove(gone, states[gone])
        assert removals.remove(last, states[last])


def test_asks_the_system_for_the_directories_once(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [content_path(Media("", f"aabb{letter}")) for letter in "cdefgh"]
    states = {path: write(store, path) for path in paths}
    opened: list[object] = []
    original = os.open

    def noted(path: str, *arguments: int, dir_fd: int | None = None) -> int:
        opened.append(path)
        return original(path, *arguments, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", noted)
    with store.removals() as removals:
        assert all(removals.remove(path, states[path]) for path in paths)
    assert opened == [store.root, "local_content", "aa", "bb"]

"""The walk over contents and thumbnails together."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider.media_paths import Media, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore
from storage_provider.media_walk import MediaOnDisk, Unreadable, media_on_disk
from tests.jobs.plain_store import THUMBNAIL, refuse_to_walk, similar_media, write


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    root = tmp_path / "store"
    root.mkdir()
    return MediaStore(root)


def walked(store: MediaStore) -> dict[Media, list[str]]:
    found = [entry for local in (True, False) for entry in media_on_disk(store, local=local)]
    assert all(isinstance(entry, MediaOnDisk) for entry in found)
    return {entry.media: [path for path, _ in entry.files] for entry in found if isinstance(entry, MediaOnDisk)}


@settings(max_examples=60, deadline=None)
@given(st.sets(similar_media, max_size=10), st.sets(similar_media, max_size=10))
def test_finds_contents_and_thumbnails_in_the_order_of_contents(with_content: set[Media], others: set[Media]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = MediaStore(Path(directory))
        for each in with_content:
            write(store, content_path(each))
        for each in others:
            write(store, f"{thumbnail_directory(each)}/{THUMBNAIL}")
        found = walked(store)
        assert set(found) == with_content | others
        for each, paths in found.items():
            expected = [content_path(each)] if each in with_content else []
            assert paths == expected + ([f"{thumbnail_directory(each)}/{THUMBNAIL}"] if each in others else [])
        for local in (True, False):
            of_kind = [content_path(each).encode() for each in found if each.is_local == local]
            assert of_kind == sorted(of_kind)


def test_tells_the_state_of_each_file(store: MediaStore) -> None:
    path = "local_content/ab/cd/efgh"
    write(store, path)
    (entry,) = media_on_disk(store, local=True)
    assert isinstance(entry, MediaOnDisk)
    assert entry.files == ((path, store.state(path)),)


def test_leaves_out_what_is_not_synapses(store: MediaStore) -> None:
    outside = store.root.parent / "outside"
    outside.mkdir()
    (outside / "efgh").write_bytes(b"x")
    for path in ("local_content/abc/de/fghi", "local_content/ab/x", "local_thumbnails/ab/cd/efgh/tmp123"):
        write(store, path)
    (store.root / "local_content/li").symlink_to(outside)
    (store.root / "local_content/ab/cd").mkdir()
    (store.root / "local_content/ab/cd/link").symlink_to(outside / "efgh")
    os.mkfifo(store.root / "local_content/ab/cd/fifo")
    assert walked(store) == {}


def test_of_a_store_without_media_finds_nothing(store: MediaStore) -> None:
    assert walked(store) == {}


@pytest.mark.parametrize(
    ("unreadable", "order", "is_one_media"),
    [("ab", "/ab", False), ("cd", "/abcd", False), ("efgh", "/abcdefgh", True)],
)
def test_tells_what_it_could_not_read(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch, unreadable: str, order: str, is_one_media: bool
) -> None:
    write(store, f"local_thumbnails/ab/cd/efgh/{THUMBNAIL}")
    write(store, "local_content/zz/zz/zzzz")
    refuse_to_walk(monkeypatch, unreadable)
    refused, other = media_on_disk(store, local=True)
    assert refused == Unreadable(order, is_one_media, "Permission denied")
    assert isinstance(other, MediaOnDisk) and other.media == Media("", "zzzzzzzz")

"""What is on disk and what cache.db knows, side by side."""

from __future__ import annotations

import errno
import os
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider import candidates as candidates_module
from storage_provider import directories, media_walk
from storage_provider.cache_db import CacheDb, CachedMedia
from storage_provider.candidates import NotOnDisk, OnDisk, candidates
from storage_provider.failures import Failed
from storage_provider.media_paths import Media, content_path, is_safe, thumbnail_directory
from storage_provider.media_store import MediaStore
from storage_provider.media_walk import MediaOnDisk, Unreadable, media_on_disk

THUMBNAIL = "32-32-image-png-crop"

# So few letters that ids begin alike, and that one is the beginning of another one.
_ids = st.text("ab-", min_size=5, max_size=7)
_origins = st.sampled_from(["", "a.org", "a.org-x", "a.org:80", "é.org"])
media = st.builds(Media, _origins, _ids)


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    root = tmp_path / "store"
    root.mkdir()
    return MediaStore(root)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CacheDb]:
    with CacheDb(tmp_path / "cache.db") as cache:
        yield cache


def write(store: MediaStore, path: str) -> str:
    target = store.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"x")
    return path


def row(media: Media) -> CachedMedia:
    return CachedMedia(
        media.origin, f"id-{media.filesystem_id}", media.filesystem_id, "remote" if media.origin else "local"
    )


def walked(store: MediaStore) -> dict[Media, list[str]]:
    found = [entry for local in (True, False) for entry in media_on_disk(store, local=local)]
    assert all(isinstance(entry, MediaOnDisk) for entry in found)
    return {entry.media: [path for path, _ in entry.files] for entry in found if isinstance(entry, MediaOnDisk)}


# --- the walk ---


@settings(max_examples=60, deadline=None)
@given(st.sets(media, max_size=10), st.sets(media, max_size=10))
def test_walk_finds_contents_and_thumbnails_in_the_order_of_contents(
    with_content: set[Media], others: set[Media]
) -> None:
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


def test_walk_tells_the_state_of_each_file(store: MediaStore) -> None:
    path = write(store, "local_content/ab/cd/efgh")
    (entry,) = media_on_disk(store, local=True)
    assert isinstance(entry, MediaOnDisk)
    assert entry.files == ((path, store.state(path)),)


def test_walk_leaves_out_what_is_not_synapses(store: MediaStore) -> None:
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


def test_walk_of_a_store_without_media_finds_nothing(store: MediaStore) -> None:
    assert walked(store) == {}


@pytest.mark.parametrize(
    ("unreadable", "order", "is_one_media"),
    [("ab", "/ab", False), ("cd", "/abcd", False), ("efgh", "/abcdefgh", True)],
)
def test_walk_tells_what_it_could_not_read(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch, unreadable: str, order: str, is_one_media: bool
) -> None:
    write(store, f"local_thumbnails/ab/cd/efgh/{THUMBNAIL}")
    write(store, "local_content/zz/zz/zzzz")
    refuse(monkeypatch, unreadable)
    refused, other = media_on_disk(store, local=True)
    assert refused == Unreadable(order, is_one_media, "Permission denied")
    assert isinstance(other, MediaOnDisk) and other.media == Media("", "zzzzzzzz")


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a directory be one that may not be read; root may read all."""
    opened = directories.open_directory

    def open_directory(wanted: str, parent: int) -> int:
        if wanted == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), wanted)
        return opened(wanted, parent)

    monkeypatch.setattr(media_walk, "open_directory", open_directory)


# --- beside the rows ---


@settings(max_examples=60, deadline=None)
@given(
    known=st.sets(media, max_size=12),
    deleted=st.sets(media, max_size=12),
    on_disk=st.sets(media, max_size=12),
    chunk=st.integers(1, 3),
)
def test_every_row_is_met_once_and_in_order(
    known: set[Media], deleted: set[Media], on_disk: set[Media], chunk: int
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates_module, "_MEDIA_AT_ONCE", chunk)
        store = MediaStore(Path(directory))
        for each in on_disk:
            write(store, content_path(each))
        with CacheDb(Path(directory) / "cache.db") as cache:
            cache.add(row(each) for each in known | deleted)
            cache.mark_deleted(row(each) for each in deleted)
            entries = list(candidates(store, cache))
            assert not any(isinstance(entry, Failed) for entry in entries)
            there = [entry for entry in entries if isinstance(entry, OnDisk)]
            absent = [entry.row for entry in entries if isinstance(entry, NotOnDisk)]
        assert sorted(entry.row for entry in there) == sorted(row(each) for each in on_disk & (known | deleted))
        assert {entry.row.media for entry in there if entry.is_back} == on_disk & deleted
        assert sorted(absent) == sorted(row(each) for each in known - deleted - on_disk)
        order = [(entry.row.kind, content_path(entry.row.media).encode()) for entry in there]
        assert order == sorted(order)


def test_media_that_is_back_is_noted(store: MediaStore, cache: CacheDb) -> None:
    back = row(Media("", "abcdefgh"))
    cache.add([back])
    cache.mark_deleted([back])
    write(store, content_path(back.media))
    list(candidates(store, cache))
    assert list(cache.undeleted("local")) == [back]


def test_what_cannot_be_read_is_not_taken_for_gone(
    store: MediaStore, cache: CacheDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = [row(Media("", identifier)) for identifier in ("abcdefgh", "abzzefgh")]
    gone = [row(Media("", identifier)) for identifier in ("aaaaaaaa", "acacacac")]
    there = row(Media("", "acadacac"))
    cache.add([*hidden, *gone, there])
    for each in (*hidden, there):
        write(store, content_path(each.media))
    refuse(monkeypatch, "ab")
    found = list(candidates(store, cache))
    assert [entry.row for entry in found if isinstance(entry, NotOnDisk)] == gone
    assert [entry.row for entry in found if isinstance(entry, OnDisk)] == [there]
    assert [(entry.path, entry.reason) for entry in found if isinstance(entry, Failed)] == [
        (f"local {each.media_id}", "cannot be read: Permission denied") for each in hidden
    ]


def test_end_is_heeded_among_files_that_have_no_row(
    store: MediaStore, cache: CacheDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3000):
        write(store, f"local_content/ab/cd/{number:04}")
    there, gone = row(Media("", "zzzzzzzz")), row(Media("", "zzzzgone"))
    write(store, content_path(there.media))
    remote = row(Media("a.org", "abcdefgh"))
    cache.add([there, gone, remote])
    walked = count_walked(monkeypatch)
    # Neither is what the walk had not come to taken for gone.
    assert list(candidates(store, cache, lambda: len(walked) >= 100)) == []
    assert len(walked) == 100


def count_walked(monkeypatch: pytest.MonkeyPatch) -> list[MediaOnDisk | Unreadable]:
    """What the walk over the disk comes to, as it does."""
    walked = []

    def walk(store: MediaStore, *, local: bool) -> Iterator[MediaOnDisk | Unreadable]:
        for entry in media_on_disk(store, local=local):
            walked.append(entry)
            yield entry

    monkeypatch.setattr(candidates_module, "media_on_disk", walk)
    return walked


def test_paths_that_would_leave_the_store_are_failures(store: MediaStore, cache: CacheDb) -> None:
    bad = CachedMedia("..", "x", "abcdefgh", "remote")
    cache.add([bad, CachedMedia("", "abcd", "abcd", "local")])
    assert [type(entry) for entry in candidates(store, cache)] == [Failed, Failed]


def test_letters_are_what_ids_are_made_of() -> None:
    # The walk takes a short way for them.
    assert all(is_safe(letter) for letter in string.ascii_letters)
    assert not any(is_safe(name) for name in ("", ".", "..", "a/b", "a\0", "é" * 128, "a" * 256))

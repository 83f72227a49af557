"""What is on disk and what cache.db knows, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider import candidates as candidates_module
from storage_provider.cache_db import CacheDb, CachedMedia
from storage_provider.candidates import NotOnDisk, OnDisk, candidates
from storage_provider.failures import Failed
from storage_provider.media_paths import Media, content_path
from storage_provider.media_store import MediaStore
from storage_provider.media_walk import MediaOnDisk, Unreadable, media_on_disk
from tests.jobs.plain_store import refuse_to_walk, similar_media, write


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    root = tmp_path / "store"
    root.mkdir()
    return MediaStore(root)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CacheDb]:
    with CacheDb(tmp_path / "cache.db") as cache:
        yield cache


def row(media: Media) -> CachedMedia:
    return CachedMedia(
        media.origin, f"id-{media.filesystem_id}", media.filesystem_id, "remote" if media.origin else "local"
    )


@settings(max_examples=60, deadline=None)
@given(
    known=st.sets(similar_media, max_size=12),
    deleted=st.sets(similar_media, max_size=12),
    on_disk=st.sets(similar_media, max_size=12),
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
    refuse_to_walk(monkeypatch, "ab")
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

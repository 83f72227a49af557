"""Looking keys up in a listing, and comparing database, disk and bucket, in the order of the path."""

from __future__ import annotations

import shutil
import string
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.base import ObjectInfo
from backends.errors import AccessDenied, BackendUnavailable, NotSupported
from storage_provider import reconcile
from storage_provider.media_store import (
    MEDIA_ROOTS,
    FileState,
    Media,
    MediaStore,
    UnsafePath,
    WalkedFile,
    content_path,
    thumbnail_directory,
)
from storage_provider.reconcile import ListingCursor, ListingRefused
from storage_provider.synapse_db import FileRow, connect
from tests.jobs.conftest import ENGINES, TABLES, SynapseDatabase

on_each_database = pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)

ROOT = "local_content/"
keys = st.text(string.ascii_lowercase[:3] + "-/0é😀", min_size=1, max_size=5).map(lambda text: ROOT + text)


class Listing:
    """A bucket that can be listed, and counts the pages."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.pages = 0

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = sorted((name for name in self.names if name.startswith(prefix)), key=str.encode)
        found = [name for name in found if name.encode() > start_after.encode()]
        while True:
            self.pages += 1
            page, found = found[: reconcile._PAGE], found[reconcile._PAGE :]
            yield from (ObjectInfo(name, 1, "etag") for name in page)
            if not found:
                return


def cursor(listing: Any) -> ListingCursor:
    return ListingCursor(listing, ROOT)


@settings(max_examples=100, deadline=None)
@given(st.sets(keys), st.lists(keys), st.booleans(), st.integers(1, 3))
def test_finds_what_is_there_in_any_order(there: set[str], asked: list[str], in_order: bool, page: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconcile, "_PAGE", page)
        looking = cursor(Listing(there))
        for key in sorted(asked, key=str.encode) if in_order else asked:
            found = looking.find(key)
            assert (found.key if found else None) == (key if key in there else None)


def test_dense_questions_cost_a_page_for_a_thousand() -> None:
    names = [f"{ROOT}{number:06}" for number in range(10_000)]
    listing = Listing(set(names))
    looking = cursor(listing)
    assert all(looking.find(name) for name in names)
    assert listing.pages <= 11


def test_few_questions_skip_what_lies_between() -> None:
    listing = Listing({f"{ROOT}{number:06}" for number in range(100_000)})
    looking = cursor(listing)
    assert [bool(looking.find(f"{ROOT}{number:06}")) for number in (5, 50_000, 99_999, 100_000)] == [1, 1, 1, 0]
    assert listing.pages <= 4


def test_end_of_the_listing_costs_nothing_more() -> None:
    listing = Listing({f"{ROOT}a"})
    looking = cursor(listing)
    assert [looking.find(f"{ROOT}{name}") for name in "bcdef"] == [None] * 5
    assert listing.pages == 1


def test_after_a_rewind_the_bucket_is_asked_anew() -> None:
    listing = Listing(set())
    looking = cursor(listing)
    assert looking.find(f"{ROOT}a") is None
    listing.names.add(f"{ROOT}a")
    assert looking.find(f"{ROOT}a") is None
    looking.rewind()
    assert looking.find(f"{ROOT}a") is not None


@pytest.mark.parametrize("kind", [AccessDenied, NotSupported])
def test_refused_listing_is_told_apart(kind: type[AccessDenied | NotSupported]) -> None:
    class Refusing(Listing):
        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            yield from ()
            raise kind("no", operation="list")

    with pytest.raises(ListingRefused):
        cursor(Refusing(set())).find(f"{ROOT}a")


def test_bucket_out_of_reach_is_no_refusal() -> None:
    class Failing(Listing):
        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            yield from ()
            raise BackendUnavailable("no", operation="list")

    with pytest.raises(BackendUnavailable):
        cursor(Failing(set())).find(f"{ROOT}a")


# --- the comparison of streams ---

# Names at which sorting by something else than the bytes of the path goes wrong.
SERVERS = ["a.org", "a.org-x", "a.org.", "a.org:8448", "[::1]:8448", "a", "a-", "é.org", "😀", "b.org"]
IDS = [
    "abcde",
    "abcde-",
    "abcdef",
    "abcd-e",
    "abcd.",
    "abcd..",
    "abcdé",
    "abcd😀",
    "ABCDE",
    "abcde.f",
    "abc/d",
    "....x",
    "..abc",
    "abcd",
]
THUMBNAILS = [(32, 32, "image/png", "crop"), (320, 240, "image/jpeg", "scale"), (32, 320, "image/webp", "scale")]
NAMES = ["32-32-image-png-crop", "320-240-image-jpeg-scale", "32-320-image-webp-scale"]

rows_ = st.lists(
    st.tuples(st.sampled_from(["", *SERVERS]), st.sampled_from(IDS), st.sets(st.sampled_from(THUMBNAILS))),
    max_size=25,
    unique_by=lambda row: row[:2],
)
places = st.sets(
    st.tuples(st.sampled_from(["", *SERVERS]), st.sampled_from(IDS), st.sampled_from([None, *NAMES])), max_size=25
)


def safe_path(origin: str, filesystem_id: str, name: str | None) -> str | None:
    """The path of a file, made with nothing but string concatenation."""
    media = Media(origin, filesystem_id)
    try:
        return content_path(media) if name is None else f"{thumbnail_directory(media)}/{name}"
    except UnsafePath:
        return None


def paths_of(some: set[tuple[str, str, str | None]]) -> list[str]:
    return sorted({path for each in some if (path := safe_path(*each))}, key=str.encode)


@on_each_database
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_, on_disk=places, in_bucket=places)
def test_streams_are_compared_as_sets_are(
    synapse_database: SynapseDatabase,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, set[tuple[int, int, str, str]]]],
    on_disk: set[tuple[str, str, str | None]],
    in_bucket: set[tuple[str, str, str | None]],
) -> None:
    for table in TABLES:
        synapse_database.execute(f"DELETE FROM {table}")
    known: dict[str, str] = {}
    for number, (origin, identifier, thumbnails) in enumerate(rows):
        media_id = f"id{number}" if origin else identifier
        if origin:
            synapse_database.add_remote(origin, media_id, identifier)
        else:
            synapse_database.add_local(identifier)
        for width, height, kind, method in thumbnails:
            synapse_database.add_thumbnail(origin, media_id, width, height, kind, method, 7)
        names = [None, *(NAMES[THUMBNAILS.index(each)] for each in thumbnails)]
        known |= {path: media_id for name in names if (path := safe_path(origin, identifier, name))}
    root = tmp_path_factory.mktemp("store")
    files, objects = paths_of(on_disk), [*paths_of(in_bucket), "local_content/../x", "remote_content//", "zzz"]
    for path in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    found = {}
    with connect(synapse_database.arguments) as database:
        for media_root in MEDIA_ROOTS:
            listing = sorted((key for key in objects if key.startswith(media_root)), key=str.encode)
            entries = list(
                reconcile.reconcile(
                    reconcile.expected_files(database, media_root),
                    MediaStore(root).walk_files(media_root),
                    (ObjectInfo(key, 1, "etag") for key in listing),
                )
            )
            assert [entry.path for entry in entries] == sorted((entry.path for entry in entries), key=str.encode)
            for path, row, file, info in entries:
                assert path not in found
                assert file is None or file.path == path
                assert info is None or info.key == path
                found[path] = (row.media_id if row else None, file is not None, info is not None)
    everything = {*known, *files, *(key for key in objects if key.startswith(MEDIA_ROOTS))}
    assert found == {path: (known.get(path), path in files, path in objects) for path in everything}
    shutil.rmtree(root)


@on_each_database
def test_paths_that_are_none_are_refused_with_their_row(synapse_database: SynapseDatabase) -> None:
    for identifier in ("abcd", "../../etc/passwd", "abcd/../x", "abcd\x01", "fine and well", "abcd" + "x" * 300):
        synapse_database.add_local(identifier)
        synapse_database.add_remote("../a.org", f"id {identifier}", identifier)
    synapse_database.add_thumbnail("", "fine and well", 32, 32, "image/../../x", "crop", 1)
    refused: list[str] = []
    with connect(synapse_database.arguments) as database:
        found = [
            each.path
            for root in MEDIA_ROOTS
            for each in reconcile.expected_files(database, root, refuse=lambda row: refused.append(row.media_id))
        ]
    assert found == ["local_content/fi/ne/ and well"]
    assert len(refused) == 5 + 6 + 1


def test_path_that_two_rows_claim_belongs_to_none() -> None:
    row = FileRow("a.org", "id", "abcdef", None, 1, None, 0, False)
    expected = [reconcile.ExpectedFile(path, row) for path in ("a", "b", "b", "b", "c")]
    files = [WalkedFile(path, FileState(1, 1, 1), 0) for path in ("b", "c")]
    found = [(entry.path, entry.expected is not None) for entry in reconcile.reconcile(expected, files)]
    assert found == [("a", True), ("b", False), ("c", True)]


def test_stream_out_of_order_is_an_error() -> None:
    row = FileRow("", "id", "abcdef", None, 1, None, 0, False)
    expected = [reconcile.ExpectedFile(path, row) for path in ("b", "a")]
    files = [WalkedFile(path, FileState(1, 1, 1), 0) for path in ("b", "a")]
    objects = [ObjectInfo(key, 1, "etag") for key in ("b", "a")]
    for streams in ((expected, (), ()), ((), files, ()), ((), (), objects)):
        with pytest.raises(reconcile.OutOfOrder, match="'a' after 'b'"):
            list(reconcile.reconcile(*streams))


def test_million_entries_take_no_memory() -> None:
    row = FileRow("", "id", "abcdef", None, 1, None, 0, False)
    number = 100_000
    tracemalloc.start()
    try:
        entries = reconcile.reconcile(
            (reconcile.ExpectedFile(f"{each:09}", row) for each in range(number)),
            (WalkedFile(f"{each:09}", FileState(1, 1, 1), 0) for each in range(0, number, 2)),
            (ObjectInfo(f"{each:09}", 1, "etag") for each in range(0, number, 3)),
        )
        assert sum(1 for _ in entries) == number
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()

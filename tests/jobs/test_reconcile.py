"""Comparing database, disk and bucket, in the order of the path."""

from __future__ import annotations

import shutil
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.base import ObjectInfo
from storage_provider import reconcile
from storage_provider.directories import FileState
from storage_provider.media_paths import MEDIA_ROOTS, Media, UnsafePath, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore, WalkedFile
from storage_provider.synapse_db import FileRow, connect
from tests.jobs.conftest import ENGINES, TABLES, SynapseDatabase

on_each_database = pytest.mark.parametrize("synapse_database", ENGINES, indirect=True)

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

"""Media ids, server names and paths: one test for each promise of `storage_provider.media_paths`."""

from __future__ import annotations

import os
import string
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_provider.media_paths import (
    MEDIA_ROOTS,
    Media,
    MediaFile,
    UnsafePath,
    content_path,
    in_thumbnail_order,
    is_safe,
    parse_path,
    thumbnail_directory,
)
from storage_provider.media_store import OWN_DIRECTORY
from tests.jobs.nasty_names import nasty_media, nasty_segments, thumbnail_names

with warnings.catch_warnings():
    # Synapse and Twisted warn of themselves while they are imported.
    warnings.simplefilter("ignore")
    from synapse.media.filepath import MediaFilePaths

path_parts = (
    st.sampled_from([*(root.rstrip("/") for root in MEDIA_ROOTS), "ab", "cd", "e", ".", "..", "", "a.org", "\0"])
    | thumbnail_names
    | nasty_segments
)
any_text = st.text(st.characters() | st.sampled_from("/.\0\n\ud800"), max_size=12)


class TestPaths:
    @given(
        origin=st.text("abcXYZ019_-.[]:", min_size=1, max_size=20).filter(lambda text: text not in (".", "..")),
        identifier=st.text("abcXYZ019_-", min_size=5, max_size=30),
    )
    def test_are_those_of_synapse(self, origin: str, identifier: str) -> None:
        synapse = MediaFilePaths("/store")
        local, remote = Media("", identifier), Media(origin, identifier)
        assert content_path(local) == synapse.local_media_filepath_rel(identifier)
        assert content_path(remote) == synapse.remote_media_filepath_rel(origin, identifier)
        assert f"/store/{thumbnail_directory(local)}" == synapse.local_media_thumbnail_dir(identifier)
        assert f"/store/{thumbnail_directory(remote)}" == synapse.remote_media_thumbnail_dir(origin, identifier)

    @given(media=nasty_media, name=thumbnail_names)
    def test_come_back_as_the_media_that_they_were_made_of(self, media: Media, name: str) -> None:
        content, thumbnail = content_path(media), f"{thumbnail_directory(media)}/{name}"
        assert parse_path(content) == MediaFile(media, None, content)
        assert parse_path(thumbnail) == MediaFile(media, name, thumbnail)

    @given(origin=any_text, identifier=any_text)
    def test_of_any_id_are_refused_or_stay_in_the_layout(self, origin: str, identifier: str) -> None:
        media = Media(origin, identifier)
        try:
            paths = [content_path(media), thumbnail_directory(media)]
        except UnsafePath:
            return
        for path in paths:
            assert os.path.normpath(path) == path
            assert path.count("/") == (4 if origin else 3)
            assert path.startswith(MEDIA_ROOTS)
            assert path.isprintable() or not any(ord(character) < 32 for character in path)
            path.encode()

    @pytest.mark.parametrize(
        "identifier",
        [
            *["", "a", "abcd", "..cdefg", "ab..efg", "abcd.", "abcd..", "ab/defgh", "abcd/../../etc", "a/../../b"],
            *["abcde\0", "abcde\n", "abcde\x7f", "abcde\x85", "abcde\ud800", "abcd" + "x" * 256, "abcd" + "€" * 86],
        ],
    )
    @pytest.mark.parametrize("origin", ["", "example.org"])
    def test_of_unsafe_ids_are_refused(self, origin: str, identifier: str) -> None:
        for make in (content_path, thumbnail_directory):
            with pytest.raises(UnsafePath):
                make(Media(origin, identifier))

    @pytest.mark.parametrize("origin", [".", "..", "a/b", "../x", "a\0b", "a\nb", "x" * 256, "\udcff"])
    def test_of_unsafe_server_names_are_refused(self, origin: str) -> None:
        for make in (content_path, thumbnail_directory):
            with pytest.raises(UnsafePath):
                make(Media(origin, "abcdefgh"))

    @pytest.mark.parametrize("length", [1, 255])
    def test_may_be_as_long_as_a_file_system_allows(self, length: int) -> None:
        assert parse_path(content_path(Media("", "abcd" + "x" * length))) is not None

    def test_may_hold_the_address_of_a_server(self) -> None:
        path = content_path(Media("[2001:db8::1]:8448", "abcdefgh"))
        assert path == "remote_content/[2001:db8::1]:8448/ab/cd/efgh"

    @given(path=st.lists(path_parts, max_size=7).map("/".join))
    def test_that_are_recognised_are_those_that_would_be_made(self, path: str) -> None:
        found = parse_path(path)
        if found is not None:
            made = content_path(found.media)
            if found.thumbnail is not None:
                made = f"{thumbnail_directory(found.media)}/{found.thumbnail}"
            assert made == path == found.path

    @pytest.mark.parametrize(
        "path",
        [
            *["", "/", "local_content", "local_content/", "local_content/ab/cd", "local_content/ab/cd/", "ab/cd/efgh"],
            *[
                "/local_content/ab/cd/efgh",
                "local_content//ab/cd/efgh",
                "local_content/ab/cd/efgh/",
                "local_content/ab/cd/ef/gh",
            ],
            *[
                "local_content/abc/cd/efgh",
                "local_content/a/cd/efgh",
                "local_content/../cd/efgh",
                "local_content/ab/../efgh",
            ],
            *["local_content/ab/cd/..", "local_content/ab/cd/.", "local_content/ab/cd/e\0", "local_content/ab/cd/e\nf"],
            *[
                "local_content/ab/cd/\udcff",
                "Local_content/ab/cd/efgh",
                "local_thumbnails/ab/cd/efgh",
                "url_cache/ab/cd/efgh",
            ],
            *[
                "remote_content/ab/cd/efgh",
                "remote_content//ab/cd/efgh",
                "remote_content/../ab/cd/efgh",
                "uploads/ab/cd/efgh",
            ],
            *["remote_thumbnails/a.org/ab/cd/efgh/32-32-image-png-crop", f"{OWN_DIRECTORY}/tmp/abcd/efgh"],
        ],
    )
    def test_of_anything_else_are_not_recognised(self, path: str) -> None:
        assert parse_path(path) is None

    @pytest.mark.parametrize("name", ["32-32-image-png-crop", "800-600-image-jpeg-scale", "1-0-image-webp-crop"])
    def test_of_thumbnails_are_recognised(self, name: str) -> None:
        for directory in ("local_thumbnails/ab/cd/efgh", "remote_thumbnail/a.org/ab/cd/efgh"):
            found = parse_path(f"{directory}/{name}")
            assert found is not None
            assert found.thumbnail == name

    def test_of_old_thumbnails_without_the_method_are_remote_ones(self) -> None:
        assert parse_path("remote_thumbnail/a.org/ab/cd/efgh/32-32-image-png") is not None
        assert parse_path("local_thumbnails/ab/cd/efgh/32-32-image-png") is None

    @pytest.mark.parametrize(
        "name",
        [
            *[
                "x",
                "32-32-image-png-crop.tmp",
                "tmp8h2_x",
                ".32-32-image-png-crop.swp",
                "32-32-image-png-crop~",
                "32-32-image",
            ],
            *["-32-32-image-png-crop", "32-32-image-png-blur", "032-32-image-png-crop", "32-32-image-png-crop-crop"],
            *[
                "32-32-image/png-crop",
                "٣-32-image-png-crop",
                "32-32-image-png-crop\n",
                "32-32--png-crop",
                "32-32-image-png.part",
            ],
        ],
    )
    def test_of_other_files_beside_thumbnails_are_not_recognised(self, name: str) -> None:
        assert parse_path(f"remote_thumbnail/a.org/ab/cd/efgh/{name}") is None
        assert parse_path(f"local_thumbnails/ab/cd/efgh/{name}") is None

    @given(media=st.lists(nasty_media, unique=True))
    def test_can_be_had_in_the_order_of_the_thumbnails(self, media: list[Media]) -> None:
        by_content = sorted(media, key=lambda each: content_path(each).encode())
        by_thumbnails = sorted(media, key=lambda each: f"{thumbnail_directory(each)}/".encode())
        assert list(in_thumbnail_order(by_content, lambda each: each)) == by_thumbnails

    def test_order_of_thumbnails_differs_where_an_id_begins_another_one(self) -> None:
        short, long = Media("", "abcdefgh"), Media("", "abcdefgh-x")
        assert list(in_thumbnail_order([short, long], lambda each: each)) == [long, short]


def test_letters_are_what_ids_are_made_of() -> None:
    # `is_safe` takes a short way for them.
    assert all(is_safe(letter) for letter in string.ascii_letters)
    assert not any(is_safe(name) for name in ("", ".", "..", "a/b", "a\0", "é" * 128, "a" * 256))

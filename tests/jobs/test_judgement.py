"""What the database says of a content."""

from __future__ import annotations

import pytest

from storage_provider.judgement import fits
from storage_provider.proofs import Digest
from storage_provider.synapse_db import MediaFacts

PATH = "local_content/Ab/cd/Efgh"
THUMBNAIL = "32-32-image-png-crop"
THUMBNAIL_PATH = f"local_thumbnails/Ab/cd/Efgh/{THUMBNAIL}"


class OnlyLength:
    length = 3

    @property
    def sha256(self) -> str:
        raise AssertionError("it is hashed")


@pytest.mark.parametrize(
    ("facts", "path", "digest", "fit"),
    [
        (MediaFacts(3, "right", False, {}), PATH, Digest(3, "right"), True),
        (MediaFacts(3, None, False, {}), PATH, Digest(3, "any"), True),
        (MediaFacts(3, "right", False, {}), PATH, Digest(3, "wrong"), False),
        (MediaFacts(3, None, False, {}), PATH, Digest(2, "any"), False),
        (None, PATH, Digest(3, "right"), False),
        (MediaFacts(3, "right", False, {THUMBNAIL: 7}), THUMBNAIL_PATH, Digest(7, "any"), True),
        (MediaFacts(3, "right", False, {THUMBNAIL: 7}), THUMBNAIL_PATH, Digest(3, "right"), False),
        (MediaFacts(3, "right", False, {}), THUMBNAIL_PATH, Digest(3, "right"), False),
    ],
)
def test_content_fits_what_the_database_says(facts: MediaFacts | None, path: str, digest: Digest, fit: bool) -> None:
    assert fits(facts, path, digest) is fit


@pytest.mark.parametrize(
    ("facts", "path", "fit"),
    [
        (MediaFacts(3, None, False, {}), PATH, True),
        (MediaFacts(2, "right", False, {}), PATH, False),
        (MediaFacts(2, "right", False, {THUMBNAIL: 3}), THUMBNAIL_PATH, True),
        (None, PATH, False),
    ],
)
def test_content_is_not_hashed_where_that_decides_nothing(facts: MediaFacts | None, path: str, fit: bool) -> None:
    assert fits(facts, path, OnlyLength()) is fit

"""Which of a file and its object is right, by what Synapse's database says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage_provider.media_paths import parse_path
from storage_provider.proofs import Digest, Fingerprint

if TYPE_CHECKING:
    from storage_provider.synapse_db import MediaFacts


@dataclass(frozen=True)
class Difference:
    """File and object are not the same."""

    file: Digest
    object: Digest


def known_length(facts: MediaFacts, path: str) -> int | None:
    """The bytes that a file should have; None where the database does not tell."""
    thumbnail = _thumbnail(path)
    return facts.length if thumbnail is None else facts.thumbnail_lengths.get(thumbnail)


def known_sha256(facts: MediaFacts, path: str) -> str | None:
    """The SHA-256 that a file should have, in hex; None where the database does not tell, as for all thumbnails."""
    return facts.sha256 if _thumbnail(path) is None else None


def fits(facts: MediaFacts | None, path: str, content: Fingerprint) -> bool:
    """Whether a content is what the database says of the file; its SHA-256 is asked for only where that decides."""
    if facts is None or known_length(facts, path) != content.length:
        return False
    sha256 = known_sha256(facts, path)
    return sha256 is None or sha256 == content.sha256


def damage(facts: MediaFacts, path: str, size: int) -> str | None:
    """What shows, without reading it, that a file is damaged; None where nothing does."""
    length = known_length(facts, path)
    if length is None or length == size:
        return None
    return f"the file is damaged: it has {size} bytes, the database says {length}"


def neither(facts: MediaFacts | None, path: str, file_size: int, object_size: int) -> str | None:
    """What shows, without reading them, that file and object are both wrong; None where one could be right."""
    if facts is not None and known_length(facts, path) in (file_size, object_size):
        return None
    return _objection("neither is")


def objection(facts: MediaFacts | None, path: str, difference: Difference) -> str | None:
    """Why the file must not replace the object that differs from it; None where only the file is right."""
    file_is_right, object_is_right = fits(facts, path, difference.file), fits(facts, path, difference.object)
    if file_is_right == object_is_right:
        return _objection("both could be" if file_is_right else "neither is")
    if object_is_right:
        return "the file is damaged, the object is whole: remove the file to have it served"
    return None


def _objection(which: str) -> str:
    return f"file and object differ, and {which} right by Synapse's database"


def _thumbnail(path: str) -> str | None:
    parsed = parse_path(path)
    return None if parsed is None else parsed.thumbnail

"""Which of a file and its object is right, by what Synapse's database says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage_provider.transfers import Digest, fits, known_length

if TYPE_CHECKING:
    from storage_provider.synapse_db import MediaFacts


@dataclass(frozen=True)
class Difference:
    """File and object are not the same."""

    file: Digest
    object: Digest


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

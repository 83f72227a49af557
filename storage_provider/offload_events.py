"""What a run that offloads media tells of its files, as it goes."""

from __future__ import annotations

from dataclasses import dataclass

from storage_provider.cache_db import CachedMedia
from storage_provider.failures import Failed


@dataclass(frozen=True)
class Uploaded:
    """A file was sent; `replaced` tells that the object there was not the file, and wrong by the database."""

    path: str
    size: int
    replaced: bool = False


@dataclass(frozen=True)
class Deleted:
    """A file was removed from the disk; `proof` is how its object was proved (etag, put, read, size)."""

    path: str
    size: int
    proof: str


@dataclass(frozen=True)
class Kept:
    """A file was left where it is, for a reason that is no failure."""

    path: str
    reason: str


@dataclass(frozen=True)
class Gone:
    """So many media that were taken to be on disk are not."""

    media: int


@dataclass(frozen=True)
class MediaDone:
    """All that could be done for a media in this run."""

    row: CachedMedia
    uploaded_files: int
    deleted_files: int
    is_back: bool = False
    """Whether it had been deleted, and was on disk again."""


Event = Uploaded | Deleted | Kept | Failed | Gone | MediaDone

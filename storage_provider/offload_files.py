"""What a run that offloads media knows of the files at hand, and of their objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from backends.base import ObjectInfo
from storage_provider.cache_db import CachedMedia, How, Proof
from storage_provider.directories import FileState
from storage_provider.proofs import Verify

if TYPE_CHECKING:
    from storage_provider.synapse_db import MediaFacts


@dataclass
class File:
    """A file that is being handled, and what is known of its object."""

    row: CachedMedia
    path: str
    state: FileState
    info: ObjectInfo | None = None
    told_by: Literal["listing", "object"] | None = None
    """Whom `info` is from; None where the object has to be asked for."""
    facts: MediaFacts | None = None
    """What the database says, where it was asked."""
    recorded: Proof | None = None
    """What an earlier run found out."""
    sent: ObjectInfo | None = None
    """The answer to our own upload in this run."""
    proof: str | None = None
    is_done: bool = False
    """Whether nothing more is to be done with it in this run."""
    is_removed: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether the object is the one that was sent, by what is known of it."""
        if self.info is None or self.sent is None:
            return False
        return (self.info.etag, self.info.size) == (self.sent.etag, self.sent.size)

    def cheap_proof(self, verify: Verify) -> str | None:
        """How the object is proved to be the file by what is known of it, or None."""
        info = self.info
        if info is None or info.size != self.state.size or verify is Verify.FULL:
            return None
        if verify is Verify.SIZE:
            return "size"
        if self.sent is not None:
            return "put" if info.etag and info.etag == self.sent.etag else None
        known = self.recorded
        if known is not None and info.etag:
            now = (info.etag, info.size, self.state.mtime_ns)
            if (known.etag, known.size, known.mtime_ns) == now:
                return known.how
        return None

    @property
    def lasting_proof(self) -> Proof | None:
        """What a later run need not find out again."""
        if self.proof in ("put", "read") and self.info is not None:
            how: How = "put" if self.proof == "put" else "read"
            return Proof(self.path, self.info.etag, self.info.size, self.state.mtime_ns, how)
        if self.sent is not None and self.proof is None and not self.is_done:
            return Proof(self.path, self.sent.etag, self.sent.size, self.state.mtime_ns, "put")
        return None


@dataclass
class MediaFiles:
    """A media that is being handled, with its files on disk; `is_back` tells that they had been deleted."""

    row: CachedMedia
    is_back: bool
    files: list[File]

    @property
    def uploaded(self) -> int:
        """So many files were sent."""
        return sum(file.sent is not None for file in self.files)

    @property
    def unproved(self) -> list[File]:
        """The files that have yet to be proved, where they are to be removed."""
        return [file for file in self.files if file.proof is None and not file.is_done]

    @property
    def deleted(self) -> int:
        """So many files were removed."""
        return sum(file.is_removed for file in self.files)

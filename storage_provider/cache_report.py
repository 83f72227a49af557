"""What a pass over the local cache has done, for the operator's log."""

from __future__ import annotations

from dataclasses import dataclass, field

import humanize

from storage_provider.cache_policy import Limit

_FIRST = 5


@dataclass
class Tally:
    """Files, and their bytes."""

    files: int = 0
    size: int = 0

    def add(self, size: int) -> None:
        self.files += 1
        self.size += size

    def __str__(self) -> str:
        return f"{self.files} ({humanize.naturalsize(self.size, binary=True)})"


@dataclass
class Cases:
    """How often something was found, with the first ones in words."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, case: str) -> None:
        self.count += 1
        if len(self.first) < _FIRST:
            self.first.append(case)


@dataclass
class PassReport:
    """What a pass has done; as a string it is one line."""

    kept: Tally = field(default_factory=Tally)
    """What is on disk at the end, in bytes of whole blocks."""
    restored: Tally = field(default_factory=Tally)
    evicted: Tally = field(default_factory=Tally)
    mended: Tally = field(default_factory=Tally)
    """Damaged files that were replaced by their whole objects."""
    uploaded: Tally = field(default_factory=Tally)
    """Files that had no object in the bucket, and have one now."""
    replaced: Tally = field(default_factory=Tally)
    """Whole files that have replaced wrong objects."""
    damaged: Cases = field(default_factory=Cases)
    """Files and objects of which none is what the database says; nothing was touched. Each is named once a day."""
    refused: Cases = field(default_factory=Cases)
    """Rows whose ids lead to no path of Synapse's."""
    failed: Cases = field(default_factory=Cases)
    immovable: Tally = field(default_factory=Tally)
    """Files that stay whatever the limits say: unknown to the database, quarantined, or not whole in the bucket."""
    not_in_bucket: int = 0
    """What the bucket was asked for and has not; it is not asked again for a day."""
    limited_by: Limit | None = None
    """What kept media that belongs on disk from being restored; None where all of it is there."""
    over_limit: bool = False
    """Whether more is on disk than the limits allow, though all was evicted that may be."""
    out_of_reach: str | None = None
    """Why no pass will ever come to the limits; None where one may."""
    listed: bool = False
    """Whether the bucket was listed."""
    seconds: float = 0.0

    def __str__(self) -> str:
        healed = self.mended.files + self.uploaded.files + self.replaced.files
        parts = [
            f"restored {self.restored}",
            f"healed {healed}",
            f"evicted {self.evicted}",
            f"kept {self.kept}",
        ]
        if self.over_limit:
            parts.append("still over the limits")
        for cases, name in ((self.damaged, "damaged"), (self.refused, "refused"), (self.failed, "failed")):
            if cases.count:
                more = ", …" if cases.count > len(cases.first) else ""
                parts.append(f"{name} {cases.count} ({', '.join(cases.first)}{more})")
        return f"Local cache: {', '.join(parts)}; {self.seconds:.1f} s"

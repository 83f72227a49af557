"""What has no place in a media store yet, or never will have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storage_provider.media_store import OWN_DIRECTORY


def temporary_files(store: Path, pid: int | None) -> list[Path]:
    """The temporary files with a name, and those without one that the process has open."""
    nameless = [] if pid is None else list(_nameless(store, pid))
    return [*(store / OWN_DIRECTORY / "tmp").glob("*"), *nameless]


def _nameless(store: Path, pid: int) -> Iterator[Path]:
    """Paths that lead to files which were made without a name, as https://man7.org/linux/man-pages/man5/proc.5.html has it."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = descriptor.readlink()
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.is_relative_to(store) and target.name.startswith("#") and target.name.endswith(" (deleted)"):
            yield descriptor

"""The free space of the disk is promised once."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage_provider.free_space import FreeSpace
from storage_provider.media_store import MediaStore

RESERVE = 16 << 20


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the disk has; a test may change it."""
    free = [RESERVE + 100]
    monkeypatch.setattr(MediaStore, "free_space", lambda _store: (free[0], 1 << 40))
    return free


@pytest.mark.usefixtures("free")
def test_what_one_is_still_to_fill_no_other_one_gets(tmp_path: Path) -> None:
    space = FreeSpace(MediaStore(tmp_path))
    assert space.promise(60)
    assert not space.promise(41)
    assert space.promise(40)


def test_what_has_been_written_shows_on_the_disk_and_is_promised_no_more(tmp_path: Path, free: list[int]) -> None:
    space = FreeSpace(MediaStore(tmp_path))
    assert space.promise(100)
    free[0] -= 70
    space.settle(70)
    assert not space.promise(1)
    # The rest is not going to be written.
    space.settle(30)
    assert space.promise(30)
    assert not space.promise(1)

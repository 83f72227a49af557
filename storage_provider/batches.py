"""Taking the items of a stream some at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def in_batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of that many items, and of what is left."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch

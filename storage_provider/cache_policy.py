"""What belongs on local disk, and what has to leave it: the rules, without any file or bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import humanize

from storage_provider.settings import LocalCacheSettings, ProviderSettings

Limit = Literal["max_size", "min_free_space", "full disk"]
"""What keeps more media from being restored."""

_BLOCK = 4096

# Evicting and restoring keep this distance, or every new file would set both off.
_FULL_PERCENT = 90
_FREE_PERCENT = 110

_MINUTE = 60_000
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR

_BANDS = (_HOUR, _DAY, 7 * _DAY, 30 * _DAY, 91 * _DAY, 365 * _DAY)
"""The ages between which media is restored together, newest first."""

# Bins of the histogram: minutes up to a day, hours up to 30 days, then days.
_FINE_BINS = 24 * 60
_MIDDLE_BINS = 29 * 24


def space_of(size: int) -> int:
    """The bytes that a file of that size takes on a disk, which gives out whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class CachePolicy:
    """What belongs on disk, by the settings; moments and ages are milliseconds, sizes bytes."""

    evicts: bool
    """Whether anything may be removed: only where the operator has set limits."""
    max_age: int | None
    max_size: int | None
    min_free: int
    min_age: int

    @classmethod
    def of(cls, settings: LocalCacheSettings | None, min_free: int) -> CachePolicy:
        """`min_free` is what `min_free_space` comes to on the disk in question."""
        given = settings or LocalCacheSettings.parse({})
        max_age = None if given.max_age is None else given.max_age * 1000
        return cls(settings is not None, max_age, given.max_size, min_free, given.min_age * 1000)

    def belongs_since(self, now: int, offloaded_before: int) -> int:
        """Media that was used at this moment or later belongs on disk, as far as there is room."""
        return offloaded_before if self.max_age is None else max(offloaded_before, now - self.max_age)

    def room(self, on_disk: int, free: int) -> tuple[int, Limit]:
        """The bytes that may be restored, and what limits them."""
        by_space = free - self.min_free
        if self.max_size is not None:
            by_size = self.max_size * _FULL_PERCENT // 100 - on_disk
            if by_size < by_space:
                return by_size, "max_size"
        return by_space, "min_free_space"

    def excess(self, on_disk: int, free: int, *, is_full: bool = False) -> int:
        """The bytes that have to leave the disk, whatever their age.

        `is_full` tells that `max_size` has kept something away, be it that there is still a little room.
        """
        if not self.evicts:
            return 0
        by_size = by_space = 0
        if self.max_size is not None and (is_full or on_disk > self.max_size):
            by_size = on_disk - self.max_size * _FULL_PERCENT // 100
        if free < self.min_free:
            by_space = self.min_free * _FREE_PERCENT // 100 - free
        return max(by_size, by_space, 0)

    def out_of_reach(self, on_disk: int, immovable: int, free: int) -> str | None:
        """Why the limits cannot be kept to, whatever is evicted; None where they can."""
        if not self.evicts:
            return None
        if self.max_size is not None and immovable > self.max_size * _FULL_PERCENT // 100:
            return (
                f"{_words(immovable)} on the disk cannot be removed, since it is not in the bucket, or unknown to Synapse; "
                f"max_size is {_words(self.max_size)}, so that hardly anything else stays"
            )
        if free + on_disk - immovable < self.min_free:
            return (
                f"{_words(free)} of the disk are free and min_free_space is {_words(self.min_free)}, which is not to be "
                "reached, as most of the rest is not media that may be removed; so nothing stays on the disk"
            )
        return None

    def plan(self, ages: AgeHistogram, on_disk: int, free: int, *, is_full: bool = False) -> EvictionPlan | None:
        """What to evict of the files in the histogram; None for nothing. `is_full` is as in `excess`."""
        if not self.evicts:
            return None
        by_age = 0 if self.max_age is None else ages.now - self.max_age
        plan = ages.oldest(self.excess(on_disk, free, is_full=is_full))
        if plan is None or plan.before <= by_age:
            return EvictionPlan(by_age, by_age, 0) if self.max_age is not None and ages.has_before(by_age) else None
        return EvictionPlan(max(plan.all_before, by_age), plan.before, plan.of_the_rest)


def _words(size: int) -> str:
    return humanize.naturalsize(size, binary=True)


def bytes_to_leave(settings: ProviderSettings, total: int) -> int:
    """How many bytes of a disk that has room for `total` are to stay free, by `local_cache.min_free_space`."""
    wanted = (settings.local_cache or LocalCacheSettings.parse({})).min_free_space
    if isinstance(wanted, int):
        return wanted
    return total * int(wanted.rstrip("%")) // 100


@dataclass
class EvictionPlan:
    """Which files leave the disk: those used before a moment, and some of those that come next."""

    all_before: int
    before: int
    """Nothing that was used at this moment or later is taken."""
    of_the_rest: int
    """How many bytes of those that were used in between."""

    def takes(self, used: int, size: int) -> bool:
        """Whether a file leaves the disk; each one is asked about once."""
        if used < self.all_before:
            return True
        if used >= self.before or self.of_the_rest <= 0:
            return False
        self.of_the_rest -= space_of(size)
        return True


@dataclass
class AgeHistogram:
    """How many bytes were last used when; a few thousand numbers, however many files there are."""

    now: int
    _bins: dict[int, int] = field(default_factory=dict)

    def add(self, used: int, size: int) -> None:
        if used > self.now:  # by a clock that was wrong: nobody knows how old it is
            return
        index = self._bin(used)
        self._bins[index] = self._bins.get(index, 0) + space_of(size)

    def oldest(self, size: int) -> EvictionPlan | None:
        """The least recently used files that have so many bytes together, or all; None for no bytes."""
        if size <= 0:
            return None
        for index in sorted(self._bins, reverse=True):
            if self._bins[index] >= size:
                return EvictionPlan(self._oldest_in(index), self._oldest_in(index - 1), size)
            size -= self._bins[index]
        if not self._bins:
            return None
        newest = self._oldest_in(min(self._bins) - 1)
        return EvictionPlan(newest, newest, 0)

    def has_before(self, moment: int) -> bool:
        """Whether there may be files that were used before a moment."""
        return bool(self._bins) and self._oldest_in(max(self._bins)) < moment

    def _bin(self, used: int) -> int:
        """0 for the last minute, growing with the age."""
        age = self.now - max(used, 0)
        if age < _DAY:
            return age // _MINUTE
        if age < 30 * _DAY:
            return _FINE_BINS + (age - _DAY) // _HOUR
        return _FINE_BINS + _MIDDLE_BINS + (age - 30 * _DAY) // _DAY

    def _oldest_in(self, index: int) -> int:
        """The first moment that belongs to a bin; for the one before the first, a moment after all."""
        if index < 0:
            return self.now + 1
        if index < _FINE_BINS:
            age = (index + 1) * _MINUTE
        elif index < _FINE_BINS + _MIDDLE_BINS:
            age = _DAY + (index + 1 - _FINE_BINS) * _HOUR
        else:
            age = 30 * _DAY + (index + 1 - _FINE_BINS - _MIDDLE_BINS) * _DAY
        return self.now - age + 1


def bands(now: int, since: int) -> list[tuple[int, int | None]]:
    """The times from `since` on, newest first, each as its begin and its end (None for no end)."""
    return list(_bands(now, since))


def _bands(now: int, since: int) -> Iterator[tuple[int, int | None]]:
    end: int | None = None
    for age in _BANDS:
        begin = now - age
        if begin <= since:
            break
        yield begin, end
        end = begin
    yield since, end


class PathMarks:
    """Remembers paths in flat memory, however many; now and then it takes an unknown one for a known one."""

    def __init__(self, size: int = 2 << 20) -> None:
        self._bits = bytearray(size)
        self._generation = 0

    def add(self, path: str) -> None:
        byte, bit = self._place(path)
        self._bits[byte] |= bit

    def __contains__(self, path: str) -> bool:
        byte, bit = self._place(path)
        return bool(self._bits[byte] & bit)

    def clear(self) -> None:
        self._bits = bytearray(len(self._bits))
        # So that a path which was taken for another one is not taken for it for ever.
        self._generation += 1

    def _place(self, path: str) -> tuple[int, int]:
        number = hash((self._generation, path)) % (len(self._bits) * 8)
        return number >> 3, 1 << (number & 7)

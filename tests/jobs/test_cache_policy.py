"""What belongs on local disk, and what leaves it first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider.cache_policy import AgeHistogram, CachePolicy, EvictionPlan, PathMarks, bands, space_of
from storage_provider.settings import LocalCacheSettings

NOW = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
BLOCK = 4096
GIB = 1 << 30

ages = st.one_of(st.integers(0, 2 * HOUR), st.integers(0, 40 * DAY), st.integers(0, NOW), st.integers(-DAY, 0))


def policy(min_free: int = 0, **limits: object) -> CachePolicy:
    return CachePolicy.of(LocalCacheSettings.parse(limits), min_free)


class TestRoom:
    def test_ends_below_the_limits_so_that_eviction_does_not_begin_at_once(self) -> None:
        assert policy(max_size=1000).room(600, GIB) == (300, "max_size")
        assert policy(min_free=100).room(600, 350) == (250, "min_free_space")
        assert policy(min_free=100, max_size=1000).room(100, 350) == (250, "min_free_space")
        assert policy(min_free=100, max_size=1000).room(800, 350) == (100, "max_size")

    def test_without_limits_is_what_the_default_leaves(self) -> None:
        assert CachePolicy.of(None, 100).room(10**15, 150) == (50, "min_free_space")

    def test_is_used_up_and_more_where_a_limit_is_exceeded(self) -> None:
        assert policy(min_free=100).room(0, 50)[0] < 0


class TestExcess:
    def test_is_nothing_within_the_limits(self) -> None:
        assert policy(min_free=100, max_size=1000).excess(1000, 100) == 0

    def test_goes_back_to_nine_tenths_of_the_size(self) -> None:
        assert policy(max_size=1000).excess(1001, GIB) == 101

    def test_frees_a_little_more_than_asked_for(self) -> None:
        assert policy(min_free=1000).excess(0, 999) == 101

    def test_is_the_greater_of_both(self) -> None:
        assert policy(min_free=1000, max_size=1000).excess(2000, 999) == 1100
        assert policy(min_free=1000, max_size=1000).excess(1001, 0) == 1100

    def test_is_nothing_without_a_local_cache_block(self) -> None:
        assert CachePolicy.of(None, 1000).excess(10**15, 0) == 0
        assert CachePolicy.of(None, 1000).excess(10**15, 0, is_full=True) == 0

    def test_goes_back_to_nine_tenths_where_something_did_not_fit_into_the_rest(self) -> None:
        assert policy(max_size=1000).excess(950, GIB, is_full=True) == 50
        assert policy(max_size=1000).excess(800, GIB, is_full=True) == 0
        assert policy(min_free=100).excess(10**15, 100, is_full=True) == 0


class TestOutOfReach:
    def test_is_told_of_max_size_where_what_has_to_stay_takes_nearly_all_of_it(self) -> None:
        limits = policy(max_size=1000)
        assert limits.out_of_reach(on_disk=2000, immovable=900, free=GIB) is None
        assert "max_size" in str(limits.out_of_reach(on_disk=2000, immovable=901, free=GIB))

    def test_is_told_of_min_free_space_where_nothing_that_may_leave_would_free_it(self) -> None:
        limits = policy(min_free=1000)
        assert limits.out_of_reach(on_disk=500, immovable=100, free=600) is None
        assert "min_free_space" in str(limits.out_of_reach(on_disk=500, immovable=100, free=599))

    def test_is_nothing_without_a_local_cache_block(self) -> None:
        assert CachePolicy.of(None, 1000).out_of_reach(0, 0, 0) is None


class TestPlan:
    def histogram(self, *ages_and_sizes: tuple[int, int]) -> AgeHistogram:
        histogram = AgeHistogram(NOW)
        for age, size in ages_and_sizes:
            histogram.add(NOW - age, size)
        return histogram

    def test_is_none_without_a_local_cache_block(self) -> None:
        histogram = self.histogram((300 * DAY, BLOCK))
        assert CachePolicy.of(None, GIB).plan(histogram, 10**15, 0) is None

    def test_is_none_while_all_that_is_there_belongs_there(self) -> None:
        histogram = self.histogram((2 * DAY, BLOCK))
        assert policy(max_age="7d", max_size="1G").plan(histogram, BLOCK, GIB) is None

    def test_takes_what_is_too_old_and_no_more(self) -> None:
        plan = policy(max_age="7d").plan(self.histogram((8 * DAY, BLOCK), (6 * DAY, BLOCK)), 2 * BLOCK, GIB)
        assert plan is not None
        assert plan.takes(NOW - 7 * DAY - 1, BLOCK)
        assert not plan.takes(NOW - 7 * DAY, BLOCK)

    def test_takes_the_least_recently_used_first(self) -> None:
        histogram = self.histogram(*((age * DAY, BLOCK) for age in range(100)))
        plan = policy(max_size=50 * BLOCK).plan(histogram, 100 * BLOCK, GIB)
        assert plan is not None
        taken = [age for age in range(100) if plan.takes(NOW - age * DAY, BLOCK)]
        # 90 % of 50 files are to stay.
        assert taken == list(range(45, 100))

    def test_makes_room_where_something_did_not_fit(self) -> None:
        histogram = self.histogram(*((age * DAY, BLOCK) for age in range(98)))
        assert policy(max_size=100 * BLOCK).plan(histogram, 98 * BLOCK, GIB) is None
        plan = policy(max_size=100 * BLOCK).plan(histogram, 98 * BLOCK, GIB, is_full=True)
        assert plan is not None
        assert [age for age in range(98) if plan.takes(NOW - age * DAY, BLOCK)] == list(range(90, 98))

    def test_takes_no_more_than_needed_of_media_that_was_last_used_together(self) -> None:
        histogram = self.histogram(*[(400 * DAY, BLOCK)] * 100)
        plan = policy(max_size=90 * BLOCK).plan(histogram, 100 * BLOCK, GIB)
        assert plan is not None
        taken = sum(plan.takes(NOW - 400 * DAY, BLOCK) for _ in range(100))
        assert taken == 19

    def test_age_and_size_add_up_to_one_cut(self) -> None:
        histogram = self.histogram((30 * DAY, BLOCK), (20 * DAY, BLOCK), (10 * DAY, BLOCK))
        plan = policy(max_age="15d", max_size=3 * BLOCK).plan(histogram, 3 * BLOCK, GIB)
        assert plan is not None
        assert [plan.takes(NOW - age * DAY, BLOCK) for age in (30, 20, 10)] == [True, True, False]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(ages, st.integers(0, 10 * BLOCK)), max_size=30), st.integers(0, 60 * BLOCK))
    def test_frees_what_is_asked_for_and_hardly_more(self, files: list[tuple[int, int]], size: int) -> None:
        plan = self.histogram(*files).oldest(size)
        known = [(NOW - age, length) for age, length in files if age >= 0]
        if plan is None:
            assert size == 0 or not known
            return
        taken = [file for file in known if plan.takes(*file)]
        freed = sum(space_of(length) for _, length in taken)
        assert freed >= min(size, sum(space_of(length) for _, length in known))
        # Without one of those that were taken last it would not have been enough.
        of_the_rest = [space_of(length) for used, length in taken if used >= plan.all_before]
        assert not of_the_rest or freed - of_the_rest[-1] < size
        # Nothing stays that was used longer ago than what goes, by more than a bin.
        kept = [used for used, _ in known if not any(used == other for other, _ in taken)]
        for used in kept:
            assert all(gone < used or NOW - gone >= NOW - used - width(NOW - used) for gone, _ in taken)
        assert all(used < plan.before for used, _ in taken)

    def test_leaves_alone_what_was_used_in_the_future(self) -> None:
        assert self.histogram((-DAY, BLOCK)).oldest(BLOCK) is None

    def test_is_flat_in_memory(self) -> None:
        histogram = self.histogram(*((age * 1000, 1) for age in range(0, NOW // 1000, 10_000)))
        assert len(histogram._bins) < 25_000


def width(age: int) -> int:
    return MINUTE if age < DAY else HOUR if age < 30 * DAY else DAY


class TestBands:
    @given(st.integers(0, NOW + DAY))
    def test_follow_each_other_from_the_newest_down_to_the_begin(self, since: int) -> None:
        found = bands(NOW, since)
        assert found[0][1] is None
        assert [end for _, end in found[1:]] == [begin for begin, _ in found[:-1]]
        assert found[-1][0] == since
        assert all(end is None or begin < end for begin, end in found)
        assert len(found) <= 7

    def test_grow_with_the_age(self) -> None:
        assert [begin for begin, _ in bands(NOW, 0)] == [
            NOW - age for age in (HOUR, DAY, 7 * DAY, 30 * DAY, 91 * DAY, 365 * DAY)
        ] + [0]


class TestBelongsSince:
    def test_what_was_removed_on_purpose_does_not_belong(self) -> None:
        assert policy(max_age="7d").belongs_since(NOW, NOW - DAY) == NOW - DAY
        assert policy(max_age="7d").belongs_since(NOW, 0) == NOW - 7 * DAY
        assert policy().belongs_since(NOW, 5) == 5


class TestPathMarks:
    def test_know_what_was_added_until_they_are_cleared(self) -> None:
        marks = PathMarks()
        paths = [f"local_content/ab/cd/{number}" for number in range(1000)]
        for path in paths:
            marks.add(path)
        assert all(path in marks for path in paths)
        assert sum(f"{path}x" in marks for path in paths) < 10
        marks.clear()
        assert not any(path in marks for path in paths)

    def test_mistake_other_paths_after_a_clear(self) -> None:
        marks = PathMarks(size=8)
        paths = [str(number) for number in range(1000)]
        mistaken = []
        for _ in range(2):
            for path in paths[:10]:
                marks.add(path)
            mistaken.append({path for path in paths[10:] if path in marks})
            marks.clear()
        assert mistaken[0] != mistaken[1]


@pytest.mark.parametrize(("size", "space"), [(0, 0), (1, BLOCK), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK)])
def test_files_take_whole_blocks(size: int, space: int) -> None:
    assert space_of(size) == space


def test_plan_takes_all_before_a_moment_and_some_of_the_rest() -> None:
    plan = EvictionPlan(all_before=10, before=20, of_the_rest=BLOCK + 1)
    assert [plan.takes(used, BLOCK) for used in (9, 10, 15, 19, 20, 9)] == [True, True, True, False, False, True]

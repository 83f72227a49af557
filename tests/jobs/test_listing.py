"""Looking keys up in a listing, page by page and without asking for each."""

from __future__ import annotations

import string
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import ObjectInfo
from backends.errors import AccessDenied, BackendUnavailable, NotSupported
from storage_provider import listing as listing_module
from storage_provider.listing import ListingCursor, ListingRefused
from tests.jobs.memory_backend import MemoryBackend

ROOT = "local_content/"
keys = st.text(string.ascii_lowercase[:3] + "-/0é😀", min_size=1, max_size=5).map(lambda text: ROOT + text)


class Listing:
    """A bucket that can be listed, and counts the pages."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.pages = 0

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = sorted((name for name in self.names if name.startswith(prefix)), key=str.encode)
        found = [name for name in found if name.encode() > start_after.encode()]
        while True:
            self.pages += 1
            page, found = found[: listing_module._PAGE], found[listing_module._PAGE :]
            yield from (ObjectInfo(name, 1, "etag") for name in page)
            if not found:
                return


def cursor(listing: Any) -> ListingCursor:
    return ListingCursor(listing, ROOT)


@settings(max_examples=100, deadline=None)
@given(st.sets(keys), st.lists(keys), st.booleans(), st.integers(1, 3))
def test_finds_what_is_there_in_any_order(there: set[str], asked: list[str], in_order: bool, page: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing_module, "_PAGE", page)
        looking = cursor(Listing(there))
        for key in sorted(asked, key=str.encode) if in_order else asked:
            found = looking.find(key)
            assert (found.key if found else None) == (key if key in there else None)


def test_dense_questions_cost_a_page_for_a_thousand() -> None:
    names = [f"{ROOT}{number:06}" for number in range(10_000)]
    listing = Listing(set(names))
    looking = cursor(listing)
    assert all(looking.find(name) for name in names)
    assert listing.pages <= 11


def test_few_questions_skip_what_lies_between() -> None:
    listing = Listing({f"{ROOT}{number:06}" for number in range(100_000)})
    looking = cursor(listing)
    assert [bool(looking.find(f"{ROOT}{number:06}")) for number in (5, 50_000, 99_999, 100_000)] == [1, 1, 1, 0]
    assert listing.pages <= 4


def test_end_of_the_listing_costs_nothing_more() -> None:
    listing = Listing({f"{ROOT}a"})
    looking = cursor(listing)
    assert [looking.find(f"{ROOT}{name}") for name in "bcdef"] == [None] * 5
    assert listing.pages == 1


def test_next_page_is_fetched_before_it_is_asked_for_where_the_last_one_answered_much() -> None:
    names = [f"{ROOT}{number:06}" for number in range(3000)]
    fetched = threading.Event()

    class Noting(Listing):
        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            yield from super().list(prefix, start_after=start_after)
            if start_after == names[999]:
                fetched.set()

    listing = Noting(set(names[:1500]))
    looking = ListingCursor(listing, ROOT, read_ahead=True)  # type: ignore[arg-type]
    assert all(looking.find(name) for name in names[:20])
    assert fetched.wait(60)
    assert all(looking.find(name) for name in names[20:1500])
    assert listing.pages == 2


def test_keys_that_lie_far_apart_are_left_to_be_asked_for() -> None:
    listing = Listing({f"{ROOT}{number:06}" for number in range(100_000)})
    asked = [f"{ROOT}{number:06}" for number in range(0, 100_000, 5000)]
    answered = dict(cursor(listing).find_all(asked))
    assert list(answered) == asked[: len(answered)] and all(answered.values())
    assert listing.pages <= 3
    dense = [f"{ROOT}{number:06}" for number in range(0, 100_000, 50)]
    assert len(dict(cursor(listing).find_all(dense))) == len(dense)


def names_of(*numbers: int) -> list[str]:
    return [f"{ROOT}{number:06}" for number in numbers]


def test_gaps_of_each_page_are_checked_by_asking_for_objects_more_and_more_seldom() -> None:
    bucket = MemoryBackend()
    bucket.objects |= dict.fromkeys(names_of(*range(0, 4000, 2)), b"")
    looking = ListingCursor(bucket, ROOT, checks_gaps=True)
    asked = names_of(*range(20), *range(3001, 3011))
    assert [looking.find(name) is not None for name in asked] == [name in bucket.objects for name in asked]
    assert bucket.made("stat") == names_of(1, 3, 7, 15, 3001, 3003, 3007)


@pytest.mark.parametrize("there", [1, 2, 8])
def test_listing_that_lacks_what_is_there_is_none_to_go_by(there: int) -> None:
    bucket = MemoryBackend()
    bucket.objects |= dict.fromkeys(names_of(there), b"")
    bucket.list = lambda prefix="", *, start_after="": iter(())  # type: ignore[method-assign]
    looking = ListingCursor(bucket, ROOT, checks_gaps=True)
    with pytest.raises(ListingRefused, match=names_of(there)[0]):
        list(looking.find_all(names_of(*range(1, 10))))


def test_gap_that_may_not_be_checked_is_one() -> None:
    bucket = MemoryBackend()

    def refuse(operation: str, key: str) -> None:
        if operation == "stat":
            raise AccessDenied("no", operation=operation, key=key)

    bucket.before = refuse
    assert ListingCursor(bucket, ROOT, checks_gaps=True).find(f"{ROOT}a") is None


@pytest.mark.parametrize("kind", [AccessDenied, NotSupported])
def test_refused_listing_is_told_apart(kind: type[AccessDenied | NotSupported]) -> None:
    class Refusing(Listing):
        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            yield from ()
            raise kind("no", operation="list")

    with pytest.raises(ListingRefused):
        cursor(Refusing(set())).find(f"{ROOT}a")


def test_bucket_out_of_reach_is_no_refusal() -> None:
    class Failing(Listing):
        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            yield from ()
            raise BackendUnavailable("no", operation="list")

    with pytest.raises(BackendUnavailable):
        cursor(Failing(set())).find(f"{ROOT}a")

"""Files and the walk over them: one test for each promise of `storage_provider.media_store` and what it is made of."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_provider.directories import FileState
from storage_provider.media_paths import (
    MEDIA_ROOTS,
    Media,
    UnsafePath,
    content_path,
    thumbnail_directory,
)
from storage_provider.media_store import OWN_DIRECTORY, Locked, MediaStore, MediaStoreError
from tests.jobs.nasty_names import nasty_media, thumbnail_names
from tests.jobs.plain_store import PATHS, everything_in, refuse_to_walk, run_and_kill, state_of, write


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    root = tmp_path / "media_store"
    root.mkdir()
    return MediaStore(root)


def walked(store: MediaStore, *roots: str) -> list[str]:
    return [file.path for root in roots for file in store.walk_files(root)]


def in_byte_order(paths: list[str]) -> list[str]:
    return sorted(paths, key=os.fsencode)


class TestWalk:
    @settings(max_examples=60, deadline=None)
    @given(media=st.lists(nasty_media, max_size=12, unique=True), names=st.sets(thumbnail_names, max_size=3))
    def test_is_in_byte_order_of_the_whole_path(self, media: list[Media], names: set[str]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = MediaStore(Path(directory))
            paths = [content_path(each) for each in media]
            paths += [f"{thumbnail_directory(each)}/{name}" for each in media for name in names]
            for path in paths:
                write(store, path)
            for root in MEDIA_ROOTS:
                expected = in_byte_order([path for path in paths if path.startswith(root)])
                assert walked(store, root) == expected

    def test_tells_the_state_of_the_files_and_since_when_they_are_there(self, store: MediaStore) -> None:
        for path in PATHS:
            os.utime(write(store, path), (1, 1))
        for path, state, placed_ms in (file for root in MEDIA_ROOTS for file in store.walk_files(root)):
            assert state == store.state(path)
            assert placed_ms == (store.root / path).stat().st_ctime_ns // 1_000_000

    @pytest.mark.parametrize("path", PATHS)
    def test_tells_whether_there_is_any_media(self, store: MediaStore, path: str) -> None:
        for other in ("local_content/stray", "url_cache/ab/cd/efgh", f"{OWN_DIRECTORY}/tmp/1-2"):
            write(store, other)
        assert not store.holds_media()
        write(store, path)
        assert store.holds_media()

    def test_passes_over_what_is_not_of_the_layout(self, store: MediaStore) -> None:
        for path in [
            *[
                "local_content/stray",
                "local_content/abc/cd/efgh",
                "local_content/ab/stray",
                "local_content/ab/cd/ef/gh",
            ],
            *[
                "local_thumbnails/ab/cd/efgh/32-32-image-png-crop.tmp",
                "local_thumbnails/ab/cd/stray",
                "url_cache/ab/cd/efgh",
            ],
            *[
                "remote_content/a.org/stray",
                f"{OWN_DIRECTORY}/tmp/1-2",
                "remote_thumbnail/ab/cd/efgh/32-32-image-png-crop",
            ],
        ]:
            write(store, path)
        (store.root / "local_content" / "ab" / "cd" / "directory").mkdir()
        os.mkfifo(store.root / "local_content" / "ab" / "cd" / "fifo-")
        for path in PATHS:
            write(store, path)
        assert walked(store, *MEDIA_ROOTS) == PATHS

    def test_passes_over_names_that_are_not_utf_8(self, store: MediaStore) -> None:
        directory = store.root / "local_content" / "ab" / "cd"
        directory.mkdir(parents=True)
        for name in (b"ef\xff", b"efgh"):
            Path(os.fsdecode(os.fsencode(directory) + b"/" + name)).write_bytes(b"")
        assert walked(store, "local_content/") == ["local_content/ab/cd/efgh"]

    def test_passes_over_what_it_may_not_read(self, store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
        write(store, PATHS[2])
        # On top of each ext4 disk, such as one that is mounted there.
        (store.root / "remote_content" / "lost+found").mkdir()
        refuse_to_walk(monkeypatch, "lost+found")
        assert walked(store, "remote_content/") == [PATHS[2]]
        assert store.holds_media()

    def test_of_a_store_without_media_is_empty(self, store: MediaStore) -> None:
        assert walked(store, *MEDIA_ROOTS) == []

    @pytest.mark.parametrize("root", ["", "local_content", "../", "url_cache/", "local_content/ab/"])
    def test_goes_below_nothing_else(self, store: MediaStore, root: str) -> None:
        with pytest.raises(UnsafePath):
            next(store.walk_files(root))

    def test_goes_on_where_directories_vanish(self, store: MediaStore) -> None:
        paths = [f"local_content/{first}b/{second}d/efgh" for first in "abc" for second in "abc"]
        for path in paths:
            write(store, path)
        walk = store.walk_files("local_content/")
        assert next(walk).path == paths[0]
        # One that the walk is in, one that it has seen the name of, and a whole branch.
        shutil.rmtree(store.root / "local_content/ab/ad")
        shutil.rmtree(store.root / "local_content/ab/bd")
        shutil.rmtree(store.root / "local_content/bb")
        assert [file.path for file in walk] == ["local_content/ab/cd/efgh", *paths[6:]]

    def test_holds_one_directory_of_each_level_in_memory(self, store: MediaStore) -> None:
        for first in range(50):
            for second in range(2):
                directory = store.root / f"local_content/{first:02}/{second:02}"
                directory.mkdir(parents=True)
                for number in range(40):
                    (directory / f"{number:040}").touch()
        tracemalloc.start()
        try:
            files = sum(1 for _ in store.walk_files("local_content/"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert files == 4000
        # All of them would take 400 KiB.
        assert peak < 100 << 10

    def test_that_is_given_up_leaves_nothing_open(self, store: MediaStore) -> None:
        for path in PATHS:
            write(store, path)
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        walk = store.walk_files("remote_thumbnail/")
        next(walk)
        assert isinstance(walk, Iterator)
        walk.close()  # type: ignore[attr-defined]
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


class TestReading:
    def test_state_tells_size_time_and_inode(self, store: MediaStore) -> None:
        file = write(store, PATHS[0], b"12345")
        os.utime(file, ns=(1, 1_700_000_000_123_456_789))
        assert store.state(PATHS[0]) == FileState(5, 1_700_000_000_123_456_789, file.stat().st_ino)

    @pytest.mark.parametrize("path", PATHS)
    def test_a_path_is_vacant_where_there_is_no_file(self, store: MediaStore, path: str) -> None:
        assert store.is_vacant(path)
        file = write(store, path)
        assert not store.is_vacant(path)
        file.rename(file.with_name("elsewhere"))
        assert store.is_vacant(path)
        file.symlink_to("elsewhere")
        assert store.is_vacant(path)
        with pytest.raises(UnsafePath):
            store.is_vacant("local_content/../../../etc/passwd")

    def test_state_of_an_open_file_is_that_of_its_path(self, store: MediaStore) -> None:
        write(store, PATHS[0])
        with store.open(PATHS[0]) as file:
            assert FileState.of(file) == store.state(PATHS[0])

    @pytest.mark.parametrize("path", PATHS)
    def test_of_what_is_not_there(self, store: MediaStore, path: str) -> None:
        assert store.state(path) is None
        with pytest.raises(FileNotFoundError):
            store.open(path)
        (store.root / path).parent.mkdir(parents=True)
        assert store.state(path) is None
        with pytest.raises(FileNotFoundError):
            store.open(path)

    @pytest.mark.parametrize(
        "path", ["../x", "/etc/passwd", "local_content/../x", "url_cache/ab/cd/efgh", "local_content"]
    )
    def test_of_other_paths_is_refused(self, store: MediaStore, path: str) -> None:
        (store.root.parent / "x").write_bytes(b"")
        with pytest.raises(UnsafePath):
            store.state(path)
        with pytest.raises(UnsafePath):
            store.open(path)
        with pytest.raises(UnsafePath):
            store.remove(path, FileState(0, 0, 0))
        with pytest.raises(UnsafePath), store.create(path):
            pass

    def test_opens_the_content(self, store: MediaStore) -> None:
        write(store, PATHS[2], b"bytes")
        with store.open(PATHS[2]) as file:
            assert file.read() == b"bytes"

    def test_does_not_wait_for_the_writer_of_a_fifo(self, store: MediaStore) -> None:
        write(store, PATHS[0]).unlink()
        os.mkfifo(store.root / PATHS[0])
        assert store.state(PATHS[0]) is None
        with pytest.raises(OSError, match="not a regular file"):
            store.open(PATHS[0])

    def test_a_directory_is_not_opened_and_leaves_nothing_open(self, store: MediaStore) -> None:
        (store.root / PATHS[0]).mkdir(parents=True)
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(OSError, match="not a regular file"):
            store.open(PATHS[0])
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    def test_free_space_is_that_of_the_disk(self, store: MediaStore) -> None:
        free, total = store.free_space()
        disk = shutil.disk_usage(store.root)
        assert total == disk.total
        assert 0 < free <= total
        assert abs(free - disk.free) < total // 10


class TestSymbolicLinks:
    """At every level below the store, each to a directory or file outside that has what is asked for."""

    CASES: ClassVar = [(path, level) for path in PATHS for level in range(path.count("/") + 1)]

    @pytest.fixture
    def outside(self, store: MediaStore) -> Path:
        """What the links lead to: all files, under the same names."""
        outside = MediaStore(store.root.parent / "outside")
        for path in PATHS:
            write(outside, path, b"not ours")
        return outside.root

    @staticmethod
    def plant(store: MediaStore, outside: Path, path: str, level: int) -> None:
        segments = path.split("/")
        link = store.root.joinpath(*segments[: level + 1])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(outside.joinpath(*segments[: level + 1]))

    @pytest.mark.parametrize(("path", "level"), CASES)
    def test_are_not_read_through(self, store: MediaStore, outside: Path, path: str, level: int) -> None:
        self.plant(store, outside, path, level)
        assert (store.root / path).read_bytes() == b"not ours"
        assert store.state(path) is None
        with pytest.raises(OSError):
            store.open(path)
        assert walked(store, path[: path.index("/") + 1]) == []
        assert not store.holds_media()

    @pytest.mark.parametrize(("path", "level"), CASES)
    def test_are_not_replaced_through(self, store: MediaStore, outside: Path, path: str, level: int) -> None:
        self.plant(store, outside, path, level)
        status = (outside / path).stat()
        with store.temporary_file(PATHS[0]) as temporary:
            temporary.file.write(b"secret")
            assert temporary.replace(path, FileState(status.st_size, status.st_mtime_ns, status.st_ino)) is None
        assert (outside / path).read_bytes() == b"not ours"

    @pytest.mark.parametrize(("path", "level"), CASES)
    def test_are_not_removed_through(self, store: MediaStore, outside: Path, path: str, level: int) -> None:
        self.plant(store, outside, path, level)
        status = (outside / path).stat()
        before = everything_in(outside)
        assert not store.remove(path, FileState(status.st_size, status.st_mtime_ns, status.st_ino))
        assert everything_in(outside) == before
        assert (store.root / path).exists()

    @pytest.mark.parametrize(("path", "level"), CASES)
    def test_are_not_written_through(self, store: MediaStore, outside: Path, path: str, level: int) -> None:
        self.plant(store, outside, path, level)
        (outside / path).unlink()
        before = everything_in(outside)
        with pytest.raises(OSError), store.create(path) as new:
            new.file.write(b"secret")
        assert everything_in(outside) == before

    def test_for_our_own_directory_are_not_followed(self, store: MediaStore, outside: Path) -> None:
        (store.root / OWN_DIRECTORY).symlink_to(outside)
        (outside / "tmp").mkdir()
        before = everything_in(outside)
        with pytest.raises(OSError), store.create(PATHS[0]) as new:
            new.file.write(b"secret")
        with pytest.raises(OSError), store.lock("x"):
            pass
        with pytest.raises(OSError):
            store.set_offloaded_before(1)
        (outside / "tmp" / "stale").touch()
        assert store.remove_stale_temporary_files() == 0
        assert everything_in(outside) == before | {"tmp/stale"}

    def test_may_lead_to_the_store_itself(self, store: MediaStore) -> None:
        link = store.root.parent / "link"
        link.symlink_to(store.root)
        write(store, PATHS[0])
        linked = MediaStore(link)
        linked.check()
        assert walked(linked, "local_content/") == [PATHS[0]]
        assert linked.remove(PATHS[0], state_of(linked, PATHS[0]))

    @pytest.mark.parametrize("name", [root.rstrip("/") for root in MEDIA_ROOTS])
    def test_that_hide_media_are_told(self, store: MediaStore, outside: Path, name: str) -> None:
        (store.root / name).symlink_to(outside / name)
        with pytest.raises(MediaStoreError, match=f"{name} is a symbolic link"):
            store.check()


class TestRemoving:
    @pytest.mark.parametrize("path", PATHS)
    def test_takes_the_file_and_the_directories_that_it_leaves_empty(self, store: MediaStore, path: str) -> None:
        write(store, path)
        assert store.remove(path, state_of(store, path))
        assert everything_in(store.root) == {path.split("/")[0]}

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("level", [1, 2, -1])
    def test_leaves_directories_that_hold_something_else(self, store: MediaStore, path: str, level: int) -> None:
        write(store, path)
        kept = store.root.joinpath(*path.split("/")[:level], "something")
        kept.touch()
        assert store.remove(path, state_of(store, path))
        assert everything_in(store.root) == everything_in_path(str(kept.relative_to(store.root)))

    @pytest.mark.parametrize("change", ["size", "time", "inode"])
    def test_leaves_a_file_that_has_changed(self, store: MediaStore, change: str) -> None:
        file = write(store, PATHS[0], b"before")
        expected = state_of(store, PATHS[0])
        if change == "inode":
            copy = file.with_name("copy")
            shutil.copy2(file, copy)
            copy.replace(file)
        else:
            file.write_bytes(b"before" if change == "time" else b"after it")
            times = (expected.mtime_ns + (change == "time"),) * 2
            os.utime(file, ns=times)
        assert not store.remove(PATHS[0], expected)
        assert file.exists()

    def test_tells_that_there_was_nothing(self, store: MediaStore) -> None:
        assert not store.remove(PATHS[0], FileState(0, 0, 0))
        (store.root / PATHS[0]).parent.mkdir(parents=True)
        assert not store.remove(PATHS[0], FileState(0, 0, 0))

    def test_tells_what_the_system_refuses(self, store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
        write(store, PATHS[0])

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        expected = state_of(store, PATHS[0])
        monkeypatch.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError):
            store.remove(PATHS[0], expected)


def everything_in_path(path: str) -> set[str]:
    segments = path.split("/")
    return {"/".join(segments[: level + 1]) for level in range(len(segments))}


class TestLocks:
    def test_are_held_by_one(self, store: MediaStore) -> None:
        with store.lock("job"):
            with pytest.raises(Locked), MediaStore(store.root).lock("job"):
                pass
            with store.lock("another"):
                pass
        with store.lock("job"):
            pass

    def test_are_free_again_after_an_error(self, store: MediaStore) -> None:
        with pytest.raises(ZeroDivisionError), store.lock("job"):
            raise ZeroDivisionError
        with store.lock("job"):
            pass

    def test_that_cannot_be_had_are_errors_with_the_whole_path(self, store: MediaStore) -> None:
        path = store.root / OWN_DIRECTORY / "job.lock"
        path.mkdir(parents=True)
        with pytest.raises(OSError) as caught, store.lock("job"):
            pass
        assert (caught.value.filename, caught.value.strerror) == (str(path), "Is a directory")

    def test_go_with_a_killed_process(self, store: MediaStore) -> None:
        def while_it_runs() -> None:
            with pytest.raises(Locked), store.lock("job"):
                pass

        run_and_kill(store, "with store.lock('job'): wait()", while_it_runs)
        with store.lock("job"):
            pass


class TestStamp:
    def test_is_nothing_before_the_first_removal(self, store: MediaStore) -> None:
        assert store.offloaded_before() is None
        assert everything_in(store.root) == set()

    def test_moves_forward_only(self, store: MediaStore) -> None:
        for moment, expected in [(1_700_000_000_000, 1_700_000_000_000), (5, 1_700_000_000_000), (1 << 42, 1 << 42)]:
            store.set_offloaded_before(moment)
            assert store.offloaded_before() == expected
            assert MediaStore(store.root).offloaded_before() == expected

    def test_is_the_latest_of_many_at_once(self, store: MediaStore) -> None:
        moments = random.Random(1).sample(range(10_000), 200)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(store.set_offloaded_before, moments))
        assert store.offloaded_before() == max(moments)

    # The last two are what a crash may leave of a line that is written over a shorter or a longer one.
    @pytest.mark.parametrize("content", ["", "yesterday", "12 13", "17", "1700000000000\n999\n"])
    def test_that_is_no_number_is_an_error_and_can_be_set_anew(self, store: MediaStore, content: str) -> None:
        store.set_offloaded_before(1)
        (store.root / OWN_DIRECTORY / "offloaded_before").write_text(content)
        with pytest.raises(MediaStoreError, match="offloaded_before"):
            store.offloaded_before()
        store.set_offloaded_before(2)
        assert store.offloaded_before() == 2

    def test_survives_being_killed_while_it_is_written(self, store: MediaStore) -> None:
        store.set_offloaded_before(1)
        run_and_kill(store, "import os; os.rename = lambda *a, **k: wait()\nstore.set_offloaded_before(2)")
        assert store.offloaded_before() == 1
        store.set_offloaded_before(3)
        assert store.offloaded_before() == 3

    @pytest.mark.parametrize("there", ["0\n", "1600000000000\n", "99999999999999999\n"])
    def test_moves_forward_on_a_full_disk(self, small_disk: Path, there: str) -> None:
        store = MediaStore(small_disk)
        store.set_offloaded_before(0)
        file = small_disk / OWN_DIRECTORY / "offloaded_before"
        file.write_text(there)
        fill(small_disk)
        store.set_offloaded_before(1_700_000_000_000)
        assert store.offloaded_before() == 1_700_000_000_000
        assert file.read_text() == "1700000000000\n"

    def test_that_has_no_room_at_all_is_told(self, small_disk: Path) -> None:
        store = MediaStore(small_disk)
        with store.lock("other"):
            fill(small_disk)
            with pytest.raises(OSError, match="No space left"):
                store.set_offloaded_before(1)
        assert store.offloaded_before() is None

    def test_that_lies_in_the_future_is_replaced(self, store: MediaStore) -> None:
        day, now = 86_400_000, 1_700_000_000_000
        store = MediaStore(store.root, clock=lambda: now / 1000)
        store.set_offloaded_before(now + day // 2)
        store.set_offloaded_before(now)
        assert store.offloaded_before() == now + day // 2
        store.set_offloaded_before(now + 3650 * day)
        store.set_offloaded_before(now)
        assert store.offloaded_before() == now


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives away and writes what belongs to others")
class TestNamesOfForeignFiles:
    """The owner of the store may plant them where the system allows it (`fs.protected_hardlinks` of Linux is 0)."""

    @pytest.fixture
    def foreign(self, tmp_path: Path) -> Path:
        foreign = tmp_path / "foreign"
        foreign.write_text("1\n")
        return foreign

    @pytest.mark.parametrize("name", ["job.lock", "offloaded_before.lock", "offloaded_before.new", "listed_at.new"])
    def test_are_left_alone_by_root(self, store: MediaStore, foreign: Path, name: str) -> None:
        before = foreign.stat()
        own = store.root / OWN_DIRECTORY
        own.mkdir()
        for path in (store.root, own):
            os.chown(path, 12345, 54321)
        (own / name).hardlink_to(foreign)
        with store.lock("job"):
            store.set_offloaded_before(5)
            store.set_listed_at(5)
        assert (store.offloaded_before(), store.listed_at()) == (5, 5)
        assert foreign.read_text() == "1\n"
        assert foreign.stat().st_uid == before.st_uid

    def test_are_left_alone_on_a_full_disk(self, small_disk: Path) -> None:
        store = MediaStore(small_disk)
        store.set_offloaded_before(1)
        own, foreign = small_disk / OWN_DIRECTORY, small_disk / "foreign"
        foreign.write_text("1\n")
        os.chown(own, 12345, 54321)
        (own / "offloaded_before").unlink()
        (own / "offloaded_before").hardlink_to(foreign)
        fill(small_disk)
        with pytest.raises(PermissionError):
            store.set_offloaded_before(5)
        assert foreign.read_text() == "1\n"


def test_what_others_on_the_machine_could_hold_or_read_is_not_theirs(store: MediaStore) -> None:
    umask = os.umask(0o022)
    try:
        with store.lock("job"), store.temporary_directory("local_content"):
            pass
    finally:
        os.umask(umask)
    assert (store.root / OWN_DIRECTORY).stat().st_mode & 0o007 == 0


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(1 << 16))


class TestLastListing:
    def test_is_nothing_before_the_first_one(self, store: MediaStore) -> None:
        assert store.listed_at() is None

    def test_is_kept(self, store: MediaStore) -> None:
        for moment in (1_700_000_000_000, 5):
            store.set_listed_at(moment)
            assert MediaStore(store.root).listed_at() == moment

    def test_that_is_no_number_counts_as_none(self, store: MediaStore) -> None:
        store.set_listed_at(1)
        (store.root / OWN_DIRECTORY / "listed_at").write_text("yesterday")
        assert store.listed_at() is None


class TestCheck:
    def test_accepts_a_store_and_an_empty_directory(self, store: MediaStore) -> None:
        store.check()
        write(store, PATHS[0])
        store.check()

    def test_refuses_what_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for name in ("missing", "file"):
            with pytest.raises(MediaStoreError, match=name):
                MediaStore(tmp_path / name).check()

    def test_tells_a_store_without_media_from_a_directory_where_none_is_mounted(self, store: MediaStore) -> None:
        (store.root / "lost+found").mkdir()
        store.set_offloaded_before(1)
        with pytest.raises(MediaStoreError, match=r"local_content.*mounted"):
            store.check_is_mounted()
        (store.root / "remote_thumbnail").mkdir()
        store.check_is_mounted()

"""Files that are put into the store: one test for each promise of `storage_provider.temporary_files`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage_provider.media_store import OWN_DIRECTORY, MediaStore
from tests.jobs.plain_store import PATHS, everything_in, run_and_kill, state_of, write

# Files that have no name until they get their place, and those that have one of their own before.
both_ways = pytest.mark.parametrize("store", ["nameless", "named"], indirect=True)
named = pytest.mark.parametrize("store", ["named"], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MediaStore:
    if getattr(request, "param", None) == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    root = tmp_path / "media_store"
    root.mkdir()
    return MediaStore(root)


@pytest.fixture
def mounted(store: MediaStore, small_disk: Path) -> Iterator[Path]:
    """A part of the store on a disk of its own."""
    directory = store.root / "remote_content"
    directory.mkdir()
    subprocess.run(["mount", "--bind", small_disk, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@both_ways
class TestCreating:
    @pytest.mark.parametrize("path", PATHS)
    def test_puts_a_whole_file_in_place_at_the_end(self, store: MediaStore, path: str) -> None:
        with store.create(path) as new:
            new.file.write(b"one ")
            new.file.flush()
            assert store.state(path) is None
            new.file.write(b"two")
        assert (store.root / path).read_bytes() == b"one two"
        assert list((store.root / OWN_DIRECTORY / "tmp").iterdir()) == []

    def test_can_be_read_again_before_the_end(self, store: MediaStore) -> None:
        with store.create(PATHS[0]) as new:
            new.file.write(b"check me")
            new.file.seek(0)
            assert new.file.read() == b"check me"

    def test_sets_the_time(self, store: MediaStore) -> None:
        with store.create(PATHS[0]) as new:
            new.file.write(b"x")
            new.sync(1_600_000_000.5)
        assert state_of(store, PATHS[0]).mtime_ns == 1_600_000_000_500_000_000

    def test_is_on_the_disk_before_it_has_its_name(self, store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
        with store.create(PATHS[1]):
            pass  # by now it knows how files get their names here
        order: list[str] = []
        fsync, link = os.fsync, os.link

        def synced(file: int) -> None:
            order.append(f"fsync {os.fstat(file).st_size}")
            fsync(file)

        def linked(*args: Any, **kwargs: Any) -> None:
            order.append("link")
            link(*args, **kwargs)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "link", linked)
        with store.create(PATHS[0]) as new:
            new.file.write(b"12345")
        assert order == ["fsync 5", "link"]

    def test_a_directory_that_nfs_calls_stale_is_opened_again(
        self, store: MediaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with store.create(PATHS[1]):
            pass  # by now it knows how files get their names here
        errors = [OSError(errno.ESTALE, "Stale file handle")]
        link = os.link

        def fail_once(*args: Any, **kwargs: Any) -> None:
            if errors:
                raise errors.pop()
            link(*args, **kwargs)

        monkeypatch.setattr(os, "link", fail_once)
        with store.create(PATHS[0]) as new:
            new.file.write(b"content")
        assert (store.root / PATHS[0]).read_bytes() == b"content"
        assert not errors

    def test_never_replaces_a_file(self, store: MediaStore) -> None:
        write(store, PATHS[0], b"first")
        with pytest.raises(FileExistsError), store.create(PATHS[0]) as new:
            new.file.write(b"second")
        assert (store.root / PATHS[0]).read_bytes() == b"first"
        assert list((store.root / OWN_DIRECTORY / "tmp").iterdir()) == []

    def test_leaves_nothing_after_an_error(self, store: MediaStore) -> None:
        with pytest.raises(ZeroDivisionError), store.create(PATHS[0]) as new:
            new.file.write(b"x")
            raise ZeroDivisionError
        assert everything_in(store.root) - {"local_content"} == {OWN_DIRECTORY, f"{OWN_DIRECTORY}/tmp"}

    def test_by_many_at_once_lets_one_win(self, store: MediaStore) -> None:
        barrier = threading.Barrier(8)

        def create(number: int) -> bool:
            try:
                with store.create(PATHS[0]) as new:
                    new.file.write(b"%d" % number * 1000)
                    barrier.wait()
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(create, range(8)))
        assert won.count(True) == 1
        assert (store.root / PATHS[0]).read_bytes() == b"%d" % won.index(True) * 1000

    def test_stands_others_that_prune_the_same_directories(self, store: MediaStore) -> None:
        def create_and_remove(path: str) -> None:
            for _ in range(300):
                with store.create(path) as new:
                    new.file.write(b"x")
                assert store.remove(path, state_of(store, path))

        paths = ["local_content/ab/cd/efgh", "local_content/ab/cd/ijkl", "local_content/ab/ef/ghij"]
        with ThreadPoolExecutor(len(paths)) as threads:
            for done in [threads.submit(create_and_remove, path) for path in paths]:
                done.result()
        assert list(store.walk_files("local_content/")) == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root creates for somebody else")
    def test_by_root_belongs_to_the_owner_of_the_store(self, store: MediaStore) -> None:
        os.chown(store.root, 12345, 54321)
        with store.create(PATHS[2]) as new:
            new.file.write(b"x")
        with store.lock("job"):
            pass
        store.set_offloaded_before(1)
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in store.root.rglob("*")}
        assert owners == {(12345, 54321)}
        assert len(everything_in(store.root)) > 8

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root creates for somebody else")
    def test_by_root_is_for_the_group_what_its_directory_is(self, store: MediaStore) -> None:
        # As a volume of Kubernetes is with `fsGroup`, and as no cron of root's would make anything in it.
        os.chown(store.root, 0, 54321)
        store.root.chmod(0o2770)
        umask = os.umask(0o077)
        try:
            with store.create(PATHS[2]) as new:
                new.file.write(b"x")
            with store.lock("job"):
                pass
            store.set_offloaded_before(1)
        finally:
            os.umask(umask)
        for path in store.root.rglob("*"):
            status = path.stat()
            rights = 0o2770 if path.is_dir() else 0o660
            assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (54321, rights), path

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root creates for somebody else")
    def test_by_root_belongs_to_the_owner_of_the_directory_that_it_is_in(self, store: MediaStore) -> None:
        (store.root / "remote_content").mkdir()
        os.chown(store.root / "remote_content", 12345, 54321)
        with store.create(PATHS[2]) as new:
            new.file.write(b"x")
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in (store.root / "remote_content").rglob("*")}
        assert owners == {(12345, 54321)}

    def test_by_root_is_possible_where_there_are_no_owners(
        self, store: MediaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(os, "fchown", refuse)
        with store.lock("job"), store.create(PATHS[0]) as new:
            new.file.write(b"x")
        assert (store.root / PATHS[0]).read_bytes() == b"x"

    def test_leaves_no_file_open(self, store: MediaStore) -> None:
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(2):
            with pytest.raises((FileExistsError, ZeroDivisionError)), store.create(PATHS[0]):
                raise ZeroDivisionError
            with store.create(PATHS[2]), store.lock("x"):
                store.set_offloaded_before(1)
            assert store.remove(PATHS[2], state_of(store, PATHS[2]))
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@both_ways
class TestReplacing:
    def test_costs_one_write_to_the_disk(self, store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        with store.temporary_file(PATHS[0]) as temporary:
            temporary.file.write(b"whole")
            temporary.sync(12.0)
            temporary.place(PATHS[0])
        assert len(synced) == 1
        assert (store.root / PATHS[0]).stat().st_mtime == 12.0

    def test_takes_the_place_of_the_file_at_once(self, store: MediaStore) -> None:
        file = write(store, PATHS[0], b"damaged")
        with file.open("rb") as reader, store.temporary_file(PATHS[0]) as temporary:
            temporary.file.write(b"whole")
            temporary.finish(12.0)
            state = temporary.replace(PATHS[0], state_of(store, PATHS[0]))
            assert state == store.state(PATHS[0])
            assert reader.read() == b"damaged"
        assert (file.read_bytes(), file.stat().st_mtime) == (b"whole", 12.0)
        assert list((store.root / OWN_DIRECTORY / "tmp").iterdir()) == []

    def test_leaves_a_file_that_has_changed_or_gone(self, store: MediaStore) -> None:
        file = write(store, PATHS[0], b"damaged")
        expected = state_of(store, PATHS[0])
        file.write_bytes(b"changed since")
        with store.temporary_file(PATHS[0]) as temporary:
            assert temporary.replace(PATHS[0], expected) is None
            assert file.read_bytes() == b"changed since"
            file.unlink()
            assert temporary.replace(PATHS[0], expected) is None
            file.parent.rmdir()
            assert temporary.replace(PATHS[0], expected) is None
        assert not file.exists()


class TestTemporaryFiles:
    CREATE = "with store.create('local_content/ab/cd/efgh') as new: new.file.write(b'x'); wait()"

    @named
    def test_of_killed_processes_are_removed(self, store: MediaStore) -> None:
        run_and_kill(store, f"import os; del os.O_TMPFILE\n{self.CREATE}")
        temporary = store.root / OWN_DIRECTORY / "tmp"
        assert len(list(temporary.iterdir())) == 1
        assert store.remove_stale_temporary_files() == 1
        assert list(temporary.iterdir()) == []

    def test_without_a_name_go_with_the_process(self, store: MediaStore) -> None:
        run_and_kill(store, self.CREATE)
        assert not [path for path in store.root.rglob("*") if path.is_file()]

    @both_ways
    def test_in_use_stay(self, store: MediaStore) -> None:
        with store.create(PATHS[0]) as new:
            new.file.write(b"x")
            assert store.remove_stale_temporary_files() == 0
        assert (store.root / PATHS[0]).read_bytes() == b"x"

    @named
    def test_taken_for_stale_before_they_were_locked_are_made_again(
        self, store: MediaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flock = fcntl.flock
        removed: list[int] = []

        def late(file: Any, operation: int) -> None:
            if not removed:
                removed.append(0)
                removed[0] = store.remove_stale_temporary_files()
            flock(file, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        with store.create(PATHS[0]) as new:
            new.file.write(b"x")
        assert removed == [1]
        assert (store.root / PATHS[0]).read_bytes() == b"x"

    @both_ways
    def test_get_their_place_on_a_disk_that_is_mounted_in_the_store(self, store: MediaStore, mounted: Path) -> None:
        with store.create(PATHS[2]) as new:
            new.file.write(b"x")
        assert (store.root / PATHS[2]).read_bytes() == b"x"
        with store.temporary_file(PATHS[2]) as temporary:
            temporary.file.write(b"whole")
            temporary.replace(PATHS[2], state_of(store, PATHS[2]))
        assert (store.root / PATHS[2]).read_bytes() == b"whole"
        assert [each.path for each in store.walk_files("remote_content/")] == [PATHS[2]]

    @named
    def test_of_killed_processes_are_removed_from_such_a_disk_too(self, store: MediaStore, mounted: Path) -> None:
        run_and_kill(store, f"import os; del os.O_TMPFILE\n{self.CREATE.replace(PATHS[0], PATHS[2])}")
        assert store.remove_stale_temporary_files() == 1
        assert not [path for path in store.root.rglob("*") if path.is_file()]

    @named
    @pytest.mark.parametrize("reason", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EXDEV"])
    def test_get_their_place_without_hard_links(
        self, store: MediaStore, monkeypatch: pytest.MonkeyPatch, reason: str
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(getattr(errno, reason), "no")

        monkeypatch.setattr(os, "link", refuse)
        with store.create(PATHS[0]) as new:
            new.file.write(b"x")
        with pytest.raises(FileExistsError), store.create(PATHS[0]) as new:
            new.file.write(b"another")
        assert (store.root / PATHS[0]).read_bytes() == b"x"
        assert list((store.root / OWN_DIRECTORY / "tmp").iterdir()) == []

    @named
    def test_that_cannot_be_locked_leave_nothing(self, store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(OSError, match="No locks"):
            store.temporary_file(PATHS[0])
        assert list((store.root / OWN_DIRECTORY / "tmp").iterdir()) == []

    @pytest.mark.parametrize("refused", ["open", "link"])
    def test_have_a_name_where_the_system_refuses_others(
        self, store: MediaStore, monkeypatch: pytest.MonkeyPatch, refused: str
    ) -> None:
        function = getattr(os, refused)

        def refuse(path: Any, flags: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith("/proc/") or (refused == "open" and flags & os.O_TMPFILE == os.O_TMPFILE):
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return function(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, refused, refuse)
        with store.create(PATHS[0]) as new:
            new.file.write(b"x")
            assert len(list((store.root / OWN_DIRECTORY / "tmp").iterdir())) == 1
        assert (store.root / PATHS[0]).read_bytes() == b"x"

    def test_need_no_directory(self, store: MediaStore) -> None:
        assert store.remove_stale_temporary_files() == 0
        assert everything_in(store.root) == set()

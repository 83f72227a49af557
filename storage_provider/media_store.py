"""Synapse's media directory: its files, and the walk over them.

Below the directory no symbolic link is followed, and nothing is touched that does not have the shape
of Synapse's own files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage_provider.directories import (
    NEW,
    READ,
    FileState,
    adopt,
    is_link,
    is_nothing,
    make_directory,
    names_in,
    open_directory,
    regular_state,
    statuses_in,
)
from storage_provider.media_paths import (
    LEVELS,
    MEDIA_ROOTS,
    UnsafePath,
    is_safe,
    is_thumbnail,
    segments_of,
)
from storage_provider.removals import Removals
from storage_provider.temporary_files import Name, TemporaryFile, give_name, locked_file, temporary_name

OWN_DIRECTORY = ".s3_storage_provider"
"""Where this package keeps its own files inside the media store."""

_TEMPORARY = (OWN_DIRECTORY, "tmp")
_STAMP = "offloaded_before"
_LISTED = "listed_at"

# A moment so far in the future was written while the clock was wrong.
_CLOCK_ERROR_MS = 86_400_000


class MediaStoreError(Exception):
    """The media store cannot be worked on; the text is a sentence for the operator."""


class Locked(MediaStoreError):
    """Another process holds the lock."""


class WalkedFile(NamedTuple):
    """A file that the walk has found."""

    path: str
    state: FileState
    placed_ms: int
    """When it was put there or changed, in milliseconds: its ctime, since the mtime tells when the media was used."""


class MediaStore:
    """The files of one media store.

    A path that does not have the shape of Synapse's is an `UnsafePath` in every method. What the
    operating system refuses comes out as an `OSError`. May be used from many threads at once.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._mounts: dict[str, bool] = {}

    def check(self) -> None:
        """Refuse a directory that would be mistaken for a media store whose files are gone.

        Raises `MediaStoreError` where there is no directory, or where a directory that no walk
        would follow stands behind a symbolic link.
        """
        try:
            with self.directory(()) as root:
                links = [name.rstrip("/") for name in MEDIA_ROOTS if is_link(name.rstrip("/"), root)]
        except OSError as error:
            raise MediaStoreError(f"{self.root} cannot be read as a media store: {error.strerror}") from None
        if links:
            link = self.root / links[0]
            raise MediaStoreError(f"{link} is a symbolic link, and links are not followed: mount the directory there")

    def check_is_mounted(self) -> None:
        """Refuse a directory without any of those below which Synapse keeps media, as they stay when the media is gone.

        Raises `MediaStoreError`.
        """
        with self.directory(()) as root:
            names = names_in(root, os.DirEntry.is_dir)
        if not any(f"{name}/" in MEDIA_ROOTS for name in names):
            roots = ", ".join(name.rstrip("/") for name in MEDIA_ROOTS)
            raise MediaStoreError(
                f"{self.root} is expected to hold media, but has none of the directories {roots}: see that it is the "
                f"media store and that it is mounted, or make {MEDIA_ROOTS[0].rstrip('/')} there if its media is gone"
            )

    # --- reading ---

    def state(self, path: str) -> FileState | None:
        """The state of a regular file; None where there is none, or only behind a symbolic link."""
        *directories, name = segments_of(path)
        try:
            with self.directory(directories) as parent:
                return regular_state(name, parent)
        except OSError as error:
            if is_nothing(error):
                return None
            raise

    def is_vacant(self, path: str) -> bool:
        """Whether `state` is None; takes one system call where there is nothing at all."""
        segments_of(path)
        return not os.path.lexists(f"{self.root}/{path}") or self.state(path) is None

    def open(self, path: str) -> BinaryIO:
        """Open a regular file for reading. Raises `FileNotFoundError`, and `OSError` for a symbolic link."""
        *directories, name = segments_of(path)
        with self.directory(directories) as parent:
            descriptor = os.open(name, READ, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return os.fdopen(descriptor, "rb")

    def walk_files(self, media_root: str) -> Iterator[WalkedFile]:
        """The files below one of `MEDIA_ROOTS`, in byte order of the path.

        One directory of each level is held in memory. Files that appear or go during the walk may
        be found or not.
        """
        is_remote = media_root == "remote_thumbnail/"
        has_thumbnails = LEVELS.get(media_root, (0,))[-1] is None
        for directory, path in self._file_directories(media_root):
            for name, status in sorted(statuses_in(directory)):
                if is_thumbnail(name, is_remote) if has_thumbnails else is_safe(name):
                    yield WalkedFile(path + name, FileState.of_status(status), status.st_ctime_ns // 1_000_000)

    def holds_media(self) -> bool:
        """Whether there is any file of Synapse's; the first one is the answer."""
        return any(True for root in MEDIA_ROOTS for _ in self.walk_files(root))

    def _file_directories(self, media_root: str) -> Iterator[tuple[int, str]]:
        """The directories below a root that hold files, open, and their paths with a slash at the end."""
        if media_root not in MEDIA_ROOTS:
            raise UnsafePath(f"{media_root!r} is none of {', '.join(MEDIA_ROOTS)}")
        with contextlib.ExitStack() as opened:
            try:
                directory = opened.enter_context(self.directory((media_root.rstrip("/"),)))
            except OSError as error:
                if is_nothing(error):
                    return
                raise
            yield from _walk(directory, media_root, LEVELS[media_root])

    def free_space(self) -> tuple[int, int]:
        """The bytes that may still be written, and those of the whole disk: that of the store itself."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize

    def on_other_disks(self) -> list[str]:
        """Those of the directories for media whose disk `free_space` does not speak of."""
        with self.directory(()) as root:
            names = sorted(f"{name}/" for name in names_in(root, os.DirEntry.is_dir))
            disk = os.fstat(root).st_dev
            return [name for name in names if name in MEDIA_ROOTS and os.stat(name, dir_fd=root).st_dev != disk]

    # --- changing ---

    def remove(self, path: str, expected: FileState) -> bool:
        """Remove a file, as `Removals.remove`."""
        with self.removals() as removals:
            return removals.remove(path, expected)

    def removals(self) -> Removals:
        """To remove many files with, each as `remove` does."""
        return Removals(self.root)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[TemporaryFile]:
        """A temporary file that is put in place, whole, when the block ends without an error.

        Raises `FileExistsError` where there is a file already: it never replaces one.
        """
        with self.temporary_file(path) as temporary:
            yield temporary
            temporary.place(path)

    def temporary_file(self, path: str) -> TemporaryFile:
        """A new file for a path, which has no place in the store yet.

        Where the system can do that, it has no name until then, and is on the disk of the directory that it is for,
        should another one be mounted there.
        """
        media_root, *_ = segments_of(path)
        if self._names_files_late:
            with contextlib.suppress(OSError):
                return TemporaryFile(self, self._nameless_file(media_root), None)
        with self.temporary_directory(media_root) as directory:
            file, name = locked_file(directory)
            return TemporaryFile(self, file, Name(os.dup(directory), name))

    def _nameless_file(self, directory: str) -> BinaryIO:
        """A new file without a name, on the disk of the directory; Linux only, and not on every file system."""
        # Were a link followed here, the file would get no name through it nevertheless.
        make = partial(os.open, f"{self.root}/{directory}", os.O_RDWR | os.O_TMPFILE, 0o666)
        try:
            descriptor = make()
        except FileNotFoundError:
            with self.directory((directory,), make=True):
                descriptor = make()
        return os.fdopen(descriptor, "w+b")

    def temporary_directory(self, media_root: str) -> AbstractContextManager[int]:
        """A descriptor of the directory for files that have no place below a media root yet, and need a name.

        Where something is mounted there it is in the mount: a file cannot be moved from one into another.
        """
        return self.directory((media_root, OWN_DIRECTORY) if self._is_mount(media_root) else _TEMPORARY, make=True)

    def _is_mount(self, media_root: str) -> bool:
        """Whether nothing can be moved there; tried, as a directory of the same disk may be mounted there too."""
        if media_root not in self._mounts:
            with self.directory(_TEMPORARY, make=True) as temporary, self.directory((media_root,), make=True) as root:
                file, name = locked_file(temporary)
                with file:
                    try:
                        os.rename(name, name, src_dir_fd=temporary, dst_dir_fd=root)
                    except OSError as error:
                        os.unlink(name, dir_fd=temporary)
                        if error.errno != errno.EXDEV:
                            raise
                        self._mounts[media_root] = True
                    else:
                        os.unlink(name, dir_fd=root)
                        self._mounts[media_root] = False
        return self._mounts[media_root]

    @cached_property
    def _names_files_late(self) -> bool:
        """Whether files can be made here without a name and get one later: not on NFS, nor without /proc."""
        name = temporary_name()
        try:
            with self.directory(_TEMPORARY, make=True) as directory, self._nameless_file(OWN_DIRECTORY) as file:
                give_name(file, name, directory)
                os.unlink(name, dir_fd=directory)
        except (OSError, AttributeError):
            return False
        return True

    def remove_stale_temporary_files(self) -> int:
        """Remove what a process that was killed has left behind; the number of files."""
        return sum(
            self._remove_stale_files(directory)
            for directory in (_TEMPORARY, *((root.rstrip("/"), OWN_DIRECTORY) for root in MEDIA_ROOTS))
        )

    def _remove_stale_files(self, directory: Iterable[str]) -> int:
        removed = 0
        try:
            with self.directory(directory) as temporary:
                for name in names_in(temporary, os.DirEntry.is_file):
                    with contextlib.suppress(FileNotFoundError, Locked), _flock(name, temporary, os.O_RDWR):
                        os.unlink(name, dir_fd=temporary)
                        removed += 1
        except OSError as error:
            if not is_nothing(error):
                raise
        return removed

    # --- what all processes that share the store must know ---

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, which goes with the process. Raises `Locked` where another one has it."""
        with self._own_directory(locked_by=f"{name}.lock", wait=False):
            yield

    def offloaded_before(self) -> int | None:
        """The moment (ms) before which unused media has been removed on purpose; None where none ever was."""
        return self._read_moment(_STAMP)

    def set_offloaded_before(self, ts_ms: int) -> None:
        """Move that moment forward; an earlier one than there is changes nothing, but where that one lies in the future.

        On a full disk the file that is there is written over; only where there is none yet an `OSError` says that it is full.
        """
        with self._own_directory(locked_by=f"{_STAMP}.lock", wait=True) as own:
            # What is no number is replaced: whoever sets the stamp knows better.
            with contextlib.suppress(FileNotFoundError, ValueError):
                if ts_ms <= _read_moment(_STAMP, own) <= self._clock() * 1000 + _CLOCK_ERROR_MS:
                    return
            self._write_moment(_STAMP, own, ts_ms)

    def listed_at(self) -> int | None:
        """The moment (ms) of the last comparison with a full listing of the bucket; None where there was none."""
        try:
            return self._read_moment(_LISTED)
        except MediaStoreError:
            return None  # one listing more does no harm

    def set_listed_at(self, ts_ms: int) -> None:
        """Note that moment; for the holder of the lock that goes with it."""
        with self.directory((OWN_DIRECTORY,), make=True) as own:
            self._write_moment(_LISTED, own, ts_ms)

    @contextlib.contextmanager
    def _own_directory(self, *, locked_by: str, wait: bool) -> Iterator[int]:
        """The directory of our own files, while a lock in it is held."""
        with contextlib.ExitStack() as held:
            try:
                own = held.enter_context(self.directory((OWN_DIRECTORY,), make=True))
                with contextlib.suppress(FileExistsError):
                    os.close(self._new(locked_by, own))
                held.enter_context(_flock(locked_by, own, os.O_RDWR, wait=wait))
            except OSError as error:
                # The system tells no more than a name in the directory that was open.
                lock = self.root / OWN_DIRECTORY / locked_by
                raise OSError(error.errno, error.strerror, str(lock)) from None
            yield own

    def _read_moment(self, name: str) -> int | None:
        try:
            with self.directory((OWN_DIRECTORY,)) as own:
                return _read_moment(name, own)
        except FileNotFoundError:
            return None
        except ValueError:
            raise MediaStoreError(
                f"{self.root / OWN_DIRECTORY / name} does not hold a line with a time in milliseconds: correct it or remove it"
            ) from None

    def _write_moment(self, name: str, own_directory: int, ts_ms: int) -> None:
        line = b"%d\n" % ts_ms
        try:
            self._replace(name, own_directory, line)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            try:
                _write_over(name, own_directory, line)
            except FileNotFoundError:
                raise error from None

    def _replace(self, name: str, own_directory: int, content: bytes) -> None:
        new = f"{name}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=own_directory)
        with os.fdopen(self._new(new, own_directory), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, name, src_dir_fd=own_directory, dst_dir_fd=own_directory)

    def _new(self, name: str, own_directory: int) -> int:
        """A file that was not there yet, open and the store's owner's.

        What was there may be another name of a file that root must neither change nor give away.
        """
        descriptor = os.open(name, NEW, 0o666, dir_fd=own_directory)
        adopt(descriptor, own_directory)
        return descriptor

    # --- inside ---

    @contextlib.contextmanager
    def directory(self, segments: Iterable[str], *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory in the store; only the store itself may stand behind a link."""
        descriptor = self.open_directory(segments, make=make)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def open_directory(self, segments: Iterable[str], *, make: bool = False) -> int:
        """As `directory`; whoever calls this closes the descriptor."""
        current = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for segment in segments:
                made = False
                try:
                    inner = open_directory(segment, current)
                except FileNotFoundError:
                    if not make:
                        raise
                    # Whoever can open a lock can hold it for ever, and downloads lie there as well.
                    made = make_directory(segment, current, 0o770 if segment == OWN_DIRECTORY else 0o777)
                    inner = open_directory(segment, current)
                outer, current = current, inner
                try:
                    if made:
                        adopt(inner, outer)
                finally:
                    os.close(outer)
        except BaseException:
            os.close(current)
            raise
        return current


def _walk(directory: int, path: str, levels: tuple[int | None, ...]) -> Iterator[tuple[int, str]]:
    # Python orders strings by code point, which is the byte order of their UTF-8.
    if not levels:
        yield directory, path
        return
    length, *further = levels
    for name in sorted(f"{name}/" for name in names_in(directory, os.DirEntry.is_dir)):
        if not is_safe(name[:-1]) or length not in (None, len(name) - 1):
            continue
        try:
            inner = open_directory(name[:-1], directory)
        except PermissionError:
            # Synapse could not read media in it either: `lost+found` is like that.
            continue
        except OSError as error:
            if is_nothing(error):
                continue
            raise
        try:
            yield from _walk(inner, path + name, tuple(further))
        finally:
            os.close(inner)


@contextlib.contextmanager
def _flock(name: str, directory: int, flags: int, *, wait: bool = False) -> Iterator[int]:
    file = os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=directory)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"{name} is held by another process") from None
        yield file
    finally:
        os.close(file)


def _write_over(name: str, own_directory: int, line: bytes) -> None:
    """Change a file in the block that it has, since a full disk has no other.

    A line as long as the old one, as those with a time are, is there or is not after a crash. Of others a part may be
    there, without the end of the line or with more behind it, which is read as no number at all.
    """
    with os.fdopen(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=own_directory), "r+b") as file:
        if os.fstat(file.fileno()).st_uid != os.fstat(own_directory).st_uid:
            # It may be another name of a file that root must not change.
            raise PermissionError(errno.EPERM, "it is not the store's owner's", name)
        file.write(line)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _read_moment(name: str, own_directory: int) -> int:
    with os.fdopen(os.open(name, READ, dir_fd=own_directory), "rb") as file:
        line = file.read(64)
    if not line.endswith(b"\n"):
        raise ValueError("the line has no end")
    return int(line)

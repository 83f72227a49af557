"""Synapse's media directory, whose layout the bucket repeats: paths, files, and the walk over them.

Paths are relative to the directory, with `/` between segments: the key of the object, without its
prefix, is the same string. Below the directory no symbolic link is followed, and nothing is touched
that does not have the shape of Synapse's own files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, TypeVar

MEDIA_ROOTS = ("local_content/", "local_thumbnails/", "remote_content/", "remote_thumbnail/")
"""What media paths start with (Synapse 1.163, `synapse/media/filepath.py`); `url_cache` never leaves the disk."""

OWN_DIRECTORY = ".s3_storage_provider"
"""Where this package keeps its own files inside the media store."""

_Row = TypeVar("_Row")

_LONGEST_SEGMENT = 255

# Two characters, two characters and at least one more: Synapse cuts an id at these places.
_SHORTEST_ID = 5

# The directories below each root: the lengths of their names, None where any will do.
_LEVELS: dict[str, tuple[int | None, ...]] = {
    "local_content/": (2, 2),
    "local_thumbnails/": (2, 2, None),
    "remote_content/": (None, 2, 2),
    "remote_thumbnail/": (None, 2, 2, None),
}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Synapse makes thumbnails of JPEG, PNG and WebP, by these two methods. Everything else that may lie beside
# them, such as files that are still being written, is not ours to move or to delete.
_THUMBNAIL = re.compile(r"(?:0|[1-9][0-9]{0,9})-(?:0|[1-9][0-9]{0,9})-[a-z]+-[a-z0-9]+(-crop|-scale)?")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# Without O_NONBLOCK, opening a FIFO would wait for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

# A directory that was made for a new file may be pruned by somebody else before the file is in it.
_PLACE_ATTEMPTS = 10


class UnsafePath(ValueError):
    """An id, a server name or a path that does not have the shape of Synapse's."""


class MediaStoreError(Exception):
    """The media store cannot be worked on; the text is a sentence for the operator."""


class Locked(MediaStoreError):
    """Another process holds the lock."""


class Media(NamedTuple):
    """What one uploaded or downloaded file and its thumbnails are stored under."""

    origin: str
    """The server that it comes from; empty for local media."""
    filesystem_id: str
    """The media id for local media; for remote media a random one."""

    @property
    def is_local(self) -> bool:
        return not self.origin


@dataclass(frozen=True)
class MediaFile:
    """A path that has the shape of Synapse's."""

    media: Media
    thumbnail: str | None
    """The file name of a thumbnail; None for the content itself."""
    path: str


class FileState(NamedTuple):
    """What shows that a file has been changed or replaced."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileState:
        """The state of an open file."""
        return cls._of(os.fstat(file.fileno()))

    @classmethod
    def _of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class WalkedFile(NamedTuple):
    """A file that the walk has found."""

    path: str
    state: FileState
    placed_ms: int
    """When it was put there or changed, in milliseconds: its ctime, since the mtime tells when the media was used."""


def content_path(media: Media) -> str:
    """The path of the content. Raises `UnsafePath`."""
    return "/".join(("local_content" if media.is_local else "remote_content", *_segments(media)))


def thumbnail_directory(media: Media) -> str:
    """The path of the directory with the thumbnails, without a slash at its end. Raises `UnsafePath`."""
    return "/".join(("local_thumbnails" if media.is_local else "remote_thumbnail", *_segments(media)))


def parse_path(path: str) -> MediaFile | None:
    """What a path or key stands for; None for everything that Synapse would not have written."""
    root, *segments = path.split("/")
    levels = _LEVELS.get(f"{root}/")
    if levels is None or len(segments) != len(levels) + 1:
        return None
    if any(length not in (None, len(segment)) for length, segment in zip(levels, segments, strict=False)):
        return None
    is_remote = levels[0] is None
    thumbnail = segments.pop() if levels[-1] is None else None
    if thumbnail is not None and not is_thumbnail(thumbnail, is_remote):
        return None
    origin = segments.pop(0) if is_remote else ""
    if is_remote and not origin:
        return None
    media = Media(origin, "".join(segments))
    try:
        _segments(media)
    except UnsafePath:
        return None
    return MediaFile(media, thumbnail, path)


def in_thumbnail_order(rows: Iterable[_Row], media_of: Callable[[_Row], Media]) -> Iterator[_Row]:
    """Rows that come in the byte order of `content_path`, in that of `thumbnail_directory` plus `/`.

    They differ where an id is the beginning of another one: the content `…/ab` comes before
    `…/ab-c`, the thumbnails in `…/ab/` after those in `…/ab-c/`. What is held back is one row for
    each such beginning.
    """
    held: list[tuple[tuple[bool, str], _Row]] = []
    for row in rows:
        media = media_of(row)
        key = (not media.is_local, f"{media.origin}/{media.filesystem_id}/")
        while held and held[-1][0] <= key:
            yield held.pop()[1]
        held.append((key, row))
    while held:
        yield held.pop()[1]


class MediaStore:
    """The files of one media store.

    A path that does not have the shape of Synapse's is an `UnsafePath` in every method. What the
    operating system refuses comes out as an `OSError`. May be used from many threads at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def check(self) -> None:
        """Refuse a directory that would be mistaken for a media store whose files are gone.

        Raises `MediaStoreError` where there is no directory, or where a directory that no walk
        would follow stands behind a symbolic link.
        """
        try:
            with self.directory(()) as root:
                links = [name.rstrip("/") for name in MEDIA_ROOTS if _is_link(name.rstrip("/"), root)]
        except OSError as error:
            raise MediaStoreError(f"{self.root} cannot be read as a media store: {error.strerror}") from None
        if links:
            link = self.root / links[0]
            raise MediaStoreError(f"{link} is a symbolic link, and links are not followed: mount the directory there")

    # --- reading ---

    def state(self, path: str) -> FileState | None:
        """The state of a regular file; None where there is none, or only behind a symbolic link."""
        *directories, name = _checked(path)
        try:
            with self.directory(directories) as parent:
                return regular_state(name, parent)
        except OSError as error:
            if is_nothing(error):
                return None
            raise

    def is_vacant(self, path: str) -> bool:
        """Whether `state` is None; takes one system call where there is nothing at all."""
        _checked(path)
        return not os.path.lexists(f"{self.root}/{path}") or self.state(path) is None

    def open(self, path: str) -> BinaryIO:
        """Open a regular file for reading. Raises `FileNotFoundError`, and `OSError` for a symbolic link."""
        *directories, name = _checked(path)
        with self.directory(directories) as parent:
            file = os.fdopen(os.open(name, _READ, dir_fd=parent), "rb")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "not a regular file", path)
        return file

    def files_of(self, media: Media) -> list[str]:
        """The paths of what there is on disk: the content first, then the thumbnails in byte order."""
        content = content_path(media)
        found = [content] if self.state(content) is not None else []
        directory = thumbnail_directory(media)
        try:
            with self.directory(directory.split("/")) as thumbnails:
                names = [
                    name for name in names_in(thumbnails, os.DirEntry.is_file) if is_thumbnail(name, not media.is_local)
                ]
        except OSError as error:
            if not is_nothing(error):
                raise
            names = []
        return found + [f"{directory}/{name}" for name in sorted(names)]

    def walk(self, media_root: str) -> Iterator[str]:
        """The paths of the files below one of `MEDIA_ROOTS`, in byte order of the path.

        One directory of each level is held in memory. Files that appear or go during the walk may
        be found or not.
        """
        for directory, path in self._file_directories(media_root):
            for name in sorted(names_in(directory, os.DirEntry.is_file)):
                if parse_path(path + name) is not None:
                    yield path + name

    def walk_files(self, media_root: str) -> Iterator[WalkedFile]:
        """What `walk` finds, with the state of each file."""
        is_remote = media_root == "remote_thumbnail/"
        has_thumbnails = _LEVELS.get(media_root, (0,))[-1] is None
        for directory, path in self._file_directories(media_root):
            for name, status in sorted(_statuses(directory)):
                if is_thumbnail(name, is_remote) if has_thumbnails else is_safe(name):
                    yield WalkedFile(path + name, FileState._of(status), status.st_ctime_ns // 1_000_000)

    def holds_media(self) -> bool:
        """Whether there is any file of Synapse's; the first one is the answer."""
        return any(True for root in MEDIA_ROOTS for _ in self.walk(root))

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
            yield from _walk(directory, media_root, _LEVELS[media_root])

    def free_space(self) -> tuple[int, int]:
        """The bytes that may still be written, and those of the whole disk."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize

    # --- changing ---

    def remove(self, path: str, expected: FileState) -> bool:
        """Remove a file if its state is still the expected one; False where it has changed or is gone.

        Directories that it leaves empty go as well, but for the store itself and its first level.
        """
        *directories, name = _checked(path)
        with contextlib.ExitStack() as opened:
            try:
                parents = [opened.enter_context(self.directory(()))]
                for directory in directories:
                    parents.append(open_directory(directory, parents[-1]))
                    opened.callback(os.close, parents[-1])
                if regular_state(name, parents[-1]) != expected:
                    return False
                os.unlink(name, dir_fd=parents[-1])
            except OSError as error:
                if is_nothing(error):
                    return False
                raise
            # The first of the directories stays: it belongs to the layout. One that is not empty ends it.
            with contextlib.suppress(OSError):
                for directory, parent in reversed(list(zip(directories[1:], parents[1:], strict=False))):
                    os.rmdir(directory, dir_fd=parent)
        return True

    @contextlib.contextmanager
    def create(self, path: str, mtime: float | None = None) -> Iterator[BinaryIO]:
        """A temporary file that is put in place, whole, when the block ends without an error.

        Raises `FileExistsError` where there is a file already: it never replaces one.
        """
        with self.temporary_file(path) as temporary:
            yield temporary.file
            temporary.place(path, mtime)

    def temporary_file(self, path: str) -> TemporaryFile:
        """A new file for a path, which has no place in the store yet.

        Where the system can do that, it has no name until then, and is on the disk of the directory that it is for,
        should another one be mounted there.
        """
        media_root, *_ = _checked(path)
        if self._names_files_late:
            with contextlib.suppress(OSError):
                return TemporaryFile(self, self._nameless_file(media_root), None)
        with self.temporary_directory() as directory:
            file, name = _locked_file(directory)
            return TemporaryFile(self, file, _Name(os.dup(directory), name))

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

    def temporary_directory(self) -> AbstractContextManager[int]:
        """A descriptor of the directory for files that have no place in the store yet, and need a name."""
        return self.directory((OWN_DIRECTORY, "tmp"), make=True)

    @cached_property
    def _names_files_late(self) -> bool:
        """Whether files can be made here without a name and get one later: not on NFS, nor without /proc."""
        name = _temporary_name()
        try:
            with self.temporary_directory() as directory, self._nameless_file(OWN_DIRECTORY) as file:
                _give_name(file, name, directory)
                os.unlink(name, dir_fd=directory)
        except (OSError, AttributeError):
            return False
        return True

    def remove_stale_temporary_files(self) -> int:
        """Remove what a process that was killed has left behind; the number of files."""
        removed = 0
        try:
            with self.directory((OWN_DIRECTORY, "tmp")) as temporary:
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
        with (
            self.directory((OWN_DIRECTORY,), make=True) as own,
            _flock(f"{name}.lock", own, os.O_RDWR | os.O_CREAT) as file,
        ):
            self._adopt(file)
            yield

    def offloaded_before(self) -> int | None:
        """The moment (ms) before which unused media has been removed on purpose; None where none ever was."""
        return self._read_moment(_STAMP)

    def set_offloaded_before(self, ts_ms: int) -> None:
        """Move that moment forward; an earlier one than there is changes nothing."""
        with (
            self.directory((OWN_DIRECTORY,), make=True) as own,
            _flock(f"{_STAMP}.lock", own, os.O_RDWR | os.O_CREAT, wait=True) as lock,
        ):
            self._adopt(lock)
            # What is no number is replaced: whoever sets the stamp knows better.
            with contextlib.suppress(FileNotFoundError, ValueError):
                if _read_moment(_STAMP, own) >= ts_ms:
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

    def _read_moment(self, name: str) -> int | None:
        try:
            with self.directory((OWN_DIRECTORY,)) as own:
                return _read_moment(name, own)
        except FileNotFoundError:
            return None
        except ValueError:
            raise MediaStoreError(
                f"{self.root / OWN_DIRECTORY / name} does not hold a time in milliseconds: correct it or remove it"
            ) from None

    def _write_moment(self, name: str, own_directory: int, ts_ms: int) -> None:
        new = f"{name}.new"
        with os.fdopen(os.open(new, _NEW & ~os.O_EXCL | os.O_TRUNC, 0o666, dir_fd=own_directory), "wb") as file:
            file.write(b"%d\n" % ts_ms)
            file.flush()
            os.fsync(file.fileno())
            self._adopt(file.fileno())
        os.rename(new, name, src_dir_fd=own_directory, dst_dir_fd=own_directory)

    # --- inside ---

    @contextlib.contextmanager
    def directory(self, segments: Iterable[str], *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory in the store; only the store itself may stand behind a link."""
        current = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for segment in segments:
                made = False
                try:
                    inner = open_directory(segment, current)
                except FileNotFoundError:
                    if not make:
                        raise
                    made = _make_directory(segment, current)
                    inner = open_directory(segment, current)
                os.close(current)
                current = inner
                if made:
                    self._adopt(current)
            yield current
        finally:
            os.close(current)

    def _adopt(self, descriptor: int) -> None:
        if self._adopter is not None:
            with contextlib.suppress(PermissionError):  # as NFS answers
                os.fchown(descriptor, *self._adopter)

    @cached_property
    def _adopter(self) -> tuple[int, int] | None:
        """User and group of the store, for root alone: Synapse could not write into what root creates."""
        if os.geteuid() != 0:
            return None
        owner = self.root.stat()
        return owner.st_uid, owner.st_gid


class _Name(NamedTuple):
    """A name, and a descriptor of the directory that has it, which whoever holds this closes."""

    directory: int
    name: str


class TemporaryFile:
    """A file that becomes a part of the store when it is whole, or nothing at all.

    As long as it has a temporary name it is locked, so that what a killed process leaves behind can be told
    from what another one still writes. A context manager that discards it at the end; what was put in place
    stays.
    """

    def __init__(self, store: MediaStore, file: BinaryIO, name: _Name | None) -> None:
        self.file = file
        self._store = store
        self._name = name
        self._is_finished = False
        self._is_synced = False

    def write_at(self, content: bytes, offset: int) -> None:
        """Write all of the content there."""
        view = memoryview(content)
        while view:
            written = os.pwrite(self.file.fileno(), view, offset)
            offset += written
            view = view[written:]

    def finish(self, mtime: float | None = None) -> None:
        """Take it for whole, and let the system begin to bring it to the disk: nothing may be written later.

        What root creates belongs to the owner of the store then.
        """
        if self._is_finished:
            return
        self.file.flush()
        if mtime is not None:
            os.utime(self.file.fileno(), (mtime, mtime))
        self._store._adopt(self.file.fileno())
        _begin_to_write(self.file.fileno())
        self._is_finished = True

    def sync(self, mtime: float | None = None) -> None:
        """Finish it, and wait until all of it is on the disk.

        Where many files were finished before, that takes little time for all but the first: the file
        system's journal is written for all of them at once.
        """
        self.finish(mtime)
        if not self._is_synced:
            os.fsync(self.file.fileno())
            self._is_synced = True

    def place(self, path: str, mtime: float | None = None) -> FileState:
        """Give the file its name in the store, after all of it is on the disk; returns its state.

        Raises `FileExistsError` where there is a file already. The file stays open.
        """
        self.sync(mtime)
        for _ in range(_PLACE_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._link(path, make=True)
        raise FileNotFoundError(errno.ENOENT, "its directory is removed again and again", path)

    def prepare(self, path: str) -> None:
        """Do the slow part of `place`: bring the content to the disk, and make the directories."""
        *directories, _ = _checked(path)
        self.sync()
        with self._store.directory(directories, make=True):
            pass

    def link(self, path: str) -> FileState:
        """Do the rest of `place`, which takes microseconds and is all or nothing.

        Raises `FileNotFoundError` where a directory has been removed since `prepare`.
        """
        return self._link(path, make=False)

    def _link(self, path: str, *, make: bool) -> FileState:
        *directories, name = _checked(path)
        with self._store.directory(directories, make=make) as parent:
            try:
                if self._name is None:
                    _give_name(self.file, name, parent)
                else:
                    source, old = self._name.directory, self._name.name
                    os.link(old, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                raise FileExistsError(errno.EEXIST, "there is such a file already", path) from None
        return FileState.of(self.file)

    def replace(self, path: str, expected: FileState, mtime: float | None = None) -> FileState | None:
        """Take the place of a file, at once, if that still has the expected state; None where it has not.

        Whoever has the old file open goes on reading it. Otherwise as `place`.
        """
        *directories, name = _checked(path)
        self.sync(mtime)
        try:
            with self._store.directory(directories) as parent:
                if regular_state(name, parent) != expected:
                    return None
                temporary = self._named()
                os.rename(temporary.name, name, src_dir_fd=temporary.directory, dst_dir_fd=parent)
        except OSError as error:
            if is_nothing(error):
                return None
            raise
        return FileState.of(self.file)

    def discard(self) -> None:
        """Close the file, and forget what has not been put in place; may be called twice, but not at once."""
        if self.file.closed:
            return
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name.name, dir_fd=self._name.directory)
            os.close(self._name.directory)
        self.file.close()

    def _named(self) -> _Name:
        if self._name is None:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            with self._store.temporary_directory() as directory:
                name = _temporary_name()
                _give_name(self.file, name, directory)
                self._name = _Name(os.dup(directory), name)
        return self._name

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


_STAMP = "offloaded_before"
_LISTED = "listed_at"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def _segments(media: Media) -> list[str]:
    identifier = media.filesystem_id
    if len(identifier) < _SHORTEST_ID:
        raise UnsafePath(f"the id {identifier!r} is too short to be Synapse's")
    segments = [identifier[:2], identifier[2:4], identifier[4:]]
    if not media.is_local:
        segments.insert(0, media.origin)
    for segment in segments:
        if not is_safe(segment):
            raise UnsafePath(f"{segment!r} cannot be a part of a path in the media store")
    return segments


def is_safe(segment: str) -> bool:
    """Whether a name can be a part of a path, and of a key."""
    if segment.isascii() and segment.isalnum() and len(segment) <= _LONGEST_SEGMENT:
        return True
    if segment in ("", ".", "..") or "/" in segment or _CONTROL.search(segment):
        return False
    try:
        return len(segment.encode()) <= _LONGEST_SEGMENT
    except UnicodeEncodeError:  # a file name that is not UTF-8, and so cannot be a key
        return False


def is_thumbnail(name: str, is_remote: bool) -> bool:
    """Whether that is what Synapse calls a thumbnail's file."""
    match = _THUMBNAIL.fullmatch(name)
    # Only thumbnails of remote media once had names without the method.
    return match is not None and (is_remote or match[1] is not None)


def _checked(path: str) -> list[str]:
    if parse_path(path) is None:
        raise UnsafePath(f"{path!r} is no path of Synapse's media store")
    return path.split("/")


def is_nothing(error: OSError) -> bool:
    """Whether there is no such file or directory, or a link or something else in its place."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def open_directory(name: str, parent: int) -> int:
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _make_directory(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _lstat(name: str, parent: int) -> os.stat_result:
    return os.stat(name, dir_fd=parent, follow_symlinks=False)


def _is_link(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(_lstat(name, parent).st_mode)
    except FileNotFoundError:
        return False


def regular_state(name: str, parent: int) -> FileState | None:
    status = _lstat(name, parent)
    return FileState._of(status) if stat.S_ISREG(status.st_mode) else None


def names_in(directory: int, kind: Callable[..., bool]) -> list[str]:
    """The names of the files or of the directories, links left out; none where the directory has just gone."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if kind(entry, follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _statuses(directory: int) -> list[tuple[str, os.stat_result]]:
    """The names and the status of the regular files."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


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
        except OSError as error:
            if is_nothing(error):
                continue
            raise
        try:
            yield from _walk(inner, path + name, tuple(further))
        finally:
            os.close(inner)


def _begin_to_write(descriptor: int) -> None:
    """Let the system write what it holds of a file, without waiting for it, where it knows such a thing.

    Linux begins to write when it is told that the pages are not needed any more (`generic_fadvise` in `mm/fadvise.c`);
    those that are still to be written stay in memory.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _temporary_name() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex}"


def _give_name(file: BinaryIO, name: str, directory: int) -> None:
    """Give a file without a name one: https://man7.org/linux/man-pages/man2/open.2.html, under O_TMPFILE."""
    os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=directory, follow_symlinks=True)


def _locked_file(directory: int) -> tuple[BinaryIO, str]:
    """A new file that is locked as long as it is open, and its name."""
    while True:
        name = _temporary_name()
        file = os.fdopen(os.open(name, _NEW, 0o666, dir_fd=directory), "w+b")
        try:
            # Between the two calls somebody may have taken it for a stale one.
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file, name
        except BaseException:
            file.close()
            raise
        file.close()


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


def _read_moment(name: str, own_directory: int) -> int:
    with os.fdopen(os.open(name, _READ, dir_fd=own_directory), "rb") as file:
        return int(file.read(64))

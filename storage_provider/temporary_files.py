"""Files that become a part of the media store when they are whole, or nothing at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from storage_provider.directories import NEW, FileState, adopt, is_nothing, regular_state
from storage_provider.media_paths import segments_of

if TYPE_CHECKING:
    from storage_provider.media_store import MediaStore

# A directory that was made for a new file may be pruned by somebody else before the file is in it. Under many who
# remove files all around that may happen ten times in a row; an attempt takes microseconds.
_PLACE_ATTEMPTS = 100

# What file systems answer that have no hard links, or none between directories: exFAT, many network shares, AFS, and
# what stands on FUSE.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class Name(NamedTuple):
    """A name, and a descriptor of the directory that has it, which whoever holds this closes."""

    directory: int
    name: str


class TemporaryFile:
    """A file that becomes a part of the store when it is whole, or nothing at all.

    As long as it has a temporary name it is locked, so that what a killed process leaves behind can be told
    from what another one still writes. A context manager that discards it at the end; what was put in place
    stays.
    """

    def __init__(self, store: MediaStore, file: BinaryIO, name: Name | None) -> None:
        self.file = file
        self._store = store
        self._name = name
        self._destination: Name | None = None
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
        """Take it for whole, and let the system begin to bring it to the disk: nothing may be written later."""
        if self._is_finished:
            return
        self.file.flush()
        if mtime is not None:
            os.utime(self.file.fileno(), (mtime, mtime))
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

    def place(self, path: str) -> FileState:
        """Give the file its name in the store, after all of it is on the disk; returns its state.

        Raises `FileExistsError` where there is a file already. The file stays open.
        """
        self.sync()
        for _ in range(_PLACE_ATTEMPTS):
            try:
                self.prepare(path)
                self.link()
            except FileNotFoundError:
                continue
            except FileExistsError:
                raise FileExistsError(errno.EEXIST, "there is such a file already", path) from None
            return FileState.of(self.file)
        raise FileNotFoundError(errno.ENOENT, "its directory is removed again and again", path)

    def prepare(self, path: str) -> None:
        """Do the slow part of `place`: bring the content to the disk, and make the directories.

        The file's directory stays open until `link` or `discard`, of which one has to follow.
        """
        *directories, name = segments_of(path)
        self.sync()
        self._forget_destination()
        self._destination = Name(self._store.open_directory(directories, make=True), name)
        adopt(self.file.fileno(), self._destination.directory)

    def link(self) -> None:
        """Do the rest of `place`, which takes microseconds and is all or nothing; once after each `prepare`.

        Raises `FileNotFoundError` where its directory has been removed since `prepare`, and `FileExistsError` where
        there is a file already. A directory that was moved elsewhere since then has the file there.
        """
        if self._destination is None:
            raise RuntimeError("the file has not been prepared for its place")
        try:
            self._give_name(self._destination)
        except OSError as error:
            if error.errno == errno.ESTALE:
                # How NFS says it: https://man7.org/linux/man-pages/man3/errno.3.html
                raise FileNotFoundError(
                    errno.ENOENT, "its directory has been removed", self._destination.name
                ) from error
            raise
        finally:
            self._forget_destination()

    def _give_name(self, given: Name) -> None:
        if self._name is None:
            give_name(self.file, given.name, given.directory)
        else:
            _move(self._name, given)

    def _forget_destination(self) -> None:
        destination, self._destination = self._destination, None
        if destination is not None:
            os.close(destination.directory)

    def replace(self, path: str, expected: FileState) -> FileState | None:
        """Take the place of a file, at once, if that still has the expected state; None where it has not.

        Whoever has the old file open goes on reading it. Otherwise as `place`.
        """
        *directories, name = segments_of(path)
        self.sync()
        try:
            with self._store.directory(directories) as parent:
                if regular_state(name, parent) != expected:
                    return None
                temporary = self._named(directories[0])
                adopt(self.file.fileno(), parent)
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
        self._forget_destination()
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name.name, dir_fd=self._name.directory)
            os.close(self._name.directory)
        self.file.close()

    def _named(self, media_root: str) -> Name:
        if self._name is None:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            with self._store.temporary_directory(media_root) as directory:
                name = temporary_name()
                give_name(self.file, name, directory)
                self._name = Name(os.dup(directory), name)
        return self._name

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _move(given: Name, new: Name) -> None:
    """Give a file another name. Raises `FileExistsError` where there is such a file."""
    try:
        os.link(given.name, new.name, src_dir_fd=given.directory, dst_dir_fd=new.directory, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Who puts a file there between the two calls has fetched the same one.
        with contextlib.suppress(FileNotFoundError):
            os.stat(new.name, dir_fd=new.directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, "there is such a file already", new.name) from None
        os.rename(given.name, new.name, src_dir_fd=given.directory, dst_dir_fd=new.directory)


def temporary_name() -> str:
    """A name that no other file has."""
    return f"{os.getpid()}-{uuid.uuid4().hex}"


def give_name(file: BinaryIO, name: str, directory: int) -> None:
    """Give a file without a name one: https://man7.org/linux/man-pages/man2/open.2.html, under O_TMPFILE."""
    os.link(f"/proc/self/fd/{file.fileno()}", name, dst_dir_fd=directory, follow_symlinks=True)


def locked_file(directory: int) -> tuple[BinaryIO, str]:
    """A new file that is locked as long as it is open, and its name."""
    while True:
        name = temporary_name()
        file = os.fdopen(os.open(name, NEW, 0o666, dir_fd=directory), "w+b")
        try:
            # Between the two calls somebody may have taken it for a stale one.
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                adopt(file.fileno(), directory)
                return file, name
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        file.close()


def _begin_to_write(descriptor: int) -> None:
    """Let the system write what it holds of a file, without waiting for it, where it knows such a thing.

    Linux begins to write when it is told that the pages are not needed any more (`generic_fadvise` in `mm/fadvise.c`);
    those that are still to be written stay in memory.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

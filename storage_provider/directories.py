"""Files and directories by their name in a directory that is open: the system calls below the media store.

None of them follows a symbolic link, and what the operating system refuses comes out as an `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

# Without O_NONBLOCK, opening a FIFO would wait for its writer.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""How a file is opened for reading."""

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
"""How a file is opened that must not be there yet."""


class FileState(NamedTuple):
    """What shows that a file has been changed or replaced."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: BinaryIO) -> FileState:
        """The state of an open file."""
        return cls.of_status(os.fstat(file.fileno()))

    @classmethod
    def of_status(cls, status: os.stat_result) -> FileState:
        """The state of a file whose status was asked for."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def is_nothing(error: OSError) -> bool:
    """Whether there is no such file or directory, or a link or something else in its place."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def open_directory(name: str, parent: int) -> int:
    """A descriptor of a directory, which the caller closes."""
    return os.open(name, _DIRECTORY, dir_fd=parent)


def make_directory(name: str, parent: int, mode: int = 0o777) -> bool:
    """Make a directory; False where there is something of that name already."""
    try:
        os.mkdir(name, mode, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def adopt(descriptor: int, directory: int) -> None:
    """Give what root has created to the owner and the group of the directory that it is in, with as many rights for the group.

    A Synapse that runs as somebody else could not work on it, be it the owner or, as in Kubernetes, one of the group.
    """
    if os.geteuid() != 0:
        return
    theirs, ours = os.fstat(directory), os.fstat(descriptor)
    for_group = theirs.st_mode & (stat.S_IRWXG if stat.S_ISDIR(ours.st_mode) else stat.S_IRGRP | stat.S_IWGRP)
    with contextlib.suppress(OSError):  # NFS may not allow it, and others know no owners
        os.fchown(descriptor, theirs.st_uid, theirs.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(ours.st_mode) | for_group)


def is_link(name: str, parent: int) -> bool:
    """Whether there is a symbolic link of that name."""
    try:
        return stat.S_ISLNK(_lstat(name, parent).st_mode)
    except FileNotFoundError:
        return False


def regular_state(name: str, parent: int) -> FileState | None:
    """The state of a regular file, None for anything else. Raises `FileNotFoundError` where there is nothing."""
    status = _lstat(name, parent)
    return FileState.of_status(status) if stat.S_ISREG(status.st_mode) else None


def names_in(directory: int, kind: Callable[..., bool]) -> list[str]:
    """The names of the files or of the directories, links left out; none where the directory has just gone."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if kind(entry, follow_symlinks=False)]
    except FileNotFoundError:
        return []


def statuses_in(directory: int) -> list[tuple[str, os.stat_result]]:
    """The names and the status of the regular files."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def _lstat(name: str, parent: int) -> os.stat_result:
    return os.stat(name, dir_fd=parent, follow_symlinks=False)

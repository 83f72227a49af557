"""Removing many files of a media store, with few system calls for those that lie near each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType

from storage_provider.directories import FileState, is_nothing, open_directory, regular_state
from storage_provider.media_paths import segments_of


class Removals:
    """Removes files one by one; a context manager that ends it.

    The directories that lead to a file stay open for the next one, which in byte order of the path is often in one of
    them. Each system call costs more than it seems: after it Python's lock has to be waited for, while other threads
    move media.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: list[str] = []
        """The directories that are open below the root."""
        self._descriptors: list[int] = []
        """Theirs, after that of the root."""

    def __enter__(self) -> Removals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(0)
        while self._descriptors:
            os.close(self._descriptors.pop())

    def remove(self, path: str, expected: FileState) -> bool:
        """Remove a file if its state is still the expected one; False where it has changed or is gone.

        Directories that it leaves empty go as well, but for the store itself and its first level. Raises `UnsafePath`
        and `OSError`.
        """
        *directories, name = segments_of(path)
        try:
            parent = self._enter(directories)
            if regular_state(name, parent) != expected:
                return False
            os.unlink(name, dir_fd=parent)
        except OSError as error:
            if is_nothing(error):
                return False
            raise
        self._prune()
        return True

    def _enter(self, directories: Sequence[str]) -> int:
        """The descriptor of a directory."""
        if not self._descriptors:
            # Only the store itself may stand behind a link.
            self._descriptors.append(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY))
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._names, directories, strict=False)))
        self._leave(shared)
        for directory in directories[shared:]:
            self._descriptors.append(open_directory(directory, self._descriptors[-1]))
            self._names.append(directory)
        return self._descriptors[-1]

    def _prune(self) -> None:
        """Remove the open directories that are empty; one that is not ends it."""
        # The first of them stays: it belongs to the layout.
        with contextlib.suppress(OSError):
            while len(self._names) > 1:
                os.rmdir(self._names[-1], dir_fd=self._descriptors[-2])
                self._leave(len(self._names) - 1)

    def _leave(self, depth: int) -> None:
        """Close the directories that lie deeper."""
        while len(self._names) > depth:
            self._names.pop()
            os.close(self._descriptors.pop())

"""Where the files are that Synapse wants stored."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from synapse.media._base import FileInfo
from synapse.media.media_storage import ReadableFileWrapper
from synapse.module_api import NOT_SPAM, ModuleApi

# So many files that wait for the bucket are held open. One that hangs for hours may have many more wait, and Synapse
# needs descriptors too.
_MOST_HELD = 500


class UploadedFiles:
    """The files of the media store; without local storage, the temporary ones that Synapse names nowhere.

    Those are learnt from the spam checkers' callback, which gets the file and the very `FileInfo`
    with which `store_file` is called right after (Synapse 1.163).
    """

    def __init__(self, media_store: Path) -> None:
        self._media_store = media_store
        self._temporary: dict[int, str] = {}
        self._held = 0

    def follow(self, module_api: ModuleApi) -> None:
        """Learn the names of temporary files from now on."""
        module_api.register_spam_checker_callbacks(check_media_file_for_spam=self._note)

    @contextlib.contextmanager
    def held(self, path: str, file_info: FileInfo) -> Iterator[Callable[[], BinaryIO]]:
        """Yield a function that opens the file with that path in the media store.

        Within the block it works even when the file has been deleted meanwhile, but not where very many wait: then
        the file is opened in its turn. The function, and this, raise `FileNotFoundError` where there is none.
        """
        temporary = self._temporary.get(id(file_info))
        if temporary is None and self._held >= _MOST_HELD:
            yield lambda: (self._media_store / path).open("rb")
            return
        self._held += 1
        try:
            with (self._media_store / path if temporary is None else Path(temporary)).open("rb") as body:
                yield lambda: body
        finally:
            self._held -= 1

    async def _note(self, file: ReadableFileWrapper, file_info: FileInfo) -> Literal["NOT_SPAM"]:
        identity = id(file_info)
        self._temporary[identity] = file.path
        # Dropped with the FileInfo: another checker may yet reject the file, and nobody would say so.
        weakref.finalize(file_info, self._temporary.pop, identity, None)
        return NOT_SPAM

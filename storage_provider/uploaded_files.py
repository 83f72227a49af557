"""Where the files are that Synapse wants stored."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import BinaryIO, Literal

from synapse.media._base import FileInfo
from synapse.media.media_storage import ReadableFileWrapper
from synapse.module_api import NOT_SPAM, ModuleApi


class UploadedFiles:
    """The files of the media store; without local storage, the temporary ones that Synapse names nowhere.

    Those are learnt from the spam checkers' callback, which gets the file and the very `FileInfo`
    with which `store_file` is called right after (Synapse 1.163).
    """

    def __init__(self, media_store: Path) -> None:
        self._media_store = media_store
        self._temporary: dict[int, str] = {}

    def follow(self, module_api: ModuleApi) -> None:
        """Learn the names of temporary files from now on."""
        module_api.register_spam_checker_callbacks(check_media_file_for_spam=self._note)

    def open(self, path: str, file_info: FileInfo) -> BinaryIO:
        """Open the file with that path in the media store. Raises `FileNotFoundError`."""
        temporary = self._temporary.get(id(file_info))
        return (Path(temporary) if temporary is not None else self._media_store / path).open("rb")

    async def _note(self, file: ReadableFileWrapper, file_info: FileInfo) -> Literal["NOT_SPAM"]:
        identity = id(file_info)
        self._temporary[identity] = file.path
        # Dropped with the FileInfo: another checker may yet reject the file, and nobody would say so.
        weakref.finalize(file_info, self._temporary.pop, identity, None)
        return NOT_SPAM

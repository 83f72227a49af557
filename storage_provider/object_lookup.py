"""Finding out what the bucket holds of many files, by listing it where that is cheaper than asking for each object."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from backends.base import Backend, ObjectInfo
from backends.errors import ObjectNotFound
from storage_provider.cache_db import KINDS, CacheDb
from storage_provider.listing import ListingCursor, ListingRefused
from storage_provider.media_paths import MEDIA_ROOTS, UnsafePath, content_path
from storage_provider.offload_files import File


class ObjectLookup:
    """Sees what there is of files in the bucket, which it notes in them.

    The files of one look come in byte order of the path within each root, and after those of the look before.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._listings = {root: ListingCursor(backend, root, read_ahead=True, checks_gaps=True) for root in MEDIA_ROOTS}
        self._is_refused = False
        """Whether the listing is none to go by."""

    def prepare(self, cache: CacheDb) -> None:
        """Begin to list where the first contents stand, while the disk is being read."""
        for kind in KINDS:
            first = next(cache.undeleted(kind), None)
            if first is not None:
                with suppress(UnsafePath):
                    path = content_path(first.media)
                    self._listings[_root_of(path)].prepare(path)

    def look(self, files: Iterable[File]) -> None:
        """See what the listing says of objects; those of which it says nothing have yet to be asked for."""
        self._look(files, self._listings)

    def look_again(self, files: Iterable[File]) -> None:
        """See what a new listing says of objects that were looked at before."""
        self._look(files, {root: ListingCursor(self._backend, root) for root in MEDIA_ROOTS})

    def ask(self, file: File) -> ObjectInfo | None:
        """What there is, by the object itself where that is not known yet."""
        if file.told_by is None:
            try:
                file.info = self._backend.stat(file.path)
            except ObjectNotFound:
                file.info = None
            file.told_by = "object"
        return file.info

    def _look(self, files: Iterable[File], listings: dict[str, ListingCursor]) -> None:
        by_root: dict[str, dict[str, File]] = {root: {} for root in listings}
        for file in files:
            file.info = file.told_by = None
            by_root[_root_of(file.path)][file.path] = file
        for root, wanted in by_root.items():
            if self._is_refused:
                return
            try:
                for path, info in listings[root].find_all(wanted):
                    wanted[path].info, wanted[path].told_by = info, "listing"
            except ListingRefused:
                self._is_refused = True
                # It may lack more than what has shown that it is none to go by.
                for file in wanted.values():
                    if file.info is None:
                        file.told_by = None


def _root_of(path: str) -> str:
    return path[: path.index("/") + 1]

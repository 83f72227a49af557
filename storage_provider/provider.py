"""The storage provider that Synapse loads: media goes into the bucket, and comes back from it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from synapse.api.errors import Codes, SynapseError
from synapse.media._base import FileInfo, Responder
from synapse.media.storage_provider import StorageProvider
from synapse.module_api.errors import ConfigError
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from backends import open_backend
from backends.errors import BackendError, SettingsError
from backends.selection import choose_backend
from storage_provider.bucket_check import BucketCheck
from storage_provider.cache_db import CachedMedia, Kind
from storage_provider.cache_keeper import CacheKeeper
from storage_provider.complaints import Complaints
from storage_provider.downloads import Downloads, Threads
from storage_provider.known_media import KnownMedia, database_arguments
from storage_provider.local_cache import LocalCache
from storage_provider.media_store import MediaStore, MediaStoreError
from storage_provider.read_through import ReadThrough
from storage_provider.responder import ChunkResponder
from storage_provider.room import Room
from storage_provider.settings import ProviderSettings
from storage_provider.uploaded_files import UploadedFiles
from storage_provider.uploads_in_flight import UploadsInFlight

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 10


class S3StorageProviderBackend(StorageProvider):
    """Media in an S3-compatible bucket; the README explains the configuration."""

    def __init__(self, hs: HomeServer, settings: ProviderSettings) -> None:
        _refuse_losing_media(hs, settings)
        self._settings = settings
        self._module_api = hs.get_module_api()
        self._reactor = hs.get_reactor()
        self._hs = hs
        self._store = MediaStore(Path(hs.config.media.media_store_path))
        self._backend = open_backend(settings)
        self._complaints = Complaints()
        self._stop_background = threading.Event()
        self._uploads = UploadsInFlight(self._reactor)
        self._files = UploadedFiles(self._store.root)
        self._keeps_local_files = _keeps_local_files(hs)
        if not self._keeps_local_files:
            self._files.follow(self._module_api)
        # Each kind of work has threads of its own: reads that hang keep no upload waiting, nor the reverse.
        half, quarter = settings.threadpool_size // 2, settings.threadpool_size // 4
        self._download_threads = self._start_threads("s3-media-download", half)
        self._upload_threads = self._start_threads("s3-media-upload", quarter)
        self._read_threads = self._start_threads("s3-media-read", settings.threadpool_size - half - quarter)
        self._background_threads = self._start_threads("s3-media-background", quarter)
        self._check = BucketCheck(settings, _all_of_ours(hs), self._backend, self._reactor, self._read_threads)
        self._known_media = KnownMedia(database_arguments(hs), self._accessed_remotes)
        self._room = Room(None if settings.local_cache is None else settings.local_cache.max_size)
        self._read_through = ReadThrough(settings, self._store, self._room, self._known_media, self._evict)
        self._downloads = Downloads(
            self._module_api,
            self._reactor,
            self._backend,
            self._store,
            Threads(self._read_threads, self._download_threads, self._background_threads),
            choose_to_keep=self._read_through.choose if self._reads_through else lambda contents: (),
            refute=self._known_media.refuted_of,
        )
        kinds = _kinds_to_cache(hs, settings)
        self._keeper = self._make_keeper(kinds) if kinds and self._keeps_local_files else None
        self._follow_shutdown()
        self._announce()
        self._check.start()
        self._begin_background_work()

    def __str__(self) -> str:
        return f"S3StorageProviderBackend[{self._settings.bucket}]"

    @staticmethod
    def parse_config(config: Mapping[str, Any]) -> ProviderSettings:
        """The settings of a `config` block. Raises Synapse's `ConfigError` with the key and the remedy."""
        try:
            return ProviderSettings.parse(config)
        except SettingsError as error:
            raise ConfigError(error.reason, path=error.path) from None

    async def store_file(self, path: str, file_info: FileInfo) -> None:
        """Send a new file to the bucket; returns when it is there."""
        # Held before the first await: without local storage Synapse may delete the file right after it.
        with self._files.held(path, file_info) as give, self._uploads.one(), self._downloads.paths.used(path):
            await self._check.refuse_while_media_is_hidden()
            with self._as_synapse_error():
                await self._module_api.defer_to_threadpool(self._upload_threads, self._put, path, give)

    async def fetch(self, path: str, file_info: FileInfo) -> Responder | None:
        """A response with the object's content, or None where there is no such object."""
        with self._as_synapse_error():
            source = await self._downloads.fetch(path)
        if source is None:
            await self._check.refuse_while_media_is_hidden()
            return None
        return ChunkResponder(
            self._reactor,
            source,
            self._store.root / path,
            self._as_synapse_error,
            on_taken=partial(self._downloads.paths.end, path),
        )

    async def delete(self, path: str, file_info: FileInfo) -> None:
        """Remove the object, where the settings allow it; one that is not there counts as removed.

        No released Synapse calls this yet; the interface is proposed.
        """
        if self._settings.delete_from_bucket:
            with self._as_synapse_error():
                await self._module_api.defer_to_threadpool(self._upload_threads, self._delete, path)

    # --- in a thread ---

    def _put(self, path: str, give: Callable[[], BinaryIO]) -> None:
        with give() as body:
            size = body.seek(0, 2)
            body.seek(0)
            self._backend.put(path, body, size)
        self._read_through.count(size)
        logger.debug("Stored %s (%d bytes)", path, size)

    def _is_accessed(self, row: CachedMedia) -> bool:
        """Whether media was accessed in the last minute, perhaps for a thumbnail; in a thread."""
        repository = self._hs.get_media_repository()
        if row.kind == "local":
            return row.media_id in repository.recently_accessed_locals
        return (row.origin, row.media_id) in repository.recently_accessed_remotes

    def _accessed_remotes(self) -> list[tuple[str, str]]:
        """Origin and media id of what was accessed in the last minute, which the database does not know yet."""
        # As a list at once: the reactor's thread goes on changing it.
        return list(self._hs.get_media_repository().recently_accessed_remotes)

    def _delete(self, path: str) -> None:
        for failure in self._backend.delete([path]):
            raise failure.error

    # --- start and stop ---

    def _start_threads(self, name: str, size: int) -> ThreadPool:
        threads = ThreadPool(minthreads=0, maxthreads=max(size, 1), name=name)
        threads.start()
        return threads

    def _follow_shutdown(self) -> None:
        reactor: Any = self._reactor  # the interface's type leaves out the event's name
        reactor.addSystemEventTrigger("before", "shutdown", self._uploads.wait)
        reactor.addSystemEventTrigger("before", "shutdown", self._end_background_work)
        reactor.addSystemEventTrigger("during", "shutdown", self._stop)

    def _announce(self) -> None:
        settings = self._settings
        name, reason = choose_backend(settings)
        switched_on = [
            f"prefix {settings.key_prefix!r}" if settings.prefix else "no prefix",
            "SSE-C" if settings.uses_sse else "no SSE-C",
            f"storage class {settings.storage_class or 'of the bucket'}",
            f"{settings.threadpool_size} threads",
        ]
        if settings.is_https and settings.verify is False:
            switched_on.append("certificate not checked")
        logger.info(
            "Media storage: bucket %r at %s through %s (%s); %s",
            settings.bucket,
            settings.endpoint_url or "AWS",
            name,
            reason,
            ", ".join(switched_on),
        )
        for ignored in settings.misplaced:
            logger.error("Ignored in the config of the media storage provider: %s", ignored)
        if not self._keeps_local_files and self._hs.config.media.dynamic_thumbnails:
            logger.warning(
                "dynamic_thumbnails does not work together with enable_local_media_storage: false: "
                "Synapse itself looks for the thumbnail on the disk"
            )

    def _begin_background_work(self) -> None:
        self._reactor.callWhenRunning(self._background_threads.callInThread, self._remove_leftovers)
        if self._keeper is not None:
            self._reactor.callWhenRunning(self._keeper.start)

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed has left of its downloads; in a thread."""
        try:
            removed = self._store.remove_stale_temporary_files()
        except OSError as error:
            logger.warning("Left-over temporary files cannot be removed: %s", error)
        else:
            if removed:
                logger.info("Removed %d temporary files that a killed process had left behind", removed)

    def _end_background_work(self) -> Deferred[None]:
        """Leave Synapse's database before Synapse does: the last one to leave SQLite has to tidy its journal up."""
        self._stop_background.set()
        ended: Deferred[None] = deferToThreadPool(self._reactor, self._background_threads, self._close_database)
        return ended.addTimeout(_LONGEST_WAIT_SECONDS, self._reactor, onTimeoutCancel=lambda *_: None)

    def _close_database(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()
        self._known_media.close()

    def _stop(self) -> None:
        self._downloads.paths.close()
        self._backend.close()
        for threads in (self._read_threads, self._upload_threads, self._download_threads, self._background_threads):
            threads.stop()

    # --- the local cache ---

    @property
    def _reads_through(self) -> bool:
        cache = self._settings.local_cache
        return self._keeps_local_files and (cache is None or cache.read_through)

    def _make_keeper(self, kinds: Collection[Kind]) -> CacheKeeper:
        cache = LocalCache(
            self._backend,
            self._store,
            self._known_media.connect,
            self._settings,
            self._room,
            stored=kinds,
            gate=self._downloads.paths,
            stop=self._stop_background,
            workers=max(self._settings.threadpool_size // 4, 1),
            is_accessed=self._is_accessed,
        )
        try:
            # Before anything is put into an empty store: it is the sign that the disk was lost.
            cache.prepare()
        except (MediaStoreError, OSError) as error:
            logger.warning("The local cache of media cannot be kept: %s", error)
        return CacheKeeper(cache, self._store, self._settings, self._stop_background, self._check.allows_cache)

    def _evict(self) -> None:
        if self._keeper is not None:
            self._keeper.wake()

    # --- errors ---

    @contextlib.contextmanager
    def _as_synapse_error(self) -> Iterator[None]:
        """Tell clients that the storage failed, and the operator why."""
        try:
            yield
        except BackendError as error:
            self._complaints.add(error)
            # Without its cause, as Synapse logs a traceback for each upload that fails behind its answer.
            raise SynapseError(HTTPStatus.BAD_GATEWAY, "Media storage is unavailable", Codes.UNKNOWN) from None


def _keeps_local_files(hs: HomeServer) -> bool:
    # The setting came with Synapse 1.146.
    return bool(getattr(hs.config.media, "enable_local_media_storage", True))


def _all_of_ours(hs: HomeServer) -> list[ProviderSettings]:
    return [given for _, given, _ in hs.config.media.media_storage_providers if isinstance(given, ProviderSettings)]


def _kinds_to_cache(hs: HomeServer, settings: ProviderSettings) -> list[Kind]:
    """The kinds of media that go into the bucket, where this provider is the one that keeps the local cache.

    That is the first of ours which new media goes into at all; none for the others.
    """
    for _, given, wrapper in hs.config.media.media_storage_providers:
        if isinstance(given, ProviderSettings) and (wrapper.store_local or wrapper.store_remote):
            kinds: dict[Kind, bool] = {"local": wrapper.store_local, "remote": wrapper.store_remote}
            return [kind for kind, is_stored in kinds.items() if is_stored] if given is settings else []
    return []


def _refuse_losing_media(hs: HomeServer, settings: ProviderSettings) -> None:
    """Without local files the bucket holds the only copy, so everything must be there before the upload is answered."""
    if _keeps_local_files(hs):
        return
    wrappers = [(given, wrapper) for _, given, wrapper in hs.config.media.media_storage_providers]
    reason = None
    if any(given is settings and not wrapper.store_synchronous for given, wrapper in wrappers):
        reason = "store_synchronous: true"
    elif not any(wrapper.store_local for _, wrapper in wrappers):
        reason = "store_local: true"
    elif not any(wrapper.store_remote for _, wrapper in wrappers):
        reason = "store_remote: true"
    if reason is not None:
        text = f"enable_local_media_storage: false would lose media; set {reason} for the storage provider"
        # Synapse shows the exception at the end of a traceback.
        logger.error("Media storage: %s", text)
        raise ConfigError(text)

"""What Synapse knows of media: asked of its database, over a connection of our own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

from storage_provider.media_store import Media, MediaFile, parse_path
from storage_provider.synapse_db import DatabaseArguments, SynapseDb, SynapseDbError, connect
from storage_provider.transfers import Digest, fits

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)


def database_arguments(hs: HomeServer) -> DatabaseArguments:
    """How Synapse connects to the database with the media tables."""
    for database in hs.config.database.databases:
        if "main" in database.databases:
            engine: Literal["psycopg2", "sqlite3"]
            engine = "psycopg2" if database.config.get("name") == "psycopg2" else "sqlite3"
            return DatabaseArguments(engine, database.config["args"])
    raise RuntimeError("Synapse has no database with its main tables")


class KnownMedia:
    """Tells, in any thread, whether a file is what the database says that it should be."""

    def __init__(self, arguments: DatabaseArguments, accessed_media_ids: Callable[[str], Collection[str]]) -> None:
        """`accessed_media_ids` are those of a server that were accessed just now.

        A path names remote media by its `filesystem_id`, for which the database has no index.
        """
        self._arguments = arguments
        self._accessed_media_ids = accessed_media_ids
        self._lock = threading.Lock()
        self._database: SynapseDb | None = None
        self._is_closed = False

    def connect(self) -> SynapseDb:
        """Open another connection. Raises `SynapseDbError`."""
        return connect(self._arguments)

    def has(self, path: str, digest: Digest) -> bool:
        """Whether media with that file and content is known and not quarantined; False also where nobody can tell."""
        file = parse_path(path)
        if file is None:
            return False
        try:
            return self._fits(file, digest)
        except SynapseDbError as error:
            logger.debug("Whether %s is known could not be asked: %s", path, error)
            return False

    def close(self) -> None:
        """Close the connection; nothing is known any more."""
        with self._lock:
            self._is_closed = True
            if self._database is not None:
                self._database.close()

    def _fits(self, file: MediaFile, digest: Digest) -> bool:
        with self._lock:
            if self._is_closed:
                return False
            if self._database is None:
                self._database = self.connect()
        facts = self._database.facts_of_file(file.media, self._media_ids(file.media))
        return facts is not None and not facts.quarantined and fits(facts, file.path, digest)

    def _media_ids(self, media: Media) -> Collection[str]:
        return () if media.is_local else self._accessed_media_ids(media.origin)

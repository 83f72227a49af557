"""What Synapse knows of media: asked of its database, over a connection of our own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from storage_provider.database import DatabaseArguments
from storage_provider.errors import SynapseDbError
from storage_provider.judgement import fits, known_length
from storage_provider.media_paths import Media, parse_path
from storage_provider.proofs import Fingerprint
from storage_provider.synapse_db import MediaFacts, SynapseDb, connect

if TYPE_CHECKING:
    from synapse.server import HomeServer

logger = logging.getLogger(__name__)

# That media was accessed for its thumbnail, Synapse notes only once it has sent that.
_ANSWER_SECONDS = 0.3


def database_arguments(hs: HomeServer) -> DatabaseArguments:
    """How Synapse connects to the database with the media tables."""
    for database in hs.config.database.databases:
        if "main" in database.databases:
            engine: Literal["psycopg2", "sqlite3"]
            engine = "psycopg2" if database.config.get("name") == "psycopg2" else "sqlite3"
            # Without arguments, libpq takes them from the environment.
            return DatabaseArguments(engine, database.config.get("args", {}))
    raise RuntimeError("Synapse has no database with its main tables")


class KnownMedia:
    """Tells, in any thread, which files are what the database says that they should be."""

    def __init__(self, arguments: DatabaseArguments, accessed_remotes: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """`accessed_remotes` are the origin and the media id of what was accessed just now of other servers' media.

        A path names remote media by its `filesystem_id`, for which the database has no index.
        """
        self._arguments = arguments
        self._accessed_remotes = accessed_remotes
        self._lock = threading.Lock()
        self._database: SynapseDb | None = None
        self._is_closed = False

    def connect(self) -> SynapseDb:
        """Open another connection. Raises `SynapseDbError`."""
        return connect(self._arguments)

    def known_of(self, contents: Mapping[str, Fingerprint]) -> set[str]:
        """The paths whose media is known, with that content, and not quarantined; none where nobody can tell."""
        return {
            path
            for path, facts in self._facts(contents, self._likely_remotes()).items()
            if not facts.quarantined and fits(facts, path, contents[path])
        }

    def refuted_of(self, contents: Mapping[str, Fingerprint]) -> set[str]:
        """The paths whose media is known with another content; none where nobody can tell."""
        # Whoever waits for it would wait for his own answer.
        likely = [self._accessed_remotes()]
        return {
            path
            for path, facts in self._facts(contents, likely).items()
            if known_length(facts, path) is not None and not fits(facts, path, contents[path])
        }

    def close(self) -> None:
        """Close the connection; nothing is known any more."""
        with self._lock:
            self._is_closed = True
            if self._database is not None:
                self._database.close()

    def _facts(self, paths: Iterable[str], likely: Iterable[Iterable[tuple[str, str]]]) -> dict[str, MediaFacts]:
        """What is known of the files with these paths; see `SynapseDb.facts_of_files` for the `likely` ones."""
        files = [file for file in map(parse_path, paths) if file is not None]
        try:
            known = self._facts_of({file.media for file in files}, likely) if files else {}
        except SynapseDbError as error:
            logger.debug("Which of %d files are known could not be asked: %s", len(files), error)
            return {}
        return {file.path: facts for file in files if (facts := known.get(file.media))}

    def _facts_of(
        self, media: Collection[Media], likely: Iterable[Iterable[tuple[str, str]]]
    ) -> Mapping[Media, MediaFacts]:
        with self._lock:
            if self._is_closed:
                return {}
            if self._database is None:
                self._database = self.connect()
        return self._database.facts_of_files(media, likely)

    def _likely_remotes(self) -> Iterator[Iterable[tuple[str, str]]]:
        """What was accessed just now, and then what was by the time that whoever asked has been answered."""
        yield self._accessed_remotes()
        time.sleep(_ANSWER_SECONDS)
        yield self._accessed_remotes()

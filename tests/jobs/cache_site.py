"""A media store, Synapse's database and a bucket, and the local cache over them."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.base import Backend
from storage_provider.cache_report import PassReport
from storage_provider.directories import FileState
from storage_provider.local_cache import LocalCache
from storage_provider.media_paths import Media, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore
from storage_provider.room import Room
from storage_provider.settings import ProviderSettings
from storage_provider.synapse_db import connect
from tests.jobs.conftest import SynapseDatabase

HOUR = 3_600_000
DAY = 24 * HOUR

THUMBNAIL = "32-32-image-png-crop"


class OpenGate:
    """Lets everything happen, but for what is done to paths in use; tells what was put there."""

    def __init__(self) -> None:
        self.in_use: set[str] = set()
        self.passed: list[str] = []
        self.before: Callable[[str], object] = lambda path: None
        self.after: Callable[[str], object] = lambda path: None

    @contextlib.contextmanager
    def kept_free(self, paths: Iterable[str]) -> Iterator[dict[str, FileState | None]]:
        paths = list(paths)
        for path in paths:
            self.before(path)
        kept: dict[str, FileState | None] = {path: None for path in paths if path not in self.in_use}
        yield kept
        self.passed += [path for path, placed in kept.items() if placed is not None]
        for path in kept:
            self.after(path)


@dataclass
class CacheSite:
    """Everything that the local cache works on; `clock_ms` is its present."""

    root: Path
    database: SynapseDatabase
    backend: Backend
    bucket_name: str = ""
    """Where it is on a server."""
    gate: OpenGate = field(default_factory=OpenGate)
    stop: threading.Event = field(default_factory=threading.Event)
    clock_ms: int = 0
    accessed: set[str] = field(default_factory=set)
    """Ids of media that is being used, which no row tells yet."""
    room: Room = field(default_factory=lambda: Room(None))
    """That of the cache that was started last."""

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        # All files are older than `min_age`, if nothing else is said.
        self.clock_ms = self.clock_ms or int(time.time() * 1000) + HOUR

    @property
    def store(self) -> MediaStore:
        return MediaStore(self.root, clock=lambda: self.clock_ms / 1000)

    # --- media ---

    def add(
        self,
        media_id: str,
        content: bytes,
        *,
        origin: str = "",
        thumbnail: bytes | None = None,
        age: int = 0,
        on_disk: bool = True,
        in_bucket: bool = True,
        **row: Any,
    ) -> str:
        """Media with its row, on disk and in the bucket; returns the path of the content."""
        media = Media(origin, media_id)
        used = self.clock_ms - age
        values = {"media_length": len(content), "sha256": hashlib.sha256(content).hexdigest(), "last_access_ts": used}
        if origin:
            self.database.add_remote(origin, f"id of {media_id}", media_id, **(values | row))
        else:
            self.database.add_local(media_id, **(values | row))
        files = {content_path(media): content}
        if thumbnail is not None:
            self.database.add_thumbnail(
                origin, f"id of {media_id}" if origin else media_id, 32, 32, "image/png", "crop", len(thumbnail)
            )
            files[f"{thumbnail_directory(media)}/{THUMBNAIL}"] = thumbnail
        for path, data in files.items():
            if on_disk:
                self.write(path, data)
            if in_bucket:
                self.put(path, data)
        return content_path(media)

    def write(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def put(self, path: str, content: bytes) -> None:
        with contextlib.closing(_body(content)) as body:
            self.backend.put(path, body, len(content))

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        named = {str(path.relative_to(self.root)): path for path in found}
        return {name: path.read_bytes() for name, path in sorted(named.items()) if not name.startswith(".")}

    def execute(self, sql: str, *arguments: Any) -> None:
        self.database.execute(sql, arguments)

    # --- the cache ---

    def cache(self, *, stored: tuple[Any, ...] = ("local", "remote"), **config: Any) -> LocalCache:
        given = settings(**config)
        self.room = room_of(given)
        return LocalCache(
            self.backend,
            self.store,
            lambda: connect(self.database.arguments),
            given,
            self.room,
            stored=stored,
            gate=self.gate,
            stop=self.stop,
            workers=3,
            is_accessed=lambda row: row.media_id in self.accessed,
            clock=lambda: self.clock_ms / 1000,
        )

    def run_pass(self, *, is_full: bool = False, **config: Any) -> PassReport:
        """A pass of a cache that has just been started."""
        return self.cache(**config).run_pass(is_full=is_full)


def settings(local_cache: Mapping[str, Any] | None = None, **config: Any) -> ProviderSettings:
    """The settings with no other limit on the disk than those given."""
    limits = None if local_cache is None else {"min_free_space": 0, **local_cache}
    return ProviderSettings.parse({"bucket": "media", **({} if limits is None else {"local_cache": limits}), **config})


def room_of(given: ProviderSettings) -> Room:
    return Room(None if given.local_cache is None else given.local_cache.max_size)


def _body(content: bytes) -> Any:
    import io

    return io.BytesIO(content)

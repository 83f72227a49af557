"""Whatever happens in whatever order: no acknowledged byte is lost, and nothing that was deleted comes back.

A site lives through stores, reads, deletions, quarantines, damages, lost disks, passes of the local cache, and
things that happen in the middle of a pass: a crash, a deletion in Synapse's two steps, a use of the file.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from backends.errors import BackendUnavailable
from storage_provider.database import DatabaseArguments
from storage_provider.directories import FileState
from storage_provider.failures import BucketFails
from storage_provider.local_cache import LocalCache
from storage_provider.media_paths import Media, content_path, thumbnail_directory
from storage_provider.media_store import MediaStore
from storage_provider.synapse_db import connect
from tests.jobs.cache_site import HOUR, THUMBNAIL, OpenGate, room_of
from tests.jobs.cache_site import settings as cache_settings
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.memory_backend import MemoryBackend

NAMES = ["abcde", "abcde-", "abcdef", "abcd.x", "Zbcdé", "fghij"]


class Crash(BaseException):
    """The process is killed here."""


@dataclass
class Kept:
    """A file that Synapse has acknowledged."""

    path: str
    content: bytes
    has_sha256: bool


@dataclass
class Item:
    """Media, as Synapse sees it."""

    origin: str
    media_id: str
    filesystem_id: str
    files: list[Kept]
    is_deleted: bool = False
    is_quarantined: bool = False


class WatchfulStore(MediaStore):
    """Sees that nothing is removed that is not whole in the bucket."""

    def __init__(self, root: Path, backend: MemoryBackend, clock: Callable[[], float]) -> None:
        super().__init__(root, clock)
        self._backend = backend
        self.unproved: list[str] = []
        self.deleted: Callable[[str], bool] = lambda path: False
        self.removed: set[str] = set()

    def remove(self, path: str, expected: FileState) -> bool:
        content = (self.root / path).read_bytes() if self.state(path) == expected else None
        if content is not None and self._backend.objects.get(path) != content and not self.deleted(path):
            self.unproved.append(path)
        done = super().remove(path, expected)
        if done:
            self.removed.add(path)
        return done


@dataclass
class Surprise:
    """What happens at a moment within a pass, and what follows at the next one, or at the end at the latest."""

    after: int
    act: Callable[[], object]
    then: Callable[[], object] = lambda: None
    is_repeated: bool = False
    _has_ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *_: object) -> None:
        with self._lock:
            self.after -= 1
            if self.after == 0 or (self.is_repeated and self.after < 0):
                self.act()
            elif self.after == -1:
                self._end()

    def end(self) -> None:
        if self.after <= 0:
            self._end()

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.then()


class SiteMachine(RuleBasedStateMachine):
    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="cache-"))
        shutil.copy(self.template, self.directory / "homeserver.db")
        self.database = SynapseDatabase(
            DatabaseArguments("sqlite3", {"database": str(self.directory / "homeserver.db")})
        )
        self.backend = MemoryBackend()
        self.gate = OpenGate()
        (self.directory / "store").mkdir()
        self.store = WatchfulStore(self.directory / "store", self.backend, lambda: self.now / 1000)
        self.store.deleted = self.is_deleted
        # Long after now, so that all files are older than any `min_age`.
        self.now = 40_000 * 24 * HOUR
        self.items: dict[str, Item] = {}
        self.number = 0
        self.evicted: set[str] = set()
        self.read_in_pass: set[str] = set()
        self.in_use: str | None = None
        self.config: dict[str, Any] = {}
        self.cache: LocalCache | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    # --- helpers ---

    def on_disk(self, path: str) -> bytes | None:
        place = self.store.root / path
        return place.read_bytes() if place.is_file() else None

    def write(self, path: str, content: bytes) -> None:
        (self.store.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.store.root / path).write_bytes(content)

    def is_deleted(self, path: str) -> bool:
        return any(item.is_deleted and path == kept.path for item in self.items.values() for kept in item.files)

    def alive(self) -> list[Item]:
        return [item for item in self.items.values() if not item.is_deleted]

    def choose(self, data: st.DataObject) -> Item:
        return data.draw(st.sampled_from(self.alive()))

    def whole_twice(self) -> list[Kept]:
        """The files that are on disk and in the bucket."""
        files = (kept for item in self.alive() for kept in item.files if kept.content)
        return [
            kept for kept in files if self.on_disk(kept.path) == kept.content == self.backend.objects.get(kept.path)
        ]

    def touch(self, item: Item) -> None:
        table = "remote_media_cache" if item.origin else "local_media_repository"
        self.database.execute(f"UPDATE {table} SET last_access_ts = ? WHERE media_id = ?", (self.now, item.media_id))

    def remove_files(self, item: Item) -> None:
        """What Synapse does first when it deletes media."""
        for kept in item.files:
            (self.store.root / kept.path).unlink(missing_ok=True)

    def remove_row(self, item: Item) -> None:
        table = "remote_media_cache" if item.origin else "local_media_repository"
        with closing(self.database.connect()) as connection:
            connection.execute(f"DELETE FROM {table}_thumbnails WHERE media_id = ?", (item.media_id,))
            connection.execute(f"DELETE FROM {table} WHERE media_id = ?", (item.media_id,))
            connection.commit()
        item.is_deleted = True

    # --- what Synapse and its users do ---

    @initialize(
        max_size=st.sampled_from([None, 0, 4 * 4096, 8 * 4096]),
        max_age=st.sampled_from([None, "1d", "1d"]),
        auto_restore=st.sampled_from([True, True, False]),
        has_limits=st.sampled_from([True, True, True, False]),
        opaque=st.booleans(),
        stored=st.sampled_from([("local", "remote"), ("local",)]),
    )
    def begin(
        self, max_size: int | None, max_age: str | None, auto_restore: bool, has_limits: bool, opaque: bool, stored: Any
    ) -> None:
        limits: dict[str, Any] = {"min_age": 0}
        limits |= {} if max_size is None else {"max_size": max_size}
        limits |= {} if max_age is None else {"max_age": max_age}
        self.config = {"auto_restore": auto_restore, "local_cache": limits if has_limits else None}
        self.backend._opaque_etags = opaque
        self.stored = stored
        for origin in ("", "", "a.org", "a.org-x"):
            self.store_media(origin, 5000, has_thumbnail=not origin, has_sha256=True, arrives=True)

    @rule(
        origin=st.sampled_from(["", "", "a.org", "a.org-x"]),
        size=st.integers(0, 6000),
        has_thumbnail=st.booleans(),
        has_sha256=st.sampled_from([True, True, False]),
        arrives=st.sampled_from([True, True, False]),
    )
    def store_media(self, origin: str, size: int, has_thumbnail: bool, has_sha256: bool, arrives: bool) -> None:
        self.number += 1
        identifier = f"{NAMES[self.number % len(NAMES)]}{self.number // len(NAMES) or ''}"
        media = Media(origin, identifier)
        media_id = f"id{self.number}" if origin else identifier
        content = hashlib.shake_128(str(self.number).encode()).digest(size)
        row: dict[str, Any] = {"media_length": size, "created_ts": self.now, "last_access_ts": None}
        row["sha256"] = hashlib.sha256(content).hexdigest() if has_sha256 else None
        files = [Kept(content_path(media), content, has_sha256)]
        if has_thumbnail:
            files.append(Kept(f"{thumbnail_directory(media)}/{THUMBNAIL}", content[:99] + b"thumb", False))
        for kept in files:
            self.write(kept.path, kept.content)
            if arrives:
                self.backend.objects[kept.path] = kept.content
        if origin:
            self.database.add_remote(origin, media_id, identifier, **row)
        else:
            self.database.add_local(media_id, **row)
        if has_thumbnail:
            self.database.add_thumbnail(origin, media_id, 32, 32, "image/png", "crop", len(files[1].content))
        self.items[media_id] = Item(origin, media_id, identifier, files)

    @rule(hours=st.sampled_from([1, 5, 30, 24 * 60]))
    def time_passes(self, hours: int) -> None:
        self.now += hours * HOUR

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        item = self.choose(data)
        self.touch(item)
        self.evicted -= {kept.path for kept in item.files}

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        item = self.choose(data)
        self.remove_files(item)
        self.remove_row(item)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        item = self.choose(data)
        self.quarantine_now(item)

    def quarantine_now(self, item: Item) -> None:
        table = "remote_media_cache" if item.origin else "local_media_repository"
        self.database.execute(f"UPDATE {table} SET quarantined_by = '@a:b' WHERE media_id = ?", (item.media_id,))
        item.is_quarantined = True

    # --- what goes wrong ---

    @precondition(lambda self: self.whole_twice())
    @rule(data=st.data())
    def damage_a_file(self, data: st.DataObject) -> None:
        self.damage(data, of_object=False)

    @precondition(lambda self: self.whole_twice())
    @rule(data=st.data())
    def damage_an_object(self, data: st.DataObject) -> None:
        self.damage(data, of_object=True)

    def damage(self, data: st.DataObject, *, of_object: bool) -> None:
        """Damage one of two whole copies, as far as the database can tell it from the other one."""
        kept = data.draw(st.sampled_from(self.whole_twice()))
        damaged = [b"", kept.content[:-1], *([bytes(len(kept.content))] * 2 if kept.has_sha256 else [])]
        content = data.draw(st.sampled_from(damaged))
        if of_object:
            self.backend.objects[kept.path] = content
        else:
            self.write(kept.path, content)

    @rule()
    def disk_is_lost(self) -> None:
        """All files go that are whole in the bucket; if those were all, the disk is a new one."""
        for kept in self.whole_twice():
            (self.store.root / kept.path).unlink()
        if not self.store.holds_media():
            shutil.rmtree(self.store.root)
            self.store.root.mkdir()
            self.evicted.clear()
            self.cache = None

    # --- what the cache does ---

    @rule()
    def restart(self) -> None:
        self.cache = None

    @rule(is_full=st.booleans())
    def run_a_pass(self, is_full: bool) -> None:
        report = self.run(is_full=is_full)
        assert report.failed.count == 0, report

    @rule(data=st.data(), after=st.integers(1, 8), where=st.sampled_from(["bucket", "before", "after"]))
    def run_a_pass_that_is_disturbed(self, data: st.DataObject, after: int, where: str) -> None:
        """Something happens at a moment of the pass: at a request, or before or after a file is put there or removed."""
        disturb = data.draw(
            st.sampled_from(self.disturbances() if self.alive() else [self.crash, self.bucket_goes_away])
        )
        surprise = Surprise(after, lambda: None)
        disturb(data, surprise)
        if where == "bucket" or disturb == self.bucket_goes_away:
            self.backend.before = surprise
        elif where == "before":
            self.gate.before = surprise
        else:
            self.gate.after = surprise
        if where != "after":
            # What takes longer than a file to get its place can be noticed by nobody.
            self.gate.after = lambda path: surprise.end()
        try:
            self.run()
        except Crash:
            self.cache = None
        except (BackendUnavailable, BucketFails):
            pass
        surprise.end()

    def disturbances(self) -> list[Callable[[st.DataObject, Surprise], None]]:
        return [
            self.crash,
            self.bucket_goes_away,
            self.is_deleted_meanwhile,
            self.is_deleted_meanwhile,
            self.is_quarantined_meanwhile,
            self.is_read_meanwhile,
            self.changes_meanwhile,
            self.is_in_use,
        ]

    def crash(self, data: st.DataObject, surprise: Surprise) -> None:
        def crash() -> None:
            raise Crash

        surprise.act = crash

    def bucket_goes_away(self, data: st.DataObject, surprise: Surprise) -> None:
        def fail() -> None:
            raise BackendUnavailable("away", operation="any")

        surprise.act = fail
        surprise.is_repeated = True

    def is_deleted_meanwhile(self, data: st.DataObject, surprise: Surprise) -> None:
        """Synapse removes the file, and a moment later the row; the pass goes on in between."""
        missing = [item for item in self.alive() if self.on_disk(item.files[0].path) is None]
        item = data.draw(st.sampled_from(missing or self.alive()))
        surprise.act = lambda: self.remove_files(item)
        surprise.then = lambda: self.remove_row(item)

    def is_quarantined_meanwhile(self, data: st.DataObject, surprise: Surprise) -> None:
        item = self.choose(data)
        surprise.act = lambda: self.quarantine_now(item)

    def is_read_meanwhile(self, data: st.DataObject, surprise: Surprise) -> None:
        item = self.choose(data)

        def read() -> None:
            self.touch(item)
            # Also what this pass has just evicted: it has been used since, and may come back.
            self.read_in_pass.update(kept.path for kept in item.files)

        surprise.act = read

    def changes_meanwhile(self, data: st.DataObject, surprise: Surprise) -> None:
        """Somebody writes into a file: what is in the bucket must be left."""
        kept = self.choose(data).files[0]

        def change() -> None:
            if self.on_disk(kept.path) == kept.content == self.backend.objects.get(kept.path) and kept.has_sha256:
                self.write(kept.path, kept.content + b"more")

        surprise.act = change

    def is_in_use(self, data: st.DataObject, surprise: Surprise) -> None:
        self.in_use = self.choose(data).files[0].path

    def run(self, *, is_full: bool = False) -> Any:
        if self.cache is None:
            given = cache_settings(**self.config)
            self.cache = LocalCache(
                self.backend,
                self.store,
                lambda: connect(self.database.arguments),
                given,
                room_of(given),
                stored=self.stored,
                gate=self.gate,
                stop=threading.Event(),
                workers=2,
                clock=lambda: self.now / 1000,
            )
        self.store.removed.clear()
        self.read_in_pass.clear()
        in_use = None if self.in_use is None else self.on_disk(self.in_use)
        self.gate.in_use = set() if self.in_use is None else {self.in_use}
        before = {kept.path for item in self.alive() for kept in item.files if self.on_disk(kept.path) is not None}
        try:
            return self.cache.run_pass(is_full=is_full)
        finally:
            self.backend.before = lambda operation, key: None
            self.gate.before = self.gate.after = lambda path: None
            assert self.in_use is None or self.on_disk(self.in_use) == in_use
            self.in_use = None
            came_back = {path for path in self.evicted - before - self.read_in_pass if self.on_disk(path) is not None}
            assert not came_back, "what was evicted was restored, though nobody had used it"
            self.evicted = (self.evicted | self.store.removed) - self.read_in_pass

    # --- the promises ---

    @invariant()
    def no_acknowledged_byte_is_lost(self) -> None:
        for item in self.alive():
            for kept in item.files:
                copies = (self.on_disk(kept.path), self.backend.objects.get(kept.path))
                assert kept.content in copies, f"{kept.path} is lost"

    @invariant()
    def nothing_was_removed_that_was_not_whole_in_the_bucket(self) -> None:
        assert self.store.unproved == []

    @invariant()
    def nothing_deleted_comes_back(self) -> None:
        for item in self.items.values():
            if item.is_deleted:
                assert all(self.on_disk(kept.path) is None for kept in item.files)

    @invariant()
    def no_temporary_file_is_left(self) -> None:
        temporary = self.store.root / ".s3_storage_provider" / "tmp"
        assert not temporary.exists() or list(temporary.iterdir()) == []


def test_promises_are_kept_whatever_happens(sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(SiteMachine, "template", sqlite_template, raising=False)
    run_state_machine_as_test(
        SiteMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )

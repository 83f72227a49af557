"""One download per object: who gets what, when the file has its place, and what is left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pytest
from synapse.logging.context import SENTINEL_CONTEXT, current_context
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.python.failure import Failure

from backends.errors import AccessDenied, BackendError, BackendUnavailable, ObjectNotFound
from storage_provider.downloads import Downloads, Threads
from storage_provider.media_store import MediaStore
from storage_provider.proofs import Digest, Fingerprint
from storage_provider.shared_download import DownloadSource
from storage_provider.sources import CHUNK_BYTES, BucketSource, ChunkSource
from storage_provider.temporary_files import TemporaryFile, give_name
from tests.provider.scripted_bucket import ImmediateReactor, ManualModuleApi, ManualThreads, ScriptedBucket
from tests.temporary_files import temporary_files

Result = TypeVar("Result")

PATH = "local_content/AB/CD/efgh"
OTHER_PATH = "local_content/AB/CD/ijkl"
LARGE = os.urandom(3 << 20)
SMALL = os.urandom(1000)
BREAK = (2 << 20) + 12_345

each_size = pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=["empty", "small", "large"])


class World:
    """Downloads of a scripted bucket into a real directory, by threads that the test moves."""

    def __init__(self, root: Path) -> None:
        self.bucket = ScriptedBucket()
        self.store = MediaStore(root)
        self.opening, self.moving, self.background = ManualThreads(), ManualThreads(), ManualThreads()
        self.asked: list[tuple[str, Digest]] = []
        self.keeps = True
        self.refuted: set[str] = set()
        self._sources: list[ChunkSource] = []
        self.reactor = ImmediateReactor()
        self.downloads = Downloads(
            cast(Any, ManualModuleApi(self.reactor)),
            self.reactor,
            cast(Any, self.bucket),
            self.store,
            cast(Any, Threads)(self.opening, self.moving, self.background),
            choose_to_keep=self._choose_to_keep,
            refute=lambda contents: contents.keys() & self.refuted,
        )

    def _choose_to_keep(self, contents: Mapping[str, Fingerprint]) -> Collection[str]:
        self.asked += [(path, Digest(content.length, content.sha256)) for path, content in contents.items()]
        return list(contents) if self.keeps else []

    @property
    def file(self) -> Path:
        return self.store.root / PATH

    @property
    def temporary(self) -> list[Path]:
        return temporary_files(self.store.root, os.getpid())

    @property
    def directories_held(self) -> list[Path]:
        """Directories of the store that are open."""
        directories = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if descriptor.is_dir() and (directory := descriptor.readlink()).is_relative_to(self.store.root):
                    directories.append(directory)
        return directories

    def work(self) -> None:
        """Let all threads work until there is nothing left to do."""
        while self.opening.work() + self.moving.work() + self.background.work():
            pass

    def wait_for_a_look(self) -> None:
        """Let the time pass after which every download has looked at what has come."""
        for _ in range(2):
            self.reactor.advance(1)

    def fetch(self) -> ChunkSource:
        """A source whose headers are in, and none of a large content."""
        fetching = self.begin_fetch()
        self.opening.work()
        if not fetching.called:
            self.moving.work(1)
        source = now(fetching)
        assert source is not None
        return source

    def close(self) -> None:
        while not self.downloads.paths.is_free(PATH):
            self.take()
        self.end(*self._sources)

    def begin_fetch(self) -> Deferred[ChunkSource | None]:
        fetching = begin(self.downloads.fetch(PATH))

        def remember(source: ChunkSource | None) -> ChunkSource | None:
            if source is not None:
                self._sources.append(source)
            return source

        return fetching.addCallback(remember)

    def take(self) -> None:
        """Synapse writes one of the answers."""
        self.downloads.paths.end(PATH)

    def read_all(self, source: ChunkSource) -> bytes:
        content = b""
        while chunk := self.read(source):
            content += chunk
        return content

    def read_until_it_fails(self, source: ChunkSource) -> bytes:
        content = b""
        with pytest.raises(BackendUnavailable):
            while True:
                content += self.read(source)
        return content

    def read(self, source: ChunkSource) -> bytes:
        reading = begin(source.read())
        self.work()
        chunk = now(reading)
        assert len(chunk) <= CHUNK_BYTES
        return chunk

    def end(self, *sources: ChunkSource) -> None:
        """Close what was taken, and let the threads come to rest."""
        for source in sources:
            source.close()
        self.work()

    def assert_nothing_is_held(self) -> None:
        assert self.temporary == []
        assert not any(reader.holds_connection for reader in self.bucket.readers)
        assert self.downloads.paths.is_free(PATH)


def begin(work: Awaitable[Result]) -> Deferred[Result]:
    return ensureDeferred(cast(Any, work))


def now(deferred: Deferred[Result]) -> Result:
    """What has come of it, which must be over; raises what it raised."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    assert results, "it is not over"
    if isinstance(results[0], Failure):
        raise cast(BaseException, results[0].value)
    return cast(Result, results[0])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture(autouse=True)
def every_temporary_file_is_discarded_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads that did it at once would close a descriptor that is somebody else's by then."""
    discarded: list[TemporaryFile] = []
    discard = TemporaryFile.discard

    def note(file: TemporaryFile) -> None:
        discarded.append(file)
        discard(file)

    monkeypatch.setattr(TemporaryFile, "discard", note)
    yield
    assert len(discarded) == len(set(discarded))


@pytest.fixture(autouse=True)
def no_log_context_is_left_behind() -> Iterator[None]:
    yield
    assert current_context() is SENTINEL_CONTEXT


@pytest.fixture(autouse=True)
def one_step_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test see each step: memory, from which the scripted bucket reads, is too fast for that."""
    monkeypatch.setattr("storage_provider.downloads._TURN_SECONDS", 0)


@pytest.fixture
def file_reads(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were read of the file that the download grows in, time by time."""
    reads: list[int] = []
    read_cached = world.downloads.read_cached

    def note(descriptor: int, length: int, offset: int) -> bytes | None:
        reads.append(length)
        return read_cached(descriptor, length, offset)

    monkeypatch.setattr(world.downloads, "read_cached", note)
    return reads


@pytest.fixture
def all_steps_in_one_turn(world: World, one_step_a_turn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage_provider.downloads._TURN_SECONDS", 3600)
    world.moving.working.clear()


# --- one download for all ---


@each_size
def test_all_who_ask_at_once_get_the_whole_content_of_one_request(world: World, content: bytes) -> None:
    world.bucket.objects[PATH] = content
    fetching = [world.begin_fetch() for _ in range(50)]
    world.opening.work()
    sources = [now(each) for each in fetching]
    for source in sources:
        assert source is not None
        assert world.read_all(source) == content
        world.take()
        source.close()
    assert world.bucket.opened == [(0, None)]
    world.work()
    world.assert_nothing_is_held()


def test_who_comes_while_it_is_under_way_joins_it(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    first = world.fetch()
    world.moving.work(2)
    second = world.fetch()
    assert world.read_all(second) == LARGE
    assert world.read_all(first) == LARGE
    assert len(world.bucket.opened) == 1


def test_a_reader_gets_what_there_is_without_waiting_for_the_rest(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    # The beginning has come with the headers.
    chunk = now(begin(source.read()))
    assert 0 < len(chunk) < CHUNK_BYTES
    reading = begin(source.read())
    assert not reading.called
    world.moving.work(1)
    assert LARGE.startswith(chunk + now(reading))


def test_a_reader_that_stalls_holds_up_nobody_and_no_thread(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    stalled, other = world.fetch(), world.fetch()
    begun = world.read(stalled)
    assert world.read_all(other) == LARGE
    world.take()
    world.take()
    world.end(other)
    assert not len(world.opening) + len(world.moving) + len(world.background)
    assert not any(reader.holds_connection for reader in world.bucket.readers)
    assert world.file.read_bytes() == LARGE
    assert begun + world.read_all(stalled) == LARGE
    world.end(stalled)
    world.assert_nothing_is_held()


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_a_thread_that_moves_content_opens_the_object_and_goes_on_with_it_where_one_is_free(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    fetching = world.begin_fetch()
    assert not len(world.opening)
    world.moving.work(1)
    assert now(fetching) is not None
    assert world.bucket.readers[0].position == len(LARGE)


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_a_thread_that_opens_objects_does_not_go_on_with_the_content(world: World) -> None:
    world.moving.working.append(None)
    world.bucket.objects[PATH] = LARGE
    world.begin_fetch()
    world.opening.work()
    assert 0 < world.bucket.readers[0].position < CHUNK_BYTES


@pytest.mark.usefixtures("all_steps_in_one_turn")
@pytest.mark.parametrize("steps", [1, 3])
def test_readers_are_shown_what_a_turn_has_brought_though_the_rest_of_it_is_awaited(world: World, steps: int) -> None:
    world.bucket.objects[PATH] = LARGE
    fetching = world.begin_fetch()
    positions: list[int] = []
    shown: list[bytes] = []

    def stall(position: int) -> None:
        positions.append(position)
        if len(positions) > steps and not shown:
            assert not fetching.called
            world.wait_for_a_look()
            shown.append(begun(position))

    def begun(position: int) -> bytes:
        source = now(fetching)
        assert source is not None
        content = b""
        while len(content) < position:
            content += now(begin(source.read()))
        assert not begin(source.read()).called
        return content

    world.bucket.before_read = stall
    world.work()
    assert shown == [LARGE[: positions[steps]]]
    source = world.fetch()
    assert world.read_all(source) == LARGE
    world.take()
    world.take()
    assert len(world.bucket.opened) == 1


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_readers_that_keep_up_do_not_read_the_file(world: World, file_reads: list[int]) -> None:
    world.bucket.objects[PATH] = LARGE[: 1 << 20]
    sources = [world.fetch() for _ in range(3)]
    for source in sources:
        assert world.read_all(source) == LARGE[: 1 << 20]
    assert file_reads == []


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_a_reader_in_the_middle_of_a_step_goes_on_from_there(world: World, file_reads: list[int]) -> None:
    world.bucket.objects[PATH] = LARGE[: 1 << 20]
    fetching = world.begin_fetch()
    sources: list[ChunkSource] = []
    content: list[bytes] = []

    def read_once(position: int) -> None:
        if position > CHUNK_BYTES and not sources:
            world.wait_for_a_look()
            world.wait_for_a_look()
            source = now(fetching)
            assert source is not None
            sources.append(source)
            content.append(now(begin(source.read())))

    world.bucket.before_read = read_once
    world.work()
    assert content[0] + world.read_all(sources[0]) == LARGE[: 1 << 20]
    assert file_reads == [CHUNK_BYTES]


def test_readers_that_keep_up_step_by_step_do_not_read_the_file(world: World, file_reads: list[int]) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    content = now(begin(source.read()))
    while len(content) < len(LARGE):
        reading = begin(source.read())
        world.moving.work(1)
        content += now(reading)
    assert content == LARGE
    assert file_reads == []


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_nothing_stays_in_memory_for_readers_that_stall(world: World, file_reads: list[int]) -> None:
    world.bucket.objects[PATH] = LARGE[: 1 << 20]
    source = world.fetch()
    world.wait_for_a_look()
    assert world.read_all(source) == LARGE[: 1 << 20]
    assert sum(file_reads) == 1 << 20


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_nothing_stays_in_memory_for_readers_that_are_left_behind(world: World, file_reads: list[int]) -> None:
    world.bucket.objects[PATH] = LARGE
    assert world.read_all(world.fetch()) == LARGE
    assert sum(file_reads) == len(LARGE)


def test_a_download_that_has_come_to_rest_is_looked_at_no_more(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    stalled = world.fetch()
    world.work()
    world.wait_for_a_look()
    assert world.reactor.getDelayedCalls() == []
    assert world.read_all(stalled) == LARGE


def test_many_downloads_wake_the_reactor_no_more_often_than_one(world: World) -> None:
    paths = [f"local_content/AB/CD/efgh{number}" for number in range(10)]
    world.bucket.objects |= dict.fromkeys(paths, LARGE)
    fetching = [begin(world.downloads.fetch(path)) for path in paths]
    for _ in range(5):
        assert len(world.reactor.getDelayedCalls()) == 1
        world.reactor.advance(1)
    world.work()
    for path, each in zip(paths, fetching, strict=True):
        source = now(each)
        assert source is not None
        source.close()
        world.downloads.paths.end(path)


def test_of_downloads_that_nobody_waits_for_few_move_at_a_time(world: World) -> None:
    paths = [f"local_content/AB/CD/efgh{number}" for number in range(10)]
    world.bucket.objects |= dict.fromkeys(paths, LARGE)
    fetching = [begin(world.downloads.fetch(path)) for path in paths]
    world.opening.work()
    sources = [now(each) for each in fetching]
    assert len(world.moving) == 10
    while world.moving.work(1):
        if all(reader.position > 5 << 19 for reader in world.bucket.readers):
            assert len(world.moving) <= 2
    assert not any(reader.holds_connection for reader in world.bucket.readers)
    for path, source in zip(paths, sources, strict=True):
        assert source is not None
        assert world.read_all(source) == LARGE
        world.downloads.paths.end(path)
        source.close()
    world.work()


def test_an_object_that_is_not_there_is_nothing_to_any_of_them(world: World) -> None:
    fetching = [world.begin_fetch() for _ in range(3)]
    world.work()
    assert [now(each) for each in fetching] == [None] * 3
    assert len(world.bucket.opened) == 1
    world.assert_nothing_is_held()


def test_an_object_that_cannot_be_opened_is_an_error_to_all_of_them_and_the_next_one_asks_anew(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.error = AccessDenied("no", operation="open", key=PATH)
    fetching = [world.begin_fetch() for _ in range(3)]
    world.work()
    for each in fetching:
        with pytest.raises(AccessDenied):
            now(each)
    world.assert_nothing_is_held()
    world.bucket.error = None
    assert world.read_all(world.fetch()) == LARGE


def test_a_small_object_that_breaks_off_is_asked_for_again(world: World) -> None:
    world.bucket.objects[PATH] = SMALL
    world.bucket.breaks_at = [500]
    assert world.read_all(world.fetch()) == SMALL


def test_a_connection_that_breaks_is_taken_up_again_where_it_broke_and_only_in_the_same_object(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [BREAK]
    sources = [world.fetch() for _ in range(3)]
    assert [world.read_all(source) for source in sources] == [LARGE] * 3
    (_, (offset, if_match)) = world.bucket.opened
    assert 0 < offset <= BREAK
    assert if_match == "etag"


def test_content_that_cannot_be_had_is_an_error_to_all_readers_after_what_there_is(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [BREAK] * 10
    sources = [world.fetch() for _ in range(3)]
    for source in sources:
        content = world.read_until_it_fails(source)
        assert content
        assert LARGE.startswith(content)
        world.take()
    world.end(*sources)
    assert not world.file.exists()
    world.assert_nothing_is_held()


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_what_came_with_the_headers_before_an_error_is_not_lost(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [BREAK] * 3
    source = world.fetch()
    content = world.read_until_it_fails(source)
    assert len(content) > BREAK - CHUNK_BYTES
    assert LARGE.startswith(content)
    world.take()
    world.end(source)
    world.assert_nothing_is_held()


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_an_object_that_is_removed_while_it_comes_is_an_error_after_what_there_is(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [BREAK]

    def remove(_position: int) -> None:
        world.bucket.objects.clear()

    world.bucket.before_read = remove
    source = world.fetch()
    content = b""
    with pytest.raises(ObjectNotFound):
        while True:
            content += world.read(source)
    assert len(content) > BREAK - CHUNK_BYTES
    assert LARGE.startswith(content)


def test_readers_that_wait_are_told_at_once_that_the_rest_cannot_be_had(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [100_000] * 10
    sources = [world.fetch() for _ in range(3)]
    for source in sources:
        assert now(begin(source.read())) in LARGE
    readings = [begin(source.read()) for source in sources]
    world.work()
    for reading in readings:
        with pytest.raises(BackendUnavailable):
            now(reading)


def test_a_download_that_failed_is_joined_by_nobody(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [100_000] * 3
    failed = world.fetch()
    world.work()
    assert world.read_all(world.fetch()) == LARGE
    with pytest.raises(BackendUnavailable):
        world.read_all(failed)


def test_a_download_that_nobody_wants_any_more_is_given_up(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    sources = [world.fetch(), world.fetch()]
    world.moving.work(1)
    for source in sources:
        world.take()
        source.close()
    assert world.moving.work() <= 1
    world.work()
    assert not world.file.exists()
    world.assert_nothing_is_held()
    assert world.read_all(world.fetch()) == LARGE


def test_a_download_that_one_of_two_wants_goes_on(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    gone, staying = world.fetch(), world.fetch()
    gone.close()
    assert world.read_all(staying) == LARGE
    assert len(world.bucket.opened) == 1


def test_a_source_that_is_closed_while_it_is_read_is_freed_afterwards(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    reading = begin(source.read())
    source.close()
    source.close()
    world.moving.work(1)
    assert now(reading)
    world.work()
    world.assert_nothing_is_held()


# --- its place in the media store ---


@each_size
def test_a_whole_file_gets_its_place_and_nothing_else_is_left(world: World, content: bytes) -> None:
    world.bucket.objects[PATH] = content
    source = world.fetch()
    world.take()
    world.read_all(source)
    world.end(source)
    assert world.file.read_bytes() == content
    assert world.asked == [(PATH, Digest(len(content), hashlib.sha256(content).hexdigest()))]
    world.assert_nothing_is_held()


@each_size
def test_a_file_is_not_put_there_before_it_is_whole_nor_while_the_path_is_in_use(world: World, content: bytes) -> None:
    world.bucket.objects[PATH] = content
    sources = [world.fetch(), world.fetch()]
    while world.moving.work(1):
        world.background.work()
        assert not world.file.exists()
    world.work()
    world.take()
    world.work()
    assert not world.file.exists()  # the other answer has not been taken
    world.take()
    assert world.file.read_bytes() == content
    assert [world.read_all(source) for source in sources] == [content] * 2
    world.end(*sources)
    world.assert_nothing_is_held()


@each_size
def test_a_file_that_may_not_be_kept_is_gone_after_its_last_reader(world: World, content: bytes) -> None:
    world.bucket.objects[PATH] = content
    world.keeps = False
    sources = [world.fetch(), world.fetch()]
    for source in sources:
        world.take()
        assert world.read_all(source) == content
        world.end(source)
    assert len(world.bucket.opened) == 1
    assert not world.file.exists()
    world.assert_nothing_is_held()


@each_size
def test_a_file_that_all_readers_have_left_when_it_was_whole_still_gets_its_place(world: World, content: bytes) -> None:
    world.bucket.objects[PATH] = content
    source = world.fetch()
    world.moving.work()
    source.close()
    world.take()
    world.work()
    assert world.file.read_bytes() == content
    world.assert_nothing_is_held()


def test_a_file_that_is_there_already_is_left_alone(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    world.file.parent.mkdir(parents=True)
    world.file.write_bytes(b"of another process")
    assert world.read_all(source) == LARGE
    world.end(source)
    assert world.file.read_bytes() == b"of another process"
    world.assert_nothing_is_held()


def test_directories_that_are_pruned_meanwhile_are_made_again(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.work()
    world.file.parent.rmdir()
    world.take()
    world.end(source)
    assert world.file.read_bytes() == LARGE
    world.assert_nothing_is_held()


def test_a_directory_that_nfs_calls_stale_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(file: BinaryIO, name: str, directory: int) -> None:
        if errors:
            raise errors.pop()
        give_name(file, name, directory)

    monkeypatch.setattr("storage_provider.temporary_files.give_name", fail_once)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    assert world.read_all(source) == LARGE
    world.end(source)
    assert world.file.read_bytes() == LARGE
    assert not errors


@pytest.mark.parametrize("copies", [False, True])
def test_a_file_that_needs_its_place_no_more_holds_no_directory(world: World, copies: bool) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.work()
    world.file.parent.mkdir(parents=True, exist_ok=True)
    world.file.write_bytes(LARGE)
    assert world.directories_held
    world.take()
    copying = begin(source.put_in_place()) if copies else None
    world.work()
    if copying is not None:
        now(copying)
    assert world.directories_held == []
    assert world.read_all(source) == LARGE


def test_directories_that_are_pruned_again_and_again_are_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_prepare = TemporaryFile.prepare

    def prepare(file: TemporaryFile, path: str) -> None:
        really_prepare(file, path)
        world.file.parent.rmdir()

    monkeypatch.setattr(TemporaryFile, "prepare", prepare)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    assert world.read_all(source) == LARGE
    world.end(source)
    world.assert_nothing_is_held()


def test_a_file_that_the_background_puts_there_while_synapse_asks_is_taken_away(world: World) -> None:
    # Synapse has seen nothing there, and may open the path for writing: that would empty what others read.
    world.bucket.objects[PATH] = LARGE
    paths = world.downloads.paths
    assert paths._begin_changes([PATH]) == [PATH]
    fetching = world.begin_fetch()
    with world.store.create(PATH) as new:
        new.file.write(LARGE)
    placed = world.store.state(PATH)
    assert not fetching.called
    assert world.bucket.opened == []
    paths._end_changes({PATH: placed})
    world.work()
    assert now(fetching) is not None
    assert not world.file.exists()


def test_a_change_that_puts_nothing_there_only_lets_synapse_wait(world: World) -> None:
    world.bucket.objects[PATH] = SMALL
    paths = world.downloads.paths
    assert paths._begin_changes([PATH]) == [PATH]
    fetching = world.begin_fetch()
    world.work()
    assert not fetching.called
    paths._end_changes({PATH: None})
    world.work()
    source = now(fetching)
    assert source is not None
    assert world.read_all(source) == SMALL


# --- where Synapse makes a copy ---


def begin_copy(world: World, source: ChunkSource) -> Deferred[None]:
    """What the responder does when Synapse has opened the path for writing."""
    world.file.parent.mkdir(parents=True, exist_ok=True)
    world.file.write_bytes(b"")
    world.file.unlink()
    world.take()
    return begin(source.put_in_place())


@each_size
@pytest.mark.parametrize("keeps", [True, False])
def test_a_copy_is_whole_and_in_its_place(world: World, content: bytes, keeps: bool) -> None:
    world.bucket.objects[PATH] = content
    world.keeps = keeps
    source = world.fetch()
    copying = begin_copy(world, source)
    while world.moving.work(1):
        assert not world.file.exists()
    world.work()
    now(copying)
    assert world.file.read_bytes() == content
    world.end(source)
    assert world.file.read_bytes() == content
    world.assert_nothing_is_held()


@each_size
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("moment", ["before", "meanwhile", "when whole", "when placed"])
def test_a_copy_and_a_download_share_one_request_whichever_comes_first(
    world: World, content: bytes, keeps: bool, moment: str
) -> None:
    world.bucket.objects[PATH] = content
    world.keeps = keeps
    reader, copier = world.fetch(), world.fetch()
    if moment == "before":
        copying = begin_copy(world, copier)
        world.take()
    else:
        world.take()
        world.moving.work(None if moment != "meanwhile" else 2)
        if moment == "when placed":
            world.work()
        copying = begin_copy(world, copier)
    world.work()
    now(copying)
    assert world.file.read_bytes() == content
    assert world.read_all(reader) == content
    world.end(reader, copier)
    assert world.file.read_bytes() == content
    assert len(world.bucket.opened) == 1
    world.assert_nothing_is_held()


def test_a_copy_waits_until_the_others_have_taken_their_answers(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    copier, other = world.fetch(), world.fetch()
    copying = begin_copy(world, copier)
    world.work()
    assert not copying.called
    assert not world.file.exists()
    world.take()
    now(copying)
    assert world.file.read_bytes() == LARGE
    world.end(copier, other)


def test_a_copy_that_another_process_has_begun_and_left_is_replaced_by_the_whole(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    copying = begin_copy(world, source)
    world.file.write_bytes(LARGE[:1000])
    world.work()
    now(copying)
    assert world.file.read_bytes() == LARGE


def test_a_copy_that_cannot_take_the_place_of_what_another_process_has_left_is_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.bucket.objects[PATH] = LARGE
    copying = begin_copy(world, world.fetch())
    world.file.write_bytes(b"a part")

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    world.work()
    with pytest.raises(PermissionError):
        now(copying)


def test_a_copy_whose_directory_is_moved_away_is_made_where_synapse_looks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_prepare = TemporaryFile.prepare
    elsewhere = world.store.root / "elsewhere"

    def prepare(file: TemporaryFile, path: str) -> None:
        really_prepare(file, path)
        if not elsewhere.exists():
            world.file.parent.rename(elsewhere)

    monkeypatch.setattr(TemporaryFile, "prepare", prepare)
    world.bucket.objects[PATH] = LARGE
    copying = begin_copy(world, world.fetch())
    world.work()
    now(copying)
    assert elsewhere.exists()
    assert world.file.read_bytes() == LARGE


def test_a_copy_of_what_cannot_be_had_is_an_error_and_no_file(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    world.bucket.breaks_at = [BREAK] * 10
    source = world.fetch()
    copying = begin_copy(world, source)
    world.work()
    with pytest.raises(BackendUnavailable):
        now(copying)
    world.end(source)
    assert not world.file.exists()
    world.assert_nothing_is_held()


# --- a disk that is full ---


@pytest.fixture
def full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.store, "free_space", lambda: (len(LARGE), 1 << 40))


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets every write beyond a number of bytes fail."""

    def fail(beyond: int) -> None:
        write = os.pwrite

        def pwrite(descriptor: int, content: bytes, offset: int) -> int:
            if offset >= beyond:
                raise OSError(28, "No space left on device")
            return write(descriptor, content[: beyond - offset], offset)

        monkeypatch.setattr(os, "pwrite", pwrite)

    return fail


@pytest.mark.usefixtures("full_disk")
def test_where_there_is_no_room_each_reader_gets_the_content_straight_from_the_bucket(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    sources = [world.fetch() for _ in range(2)]
    assert [world.read_all(source) for source in sources] == [LARGE] * 2
    assert len(world.bucket.opened) == 2
    assert world.temporary == []
    world.take()
    world.take()
    world.end(*sources)
    assert not world.file.exists()
    world.assert_nothing_is_held()


@pytest.mark.usefixtures("full_disk")
def test_where_there_is_no_room_a_copy_is_an_error_and_no_file(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    with pytest.raises(OSError, match="no room"):
        now(begin_copy(world, source))
    world.end(source)
    assert not world.file.exists()
    world.assert_nothing_is_held()


def test_where_no_file_can_be_made_a_copy_tells_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> TemporaryFile:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(world.store, "temporary_file", refuse)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    with pytest.raises(PermissionError):
        now(begin_copy(world, source))
    assert world.read_all(source) == LARGE
    world.end(source)
    world.assert_nothing_is_held()


@pytest.fixture
def room_for_one(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the disk have room for one large file, whatever is written."""

    def limit() -> None:
        monkeypatch.setattr(world.store, "free_space", lambda: (len(LARGE) + (16 << 20), 1 << 40))

    limit()
    return limit


def begin_another(world: World) -> ChunkSource:
    world.bucket.objects[OTHER_PATH] = LARGE
    fetching = begin(world.downloads.fetch(OTHER_PATH))
    world.opening.work()
    if not fetching.called:
        world.moving.work(1)
    source = now(fetching)
    assert source is not None
    world.downloads.paths.end(OTHER_PATH)
    return source


@pytest.mark.usefixtures("room_for_one")
def test_the_same_room_is_not_given_to_two_downloads_side_by_side(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    first, second = world.fetch(), begin_another(world)
    assert isinstance(first, DownloadSource)
    assert isinstance(second, BucketSource)
    world.take()
    assert [world.read_all(source) for source in (first, second)] == [LARGE] * 2
    world.end(first, second)


@pytest.mark.parametrize("end", ["whole", "left", "broken", "refused by the disk", "refused by the disk at once"])
def test_the_room_of_a_download_that_has_ended_is_free_for_the_next_one(
    world: World,
    room_for_one: Callable[[], None],
    failing_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    world.bucket.objects[PATH] = LARGE
    if end == "broken":
        world.bucket.breaks_at = [BREAK] * 3
    elif end == "refused by the disk":
        failing_disk(BREAK)
    elif end == "refused by the disk at once":
        failing_disk(0)
    first = world.fetch()
    world.take()
    if end == "left":
        first.close()
    world.work()
    monkeypatch.undo()
    room_for_one()
    second = begin_another(world)
    assert isinstance(second, DownloadSource)
    world.end(first, second)


def test_when_the_disk_takes_no_more_readers_go_on_from_the_bucket_where_they_are(
    world: World, failing_disk: Callable[[int], None]
) -> None:
    failing_disk(BREAK)
    world.bucket.objects[PATH] = LARGE
    sources = [world.fetch() for _ in range(3)]
    begun = world.read(sources[0])
    world.moving.work()
    assert begun + world.read_all(sources[0]) == LARGE
    assert [world.read_all(source) for source in sources[1:]] == [LARGE] * 2
    assert world.bucket.opened[1] == (len(begun), "etag")
    assert not world.file.exists()
    for source in sources:
        world.take()
        world.end(source)
    world.assert_nothing_is_held()


@pytest.mark.usefixtures("all_steps_in_one_turn")
def test_when_the_disk_takes_no_more_while_the_headers_come_the_bucket_is_read_on(
    world: World, failing_disk: Callable[[int], None]
) -> None:
    failing_disk(BREAK)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    assert world.read_all(source) == LARGE
    assert not world.file.exists()
    world.take()
    world.end(source)
    world.assert_nothing_is_held()


def test_when_the_disk_takes_no_more_its_room_and_the_connection_are_free_at_once(
    world: World, failing_disk: Callable[[int], None]
) -> None:
    failing_disk(BREAK)
    world.bucket.objects[PATH] = LARGE
    stalled = world.fetch()
    world.work()
    assert sum(file.stat().st_size for file in world.temporary) == 0
    assert not any(reader.holds_connection for reader in world.bucket.readers)
    assert world.read_all(stalled) == LARGE


def test_when_the_disk_takes_no_more_and_all_have_gone_the_file_is_emptied_before_it_is_closed(
    world: World, failing_disk: Callable[[int], None]
) -> None:
    failing_disk(BREAK)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    world.moving.work()
    source.close()
    # Of two threads of the background, each may be the first one to begin: what is closed must not be needed.
    assert len(world.background) <= 1
    world.work()
    world.assert_nothing_is_held()


def test_when_the_disk_takes_no_more_a_copy_is_an_error_and_no_file(
    world: World, failing_disk: Callable[[int], None]
) -> None:
    failing_disk(BREAK)
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    copying = begin_copy(world, source)
    world.work()
    with pytest.raises(OSError, match="No space left"):
        now(copying)
    world.end(source)
    assert not world.file.exists()
    world.assert_nothing_is_held()


def test_a_small_file_that_the_disk_did_not_take_is_never_put_in_place_short(
    world: World, failing_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.bucket.objects[PATH] = SMALL
    stalled, copier = world.fetch(), world.fetch()
    world.take()
    failing_disk(500)
    world.work()
    monkeypatch.undo()
    # There is room again, and Synapse wants a copy of what is still being read.
    copying = begin_copy(world, copier)
    world.work()
    now(copying)
    assert world.file.read_bytes() == SMALL
    world.end(stalled, copier)
    world.assert_nothing_is_held()


# --- a file that somebody cuts short ---


@pytest.mark.parametrize("left", [0, 100_000])
def test_readers_whose_file_is_cut_short_go_on_from_the_bucket(world: World, left: int) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    begun = world.read(source)
    world.work()
    # It is the file that the readers follow.
    os.truncate(world.file, left)
    assert begun + world.read_all(source) == LARGE
    assert world.bucket.opened[1:] == [(max(left, len(begun)), "etag")]
    world.end(source)
    world.assert_nothing_is_held()


def test_readers_whose_file_is_cut_short_and_whose_bucket_fails_are_told(world: World) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    world.work()
    os.truncate(world.file, 0)
    world.bucket.error = AccessDenied("no", operation="open", key=PATH)
    with pytest.raises(BackendError):
        world.read(source)
    world.end(source)
    world.assert_nothing_is_held()


@pytest.mark.parametrize("end", ["removed", "removed and made anew"])
def test_readers_whose_file_is_removed_go_on_with_it(world: World, end: str) -> None:
    world.bucket.objects[PATH] = LARGE
    source = world.fetch()
    world.take()
    world.work()
    world.file.unlink()
    if end != "removed":
        world.file.write_bytes(b"another one")
    assert world.read_all(source) == LARGE
    assert len(world.bucket.opened) == 1

"""What `serve` measures with: a server with the media in a bucket, and the homeservers that are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.bench import contestant
from tests.bench.contestant import Contestant
from tests.bench.report import say
from tests.bench.served_media import MediaSet, copy_database, insert_rows
from tests.bench.settling import Settling
from tests.provider.fault_proxy import FaultProxy, gets
from tests.servers import S3Server, ServerPool, ServerUnavailable, make_bucket

MIB = 1 << 20


@dataclass(frozen=True)
class Template:
    """A database with one user, the owner of the media in it, and the user's access token."""

    database: Path
    token: str


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    small: int
    """Files of 1 MiB."""
    large: int
    large_bytes: int
    stalled: int
    stalled_bytes: int
    tiny: int
    """Files of 30 KiB."""
    watched_seconds: float
    """How long it is watched how others fare beside stalled readers."""


WHOLE = Sizes(
    small=512, large=32, large_bytes=40 * MIB, stalled=48, stalled_bytes=24 * MIB, tiny=2000, watched_seconds=6
)
QUICK = Sizes(small=64, large=32, large_bytes=8 * MIB, stalled=48, stalled_bytes=4 * MIB, tiny=200, watched_seconds=2)


class ServeSite:
    """The parts are made when they are first asked for."""

    def __init__(self, stack: ExitStack, server: S3Server, directory: Path, sizes: Sizes) -> None:
        self._stack = stack
        self._directory = directory
        self.server = server
        self.sizes = sizes
        self.bucket = make_bucket(server)
        self._small = MediaSet.make(sizes.small, MIB, seed=1)
        self._large = MediaSet.make(sizes.large, sizes.large_bytes, seed=2)
        self._stalled = MediaSet.make(sizes.stalled, sizes.stalled_bytes, seed=3)
        self._tiny = MediaSet.make(sizes.tiny, 30 << 10, seed=4)
        self._files = directory / "files-of-the-control"
        self.settle = stack.enter_context(closing(Settling(directory))).settle

    # --- media: in the bucket and in the control's directory ---

    @cached_property
    def small(self) -> MediaSet:
        return self._stored(self._small)

    @cached_property
    def large(self) -> MediaSet:
        return self._stored(self._large)

    @cached_property
    def stalled(self) -> MediaSet:
        return self._stored(self._stalled)

    @cached_property
    def tiny(self) -> MediaSet:
        return self._stored(self._tiny)

    def _stored(self, media: MediaSet) -> MediaSet:
        say(f"storing {len(media.ids)} files of {media.size / MIB:.2g} MiB")
        media.upload(self.server, self.bucket)
        media.write(self._files)
        return media

    # --- homeservers ---

    @cached_property
    def ours(self) -> Contestant:
        return self._started(self._ours("ours", self.server))

    @cached_property
    def theirs(self) -> Contestant:
        return self._started(contestant.theirs(self._directory / "theirs", self.server, self.bucket))

    @cached_property
    def control(self) -> Contestant:
        return self._started(contestant.control(self._directory / "control", self._files))

    @property
    def all(self) -> list[Contestant]:
        return [self.theirs, self.ours, self.control]

    @contextmanager
    def counted(self, name: str) -> Iterator[tuple[Contestant, RequestCount]]:
        """One more of ours or theirs, whose requests to the bucket are counted on the way."""
        with ExitStack() as stack:
            proxy = stack.enter_context(FaultProxy(self.server.endpoint))
            through = S3Server("proxy", proxy.url, self.server.access_key, self.server.secret_key, self.server.region)
            if name == "ours":
                counted = self._ours("ours-counted", through)
            else:
                counted = contestant.theirs(self._directory / "theirs-counted", through, self.bucket)
            self._start(counted, self._template)
            stack.callback(counted.end)
            yield counted, RequestCount(proxy)

    def restoring(self, backend: str) -> Contestant:
        """One more of ours, which knows the tiny files alone and restores what is missing at each start."""
        directory = self._directory / f"restoring-{backend}"
        return self._started(contestant.ours(directory, self.server, self.bucket, backend), self._tiny_template)

    def _ours(self, name: str, server: S3Server) -> Contestant:
        # Restored files would not be asked for.
        return contestant.ours(self._directory / name, server, self.bucket, "minio", auto_restore=False)

    def _started(self, each: Contestant, template: Template | None = None) -> Contestant:
        self._stack.callback(each.end)
        self._start(each, template or self._template)
        return each

    def _start(self, each: Contestant, template: Template) -> None:
        say(f"starting Synapse: {each.homeserver.directory.name}")
        each.homeserver.token = template.token
        copy_database(template.database, each.homeserver.directory)
        each.restart()

    # --- the database ---

    @cached_property
    def _template(self) -> Template:
        return self._make_template("template", (self._small, self._large, self._stalled, self._tiny))

    @cached_property
    def _tiny_template(self) -> Template:
        return self._make_template("tiny-template", [self._tiny])

    def _make_template(self, name: str, sets: Iterable[MediaSet]) -> Template:
        say("letting Synapse make its database")
        first = contestant.control(self._directory / name, self._files).homeserver
        with first:
            token, user = first.token, first.request("GET", "/_matrix/client/v3/account/whoami").json()["user_id"]
        database = first.directory / "homeserver.db"
        insert_rows(database, user, sets)
        return Template(database, token)

    @property
    def scratch(self) -> Path:
        """A directory for files that come and go."""
        path = self._directory / "scratch"
        path.mkdir(exist_ok=True)
        return path


class RequestCount:
    """Counts what is asked of the bucket about objects."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy

    def forget(self) -> None:
        self._proxy.forget()

    @property
    def of_objects(self) -> int:
        return sum(bool(request.key) for request in self._proxy.requests)

    @property
    def gets(self) -> int:
        return sum(map(gets, self._proxy.requests))


@contextmanager
def open_site(sizes: Sizes) -> Iterator[ServeSite]:
    """A site on MinIO, or on Ceph where that is not on the machine. Raises `ServerUnavailable`."""
    with ExitStack() as stack:
        pool = stack.enter_context(closing(ServerPool()))
        try:
            server = pool.start_s3("minio")
        except ServerUnavailable as error:
            say(f"{error}; it is Ceph instead")
            server = pool.start_s3("ceph")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-")))
        yield ServeSite(stack, server, directory, sizes)

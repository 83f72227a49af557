"""What the commands do: they set the parts up by configuration and options, and tell of the events."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backends import open_backend
from backends.base import Backend
from backends.errors import EXPIRED_CREDENTIALS, AccessDenied, BackendError, EncryptionNotApplied
from backends.selection import choose_backend
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import KINDS, CacheDb, CachedMedia
from storage_provider.candidates import NotOnDisk, OnDisk, candidates, in_batches
from storage_provider.cli_output import Output, Progress, readable_size
from storage_provider.errors import ConfigurationError
from storage_provider.failures import BucketFails, Failed
from storage_provider.media_store import MediaStore
from storage_provider.offload import Deleted, Event, Gone, Kept, Offload, Uploaded
from storage_provider.proofs import Verify
from storage_provider.settings import ProviderSettings
from storage_provider.startup_check import explained, prefix_problem

if TYPE_CHECKING:
    from storage_provider.database import DatabaseArguments
    from storage_provider.homeserver_config import HomeserverConfig
    from storage_provider.synapse_db import SynapseDb

DONE, SOME_FAILED, WRONG_USE, UNREACHABLE = 0, 1, 2, 3
"""Exit codes: all done; some files failed; wrong use or settings; bucket or database out of reach, or interrupted."""

DEFAULT_CONFIG = Path("homeserver.yaml")

_DATABASE_YAML = Path("database.yaml")
_WORKERS = {"minio": 32, "boto3": 16}
_PROOFS = {"etag": "checksum", "put": "our own upload", "read": "reading back", "size": "size alone"}


@dataclass
class Run:
    """What a command that moves files works with."""

    output: Output
    backend: Backend
    store: MediaStore
    settings: ProviderSettings
    config: HomeserverConfig | None
    workers: int
    bandwidth: Bandwidth
    stop: threading.Event
    ends_at: float | None = None
    """The moment of the monotonic clock after which nothing new is begun."""

    @classmethod
    def prepare(
        cls,
        stack: ExitStack,
        output: Output,
        base_path: Path | None,
        bucket: str | None,
        config_paths: Sequence[Path],
        options: Mapping[str, Any],
    ) -> Run:
        """Settings from homeserver.yaml where it is named or needed, and from the options, which override it.

        With both positionals and no configuration named, nothing but the options and the environment counts, as ever.
        """
        config = None
        if config_paths or bucket is None:
            config = load_config(config_paths or (DEFAULT_CONFIG,))
        settings = _bucket_settings(config, bucket, options)
        name, _ = choose_backend(settings)
        workers = options["workers"] or _WORKERS.get(name, 16)
        settings = settings.model_copy(update={"max_pool_connections": max(workers + 8, 16)})
        store = base_path or (config.media_store_path if config else None)
        if store is None:
            raise click.UsageError("BASE_PATH is not given, and homeserver.yaml does not name a media_store_path.")
        backend = open_backend(settings)
        stack.callback(backend.close)
        stop = threading.Event()
        _stop_on_signals(stack, stop)
        return cls(
            Output(progress=output.progress, as_json=options["as_json"]),
            backend,
            open_store(store),
            settings,
            config,
            workers,
            Bandwidth(options["max_bandwidth"], stop),
            stop,
        )

    def require_config(self) -> HomeserverConfig:
        if self.config is None:
            raise click.UsageError("Give --homeserver-config-path.")
        return self.config

    def warn_where_synapse_reads_elsewhere(self, provider_index: int | None) -> None:
        """Tell, before files are deleted, that Synapse would not find what options have put into another place."""
        if self.config is None or not self.config.providers:
            return
        read, written = (_place(each) for each in (self.config.provider(provider_index), self.settings))
        if read != written:
            self.output.complain(
                f"Synapse is configured to read keys that start with {read!r}, and this run makes keys that start with "
                f"{written!r}: Synapse will not find the media that is deleted here."
            )

    def must_end(self) -> bool:
        """Whether nothing new may be begun."""
        return self.stop.is_set() or (self.ends_at is not None and time.monotonic() >= self.ends_at)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """What keeps other runs that delete or restore out of the store. Raises `Locked`."""
        return self.store.lock("s3_media_upload")

    def check_bucket(self) -> None:
        """Find out early what would fail for every file."""
        try:
            self._check_listing()
            self.backend.check_encryption()
        except EncryptionNotApplied as error:
            raise ConfigurationError(explained(self.settings, error)) from error
        except BackendError as error:
            raise BucketFails(explained(self.settings, error)) from error

    def _check_listing(self) -> None:
        try:
            self.backend.check()
        except AccessDenied as error:
            if error.status is None or error.code in EXPIRED_CREDENTIALS:
                raise
            # Perhaps only listing is refused: then objects are asked for one by one.
            self.output.complain(f"The bucket cannot be listed, which makes this slow: {error.reason}")
        else:
            self._check_prefix()

    def _check_prefix(self) -> None:
        """Raise `ConfigurationError` where the media stands under another spelling of the configured prefix."""
        with contextlib.suppress(AccessDenied):
            problem = prefix_problem(self.settings)
            if problem is not None and problem.hides_media:
                raise ConfigurationError(problem.text)
            if problem is not None:
                self.output.complain(problem.text)


def _place(settings: ProviderSettings) -> str:
    return f"{settings.bucket}/{settings.key_prefix}"


def _bucket_settings(
    config: HomeserverConfig | None, bucket: str | None, options: Mapping[str, Any]
) -> ProviderSettings:
    given: dict[str, Any] = {}
    if config is not None and (config.providers or bucket is None):
        given = config.provider(options["provider_index"]).model_dump(exclude_unset=True)
    if bucket is not None:
        given["bucket"] = bucket
    for name in ("backend", "endpoint_url", "region_name", "storage_class"):
        if options[name] is not None:
            given[name] = options[name]
    if options["prefix"] is not None:
        given |= {"prefix": options["prefix"], "raw_prefix": bool(options["prefix"])}
    if options["sse_customer_key"] is not None and options["sse_customer_key_path"] is not None:
        raise click.UsageError("Give either --sse-customer-key or --sse-customer-key-path.")
    for name in ("sse_customer_key", "sse_customer_key_path"):
        if options[name] is not None:
            given.pop("sse_customer_key", None)
            given.pop("sse_customer_key_path", None)
            # Whoever names the key here has always been free to use a server without TLS.
            given |= {name: options[name], "allow_insecure_sse": True}
            given["sse_customer_algo"] = options["sse_customer_algo"] or "AES256"
    return ProviderSettings.parse(given)


def open_store(path: Path) -> MediaStore:
    """The media store. Raises `MediaStoreError` where there is none."""
    store = MediaStore(path)
    store.check()
    return store


def load_config(paths: Sequence[Path]) -> HomeserverConfig:
    """Synapse's configuration. Raises `ConfigurationError`."""
    # Slow to load, and not needed by those who name everything.
    from storage_provider import homeserver_config

    return homeserver_config.load(paths)


def load_database_yaml(path: Path) -> DatabaseArguments:
    """The database that a database.yaml names. Raises `ConfigurationError`."""
    from storage_provider import homeserver_config

    return homeserver_config.load_database_yaml(path)


def connect(arguments: DatabaseArguments) -> SynapseDb:
    """Synapse's database. Raises `SynapseDbError`."""
    from storage_provider import synapse_db

    return synapse_db.connect(arguments)


def old_database(config_paths: Sequence[Path]) -> DatabaseArguments:
    """The database as `update-db` has always looked for it: database.yaml here, else homeserver.yaml."""
    if _DATABASE_YAML.is_file():
        return load_database_yaml(_DATABASE_YAML)
    return load_config(config_paths or (DEFAULT_CONFIG,)).database


def database_of_upload(run: Run, cache: CacheDb, config_paths: Sequence[Path]) -> DatabaseArguments | None:
    """The database that says which media is unused: from the configuration, or from where update-db had it."""
    if config_paths and run.config is not None:
        return run.config.database
    if _DATABASE_YAML.is_file():
        return load_database_yaml(_DATABASE_YAML)
    if DEFAULT_CONFIG.is_file():
        return load_config((DEFAULT_CONFIG,)).database
    if remembered := cache.config_paths:
        return load_config(remembered).database
    return None


def update(
    output: Output,
    cache: CacheDb,
    duration: timedelta,
    arguments: DatabaseArguments,
    config_paths: Sequence[Path],
    must_end: Callable[[], bool] = lambda: False,
) -> None:
    """Bring cache.db up to date with Synapse's database."""
    from storage_provider.updating import update

    before = datetime.now() - duration
    unused_before = int(before.timestamp() * 1000)
    output.line("Syncing files that haven't been accessed since:", before.isoformat(" "))
    with connect(arguments) as database:

        def unused() -> Generator[CachedMedia, None, None]:
            for kind in KINDS:
                output.line("  Syncing", kind, "media")
                yield from database.unused_before(unused_before, kind)

        with contextlib.closing(unused()) as rows:
            added = update(cache, database, rows, must_end)
    cache.unused_before = unused_before
    cache.config_paths = tuple(path.resolve() for path in config_paths)
    output.line("Synced", added, "new rows")


def check_deleted(output: Output, cache: CacheDb, store: MediaStore) -> int:
    """Bring cache.db up to date with what is on disk; returns the exit code."""
    total = _count_undeleted(cache, store)
    if not output.progress:
        output.line("Checking on ", total, " undeleted files")
    back = deleted = failed = 0
    with output.bar(total) as bar:
        for entries in in_batches(candidates(store, cache), 1000):
            gone = [entry.row for entry in entries if isinstance(entry, NotOnDisk)]
            cache.mark_deleted(gone)
            deleted += len(gone)
            back += sum(1 for entry in entries if isinstance(entry, OnDisk) and entry.is_back)
            for entry in entries:
                if isinstance(entry, Failed):
                    failed += 1
                    output.complain(f"failed: {entry.path}: {entry.reason}")
            bar.advance(len(entries))
    if back:
        output.complain(f"{back} media that had been deleted are on disk again")
    output.line("Updated", deleted, "as deleted")
    return SOME_FAILED if failed else DONE


def _count_undeleted(cache: CacheDb, store: MediaStore) -> int:
    """The media that cache.db takes to be on disk. Raises `MediaStoreError` where all of it seems to be gone at once."""
    total = cache.count_undeleted()
    if total:
        store.check_is_mounted()
    return total


def offload(
    run: Run,
    cache: CacheDb,
    database: SynapseDb | None,
    *,
    delete: bool,
    verify: Verify,
    limit: int | None = None,
) -> int:
    """Send and delete; returns the exit code."""
    total = _count_undeleted(cache, run.store)
    run.check_bucket()
    if not run.output.progress:
        run.output.line("Uploading ", total, " files")
    job = Offload(
        backend=run.backend,
        store=run.store,
        cache=cache,
        database=database,
        bandwidth=run.bandwidth,
        stop=run.stop,
        workers=run.workers,
        delete=delete,
        verify=verify,
        unused_before=cache.unused_before,
        limit=limit,
        ends_at=run.ends_at,
    )
    summary = _Summary(run.output, total)
    try:
        with run.output.bar(total) as bar:
            for event in job.run():
                summary.add(event, bar)
    finally:
        summary.tell()
    if run.stop.is_set():
        run.output.complain("Interrupted; what was begun is finished, the next run goes on.")
        return UNREACHABLE
    return SOME_FAILED if summary.failed else DONE


class _Summary:
    """What a run has done, in numbers; what needs an operator is told at once."""

    def __init__(self, output: Output, media: int) -> None:
        self._output = output
        self.media = media
        self.uploaded_media = self.uploaded_files = self.uploaded_bytes = self.replaced = 0
        self.deleted_media = self.deleted_files = self.deleted_bytes = 0
        self.kept = self.failed = 0
        self.proofs: dict[str, int] = {}

    def add(self, event: Event, bar: Progress) -> None:
        if isinstance(event, Uploaded):
            self._add_uploaded(event)
            bar.count_file(event.size)
        elif isinstance(event, Deleted):
            self.deleted_files += 1
            self.deleted_bytes += event.size
            self.proofs[event.proof] = self.proofs.get(event.proof, 0) + 1
        elif isinstance(event, Kept):
            self.kept += 1
        elif isinstance(event, Failed):
            self.failed += 1
            self._output.complain(f"failed: {event.path}: {event.reason}")
        elif isinstance(event, Gone):
            bar.advance(event.media)
        else:
            self.uploaded_media += event.uploaded_files > 0
            self.deleted_media += event.deleted_files > 0
            if event.is_back:
                self.media += 1
                bar.expect_more(1)
            bar.advance(1)

    def _add_uploaded(self, event: Uploaded) -> None:
        self.uploaded_files += 1
        self.uploaded_bytes += event.size
        if event.replaced:
            self.replaced += 1
            self._output.complain(
                f"replaced: {event.path}: the object was not the file, which is right by the database"
            )

    def tell(self) -> None:
        line = self._output.line
        line("Uploaded", self.uploaded_media, "media out of", self.media)
        line("Uploaded", self.uploaded_files, "files")
        line("Uploaded", readable_size(self.uploaded_bytes))
        line("Deleted", self.deleted_media, "media")
        line("Deleted", self.deleted_files, "files")
        line("Deleted", readable_size(self.deleted_bytes))
        if self.proofs:
            proofs = ", ".join(f"{count} by {_PROOFS[proof]}" for proof, count in sorted(self.proofs.items()))
            line("Proved before deletion:", proofs)
        if self.kept:
            line("Kept", self.kept, "files that are in use again or changed")
        if self.failed:
            line("Failed", self.failed, "files")
        self._output.result(
            {
                "media": self.media,
                "uploaded_media": self.uploaded_media,
                "uploaded_files": self.uploaded_files,
                "uploaded_bytes": self.uploaded_bytes,
                "replaced": self.replaced,
                "deleted_media": self.deleted_media,
                "deleted_files": self.deleted_files,
                "deleted_bytes": self.deleted_bytes,
                "kept": self.kept,
                "failed": self.failed,
                "proofs": self.proofs,
            }
        )


def restore(run: Run, database: SynapseDb, since: timedelta | None, origin: str | None) -> int:
    """Fetch what is missing; returns the exit code."""
    from storage_provider import restoring

    run.check_bucket()
    used_since = None if since is None else int((time.time() - since.total_seconds()) * 1000)
    _, disk_bytes = run.store.free_space()
    job = restoring.Restore(
        backend=run.backend,
        store=run.store,
        database=database,
        bandwidth=run.bandwidth,
        stop=run.stop,
        workers=run.workers,
        used_since=used_since,
        origin=origin,
        min_free=restoring.bytes_to_leave(run.settings, disk_bytes),
    )
    restored = size = missing = failed = 0
    with run.output.bar(None, "files") as bar:
        for event in job.run():
            if isinstance(event, restoring.Restored):
                restored += 1
                size += event.size
                bar.count_file(event.size)
                bar.advance(1)
            elif isinstance(event, restoring.Missing):
                missing += 1
                run.output.complain(f"not in the bucket: {event.path}")
            else:
                failed += 1
                run.output.complain(f"failed: {event.path}: {event.reason}")
    run.output.line("Restored", restored, "files")
    run.output.line("Restored", readable_size(size))
    run.output.line("Missing", missing, "files")
    run.output.line("Failed", failed, "files")
    run.output.result({"restored_files": restored, "restored_bytes": size, "missing": missing, "failed": failed})
    if run.stop.is_set():
        run.output.complain("Interrupted; the next run goes on.")
        return UNREACHABLE
    return SOME_FAILED if missing or failed else DONE


def _stop_on_signals(stack: ExitStack, stop: threading.Event) -> None:
    """Let SIGTERM and the first Ctrl-C finish what is in flight; a second Ctrl-C ends at once."""

    def ask_to_stop(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.signal(number, ask_to_stop)
        stack.callback(signal.signal, number, previous)

"""The command line `s3_media_upload`: options, progress, exit codes, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import click
import humanize
from tqdm import tqdm

from backends import open_backend
from backends.base import Backend
from backends.errors import EXPIRED_CREDENTIALS, AccessDenied, BackendError, EncryptionNotApplied, SettingsError
from backends.selection import choose_backend
from backends.settings import parse_size
from storage_provider import homeserver_config, offload, restoring
from storage_provider.cache_db import CacheDb, CacheDbError, Kind
from storage_provider.homeserver_config import ConfigurationError, HomeserverConfig
from storage_provider.media_store import (
    Locked,
    MediaStore,
    MediaStoreError,
    UnsafePath,
    content_path,
    thumbnail_directory,
)
from storage_provider.settings import ProviderSettings
from storage_provider.synapse_db import DatabaseArguments, SynapseDb, SynapseDbError, connect
from storage_provider.transfers import Bandwidth, BucketFails, Failed, Verify

_Command = TypeVar("_Command", bound=Callable[..., Any])

DONE, SOME_FAILED, WRONG_USE, UNREACHABLE = 0, 1, 2, 3
"""Exit codes: all done; some files failed; wrong use or settings; bucket or database out of reach, or interrupted."""

_WORKERS = {"minio": 32, "boto3": 16}
_DEFAULT_CONFIG = Path("homeserver.yaml")
_DATABASE_YAML = Path("database.yaml")
_DAYS = {"d": 1, "m": 30, "y": 365}
_SECONDS = {"s": 1, "h": 3600}


class DurationType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A time span as this command has always taken it: `m` is a month of 30 days."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if not number.isdecimal() or unit not in {**_DAYS, **_SECONDS}:
            self.fail(
                f"{value!r} is not a duration: give a whole number and s, h, d, m (months) or y, such as 2m", param, ctx
            )
        try:
            duration = timedelta(seconds=int(number) * (_SECONDS.get(unit) or 86_400 * _DAYS[unit]))
            # It is counted back from now, to a year that there has been.
            (datetime.now() - duration).timestamp()
        except (OverflowError, ValueError):
            self.fail(f"{value!r} is too long ago", param, ctx)
        return duration


class SizeType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes, such as 512K, 8M or 20G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(size, int) or size <= 0:
            self.fail("must be more than nothing", param, ctx)
        return size


_KINDS: tuple[Kind, ...] = ("local", "remote")

DURATION, SIZE = DurationType(), SizeType()


@dataclass(frozen=True)
class Output:
    """How much to tell, and in which form."""

    progress: bool
    as_json: bool = False

    def line(self, *words: object) -> None:
        """A result, for people."""
        if not self.as_json:
            print(*words, flush=True)

    def result(self, values: Mapping[str, object]) -> None:
        """The results, for machines."""
        if self.as_json:
            print(json.dumps(values), flush=True)

    @contextlib.contextmanager
    def bar(self, total: int | None, unit: str = "media") -> Iterator[tqdm[NoReturn]]:
        """A progress bar on a terminal; nothing elsewhere."""
        hidden = not self.progress or not sys.stderr.isatty()
        with tqdm(total=total, unit=f" {unit}", disable=hidden, file=sys.stderr, dynamic_ncols=True) as bar:
            yield bar


def complain(text: str) -> None:
    """Tell what went wrong, without spoiling the progress bar."""
    tqdm.write(text, file=sys.stderr)


def _together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_config_options = _together(
    click.option(
        "--homeserver-config-path",
        "config_paths",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Synapse's configuration; may be given several times, as to Synapse.  [default: homeserver.yaml]",
    ),
    click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True),
)
_bucket_options = _together(
    click.option("--provider-index", type=click.IntRange(0), help="Which of several S3 providers, from 0."),
    click.option("--backend", help="minio or boto3."),
    click.option("--prefix", help="What the keys start with; nothing is put between it and the path."),
    click.option("--endpoint-url", help="The address of the S3 service."),
    click.option("--storage-class", help="For new objects."),
    click.option("--sse-customer-key", help="Encryption key (SSE-C); others can see it in the list of processes."),
    click.option("--sse-customer-key-path", type=click.Path(path_type=Path), help="A file with the encryption key."),
    click.option(
        "--sse-customer-algo", "--sse-customer-algorithm", default="AES256", show_default=True, help="For SSE-C."
    ),
    click.option("--workers", type=click.IntRange(1, 256), help="Transfers at a time.  [default: minio 32, boto3 16]"),
    click.option("--max-bandwidth", type=SIZE, help="Bytes a second, such as 20M."),
    click.option("--json", "as_json", is_flag=True, help="Results as JSON."),
)
_delete_options = _together(
    click.option("--delete", is_flag=True, help="Remove files from the disk that are proved to be in the bucket."),
    click.option(
        "--verify",
        type=click.Choice([choice.value for choice in Verify]),
        default=Verify.PROOF.value,
        show_default=True,
        help="How to prove it: by checksum where the server tells one and else by reading back, "
        "always by reading back (full), or by the size alone.",
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.option("--no-progress", is_flag=True, help="Do not show progress bars.")
@click.pass_context
def main(context: click.Context, no_progress: bool) -> None:
    """Moves the media of a Synapse homeserver into a bucket, and frees the disk."""
    context.obj = Output(progress=not no_progress)


@main.command("update-db")
@click.argument("duration", type=DURATION)
@_config_options
@click.pass_obj
def update_db(output: Output, duration: timedelta, config_paths: tuple[Path, ...], cache_db: Path) -> None:
    """Note in cache.db what has not been accessed for DURATION (such as 12h, 30d, 2m for two months, 1y)."""
    with _guarded(), CacheDb(cache_db) as cache:
        _update(output, cache, duration, _old_database(config_paths), config_paths)


@main.command("check-deleted")
@click.argument("base_path", type=click.Path(path_type=Path))
@click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True)
@click.pass_obj
def check_deleted(output: Output, base_path: Path, cache_db: Path) -> None:
    """Compare cache.db with the media store at BASE_PATH."""
    with _guarded(), CacheDb(cache_db) as cache:
        _check_deleted(output, cache, _open_store(base_path))


@main.command("update")
@click.argument("base_path", type=click.Path(path_type=Path))
@click.argument("duration", type=DURATION)
@_config_options
@click.pass_obj
def update(
    output: Output, base_path: Path, duration: timedelta, config_paths: tuple[Path, ...], cache_db: Path
) -> None:
    """Do update-db and check-deleted."""
    with _guarded(), CacheDb(cache_db) as cache:
        _update(output, cache, duration, _old_database(config_paths), config_paths)
        _check_deleted(output, cache, _open_store(base_path))


@main.command("write")
@click.argument("out", type=click.File("w", encoding="UTF-8", lazy=False), default="-")
@click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True)
def write(out: IO[str], cache_db: Path) -> None:
    """Write the paths of media that may still be on disk to OUT (or to the terminal)."""
    status = DONE
    with _guarded(), CacheDb(cache_db) as cache:
        for kind in _KINDS:
            for row in cache.undeleted(kind):
                try:
                    print(content_path(row.media), thumbnail_directory(row.media) + "/", sep="\n", file=out)
                except UnsafePath as error:
                    complain(f"left out: {error}")
                    status = SOME_FAILED
        # click hides what goes wrong when it closes the file.
        out.flush()
    sys.exit(status)


@main.command("upload")
@click.argument("base_path", type=click.Path(path_type=Path), required=False)
@click.argument("bucket", required=False)
@_config_options
@_bucket_options
@_delete_options
@click.pass_obj
def upload(
    output: Output,
    /,
    base_path: Path | None,
    bucket: str | None,
    config_paths: tuple[Path, ...],
    cache_db: Path,
    delete: bool,
    verify: str,
    **options: Any,
) -> None:
    """Send the media that cache.db names from the media store at BASE_PATH to BUCKET.

    Both are read from homeserver.yaml when they are left out.
    """
    if (base_path is None) != (bucket is None):
        raise click.UsageError("Give BASE_PATH and BUCKET, or neither to take both from homeserver.yaml.")
    with _guarded(), ExitStack() as stack:
        run = _Run.prepare(stack, output, base_path, bucket, config_paths, options)
        cache = stack.enter_context(CacheDb(cache_db))
        offload.find_again(run.store, cache)
        database = _upload_database(stack, run, cache, config_paths) if delete or run.config else None
        if delete and database is None:
            raise click.UsageError(
                "--delete asks Synapse's database whether media is still unused, but there is no database.yaml or "
                "homeserver.yaml here: give --homeserver-config-path."
            )
        sys.exit(_offload(run, cache, database, delete=delete, verify=Verify(verify)))


@main.command("sync")
@click.option(
    "--older-than", type=DURATION, default="2m", show_default=True, help="Only media not accessed for so long."
)
@click.option("--time-budget", type=DURATION, help="Begin nothing new after so long, such as 600s.")
@click.option("--limit", type=click.IntRange(1), help="Send or remove at most so many media.")
@_config_options
@_bucket_options
@_delete_options
@click.pass_obj
def sync(
    output: Output,
    /,
    older_than: timedelta,
    time_budget: timedelta | None,
    limit: int | None,
    config_paths: tuple[Path, ...],
    cache_db: Path,
    delete: bool,
    verify: str,
    **options: Any,
) -> None:
    """Do update, upload and (with --delete) the verified deletion in one go; everything is read from homeserver.yaml."""
    started = time.monotonic()
    with _guarded(), ExitStack() as stack:
        run = _Run.prepare(stack, output, None, None, config_paths or (_DEFAULT_CONFIG,), options)
        stack.enter_context(run.store.lock("s3_media_upload"))
        cache = stack.enter_context(CacheDb(cache_db))
        arguments = run.require_config().database
        _update(run.output, cache, older_than, arguments, config_paths)
        _check_deleted(run.output, cache, run.store)
        database = stack.enter_context(connect(arguments))
        ends_at = None if time_budget is None else started + time_budget.total_seconds()
        sys.exit(_offload(run, cache, database, delete=delete, verify=Verify(verify), limit=limit, ends_at=ends_at))


@main.command("restore")
@click.argument("base_path", type=click.Path(path_type=Path), required=False)
@click.option("--since", type=DURATION, help="Only media that was used within this time, such as 7d.")
@click.option("--all", "everything", is_flag=True, help="All media.")
@click.option("--origin", help="Only media of this homeserver.")
@_config_options
@_bucket_options
@click.pass_obj
def restore(
    output: Output,
    /,
    base_path: Path | None,
    since: timedelta | None,
    everything: bool,
    origin: str | None,
    config_paths: tuple[Path, ...],
    cache_db: Path,
    **options: Any,
) -> None:
    """Fetch media that Synapse's database knows back into the media store at BASE_PATH."""
    if since is None and origin is None and not everything:
        raise click.UsageError("Say what to restore: --since 7d, --all or --origin NAME.")
    if since is not None and everything:
        raise click.UsageError("Give either --since or --all.")
    with _guarded(), ExitStack() as stack:
        run = _Run.prepare(stack, output, base_path, None, config_paths or (_DEFAULT_CONFIG,), options)
        database = stack.enter_context(connect(run.require_config().database))
        sys.exit(_restore(run, database, since, origin))


@dataclass(frozen=True)
class _Run:
    """What a command that moves files works with."""

    output: Output
    backend: Backend
    store: MediaStore
    settings: ProviderSettings
    config: HomeserverConfig | None
    workers: int
    bandwidth: Bandwidth
    stop: threading.Event

    @classmethod
    def prepare(
        cls,
        stack: ExitStack,
        output: Output,
        base_path: Path | None,
        bucket: str | None,
        config_paths: Sequence[Path],
        options: Mapping[str, Any],
    ) -> _Run:
        """Settings from homeserver.yaml where it is named or needed, and from the options, which override it.

        With both positionals and no configuration named, nothing but the options and the environment counts, as ever.
        """
        config = None
        if config_paths or bucket is None:
            config = homeserver_config.load(config_paths or (_DEFAULT_CONFIG,))
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
            Output(output.progress, options["as_json"]),
            backend,
            _open_store(store),
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

    def check_bucket(self) -> None:
        """Find out early what would fail for every file."""
        try:
            self.backend.check()
        except AccessDenied as error:
            if error.status is None or error.code in EXPIRED_CREDENTIALS:
                raise
            # Perhaps only listing is refused: then objects are asked for one by one.
            complain(f"The bucket cannot be listed, which makes this slow: {error.reason}")
        self.backend.check_encryption()


def _bucket_settings(
    config: HomeserverConfig | None, bucket: str | None, options: Mapping[str, Any]
) -> ProviderSettings:
    given: dict[str, Any] = {}
    if config is not None and (config.providers or bucket is None):
        given = config.provider(options["provider_index"]).model_dump(exclude_unset=True)
    if bucket is not None:
        given["bucket"] = bucket
    for name in ("backend", "endpoint_url", "storage_class"):
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


def _open_store(path: Path) -> MediaStore:
    store = MediaStore(path)
    store.check()
    return store


def _old_database(config_paths: Sequence[Path]) -> DatabaseArguments:
    """The database as `update-db` has always looked for it: database.yaml here, else homeserver.yaml."""
    if _DATABASE_YAML.is_file():
        return homeserver_config.load_database_yaml(_DATABASE_YAML)
    return homeserver_config.load(config_paths or (_DEFAULT_CONFIG,)).database


def _upload_database(stack: ExitStack, run: _Run, cache: CacheDb, config_paths: Sequence[Path]) -> SynapseDb | None:
    """The database that says which media is unused: from the configuration, or from where update-db had it."""
    arguments = None
    if config_paths and run.config is not None:
        arguments = run.config.database
    elif _DATABASE_YAML.is_file():
        arguments = homeserver_config.load_database_yaml(_DATABASE_YAML)
    elif _DEFAULT_CONFIG.is_file():
        arguments = homeserver_config.load((_DEFAULT_CONFIG,)).database
    elif remembered := cache.config_paths:
        arguments = homeserver_config.load(remembered).database
    return None if arguments is None else stack.enter_context(connect(arguments))


def _update(
    output: Output,
    cache: CacheDb,
    duration: timedelta,
    arguments: DatabaseArguments,
    config_paths: Sequence[Path],
) -> None:
    before = datetime.now() - duration
    unused_before = int(before.timestamp() * 1000)
    output.line("Syncing files that haven't been accessed since:", before.isoformat(" "))
    with connect(arguments) as database:
        added = 0
        for kind in _KINDS:
            output.line("  Syncing", kind, "media")
            added += cache.add(database.unused_before(unused_before, kind))
        offload.forget_absent(cache, database)
    cache.unused_before = unused_before
    cache.config_paths = tuple(path.resolve() for path in config_paths)
    output.line("Synced", added, "new rows")


def _check_deleted(output: Output, cache: CacheDb, store: MediaStore) -> None:
    found = offload.find_again(store, cache)
    if found:
        complain(f"{found} media that had been deleted are on disk again")
    total = cache.count_undeleted()
    if not output.progress:
        output.line("Checking on ", total, " undeleted files")
    deleted = 0
    with output.bar(total) as bar:
        for rows in offload.undeleted_in_batches(cache):
            gone = [row for row in rows if not offload.has_files(store, row)]
            cache.mark_deleted(gone)
            deleted += len(gone)
            bar.update(len(rows))
    output.line("Updated", deleted, "as deleted")


def _offload(
    run: _Run,
    cache: CacheDb,
    database: SynapseDb | None,
    *,
    delete: bool,
    verify: Verify,
    limit: int | None = None,
    ends_at: float | None = None,
) -> int:
    run.check_bucket()
    total = cache.count_undeleted()
    if not run.output.progress:
        run.output.line("Uploading ", total, " files")
    job = offload.Offload(
        backend=run.backend,
        store=run.store,
        cache=cache,
        database=database,
        bandwidth=run.bandwidth,
        stop=run.stop,
        workers=run.workers,
        delete=delete,
        verify=verify,
        unused_before=cache.unused_before or int(time.time() * 1000),
        limit=limit,
        ends_at=ends_at,
    )
    summary = _Summary()
    try:
        with run.output.bar(total) as bar:
            for event in job.run():
                summary.add(event)
                if isinstance(event, Failed):
                    complain(f"failed: {event.path}: {event.reason}")
                elif isinstance(event, offload.Uploaded):
                    bar.set_postfix_str(humanize.naturalsize(summary.uploaded_bytes, gnu=True), refresh=False)
                    if event.replaced:
                        complain(f"replaced: {event.path}: the object was not the file, which is right by the database")
                elif isinstance(event, offload.MediaDone):
                    bar.update()
    finally:
        summary.tell(run.output, total)
    if run.stop.is_set():
        complain("Interrupted; what was begun is finished, the next run goes on.")
        return UNREACHABLE
    return SOME_FAILED if summary.failed else DONE


class _Summary:
    """What a run has done, in numbers."""

    def __init__(self) -> None:
        self.uploaded_media = self.uploaded_files = self.uploaded_bytes = self.replaced = 0
        self.deleted_media = self.deleted_files = self.deleted_bytes = 0
        self.kept = self.failed = 0
        self.proofs: dict[str, int] = {}

    def add(self, event: offload.Event) -> None:
        if isinstance(event, offload.Uploaded):
            self.uploaded_files += 1
            self.uploaded_bytes += event.size
            self.replaced += event.replaced
        elif isinstance(event, offload.Deleted):
            self.deleted_files += 1
            self.deleted_bytes += event.size
            self.proofs[event.proof] = self.proofs.get(event.proof, 0) + 1
        elif isinstance(event, offload.MediaDone):
            self.uploaded_media += event.uploaded_files > 0
            self.deleted_media += event.deleted_files > 0
        elif isinstance(event, Failed):
            self.failed += 1
        else:
            self.kept += 1

    def tell(self, output: Output, total: int) -> None:
        output.line("Uploaded", self.uploaded_media, "media out of", total)
        output.line("Uploaded", self.uploaded_files, "files")
        output.line("Uploaded", humanize.naturalsize(self.uploaded_bytes, gnu=True))
        output.line("Deleted", self.deleted_media, "media")
        output.line("Deleted", self.deleted_files, "files")
        output.line("Deleted", humanize.naturalsize(self.deleted_bytes, gnu=True))
        if self.proofs:
            proofs = ", ".join(f"{count} by {_PROOFS[proof]}" for proof, count in sorted(self.proofs.items()))
            output.line("Proved before deletion:", proofs)
        if self.kept:
            output.line("Kept", self.kept, "files that are in use again or changed")
        if self.failed:
            output.line("Failed", self.failed, "files")
        output.result({"media": total, **vars(self)})


_PROOFS = {"etag": "checksum", "put": "our own upload", "read": "reading back", "size": "size alone"}


def _restore(run: _Run, database: SynapseDb, since: timedelta | None, origin: str | None) -> int:
    run.check_bucket()
    used_since = None if since is None else int((time.time() - since.total_seconds()) * 1000)
    job = restoring.Restore(
        backend=run.backend,
        store=run.store,
        database=database,
        bandwidth=run.bandwidth,
        stop=run.stop,
        workers=run.workers,
        used_since=used_since,
        origin=origin,
        min_free=restoring.bytes_to_leave(run.settings, run.store),
    )
    restored = size = missing = failed = 0
    with run.output.bar(None, "files") as bar:
        for event in job.run():
            if isinstance(event, restoring.Restored):
                restored += 1
                size += event.size
                bar.update()
            elif isinstance(event, restoring.Missing):
                missing += 1
                complain(f"not in the bucket: {event.path}")
            else:
                failed += 1
                complain(f"failed: {event.path}: {event.reason}")
    run.output.line("Restored", restored, "files")
    run.output.line("Restored", humanize.naturalsize(size, gnu=True))
    run.output.line("Missing", missing, "files")
    run.output.line("Failed", failed, "files")
    run.output.result({"restored_files": restored, "restored_bytes": size, "missing": missing, "failed": failed})
    if run.stop.is_set():
        complain("Interrupted; the next run goes on.")
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


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """One line and an exit code for everything that an operator can cause or meet."""
    try:
        yield
    except SettingsError as error:
        _quit(WRONG_USE, f"wrong setting: {error}")
    except Locked:
        _quit(UNREACHABLE, "another run is under way")
    except (ConfigurationError, EncryptionNotApplied, MediaStoreError) as error:
        _quit(WRONG_USE, str(error))
    except (SynapseDbError, CacheDbError, BucketFails, BackendError) as error:
        _quit(UNREACHABLE, str(error))
    except KeyboardInterrupt:
        _quit(UNREACHABLE, "interrupted")
    except BrokenPipeError:
        _quit(SOME_FAILED, "the output was closed")
    except OSError as error:
        _quit(UNREACHABLE, f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _quit(status: int, reason: str) -> NoReturn:
    complain(f"s3_media_upload: {reason}")
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again, and complain, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)

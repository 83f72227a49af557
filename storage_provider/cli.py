"""The command line `s3_media_upload`: its commands and exit codes, and nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from backends.errors import BackendError, EncryptionNotApplied, Misconfigured, SettingsError
from storage_provider import cli_runs, cli_setup
from storage_provider.cache_db import KINDS, CacheDb, CacheDbError
from storage_provider.cli_options import DURATION, bucket_options, config_options, delete_options
from storage_provider.cli_output import Output
from storage_provider.cli_runs import DONE, SOME_FAILED, UNREACHABLE, WRONG_USE
from storage_provider.cli_setup import DEFAULT_CONFIG, Run
from storage_provider.errors import ConfigurationError, SynapseDbError
from storage_provider.failures import BucketFails
from storage_provider.media_paths import UnsafePath, content_path, thumbnail_directory
from storage_provider.media_store import Locked, MediaStoreError
from storage_provider.proofs import Verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.option("--no-progress", is_flag=True, help="Do not show progress bars.")
@click.pass_context
def main(context: click.Context, no_progress: bool) -> None:
    """Moves the media of a Synapse homeserver into a bucket, and frees the disk."""
    context.obj = Output(progress=not no_progress)


@main.command("update-db")
@click.argument("duration", type=DURATION)
@config_options
@click.pass_obj
def update_db(output: Output, duration: timedelta, config_paths: tuple[Path, ...], cache_db: Path) -> None:
    """Note in cache.db what has not been accessed for DURATION (such as 12h, 30d, 2m for two months, 1y)."""
    with _guarded(), CacheDb(cache_db) as cache:
        cli_runs.update(output, cache, duration, cli_setup.old_database(config_paths), config_paths)


@main.command("check-deleted")
@click.argument("base_path", type=click.Path(path_type=Path))
@click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True)
@click.pass_obj
def check_deleted(output: Output, base_path: Path, cache_db: Path) -> None:
    """Compare cache.db with the media store at BASE_PATH."""
    with _guarded(), CacheDb(cache_db) as cache:
        sys.exit(cli_runs.check_deleted(output, cache, cli_setup.open_store(base_path)))


@main.command("update")
@click.argument("base_path", type=click.Path(path_type=Path))
@click.argument("duration", type=DURATION)
@config_options
@click.pass_obj
def update(
    output: Output, base_path: Path, duration: timedelta, config_paths: tuple[Path, ...], cache_db: Path
) -> None:
    """Do update-db and check-deleted."""
    with _guarded(), CacheDb(cache_db) as cache:
        cli_runs.update(output, cache, duration, cli_setup.old_database(config_paths), config_paths)
        sys.exit(cli_runs.check_deleted(output, cache, cli_setup.open_store(base_path)))


@main.command("write")
@click.argument("out", type=click.File("w", encoding="UTF-8", lazy=False), default="-")
@click.option("--cache-db", type=click.Path(path_type=Path), default="cache.db", show_default=True)
@click.pass_obj
def write(output: Output, out: IO[str], cache_db: Path) -> None:
    """Write the paths of media that may still be on disk to OUT (or to the terminal)."""
    status = DONE
    with _guarded(), CacheDb(cache_db) as cache:
        for kind in KINDS:
            for row in cache.undeleted(kind):
                try:
                    print(content_path(row.media), thumbnail_directory(row.media) + "/", sep="\n", file=out)
                except UnsafePath as error:
                    output.complain(f"left out: {error}")
                    status = SOME_FAILED
        # click hides what goes wrong when it closes the file.
        out.flush()
    sys.exit(status)


@main.command("upload")
@click.argument("base_path", type=click.Path(path_type=Path), required=False)
@click.argument("bucket", required=False)
@config_options
@bucket_options
@delete_options
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
        run = Run.prepare(stack, output, base_path, bucket, config_paths, options)
        if delete:
            run.warn_where_synapse_reads_elsewhere(options["provider_index"])
            stack.enter_context(run.lock())
        cache = stack.enter_context(CacheDb(cache_db))
        arguments = cli_setup.database_of_upload(run, cache, config_paths) if delete or run.config else None
        if delete and arguments is None:
            raise click.UsageError(
                "--delete asks Synapse's database whether media is still unused, but there is no database.yaml or "
                "homeserver.yaml here: give --homeserver-config-path."
            )
        if delete and cache.unused_before is None:
            raise click.UsageError(
                f"{cache_db} does not tell since when media counts as unused: run `update-db DURATION` first."
            )
        database = None if arguments is None else stack.enter_context(cli_setup.connect(arguments))
        sys.exit(cli_runs.offload(run, cache, database, delete=delete, verify=Verify(verify)))


@main.command("sync")
@click.option(
    "--older-than", type=DURATION, default="2m", show_default=True, help="Only media not accessed for so long."
)
@click.option("--time-budget", type=DURATION, help="Begin nothing new after so long, such as 600s.")
@click.option("--limit", type=click.IntRange(1), help="Send or remove at most so many media.")
@config_options
@bucket_options
@delete_options
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
        run = Run.prepare(stack, output, None, None, config_paths or (DEFAULT_CONFIG,), options)
        if time_budget is not None:
            run.ends_at = started + time_budget.total_seconds()
        if delete:
            run.warn_where_synapse_reads_elsewhere(options["provider_index"])
        stack.enter_context(run.lock())
        cache = stack.enter_context(CacheDb(cache_db))
        arguments = run.require_config().database
        cli_runs.update(run.output, cache, older_than, arguments, config_paths, run.must_end)
        database = stack.enter_context(cli_setup.connect(arguments))
        sys.exit(cli_runs.offload(run, cache, database, delete=delete, verify=Verify(verify), limit=limit))


@main.command("restore")
@click.argument("base_path", type=click.Path(path_type=Path), required=False)
@click.option("--since", type=DURATION, help="Only media that was used within this time, such as 7d.")
@click.option("--all", "everything", is_flag=True, help="All media.")
@click.option("--origin", help="Only media of this homeserver.")
@config_options
@bucket_options
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
        run = Run.prepare(stack, output, base_path, None, config_paths or (DEFAULT_CONFIG,), options)
        stack.enter_context(run.lock())
        database = stack.enter_context(cli_setup.connect(run.require_config().database))
        sys.exit(cli_runs.restore(run, database, since, origin))


def run() -> None:
    """Do what the process's arguments ask for, and raise `SystemExit` with the exit code."""
    # What is wrong with a command's work is told by the command; here it is what click itself writes.
    with _guarded():
        main(prog_name="s3_media_upload")


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """One line and an exit code for everything that an operator can cause or meet."""
    try:
        yield
    except SettingsError as error:
        _quit(WRONG_USE, f"wrong setting: {error}")
    except Misconfigured as error:
        _quit(WRONG_USE, f"wrong setting: {error.reason}")
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
    print(f"s3_media_upload: {reason}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again, and complain, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)

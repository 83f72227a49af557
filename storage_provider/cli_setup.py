"""What a command works with: the parts, set up by Synapse's configuration and by the options."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backends import open_backend
from backends.base import Backend
from backends.errors import AccessDenied, BackendError, EncryptionNotApplied, Misconfigured
from backends.selection import choose_backend
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import CacheDb
from storage_provider.cli_output import Output
from storage_provider.errors import ConfigurationError
from storage_provider.failures import BucketFails
from storage_provider.media_store import MediaStore
from storage_provider.settings import ProviderSettings
from storage_provider.startup_check import explained, forbids_to_list, prefix_problem

if TYPE_CHECKING:
    from storage_provider.database import DatabaseArguments
    from storage_provider.homeserver_config import HomeserverConfig
    from storage_provider.synapse_db import SynapseDb

DEFAULT_CONFIG = Path("homeserver.yaml")

_DATABASE_YAML = Path("database.yaml")
_WORKERS = {"minio": 32, "boto3": 16}


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
        settings = replace(settings, max_pool_connections=max(workers + 8, 16))
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
        except Misconfigured:
            raise
        except EncryptionNotApplied as error:
            raise ConfigurationError(explained(self.settings, error)) from error
        except BackendError as error:
            raise BucketFails(explained(self.settings, error)) from error

    def _check_listing(self) -> None:
        try:
            self.backend.check()
        except AccessDenied as error:
            if not forbids_to_list(error):
                raise
            # Perhaps only listing is refused: then objects are asked for one by one.
            self.output.complain(f"The bucket cannot be listed, which makes this slow: {error.reason}")
        else:
            self._check_prefix()

    def _check_prefix(self) -> None:
        """Raise `ConfigurationError` where the media stands under another spelling of the configured prefix."""
        problem = prefix_problem(self.settings, () if self.config is None else self.config.providers)
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
    if bucket is not None:
        given["bucket"] = bucket
    for name in ("backend", "endpoint_url", "region_name", "storage_class"):
        if options[name] is not None:
            given[name] = options[name]
    if options["prefix"] is not None:
        given |= {"prefix": options["prefix"], "raw_prefix": bool(options["prefix"])}
    if options["sse_customer_key"] is not None and options["sse_customer_key_path"] is not None:
        raise click.UsageError("Give either --sse-customer-key or --sse-customer-key-path.")
    for name, other in (
        ("sse_customer_key", "sse_customer_key_path"),
        ("sse_customer_key_path", "sse_customer_key"),
    ):
        if options[name] is not None:
            # Whoever names the key here has always been free to use a server without TLS.
            given |= {name: options[name], other: None, "allow_insecure_sse": True}
            given["sse_customer_algo"] = options["sse_customer_algo"]
    if config is not None and (config.providers or bucket is None):
        return config.provider(options["provider_index"]).changed(given)
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


def _stop_on_signals(stack: ExitStack, stop: threading.Event) -> None:
    """Let SIGTERM and the first Ctrl-C finish what is in flight; a second Ctrl-C ends at once."""

    def ask_to_stop(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.signal(number, ask_to_stop)
        stack.callback(signal.signal, number, previous)

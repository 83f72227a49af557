"""What the command line takes from Synapse's configuration, and from the older tool's database.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from backends.errors import SettingsError
from storage_provider.database import DatabaseArguments
from storage_provider.errors import ConfigurationError
from storage_provider.settings import ProviderSettings

PROVIDER_MODULE = "s3_storage_provider.S3StorageProviderBackend"


class HomeserverConfig:
    """Synapse's configuration; what is wrong in a part of it shows when that part is asked for."""

    def __init__(self, settings: Mapping[str, Any], files: Mapping[str, Path], all_files: Sequence[Path]) -> None:
        """`files` tells where each top-level key was found last."""
        self._settings = settings
        self._files = files
        self._all_files = all_files

    @property
    def media_store_path(self) -> Path:
        """Absolute; a relative one counts from the working directory, as it does for Synapse."""
        value = self._settings.get("media_store_path", "media_store")
        if not isinstance(value, str) or not value:
            raise self._error("media_store_path", "must be the path of a directory")
        return Path(value).absolute()

    @property
    def database(self) -> DatabaseArguments:
        """The database with the media tables."""
        settings = self._settings
        if settings.get("database") and settings.get("databases"):
            raise self._error("databases", "cannot stand beside `database`")
        if settings.get("databases"):
            return self._one_of_databases(settings["databases"])
        if settings.get("database"):
            return self._database_arguments("database", settings["database"])
        if settings.get("database_path"):
            path = settings["database_path"]
            if not isinstance(path, str) or path == ":memory:":
                raise self._error("database_path", "must be the path of the SQLite database")
            return DatabaseArguments("sqlite3", {"database": path})
        raise self._error("database", "is missing")

    @cached_property
    def providers(self) -> list[ProviderSettings]:
        """The settings of each storage provider of this package, in order."""
        blocks = self._settings.get("media_storage_providers") or []
        if not isinstance(blocks, list):
            raise self._error("media_storage_providers", "must be a list")
        found = []
        for number, block in enumerate(blocks):
            key = f"media_storage_providers.{number}"
            if not isinstance(block, Mapping) or not isinstance(block.get("module"), str):
                raise self._error(key, "must hold `module` and `config`")
            if block["module"] == PROVIDER_MODULE:
                found.append(self._provider(f"{key}.config", block.get("config")))
        return found

    def provider(self, index: int | None) -> ProviderSettings:
        """The only provider of this package, or the one with this number, counted from 0."""
        providers = self.providers
        if not providers:
            raise self._error("media_storage_providers", f"there is no {PROVIDER_MODULE}")
        names = ", ".join(f"{number} is bucket {each.bucket!r}" for number, each in enumerate(providers))
        if index is None:
            if len(providers) > 1:
                raise self._error("media_storage_providers", f"there are several; choose by --provider-index ({names})")
            return providers[0]
        if not 0 <= index < len(providers):
            raise self._error("media_storage_providers", f"--provider-index {index} is not there ({names})")
        return providers[index]

    def _one_of_databases(self, databases: object) -> DatabaseArguments:
        if not isinstance(databases, Mapping):
            raise self._error("databases", "must be a mapping")
        for name, block in databases.items():
            key = f"databases.{name}"
            stores = block.get("data_stores") if isinstance(block, Mapping) else None
            if stores is not None and not isinstance(stores, list):
                raise self._error(f"{key}.data_stores", "must be a list")
            if stores is None or "main" in stores:
                return self._database_arguments(key, block)
        raise self._error("databases", "none of them has `main` among its `data_stores`")

    def _database_arguments(self, key: str, block: object) -> DatabaseArguments:
        if not isinstance(block, Mapping):
            raise self._error(key, "must hold `name` and `args`")
        name = block.get("name", "sqlite3")
        if name not in ("sqlite3", "psycopg2"):
            raise self._error(f"{key}.name", "must be sqlite3 or psycopg2")
        return _database_arguments(self._where(key), f"{key}.args", name, block.get("args") or {})

    def _provider(self, key: str, values: object) -> ProviderSettings:
        try:
            # Without a `config` block Synapse hands over an empty one.
            return ProviderSettings.parse({} if values is None else values)
        except SettingsError as error:
            raise self._error(".".join((key, *error.path)), error.reason) from None

    def _error(self, key: str, reason: str) -> ConfigurationError:
        return ConfigurationError(f"{self._where(key)}: {key}: {reason}")

    def _where(self, key: str) -> str:
        file = self._files.get(key.partition(".")[0])
        return str(file) if file is not None else ", ".join(str(file) for file in self._all_files)


def load(paths: Sequence[Path]) -> HomeserverConfig:
    """Read configuration files, and all `*.yaml` of directories, as Synapse does: later keys replace earlier ones.

    Raises `ConfigurationError` for what cannot be read. Like Synapse, it passes over a file that
    holds no mapping.
    """
    settings: dict[str, Any] = {}
    files: dict[str, Path] = {}
    all_files = [file for path in paths for file in _files_of(path)]
    for file in all_files:
        content = _read_yaml(file)
        if isinstance(content, dict):
            settings.update(content)
            files.update(dict.fromkeys(map(str, content), file))
    if not settings:
        names = ", ".join(str(path) for path in paths) or "no file"
        raise ConfigurationError(f"{names}: there are no settings of Synapse")
    return HomeserverConfig(settings, files, all_files)


def load_database_yaml(path: Path) -> DatabaseArguments:
    """Read a database.yaml of the older tool: psycopg2's arguments, also below `postgres:`, or SQLite's below `sqlite:`.

    Raises `ConfigurationError`.
    """
    content = _read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ConfigurationError(f"{path}: must hold the arguments for psycopg2, or `postgres:` or `sqlite:` with them")
    if "sqlite" in content:
        return _database_arguments(str(path), "sqlite", "sqlite3", content["sqlite"])
    if "postgres" in content:
        return _database_arguments(str(path), "postgres", "psycopg2", content["postgres"])
    return _database_arguments(str(path), "", "psycopg2", content)


def _database_arguments(file: str, key: str, engine: str, arguments: object) -> DatabaseArguments:
    where = f"{file}: {key}" if key else file
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ConfigurationError(f"{where}: must be a mapping of arguments")
    if engine == "psycopg2":
        return DatabaseArguments("psycopg2", dict(arguments))
    database = arguments.get("database")
    if not isinstance(database, str) or database in ("", ":memory:"):
        raise ConfigurationError(f"{where}.database: must be the path of the SQLite database")
    return DatabaseArguments("sqlite3", dict(arguments))


def _files_of(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            return sorted(file for file in path.iterdir() if file.name.endswith(".yaml") and file.is_file())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    return [path]


def _read_yaml(path: Path) -> Any:
    import yaml  # takes long to load, and runs without a configuration do not need it

    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        # The place and no more: the error's text quotes the file, and that may be a password.
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigurationError(f"{path}: is not valid YAML{place}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigurationError(f"{path}: is not valid YAML") from None

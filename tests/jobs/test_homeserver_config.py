"""Synapse's configuration as the command line reads it: one test for each promise of `homeserver_config`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from storage_provider.database import DatabaseArguments
from storage_provider.errors import ConfigurationError
from storage_provider.homeserver_config import HomeserverConfig, load, load_database_yaml

with warnings.catch_warnings():
    # Synapse and Twisted warn of themselves while they are imported.
    warnings.simplefilter("ignore")
    from synapse.config._base import find_config_files, read_config_files

ROOT = Path(__file__).parents[2]
SECRET = "hunter2"

PROVIDER = """
media_storage_providers:
  - module: s3_storage_provider.S3StorageProviderBackend
    store_local: true
    config: {bucket: media, secret_access_key: hunter2, access_key_id: me}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "homeserver.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def config(write: Callable[..., Path]) -> Callable[[str], HomeserverConfig]:
    return lambda text: load([write("server_name: test\n" + textwrap.dedent(text))])


def refusal(part: Callable[[], object]) -> str:
    """The sentence, which holds no secret."""
    with pytest.raises(ConfigurationError) as caught:
        part()
    text = str(caught.value)
    assert SECRET not in text
    assert "\n" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


class TestFiles:
    def test_later_ones_replace_whole_sections(self, write: Callable[..., Path]) -> None:
        first = write(
            "media_store_path: /one\ndatabase: {name: sqlite3, args: {database: /a.db, timeout: 5}}", "1.yaml"
        )
        second = write("database: {name: sqlite3, args: {database: /b.db}}", "2.yaml")
        config = load([first, second])
        assert config.media_store_path == Path("/one")
        assert config.database.arguments == {"database": "/b.db"}
        assert load([second, first]).database.arguments == {"database": "/a.db", "timeout": 5}

    def test_of_a_directory_are_merged_as_synapse_does(self, write: Callable[..., Path], tmp_path: Path) -> None:
        names = ["a.yaml", "10.yaml", "9.yaml", "Z.yaml", "b.yml", "c.yaml.bak", ".hidden.yaml", "ä.yaml"]
        for number, name in enumerate(names):
            write(
                f"server_name: test\nreport_stats: false\nmedia_store_path: /{number}\n{name[0]}: {number}",
                f"conf.d/{name}",
            )
        (tmp_path / "conf.d/inner.yaml").mkdir()
        main = write("server_name: test\nmedia_store_path: /main\nreport_stats: true", "main.yaml")
        for paths in ([main, tmp_path / "conf.d"], [tmp_path / "conf.d", main]):
            theirs = read_config_files(find_config_files([str(path) for path in paths]))
            assert load(paths)._settings == theirs

    def test_without_a_mapping_are_passed_over_as_synapse_does(self, write: Callable[..., Path]) -> None:
        paths = [write("media_store_path: /one"), write("", "empty.yaml"), write("[a, list]", "list.yaml")]
        assert load(paths).media_store_path == Path("/one")

    @pytest.mark.parametrize("text", ["", "# nothing", "[a, list]", "text"])
    def test_that_hold_no_settings_at_all_are_an_error(self, write: Callable[..., Path], text: str) -> None:
        path = write(text)
        assert refusal(lambda: load([path])) == f"{path}: there are no settings of Synapse"

    def test_that_are_missing_are_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "missing.yaml"
        assert refusal(lambda: load([path])) == f"{path}: cannot be read: No such file or directory"
        assert refusal(lambda: load_database_yaml(path)) == f"{path}: cannot be read: No such file or directory"

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("a: b\npassword: *hunter2", " (line 2, column 11)"),
            ("a: b\npassword: !hunter2 x", " (line 2, column 11)"),
            ("password: 'hunter2", " (line 1, column 19)"),
            ("password: hunter2: x", " (line 1, column 18)"),
            ("password: @hunter2", " (line 1, column 11)"),
            ("a: {b: hunter2", " (line 1, column 15)"),
            ("a: 2020-13-45", ""),
            ("a: b\x00hunter2", ""),
        ],
    )
    def test_that_are_not_yaml_are_an_error_that_shows_the_place_only(
        self, write: Callable[..., Path], text: str, place: str
    ) -> None:
        path = write(text)
        assert refusal(lambda: load([path])) == f"{path}: is not valid YAML{place}"
        assert refusal(lambda: load_database_yaml(path)) == f"{path}: is not valid YAML{place}"

    def test_that_are_not_text_are_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "binary.yaml"
        path.write_bytes(b"a: \xff\xfe\xff")
        assert "is not valid YAML" in refusal(lambda: load([path]))


class TestMediaStore:
    def test_is_where_synapse_has_it(
        self, config: Callable[[str], HomeserverConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert config("media_store_path: /var/media").media_store_path == Path("/var/media")
        assert config("media_store_path: my/media").media_store_path == tmp_path / "my/media"
        assert config("").media_store_path == tmp_path / "media_store"
        assert not (tmp_path / "media_store").exists()

    @pytest.mark.parametrize("value", ["5", "''", "[/a]", "null"])
    def test_that_is_no_path_is_an_error(self, config: Callable[[str], HomeserverConfig], value: str) -> None:
        text = refusal(lambda: config(f"media_store_path: {value}").media_store_path)
        assert text.endswith("homeserver.yaml: media_store_path: must be the path of a directory")


class TestDatabase:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "database: {name: psycopg2, txn_limit: 5, args: {user: u, password: hunter2, port: 5433, cp_min: 5}}",
                DatabaseArguments("psycopg2", {"user": "u", "password": SECRET, "port": 5433, "cp_min": 5}),
            ),
            ("database: {name: psycopg2}", DatabaseArguments("psycopg2", {})),
            ("database: {name: sqlite3, args: {database: /h.db}}", DatabaseArguments("sqlite3", {"database": "/h.db"})),
            ("database: {args: {database: /h.db}}", DatabaseArguments("sqlite3", {"database": "/h.db"})),
            ("database_path: /h.db", DatabaseArguments("sqlite3", {"database": "/h.db"})),
            (
                "database_path: /h.db\ndatabase: {name: psycopg2, args: {user: u}}",
                DatabaseArguments("psycopg2", {"user": "u"}),
            ),
            (
                """
                databases:
                  state: {name: psycopg2, data_stores: [state], args: {dbname: state}}
                  master: {name: psycopg2, data_stores: [main], args: {dbname: main}}
                """,
                DatabaseArguments("psycopg2", {"dbname": "main"}),
            ),
            (
                """
                databases:
                  state: {name: psycopg2, data_stores: [state], args: {dbname: state}}
                  all: {name: sqlite3, args: {database: /h.db}}
                """,
                DatabaseArguments("sqlite3", {"database": "/h.db"}),
            ),
        ],
    )
    def test_is_the_one_with_the_media_tables(
        self, config: Callable[[str], HomeserverConfig], text: str, expected: DatabaseArguments
    ) -> None:
        assert config(text).database == expected

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "database: is missing"),
            ("database: {}", "database: is missing"),
            ("database: hunter2", "database: must hold `name` and `args`"),
            ("database: {name: mysql, args: {password: hunter2}}", "database.name: must be sqlite3 or psycopg2"),
            ("database: {name: [x]}", "database.name: must be sqlite3 or psycopg2"),
            ("database: {name: psycopg2, args: hunter2}", "database.args: must be a mapping of arguments"),
            ("database: {name: psycopg2, args: {1: hunter2}}", "database.args: must be a mapping of arguments"),
            ("database: {name: sqlite3}", "database.args.database: must be the path of the SQLite database"),
            (
                "database: {args: {database: ':memory:'}}",
                "database.args.database: must be the path of the SQLite database",
            ),
            ("database_path: 5", "database_path: must be the path of the SQLite database"),
            ("databases: hunter2", "databases: must be a mapping"),
            ("databases: {a: hunter2}", "databases.a: must hold `name` and `args`"),
            ("databases: {a: {data_stores: hunter2}}", "databases.a.data_stores: must be a list"),
            ("databases: {a: {data_stores: [state]}}", "databases: none of them has `main` among its `data_stores`"),
            ("databases: {a: {args: {}}}\ndatabase: {name: sqlite3}", "databases: cannot stand beside `database`"),
        ],
    )
    def test_that_cannot_be_understood_is_an_error_with_file_and_key(
        self, config: Callable[[str], HomeserverConfig], text: str, complaint: str
    ) -> None:
        assert refusal(lambda: config(text).database).endswith(f"homeserver.yaml: {complaint}")

    def test_error_names_the_file_that_counts(self, write: Callable[..., Path]) -> None:
        first, second = write("database: {name: sqlite3}", "1.yaml"), write("database: 5", "2.yaml")
        assert refusal(lambda: load([first, second]).database).startswith(f"{second}: database: ")
        assert refusal(lambda: load([second, first]).database).startswith(f"{first}: database.args.database: ")
        third = write("a: 1", "3.yaml")
        assert refusal(lambda: load([third, third]).database).startswith(f"{third}, {third}: database: is missing")

    def test_is_not_shown_with_its_password(self, config: Callable[[str], HomeserverConfig]) -> None:
        found = config("database: {name: psycopg2, args: {password: hunter2}}")
        assert SECRET not in repr(found) + repr(found.database) + str(found)


class TestDatabaseYaml:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("user: u\npassword: hunter2", DatabaseArguments("psycopg2", {"user": "u", "password": SECRET})),
            ("postgres:\n  user: u\n  port: 5433", DatabaseArguments("psycopg2", {"user": "u", "port": 5433})),
            ("sqlite:\n  database: /h.db", DatabaseArguments("sqlite3", {"database": "/h.db"})),
        ],
    )
    def test_is_read_as_the_older_tool_does(
        self, write: Callable[..., Path], text: str, expected: DatabaseArguments
    ) -> None:
        assert load_database_yaml(write(text, "database.yaml")) == expected

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", ": must hold the arguments"),
            ("{}", ": must hold the arguments"),
            ("[hunter2]", ": must hold the arguments"),
            ("hunter2", ": must hold the arguments"),
            ("postgres: hunter2", ": postgres: must be a mapping of arguments"),
            ("sqlite: {}", ": sqlite.database: must be the path of the SQLite database"),
            ("sqlite:", ": sqlite: must be a mapping of arguments"),
            ("5: hunter2", ": must be a mapping of arguments"),
        ],
    )
    def test_that_cannot_be_understood_is_an_error(self, write: Callable[..., Path], text: str, complaint: str) -> None:
        path = write(text, "database.yaml")
        assert refusal(lambda: load_database_yaml(path)).startswith(f"{path}{complaint}")


class TestProviders:
    SEVERAL = """
        media_storage_providers:
          - module: file_system
            config: {directory: /backup}
          - module: s3_storage_provider.S3StorageProviderBackend
            config: {bucket: first, prefix: media}
          - module: some_other.Provider
          - module: s3_storage_provider.S3StorageProviderBackend
            config: {bucket: second}
        """

    def test_are_the_settings_of_this_package_in_order(self, config: Callable[[str], HomeserverConfig]) -> None:
        found = config(self.SEVERAL).providers
        assert [(settings.bucket, settings.key_prefix) for settings in found] == [("first", "media/"), ("second", "")]

    def test_need_no_number_where_there_is_one(self, config: Callable[[str], HomeserverConfig]) -> None:
        for index in (None, 0):
            found = config(PROVIDER).provider(index)
            assert found.bucket == "media"
            assert found.secret_access_key is not None
            assert found.secret_access_key.get_secret_value() == SECRET

    def test_are_counted_without_those_of_others(self, config: Callable[[str], HomeserverConfig]) -> None:
        assert config(self.SEVERAL).provider(0).bucket == "first"
        assert config(self.SEVERAL).provider(1).bucket == "second"

    @pytest.mark.parametrize(
        ("index", "complaint"),
        [
            (None, "there are several; choose by --provider-index (0 is bucket 'first', 1 is bucket 'second')"),
            (2, "--provider-index 2 is not there (0 is bucket 'first', 1 is bucket 'second')"),
            (-1, "--provider-index -1 is not there (0 is bucket 'first', 1 is bucket 'second')"),
        ],
    )
    def test_that_cannot_be_told_apart_are_named(
        self, config: Callable[[str], HomeserverConfig], index: int | None, complaint: str
    ) -> None:
        text = refusal(lambda: config(self.SEVERAL).provider(index))
        assert text.endswith(f"homeserver.yaml: media_storage_providers: {complaint}")

    @pytest.mark.parametrize(
        "text", ["", "media_storage_providers:", "media_storage_providers: [{module: file_system}]"]
    )
    def test_that_are_missing_are_an_error(self, config: Callable[[str], HomeserverConfig], text: str) -> None:
        assert config(text).providers == []
        text = refusal(lambda: config(text).provider(None))
        assert text.endswith("media_storage_providers: there is no s3_storage_provider.S3StorageProviderBackend")

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("hunter2", ": must be a list"),
            ("[hunter2]", ".0: must hold `module` and `config`"),
            ("[{module: file_system}, {config: {}}]", ".1: must hold `module` and `config`"),
            ("[{module: s3_storage_provider.S3StorageProviderBackend}]", ".0.config.bucket: required, but missing"),
            (
                "[{module: x.Y}, {module: s3_storage_provider.S3StorageProviderBackend, config: {bucket: b1, bukcet: x}}]",
                ".1.config.bukcet: unknown setting; did you mean 'bucket'?",
            ),
            (
                "[{module: s3_storage_provider.S3StorageProviderBackend, config: hunter2}]",
                ".0.config: must be a mapping of settings",
            ),
            (
                "[{module: s3_storage_provider.S3StorageProviderBackend, config: {bucket: b1, sse_customer_key: hunter2}}]",
                ".0.config.sse_customer_key: must be 32 characters, or base64 of 32 bytes; it has 7 characters",
            ),
        ],
    )
    def test_that_cannot_be_understood_are_an_error_with_file_and_key(
        self, config: Callable[[str], HomeserverConfig], text: str, complaint: str
    ) -> None:
        found = refusal(lambda: config(f"media_storage_providers: {text}").providers)
        assert found.endswith(f"homeserver.yaml: media_storage_providers{complaint}")

    def test_that_are_broken_do_not_hinder_what_needs_only_the_database(
        self, config: Callable[[str], HomeserverConfig]
    ) -> None:
        found = config("media_storage_providers: hunter2\ndatabase: {name: psycopg2, args: {user: u}}")
        assert found.database == DatabaseArguments("psycopg2", {"user": "u"})


def test_nothing_here_imports_synapse_or_twisted() -> None:
    modules = ["media_store", "cache_db", "synapse_db", "homeserver_config"]
    script = f"""
import sys
for name in {modules!r}:
    __import__("storage_provider." + name)
print(sorted({{"synapse", "twisted", "psycopg2", "boto3", "minio"}} & {{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

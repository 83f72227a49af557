"""The command as an operator meets it: the older tool's face, configuration, exit codes, output."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import sqlite3
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage_provider.media_store import MediaStore
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.media_site import (
    ENCRYPTED,
    EVERYWHERE,
    PATIENCE,
    QUICKLY,
    ROOT,
    SCRIPT,
    WIDELY,
    MediaSite,
    now_ms,
    open_site,
)
from tests.jobs.old_cache import OLD_SCHEMA
from tests.provider.fault_proxy import gets, puts
from tests.servers import S3Server, make_bucket

SSE_KEY = "0123456789abcdefABCDEF0123456789"


@pytest.fixture
def site(tmp_path: Path, s3_server: S3Server, synapse_database: SynapseDatabase, backend: str) -> Iterator[MediaSite]:
    with open_site(tmp_path, s3_server, synapse_database, backend) as site:
        yield site


def make_old_cache(site: MediaSite, *rows: tuple[str, str, str, str, bool]) -> None:
    """A cache.db as the older tool leaves it."""
    with closing(sqlite3.connect(site.directory / "cache.db")) as cache, cache:
        cache.executescript(OLD_SCHEMA)
        cache.executemany("INSERT INTO media VALUES (?, ?, ?, ?, ?)", rows)


def cached(site: MediaSite) -> dict[str, bool]:
    """By media id, whether cache.db takes it for deleted."""
    with closing(sqlite3.connect(site.directory / "cache.db")) as cache:
        return {name: bool(gone) for name, gone in cache.execute("SELECT media_id, known_deleted FROM media")}


# --- the older tool's face ---


@EVERYWHERE
def test_nightly_job_says_and_does_what_it_always_did(site: MediaSite) -> None:
    site.write_database_yaml()
    site.add_local("AbcdEfgh", b"x" * 1000, {"32-32-image-png-crop": b"t" * 24})
    site.add_local("QrstUvwx", b"y" * 1000)
    site.add_remote("a.org", "remote", "FsidFsid", b"z" * 2048, {"96-96-image-jpeg-scale": b"u" * 24})
    site.add_local("UsedNowXyz", created_ts=now_ms() + 3_600_000)
    before = site.files()
    kept = "local_content/Us/ed/NowXyz"

    updated = site.run_script("update-db", "0d")
    checked = site.run_script("check-deleted", "store")
    place = ("store", site.bucket, "--endpoint-url", site.endpoint, "--backend", site.backend)
    uploaded = site.run_script("upload", *place, "--delete")

    first, *rest = updated.lines
    assert first.startswith("Syncing files that haven't been accessed since: 20")
    assert rest == ["  Syncing local media", "  Syncing remote media", "Synced 3 new rows"]
    assert checked.lines == ["Checking on  3  undeleted files", "Updated 0 as deleted"]
    assert uploaded.lines[0] == "Uploading  3  files"
    assert uploaded.lines[1:7] == [
        "Uploaded 3 media out of 3",
        "Uploaded 5 files",
        "Uploaded 4.0K",
        "Deleted 3 media",
        "Deleted 5 files",
        "Deleted 4.0K",
    ]
    assert uploaded.lines[7:] == ["Proved before deletion: 5 by our own upload"]
    assert updated.err + checked.err + uploaded.err == ""
    assert site.files() == {kept: before[kept]}
    assert site.objects() == {path: content for path, content in before.items() if path != kept}
    # What is empty is gone, but for the store and its first level.
    assert site.directories() == [
        "local_content",
        "local_content/Us",
        "local_content/Us/ed",
        "local_thumbnails",
        "remote_content",
        "remote_thumbnail",
    ]
    assert cached(site) == {"AbcdEfgh": True, "QrstUvwx": True, "remote": True}

    again = site.upload("--delete")
    assert again.lines[:2] == ["Uploading  0  files", "Uploaded 0 media out of 0"]


@QUICKLY
def test_old_cache_db_is_taken_over_as_it_is(site: MediaSite) -> None:
    site.write_database_yaml()
    site.add_local("OldLocalMedia", b"o" * 500)
    site.add_remote("a.org", "oldremote", "OldFsRemote", b"r" * 500)
    site.database.add_local("OldAndDeleted")
    make_old_cache(
        site,
        ("", "OldLocalMedia", "OldLocalMedia", "local", False),
        ("a.org", "oldremote", "OldFsRemote", "remote", False),
        ("", "OldAndDeleted", "OldAndDeleted", "local", True),
    )
    updated = site.run("update-db", "0d")
    uploaded = site.upload("--delete")
    assert updated.lines[-1] == "Synced 0 new rows"
    assert uploaded.lines[:3] == ["Uploading  2  files", "Uploaded 2 media out of 2", "Uploaded 2 files"]
    assert site.files() == {}
    assert len(site.objects()) == 2
    assert cached(site) == {"OldLocalMedia": True, "oldremote": True, "OldAndDeleted": True}


@QUICKLY
def test_old_cache_db_that_does_not_tell_since_when_media_is_unused_frees_nothing(site: MediaSite) -> None:
    path = site.add_local("OldLocalMedia", b"o" * 500, last_access_ts=now_ms() - 60_000)
    site.write_database_yaml()
    make_old_cache(site, ("", "OldLocalMedia", "OldLocalMedia", "local", False))
    refused = site.upload("--delete", status=2)
    assert "`update-db DURATION`" in refused.err
    assert site.files() == {path: b"o" * 500}
    assert MediaStore(site.store).offloaded_before() is None
    site.upload()
    site.run("update-db", "1h")
    assert "Kept 1 files that are in use again or changed" in site.upload("--delete").lines
    site.run("update-db", "0d")
    site.upload("--delete")
    assert site.files() == {}


@QUICKLY
def test_upload_needs_neither_database_nor_configuration(site: MediaSite) -> None:
    path = site.add_local("OldLocalMedia", b"o" * 500)
    make_old_cache(site, ("", "OldLocalMedia", "OldLocalMedia", "local", False))
    assert site.upload().lines[:3] == ["Uploading  1  files", "Uploaded 1 media out of 1", "Uploaded 1 files"]
    assert site.objects() == site.files() == {path: b"o" * 500}


@QUICKLY
def test_write_lists_what_may_still_be_on_disk(site: MediaSite) -> None:
    make_old_cache(
        site,
        ("", "AbcdEfgh", "AbcdEfgh", "local", False),
        ("a.org", "r", "FsidFsid", "remote", False),
        ("", "GoneGone", "GoneGone", "local", True),
    )
    expected = (
        "local_content/Ab/cd/Efgh\nlocal_thumbnails/Ab/cd/Efgh/\n"
        "remote_content/a.org/Fs/id/Fsid\nremote_thumbnail/a.org/Fs/id/Fsid/\n"
    )
    assert site.run("write").out == expected
    assert site.run("write", "-").out == expected
    assert site.run("write", "list.txt").out == ""
    assert (site.directory / "list.txt").read_text() == expected


@QUICKLY
def test_update_is_update_db_and_check_deleted(site: MediaSite) -> None:
    site.write_homeserver_yaml("synapse.yaml")
    site.add_local("OnTheDisk")
    site.database.add_local("NotOnTheDisk")
    done = site.run("update", "store", "1s", "--homeserver-config-path", "synapse.yaml")
    assert done.lines[3:] == ["Synced 2 new rows", "Checking on  2  undeleted files", "Updated 1 as deleted"]
    assert cached(site) == {"OnTheDisk": False, "NotOnTheDisk": True}


@QUICKLY
def test_durations_of_the_older_tool(site: MediaSite) -> None:
    site.write_database_yaml()
    durations = {"0s": 0, "5h": 5, "30d": 720, "2m": 1440, "1y": 8760}
    for name, hours in durations.items():
        moment = now_ms() - hours * 3_600_000
        site.database.add_local(f"JustBefore{name}", last_access_ts=moment - 1000)
        site.database.add_local(f"JustAfter{name}", last_access_ts=moment + PATIENCE * 1000)
    done = site.run_each([("update-db", name, "--cache-db", f"{name}.db") for name in durations])
    assert [result.lines[-1] for result in done] == [f"Synced {number} new rows" for number in (9, 7, 5, 3, 1)]


@QUICKLY
def test_database_yaml_may_be_plain_or_under_a_name(site: MediaSite) -> None:
    path = site.directory / "database.yaml"
    for content in ({"host": "127.0.0.1", "port": 1, "user": "nobody"}, {"postgres": {"host": "127.0.0.1", "port": 1}}):
        path.write_text(yaml.safe_dump(content))
        refused = site.run("update-db", "1d", status=3)
        assert "PostgreSQL" in refused.err
    site.write_database_yaml()
    assert site.run("update-db", "1d").lines[-1] == "Synced 0 new rows"


@QUICKLY
def test_prefix_of_the_command_line_is_joined_raw(site: MediaSite) -> None:
    path = site.add_local("AbcdEfgh")
    site.update()
    site.upload("--prefix", "media-of-")
    assert list(site.objects()) == [f"media-of-{path}"]


@QUICKLY
def test_storage_class(site: MediaSite) -> None:
    site.add_local("AbcdEfgh")
    site.update()
    site.upload("--storage-class", "STANDARD_IA")
    (entry,) = site.client.list_objects_v2(Bucket=site.bucket)["Contents"]
    assert entry["StorageClass"] == "STANDARD_IA"


@QUICKLY
def test_region_is_that_of_the_environment_or_of_the_option(site: MediaSite) -> None:
    site.add_local("AbcdEfgh")
    site.update()
    site.environment = {"AWS_DEFAULT_REGION": "fr-par"}
    for options, region in (((), "fr-par"), (("--region-name", "nl-ams"), "nl-ams")):
        site.proxy.forget()
        site.upload(*options)
        # Credential=access key/date/region/service/aws4_request
        scopes = [request.headers["authorization"].partition(",")[0].split("/") for request in site.proxy.requests]
        assert {scope[2] for scope in scopes} == {region}


@QUICKLY
def test_media_store_that_is_not_mounted_is_2_and_nothing_is_taken_for_deleted(site: MediaSite) -> None:
    site.add_some(3)
    site.write_homeserver_yaml()
    before = site.sync().values["uploaded_files"]
    site.store.rename(site.directory / "unmounted")
    site.store.mkdir()
    for command in (("check-deleted", "store"), ("update", "store", "0d"), ("upload",), ("sync", "--delete")):
        refused = site.run(*command, status=2)
        assert "store is expected to hold media" in refused.err and refused.err.count("\n") == 1
    shutil.rmtree(site.store)
    (site.directory / "unmounted").rename(site.store)
    assert site.sync("--delete").values["proofs"] == {"put": before}
    # All has been removed: by this software, which leaves some directories, or by the older one, which leaves none.
    site.run("check-deleted", "store")
    shutil.rmtree(site.store)
    site.store.mkdir()
    site.run("check-deleted", "store")


@QUICKLY
def test_what_cannot_be_looked_for_is_told_by_check_deleted(site: MediaSite) -> None:
    make_old_cache(
        site, ("", "AbcdEfgh", "AbcdEfgh", "local", False), ("a.org", "r", "Fsid/../../Fsid", "remote", False)
    )
    (site.store / "local_content").mkdir()
    done = site.run("check-deleted", "store", status=1)
    assert done.err.startswith("failed: a.org r: refused: ") and done.err.count("\n") == 1
    assert done.lines[-1] == "Updated 1 as deleted"
    assert cached(site) == {"AbcdEfgh": True, "r": False}


@QUICKLY
def test_what_others_have_named_does_nothing_to_the_terminal(site: MediaSite) -> None:
    # Whoever asks for media of another server chooses the id that it is known by.
    site.database.add_remote("a.org", "id\x1b[31m\nfailed: \u202e", "../up")
    site.write_homeserver_yaml()
    done = site.run("restore", "store", "--all", status=1)
    assert done.err.startswith("failed: a.org id") and done.err.count("\n") == 1
    assert done.err.rstrip("\n").isprintable()


# --- wrong use ---


@QUICKLY
def test_wrong_use_is_2_and_says_what_is_wrong(site: MediaSite) -> None:
    wrong: list[tuple[list[str], str]] = [
        ([], "Missing command"),
        (["upload", "store"], "Give BASE_PATH and BUCKET, or neither"),
        (["upload", "store", site.bucket, "--endpoint", site.endpoint], "No such option"),
        (["sync", "--del"], "No such option"),
        (["update-db", "2w"], "is not a duration"),
        (["update-db", "²d"], "is not a duration"),
        (["update-db", "3000y"], "too long ago"),
        (["update-db", "9" * 5000 + "d"], "too long ago"),
        (["upload", "store", site.bucket, "--delete", "--endpoint-url", site.endpoint], "--homeserver-config-path"),
        (["upload", "store", site.bucket, "--storage-class", "GLACIER"], "storage_class"),
        (["upload", "nowhere", site.bucket], "nowhere"),
        (["upload"], "homeserver.yaml"),
        (["update-db", "1d"], "homeserver.yaml"),
        (["restore", "store"], "Say what to restore"),
        (["restore", "--all", "--since", "1d"], "either --since or --all"),
        (["sync", "--time-budget", "soon"], "is not a duration"),
        (["sync", "--verify", "maybe"], "--verify"),
        (["write", "no/such/directory/list.txt"], "list.txt"),
        (
            ["upload", "--homeserver-config-path", "synapse.yaml", "--delete", "--provider-index", "7"],
            "--provider-index",
        ),
    ]
    site.write_homeserver_yaml("synapse.yaml")
    for (arguments, said), refused in zip(wrong, site.run_each([each for each, _ in wrong]), strict=True):
        assert refused.status == 2, (arguments, str(refused))
        assert said in refused.err, arguments
        assert refused.out == "", arguments


@QUICKLY
def test_configuration_that_cannot_be_used_is_2(site: MediaSite) -> None:
    secret = "hunter2-in-the-file"
    site.secrets.append(secret)
    whole = site.homeserver_settings()
    block = whole["media_storage_providers"][0]
    wrong = [
        (f"password: [{secret}\nx: }}", "not valid YAML"),
        ("[]", "no settings of Synapse"),
        (yaml.safe_dump(whole | {"media_store_path": ""}), "media_store_path"),
        (yaml.safe_dump(whole | {"media_storage_providers": [{**block, "config": {}}]}), "bucket"),
        (yaml.safe_dump(whole | {"media_storage_providers": []}), "S3StorageProviderBackend"),
        (yaml.safe_dump({name: value for name, value in whole.items() if name != "database"}), "database"),
    ]
    for number, (content, _) in enumerate(wrong):
        (site.directory / f"{number}.yaml").write_text(content)
    names = [f"{number}.yaml" for number in range(len(wrong))]
    done = site.run_each([("upload", "--delete", "--homeserver-config-path", name) for name in names])
    for name, (_, said), refused in zip(names, wrong, done, strict=True):
        assert refused.status == 2, (name, str(refused))
        assert name in refused.err and said in refused.err and refused.err.count("\n") == 1


@QUICKLY
def test_file_of_a_setting_that_cannot_be_used_is_2(site: MediaSite) -> None:
    site.add_some(6)
    site.update()
    refused = site.upload("--sse-customer-key-path", "no/such/key", status=2)
    assert "wrong setting: sse_customer_key_path: cannot read no/such/key: No such file" in refused.err
    assert refused.err.count("\n") == 1


# --- configured from homeserver.yaml ---


@WIDELY
def test_homeserver_yaml_is_all_that_upload_needs(site: MediaSite) -> None:
    site.environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    before = site.add_some(6)
    config = site.write_homeserver_yaml("synapse.yaml", prefix="media")
    site.run("update-db", "0d", "--homeserver-config-path", config)
    done = site.run("--homeserver-config-path", config, "upload", "--delete", status=2)
    assert "No such option" in done.err  # where it stands is as it was: behind the command
    done = site.run("upload", "--homeserver-config-path", config, "--delete")
    assert "Uploaded 6 media out of 6" in done.lines
    assert site.files() == {}
    assert site.objects() == {f"media/{path}": content for path, content in before.items()}


@EVERYWHERE
def test_sync_does_everything_in_one_go(site: MediaSite) -> None:
    site.environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    before = site.add_some(6)
    site.write_homeserver_yaml()
    dry = site.sync()
    assert site.files() == before == site.objects()
    done = site.sync("--delete")
    assert site.files() == {}
    assert site.objects() == before
    assert dry.values["uploaded_files"] == len(before) == done.values["deleted_files"]
    assert done.values["uploaded_files"] == dry.values["deleted_files"] == 0
    assert done.values["proofs"] == {"put": len(before)}


@QUICKLY
def test_several_files_and_providers_and_options_that_override(site: MediaSite) -> None:
    path = site.add_local("AbcdEfgh")
    other = make_bucket(site.server)
    settings = site.homeserver_settings(bucket="nowhere-at-all")
    block = settings.pop("media_storage_providers")[0]
    second = {**block, "config": block["config"] | {"bucket": site.bucket, "prefix": "second/"}}
    (site.directory / "first.yaml").write_text(yaml.safe_dump(settings | {"media_store_path": "wrong"}))
    directory = site.directory / "conf.d"
    directory.mkdir()
    providers = [block, {"module": "other.Provider", "config": {}}, second]
    (directory / "media.yaml").write_text(
        yaml.safe_dump({"media_store_path": "store", "media_storage_providers": providers})
    )
    configured = ("--homeserver-config-path", "first.yaml", "--homeserver-config-path", "conf.d")
    site.run("update-db", "0d", *configured)
    refused = site.run("upload", *configured, status=2)
    assert "--provider-index" in refused.err and site.bucket in refused.err
    site.run("upload", *configured, "--provider-index", "2", status=2)
    site.run("upload", *configured, "--provider-index", "1")
    assert list(site.objects()) == [f"second/{path}"]
    # Positionals and options win, and what Synapse would then not find is told.
    run = site.run("upload", "store", other, *configured, "--provider-index", "1", "--prefix", "raw-", "--delete")
    assert f"read keys that start with '{site.bucket}/second/'" in run.err and f"'{other}/raw-'" in run.err
    assert [entry["Key"] for entry in site.client.list_objects_v2(Bucket=other)["Contents"]] == [f"raw-{path}"]
    assert site.files() == {}


@QUICKLY
def test_prefix_of_homeserver_yaml_that_hides_the_media_of_the_older_tool_is_2(site: MediaSite) -> None:
    path = site.add_local("AbcdEfgh")
    site.write_homeserver_yaml(prefix="media")
    site.run("update-db", "0d")
    site.put(f"media{path}", b"stored by synapse-s3-storage-provider")
    before = site.files()
    for command in (("sync", "--delete"), ("upload",), ("restore", "--all")):
        refused = site.run(*command, status=2)
        assert "set `raw_prefix: true`" in refused.err and refused.err.count("\n") == 1, command
    assert list(site.objects()) == [f"media{path}"]
    assert site.files() == before
    # Who gives the prefix himself means it as it is, and so does who has moved the media.
    site.run("sync", "--older-than", "0d", "--prefix", "media/")
    assert sorted(site.objects()) == [f"media/{path}", f"media{path}"]
    assert "Some media in the bucket will not be found" in site.sync("--delete").err
    assert site.files() == {}
    # A second provider that serves the other spelling is what the message asks for.
    settings = site.homeserver_settings(prefix="media")
    block = settings["media_storage_providers"][0]
    other = {**block, "config": block["config"] | {"raw_prefix": True}}
    (site.directory / "homeserver.yaml").write_text(
        yaml.safe_dump({**settings, "media_storage_providers": [block, other]})
    )
    assert site.sync("--provider-index", "0").err == ""


@QUICKLY
def test_prefix_is_checked_by_two_requests_and_a_refusal_of_them_is_no_problem(site: MediaSite) -> None:
    site.write_homeserver_yaml(prefix="media")
    site.proxy.forget()
    site.sync()
    listed = [prefix for request in site.proxy.requests for prefix in request.query.get("prefix", ())]
    assert listed == ["media/", "medialocal_", "mediaremote_"]
    with site.proxy.refuse(403, "AccessDenied", lambda request: request.query.get("prefix") == ["medialocal_"]) as told:
        assert site.sync().err == ""
    assert told.hits == 1


@ENCRYPTED
def test_encryption_key_of_the_configuration_or_of_a_file(site: MediaSite) -> None:
    site.secrets.append(SSE_KEY)
    read = {"SSECustomerKey": SSE_KEY, "SSECustomerAlgorithm": "AES256"}
    before = site.add_some(3)
    site.write_homeserver_yaml(sse_customer_key=SSE_KEY, allow_insecure_sse=True)
    site.sync()
    assert site.objects(**read) == before
    with pytest.raises(site.client.exceptions.ClientError):
        site.objects()

    key = site.directory / "sse.key"
    key.write_text(SSE_KEY + "\n")
    site.write_homeserver_yaml()
    for number, options in enumerate((("--sse-customer-key-path", str(key)), ("--sse-customer-key", SSE_KEY))):
        site.add_local(f"More{number}media")
        site.write_database_yaml()
        site.run("update-db", "0d")
        site.upload(*options)
    assert site.objects(**read) == site.files()
    site.upload("--sse-customer-key", SSE_KEY, "--sse-customer-key-path", key, status=2)
    assert "sse_customer_algo" in site.upload("--sse-customer-key", SSE_KEY, "--sse-customer-algo", "DES", status=2).err


@QUICKLY
def test_server_that_ignores_the_encryption_gets_no_media(site: MediaSite) -> None:
    before = site.add_some(2)
    site.write_homeserver_yaml(sse_customer_key=SSE_KEY, allow_insecure_sse=True)
    site.secrets.append(SSE_KEY)
    assert "does not encrypt with `sse_customer_key`" in site.sync("--delete", status=2).err
    assert site.files() == before
    assert site.objects() == {}


# --- what goes wrong ---


@QUICKLY
def test_failing_file_is_named_and_does_not_end_the_run(site: MediaSite) -> None:
    before = site.add_some(6)
    failing = "local_content/Lo/ca/l0003x"
    site.write_homeserver_yaml()
    with site.proxy.refuse(400, "InvalidRequest", lambda request: request.key == failing):
        done = site.sync("--delete", status=1)
    assert f"failed: {failing}: the server answered 400 InvalidRequest: no\n" == done.err
    assert site.files() == {failing: before[failing]}
    assert done.values["failed"] == 1 and done.values["deleted_files"] == len(before) - 1
    assert site.sync("--delete").err == ""
    assert site.objects() == before


@QUICKLY
def test_bucket_that_is_down_or_missing_is_3(site: MediaSite) -> None:
    before = site.add_some(1)
    site.update()
    down = site.run("upload", "store", site.bucket, "--endpoint-url", "http://127.0.0.1:1", status=3)
    assert "http://127.0.0.1:1 does not answer" in down.err and down.err.count("\n") == 1 and down.out == ""
    missing = site.run("upload", "store", "no-such-bucket-here", "--endpoint-url", site.endpoint, status=3)
    assert f"There is no bucket 'no-such-bucket-here' at {site.endpoint}" in missing.err
    assert "NoSuchBucket" in missing.err and missing.err.count("\n") == 1
    assert site.files() == before


@WIDELY
def test_bucket_that_dies_ends_the_run_early(site: MediaSite) -> None:
    before = site.add_some(60, size=100)
    site.write_homeserver_yaml(max_attempts=1)
    sent: list[str] = []

    def dies(request: Any) -> bool:
        if puts(request):
            sent.append(request.key)
        return puts(request) and len(sent) > 10

    with site.proxy.slow_down(dies):
        done = site.sync("--delete", "--workers", "2", status=3)
    failed = done.err.count("failed: ")
    assert 0 < failed < 60 - len(site.objects())
    assert "SlowDown" in done.err.splitlines()[-1]
    assert len(site.proxy.of("PUT")) < 60
    objects = site.objects()
    assert objects and set(objects) < set(before)
    assert before == site.files() | {path: before[path] for path in objects}
    site.sync("--delete")
    assert site.objects() == before
    assert site.files() == {}


@QUICKLY
def test_objects_that_may_not_be_read_keep_nothing_else_from_being_sent_and_freed(site: MediaSite) -> None:
    unreadable = {site.add_local(f"Aaaa{index:02}media") for index in range(45)}
    last = site.add_local("ZzzzMedia")
    site.write_homeserver_yaml()
    before = site.files()
    site.sync()
    new = site.add_local("ZzzzNewMedia")
    with site.proxy.refuse(403, "AccessDenied", lambda request: gets(request) and request.key in unreadable):
        done = site.sync("--delete", "--verify", "full", status=1)
    assert done.err.count("failed: ") == done.values["failed"] == len(unreadable)
    assert site.files() == {path: before[path] for path in sorted(unreadable)}
    assert {last, new} < set(site.objects())


@pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend"),
    [
        pytest.param("minio", "sqlite", "minio", marks=pytest.mark.servers),
        pytest.param("minio", "sqlite", "boto3", marks=pytest.mark.servers),
    ],
    indirect=["s3_server", "synapse_database"],
)
def test_wrong_credentials_are_3_and_one_line(site: MediaSite) -> None:
    before = site.add_some(3)
    site.update()
    site.environment = {"AWS_SECRET_ACCESS_KEY": "not-the-right-secret"}
    site.secrets.append("not-the-right-secret")
    refused = site.upload("--delete", status=3)
    assert "SignatureDoesNotMatch" in refused.err and refused.err.count("\n") == 1
    site.environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert "credentials" in site.upload("--delete", status=3).err
    assert site.files() == before


@QUICKLY
def test_database_out_of_reach_is_3(site: MediaSite) -> None:
    before = site.add_some(1)
    site.update()
    (site.directory / "database.yaml").write_text("sqlite: {database: nowhere.db}")
    assert "nowhere.db" in site.run("update-db", "1d", status=3).err
    assert "nowhere.db" in site.upload("--delete", status=3).err
    assert site.files() == before


POSTGRES = pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend"),
    [pytest.param("minio", "postgres", "minio", marks=pytest.mark.servers)],
    indirect=["s3_server", "synapse_database"],
)


@POSTGRES
def test_arguments_of_the_database_with_the_media_tables_reach_the_driver(site: MediaSite) -> None:
    before = site.add_some(3)
    settings = site.homeserver_settings()
    main = {"data_stores": ["main"], **settings.pop("database")}
    state = {"data_stores": ["state"], "name": "psycopg2", "args": {"dbname": "nowhere"}}

    def write(**arguments: object) -> None:
        databases = {"one": state, "two": {**main, "args": main["args"] | arguments}}
        (site.directory / "homeserver.yaml").write_text(yaml.safe_dump({**settings, "databases": databases}))

    write(sslmode="disable")
    site.sync("--delete")
    assert site.objects() == before
    # The test server has no TLS.
    write(sslmode="require")
    assert "SSL" in site.sync(status=3).err


@QUICKLY
def test_cache_db_that_is_none_is_3(site: MediaSite) -> None:
    (site.directory / "text").write_text("this is no database, but long enough to be taken for one" * 20)
    (site.directory / "directory").mkdir()
    commands = [["write"], ["check-deleted", "store"], ["upload", "store", site.bucket]]
    names = ("text", "directory", "no/such/place")
    for refused in site.run_each([[*command, "--cache-db", name] for command in commands for name in names]):
        assert refused.status == 3, str(refused)
        assert any(name in refused.err for name in names) and refused.err.count("\n") == 1
        assert refused.out == ""


@QUICKLY
def test_full_disk_for_cache_db_is_3_and_harms_nothing(site: MediaSite) -> None:
    before = site.add_some(10, size=10)
    site.write_homeserver_yaml()
    rows = ({"media_id": f"Filler{index:020}", "media_type": "x", "media_length": 1} for index in range(1000))
    site.database.insert("local_media_repository", ({**row, "created_ts": 1000} for row in rows))

    def limit() -> None:
        # The tables alone fit, what is to be written into them does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = site.run_script("sync", "--older-than", "0d", "--delete", status=3, preexec_fn=limit)
    assert "cache.db" in full.err and full.err.count("\n") == 1
    assert site.files() == before
    site.sync("--delete")
    assert site.objects() == before


@QUICKLY
def test_disk_of_cache_db_that_gets_full_is_3_and_the_next_run_finishes(site: MediaSite, small_disk: Path) -> None:
    before = site.add_some(10, size=10)
    site.write_homeserver_yaml()
    fill_disk(small_disk, leave=100_000)
    rows = ({"media_id": f"Filler{index:020}", "media_type": "x", "media_length": 1} for index in range(2000))
    site.database.insert("local_media_repository", ({**row, "created_ts": 1000} for row in rows))
    options = ("--delete", "--cache-db", small_disk / "cache.db")
    full = site.sync(*options, status=3)
    assert "its disk is full" in full.err and full.err.count("\n") == 1
    assert site.files() == before
    (small_disk / "filler").unlink()
    site.sync(*options)
    assert site.objects() == before
    assert site.files() == {}


@QUICKLY
def test_full_disk_of_the_media_store_is_freed(site: MediaSite, small_disk: Path) -> None:
    site.store.rmdir()
    site.store.symlink_to(small_disk)
    before = site.add_some(3)
    site.write_homeserver_yaml()
    site.sync()
    MediaStore(small_disk).set_offloaded_before(0)
    fill_disk(small_disk, leave=0)
    assert site.sync("--delete").values["deleted_files"] == len(before)


def fill_disk(disk: Path, leave: int) -> None:
    """Use a disk up but for so many bytes."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - leave))


@QUICKLY
def test_output_that_cannot_be_written_is_told(site: MediaSite) -> None:
    (site.store / "local_content").mkdir()
    make_old_cache(site, *(("", f"Media{index:06}", f"Media{index:06}", "local", False) for index in range(3000)))
    assert "No space left" in site.run("write", "/dev/full", status=3).err
    with Path("/dev/full").open("w") as full:
        assert "No space left" in site.run_script("write", status=3, stdout=full).err
        assert "No space left" in site.run_script("check-deleted", "store", status=3, stdout=full).err
    process = site.start_script("write")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert "closed" in site.finish(process, 1).err
    with Path("/dev/full").open("w") as full:
        assert "No space left" in site.run_script("--help", status=3, stdout=full).err


@QUICKLY
@pytest.mark.parametrize(
    ("arguments", "status"), [("write", 0), ("--help", 0), ("nonsense", 2)], ids=["result", "help", "error"]
)
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"], ids=["out", "both"])
def test_output_may_be_closed_from_the_start(site: MediaSite, arguments: str, status: int, closed: str) -> None:
    make_old_cache(site, ("", "Media000001", "Media000001", "local", False))
    shell = ["sh", "-c", f'exec "$0" -W error "$1" {arguments} {closed}', sys.executable, str(SCRIPT)]
    done = subprocess.run(shell, cwd=site.directory, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)


@QUICKLY
def test_json_is_one_line_and_the_only_output(site: MediaSite) -> None:
    before = site.add_some(3)
    site.write_homeserver_yaml()
    done = site.sync("--delete")
    assert done.err == ""
    assert done.values == {
        "media": 3,
        "uploaded_media": 3,
        "uploaded_files": len(before),
        "uploaded_bytes": sum(map(len, before.values())),
        "replaced": 0,
        "deleted_media": 3,
        "deleted_files": len(before),
        "deleted_bytes": sum(map(len, before.values())),
        "kept": 0,
        "failed": 0,
        "proofs": {"put": len(before)},
    }
    restored = site.run("restore", "--all", "--json")
    assert restored.values == {
        "restored_files": len(before),
        "restored_bytes": sum(map(len, before.values())),
        "missing": 0,
        "failed": 0,
    }
    _, _, told = (ROOT / "README.md").read_text().partition("With `--json`")
    of_upload, _, of_restore = told.partition("\n\n")[0].partition("of `restore`")
    assert re.findall("`([a-z_]+)`", of_upload) == [*done.values, "etag", "put", "read", "size"]
    assert re.findall("`([a-z_]+)`", of_restore) == list(restored.values)


@QUICKLY
def test_progress_is_shown_on_a_terminal_only(site: MediaSite) -> None:
    site.add_some(3)
    site.update()
    seen: list[str] = []
    for _ in ("on a terminal", "into a pipe"):
        own, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        place = ("upload", "store", site.bucket, "--endpoint-url", site.endpoint)
        is_terminal = not seen
        process = site.start_script(*place, **({"stderr": terminal} if is_terminal else {}))
        os.close(terminal)
        out, err = process.communicate(timeout=PATIENCE)
        seen.append(os.read(own, 1 << 16).decode() if is_terminal else err)
        os.close(own)
        assert process.returncode == 0, seen
        assert out.splitlines()[0].startswith("Uploaded"), out
    assert "3/3" in seen[0] and seen[1] == ""


# --- starting ---


def test_starts_without_synapse_and_twisted() -> None:
    program = (
        "import sys, storage_provider.cli, storage_provider.offload, storage_provider.restoring;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('synapse', 'twisted', 'boto3', 'minio')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_script_can_be_run_as_it_is() -> None:
    script = ROOT / "scripts" / "s3_media_upload"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().startswith("#!/usr/bin/env python3\n")

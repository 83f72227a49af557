"""What Synapse does and logs from its start to its end: the settings, the check of the bucket, the secrets."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.provider.conftest import REAL, OpenSite
from tests.provider.fault_proxy import everything, gets, puts
from tests.provider.homeserver import ROOT
from tests.provider.site import Site, Task, eventually

# --- settings ---

WRONG_SETTINGS: list[tuple[dict[str, Any], str, str]] = [
    ({"buckte": "x"}, "buckte", "did you mean 'bucket'"),
    ({"threadpool_size": "many"}, "threadpool_size", "integer"),
    ({"local_cache": {"max_age": "10m"}}, "local_cache.max_age", "at least 1h"),
]


@pytest.mark.parametrize(("wrong", "path", "words"), WRONG_SETTINGS, ids=[path for _, path, _ in WRONG_SETTINGS])
def test_a_wrong_setting_ends_synapse_with_its_name_and_a_remedy(
    open_site: OpenSite, wrong: dict[str, Any], path: str, words: str
) -> None:
    site = open_site("minio", storage=wrong, start=False)
    printed = site.homeserver.fail_to_start()
    assert f"media_storage_providers.<item 0>.config.{path}" in printed
    assert words in printed
    assert "Traceback" not in printed


def test_a_provider_without_a_config_block_is_told_what_is_missing(open_site: OpenSite) -> None:
    site = open_site("minio", start=False, proxy=False)
    del site.homeserver.config["media_storage_providers"][0]["config"]
    printed = site.homeserver.fail_to_start()
    assert "media_storage_providers.<item 0>.config.bucket" in printed
    assert "Traceback" not in printed


def test_misplaced_settings_are_ignored_with_an_error_line_each(open_site: OpenSite) -> None:
    misplaced = {"store_local": True, "media_retention": {"enabled": True}}
    site = open_site("minio", storage=misplaced)
    for name, place in [("store_local", "beside `module`"), ("media_retention", "local_cache: {max_age: …}")]:
        line = site.wait_for_log(f"Ignored in the config .*{name}")
        assert " ERROR " in line
        assert place in line
    site.serves_others()


def test_an_older_synapse_is_told_to_be_upgraded(open_site: OpenSite, tmp_path: Path) -> None:
    # Python runs it first; it takes away what older releases lack.
    (tmp_path / "sitecustomize.py").write_text(
        "import synapse.media._base, synapse.module_api\n"
        "del synapse.media._base.ConsumerRequestedStopError, synapse.module_api.ModuleApi.defer_to_threadpool\n"
    )
    site = open_site("minio", start=False, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    printed = site.homeserver.fail_to_start()
    assert "needs Synapse 1.140 or later; please upgrade Synapse" in printed
    assert "Traceback" not in printed


# --- the check of the bucket ---


def restart(site: Site, **changes: Any) -> None:
    assert site.homeserver.stop() == 0
    site.homeserver.storage.update(changes)
    site.mark_log()
    site.homeserver.start()


@pytest.mark.parametrize("backend", REAL)
def test_a_missing_bucket_and_wrong_credentials_are_told_in_words_and_no_file_seems_to_be_missing(
    open_site: OpenSite, backend: str
) -> None:
    site = open_site(backend, "minio")
    media_id = site.upload_and_lose(b"content")
    restart(site, bucket="no-such-bucket")
    assert " ERROR " in site.wait_for_log("There is no bucket 'no-such-bucket' at http://.*create it")
    assert site.homeserver.download(media_id).status >= 500
    restart(site, bucket=site.bucket, secret_access_key="wrong-secret-access-key")
    assert " ERROR " in site.wait_for_log("refuses the credentials for bucket .*correct `access_key_id`")
    assert site.homeserver.download(media_id).status >= 500
    assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain").status >= 500
    assert "wrong-secret-access-key" not in site.homeserver.log


@pytest.fixture(scope="module")
def prefixed_site(open_lasting_site: OpenSite) -> tuple[Site, str]:
    """A site whose prefix is joined raw, with a file in the bucket and not on disk."""
    storage = {"prefix": "media", "raw_prefix": True, "local_cache": {"read_through": False}}
    site = open_lasting_site("minio", storage=storage)
    media_id = site.homeserver.upload(b"found")
    assert site.object_keys() == [f"media{site.path(media_id)}"]
    site.homeserver.wipe_media()
    assert site.homeserver.download(media_id).body == b"found"
    return site, media_id


def test_a_prefix_that_hides_all_media_is_told_and_nothing_is_served_or_stored(
    prefixed_site: tuple[Site, str],
) -> None:
    site, media_id = prefixed_site
    restart(site, raw_prefix=False)
    line = site.wait_for_log("The media in the bucket was stored with a raw prefix.*set `raw_prefix: true`")
    assert " ERROR " in line
    assert site.homeserver.download(media_id).status == 500
    keys = site.object_keys()
    assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain").status == 500
    assert site.object_keys() == keys


def test_a_prefix_that_hides_some_media_is_told_and_the_rest_is_served(prefixed_site: tuple[Site, str]) -> None:
    site, media_id = prefixed_site
    site.client.put_object(Bucket=site.bucket, Key=f"media/{site.path(media_id)}", Body=b"other")
    restart(site, raw_prefix=False)
    line = site.wait_for_log("Some media in the bucket will not be found")
    assert " ERROR " in line
    assert site.homeserver.download(media_id).body == b"other"


@pytest.mark.parametrize("check", ["warn", "fail"])
def test_a_second_provider_with_a_raw_prefix_serves_the_rest_and_nothing_is_wrong_then(
    open_site: OpenSite, check: str
) -> None:
    site = open_site("minio", storage={"check_on_startup": check})
    first, second = site.homeserver.upload(b"with a slash"), site.homeserver.upload(b"raw")
    source = f"{site.bucket}/{site.key(second)}"
    site.client.copy_object(Bucket=site.bucket, Key=f"media{site.path(second)}", CopySource=source)
    site.client.delete_object(Bucket=site.bucket, Key=site.key(second))
    block = dict(site.homeserver.config["media_storage_providers"][0])
    block |= dict.fromkeys(("store_local", "store_remote", "store_synchronous"), False)
    block["config"] = {**block["config"], "raw_prefix": True}
    site.homeserver.config["media_storage_providers"].append(block)
    restart(site)
    site.homeserver.wipe_media()
    assert site.homeserver.download(first).body == b"with a slash"
    assert site.homeserver.download(second).body == b"raw"
    site.serves_others()
    assert site.object_keys("medialocal") == [f"media{site.path(second)}"]
    assert site.trouble() == []


@pytest.mark.parametrize("reads_through", [True, False])
def test_while_the_bucket_is_down_at_the_start_media_of_the_other_spelling_is_neither_missed_nor_left_behind(
    open_site: OpenSite, reads_through: bool
) -> None:
    site = open_site("minio", storage={"raw_prefix": True, "local_cache": {"read_through": reads_through}})
    lost, on_disk = site.homeserver.upload(b"lost"), site.homeserver.upload(b"on disk")
    (site.homeserver.media_store / site.path(lost)).unlink()
    keys = site.object_keys()
    with site.proxy.drop(everything):
        restart(site, raw_prefix=False)
        assert " ERROR " in site.wait_for_log("Until the bucket tells whether a slash follows `prefix`")
        assert site.homeserver.download(on_disk).body == b"on disk"
        for _ in range(2):
            assert site.homeserver.download(lost).status == 502
            assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"new", "text/plain").status == 502
    assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"new", "text/plain").status == 500
    assert " ERROR " in site.wait_for_log("The media in the bucket was stored with a raw prefix")
    assert site.homeserver.download(lost).status == 500
    assert site.object_keys() == keys


def test_an_upload_that_comes_before_the_bucket_has_told_of_its_prefix_waits_for_that(open_site: OpenSite) -> None:
    site = open_site("minio", start=False)
    with site.proxy.hold(everything, times=1) as held:
        site.homeserver.start()
        held.wait()
        upload = Task(lambda: site.homeserver.upload(b"early"))
        eventually("it is on the disk", (site.homeserver.media_store / "local_content").exists)
        assert not any(map(puts, site.proxy.requests))
    assert site.content(site.key(upload.result())) == b"early"
    assert site.trouble() == []


def test_a_check_that_hangs_does_not_keep_the_homeserver_from_ending(open_site: OpenSite) -> None:
    site = open_site("minio", start=False)
    with site.proxy.hold(everything) as held:
        site.homeserver.start()
        held.wait()
        assert site.homeserver.stop() == 0


def test_a_raw_prefix_that_is_set_is_taken_as_it_is(prefixed_site: tuple[Site, str]) -> None:
    site, media_id = prefixed_site
    restart(site, raw_prefix=True)
    assert site.homeserver.download(media_id).body == b"found"
    assert site.trouble() == []


@pytest.mark.parametrize(
    ("backend", "face"), [("minio", "moto"), pytest.param("boto3", "swift", marks=pytest.mark.servers)]
)
def test_an_encryption_key_that_the_server_ignores_is_told_and_nothing_is_sent(
    open_site: OpenSite, backend: str, face: str
) -> None:
    encryption = {"sse_customer_key": base64.b64encode(os.urandom(32)).decode(), "allow_insecure_sse": True}
    site = open_site(backend, face, storage=encryption)
    line = site.wait_for_log("does not encrypt with `sse_customer_key`, so no media is sent there")
    assert " ERROR " in line
    assert site.homeserver.request("POST", "/_matrix/media/v3/upload", b"content", "text/plain").status >= 500
    assert [path for path in site.homeserver.local_files() if ".s3_storage_provider" not in path.parts] == []
    assert site.object_keys() == []


def test_with_fail_a_missing_bucket_keeps_synapse_from_starting(open_site: OpenSite) -> None:
    site = open_site("minio", storage={"bucket": "no-such-bucket", "check_on_startup": "fail"}, start=False)
    assert "There is no bucket 'no-such-bucket'" in site.homeserver.fail_to_start()
    assert " ERROR " in site.wait_for_log("Media storage: There is no bucket 'no-such-bucket'")


def test_with_fail_a_bucket_that_is_well_lets_synapse_start(open_site: OpenSite) -> None:
    site = open_site("minio", storage={"check_on_startup": "fail"})
    assert site.proxy.requests
    site.serves_others()
    assert site.trouble() == []


@pytest.mark.parametrize("off", ["off", False])
def test_with_off_nothing_is_asked(open_site: OpenSite, off: object) -> None:
    site = open_site("minio", storage={"check_on_startup": off})
    assert site.proxy.requests == []
    media_id = site.homeserver.upload(b"content")
    assert [request.method for request in site.proxy.requests] == ["PUT"]
    assert site.homeserver.download(media_id).body == b"content"


def test_a_bucket_that_does_not_answer_does_not_delay_the_start(open_site: OpenSite) -> None:
    site = open_site("minio", start=False)
    with site.proxy.hold(everything) as held:
        site.homeserver.start()
        held.wait()
        assert site.homeserver.request("GET", "/_matrix/client/v3/account/whoami").status == 200
        assert site.proxy.in_flight == 1  # the check still waits
    site.serves_others()


def test_a_bucket_that_is_down_is_told_in_words_and_used_once_it_is_up(open_site: OpenSite) -> None:
    site = open_site("minio", start=False)
    with site.proxy.drop(everything):
        site.homeserver.start()
        assert " ERROR " in site.wait_for_log("does not answer as it should: is `endpoint_url` right")
    site.serves_others()


# --- the log ---


@pytest.mark.parametrize("backend", REAL)
def test_no_secret_is_logged_at_debug_level(open_site: OpenSite, backend: str) -> None:
    site = open_site(backend, "minio-https", proxy=False, start=False, log_level="DEBUG")
    temporary = temporary_credentials(site)
    key = os.urandom(32)
    encoded = base64.b64encode(key).decode()
    site.homeserver.storage.update(temporary | {"sse_customer_key": encoded})
    site.homeserver.start()
    media_id = site.homeserver.upload(os.urandom(9 << 20))
    site.homeserver.wipe_media()
    assert site.homeserver.download(media_id).status == 200
    eventually("it is on the disk again", (site.homeserver.media_store / site.path(media_id)).exists)
    site.client.delete_object(Bucket=site.bucket, Key=site.key(media_id))
    site.homeserver.wipe_media()
    assert site.homeserver.download(media_id).status == 404
    site.homeserver.stop()
    logged = site.homeserver.log + site.homeserver.stderr
    assert "storage_provider" in logged
    assert " DEBUG " in logged
    md5 = base64.b64encode(hashlib.md5(key, usedforsecurity=False).digest()).decode()
    for name, secret in {**temporary, "sse": encoded, "sse_md5": md5, "raw": str(key), "hex": key.hex()}.items():
        lines = [line[:200] for line in logged.splitlines() if secret in line]
        assert not lines, (name, len(lines), lines[:3])


def temporary_credentials(site: Site) -> dict[str, str]:
    client = boto3.client(
        "sts",
        endpoint_url=site.server.endpoint,
        verify=site.server.ca_file,
        region_name=site.server.region,
        aws_access_key_id=site.server.access_key,
        aws_secret_access_key=site.server.secret_key,
    )
    try:
        given = client.assume_role(RoleArn="arn:aws:iam::000000000000:role/ignored", RoleSessionName="test")
    finally:
        client.close()
    return {
        "access_key_id": given["Credentials"]["AccessKeyId"],
        "secret_access_key": given["Credentials"]["SecretAccessKey"],
        "session_token": given["Credentials"]["SessionToken"],
    }


def test_one_line_tells_what_is_switched_on_and_none_tells_of_single_files(open_site: OpenSite) -> None:
    site = open_site("minio")
    eventually("the bucket is checked", lambda: bool(site.proxy.requests))
    for _ in range(3):
        site.serves_others()
    ours = re.compile(r" (storage_provider|backends|s3_storage_provider)\.?\S* \d+ (?!DEBUG)")
    lines = [line for line in site.homeserver.log.splitlines() if ours.search(line)]
    assert len(lines) == 1
    assert " INFO " in lines[0]
    for word in (repr(site.bucket), site.proxy.url, "minio", "prefix 'media/'", "no SSE-C"):
        assert word in lines[0]
    assert "certificate" not in lines[0]
    assert site.server.secret_key not in lines[0]
    assert site.server.access_key not in lines[0]


def test_the_line_tells_that_the_certificate_is_not_checked(open_site: OpenSite) -> None:
    https = {"endpoint_url": "https://127.0.0.1:1", "verify": False, "check_on_startup": "off"}
    site = open_site("minio", storage=https)
    assert " INFO " in site.wait_for_log("Media storage: bucket .*certificate not checked")


# --- the end ---


def test_an_idle_homeserver_ends_cleanly(open_site: OpenSite) -> None:
    site = open_site("minio")
    site.serves_others()
    assert site.homeserver.stop() == 0
    assert site.trouble() == []


@pytest.mark.parametrize("backend", ["minio", "boto3"])
def test_downloads_that_are_under_way_do_not_keep_the_homeserver_from_ending(open_site: OpenSite, backend: str) -> None:
    site = open_site(backend)
    paused, hung = (site.homeserver.upload(os.urandom(24 << 20)) for _ in range(2))
    site.homeserver.wipe_media()
    with site.reader(paused, receive_buffer=4096):
        site.proxy.wait_for(lambda requests: sum(map(gets, requests)) == 1)
        with (
            site.proxy.hold(lambda request: request.offset > 0) as held,
            site.proxy.cut(at=5 << 20, times=1, matches=lambda request: request.key.endswith(site.path(hung))),
        ):
            hanging = Task(lambda: site.homeserver.download(hung))
            held.wait()
            # Of the two, one is paused by its client and the other waits for the bucket.
            assert site.homeserver.stop() == 0
            with pytest.raises((OSError, http.client.IncompleteRead)):
                hanging.result()


# --- deletion ---


@pytest.fixture(scope="module", params=["minio", "boto3"])
def deleting_site(request: pytest.FixtureRequest, open_lasting_site: OpenSite) -> Site:
    modules = [{"module": "tests.provider.probe.Probe", "config": {"spam": "unused"}}]
    return open_lasting_site(request.param, settings={"modules": modules})


def test_delete_removes_the_object(deleting_site: Site) -> None:
    site = deleting_site
    media_id = site.upload_and_lose(b"content")
    for _ in range(2):  # what is not there counts as removed
        assert site.homeserver.request("POST", f"/_test/delete?path={site.path(media_id)}").status == 200
        assert not site.holds(media_id)
    assert site.homeserver.download(media_id).status == 404
    assert site.trouble() == []


def test_delete_keeps_the_object_where_the_settings_say_so(deleting_site: Site) -> None:
    site = deleting_site
    media_id = site.upload_and_lose(b"content")
    restart(site, delete_from_bucket=False)
    assert site.homeserver.request("POST", f"/_test/delete?path={site.path(media_id)}").status == 200
    assert site.homeserver.download(media_id).body == b"content"

"""Sending media and deleting files: nothing is lost, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from backends import open_backend
from backends.base import Backend, ObjectInfo, ObjectReader
from backends.errors import ObjectArchived
from storage_provider import candidates
from storage_provider.bandwidth import Bandwidth
from storage_provider.cache_db import CacheDb, Proof
from storage_provider.failures import Failed
from storage_provider.media_paths import MEDIA_ROOTS, Media
from storage_provider.media_store import MediaStore
from storage_provider.media_walk import MediaOnDisk, Unreadable, media_on_disk
from storage_provider.offload import Offload
from storage_provider.offload_events import Deleted, Event, Kept, Uploaded
from storage_provider.proofs import Verify
from storage_provider.settings import ProviderSettings
from storage_provider.synapse_db import connect
from tests.jobs.command_server import ForkedRun
from tests.jobs.conftest import SynapseDatabase
from tests.jobs.media_site import (
    ENCRYPTED,
    EVERYWHERE,
    PATIENCE,
    QUICKLY,
    WIDELY,
    MediaSite,
    heads,
    lists,
    now_ms,
    open_site,
)
from tests.jobs.memory_backend import MemoryBackend
from tests.provider.fault_proxy import gets, puts
from tests.servers import S3Server, minio_server

SSE_KEY = "0123456789abcdefABCDEF0123456789"
USED = "UPDATE local_media_repository SET last_access_ts = ? WHERE media_id = ?"


@pytest.fixture
def site(tmp_path: Path, s3_server: S3Server, synapse_database: SynapseDatabase, backend: str) -> Iterator[MediaSite]:
    with open_site(tmp_path, s3_server, synapse_database, backend) as site:
        site.write_homeserver_yaml()
        yield site


def offloaded_before(site: MediaSite) -> int | None:
    return MediaStore(site.store).offloaded_before()


def offloaded(
    site: MediaSite, bucket: Backend, *, stop: threading.Event | None = None, verify: Verify = Verify.PROOF
) -> list[Event]:
    """What a run that deletes comes to with a bucket in memory, one file at a time."""
    site.update()
    stop = stop or threading.Event()
    with CacheDb(site.directory / "cache.db") as cache, connect(site.database.arguments) as database:
        job = Offload(
            bucket,
            MediaStore(site.store),
            cache,
            database,
            Bandwidth(None, stop),
            stop.is_set,
            workers=1,
            delete=True,
            verify=verify,
            unused_before=cache.unused_before,
        )
        return list(job.run())


def proofs(events: list[Event]) -> list[str]:
    """How what was deleted had been proved."""
    return [event.proof for event in events if isinstance(event, Deleted)]


def failures(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Failed)]


# --- where file and object differ ---


@EVERYWHERE
def test_right_file_replaces_a_wrong_object_before_it_goes(site: MediaSite) -> None:
    shortened, emptied, other = (site.add_local(f"{name}Media") for name in ("Short", "Empty", "Other"))
    thumbnail = site.add_thumbnail(Media("", "OtherMedia"), "OtherMedia", "32-32-image-png-crop", b"t" * 50)
    before = site.files()
    site.put(shortened, before[shortened][:100])
    site.put(emptied, b"")
    site.put(other, bytes(len(before[other])))
    site.put(thumbnail, b"t" * 49)
    done = site.sync("--delete")
    assert done.values["replaced"] == 4
    for path in before:
        assert f"replaced: {path}: " in done.err
    assert site.objects() == before
    # What is of the same size shows only when it is proved, and what replaces it is proved by the next run.
    assert site.files() == {other: before[other]}
    assert site.sync("--delete").values["proofs"] == {"put": 1}
    assert site.files() == {}
    assert site.objects() == before


@EVERYWHERE
def test_damaged_file_never_replaces_the_object_and_is_not_deleted(site: MediaSite) -> None:
    before = {path: content for name in ("Short", "Other") for path, content in [(site.add_local(f"{name}Media"), b"")]}
    shortened, other = before
    whole = site.files()
    for path, content in whole.items():
        site.put(path, content)
    site.write(shortened, whole[shortened][:-1])
    site.write(other, bytes(len(whole[other])))
    damaged = site.files()
    done = site.sync("--delete", status=1)
    for path in whole:
        assert f"failed: {path}: the file is damaged, the object is whole" in done.err
    assert site.files() == damaged
    assert site.objects() == whole


@QUICKLY
def test_what_cannot_be_decided_is_left_alone_and_reported(site: MediaSite) -> None:
    unknown = site.add_local("NoSha256Media", b"a" * 50, sha256=None)
    neither = site.add_local("NeitherMedia", b"b" * 50, media_length=7)
    thumbnail = site.add_thumbnail(Media("", "NoSha256Media"), "NoSha256Media", "32-32-image-png-crop", b"c" * 50)
    for path in (unknown, thumbnail):
        site.put(path, b"x" * 50)
    site.put(neither, b"x" * 51)
    files, objects = site.files(), site.objects()
    done = site.sync("--delete", status=1)
    assert done.err.count("both could be right by Synapse's database") == 2
    assert done.err.count("neither is right by Synapse's database") == 1
    assert (site.files(), site.objects()) == (files, objects)


@QUICKLY
def test_a_file_that_is_just_being_uploaded_is_left_to_synapse(site: MediaSite) -> None:
    """Its row may be a day old by then, where the client asked for the media id first."""
    site.add_local("AwaitedMedia", media_length=None, sha256=None)
    before = site.files()
    site.sync("--delete")
    assert (site.files(), site.objects()) == (before, {})


@QUICKLY
def test_where_neither_size_is_right_nothing_is_read(site: MediaSite, monkeypatch: pytest.MonkeyPatch) -> None:
    neither = site.add_local("NeitherMedia", b"a" * 50, media_length=7)
    thumbnail = site.add_thumbnail(Media("", "NeitherMedia"), "NeitherMedia", "32-32-image-png-crop", b"c" * 50)
    site.write(thumbnail, b"c" * 49)
    before = site.files()
    bucket = MemoryBackend()
    bucket.objects = dict.fromkeys((neither, thumbnail), b"x" * 51)

    def read(_store: MediaStore, path: str) -> BinaryIO:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(MediaStore, "open", read)
    expected = ["file and object differ, and neither is right by Synapse's database"] * len(before)
    assert failures(offloaded(site, bucket)) == expected
    assert bucket.made("open") == []
    assert site.files() == before


@QUICKLY
def test_without_a_database_nothing_is_replaced(site: MediaSite) -> None:
    path = site.add_local("ShortMedia")
    site.update()
    site.put(path, b"x")
    (site.directory / "homeserver.yaml").unlink()
    assert f"failed: {path}: file and object differ; only" in site.upload(status=1).err
    assert site.proxy.of("GET") == []
    assert site.objects() == {path: b"x"}


# --- a bucket that does not keep what it acknowledges ---


@QUICKLY
def test_store_that_keeps_a_part_of_what_is_sent_costs_no_file(site: MediaSite) -> None:
    before = site.add_some(3)
    with site.proxy.shorten():
        done = site.sync("--delete", status=1)
    assert done.err.count("the object is not what was sent") == len(before)
    assert site.files() == before
    assert done.values["deleted_files"] == 0
    again = site.sync("--delete")
    assert again.values["replaced"] == len(before)
    assert site.objects() == before
    assert site.files() == {}


@QUICKLY
def test_store_that_keeps_nothing_costs_no_file(site: MediaSite) -> None:
    before = site.add_some(3)
    with site.proxy.swallow():
        done = site.sync("--delete", status=1)
    assert done.err.count("the object is not in the bucket, though it was sent") == len(before)
    assert site.files() == before


@QUICKLY
def test_listing_that_lags_behind_costs_a_request_for_each_object_and_no_failure(site: MediaSite) -> None:
    replaced = site.add_local("ShortMedia")
    before = site.add_some(3)

    class Lagging(MemoryBackend):
        """Lists what was there at first."""

        def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
            if replaced.startswith(prefix) and replaced > start_after:
                yield self._info(replaced, b"short")

    bucket = Lagging()
    bucket.objects[replaced] = b"short"
    events = offloaded(site, bucket)
    assert failures(events) == []
    assert proofs(events) == ["put"] * len(before)
    assert set(bucket.made("stat")) == set(before)
    # Some of them also before they were sent, as the listing lacked them.
    assert len(bucket.made("stat")) <= len(before) + 3 * len(MEDIA_ROOTS)
    assert bucket.objects == before
    assert site.files() == {}


# --- files and rows that change meanwhile ---


@QUICKLY
def test_file_that_changes_while_it_is_sent_stays(site: MediaSite) -> None:
    path = site.add_local("ChangingMedia")
    site.add_local("CalmMedia")
    with site.proxy.hold(lambda request: puts(request) and request.key == path) as held:
        process = site.start("sync", "--older-than", "0d", "--delete")
        held.wait()
        site.write(path, b"new")
        held.release()
        done = site.finish(process, 1)
    assert f"failed: {path}: it changed while it was sent" in done.err
    assert site.files() == {path: b"new"}


@WIDELY
def test_media_that_is_used_or_gone_meanwhile_is_kept(site: MediaSite) -> None:
    used, gone = site.add_local("UsedMedia"), site.add_local("GoneMedia")
    site.add_local("OtherMedia")
    before = site.files()
    with site.proxy.hold(puts) as held:
        process = site.start("sync", "--older-than", "0d", "--delete", "--json")
        held.wait()
        site.database.execute(USED, (now_ms() + 60_000, "UsedMedia"))
        site.database.execute("DELETE FROM local_media_repository WHERE media_id = ?", ("GoneMedia",))
        held.release()
        done = site.finish(process)
    assert done.values["kept"] == 2
    assert site.files() == {path: before[path] for path in (used, gone)}
    assert site.objects() == before


@EVERYWHERE
def test_kill_at_any_moment_loses_nothing(site: MediaSite) -> None:
    before = site.add_some(30, size=200)
    for requests in (2, site.random.randint(3, 12), site.random.randint(13, 30), len(before) + 2):
        site.proxy.forget()
        process = site.start("sync", "--older-than", "0d", "--delete", "--workers", "2")
        deadline = time.monotonic() + PATIENCE
        # After the last request comes the deleting, which nothing but the files tells of.
        while process.poll() is None and len(site.proxy.requests) < requests and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        site.proxy.wait_until_idle()
        objects = site.objects()
        assert objects.items() <= before.items()
        assert site.files() | objects == before
    site.sync("--delete")
    assert site.files() == {}
    assert site.objects() == before


@QUICKLY
def test_kill_while_files_are_deleted_loses_nothing(site: MediaSite) -> None:
    before = site.add_some(60, size=10)
    directory = site.store / "local_content" / "Lo" / "ca"

    def left() -> int:
        # It may be removed at any moment.
        with suppress(FileNotFoundError):
            return len(list(directory.iterdir()))
        return 0

    for part in (0.9, 0.5):
        process = site.start("sync", "--older-than", "0d", "--delete")
        while process.poll() is None and left() > 40 * part:
            pass
        process.kill()
        process.communicate()
        assert site.files() | site.objects() == before
        assert site.objects().items() <= before.items()
    site.sync("--delete")
    assert site.files() == {}
    assert site.objects() == before


# --- proofs ---


def put_in_parts(site: MediaSite, key: str, parts: list[bytes]) -> None:
    where: Any = {"Bucket": site.bucket, "Key": key}
    upload = site.client.create_multipart_upload(**where)["UploadId"]
    etags = [
        site.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate(parts, 1)
    ]
    listed: Any = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    site.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": listed})


@QUICKLY
def test_what_others_sent_is_proved_by_its_checksum_without_reading(site: MediaSite) -> None:
    before = site.add_some(3)
    in_parts = site.add_local("InPartsMedia", site.content((5 << 20) + 100))
    for path, content in before.items():
        site.put(path, content)
    content = site.files()[in_parts]
    put_in_parts(site, in_parts, [content[: 5 << 20], content[5 << 20 :]])
    files = site.files()
    done = site.sync("--delete")
    assert done.values["proofs"] == {"etag": len(before) + 1}
    assert site.proxy.of("GET", "PUT") == []
    assert sorted(request.key for request in site.proxy.of("HEAD")) == sorted(files)
    assert site.files() == {}


@QUICKLY
def test_what_was_read_back_is_not_read_again(site: MediaSite) -> None:
    path = site.add_local("OddPartsMedia", site.content((6 << 20) + 100))
    content = site.files()[path]
    # No usual size of parts gives this ETag.
    put_in_parts(site, path, [content[: 6 << 20], content[6 << 20 :]])
    site.update()
    # It is used while it is being proved, and so is kept.
    with site.proxy.hold(gets) as held:
        process = site.start("sync", "--older-than", "0d", "--delete", "--json")
        held.wait()
        site.database.execute(USED, (now_ms() + 60_000, "OddPartsMedia"))
        held.release()
        done = site.finish(process)
    assert done.values["kept"] == 1
    assert site.files() == {path: content}
    site.database.execute(USED, (1000, "OddPartsMedia"))
    assert "Proved before deletion: 1 by reading back" in site.upload("--delete").lines
    assert len(site.proxy.of("GET")) == 1
    assert site.files() == {}


@QUICKLY
@pytest.mark.parametrize("verify", ["proof", "full"])
def test_what_is_in_use_again_is_kept_without_reading_it(site: MediaSite, verify: str) -> None:
    # No usual size of parts gives this ETag.
    odd = site.add_local("OddPartsMedia", site.content((6 << 20) + 100))
    whole, missing = site.add_local("SomeMedia"), site.add_local("MissingMedia")
    before = site.files()
    put_in_parts(site, odd, [before[odd][: 6 << 20], before[odd][6 << 20 :]])
    site.put(whole, before[whole])
    site.update()
    for media_id in ("OddPartsMedia", "SomeMedia", "MissingMedia"):
        site.database.execute(USED, (now_ms() + 60_000, media_id))
    for _ in range(2):
        assert "Kept 3 files that are in use again or changed" in site.upload("--delete", "--verify", verify).lines
    assert site.proxy.of("GET") == []
    # The listing lacks it: is it not there?
    assert [request.key for request in site.proxy.of("HEAD")] == [missing]
    assert [request.key for request in site.proxy.of("PUT")] == [missing]
    assert site.files() == before


@QUICKLY
def test_what_is_in_use_again_is_told_once_a_file_however_it_could_be_proved(site: MediaSite) -> None:
    path = site.add_local("SomeMedia", thumbnails={"32-32-image-png-crop": b"thumbnail"})
    before = site.files()
    assert len(before) == 2
    bucket = MemoryBackend(opaque_etags=True)
    bucket.objects |= before
    site.update()
    mtime_ns = (site.store / path).stat().st_mtime_ns
    with CacheDb(site.directory / "cache.db") as cache:
        # The thumbnail has yet to be read.
        cache.record_proofs([Proof(path, "opaque", len(before[path]), mtime_ns, "read")])
    site.database.execute(USED, (now_ms() + 60_000, "SomeMedia"))
    kept = [event.path for event in offloaded(site, bucket) if isinstance(event, Kept)]
    assert sorted(kept) == sorted(before)
    assert site.files() == before


@QUICKLY
@pytest.mark.parametrize(("etag", "mtime_ns"), [("another", 1_000_000_000), ("opaque", 2_000_000_000)])
def test_what_was_read_back_takes_the_place_of_an_older_proof(site: MediaSite, etag: str, mtime_ns: int) -> None:
    path = site.add_local("SomeMedia")
    content = site.files()[path]
    os.utime(site.store / path, ns=(0, 1_000_000_000))
    bucket = MemoryBackend(opaque_etags=True)
    bucket.objects[path] = content
    with CacheDb(site.directory / "cache.db") as cache:
        cache.record_proofs([Proof(path, etag, len(content), mtime_ns, "put")])

    def use(operation: str, _key: str) -> None:
        if operation == "open":
            site.database.execute(USED, (now_ms() + 60_000, "SomeMedia"))

    bucket.before = use
    assert proofs(offloaded(site, bucket)) == []
    site.database.execute(USED, (1000, "SomeMedia"))
    assert proofs(offloaded(site, bucket)) == ["read"]
    assert bucket.made("open") == [path]
    assert site.files() == {}


@ENCRYPTED
def test_own_upload_proves_what_is_encrypted_also_in_a_later_run(site: MediaSite) -> None:
    before = site.add_some(3)
    site.write_homeserver_yaml(sse_customer_key=SSE_KEY, allow_insecure_sse=True)
    site.sync()
    later = site.add_local("LaterMedia")
    before[later] = site.files()[later]
    done = site.sync("--delete")
    assert done.values["proofs"] == {"put": len(before)}
    assert site.files() == {}
    assert site.objects(SSECustomerKey=SSE_KEY, SSECustomerAlgorithm="AES256") == before


@QUICKLY
def test_what_was_sent_before_an_early_end_is_not_read_back_by_the_next_run(site: MediaSite) -> None:
    before = site.add_some(4)
    bucket, stop = MemoryBackend(opaque_etags=True), threading.Event()
    bucket.before = lambda *_: stop.set() if len(bucket.made("put")) == 2 else None
    offloaded(site, bucket, stop=stop)
    assert len(bucket.objects) == 2
    assert site.files() == before
    assert proofs(offloaded(site, bucket)) == ["put"] * len(before)
    assert bucket.made("open") == []
    assert bucket.objects == before


@QUICKLY
def test_what_was_sent_and_found_wrong_is_not_proved_by_having_been_sent(site: MediaSite) -> None:
    path = site.add_local("SomeMedia")
    before = site.files()
    bucket = MemoryBackend(opaque_etags=True)

    def spoil(operation: str, _key: str) -> None:
        if operation == "open":
            bucket.objects[path] = bytes(len(before[path]))

    bucket.before = spoil
    assert failures(offloaded(site, bucket, verify=Verify.FULL)) == ["the object is not what was sent"]
    assert proofs(offloaded(site, bucket)) == []
    assert site.files() == before


@QUICKLY
def test_what_reading_back_has_disproved_is_not_proved_any_more_by_an_earlier_run(site: MediaSite) -> None:
    path = site.add_local("SomeMedia", sha256=None)
    before = site.files()
    bucket = MemoryBackend(opaque_etags=True)
    # It has rotted in the bucket, whose disk does not notice.
    bucket.objects[path] = bytes(len(before[path]))
    mtime_ns = (site.store / path).stat().st_mtime_ns
    with CacheDb(site.directory / "cache.db") as cache:
        cache.record_proofs([Proof(path, "opaque", len(before[path]), mtime_ns, "read")])
    differ = ["file and object differ, and both could be right by Synapse's database"]
    for verify in (Verify.FULL, Verify.PROOF):
        assert failures(offloaded(site, bucket, verify=verify)) == differ
    assert site.files() == before


@pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend"),
    [pytest.param("minio-https", "sqlite", "minio", marks=pytest.mark.servers)],
    indirect=["s3_server", "synapse_database"],
)
def test_what_others_encrypted_is_read_back(site: MediaSite) -> None:
    before = site.add_some(3)
    for path, content in before.items():
        site.client.put_object(
            Bucket=site.bucket, Key=path, Body=content, SSECustomerKey=SSE_KEY, SSECustomerAlgorithm="AES256"
        )
    site.write_homeserver_yaml(sse_customer_key=SSE_KEY)
    assert site.sync("--delete").values["proofs"] == {"read": len(before)}
    assert site.files() == {}


@QUICKLY
def test_verify_full_reads_all_and_verify_size_nothing(site: MediaSite) -> None:
    before = site.add_some(3)
    done = site.sync("--delete", "--verify", "full")
    assert done.values["proofs"] == {"read": len(before)}
    assert sorted(request.key for request in site.proxy.of("GET")) == sorted(before)
    path = site.add_local("OtherMedia", b"x" * 50)
    site.put(path, b"y" * 50)
    site.proxy.forget()
    assert site.sync("--delete", "--verify", "size").values["proofs"] == {"size": 1}
    assert site.proxy.of("GET") == []
    assert site.files() == {}


@QUICKLY
@pytest.mark.parametrize(
    ("verify", "storage_class"), [("proof", "GLACIER"), ("full", "DEEP_ARCHIVE"), ("size", "GLACIER")]
)
def test_file_whose_object_is_archived_stays(site: MediaSite, verify: str, storage_class: Any) -> None:
    archived, recorded = site.add_local("ArchivedMedia"), site.add_local("RecordedMedia")
    site.add_local("OtherMedia")
    before = site.files()
    site.put(archived, before[archived])
    site.sync()
    for path in (archived, recorded):
        site.client.put_object(Bucket=site.bucket, Key=path, Body=before[path], StorageClass=storage_class)
    done = site.sync("--delete", "--verify", verify, status=1)
    for path in (archived, recorded):
        assert f"failed: {path}: the object is archived ({storage_class})" in done.err
    assert done.values["failed"] == 2
    assert site.files() == {path: before[path] for path in (archived, recorded)}


@QUICKLY
@pytest.mark.parametrize("verify", ["proof", "full", "size"])
@pytest.mark.parametrize("storage_class", ["INTELLIGENT_TIERING", "COLD"])
def test_file_whose_object_turns_out_to_be_archived_stays(site: MediaSite, storage_class: str, verify: str) -> None:
    archived, _readable = site.add_local("ArchivedMedia"), site.add_local("ReadableMedia")
    before = site.files()

    class Tiered(MemoryBackend):
        """Tells by HEAD alone, or not before it is read, that an object cannot be."""

        def _info(self, key: str, content: bytes) -> ObjectInfo:
            info = replace(super()._info(key, content), storage_class=storage_class)
            is_asked = self.calls[-1] == ("stat", archived) and storage_class == "INTELLIGENT_TIERING"
            return replace(info, archive_status="ARCHIVE_ACCESS") if is_asked else info

        def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ObjectReader:
            if key == archived:
                raise ObjectArchived("archived", operation="open", key=key)
            return super().open(key, offset=offset, if_match=if_match)

    bucket = Tiered()
    bucket.objects |= before
    (reason,) = failures(offloaded(site, bucket, verify=Verify(verify)))
    assert "is archived" in reason
    assert site.files() == {archived: before[archived]}


@QUICKLY
def test_file_whose_object_is_archived_stays_where_listing_is_refused(site: MediaSite) -> None:
    path = site.add_local("ArchivedMedia")
    before = site.files()
    site.client.put_object(Bucket=site.bucket, Key=path, Body=before[path], StorageClass="GLACIER")
    with site.proxy.refuse(403, "AccessDenied", lists):
        assert "is archived (GLACIER)" in site.sync("--delete", status=1).err
    assert site.files() == before


@QUICKLY
def test_deletion_moves_the_stamp(site: MediaSite) -> None:
    site.add_local("FirstMedia")
    began = now_ms()
    site.sync()
    assert offloaded_before(site) is None
    site.sync("--delete")
    stamp = offloaded_before(site)
    assert stamp is not None and began <= stamp <= now_ms()


# --- what is in the store and in the database ---


@WIDELY
def test_paths_that_would_leave_the_store_are_refused(site: MediaSite) -> None:
    victim = site.directory / "victim"
    victim.write_bytes(b"not media")
    fine = site.add_local("FineMedia")
    before = site.files()
    site.database.add_remote("a.org", "up", "....../victim")
    site.database.add_remote("..", "origin", "AbcdEfgh")
    site.database.add_remote("a/../..", "slash", "AbcdEfgh")
    site.database.add_local(f"abcd{victim}")
    site.database.add_local("abcd")
    site.update()
    with closing(sqlite3.connect(site.directory / "cache.db")) as cache, cache:
        cache.execute("INSERT INTO media VALUES ('a.org', 'nul', ?, 'remote', 0)", ("Abcd\0fgh",))
    done = site.upload("--delete", status=1)
    named = [line.split(": ")[1] for line in done.err.splitlines()]
    assert sorted(named) == sorted(
        ["a.org up", "a.org nul", ".. origin", "a/../.. slash", f"local abcd{victim}", "local abcd"]
    )
    assert done.err.count(": refused: ") == len(named)
    assert victim.read_bytes() == b"not media"
    assert site.objects() == {fine: before[fine]}
    assert site.files() == {}


@QUICKLY
def test_symbolic_links_are_not_followed(site: MediaSite) -> None:
    outside = site.directory / "outside"
    (outside / "cd").mkdir(parents=True)
    (outside / "cd" / "BehindDir").write_bytes(b"outside")
    site.add_local("AbcdBehindLink")
    (site.store / "local_content/Ab/cd/BehindLink").unlink()
    (site.store / "local_content/Ab/cd/BehindLink").symlink_to(outside / "cd" / "BehindDir")
    site.database.add_local("LicdBehindDir")
    (site.store / "local_content/Li").symlink_to(outside)
    site.sync("--delete")
    assert site.objects() == {}
    assert (outside / "cd" / "BehindDir").read_bytes() == b"outside"
    assert (site.store / "local_content/Ab/cd/BehindLink").is_symlink()
    assert (site.store / "local_content/Li").is_symlink()


@QUICKLY
def test_what_is_not_a_thumbnail_is_left_alone(site: MediaSite) -> None:
    path = site.add_local("SomeMedia", thumbnails={"32-32-image-png-crop": b"t" * 50})
    temporary = site.write("local_thumbnails/So/me/Media/tmp8a7b_x2", b"half a thumb")
    before = site.files()
    site.sync("--delete")
    left = {str(temporary.relative_to(site.store)): b"half a thumb"}
    assert site.files() == left
    assert path in site.objects()
    assert site.objects() == {name: content for name, content in before.items() if name not in left}


@QUICKLY
def test_media_that_came_back_and_new_thumbnails_are_found(site: MediaSite) -> None:
    content = site.add_local("SomeMedia")
    site.sync("--delete")
    site.write(content, site.objects()[content])
    assert site.sync("--delete").values["deleted_files"] == 1
    assert site.files() == {}

    thumbnail = site.add_thumbnail(Media("", "SomeMedia"), "SomeMedia", "96-96-image-jpeg-scale", b"later")
    done = site.sync("--delete")
    assert (done.values["uploaded_files"], done.values["deleted_files"]) == (1, 1)
    assert site.objects()[thumbnail] == b"later"
    assert site.files() == {}


@WIDELY
def test_rows_gone_from_synapse_leave_cache_db(site: MediaSite) -> None:
    site.add_local("GoneMedia")
    site.add_local("HereMedia")
    site.update()
    site.database.execute("DELETE FROM local_media_repository WHERE media_id = ?", ("GoneMedia",))
    site.update()
    assert site.run("write").out == "local_content/He/re/Media\nlocal_thumbnails/He/re/Media/\n"


# --- asking the bucket ---


@WIDELY
def test_objects_are_found_by_listing_with_no_request_for_each(site: MediaSite) -> None:
    before = site.add_some(20, size=10)
    site.sync()
    assert len(site.proxy.of("PUT")) == len(before)
    assert site.proxy.of("GET") == []
    assert len(site.proxy.listings) <= 4
    # The 1st, 2nd, 4th, … of what the listing lacks.
    assert len(site.proxy.of("HEAD")) <= 5 * len(site.proxy.listings) < len(before)
    site.proxy.forget()
    site.sync()
    assert site.proxy.of("GET", "HEAD", "PUT") == []
    # One page of each of the four roots.
    assert len(site.proxy.listings) <= 4


@WIDELY
def test_object_is_asked_for_before_its_file_is_removed(site: MediaSite) -> None:
    before = site.add_some(20, size=10)
    site.sync()
    site.proxy.forget()
    site.sync("--delete")
    assert site.proxy.of("GET", "PUT") == []
    assert sorted(request.key for request in site.proxy.of("HEAD")) == sorted(before)
    assert site.files() == {}


@QUICKLY
@pytest.mark.parametrize("verify", ["proof", "full", "size"])
def test_file_whose_object_is_only_listed_stays(site: MediaSite, verify: str) -> None:
    sent, found = site.add_local("SentMedia"), site.add_local("FoundMedia")
    before = site.files()
    site.put(found, before[found])
    site.sync()
    with site.proxy.refuse(404, "NoSuchKey", lambda request: request.method in ("GET", "HEAD") and not lists(request)):
        done = site.sync("--delete", "--verify", verify, status=1)
    for path in (sent, found):
        assert f"failed: {path}: the object is not in the bucket, though it was there" in done.err
    assert site.files() == before


@QUICKLY
@pytest.mark.parametrize("new", [None, 0, 1, 2])
def test_nothing_is_sent_over_an_object_that_the_listing_lacks(site: MediaSite, new: int | None) -> None:
    # Nobody knows their SHA-256, and so that the disk has damaged them.
    paths = [site.add_local(f"Some{number}Media", sha256=None) for number in range(4)]
    bucket = MemoryBackend()
    bucket.objects |= site.files()
    for path, content in bucket.objects.items():
        site.write(path, bytes(len(content)))
    sent = []
    if new is not None:
        sent.append(paths[new])
        del bucket.objects[paths[new]]
    before = site.files()
    bucket.list = lambda prefix="", *, start_after="": iter(())  # type: ignore[method-assign]
    assert len(failures(offloaded(site, bucket))) == len(paths) - len(sent)
    assert bucket.made("put") == sent
    assert site.files() == {path: content for path, content in before.items() if path not in sent}


@pytest.mark.servers
@pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend"),
    [("minio", "sqlite", "minio"), ("minio", "sqlite", "boto3")],
    indirect=["s3_server", "synapse_database"],
)
def test_prefix_that_begins_with_a_slash_sends_nothing_twice(site: MediaSite) -> None:
    """MinIO lists nothing below it."""
    site.write_homeserver_yaml(prefix="/media")
    before = site.add_some(5, size=10)
    site.sync()
    site.proxy.forget()
    site.sync()
    assert site.proxy.of("PUT") == []
    site.sync("--delete")
    assert site.files() == {}
    assert {key.removeprefix("media/") for key in site.objects()} == set(before)


@QUICKLY
@pytest.mark.parametrize("code", ["AccessDenied", "NotImplemented"])
def test_where_listing_is_refused_objects_are_asked_for(site: MediaSite, code: str) -> None:
    before = site.add_some(4)
    with site.proxy.refuse(403 if code == "AccessDenied" else 501, code, lambda request: is_listing(request, code)):
        done = site.sync("--delete")
    assert done.values["deleted_files"] == len(before)
    assert site.proxy.of("HEAD")
    assert site.objects() == before
    assert site.files() == {}


def is_listing(request: Any, code: str) -> bool:
    # Who may list nothing is told so by the check, too.
    return lists(request) and (code == "AccessDenied" or "max-keys" not in request.query)


@pytest.mark.parametrize(
    ("s3_server", "synapse_database", "backend"),
    [pytest.param("minio", "postgres", backend, marks=pytest.mark.servers) for backend in ("minio", "boto3")],
    indirect=["s3_server", "synapse_database"],
)
def test_a_key_that_may_not_list_is_enough(site: MediaSite, s3_server: S3Server) -> None:
    before = site.add_some(4)
    user = f"user-{site.bucket}"
    objects = {"Resource": [f"arn:aws:s3:::{site.bucket}/*"], "Action": ["s3:GetObject", "s3:PutObject"]}
    secret = minio_server.add_user(s3_server, user, [{"Effect": "Allow", **objects}])
    site.write_homeserver_yaml(access_key_id=user, secret_access_key=secret)
    done = site.sync("--delete")
    assert "cannot be listed" in done.err
    assert site.objects() == before
    assert site.files() == {}


@QUICKLY
def test_refused_request_for_an_object_is_not_taken_for_a_missing_one(site: MediaSite) -> None:
    before = site.add_some(2)
    with site.proxy.refuse(403, "AccessDenied", lambda request: lists(request) or heads(request)):
        site.sync("--delete", status=1)
    assert site.objects() == {}
    assert site.files() == before


# --- bounds of a run ---


@QUICKLY
def test_limit_counts_what_was_done(site: MediaSite) -> None:
    before = site.add_some(3)
    for number in (2, 1, 0):
        assert site.sync("--limit", "2").values["uploaded_media"] == number
    assert site.objects() == before
    assert site.sync("--limit", "2", "--delete").values["deleted_media"] == 2
    assert site.sync("--limit", "2", "--delete").values["deleted_media"] == 1
    assert site.files() == {}


@QUICKLY
def test_after_the_time_budget_nothing_is_begun(site: MediaSite) -> None:
    before = site.add_some(6)
    assert site.sync("--time-budget", "0s", "--max-bandwidth", "1M").values["media"] == 0
    site.update()
    assert site.sync("--time-budget", "0s", "--max-bandwidth", "1M").values["uploaded_files"] == 0
    assert site.proxy.of("PUT") == []

    clock = [0.0]
    settings = site.homeserver_settings()["media_storage_providers"][0]["config"]

    class Slow:
        """Takes a second for each object."""

        def __init__(self, backend: Backend) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> Any:
            return getattr(self._backend, name)

        def put(self, key: str, body: BinaryIO, size: int) -> ObjectInfo:
            clock[0] += 1
            return self._backend.put(key, body, size)

    with (
        closing(open_backend(ProviderSettings.parse(settings))) as backend,
        CacheDb(site.directory / "cache.db") as cache,
        connect(site.database.arguments) as database,
    ):
        slow: Any = Slow(backend)
        store = MediaStore(site.store)
        unbound = Bandwidth(None, threading.Event())
        job = Offload(slow, store, cache, database, unbound, lambda: clock[0] >= 3, 1, delete=True)
        sent = [event for event in job.run() if isinstance(event, Uploaded)]
    assert len(sent) == 3
    assert site.files() == before
    assert site.objects().items() < before.items()


@QUICKLY
def test_stop_is_heeded_while_the_disk_is_walked(site: MediaSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2000):
        site.write(f"local_content/Ab/cd/{number:04}", b"has no row")
    site.add_local("LastMedia")
    site.database.add_local("GoneMedia")
    walked, stop = 0, threading.Event()

    def walk(store: MediaStore, *, local: bool) -> Iterator[MediaOnDisk | Unreadable]:
        nonlocal walked
        for entry in media_on_disk(store, local=local):
            walked += 1
            if walked == 100:
                stop.set()
            yield entry

    monkeypatch.setattr(candidates, "media_on_disk", walk)
    assert offloaded(site, MemoryBackend(), stop=stop) == []
    assert walked == 100


@QUICKLY
def test_second_run_is_kept_out(site: MediaSite) -> None:
    before = site.add_some(2)
    with site.proxy.hold(puts) as held:
        first = site.start("sync", "--older-than", "0d", "--delete")
        held.wait()
        second = site.run("sync", "--older-than", "0d", "--delete", status=3)
        assert second.err == "s3_media_upload: another run is under way\n" and second.out == ""
        held.release()
        site.finish(first)
    assert site.objects() == before


@WIDELY
def test_sigterm_finishes_what_is_in_flight(site: MediaSite) -> None:
    before = site.add_some(30, size=100)
    with site.proxy.hold(puts) as held:
        process = site.start("sync", "--older-than", "0d", "--delete", "--workers", "2")
        held.wait(2)
        process.send_signal(signal.SIGTERM)
        wait_until_taken(process)
        held.release()
        done = site.finish(process, 3)
    assert "Interrupted" in done.err
    objects = site.objects()
    assert 2 <= len(objects) < len(before)
    assert objects.items() < before.items()
    assert site.files() == before
    site.sync("--delete")
    assert site.objects() == before
    assert site.files() == {}


def wait_until_taken(process: ForkedRun) -> None:
    """Wait until no signal is pending for a process."""
    status = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pending = [line for line in status.read_text().splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
        if all(int(line.split()[1], 16) == 0 for line in pending):
            return
    raise TimeoutError("the signal is still pending")


@QUICKLY
def test_store_that_cannot_be_written_to_ends_in_a_sentence(site: MediaSite) -> None:
    before = site.add_some(1)
    # In the place of the directory for locks and stamps.
    (site.store / ".s3_storage_provider").write_text("")
    refused = site.run("sync", "--older-than", "0d", "--delete", status=3)
    assert ".s3_storage_provider" in refused.err and refused.err.count("\n") == 1
    (site.store / ".s3_storage_provider").unlink()
    shutil.rmtree(site.store / "local_content")
    (site.store / "local_content").symlink_to(site.directory)
    assert "symbolic link" in site.run("sync", "--older-than", "0d", "--delete", status=2).err
    assert before

"""One test for every sentence of `backends.base`, which every backend passes on every server.

A backend is tested by a subclass that names it: see `test_boto3_backend.py`. What a server cannot
do is asserted as the error that the contract promises, not skipped.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import itertools
import logging
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import pytest
from botocore.exceptions import ClientError
from urllib3.response import BaseHTTPResponse

from backends import BACKENDS, BucketSettings, open_backend, s3_backend
from backends.base import Backend, ObjectInfo
from backends.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    BucketNotFound,
    EncryptionNotApplied,
    Misconfigured,
    ObjectNotFound,
    PreconditionFailed,
    RequestRejected,
    cause_chain,
)
from backends.transport import Transport
from backends.xml import parse_listing
from tests.backends.conftest import MANY_KEYS
from tests.servers import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SERVERS = ["moto", "ministack", "minio", "minio-https", "ceph", "ceph-https", "swift"]
"""Every server that the contract is tested on."""

SSE_KEY = "0123456789abcdef0123456789ABCDEF"
OTHER_SSE_KEY = base64.b64encode(bytes(range(32))).decode()

MULTIPART_THRESHOLD = 1 << 20
MULTIPART_CHUNKSIZE = 5 << 20
# Two parts, the last of them short.
LARGE = random.Random(1).randbytes(MULTIPART_CHUNKSIZE + 12_345)
SMALL = b"The quick brown fox jumps over the lazy dog."

NOT_KEYS = ["", "/", "/a", "a/", "a//b", ".", "..", "a/./b", "a/..", "../a", "a/\ud800"]

# In byte order of UTF-8. U+FFFD and U+10000 change places where a server compares UTF-16.
NASTY_KEYS = [
    "a b/c d",
    "a!b",
    'a"quotes"',
    "a%20b",
    "a%2Fb",
    "a&amp;b",
    "a'b",
    "a+b",
    "a;b=c?d#e",
    "a<b>c",
    "a@b:8448",
    "a[::1]b",
    "a~b",
    "a\u00e9",
    "a\u4e2d\u6587",
    "a\ufffd",
    "a\U00010000",
    "a\U0001f600",
]
CONTROL_CHARACTER = "a\x01b"


class BackendContract:
    """Subclass it, and say in `name` which backend is tested."""

    name: ClassVar[str]

    @pytest.fixture
    def prefix(self) -> str:
        return f"t-{uuid.uuid4().hex[:12]}"

    @pytest.fixture
    def make(self, s3_server: S3Server, bucket: str, prefix: str) -> Iterator[Callable[..., Backend]]:
        """Makes a backend, of the tested name unless another is given, on the test's part of the bucket."""
        made: list[Backend] = []

        def make(**settings: Any) -> Backend:
            values: dict[str, Any] = {
                "backend": self.name,
                "bucket": bucket,
                "prefix": prefix,
                "endpoint_url": s3_server.endpoint,
                "access_key_id": s3_server.access_key,
                "secret_access_key": s3_server.secret_key,
                "region_name": s3_server.region,
                "verify": s3_server.verify,
                "allow_insecure_sse": True,
                # Swift on a busy machine takes half a minute for a batch of 1,000 deletions.
                "read_timeout": 300,
                "multipart_threshold": MULTIPART_THRESHOLD,
                "multipart_chunksize": MULTIPART_CHUNKSIZE,
            }
            made.append(open_backend(BucketSettings.parse(values | settings)))
            return made[-1]

        yield make
        for backend in made:
            backend.close()

    @pytest.fixture
    def backend(self, make: Callable[..., Backend]) -> Backend:
        return make()

    @pytest.fixture
    def stored(self, client: S3Client, bucket: str, prefix: str) -> Callable[[], list[str]]:
        """The keys that are in the test's part of the bucket, whoever put them there."""

        def stored() -> list[str]:
            return [
                entry["Key"]
                for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
                for entry in page.get("Contents", [])
            ]

        return stored

    @pytest.fixture
    def uploads(self, client: S3Client, bucket: str, prefix: str) -> Callable[[], list[str]]:
        """The keys of multipart uploads that are under way in the test's part of the bucket."""

        def uploads() -> list[str]:
            entries = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
            return [entry["Key"] for entry in entries if entry["Key"].startswith(prefix)]

        return uploads

    # --- constructing, keys, errors ---

    def test_constructing_does_no_io(
        self, make: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def refuse(*_: object) -> NoReturn:
            raise AssertionError("a connection was opened")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        absent = str(tmp_path / "absent")
        files: dict[str, Any] = {"access_key_id": None, "access_key_id_path": absent}
        make(**files, sse_customer_key_path=absent)

    def test_files_that_cannot_be_read_show_at_the_first_call(
        self, make: Callable[..., Backend], tmp_path: Path
    ) -> None:
        absent = str(tmp_path / "absent")
        backend = make(access_key_id=None, access_key_id_path=absent)
        with pytest.raises(Misconfigured, match="access_key_id_path"):
            backend.check()

    def test_what_is_no_key_is_a_value_error_before_any_io(self, make: Callable[..., Backend]) -> None:
        backend = make(endpoint_url="http://127.0.0.1:1")
        for key in NOT_KEYS:
            with pytest.raises(ValueError):
                put(backend, key, SMALL)
            with pytest.raises(ValueError):
                backend.open(key)
            with pytest.raises(ValueError):
                backend.stat(key)
            with pytest.raises(ValueError):
                list(backend.delete([key]))

    def test_keys_are_relative_to_the_prefix(
        self, backend: Backend, prefix: str, stored: Callable[[], list[str]]
    ) -> None:
        put(backend, "a/b", SMALL)
        assert stored() == [f"{prefix}/a/b"]
        assert read(backend, "a/b") == SMALL
        assert backend.stat("a/b").key == "a/b"
        assert [info.key for info in backend.list()] == ["a/b"]
        assert list(backend.delete(["a/b"])) == []
        assert stored() == []

    def test_a_slash_after_the_prefix_is_not_doubled(
        self, make: Callable[..., Backend], prefix: str, stored: Callable[[], list[str]]
    ) -> None:
        put(make(prefix=f"{prefix}/"), "a", SMALL)
        assert stored() == [f"{prefix}/a"]

    def test_a_raw_prefix_is_joined_with_nothing(
        self, make: Callable[..., Backend], prefix: str, stored: Callable[[], list[str]]
    ) -> None:
        backend = make(raw_prefix=True)
        put(backend, "a", SMALL)
        assert stored() == [f"{prefix}a"]
        assert read(backend, "a") == SMALL
        assert [info.key for info in backend.list()] == ["a"]
        assert list(backend.delete(["a"])) == []
        assert stored() == []

    def test_errors_name_operation_and_key_and_have_the_sdks_exception_as_cause(self, backend: Backend) -> None:
        with pytest.raises(BackendError) as caught:
            backend.open("absent/key")
        assert "open" in str(caught.value)
        assert "'absent/key'" in str(caught.value)
        assert caught.value.operation == "open"
        assert caught.value.key == "absent/key"
        assert caught.value.__cause__ is not None
        assert not isinstance(caught.value.__cause__, BackendError)

    def test_a_backend_may_be_used_from_many_threads_at_once(self, backend: Backend) -> None:
        def round_trip(number: int) -> bool:
            data = SMALL * number
            put(backend, f"thread/{number}", data)
            return read(backend, f"thread/{number}") == data and backend.stat(f"thread/{number}").size == len(data)

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(round_trip, range(48)))

    # --- check ---

    def test_check_accepts_a_bucket_that_can_be_used(self, backend: Backend) -> None:
        backend.check()

    def test_check_tells_a_bucket_that_is_not_there(self, make: Callable[..., Backend]) -> None:
        backend = make(bucket=f"absent-{uuid.uuid4().hex[:12]}")
        with pytest.raises(BucketNotFound):
            backend.check()

    @pytest.mark.parametrize("setting", ["access_key_id", "secret_access_key"])
    def test_check_tells_wrong_credentials(
        self, make: Callable[..., Backend], s3_server: S3Server, setting: str
    ) -> None:
        backend = make(**{setting: "wrong-credential"})
        if not s3_server.checks_signatures:
            backend.check()
            return
        with pytest.raises(AccessDenied) as caught:
            backend.check()
        assert_kept_secret(caught.value, "wrong-credential", s3_server.secret_key)

    def test_check_tells_a_server_that_does_not_answer(self, make: Callable[..., Backend]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            backend = make(endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}", max_attempts=1)
            with pytest.raises(BackendUnavailable) as caught:
                backend.check()
        assert caught.value.retryable

    # --- put ---

    @pytest.mark.parametrize("data", [b"", b"x", SMALL, bytes(MULTIPART_THRESHOLD)], ids=len)
    def test_put_stores_a_small_body_in_one_request(
        self, backend: Backend, client: S3Client, bucket: str, prefix: str, data: bytes
    ) -> None:
        info = put(backend, "small", data)
        md5 = hashlib.md5(data).hexdigest()
        assert info == ObjectInfo("small", len(data), md5, None, "STANDARD", {})
        answer = client.get_object(Bucket=bucket, Key=f"{prefix}/small")
        assert answer["Body"].read() == data
        assert answer["ETag"] == f'"{md5}"'

    def test_put_stores_a_large_body_in_parts(
        self, backend: Backend, client: S3Client, bucket: str, prefix: str, uploads: Callable[[], list[str]]
    ) -> None:
        info = put(backend, "large", LARGE)
        assert (info.key, info.size, info.last_modified) == ("large", len(LARGE), None)
        answer = client.get_object(Bucket=bucket, Key=f"{prefix}/large")
        assert answer["Body"].read() == LARGE
        assert answer["ETag"].strip('"') == info.etag == backend.stat("large").etag
        assert uploads() == []

    def test_the_etag_of_parts_is_the_md5_of_their_md5s(self, backend: Backend) -> None:
        parts = [LARGE[start : start + MULTIPART_CHUNKSIZE] for start in range(0, len(LARGE), MULTIPART_CHUNKSIZE)]
        of_parts = b"".join(hashlib.md5(part).digest() for part in parts)
        assert put(backend, "large", LARGE).etag == f"{hashlib.md5(of_parts).hexdigest()}-{len(parts)}"

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_a_body_that_is_altered_on_its_way_is_not_stored(
        self,
        backend: Backend,
        s3_server: S3Server,
        monkeypatch: pytest.MonkeyPatch,
        stored: Callable[[], list[str]],
        data: bytes,
    ) -> None:
        send = Transport.urlopen

        def send_altered(transport: Transport, method: str, url: str, **options: Any) -> BaseHTTPResponse:
            if method == "PUT":
                options["body"] = options["body"][:-1] + b"!"
            return send(transport, method, url, **options)

        monkeypatch.setattr(Transport, "urlopen", send_altered)
        if not s3_server.checks_signatures:
            # The servers that only play one look at no checksum either.
            put(backend, "key", data)
            assert read(backend, "key") != data
            return
        with pytest.raises(BackendError):
            put(backend, "key", data)
        assert stored() == []

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_put_takes_the_next_bytes_of_the_body_and_no_more(self, backend: Backend, data: bytes) -> None:
        body = io.BytesIO(b"before" + data + b"behind")
        body.seek(6)
        backend.put("middle", body, len(data))
        assert body.read() == b"behind"
        assert read(backend, "middle") == data

    def test_put_takes_a_body_that_reads_less_than_asked_for(self, backend: Backend) -> None:
        backend.put("slow", Body(SMALL, at_a_time=3), len(SMALL))
        assert read(backend, "slow") == SMALL

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_put_replaces_what_was_there(self, backend: Backend, data: bytes) -> None:
        backend.put("key", io.BytesIO(b"old" * 1000), 3000, content_type="text/old", metadata={"old": "yes"})
        put(backend, "key", data)
        assert read(backend, "key") == data
        assert backend.stat("key").metadata == {}

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_put_stores_content_type_and_metadata(
        self, backend: Backend, client: S3Client, bucket: str, prefix: str, data: bytes
    ) -> None:
        metadata = {"sha256": "ab12", "File-Name": "a b; c=d, 100%"}
        lower = {"sha256": "ab12", "file-name": "a b; c=d, 100%"}
        info = backend.put("key", io.BytesIO(data), len(data), content_type="image/png", metadata=metadata)
        assert info.metadata == lower
        assert backend.stat("key").metadata == lower
        with backend.open("key") as reader:
            assert reader.info.metadata == lower
        assert client.head_object(Bucket=bucket, Key=f"{prefix}/key")["ContentType"] == "image/png"

    @pytest.mark.parametrize("metadata", [{"n\u00e4me": "a"}, {"name": "\u00e4"}, {"name": "a\nb: c"}])
    def test_metadata_that_is_not_ascii_is_a_value_error(
        self, backend: Backend, stored: Callable[[], list[str]], metadata: dict[str, str]
    ) -> None:
        with pytest.raises(ValueError, match="ASCII"):
            backend.put("key", io.BytesIO(SMALL), len(SMALL), metadata=metadata)
        assert stored() == []

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_a_body_that_ends_early_is_a_value_error_and_the_old_object_stays(
        self, backend: Backend, data: bytes, stored: Callable[[], list[str]], uploads: Callable[[], list[str]]
    ) -> None:
        with pytest.raises(ValueError, match="1 bytes early"):
            backend.put("key", io.BytesIO(data), len(data) + 1)
        assert stored() == []
        put(backend, "key", b"old")
        with pytest.raises(ValueError):
            backend.put("key", io.BytesIO(data), len(data) + 1)
        assert read(backend, "key") == b"old"
        assert uploads() == []

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_an_os_error_of_the_body_comes_out_as_it_is_and_the_old_object_stays(
        self, backend: Backend, data: bytes, stored: Callable[[], list[str]], uploads: Callable[[], list[str]]
    ) -> None:
        fault = OSError(errno.EIO, "the disk is broken")
        with pytest.raises(OSError) as caught:
            backend.put("key", Body(data[:-1], fault=fault), len(data))
        assert caught.value is fault
        assert stored() == []
        put(backend, "key", b"old")
        with pytest.raises(OSError):
            backend.put("key", Body(data[:-1], fault=fault), len(data))
        assert read(backend, "key") == b"old"
        assert uploads() == []

    def test_a_key_of_more_than_1024_bytes_works_or_is_refused(
        self, backend: Backend, stored: Callable[[], list[str]]
    ) -> None:
        key = "/".join(["k" * 200] * 6)
        try:
            put(backend, key, SMALL)
        except BackendError as error:
            assert not error.retryable
            assert stored() == []
        else:
            assert read(backend, key) == SMALL

    # --- storage class ---

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_objects_get_the_configured_storage_class(
        self, make: Callable[..., Backend], s3_server: S3Server, data: bytes
    ) -> None:
        # Where there is no other class, the refusal is asserted below.
        for storage_class in s3_server.storage_classes or ["STANDARD"]:
            backend = make(storage_class=storage_class)
            assert put(backend, "key", data).storage_class == storage_class
            assert backend.stat("key").storage_class == storage_class
            with backend.open("key") as reader:
                assert reader.info.storage_class == storage_class
                assert reader.read(len(data)) == data

    @pytest.mark.parametrize("data", [SMALL, LARGE], ids=len)
    def test_a_storage_class_that_the_server_does_not_know_is_refused(
        self,
        make: Callable[..., Backend],
        data: bytes,
        stored: Callable[[], list[str]],
        uploads: Callable[[], list[str]],
    ) -> None:
        # Ceph calls it InvalidArgument.
        with pytest.raises(RequestRejected, match=r"InvalidStorageClass|InvalidArgument") as caught:
            put(make(storage_class="NO_SUCH_CLASS"), "key", data)
        assert not caught.value.retryable
        assert stored() == uploads() == []

    def test_without_the_setting_the_storage_class_is_standard(self, backend: Backend) -> None:
        assert put(backend, "key", SMALL).storage_class == "STANDARD"
        assert backend.stat("key").storage_class == "STANDARD"
        assert [info.storage_class for info in backend.list()] == ["STANDARD"]

    # --- open ---

    def test_info_is_known_when_open_returns(self, backend: Backend) -> None:
        stored = backend.put("key", io.BytesIO(SMALL), len(SMALL), metadata={"a": "b"})
        with backend.open("key") as reader:
            assert_same_object(reader.info, stored)
            assert_just_now(reader.info.last_modified)

    def test_read_returns_exactly_what_was_asked_for(self, backend: Backend) -> None:
        put(backend, "key", LARGE)
        with backend.open("key") as reader:
            position = 0
            for n in (1, 10, 65_536, 65_537, 1 << 20, 3 << 20):
                assert reader.read(n) == LARGE[position : position + n]
                position += n
            assert reader.read(0) == b""
            assert reader.read(len(LARGE)) == LARGE[position:]
            assert reader.read(1) == b""
            assert reader.read(1) == b""

    @pytest.mark.parametrize("offset", [0, 1, 7, len(SMALL) - 1])
    def test_open_reads_from_the_offset_to_the_end(self, backend: Backend, offset: int) -> None:
        put(backend, "key", SMALL)
        with backend.open("key", offset=offset) as reader:
            assert reader.info.size == len(SMALL)
            assert reader.read(1000) == SMALL[offset:]
            assert reader.read(1000) == b""

    @pytest.mark.parametrize("beyond", [0, 1, 1000])
    def test_an_offset_at_or_behind_the_end_is_rejected(self, backend: Backend, beyond: int) -> None:
        put(backend, "key", SMALL)
        with pytest.raises(RequestRejected) as caught:
            backend.open("key", offset=len(SMALL) + beyond)
        assert caught.value.status == 416

    def test_an_empty_object_can_be_read(self, backend: Backend) -> None:
        put(backend, "key", b"")
        with backend.open("key") as reader:
            assert reader.info.size == 0
            assert reader.read(10) == b""
        with pytest.raises(RequestRejected):
            backend.open("key", offset=1)

    def test_if_match_takes_the_object_that_was_named(self, backend: Backend) -> None:
        info = put(backend, "key", SMALL)
        with backend.open("key", if_match=info.etag) as reader:
            assert reader.read(100) == SMALL
        with backend.open("key", offset=4, if_match=backend.stat("key").etag) as reader:
            assert reader.read(100) == SMALL[4:]

    @pytest.mark.parametrize("offset", [0, 4])
    def test_if_match_refuses_another_object(self, backend: Backend, offset: int) -> None:
        etag = put(backend, "key", b"old content").etag
        put(backend, "key", SMALL)
        with pytest.raises(PreconditionFailed):
            backend.open("key", offset=offset, if_match=etag)

    def test_open_tells_an_object_that_is_not_there(self, backend: Backend) -> None:
        with pytest.raises(ObjectNotFound) as caught:
            backend.open("absent")
        assert not caught.value.retryable
        with pytest.raises(ObjectNotFound):
            backend.open("absent", offset=1, if_match="0" * 32)

    def test_open_tells_a_bucket_that_is_not_there(self, make: Callable[..., Backend]) -> None:
        with pytest.raises(BucketNotFound):
            make(bucket=f"absent-{uuid.uuid4().hex[:12]}").open("absent")

    def test_a_reader_may_be_closed_early_and_twice(self, backend: Backend) -> None:
        put(backend, "key", LARGE)
        reader = backend.open("key")
        assert reader.read(10) == LARGE[:10]
        reader.close()
        reader.close()
        assert read(backend, "key") == LARGE

    def test_a_reader_that_was_read_to_its_end_may_be_closed_twice(self, backend: Backend) -> None:
        put(backend, "key", SMALL)
        reader = backend.open("key")
        assert reader.read(len(SMALL)) == SMALL
        reader.close()
        reader.close()
        assert reader.read(1) == b""

    def test_readers_in_many_threads_do_not_mix(self, backend: Backend) -> None:
        objects = {f"key-{number}": random.Random(number).randbytes(300_000) for number in range(8)}
        for key, data in objects.items():
            put(backend, key, data)
        everyone_is_open = threading.Barrier(len(objects))

        def read_slowly(key: str) -> bytes:
            with backend.open(key) as reader:
                everyone_is_open.wait(30)
                return b"".join(iter(lambda: reader.read(10_000), b""))

        with ThreadPoolExecutor(len(objects)) as threads:
            assert dict(zip(objects, threads.map(read_slowly, objects), strict=True)) == objects

    def test_a_reader_may_go_from_one_thread_to_another(self, backend: Backend) -> None:
        put(backend, "key", LARGE)
        with ThreadPoolExecutor(1) as thread:
            reader = thread.submit(backend.open, "key").result()
            assert reader.read(1 << 20) == LARGE[: 1 << 20]
            assert thread.submit(reader.read, len(LARGE)).result() == LARGE[1 << 20 :]
            reader.close()

    # --- stat ---

    def test_stat_tells_size_etag_time_and_metadata(self, backend: Backend) -> None:
        stored = backend.put("key", io.BytesIO(SMALL), len(SMALL), metadata={"a": "b"})
        info = backend.stat("key")
        assert_same_object(info, stored)
        assert_just_now(info.last_modified)

    def test_stat_tells_an_object_that_is_not_there(self, backend: Backend) -> None:
        with pytest.raises(ObjectNotFound) as caught:
            backend.stat("absent")
        assert not caught.value.retryable

    def test_stat_takes_a_bucket_that_is_not_there_for_an_object_that_is_not(
        self, make: Callable[..., Backend]
    ) -> None:
        with pytest.raises(ObjectNotFound):
            make(bucket=f"absent-{uuid.uuid4().hex[:12]}").stat("absent")

    # --- list ---

    def test_list_tells_what_the_server_knows(self, backend: Backend) -> None:
        stored = put(backend, "key", SMALL)
        (info,) = backend.list()
        assert_same_object(info, stored)
        assert_just_now(info.last_modified)

    def test_list_of_nothing_is_empty(self, backend: Backend) -> None:
        assert list(backend.list()) == []

    def test_list_is_in_byte_order_of_the_utf_8_key(self, backend: Backend) -> None:
        assert sorted(NASTY_KEYS, key=str.encode) == NASTY_KEYS
        for key in reversed(NASTY_KEYS):
            put(backend, key, key.encode())
        assert [(info.key, info.size) for info in backend.list()] == [(key, len(key.encode())) for key in NASTY_KEYS]

    def test_nasty_keys_can_be_read_and_deleted(self, backend: Backend) -> None:
        for key in NASTY_KEYS:
            put(backend, key, key.encode())
        for key in NASTY_KEYS:
            assert read(backend, key) == key.encode()
            assert backend.stat(key).size == len(key.encode())
        assert list(backend.delete(NASTY_KEYS)) == []
        assert list(backend.list()) == []

    def test_a_control_character_in_a_key_works_or_is_refused(self, backend: Backend) -> None:
        put(backend, "a", SMALL)
        try:
            put(backend, CONTROL_CHARACTER, SMALL)
        except BackendError as error:
            assert not error.retryable
            assert [info.key for info in backend.list()] == ["a"]
            return
        assert read(backend, CONTROL_CHARACTER) == SMALL
        assert [info.key for info in backend.list()] == ["a", CONTROL_CHARACTER]
        assert list(backend.delete(["a", CONTROL_CHARACTER])) == []
        assert list(backend.list()) == []

    def test_list_takes_any_string_as_prefix(self, backend: Backend) -> None:
        keys = ["a b/c", "a b/d+e", "a b/d e", "a c/d", "b"]
        for key in keys:
            put(backend, key, SMALL)
        for prefix in ("", "a", "a ", "a b", "a b/", "a b/d", "a b/d+", "a b/d e", "b", "c", "a%20b"):
            expected = sorted(key for key in keys if key.startswith(prefix))
            assert [info.key for info in backend.list(prefix)] == expected, prefix

    def test_list_starts_after_a_key_whether_it_exists_or_not(self, backend: Backend) -> None:
        for key in NASTY_KEYS:
            put(backend, key, SMALL)
        for start_after in ("a", "b", *NASTY_KEYS, "a+", "a\u4e2d"):
            expected = [key for key in NASTY_KEYS if key.encode() > start_after.encode()]
            assert [info.key for info in backend.list(start_after=start_after)] == expected, start_after

    def test_list_combines_prefix_and_start_after(self, backend: Backend) -> None:
        for key in ("a/1", "b/1", "b/2", "b/3", "c/1"):
            put(backend, key, SMALL)
        assert [info.key for info in backend.list("b/", start_after="b/1")] == ["b/2", "b/3"]
        assert [info.key for info in backend.list("b/", start_after="a/1")] == ["b/1", "b/2", "b/3"]
        assert [info.key for info in backend.list("b/", start_after="c/1")] == []

    def test_list_shows_nothing_beside_the_prefix(
        self, make: Callable[..., Backend], client: S3Client, bucket: str, prefix: str
    ) -> None:
        for name in (f"{prefix}2/a", f"{prefix}-/a", f"{prefix}/a", f"{prefix}x"):
            client.put_object(Bucket=bucket, Key=name, Body=b"")
        backend = make()
        assert [info.key for info in backend.list()] == ["a"]
        for key in ("2/a", "x"):
            with pytest.raises(ObjectNotFound):
                backend.stat(key)

    def test_an_object_named_like_the_prefix_is_left_out(
        self, backend: Backend, client: S3Client, bucket: str, prefix: str
    ) -> None:
        put(backend, "a", SMALL)
        # As consoles make them when someone creates a "folder".
        client.put_object(Bucket=bucket, Key=f"{prefix}/", Body=b"")
        assert [info.key for info in backend.list()] == ["a"]

    def test_list_goes_on_after_the_first_page(self, make: Callable[..., Backend], many: str) -> None:
        backend = make(prefix=many)
        assert [info.key for info in backend.list()] == MANY_KEYS
        assert [info.key for info in backend.list(start_after="0002")] == MANY_KEYS[3:]
        assert [info.key for info in backend.list("00")] == MANY_KEYS[:100]

    def test_list_goes_on_where_the_server_does_not_say_how(
        self, make: Callable[..., Backend], many: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one that knows version 1 of listings only."""
        monkeypatch.setattr(s3_backend, "parse_listing", lambda body: replace(parse_listing(body), next_token=None))
        backend = make(prefix=many)
        assert [info.key for info in backend.list()] == MANY_KEYS
        assert [info.key for info in backend.list(start_after="0002")] == MANY_KEYS[3:]

    def test_list_asks_for_nothing_before_it_is_needed(
        self, make: Callable[..., Backend], many: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = count_requests(monkeypatch)
        backend = make(prefix=many)
        listing = backend.list()
        assert next(requests) == 0
        assert [info.key for info in itertools.islice(listing, 1000)] == MANY_KEYS[:1000]
        assert next(requests) == 1
        assert [info.key for info in listing] == MANY_KEYS[1000:]
        assert next(requests) == 1

    def test_an_unfinished_listing_may_be_dropped(self, make: Callable[..., Backend], many: str) -> None:
        backend = make(prefix=many)
        assert next(iter(backend.list())).key == MANY_KEYS[0]
        assert backend.stat(MANY_KEYS[1]).size == 0

    # --- delete ---

    def test_delete_removes_objects_and_counts_missing_ones_as_deleted(
        self, backend: Backend, stored: Callable[[], list[str]], prefix: str
    ) -> None:
        for key in ("a", "b/c", "d"):
            put(backend, key, SMALL)
        assert list(backend.delete(["a", "absent", "b/c"])) == []
        assert stored() == [f"{prefix}/d"]
        assert list(backend.delete(["absent"])) == []

    def test_delete_of_nothing_does_nothing(self, make: Callable[..., Backend]) -> None:
        assert list(make(endpoint_url="http://127.0.0.1:1").delete([])) == []

    def test_delete_works_in_batches_as_it_is_consumed(
        self, backend: Backend, stored: Callable[[], list[str]], prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in (MANY_KEYS[0], MANY_KEYS[999], MANY_KEYS[1000], "other"):
            put(backend, key, b"")
        requests = count_requests(monkeypatch)
        deletion = backend.delete(iter(MANY_KEYS))
        assert next(requests) == 0
        assert list(deletion) == []
        assert next(requests) == 2
        assert stored() == [f"{prefix}/other"]

    def test_delete_in_a_bucket_that_is_not_there_is_raised(self, make: Callable[..., Backend]) -> None:
        with pytest.raises(BucketNotFound):
            list(make(bucket=f"absent-{uuid.uuid4().hex[:12]}").delete(["a"]))

    def test_delete_without_a_connection_is_raised(self, make: Callable[..., Backend]) -> None:
        with pytest.raises(BackendUnavailable):
            list(make(endpoint_url="http://127.0.0.1:1", max_attempts=1).delete(["a"]))

    # --- close ---

    def test_close_may_be_called_twice(self, backend: Backend, make: Callable[..., Backend]) -> None:
        put(backend, "large", LARGE)
        backend.close()
        backend.close()
        make().close()

    # --- encryption with the customer's key ---

    def test_without_a_key_there_is_no_encryption_to_check(self, make: Callable[..., Backend]) -> None:
        make(endpoint_url="http://127.0.0.1:1").check_encryption()

    def test_check_encryption_leaves_nothing_behind(
        self, make: Callable[..., Backend], s3_server: S3Server, stored: Callable[[], list[str]]
    ) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        if not sse_is_refused(s3_server, backend.check_encryption):
            backend.check_encryption()
        assert stored() == []

    def test_check_encryption_is_not_repeated(
        self, make: Callable[..., Backend], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        if sse_is_refused(s3_server, backend.check_encryption):
            return
        put(backend, "a", SMALL)
        requests = count_requests(monkeypatch)
        backend.check_encryption()
        put(backend, "b", SMALL)
        assert next(requests) == 1

    @pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=len)
    def test_encrypted_objects_are_read_with_the_key_and_not_without(
        self,
        make: Callable[..., Backend],
        s3_server: S3Server,
        data: bytes,
        stored: Callable[[], list[str]],
        uploads: Callable[[], list[str]],
        prefix: str,
    ) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        if sse_is_refused(s3_server, lambda: put(backend, "secret", data)):
            assert stored() == uploads() == []
            return
        info = put(backend, "secret", data)
        assert read(backend, "secret") == data
        assert_same_object(backend.stat("secret"), info)
        assert [(listed.key, listed.size) for listed in backend.list()] == [("secret", len(data))]
        assert stored() == [f"{prefix}/secret"]
        if not data:
            # MinIO gives nothing out to anyone: there is nothing to encrypt.
            return
        for blind in (make(), make(sse_customer_key=OTHER_SSE_KEY)):
            for operation in (blind.open, blind.stat):
                with pytest.raises((RequestRejected, AccessDenied)) as caught:
                    operation("secret")
                assert not caught.value.retryable
                assert_kept_secret(caught.value, SSE_KEY, OTHER_SSE_KEY)
        with pytest.raises((RequestRejected, AccessDenied), match="sse_customer_key"):
            make(sse_customer_key=OTHER_SSE_KEY).open("secret")

    @pytest.mark.parametrize("offset", [1, len(LARGE) - 5])
    def test_encrypted_objects_are_read_from_an_offset(
        self, make: Callable[..., Backend], s3_server: S3Server, offset: int
    ) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        if sse_is_refused(s3_server, lambda: put(backend, "secret", LARGE)):
            return
        etag = put(backend, "secret", LARGE).etag
        with backend.open("secret", offset=offset, if_match=etag) as reader:
            assert reader.info.size == len(LARGE)
            assert reader.read(len(LARGE)) == LARGE[offset:]

    def test_objects_from_before_the_key_was_configured_are_read_and_warned_of_once(
        self,
        make: Callable[..., Backend],
        caplog: pytest.LogCaptureFixture,
        client: S3Client,
        bucket: str,
        prefix: str,
    ) -> None:
        without_key = make()
        for key in ("old-1", "old-2"):
            put(without_key, key, SMALL)
        backend = make(sse_customer_key=SSE_KEY)
        assert read(backend, "old-1") == SMALL
        assert backend.stat("old-1").size == len(SMALL)
        assert read(backend, "old-2") == SMALL
        with backend.open("old-2", offset=4) as reader:
            assert reader.read(100) == SMALL[4:]
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        # Ceph leaves the key unused, as servers do that know no SSE-C: then nothing tells what the object is.
        try:
            client.get_object(
                Bucket=bucket, Key=f"{prefix}/old-1", SSECustomerAlgorithm="AES256", SSECustomerKey=SSE_KEY
            )["Body"].close()
        except ClientError:
            assert len(warnings) == 1
            assert "sse_customer_key" in warnings[0].getMessage()
        else:
            assert warnings == []

    def test_a_missing_object_is_missing_with_a_key_too(self, make: Callable[..., Backend]) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        missing: list[type[BackendError]] = []
        for operation in (backend.open, backend.stat):
            with pytest.raises(BackendError) as caught:
                operation("absent")
            missing.append(type(caught.value))
        assert missing == [ObjectNotFound, ObjectNotFound]

    # --- interchange ---

    @pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=len)
    def test_what_one_backend_stores_every_other_reads(
        self, backend: Backend, make: Callable[..., Backend], data: bytes
    ) -> None:
        key = "a b/c+d/\U0001f600"
        for name in BACKENDS:
            other = make(backend=name)
            body = io.BytesIO(data)
            stored = other.put(key, body, len(data), content_type="image/png", metadata={"by": name})
            assert_same_object(backend.stat(key), stored)
            assert read(backend, key) == data
            assert backend.stat(key).metadata == {"by": name}
            (listed,) = backend.list()
            assert (listed.key, listed.size, listed.etag) == (key, len(data), stored.etag)

    @pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=len)
    def test_what_one_backend_encrypts_every_other_reads(
        self, make: Callable[..., Backend], s3_server: S3Server, data: bytes
    ) -> None:
        backend = make(sse_customer_key=SSE_KEY)
        for name in BACKENDS:
            other = make(backend=name, sse_customer_key=SSE_KEY)
            if sse_is_refused(s3_server, lambda other=other: put(other, "secret", data)):  # type: ignore[misc]
                continue
            stored = put(other, "secret", data)
            assert_same_object(backend.stat("secret"), stored)
            assert read(backend, "secret") == data

    def test_every_form_of_a_key_is_the_same_key(
        self, make: Callable[..., Backend], s3_server: S3Server, tmp_path: Path
    ) -> None:
        path = tmp_path / "key"
        path.write_text(f"{SSE_KEY}\n")
        backend = make(sse_customer_key=SSE_KEY)
        if sse_is_refused(s3_server, lambda: put(backend, "secret", SMALL)):
            return
        put(backend, "secret", SMALL)
        assert read(make(sse_customer_key=base64.b64encode(SSE_KEY.encode()).decode()), "secret") == SMALL
        assert read(make(sse_customer_key_path=str(path)), "secret") == SMALL

    # --- addressing ---

    @pytest.mark.parametrize("style", ["path", "virtual"])
    def test_buckets_are_addressed_as_configured(
        self,
        make: Callable[..., Backend],
        s3_server: S3Server,
        bucket: str,
        monkeypatch: pytest.MonkeyPatch,
        style: str,
    ) -> None:
        # A server that knows no such host names takes the path.
        domain = s3_server.domain if style == "virtual" else None
        hosts: set[str] = set()

        def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
            hosts.add(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        endpoint = s3_server.endpoint.replace("127.0.0.1", domain or "127.0.0.1")
        backend = make(endpoint_url=endpoint, addressing_style=style if domain else "path")
        key = NASTY_KEYS[0]
        put(backend, key, SMALL)
        assert read(backend, key) == SMALL
        assert [info.key for info in backend.list()] == [key]
        assert list(backend.delete([key])) == []
        assert f"{bucket}.{domain}" in hosts if domain else all(bucket not in host for host in hosts)


class Body(io.BytesIO):
    """A file that gives out a few bytes at a time, and may break at its end."""

    def __init__(self, data: bytes, *, at_a_time: int = 1 << 20, fault: OSError | None = None) -> None:
        super().__init__(data)
        self._at_a_time = at_a_time
        self._fault = fault

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(self._at_a_time if size is None or size < 0 else min(size, self._at_a_time))
        if not data and self._fault is not None:
            raise self._fault
        return data


def put(backend: Backend, key: str, data: bytes) -> ObjectInfo:
    return backend.put(key, io.BytesIO(data), len(data))


def read(backend: Backend, key: str) -> bytes:
    with backend.open(key) as reader:
        return reader.read(reader.info.size)


def assert_same_object(seen: ObjectInfo, stored: ObjectInfo) -> None:
    assert (seen.key, seen.size, seen.etag) == (stored.key, stored.size, stored.etag)
    assert seen.metadata in (stored.metadata, {})


def assert_just_now(moment: datetime | None) -> None:
    assert moment is not None
    assert moment.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - moment) < timedelta(minutes=2)


def assert_kept_secret(error: BaseException, *secrets: str) -> None:
    """No secret in the message or in anything behind it."""
    text = "\n".join(f"{each} {each!r}" for each in cause_chain(error))
    for secret in secrets:
        assert secret not in text


def sse_is_refused(server: S3Server, operation: Callable[[], object]) -> bool:
    """Whether the server cannot encrypt; then the operation fails as the contract says."""
    if server.sse_c:
        return False
    with pytest.raises(RequestRejected if server.sse_c_refused else EncryptionNotApplied) as caught:
        operation()
    assert not caught.value.retryable
    assert_kept_secret(caught.value, SSE_KEY)
    return True


def count_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Tells how many requests were sent by anyone in this process since it was asked last."""
    # Below both SDKs, so that nothing escapes.
    from urllib3.connectionpool import HTTPConnectionPool

    sent: list[str] = []
    urlopen = HTTPConnectionPool.urlopen

    def counted(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        sent.append(f"{method} {url}")
        return urlopen(self, method, url, *arguments, **options)

    monkeypatch.setattr(HTTPConnectionPool, "urlopen", counted)

    def count() -> Iterator[int]:
        while True:
            number = len(sent)
            sent.clear()
            yield number

    return count()

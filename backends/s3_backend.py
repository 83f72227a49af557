"""What every S3 backend shares: the contract of `backends.base`, built on single requests of an SDK.

A backend for another SDK subclasses `S3Backend` and says how that SDK makes each request; keys,
retries, errors, encryption, parts, listings and deletions are handled here, alike for all.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
import os
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from secrets import token_bytes, token_hex
from typing import BinaryIO, Generic

from backends.answers import UPLOAD_MARK, Headers, bare_etag, check_match, check_range, object_info, upload_mark
from backends.base import Backend, DeleteFailure, ObjectInfo, ObjectReader
from backends.calls import Caller, Client, Result
from backends.credentials import AccessKey
from backends.errors import (
    AccessDenied,
    BackendError,
    BackendUnavailable,
    BucketNotFound,
    EncryptionNotApplied,
    NotSupported,
    RequestRejected,
    SettingsError,
    error_class,
)
from backends.listing import Query, first_query, list_objects
from backends.memory import MemoryBudget
from backends.multipart import Part, read_exactly, send_parts
from backends.reader import RawBody, S3Reader
from backends.settings import BucketSettings, is_region
from backends.shared_proof import SharedProof
from backends.transport import Transport
from backends.xml import ListingPage, UnreadableReply, parse_listing

logger = logging.getLogger(__name__)

# Bodies of objects and parts that are being sent, in all threads together.
_MEMORY_BYTES = 64 << 20
_PART_THREADS = 8
# Of DeleteObjects: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
_DELETE_BATCH = 1000
# Characters that XML 1.0 cannot carry, or not unchanged; a batch of deletions is XML.
_NOT_FOR_XML = re.compile("[\x00-\x1f\ufffe\uffff]")
_SSE_ACKNOWLEDGEMENT = "x-amz-server-side-encryption-customer-algorithm"


class S3Backend(Backend, Generic[Client]):
    """The contract, on the requests that a subclass makes with its SDK.

    The methods with an underscore that are abstract make one request each, through
    `self._transport`, without retrying, and let the SDK's exceptions out.
    """

    def __init__(self, settings: BucketSettings) -> None:
        self._settings = settings
        self._transport = Transport(settings)
        self._caller = Caller(settings, self._transport, self._connect, self._is_credentials_error)
        self._memory = MemoryBudget(_MEMORY_BYTES)
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._encryption = SharedProof(self._prove_encryption)
        self._warned_of_plain_objects = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bucket={self._settings.bucket!r}, prefix={self._settings.key_prefix!r})"

    @property
    def _sse_key(self) -> bytes | None:
        """The encryption key; known to the requests that a subclass makes, which have a client."""
        return self._caller.sse_key

    @property
    def _region(self) -> str | None:
        """The region that requests are signed for; None leaves it to the SDK."""
        if self._settings.region_name is not None:
            return self._settings.region_name
        for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            if region := os.environ.get(variable):
                if not is_region(region):
                    raise SettingsError((variable,), f"{region!r} is not the name of a region")
                return region
        # Outside AWS a fixed one, which saves a GetBucketLocation that least-privilege keys may not make.
        return None if self._settings.is_aws else "us-east-1"

    @property
    def _signs_bodies(self) -> bool:
        """Whether the signature covers bodies, by their SHA-256, which the server verifies; else a Content-MD5 does.

        As minio-py has it. To hash twice would double the CPU of large bodies.
        """
        return not self._settings.is_https

    def _call(self, operation: str, key: str | None, request: Callable[[Client], Result]) -> Result:
        return self._caller.call(operation, key, request)

    # --- what a subclass says ---

    @abstractmethod
    def _connect(self, access_key: AccessKey | None) -> Client:
        """Make the SDK's client; it must send through `self._transport` and never retry by itself."""

    @abstractmethod
    def _is_credentials_error(self, error: Exception) -> bool:
        """Whether the SDK found no usable credentials, so that nothing was sent."""

    @abstractmethod
    def _put_object(
        self, client: Client, name: str, body: bytes, content_type: str | None, metadata: Mapping[str, str]
    ) -> Headers: ...

    @abstractmethod
    def _get_object(
        self, client: Client, name: str, offset: int, if_match: str | None, encrypted: bool
    ) -> tuple[Headers, RawBody]: ...

    @abstractmethod
    def _head_object(self, client: Client, name: str, encrypted: bool) -> Headers: ...

    @abstractmethod
    def _list_page(self, client: Client, query: Query) -> bytes:
        """The XML of one page of ListObjectsV2, or of version 1 without `list-type`; `query` is as S3 names things."""

    @abstractmethod
    def _delete_object(self, client: Client, name: str) -> None: ...

    @abstractmethod
    def _delete_objects(self, client: Client, names: Sequence[str]) -> Sequence[tuple[str, str, str]]:
        """Delete a batch; returns name, code and message of those that were not deleted."""

    @abstractmethod
    def _create_multipart_upload(
        self, client: Client, name: str, content_type: str | None, metadata: Mapping[str, str]
    ) -> str: ...

    @abstractmethod
    def _upload_part(self, client: Client, name: str, upload_id: str, number: int, body: bytes) -> Headers: ...

    @abstractmethod
    def _complete_multipart_upload(self, client: Client, name: str, upload_id: str, parts: Sequence[Part]) -> str:
        """Put the parts together; returns the ETag of the object."""

    @abstractmethod
    def _abort_multipart_upload(self, client: Client, name: str, upload_id: str) -> None: ...

    # --- the contract ---

    def check(self) -> None:
        self._page(None, first_query(self._settings.key_prefix) | {"max-keys": "1"}, operation="check")

    def check_encryption(self) -> None:
        if not self._settings.uses_sse:
            return
        self._encryption.ensure()

    def put(
        self,
        key: str,
        body: BinaryIO,
        size: int,
        *,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ObjectInfo:
        self._name(key)
        metadata = _checked_metadata(metadata)
        self.check_encryption()
        if size > self._settings.multipart_threshold:
            return self._put_parts(key, body, size, content_type, metadata)
        with self._memory.reserve(size):
            return self._put_whole(key, read_exactly(body, size), content_type, metadata)

    def open(self, key: str, *, offset: int = 0, if_match: str | None = None) -> ObjectReader:
        name = self._name(key)

        def get(encrypted: bool) -> ObjectReader:
            def request(client: Client) -> ObjectReader:
                headers, raw = self._get_object(client, name, offset, if_match, encrypted)
                try:
                    info = object_info(key, headers)
                    check_match(info, if_match)
                    check_range(headers, offset)
                except BaseException:
                    raw.close()
                    raise
                return S3Reader(
                    info,
                    raw,
                    info.size - offset,
                    deadline=self._transport.reading,
                    read_timeout=self._settings.read_timeout,
                    verifies=self._settings.response_checksum_validation == "when_supported",
                    secrets=self._caller.secrets,
                )

            return self._call("open", key, request)

        return self._or_unencrypted(key, get)

    def stat(self, key: str) -> ObjectInfo:
        name = self._name(key)

        def head(encrypted: bool) -> ObjectInfo:
            return self._call("stat", key, lambda client: object_info(key, self._head_object(client, name, encrypted)))

        return self._or_unencrypted(key, head)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        return list_objects(partial(self._page, prefix), self._settings.key_prefix, prefix, start_after)

    def delete(self, keys: Iterable[str]) -> Iterator[DeleteFailure]:
        remaining = iter(keys)
        in_batches = True
        while batch := [(self._name(key), key) for key in itertools.islice(remaining, _DELETE_BATCH)]:
            if in_batches:
                try:
                    yield from self._delete_batch(dict(pair for pair in batch if not _NOT_FOR_XML.search(pair[0])))
                    batch = [pair for pair in batch if _NOT_FOR_XML.search(pair[0])]
                except (NotSupported, RequestRejected) as refusal:
                    logger.info("Deleting objects one by one, since the server refuses batches (%s)", refusal)
                    in_batches = False
            for name, key in batch:
                yield from self._delete_one(name, key)

    def close(self) -> None:
        self._caller.close()
        with self._lock:
            if self._executor is not None:
                # Nothing is cancelled: uploads wait for the parts that they have handed in, which fail at once.
                self._executor.shutdown(wait=False)
        self._transport.close()

    # --- keys and answers ---

    def _name(self, key: str) -> str:
        """The key as the bucket knows it. Raises `ValueError` for one that the contract refuses."""
        if any(segment in ("", ".", "..") for segment in key.split("/")):
            raise ValueError(f"not a key: {key!r} is empty, absolute, or has an empty, '.' or '..' segment")
        key.encode()
        return self._settings.key_prefix + key

    def _page(self, prefix: str | None, query: Query, operation: str = "list") -> ListingPage:
        return self._call(operation, prefix, lambda client: parse_listing(self._list_page(client, query)))

    # --- encryption ---

    def _prove_encryption(self) -> None:
        key = f".encryption-probe-{token_hex(8)}"
        with self._transport.call():
            try:
                self._put_whole(key, token_bytes(64), None, {})
                if self._readable_without_key(key):
                    raise EncryptionNotApplied(
                        "the server acknowledged the encryption key, but gives the object out without it",
                        operation="check_encryption",
                    )
            finally:
                self._remove_probe(key)

    def _readable_without_key(self, key: str) -> bool:
        name = self._name(key)
        try:
            self._call("check_encryption", key, lambda client: self._head_object(client, name, False))
        except (RequestRejected, AccessDenied):
            return False
        return True

    def _remove_probe(self, key: str) -> None:
        try:
            self._call("delete", key, lambda client: self._delete_object(client, self._name(key)))
        except BackendError as error:
            logger.debug("The probe object was left behind: %s", error)

    def _check_acknowledged(self, operation: str, key: str, headers: Headers) -> None:
        if self._settings.uses_sse and headers.get(_SSE_ACKNOWLEDGEMENT) != self._settings.sse_customer_algo:
            raise EncryptionNotApplied(
                "the server ignores sse_customer_key and would store plain text; "
                "remove the setting, or use a server that supports SSE-C",
                operation=operation,
                key=key,
            )

    def _or_unencrypted(self, key: str, request: Callable[[bool], Result]) -> Result:
        """Make the request with the encryption key, and without it where the server says that it does not apply."""
        if not self._settings.uses_sse:
            return request(False)
        with self._transport.call():
            try:
                return request(True)
            except RequestRejected as rejection:
                if rejection.status != 400:
                    raise
                try:
                    result = request(False)
                except (RequestRejected, AccessDenied):
                    raise rejection from rejection.__cause__
        if not self._warned_of_plain_objects:
            self._warned_of_plain_objects = True
            logger.warning("%r was stored without sse_customer_key and is not encrypted; more may be", key)
        return result

    # --- sending ---

    def _put_whole(self, key: str, data: bytes, content_type: str | None, metadata: Mapping[str, str]) -> ObjectInfo:
        name = self._name(key)
        headers = self._call("put", key, lambda client: self._put_object(client, name, data, content_type, metadata))
        etag = headers.get("etag", "")
        if not etag:
            # A page that something in front of the bucket puts up comes with status 200 too.
            etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
            found = self._found(key)
            # Of the same size may be the object that was to be replaced.
            if found is None or found[0].etag != etag:
                raise _unsettled(key)
        self._check_acknowledged("put", key, headers)
        return self._stored(key, len(data), etag, metadata)

    def _put_parts(
        self, key: str, body: BinaryIO, size: int, content_type: str | None, metadata: Mapping[str, str]
    ) -> ObjectInfo:
        name = self._name(key)
        mark = token_hex(16)
        marked = {**metadata, UPLOAD_MARK: mark}
        upload_id = self._call(
            "put", key, lambda client: self._create_multipart_upload(client, name, content_type, marked)
        )

        # A part and the abort after it share the time that the contract promises, and so do the requests at the end.
        def send(number: int, data: bytes) -> Part:
            def request(client: Client) -> Headers:
                headers = self._upload_part(client, name, upload_id, number, data)
                if not headers.get("etag"):
                    raise UnreadableReply("the answer to a part has no ETag")
                return headers

            with self._transport.call(self._settings.read_timeout):
                headers = self._call("put", key, request)
            self._check_acknowledged("put", key, headers)
            return Part(number, bare_etag(headers["etag"]))

        try:
            parts = send_parts(
                body,
                size,
                self._settings.multipart_chunksize,
                submit=lambda number, data: self._submit_part(key, partial(send, number, data)),
                memory=self._memory,
            )
        except BaseException:
            with self._transport.call(self._settings.connect_timeout):
                self._abort(key, upload_id)
            raise
        with self._transport.call():
            try:
                etag = self._complete(key, upload_id, parts, size, mark)
            except BaseException:
                self._abort(key, upload_id)
                raise
        return self._stored(key, size, etag, metadata)

    def _complete(self, key: str, upload_id: str, parts: Sequence[Part], size: int, mark: str) -> str:
        """Put the parts together; an error may still mean success, which the mark on the object tells."""
        name = self._name(key)
        failure = None
        try:
            etag = self._call(
                "put", key, lambda client: self._complete_multipart_upload(client, name, upload_id, parts)
            )
        except BackendError as error:
            failure = error
        else:
            if etag:
                return etag
            # Ceph leaves it empty.
        found = self._found(key)
        if found is not None:
            info, headers = found
            if info.size == size and upload_mark(headers) == mark:
                return info.etag
        raise failure or _unsettled(key)

    def _found(self, key: str) -> tuple[ObjectInfo, Headers] | None:
        """What is there after the answer to an upload has left it open; None where that cannot be told either."""
        name = self._name(key)
        try:
            headers = self._call("stat", key, lambda client: self._head_object(client, name, self._settings.uses_sse))
            return object_info(key, headers), headers
        except (BackendError, ValueError) as error:
            logger.debug("Whether the object was stored could not be settled: %s", error)
            return None

    def _abort(self, key: str, upload_id: str) -> None:
        name = self._name(key)
        try:
            self._call("put", key, lambda client: self._abort_multipart_upload(client, name, upload_id))
        except BackendError as error:
            if error.code != "NoSuchUpload":
                logger.warning("The parts of a failed upload were left in the bucket: %s", error)

    def _submit_part(self, key: str, send: Callable[[], Part]) -> Future[Part]:
        with self._lock:
            self._caller.refuse_after_close("put", key)
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_PART_THREADS, thread_name_prefix="s3-part")
            return self._executor.submit(send)

    def _stored(self, key: str, size: int, etag: str, metadata: Mapping[str, str]) -> ObjectInfo:
        return ObjectInfo(key, size, bare_etag(etag), None, self._settings.storage_class or "STANDARD", dict(metadata))

    # --- deleting ---

    def _delete_batch(self, keys_by_name: dict[str, str]) -> Iterator[DeleteFailure]:
        if not keys_by_name:
            return
        failures = self._call("delete", None, lambda client: self._delete_objects(client, tuple(keys_by_name)))
        self._caller.secrets.add_credentials(self._transport.credentials_sent or ())
        for name, code, message in failures:
            key = keys_by_name.get(name, name)
            if code not in ("NoSuchKey", "NoSuchVersion"):
                kind = error_class(400, code, of_object=True)
                reason = self._caller.secrets.scrub(f"the server answered {code}: {message}")
                yield DeleteFailure(
                    key, kind(reason, operation="delete", key=key, code=self._caller.secrets.scrub(code))
                )

    def _delete_one(self, name: str, key: str) -> Iterator[DeleteFailure]:
        try:
            self._call("delete", key, lambda client: self._delete_object(client, name))
        except BackendUnavailable:
            raise
        except BucketNotFound as error:
            # Without a code it may be the key that is not there.
            if error.code is not None:
                raise
        except BackendError as error:
            if error.status != 404:
                yield DeleteFailure(key, error)


def content_md5(body: bytes) -> str:
    """The value of a Content-MD5 header, by which the server verifies a body."""
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _unsettled(key: str) -> BackendUnavailable:
    return BackendUnavailable(
        "unreadable reply: it has no ETag, and what was sent is not found in the bucket", operation="put", key=key
    )


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    checked = {name.lower(): value for name, value in (metadata or {}).items()}
    for text in itertools.chain(checked, checked.values()):
        if not (text.isascii() and text.isprintable()):
            raise ValueError("names and values of metadata must be printable ASCII")
    return checked

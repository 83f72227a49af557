"""The backend on minio-py: MinIO and other servers outside AWS, at less than half of boto3's CPU.

minio-py's public methods parse what is not needed and leave out what is (storage class, part
numbers, raw pages), so the requests are made with `Minio._execute`, which signs and sends one
request. It is private: the version of minio in setup.cfg is bounded for that reason.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    IamAwsProvider,
    Provider,
    StaticProvider,
)
from minio.datatypes import Part as MinioPart
from minio.deleteobjects import DeleteObject
from minio.sse import SseCustomerKey
from urllib3.response import BaseHTTPResponse

from backends.answers import Headers, lowered
from backends.credentials import AccessKey
from backends.errors import innermost
from backends.multipart import Part
from backends.reader import RawBody
from backends.s3_backend import S3Backend, content_md5

# The address of the EC2 metadata service answers at once or not at all.
_METADATA_TIMEOUT = urllib3.Timeout(connect=1, read=5)


class MinioBackend(S3Backend[Minio]):
    """Requests through minio-py."""

    def _connect(self, access_key: AccessKey | None) -> Minio:
        settings = self._settings
        endpoint = urlsplit(settings.endpoint_url or "https://s3.amazonaws.com")
        client = Minio(
            endpoint.netloc,
            secure=settings.is_https,
            region=self._region,
            http_client=self._transport,
            credentials=_static(access_key) if access_key else _EnvironmentChain(),
        )
        if settings.addressing_style == "virtual":
            client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
        elif settings.addressing_style == "path":
            client.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
        return client

    def _is_credentials_error(self, error: Exception) -> bool:
        # minio-py's providers raise plain ValueErrors.
        return isinstance(error, ValueError)

    def _put_object(
        self, client: Minio, name: str, body: bytes, content_type: str | None, metadata: Mapping[str, str]
    ) -> Headers:
        headers = self._new_object(content_type, metadata) | self._checksum(body)
        return self._send(client, "PUT", name, headers, body=body)

    def _get_object(
        self, client: Minio, name: str, offset: int, if_match: str | None, encrypted: bool
    ) -> tuple[Headers, RawBody]:
        headers = self._sse(encrypted)
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if if_match is not None:
            headers["If-Match"] = f'"{if_match}"'
        response = client._execute("GET", self._settings.bucket, name, headers=dict(headers), preload_content=False)
        return lowered(response.headers), response

    def _head_object(self, client: Minio, name: str, encrypted: bool) -> Headers:
        return self._send(client, "HEAD", name, self._sse(encrypted))

    def _list_page(self, client: Minio, query: Mapping[str, str]) -> bytes:
        return client._execute("GET", self._settings.bucket, query_params=dict(query)).data

    def _delete_object(self, client: Minio, name: str) -> None:
        self._send(client, "DELETE", name, {})

    def _delete_objects(self, client: Minio, names: Sequence[str]) -> Sequence[tuple[str, str, str]]:
        result = client._delete_objects(self._settings.bucket, [DeleteObject(name) for name in names], quiet=True)
        return [(error.name or "", error.code or "", error.message or "") for error in result.error_list]

    def _create_multipart_upload(
        self, client: Minio, name: str, content_type: str | None, metadata: Mapping[str, str]
    ) -> str:
        headers = self._new_object(content_type, metadata)
        return client._create_multipart_upload(self._settings.bucket, name, {**headers})

    def _upload_part(self, client: Minio, name: str, upload_id: str, number: int, body: bytes) -> Headers:
        headers = self._sse(True) | self._checksum(body)
        query = {"partNumber": str(number), "uploadId": upload_id}
        return self._send(client, "PUT", name, headers, body=body, query=query)

    def _complete_multipart_upload(self, client: Minio, name: str, upload_id: str, parts: Sequence[Part]) -> str:
        sent = [MinioPart(part.number, part.etag) for part in parts]
        key = None if self._sse_key is None else SseCustomerKey(self._sse_key)
        result = client._complete_multipart_upload(self._settings.bucket, name, upload_id, sent, key)
        return result.etag or ""

    def _abort_multipart_upload(self, client: Minio, name: str, upload_id: str) -> None:
        client._abort_multipart_upload(self._settings.bucket, name, upload_id)

    def _send(
        self,
        client: Minio,
        method: str,
        name: str,
        headers: Mapping[str, str],
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Headers:
        response = client._execute(
            method,
            self._settings.bucket,
            name,
            body=body,
            headers=dict(headers),
            query_params=dict(query) if query else None,
        )
        return lowered(response.headers)

    def _checksum(self, body: bytes) -> dict[str, str]:
        return {} if self._signs_bodies else {"Content-MD5": content_md5(body)}

    def _new_object(self, content_type: str | None, metadata: Mapping[str, str]) -> dict[str, str]:
        headers = self._sse(True)
        headers |= {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        if content_type is not None:
            headers["Content-Type"] = content_type
        if self._settings.storage_class is not None:
            headers["x-amz-storage-class"] = self._settings.storage_class
        return headers

    def _sse(self, encrypted: bool) -> dict[str, str]:
        if not encrypted or self._sse_key is None:
            return {}
        return {name: str(value) for name, value in SseCustomerKey(self._sse_key).headers().items()}


def _static(access_key: AccessKey) -> Provider:
    return StaticProvider(access_key.access_key_id, access_key.secret_access_key, access_key.session_token)


class _EnvironmentChain(ChainedProvider):
    """Environment, ~/.aws, then the machine's role (EC2, ECS, Kubernetes service accounts)."""

    def __init__(self) -> None:
        metadata_client = _RoleClient(timeout=_METADATA_TIMEOUT, retries=urllib3.Retry(1))
        super().__init__([EnvAWSProvider(), AWSConfigProvider(), IamAwsProvider(http_client=metadata_client)])

    def retrieve(self) -> Credentials:
        """Find credentials. Raises `ValueError`, and tells no secret."""
        try:
            return super().retrieve()
        except configparser.Error:
            # It quotes the line.
            reason = "the file with the AWS credentials cannot be read (minio-py takes a single % for a mistake)"
        except ValueError as error:
            reason = str(error)
        except Exception as error:
            reason = f"those of the machine's role cannot be had: {innermost(error)}"
        # Out of the handler, so that what went wrong does not become the context.
        raise ValueError(reason)


class _RoleClient(urllib3.PoolManager):
    """Asks for the credentials of a role.

    minio-py puts the token of a service account into the URL, which urllib3 logs and quotes in its errors. AWS takes it in
    the body as well: https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html
    """

    def urlopen(self, method: str, url: str, redirect: bool = True, **options: Any) -> BaseHTTPResponse:  # type: ignore[override]
        if method == "POST":
            url, _, form = url.partition("?")
            options |= {"body": form, "headers": {"Content-Type": "application/x-www-form-urlencoded"}}
        return super().urlopen(method, url, redirect, **options)

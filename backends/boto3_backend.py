"""The backend on boto3, Amazon's SDK: AWS, and every way that botocore knows to find credentials."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import boto3
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, InvalidRegionError

from backends.answers import Headers, lowered
from backends.credentials import AccessKey
from backends.errors import SettingsError
from backends.multipart import Part
from backends.reader import RawBody
from backends.s3_backend import S3Backend, content_md5

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_EMPTY_LISTING = b"<ListBucketResult/>"
_LISTING_PARAMETERS = {
    "prefix": "Prefix",
    "start-after": "StartAfter",
    "continuation-token": "ContinuationToken",
    "marker": "Marker",
    "encoding-type": "EncodingType",
}


class Boto3Backend(S3Backend["S3Client"]):
    """Requests through a botocore client."""

    def _connect(self, access_key: AccessKey | None) -> S3Client:
        settings = self._settings
        # At DEBUG botocore logs the headers of every request, session token and encryption key among them.
        logging.getLogger("botocore").setLevel(logging.INFO)
        config: dict[str, Any] = {
            "signature_version": "s3v4",
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "request_checksum_calculation": settings.request_checksum_calculation,
            "response_checksum_validation": settings.response_checksum_validation,
            # What is handed over here has types already.
            "parameter_validation": False,
            # A fixed one: botocore would put it together anew for every request.
            "user_agent": "enhanced-s3-storage-provider",
            "s3": {
                "addressing_style": settings.addressing_style,
                "payload_signing_enabled": self._signs_bodies,
            },
        }
        session = boto3.session.Session(
            aws_access_key_id=access_key.access_key_id if access_key else None,
            aws_secret_access_key=access_key.secret_access_key if access_key else None,
            aws_session_token=access_key.session_token if access_key else None,
        )
        # What goes wrong with them is not to be taken for a fault of the endpoint.
        session.get_credentials()
        try:
            client = session.client(
                "s3",
                endpoint_url=settings.endpoint_url,
                region_name=self._region,
                config=Config(**config),
            )
        except InvalidRegionError as error:
            raise SettingsError(("region_name",), str(error)) from error
        except ValueError as error:
            # Such as a host with an underscore, as Docker allows them.
            raise SettingsError(("endpoint_url",), f"boto3 cannot use it: {error}") from error
        # The environment or a profile may name the endpoint, where the settings do not.
        settings.check_key_stays_secret(client.meta.endpoint_url.startswith("https:"))
        events: Any = client.meta.events
        events.register("before-send.s3", self._send)
        if not settings.is_aws:
            events.register("before-parameter-build.s3", _do_not_redirect)
        events.register("before-parse.s3", _keep_headers)
        # Before botocore parses the page to see whether it is an error.
        for listing in ("ListObjectsV2", "ListObjects"):
            events.register_first(f"before-parse.s3.{listing}", _keep_listing)
        events.register("before-call.s3.DeleteObjects", _add_content_md5)
        return client

    def _is_credentials_error(self, error: Exception) -> bool:
        # The chain has many ways to fail: profiles, SSO, a role that STS refuses, new credentials that have expired, a process
        # that does not print JSON.
        return isinstance(error, (BotoCoreError, ClientError, RuntimeError, json.JSONDecodeError))

    def _send(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        """Send what botocore has signed; it takes the answer of a `before-send` handler for its own."""
        # botocore makes a file of it, which would be sent in many small pieces, and asks the server whether it may send it,
        # for whose consent nobody waits.
        body = request.body.getvalue() if isinstance(request.body, io.BytesIO) else request.body
        headers = {name: value for name, value in request.headers.items() if name != "Expect"}
        response = self._transport.urlopen(
            request.method,
            request.url,
            body=body,
            headers=headers,
            preload_content=not request.stream_output,
        )
        kept = response.status >= 300 or not request.stream_output
        raw = _KeptBody(response.data) if kept else response
        return AWSResponse(request.url, response.status, response.headers, raw)  # type: ignore[arg-type]

    def _put_object(
        self, client: S3Client, name: str, body: bytes, content_type: str | None, metadata: Mapping[str, str]
    ) -> Headers:
        reply: Any = client.put_object(
            Bucket=self._settings.bucket,
            Key=name,
            Body=body,
            **self._checksum(body),
            **self._new_object(content_type, metadata),
        )
        return lowered(reply["Headers"])

    def _get_object(
        self, client: S3Client, name: str, offset: int, if_match: str | None, encrypted: bool
    ) -> tuple[Headers, RawBody]:
        options: dict[str, Any] = {}
        if offset:
            options["Range"] = f"bytes={offset}-"
        if if_match is not None:
            options["IfMatch"] = f'"{if_match}"'
        reply: Any = client.get_object(Bucket=self._settings.bucket, Key=name, **options, **self._sse(encrypted))
        return lowered(reply["Headers"]), reply["Body"]

    def _head_object(self, client: S3Client, name: str, encrypted: bool) -> Headers:
        reply: Any = client.head_object(Bucket=self._settings.bucket, Key=name, **self._sse(encrypted))
        return lowered(reply["Headers"])

    def _list_page(self, client: S3Client, query: Mapping[str, str]) -> bytes:
        options: dict[str, Any] = {
            parameter: query[name] for name, parameter in _LISTING_PARAMETERS.items() if name in query
        }
        if "max-keys" in query:
            options["MaxKeys"] = int(query["max-keys"])
        request = client.list_objects_v2 if "list-type" in query else client.list_objects
        reply: Any = request(Bucket=self._settings.bucket, **options)
        page: bytes = reply["Page"]
        return page

    def _delete_object(self, client: S3Client, name: str) -> None:
        client.delete_object(Bucket=self._settings.bucket, Key=name)

    def _delete_objects(self, client: S3Client, names: Sequence[str]) -> Sequence[tuple[str, str, str]]:
        reply = client.delete_objects(
            Bucket=self._settings.bucket, Delete={"Objects": [{"Key": name} for name in names], "Quiet": True}
        )
        errors = reply.get("Errors", [])
        return [(error.get("Key", ""), error.get("Code", ""), error.get("Message", "")) for error in errors]

    def _create_multipart_upload(
        self, client: S3Client, name: str, content_type: str | None, metadata: Mapping[str, str]
    ) -> str:
        reply = client.create_multipart_upload(
            Bucket=self._settings.bucket, Key=name, **self._new_object(content_type, metadata)
        )
        return reply["UploadId"]

    def _upload_part(self, client: S3Client, name: str, upload_id: str, number: int, body: bytes) -> Headers:
        reply: Any = client.upload_part(
            Bucket=self._settings.bucket,
            Key=name,
            UploadId=upload_id,
            PartNumber=number,
            Body=body,
            **self._checksum(body),
            **self._sse(True),
        )
        return lowered(reply["Headers"])

    def _complete_multipart_upload(self, client: S3Client, name: str, upload_id: str, parts: Sequence[Part]) -> str:
        reply = client.complete_multipart_upload(
            Bucket=self._settings.bucket,
            Key=name,
            UploadId=upload_id,
            MultipartUpload={"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in parts]},
            **self._sse(True),
        )
        return reply.get("ETag", "")

    def _abort_multipart_upload(self, client: S3Client, name: str, upload_id: str) -> None:
        client.abort_multipart_upload(Bucket=self._settings.bucket, Key=name, UploadId=upload_id)

    def _checksum(self, body: bytes) -> dict[str, Any]:
        return {} if self._signs_bodies else {"ContentMD5": content_md5(body)}

    def _new_object(self, content_type: str | None, metadata: Mapping[str, str]) -> dict[str, Any]:
        options = self._sse(True)
        if metadata:
            options["Metadata"] = dict(metadata)
        if content_type is not None:
            options["ContentType"] = content_type
        if self._settings.storage_class is not None:
            options["StorageClass"] = self._settings.storage_class
        return options

    def _sse(self, encrypted: bool) -> dict[str, Any]:
        if not encrypted or self._sse_key is None:
            return {}
        return {"SSECustomerAlgorithm": self._settings.sse_customer_algo, "SSECustomerKey": self._sse_key}


class _KeptBody(io.BytesIO):
    """A body that has been read, in the form in which botocore reads one."""

    def stream(self, _amt: int = 0, decode_content: bool = False) -> Iterator[bytes]:
        yield self.read()


def _keep_headers(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Hand the headers over unparsed: to look for forty of them takes botocore longer than to sign the request."""
    if response_dict["status_code"] < 300:
        customized_response_dict["Headers"] = response_dict["headers"]
        response_dict["headers"] = {}


def _keep_listing(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Hand the page over unparsed: botocore takes 120 ms of CPU for 1,000 keys."""
    if response_dict["status_code"] == 200:
        customized_response_dict["Page"] = response_dict["body"]
        response_dict["body"] = _EMPTY_LISTING


def _do_not_redirect(context: dict[str, Any], **_: Any) -> None:
    """Outside AWS there are no regions to be redirected to; botocore would look for one after each HEAD with a 400."""
    context.setdefault("s3_redirect", {})["redirected"] = True


def _add_content_md5(params: dict[str, Any], **_: Any) -> None:
    """Older stores, Swift among them, want it; botocore sends a CRC32 instead."""
    params["headers"]["Content-MD5"] = content_md5(params["body"])

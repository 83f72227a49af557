"""What can go wrong with a bucket, as exceptions, and the one table that tells which it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

# Longer words of a server would flood the log.
_LONGEST_REASON = 1000


class SettingsError(ValueError):
    """A setting is missing, wrong, or contradicts another one.

    `path` holds the keys that lead to the setting, outermost first; `reason` is a sentence
    for the operator. Neither ever holds the value of a secret.
    """

    def __init__(self, path: tuple[str, ...], reason: str) -> None:
        super().__init__(f"{'.'.join(path)}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


class BackendError(Exception):
    """An operation on the bucket failed.

    The SDK's own exception is the `__cause__`. `code` is the S3 error code (`SlowDown`) and
    `status` the HTTP status of the last answer; both are None where no answer came.
    """

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later, with nothing changed by a person."""

    def __init__(
        self,
        reason: str,
        *,
        operation: str,
        key: str | None = None,
        code: str | None = None,
        status: int | None = None,
    ) -> None:
        reason = in_one_line(reason[:_LONGEST_REASON])
        target = operation if key is None else f"{operation} {key!r}"
        super().__init__(f"{target}: {reason}")
        self.reason = reason
        self.operation = operation
        self.key = key
        self.code = code
        self.status = status


class ObjectNotFound(BackendError):
    """The server said that there is no such object."""


class BucketNotFound(BackendError):
    """The server said that there is no such bucket."""


class Misconfigured(BackendError):
    """A setting, or a file that one names, cannot be used; nothing was asked of the server."""


class AccessDenied(BackendError):
    """The server refused the credentials or what they may do, or there are none."""


class RequestRejected(BackendError):
    """The server will not accept this request, now or later."""


class NotSupported(BackendError):
    """The server does not know how to do this."""


class PreconditionFailed(BackendError):
    """The object is no longer the one that the caller named by its ETag."""


class ObjectArchived(BackendError):
    """The object lies in an archive class and must be restored there before it can be read."""


class EncryptionNotApplied(BackendError):
    """The server did not encrypt with the customer's key (SSE-C), though it was asked to."""


class BackendUnavailable(BackendError):
    """No usable answer: connection, time-out, throttling, a server's fault, a cut or unreadable reply."""

    retryable = True


class ContentDamaged(BackendUnavailable):
    """The whole content has come, and has not its checksum: what was read before is not to be trusted either."""


# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, and what MinIO, Ceph and Swift send.
_BY_CODE: dict[str, type[BackendError]] = {
    "NoSuchKey": ObjectNotFound,
    "NoSuchBucket": BucketNotFound,
    "AccessDenied": AccessDenied,
    "AllAccessDisabled": AccessDenied,
    "AccountProblem": AccessDenied,
    "ExpiredToken": AccessDenied,
    "InvalidAccessKeyId": AccessDenied,
    "InvalidSecurity": AccessDenied,
    "InvalidToken": AccessDenied,
    "SignatureDoesNotMatch": AccessDenied,
    "RequestTimeTooSkewed": AccessDenied,
    "TokenRefreshRequired": AccessDenied,
    "InvalidObjectState": ObjectArchived,
    "PreconditionFailed": PreconditionFailed,
    "MethodNotAllowed": NotSupported,
    "NotImplemented": NotSupported,
    # Damage on the way: the server's checksum did not match what it received.
    "BadDigest": BackendUnavailable,
    "IncompleteBody": BackendUnavailable,
    "XAmzContentChecksumMismatch": BackendUnavailable,
    "XAmzContentSHA256Mismatch": BackendUnavailable,
    "ConditionalRequestConflict": BackendUnavailable,
    "InternalError": BackendUnavailable,
    "OperationAborted": BackendUnavailable,
    "RequestTimeout": BackendUnavailable,
    "ServiceUnavailable": BackendUnavailable,
    "SlowDown": BackendUnavailable,
}

_BY_STATUS: dict[int, type[BackendError]] = {
    401: AccessDenied,
    403: AccessDenied,
    405: NotSupported,
    408: BackendUnavailable,
    412: PreconditionFailed,
    429: BackendUnavailable,
    501: NotSupported,
}

EXPIRED_CREDENTIALS = frozenset(
    {"ExpiredToken", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)
"""Codes after which credentials that came from files are read again: a rotated key looks like a wrong one."""


def error_class(status: int, code: str | None, *, of_object: bool) -> type[BackendError]:
    """The exception for an answer.

    The code decides where it is known, else the status. `of_object` tells whether a bare 404
    speaks of an object (GET, HEAD) or of the bucket (PUT, LIST).
    """
    if code in _BY_CODE:
        return _BY_CODE[code]
    if status == 404 and code is None:
        return ObjectNotFound if of_object else BucketNotFound
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return RequestRejected if 300 <= status < 500 else BackendUnavailable


def in_one_line(text: str) -> str:
    """A text without line breaks and escapes, to be shown in a log or on a terminal, whoever has written it."""
    words = " ".join(text.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in words)


def cause_chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that stand behind it, by cause or by context, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [current.__cause__, current.__context__]


def detach(error: BaseException, before: BaseException | None) -> None:
    """Cut off what the caller was handling when it made the call that failed: it is no cause of this error."""
    for each in cause_chain(error):
        if before is not None and each.__context__ is before:
            each.__context__ = None


def innermost(error: BaseException) -> BaseException:
    """The exception that says what happened; those around it mostly repeat the address."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error

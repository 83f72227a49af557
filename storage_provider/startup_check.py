"""What is wrong with the settings, found out at the bucket itself and told in words."""

from __future__ import annotations

from dataclasses import dataclass

from backends import open_backend
from backends.base import Backend
from backends.errors import (
    AccessDenied,
    BackendError,
    BucketNotFound,
    EncryptionNotApplied,
    Misconfigured,
)
from storage_provider.media_paths import MEDIA_ROOTS
from storage_provider.settings import ProviderSettings

# Of AWS, Garage and Cloudflare.
_OF_THE_REGION = frozenset({"AuthorizationHeaderMalformed", "InvalidRegionName", "PermanentRedirect"})
# Of Tencent and Aliyun.
_OF_THE_ADDRESS = frozenset({"PathStyleDomainForbidden", "SecondLevelDomainForbidden"})


@dataclass(frozen=True)
class Problem:
    """Something that an operator should mend."""

    text: str
    hides_media: bool = False
    """Whether media that is in the bucket would be answered with a 404: then nothing must be served."""


def find_problem(settings: ProviderSettings, backend: Backend) -> Problem | None:
    """The first problem with endpoint, credentials, bucket, prefix or encryption; None where all is well.

    Blocks for as long as three calls of the backend may take.
    """
    try:
        backend.check()
        if problem := prefix_problem(settings):
            return problem
        backend.check_encryption()
    except BackendError as error:
        return Problem(f"{_advice(settings, error)} ({error})")
    return None


def prefix_problem(settings: ProviderSettings) -> Problem | None:
    """Whether the media in the bucket stands under another spelling of the prefix; None where nothing tells so.

    A prefix without a final slash is joined raw by synapse-s3-storage-provider and with a slash by others.
    Where only the raw spelling holds media, every file would seem to be missing, and new ones would
    be kept apart from the old. Raises `BackendError` where the bucket cannot be listed.
    """
    if settings.raw_prefix or not settings.prefix or settings.prefix.endswith("/"):
        return None
    raw = settings.model_copy(update={"raw_prefix": True})
    try:
        if not _holds_media(raw):
            return None
    except AccessDenied:
        # Whoever may list only below the prefix may not list this.
        return None
    spelling = f"the keys start with {settings.prefix + MEDIA_ROOTS[0]!r}, without a slash after the prefix"
    if _holds_media(settings):
        return Problem(f"Some media in the bucket will not be found: of some of it {spelling}")
    return Problem(
        f"The media in the bucket was stored with a raw prefix ({spelling}): set `raw_prefix: true`",
        hides_media=True,
    )


def _advice(settings: ProviderSettings, error: BackendError) -> str:
    where = settings.endpoint_url or "AWS"
    if isinstance(error, BucketNotFound):
        return f"There is no bucket {settings.bucket!r} at {where}: create it, or correct `bucket` or `endpoint_url`"
    if isinstance(error, EncryptionNotApplied):
        return f"{where} does not encrypt with `sse_customer_key`, so no media is sent there"
    if isinstance(error, Misconfigured):
        return "The settings for the bucket cannot be used"
    if error.code in _OF_THE_REGION:
        return (
            f"{where} expects another region: correct `region_name` (it is `garage` for Garage, where not "
            "configured otherwise), or the region in `endpoint_url`"
        )
    if error.code in _OF_THE_ADDRESS:
        return f"{where} wants the bucket's name before its own: set `addressing_style: virtual`"
    if isinstance(error, AccessDenied) and error.status is None:
        return f"There are no credentials for bucket {settings.bucket!r}"
    if isinstance(error, AccessDenied):
        return (
            f"{where} refuses the credentials for bucket {settings.bucket!r}: correct `access_key_id` and "
            "`secret_access_key`, or allow them to list, read and write the bucket"
        )
    if error.retryable:
        return f"{where} does not answer as it should: is `endpoint_url` right, and the server up?"
    return f"{where} refuses to work with bucket {settings.bucket!r}"


def _holds_media(settings: ProviderSettings) -> bool:
    backend = open_backend(settings)
    try:
        return any(next(backend.list(root), None) is not None for root in MEDIA_ROOTS)
    finally:
        backend.close()

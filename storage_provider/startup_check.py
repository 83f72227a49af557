"""What is wrong with the settings, found out at the bucket itself and told in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from backends import open_backend
from backends.base import Backend
from backends.errors import (
    EXPIRED_CREDENTIALS,
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

# A request for each of them tells, instead of one for each of `MEDIA_ROOTS`.
_BEGINNINGS = ("local_", "remote_")


@dataclass(frozen=True)
class Problem:
    """Something that an operator should mend."""

    text: str
    hides_media: bool = False
    """Whether media that is in the bucket would be answered with a 404: then nothing must be served."""
    may_hide_media: bool = False
    """Whether nobody can tell that yet, so that the check must be repeated before anything is served."""


def find_problem(
    settings: ProviderSettings, backend: Backend, others: Iterable[ProviderSettings] = ()
) -> Problem | None:
    """The first problem with endpoint, credentials, bucket, prefix or encryption; None where all is well.

    `others` may serve what these settings do not find. Blocks for as long as three calls of the backend may take.
    """
    is_prefix_open = has_two_spellings(settings)
    try:
        backend.check()
        if problem := prefix_problem(settings, others):
            return problem
        is_prefix_open = False
        backend.check_encryption()
    except BackendError as error:
        problem = Problem(explained(settings, error))
        return _still_open(settings, problem) if is_prefix_open and not forbids_to_list(error) else problem
    return None


def has_two_spellings(settings: ProviderSettings) -> bool:
    """Whether keys may start with the prefix and a slash, or, as with synapse-s3-storage-provider, without it."""
    return bool(settings.prefix) and not settings.prefix.endswith("/") and not settings.raw_prefix


def prefix_problem(settings: ProviderSettings, others: Iterable[ProviderSettings] = ()) -> Problem | None:
    """Whether the media in the bucket stands under another spelling of the prefix; None where nothing tells so.

    A prefix without a final slash is joined raw by synapse-s3-storage-provider and with a slash by others.
    Where only the raw spelling holds media, every file would seem to be missing, and new ones would
    be kept apart from the old. Where both do, one of the `others` may serve what these settings do not
    find. Raises `BackendError` where the bucket does not tell, but for want of the permission to list.
    """
    if not has_two_spellings(settings):
        return None
    raw = replace(settings, raw_prefix=True)
    try:
        if not _holds_media(raw):
            return None
        hides_media = not _holds_media(settings)
    except AccessDenied as error:
        if not forbids_to_list(error):
            raise
        # Whoever may list only below the prefix may not list the raw one; who may list nothing misses nothing.
        return None
    spelling = f"the keys start with {settings.prefix + MEDIA_ROOTS[0]!r}, without a slash after the prefix"
    if not hides_media:
        if any(_serves_raw_keys(settings, other) for other in others):
            return None
        return Problem(
            f"Some media in the bucket will not be found: of some of it {spelling}. A second block of this module in "
            "`media_storage_providers`, with `raw_prefix: true` and with `store_local`, `store_remote` and "
            "`store_synchronous` set to false, serves it as well"
        )
    return Problem(
        f"The media in the bucket was stored with a raw prefix ({spelling}): set `raw_prefix: true`",
        hides_media=True,
    )


def explained(settings: ProviderSettings, error: BackendError) -> str:
    """What failed at the bucket, with what an operator can do about it."""
    return f"{_advice(settings, error)} ({error})"


def _serves_raw_keys(settings: ProviderSettings, other: ProviderSettings) -> bool:
    place = (settings.bucket, settings.endpoint_url, settings.prefix)
    return other.raw_prefix and (other.bucket, other.endpoint_url, other.prefix) == place


def _still_open(settings: ProviderSettings, problem: Problem) -> Problem:
    return Problem(
        f"{problem.text}. Until the bucket tells whether a slash follows `prefix` in its keys, no media is "
        f"stored, and what is not found is answered with an error; `prefix: {settings.prefix}/` says that one does, `raw_prefix: true` that none does",
        may_hide_media=True,
    )


def forbids_to_list(error: BackendError) -> bool:
    """Whether these credentials may not list, and never will; those that are missing or expired may come yet."""
    return isinstance(error, AccessDenied) and error.status is not None and error.code not in EXPIRED_CREDENTIALS


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
        return any(info.key.startswith(MEDIA_ROOTS) for begin in _BEGINNINGS for info in backend.list(begin))
    finally:
        backend.close()

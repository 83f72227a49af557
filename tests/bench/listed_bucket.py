"""A bucket of any number of empty objects that is never stored: its answers are made up as it is asked."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import overload
from urllib.parse import quote

from storage_provider.media_paths import Media, content_path
from tests.backends.scripted_server import Behaviour, Request, error, reply

EMPTY_ETAG = "d41d8cd98f00b204e9800998ecf8427e"

_PAGE = 1000
_TIME = "2026-01-01T00:00:00.000Z"
_HEADERS = {"ETag": f'"{EMPTY_ETAG}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


class NumberedMedia(Sequence[Media]):
    """Media in the byte order of their paths, half of it from another server; at most a hundred in a directory."""

    def __init__(self, number: int) -> None:
        if number > 1_000_000 or number % 2:
            raise ValueError("an even number up to a million")
        self._half = number // 2

    def __len__(self) -> int:
        return 2 * self._half

    @overload
    def __getitem__(self, index: int) -> Media: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Media]: ...

    def __getitem__(self, index: int | slice) -> Media | Sequence[Media]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        is_remote, place = divmod(index, self._half)
        # Spread evenly over what six digits can say.
        number = place * 1_000_000 // self._half
        return Media("media.example" if is_remote else "", f"{number:06}AbCdEfGhIjKlMnOpQr")


class ListedBucket:
    """Answers like S3 for a bucket that holds exactly the contents of this media."""

    def __init__(self, media: NumberedMedia) -> None:
        self._keys = _Keys(media)
        self.pages = 0
        """How many pages of listings were asked for."""

    def answer(self, request: Request) -> Behaviour:
        """What to say to a request about any bucket, in path style."""
        key = request.path.lstrip("/").partition("/")[2]
        if request.method == "GET" and not key:
            return self._listing(request.query)
        if request.method == "HEAD" and not key:
            return reply(200)
        if request.method == "HEAD" and self._keys.has(key):
            return reply(200, headers=_HEADERS)
        if request.method == "GET" and self._keys.has(key):
            return reply(200, b"", _HEADERS)
        if request.method in ("HEAD", "GET"):
            return error(404, "NoSuchKey")
        return error(403, "AccessDenied", "everything is there already")

    def _listing(self, query: dict[str, str]) -> Behaviour:
        if "list-type" not in query:
            # Such as the bucket's location.
            return reply(200, '<?xml version="1.0"?><LocationConstraint/>')
        self.pages += 1
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        first = max(bisect_left(self._keys, prefix), bisect_right(self._keys, after))
        keys: list[str] = []
        page = min(int(query.get("max-keys", _PAGE)), _PAGE)
        is_truncated = False
        for index in range(first, len(self._keys)):
            key = self._keys[index]
            if not key.startswith(prefix):
                break
            if len(keys) == page:
                is_truncated = True
                break
            keys.append(key)
        is_encoded = query.get("encoding-type") == "url"
        entries = "".join(
            f"<Contents><Key>{quote(key) if is_encoded else key}</Key><LastModified>{_TIME}</LastModified>"
            f"<ETag>&quot;{EMPTY_ETAG}&quot;</ETag><Size>0</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys
        )
        token = f"<NextContinuationToken>{keys[-1]}</NextContinuationToken>" if is_truncated else ""
        encoding = "<EncodingType>url</EncodingType>" if is_encoded else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
            f"{encoding}{token}{entries}</ListBucketResult>"
        )
        return reply(200, body, {"Content-Type": "application/xml"})


class _Keys(Sequence[str]):
    """The keys of media; none is kept. ASCII, so that their order is that of their bytes."""

    def __init__(self, media: NumberedMedia) -> None:
        self._media = media

    def has(self, key: str) -> bool:
        index = bisect_left(self, key)
        return index < len(self) and self[index] == key

    def __len__(self) -> int:
        return len(self._media)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [content_path(media) for media in self._media[index]]
        return content_path(self._media[index])

"""Reading the content of an object, and never taking a part of it for the whole."""

from __future__ import annotations

import sys
from typing import Protocol

from backends.base import ObjectInfo, ObjectReader
from backends.credentials import Secrets
from backends.errors import BackendUnavailable, ContentDamaged, detach, innermost
from backends.receiving import Deadline


class RawBody(Protocol):
    """The body of an answer, as both SDKs give it."""

    def read(self, amt: int, /) -> bytes: ...

    def close(self) -> None: ...


class S3Reader(ObjectReader):
    """Counts what it reads, so that a connection that ends early is an error."""

    def __init__(
        self,
        info: ObjectInfo,
        raw: RawBody,
        length: int,
        *,
        deadline: Deadline,
        read_timeout: float,
        verifies: bool,
        secrets: Secrets,
    ) -> None:
        """With `verifies` the SDK may have a checksum to compare, which it does at the end."""
        self.info = info
        self._raw = raw
        self._left = length
        self._deadline = deadline
        self._read_timeout = read_timeout
        self._verifies = verifies
        self._secrets = secrets

    def read(self, n: int) -> bytes:
        if self._left == 0:
            self.close()
        wanted = min(n, self._left)
        if wanted <= 0:
            return b""
        self._deadline.restart(self._read_timeout)
        data, cause = self._read_up_to(wanted)
        if len(data) < wanted:
            self.close()
            reason = "the connection was closed" if cause is None else str(innermost(cause))
            raise BackendUnavailable(
                f"the content broke off {self._left - len(data)} bytes early: {self._secrets.scrub(reason)}",
                operation="open",
                key=self.info.key,
            ) from (None if cause is None else self._secrets.conceal(cause))
        if cause is not None:
            self.close()
            raise ContentDamaged(
                f"the content is not the one that was stored: {self._secrets.scrub(str(cause))}",
                operation="open",
                key=self.info.key,
            ) from self._secrets.conceal(cause)
        self._left -= len(data)
        if self._left == 0:
            self.close()
        return data

    def close(self) -> None:
        self._raw.close()

    def _read_up_to(self, wanted: int) -> tuple[bytes, Exception | None]:
        """What comes before the end or an error, and the error."""
        data = b""
        before = sys.exc_info()[1]
        try:
            while len(data) < wanted:
                more = self._raw.read(wanted - len(data))
                if not more:
                    break
                data = data + more if data else more
            if self._verifies and len(data) == self._left:
                # botocore compares when there is nothing left to be read.
                self._raw.read(1)
        except Exception as cause:  # whatever the SDK or its HTTP client calls a broken connection
            detach(cause, before)
            return data, cause
        return data, None

"""HTTP answers whose headers are read in a third of the time, and of which no more is taken into memory than fits.

Python's own client has a parser of mail read the headers, which takes a tenth of the time of fetching a small object.
"""

from __future__ import annotations

import http.client
import io
import re
from types import FunctionType
from typing import Any, BinaryIO

# What RFC 9110, 5.5 and 5.6.2 allow. Everything else is left to the parser of mail.
_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*)\r\n")
_END = b"\r\n"

# As http.client has them.
_MOST_HEADERS = 100
_LONGEST_LINE_BYTES = 64 << 10

# What is read at once is errors and pages of listings: of 1,000 keys of 1,024 bytes, each written as three characters.
_MOST_AT_ONCE = 16 << 20


def parse_headers(file: BinaryIO, **options: Any) -> http.client.HTTPMessage:
    """Read the headers of an answer, as `http.client.parse_headers` does, and with its limits and errors.

    Headers that break off are an error as well: such an answer is none.

    `options` are what other versions of Python give that function besides the file.
    """
    headers = http.client.HTTPMessage()
    lines = []
    while (line := file.readline(_LONGEST_LINE_BYTES + 1)) != _END:
        lines.append(line)
        found = _LINE.fullmatch(line)
        if found is None or len(lines) >= _MOST_HEADERS:
            parsed: http.client.HTTPMessage = http.client.parse_headers(_Continued(b"".join(lines), file), **options)
            return parsed
        name, value = found.groups()
        headers.set_raw(name.decode("ascii"), value.decode("latin-1"))
    headers.set_payload("")
    return headers


class _Continued(io.RawIOBase):
    """What has been read of a file already, and then the rest of it."""

    def __init__(self, begun: bytes, file: BinaryIO) -> None:
        self._begun = io.BytesIO(begun)
        self._file = file

    def readline(self, size: int | None = -1, /) -> bytes:
        line = self._begun.readline(size) or self._file.readline(-1 if size is None else size)
        if not line:
            # Python's parser would take what has come for all: an object without its storage class, or half an ETag.
            raise http.client.RemoteDisconnected("the connection was closed within the headers")
        return line


def with_other_globals(function: Any, **replaced: Any) -> FunctionType:
    """A copy of a function that finds something else by some of the names in its module."""
    names = function.__globals__ | replaced
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Response(http.client.HTTPResponse):
    """Python's own, but for `parse_headers`, and for contents without a bound."""

    # It calls the function of its module, which is not ours to replace for everybody.
    begin = with_other_globals(http.client.HTTPResponse.begin, parse_headers=parse_headers)

    def read(self, amt: int | None = None) -> bytes:
        """Read as Python's own does. Raises `HTTPException` where all is asked for, and that is too much."""
        if amt is not None:
            return super().read(amt)
        # What is announced comes, or is found to be short; where nothing is, it may go on for ever.
        if self.length is not None and self.length <= _MOST_AT_ONCE:
            return super().read()
        content = b"" if self.length is not None else super().read(_MOST_AT_ONCE + 1)
        if self.length is not None or len(content) > _MOST_AT_ONCE:
            self.close()
            raise http.client.HTTPException(f"the answer is longer than {_MOST_AT_ONCE >> 20} MiB")
        return content

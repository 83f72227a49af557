"""Headers of answers: the same as Python's own client would have read, only sooner."""

from __future__ import annotations

import email.parser
import http.client
import io
import socket
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.answer_headers import Response, parse_headers, with_other_globals

ORDINARY = (
    b'Content-Length: 3\r\nETag: "abc"\r\nVary: Origin\r\nVary: Accept-Encoding\r\nx-amz-meta-a:  b \r\nEmpty:\r\n\r\n'
)

LINES = st.one_of(
    st.builds(
        lambda name, gap, value, end: name + b":" + gap + value + end,
        st.sampled_from([b"ETag", b"content-length", b"X-Amz-Meta-\xe4", b"", b"a b", b" folded", b"From "]),
        st.sampled_from([b"", b" ", b"\t  "]),
        st.binary(max_size=12),
        st.sampled_from([b"\r\n", b"\n", b"\r", b" \r\n", b"\r\n continued\r\n"]),
    ),
    st.binary(max_size=12),
)


def read(parse: Callable[[io.BytesIO], http.client.HTTPMessage], block: bytes) -> object:
    """What a parser makes of a block of headers, and what it leaves of the file."""
    file = io.BytesIO(block)
    try:
        message = parse(file)
    except http.client.HTTPException as error:
        return repr(error)
    return message.items(), message.get_payload(), [type(defect) for defect in message.defects], file.read()


@given(st.lists(LINES, max_size=6).map(lambda lines: b"".join(lines) + b"\r\n\r\ncontent"))
@example(ORDINARY + b"content")
@example(b"a: b\r\n\tc\r\n\r\n")
@example(b"a: b\rc: d\r\n\r\n")
@example(b"a: b\r\nno colon\r\nc: d\r\n\r\n")
@example(b"a: " + b"b" * (64 << 10) + b"\r\n\r\n")
@example(b"a: b\r\n" * 99 + b"\r\n")
@example(b"a: b\r\n" * 100 + b"\r\n")
@example(b"a: b\r\n" * 99 + b"c\r\n\r\n")
def test_headers_are_what_the_client_of_python_reads(block: bytes) -> None:
    assert read(parse_headers, block) == read(http.client.parse_headers, block)


LETTER = "a"


def letters(begin: str, end: str = "z", *, between: str = "-") -> str:
    return begin + LETTER + between + end


def test_a_function_with_other_globals_takes_what_the_original_takes() -> None:
    copy = with_other_globals(letters, LETTER="b")
    assert copy("x") == "xb-z"
    assert copy("x", "y", between="+") == "xb+y"
    assert letters("x") == "xa-z"


def test_ordinary_headers_are_not_parsed_as_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(email.parser.Parser, "parsestr")
    client, server = socket.socketpair()
    with client, server:
        server.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + ORDINARY + b"abc")
        response = Response(client)
        response.begin()
        assert response.headers.get_all("vary") == ["Origin", "Accept-Encoding"]
        assert response.read() == b"abc"


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_headers_that_break_off_are_no_answer(end: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + ORDINARY[:-2] + end
    for length in range(len(answer)):
        client, server = socket.socketpair()
        with client:
            with server:
                server.sendall(answer[:length])
            with pytest.raises(http.client.BadStatusLine):
                Response(client).begin()

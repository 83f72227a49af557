"""Listings and errors as servers write them, and as they should not."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from backends.xml import ErrorReply, ListedObject, UnreadableReply, parse_error, parse_listing, parse_time

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def listing(inner: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult {NAMESPACE}>{inner}</ListBucketResult>'.encode()


def test_a_page_as_aws_sends_it() -> None:
    page = parse_listing(
        listing(
            "<Name>bucket</Name><Prefix/><KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType>"
            "<IsTruncated>true</IsTruncated><NextContinuationToken>a+b/c==</NextContinuationToken>"
            "<Contents><Key>a/b+c%2Bd%25</Key><LastModified>2026-11-02T12:34:56.789Z</LastModified>"
            "<ETag>&quot;0123&quot;</ETag><Size>5</Size><StorageClass>STANDARD_IA</StorageClass>"
            "<Owner><ID>1</ID><Key>not this</Key></Owner></Contents>"
            "<Contents><Key>%F0%9F%98%80</Key><Size>12345678901234</Size></Contents>"
        )
    )
    moment = datetime(2026, 11, 2, 12, 34, 56, tzinfo=timezone.utc)
    assert page.entries == [
        ListedObject("a/b c+d%", 5, "0123", moment, "STANDARD_IA"),
        ListedObject("\U0001f600", 12345678901234, "", None, "STANDARD"),
    ]
    assert page.is_truncated
    assert page.next_token == "a+b/c=="


def test_keys_are_taken_as_they_are_where_the_server_does_not_encode() -> None:
    page = parse_listing(listing("<Contents><Key>a+b%20&lt;c&gt; &amp;</Key><Size>0</Size></Contents>"))
    assert [entry.key for entry in page.entries] == ["a+b%20<c> &"]
    assert not page.is_truncated
    assert page.next_token is None


@pytest.mark.parametrize("etag", ["a&#13;&#10;X-Header: b", "a&#10;", "\u65e5\u672c"])
def test_an_etag_that_no_header_could_hold_counts_as_none(etag: str) -> None:
    (entry,) = parse_listing(
        "<ListBucketResult><Contents><Key>a</Key><Size>1</Size>"
        f"<ETag>&quot;{etag}&quot;</ETag></Contents></ListBucketResult>".encode()
    ).entries
    assert entry.etag == ""


def test_an_empty_page() -> None:
    assert parse_listing(b"<ListBucketResult/>").entries == []


def test_a_namespace_prefix_is_ignored() -> None:
    page = parse_listing(
        b'<s3:ListBucketResult xmlns:s3="http://x"><s3:Contents><s3:Key>a</s3:Key><s3:Size>1</s3:Size></s3:Contents>'
        b"</s3:ListBucketResult>"
    )
    assert [entry.key for entry in page.entries] == ["a"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"<ListBucketResult>",
        b"<ListBucketResult></ListBucketResult><more/>",
        b"<Error><Code>SlowDown</Code></Error>",
        b"<html></html>",
        b"<!DOCTYPE x><ListBucketResult/>",
        b'<!DOCTYPE x SYSTEM "file:///etc/hostname"><ListBucketResult/>',
        b'<!DOCTYPE x [<!ENTITY a "b">]><ListBucketResult>&a;</ListBucketResult>',
        b"<ListBucketResult>&undefined;</ListBucketResult>",
        b"<ListBucketResult>\xff</ListBucketResult>",
        listing("<Contents><Size>1</Size></Contents>"),
        listing("<Contents><Key>a</Key></Contents>"),
        listing("<Contents><Key>a</Key><Size>many</Size></Contents>"),
        listing("<Contents><Key>a</Key><Size>1</Size><LastModified>yesterday</LastModified></Contents>"),
    ],
)
def test_what_is_no_page_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadableReply):
        parse_listing(body)


def test_an_error_as_aws_sends_it() -> None:
    body = (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Message>It &lt;is&gt; gone.</Message>'
        b"<Key>a b</Key><RequestId>1</RequestId><Details><Code>Other</Code></Details></Error>"
    )
    assert parse_error(body) == ErrorReply("NoSuchKey", "It <is> gone.")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<Error>",
        b"<Error></Error>",
        b"<Error><Message>no code</Message></Error>",
        b"<html><Error><Code>a</Code></Error></html>",
        b"<!DOCTYPE x><Error><Code>a</Code></Error>",
        b"<ErrorPage><Code>a</Code></ErrorPage>",
        b"<DeleteResult><Error><Code>AccessDenied</Code></Error></DeleteResult>",
    ],
)
def test_what_is_no_error(body: bytes) -> None:
    assert parse_error(body) is None


def test_times() -> None:
    assert parse_time(None) is None
    assert parse_time("") is None
    assert parse_time("2026-02-03T04:05:06Z") == datetime(2026, 2, 3, 4, 5, 6, tzinfo=timezone.utc)

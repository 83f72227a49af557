"""What an ETag proves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from backends.base import ObjectInfo
from backends.multipart import part_size_for
from storage_provider.media_store import MediaStore
from storage_provider.proofs import etag_proves

PATH = "local_content/Ab/cd/Efgh"


def in_parts(content: bytes, size: int) -> str:
    digests = [hashlib.md5(content[start : start + size]).digest() for start in range(0, len(content), size)]
    return f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def test_etag_proves_equal_content_and_nothing_else(tmp_path: Path) -> None:
    content = bytes(range(256)) * (9 << 12)
    store = MediaStore(tmp_path)
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    plain = hashlib.md5(content).hexdigest()

    def proves(etag: str) -> bool:
        return etag_proves(store, PATH, ObjectInfo(PATH, len(content), etag))

    assert proves(plain)
    assert proves(in_parts(content, 8 << 20))
    assert proves(in_parts(content, 5 << 20))
    for etag in (
        in_parts(content, 6 << 20),
        in_parts(content[:-1] + b"x", 8 << 20),
        hashlib.md5(content[:-1]).hexdigest(),
        "",
        plain[:-1],
        plain + "-",
        plain + "-x",
        plain + "-0",
        plain + "-2",
        "0" * 32,
    ):
        assert not proves(etag), etag


def test_etag_proves_a_file_that_is_sent_in_larger_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As one of more than 8 GB is.
    monkeypatch.setattr("backends.multipart._FEWER_PARTS", 2)
    content = bytes(range(256)) * (17 << 12)
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    sent = ObjectInfo(PATH, len(content), in_parts(content, part_size_for(len(content), 8 << 20)))
    assert sent.etag == in_parts(content, 16 << 20)
    assert etag_proves(MediaStore(tmp_path), PATH, sent)


def test_etag_of_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.touch()
    empty = ObjectInfo(PATH, 0, hashlib.md5().hexdigest())
    assert etag_proves(MediaStore(tmp_path), PATH, empty)
    assert not etag_proves(MediaStore(tmp_path), PATH, ObjectInfo(PATH, 0, hashlib.md5(b"x").hexdigest()))

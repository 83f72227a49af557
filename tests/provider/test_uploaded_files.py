"""Files that wait to be stored, and how many of them are open."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from synapse.media._base import FileInfo

from storage_provider import uploaded_files
from storage_provider.uploaded_files import UploadedFiles

INFO = FileInfo(server_name=None, file_id="abcdef")


@pytest.fixture
def files(tmp_path: Path) -> UploadedFiles:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"content %d" % number)
    return UploadedFiles(tmp_path)


def open_files(directory: Path) -> int:
    return sum(descriptor.resolve().parent == directory for descriptor in Path("/proc/self/fd").iterdir())


def test_a_file_that_waits_survives_its_deletion(files: UploadedFiles, tmp_path: Path) -> None:
    with files.held("0", INFO) as give:
        (tmp_path / "0").unlink()
        with give() as body:
            assert body.read() == b"content 0"


def test_where_very_many_wait_no_more_are_open(
    files: UploadedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploaded_files, "_MOST_HELD", 2)
    with ExitStack() as stack:
        given = [stack.enter_context(files.held(str(number), INFO)) for number in range(4)]
        assert open_files(tmp_path) == 2
        for number, give in enumerate(given):
            with give() as body:
                assert body.read() == b"content %d" % number
        assert open_files(tmp_path) == 0
    with files.held("0", INFO):
        assert open_files(tmp_path) == 1


def test_a_file_that_is_not_there_is_an_error_at_once(files: UploadedFiles) -> None:
    with pytest.raises(FileNotFoundError), files.held("none", INFO):
        pass

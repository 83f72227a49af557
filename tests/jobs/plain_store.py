"""A media store with nothing around it: files of Synapse's, and what a test does to them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from storage_provider import directories, media_store, media_walk
from storage_provider.directories import FileState
from storage_provider.media_paths import Media
from storage_provider.media_store import MediaStore

THUMBNAIL = "32-32-image-png-crop"

PATHS = [
    "local_content/ab/cd/efgh",
    f"local_thumbnails/ab/cd/efgh/{THUMBNAIL}",
    "remote_content/example.org:8448/AB/CD/efgh",
    f"remote_thumbnail/example.org:8448/AB/CD/efgh/{THUMBNAIL}",
]

# So few letters that ids begin alike, and that one is the beginning of another one.
_ids = st.text("ab-", min_size=5, max_size=7)
_origins = st.sampled_from(["", "a.org", "a.org-x", "a.org:80", "é.org"])
similar_media = st.builds(Media, _origins, _ids)


def write(store: MediaStore, path: str, content: bytes = b"content") -> Path:
    file = store.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def state_of(store: MediaStore, path: str) -> FileState:
    state = store.state(path)
    assert state is not None
    return state


def everything_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def refuse_to_walk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a directory be one that may not be read; root may read all."""
    opened = directories.open_directory

    def open_directory(wanted: str, parent: int) -> int:
        if wanted == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), wanted)
        return opened(wanted, parent)

    for module in (media_store, media_walk):
        monkeypatch.setattr(module, "open_directory", open_directory)


def run_and_kill(store: MediaStore, code: str, while_it_runs: object = None) -> None:
    """Run code until it waits, then end it as `kill -9` does."""
    script = (
        "import sys; from pathlib import Path; from storage_provider.media_store import MediaStore\n"
        f"store = MediaStore(Path({str(store.root)!r}))\n"
        "def wait(): print('ready', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script + code],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            if callable(while_it_runs):
                while_it_runs()
        finally:
            process.send_signal(signal.SIGKILL)

"""Synapse's media directory, whose layout the bucket repeats."""

from __future__ import annotations

MEDIA_ROOTS = ("local_content/", "local_thumbnails/", "remote_content/", "remote_thumbnail/")
"""What media paths start with (Synapse 1.163, `synapse/media/filepath.py`); `url_cache` never leaves the disk."""

"""Pictures to upload."""

from __future__ import annotations

import io

from PIL import Image


def png(width: int, height: int) -> bytes:
    """A PNG of noise, which does not compress: about a byte for each pixel."""
    stream = io.BytesIO()
    Image.effect_noise((width, height), 100).save(stream, "PNG")
    return stream.getvalue()

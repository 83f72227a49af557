"""One contract over one bucket (`backends.base`), and the backends that keep it."""

from __future__ import annotations

BACKENDS = {
    "boto3": "backends.boto3_backend:Boto3Backend",
    "minio": "backends.minio_backend:MinioBackend",
}
"""The one table of backends: the name in the configuration, and the class, imported when it is chosen."""

# The settings look names up in the table above.
from backends.selection import open_backend  # noqa: E402
from backends.settings import BucketSettings  # noqa: E402

__all__ = ["BACKENDS", "BucketSettings", "open_backend"]

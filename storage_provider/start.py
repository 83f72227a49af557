"""Loads the command line quickly: it is started often, and mostly finds little to do.

What is left out here belongs to libraries and is never used by this process, which has no other
code in it. Together it takes longer to load than everything else.
"""

from __future__ import annotations

import gc
import os
import sys
from types import ModuleType

# Of minio-py: the client for administration, which brings a whole library of ciphers, and the configuration of buckets.
_UNUSED_OF_MINIO = (
    "legalhold",
    "lifecycleconfig",
    "minioadmin",
    "notificationconfig",
    "objectlockconfig",
    "replicationconfig",
    "retention",
    "select",
    "sseconfig",
    "tagging",
    "versioningconfig",
)


# Python's own is 700; loading takes some 95,000.
_ALLOCATIONS_BEFORE_GARBAGE_IS_LOOKED_FOR = 100_000


class _Unused(ModuleType):
    """Stands where a module would, and has whatever is imported from it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def main() -> None:
    """Run the command that the arguments name."""
    # Otherwise pydantic reads what every installed package says of itself, to look for plug-ins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    for name in _UNUSED_OF_MINIO:
        sys.modules.setdefault(f"minio.{name}", _Unused(f"minio.{name}"))
    # While modules are loaded, next to nothing becomes garbage; later it is looked for as soon as it may be a few MiB.
    gc.set_threshold(_ALLOCATIONS_BEFORE_GARBAGE_IS_LOOKED_FOR)
    from storage_provider.cli import main as run

    run(prog_name="s3_media_upload")

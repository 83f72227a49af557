"""Loads the command line quickly, and ends it quickly: it is started often, and mostly finds little to do.

What is left out here belongs to libraries and is never used by this process, which has no other
code in it. Together it takes longer to load than everything else.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
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

# botocore asks it for Python's own TLS context, and takes that itself where this one is not installed; it loads OpenSSL
# a second time.
_UNUSED_OF_URLLIB3 = "urllib3.contrib.pyopenssl"

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
    for name in _UNUSED_OF_MINIO:
        sys.modules.setdefault(f"minio.{name}", _Unused(f"minio.{name}"))
    sys.modules[_UNUSED_OF_URLLIB3] = None  # type: ignore[assignment] # an import of it fails
    # While modules are loaded, next to nothing becomes garbage; later it is looked for as soon as it may be a few MiB.
    gc.set_threshold(_ALLOCATIONS_BEFORE_GARBAGE_IS_LOOKED_FOR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    from storage_provider.cli import run

    try:
        run()
    except SystemExit as end:
        _end(end.code)
        raise


def _end(status: object) -> None:
    """End the process without taking apart what was loaded, which takes half as long as to load it.

    Returns where there is more to do: a status to be explained, or output that cannot be written.
    """
    if not isinstance(status, int):
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):  # it was closed meanwhile
        return
    os._exit(status)

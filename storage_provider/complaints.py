"""Telling the operator that the bucket fails, without a line for every file."""

from __future__ import annotations

import logging
import time

from backends.errors import BackendError

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 60


class Complaints:
    """At most one warning a minute, with the number of failures since the last one."""

    def __init__(self) -> None:
        self._untold = 0
        self._next = 0.0

    def add(self, error: BackendError) -> None:
        """Count a failure, and log it where the last warning is old enough."""
        logger.debug("Media storage: %s", error)
        self._untold += 1
        now = time.monotonic()
        if now >= self._next:
            more = f", and {self._untold - 1} more since the last warning" if self._untold > 1 else ""
            logger.warning("Media storage fails: %s: %s%s", error.operation, error.reason, more)
            self._untold = 0
            self._next = now + _INTERVAL_SECONDS

"""The thread that keeps the local cache: one pass after another, in one process of those that share the media store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from backends.errors import BackendError
from storage_provider.cache_report import PassReport
from storage_provider.errors import SynapseDbError
from storage_provider.failures import BucketFails, Stopped
from storage_provider.local_cache import LocalCache
from storage_provider.media_store import Locked, MediaStore, MediaStoreError
from storage_provider.settings import ProviderSettings

logger = logging.getLogger(__name__)

_LOCK = "local_cache"

# After a comparison of database and disk comes a rest of so many times its length.
_REST = 20
# No longer than this, be the comparison as long as it will: the limits would not be looked at for hours.
_LONGEST_REST_SECONDS = 3600
# And no longer than this where there is something to remove.
_LONGEST_URGENT_REST_SECONDS = 300

_STOP_SECONDS = 5


class CacheKeeper:
    """Runs the passes over a local cache in a thread of its own."""

    def __init__(
        self,
        cache: LocalCache,
        store: MediaStore,
        settings: ProviderSettings,
        stop: threading.Event,
        may_begin: Callable[[], bool] = lambda: True,
    ) -> None:
        """`stop` is the event that the cache obeys too.

        `may_begin` is asked in the thread before a pass, until it has once said yes; it may raise `BackendError`.
        """
        self._cache = cache
        self._store = store
        self._settings = settings
        self._stop = stop
        self._may_begin = may_begin
        self._has_begun = False
        self._condition = threading.Condition()
        self._is_woken = False
        self._limit_told: str | None = None
        self._is_out_of_reach = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if the settings leave anything to do."""
        if self._cache.has_work and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="s3-media-cache", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Tell that a limit keeps files away: the next pass makes room, as early as the rest after the last one allows."""
        with self._condition:
            self._is_woken = True
            self._condition.notify_all()

    def stop(self) -> None:
        """End the pass under way and the thread; waits for it for a few seconds at most."""
        self._stop.set()
        with self._condition:
            self._condition.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_STOP_SECONDS)

    # --- in the thread ---

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._store.lock(_LOCK):
                    self._keep()
            except Locked:
                # Another process keeps the cache; this one takes over when it ends.
                pass
            except (MediaStoreError, OSError) as error:
                logger.warning("The local cache of media cannot be kept: %s", error)
            self._wait(self._interval)

    def _keep(self) -> None:
        self._warn_of_other_disks()
        at_start = self._settings.auto_restore and self._settings.auto_restore_startup
        is_full = False
        if not at_start:
            self._cache.prepare()
            is_full = self._wait(self._interval)
        while not self._stop.is_set():
            has_helped = self._run_pass(is_full) or not is_full
            rest = min(self._cache.scan_seconds * _REST, _LONGEST_REST_SECONDS)
            regular = max(self._interval, rest)
            # Where a pass that was to make room found nothing to remove, the next one would not either.
            urgent = min(rest, _LONGEST_URGENT_REST_SECONDS) if has_helped else regular
            is_full = self._wait(regular, at_least=urgent)

    def _warn_of_other_disks(self) -> None:
        if elsewhere := self._store.on_other_disks():
            logger.warning(
                "Local cache: min_free_space looks at the disk of %s alone, and does not see how full those of %s are",
                self._store.root,
                ", ".join(name.rstrip("/") for name in elsewhere),
            )

    @property
    def _interval(self) -> float:
        return self._settings.auto_restore_monitor_interval

    def _run_pass(self, is_full: bool) -> bool:
        """Tells whether anything was removed."""
        try:
            self._has_begun = self._has_begun or self._may_begin()
            if not self._has_begun:
                return False
            report = self._cache.run_pass(is_full=is_full)
        except Stopped:
            return False
        except (BackendError, BucketFails, SynapseDbError, MediaStoreError, OSError) as error:
            logger.warning("The local cache of media is not up to date, the next pass tries again: %s", error)
            return False
        except Exception:
            # The thread goes on whatever happens: without it the disk would fill up.
            logger.exception("A pass over the local cache of media failed")
            return False
        self._tell(report)
        return report.evicted.files > 0

    def _tell(self, report: PassReport) -> None:
        """One line for the pass, and once another one while a limit keeps media away, or cannot be kept to."""
        logger.log(logging.WARNING if report.damaged.count else logging.INFO, "%s", report)
        if report.limited_by is not None and report.limited_by != self._limit_told:
            logger.info("Local cache: not all media that belongs on disk is restored, because of %s", report.limited_by)
        self._limit_told = report.limited_by
        if report.out_of_reach is not None and not self._is_out_of_reach:
            logger.warning("Local cache: %s", report.out_of_reach)
        self._is_out_of_reach = report.out_of_reach is not None

    def _wait(self, seconds: float, *, at_least: float = 0.0) -> bool:
        """Wait that long, or until woken, or until the end; tells whether it was woken."""
        begin = time.monotonic()
        with self._condition:
            while not self._stop.is_set():
                passed = time.monotonic() - begin
                end = at_least if self._is_woken else seconds
                if passed >= end:
                    break
                self._condition.wait(end - passed)
            is_woken, self._is_woken = self._is_woken, False
            return is_woken

"""The check of the bucket inside Synapse, and what is refused while media may be hidden."""

from __future__ import annotations

import logging
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from synapse.api.errors import Codes, SynapseError
from synapse.module_api.errors import ConfigError
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from backends.base import Backend
from storage_provider.settings import ProviderSettings
from storage_provider.signals import Signal
from storage_provider.startup_check import Problem, find_problem, has_two_spellings, prefix_problem

logger = logging.getLogger(__name__)


class BucketCheck:
    """Tells the operator what is wrong with the bucket, and keeps media from being missed, or put apart from the rest.

    A method that says so runs in a thread; everything else belongs to the reactor's.
    """

    def __init__(
        self,
        settings: ProviderSettings,
        others: Collection[ProviderSettings],
        backend: Backend,
        reactor: Any,
        threads: ThreadPool,
    ) -> None:
        """`others` are the settings of all providers, which may serve what this one does not find."""
        self._settings = settings
        self._others = others
        self._backend = backend
        self._reactor = reactor
        self._threads = threads
        self._problem: Problem | None = None
        self._may_hide_media = settings.check_on_startup != "off" and has_two_spellings(settings)
        self._is_checking = False
        self._checked = Signal()

    def start(self) -> None:
        """Check as the settings say. Raises `ConfigError` where they say that Synapse must not start with a problem."""
        if self._settings.check_on_startup == "fail":
            self._has_found(self._find_problem())
            if self._problem is not None:
                raise ConfigError(self._problem.text)
        elif self._settings.check_on_startup == "warn":
            self._reactor.callWhenRunning(self._check)

    async def refuse_while_media_is_hidden(self) -> None:
        """Raise `SynapseError` where media may be in the bucket and not be found.

        Waits for the check at the start; one that could not tell is repeated.
        """
        if self._may_hide_media:
            self._check()
            await self._checked.wait()
        if self._may_hide_media:
            raise SynapseError(HTTPStatus.BAD_GATEWAY, "Media storage is unavailable", Codes.UNKNOWN)
        if self._problem is not None and self._problem.hides_media:
            raise SynapseError(HTTPStatus.INTERNAL_SERVER_ERROR, "Media storage is misconfigured", Codes.UNKNOWN)

    def allows_cache(self) -> bool:
        """Whether media is looked for where it is: what is missing elsewhere is not to be sent there; in a thread.

        Raises `BackendError`.
        """
        problem = prefix_problem(self._settings)
        if problem is None or not problem.hides_media:
            return True
        self._reactor.callFromThread(self._note, problem)
        return False

    def _check(self) -> None:
        """Check in a thread, unless that is under way."""
        if not self._is_checking:
            self._is_checking = True
            checking = deferToThreadPool(self._reactor, self._threads, self._find_problem)
            checking.addCallbacks(self._has_found, self._has_broken).addBoth(self._has_checked)

    def _find_problem(self) -> Problem | None:
        """Ask the bucket; in a thread, or where Synapse has to wait for it."""
        return find_problem(self._settings, self._backend, self._others)

    def _has_found(self, problem: Problem | None) -> None:
        self._may_hide_media = problem is not None and problem.may_hide_media
        self._note(problem)

    def _has_broken(self, failure: Failure) -> None:
        logger.error("The check of the bucket failed", exc_info=failure.value)

    def _has_checked(self, _result: object) -> None:
        self._is_checking = False
        self._checked.fire()

    def _note(self, problem: Problem | None) -> None:
        is_known, self._problem = problem == self._problem, problem
        if problem is not None and not is_known:
            logger.error("Media storage: %s", problem.text)

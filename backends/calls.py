"""One call: its attempts, its time, its credentials, and what its failure means."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import urllib3.exceptions

from backends.credentials import AccessKey, CredentialSource, Secrets
from backends.errors import (
    EXPIRED_CREDENTIALS,
    AccessDenied,
    BackendError,
    BackendUnavailable,
    Misconfigured,
    RequestRejected,
    SettingsError,
    cause_chain,
    detach,
    error_class,
    innermost,
)
from backends.settings import BucketSettings, can_be_sent
from backends.transport import Transport
from backends.xml import UnreadableReply

Client = TypeVar("Client")
Result = TypeVar("Result")


class Caller(Generic[Client]):
    """Makes requests with an SDK's client, alike for every SDK."""

    def __init__(
        self,
        settings: BucketSettings,
        transport: Transport,
        connect: Callable[[AccessKey | None], Client],
        is_credentials_error: Callable[[Exception], bool],
    ) -> None:
        self.secrets = Secrets()
        self.sse_key: bytes | None = None
        """The encryption key, once there is a client."""
        self._settings = settings
        self._transport = transport
        self._connect = connect
        self._is_credentials_error = is_credentials_error
        self._credentials = CredentialSource(settings)
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Let calls under way and later ones fail."""
        self._closed.set()

    def refuse_after_close(self, operation: str, key: str | None) -> None:
        """Raise `BackendUnavailable` when `close` has been called."""
        if self._closed.is_set():
            raise BackendUnavailable("the backend is closed", operation=operation, key=key)

    def call(self, operation: str, key: str | None, request: Callable[[Client], Result]) -> Result:
        """Make a request until it succeeds, fails for good, or runs out of attempts or time.

        `operation` and `key` are what the error says; only a `BackendError` comes out, and what is neither the
        network's nor the server's fault.
        """
        attempts = self._settings.max_attempts
        may_reload = True
        before = sys.exc_info()[1]
        with self._transport.call() as deadline:
            while True:
                self.refuse_after_close(operation, key)
                attempts -= 1
                self._transport.forget_answer()
                client = None
                try:
                    client = self.client()
                    result = request(client)
                    self._check_answer()
                    return result
                except Exception as caught:
                    cause = caught
                # Out of the handler, so that the SDK's exception does not become the context as well.
                detach(cause, before)
                error = self._translate(operation, key, cause)
                if error is None:
                    raise self.secrets.conceal(cause)
                if may_reload and _may_have_expired(error) and self._has_newer_credentials_than(client):
                    may_reload = False
                    attempts += 1
                    continue
                pause = self._pause(attempts)
                if not error.retryable or attempts <= 0 or _gave_up(cause) or pause >= deadline.remaining():
                    raise error from (None if error is cause else self.secrets.conceal(cause))
                self._closed.wait(pause)

    def _check_answer(self) -> None:
        """Refuse the errors that come with a 200, as those of a completion may."""
        answer = self._transport.answer
        if answer is not None and answer.code is not None:
            raise UnreadableReply(f"{answer.code} in an answer with status {answer.status}")

    def _translate(self, operation: str, key: str | None, cause: Exception) -> BackendError | None:
        """The exception of the contract for an SDK's; None for what is neither the network's nor the server's."""
        if isinstance(cause, BackendError):
            return cause
        if isinstance(cause, SettingsError):
            return Misconfigured(str(cause), operation=operation, key=key)
        answer = self._transport.failure
        sent = self._transport.credentials_sent
        self.secrets.add_credentials(sent or ())
        if answer is None:
            is_network_error = isinstance(cause, (OSError, urllib3.exceptions.HTTPError))
            if sent is None and (is_network_error or self._is_credentials_error(cause)):
                reason = (
                    f"no usable credentials: {cause}; set access_key_id and secret_access_key, "
                    "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
                )
                return AccessDenied(self.secrets.scrub(reason), operation=operation, key=key)
            if not is_network_error:
                if sent is None or all(map(can_be_sent, sent)):
                    return None
                reason = "the credentials that were found hold white space, a line break or characters outside ASCII"
                return Misconfigured(reason, operation=operation, key=key)
            reason = self.secrets.scrub(f"no answer from {self._endpoint()}: {innermost(cause)}")
            return BackendUnavailable(reason, operation=operation, key=key)
        kind: type[BackendError] = BackendUnavailable
        if answer.status == 413 and answer.code is None:
            kind = RequestRejected
            reason = (
                "a proxy in front of the bucket allows no body of this size (status 413): "
                "raise its limit (of nginx: client_max_body_size)"
            )
        elif not answer.readable or (answer.status < 300 and answer.code is None):
            reason = f"unreadable reply (status {answer.status}): {innermost(cause)}"
            if answer.status >= 300:
                reason = f"status {answer.status} with a body that is not S3's; is endpoint_url right?"
        else:
            kind = error_class(answer.status, answer.code, of_object=operation in ("open", "stat"))
            said = " ".join(part for part in (str(answer.status), answer.code) if part)
            reason = f"the server answered {said}" + (f": {answer.message}" if answer.message else "")
            if self._settings.uses_sse and operation in ("open", "stat") and answer.status in (400, 403):
                reason += " (was the object stored with another sse_customer_key?)"
        code = None if answer.code is None else self.secrets.scrub(answer.code)
        return kind(self.secrets.scrub(reason), operation=operation, key=key, code=code, status=answer.status)

    def _pause(self, attempts_left: int) -> float:
        """Seconds to wait before the next attempt."""
        longest: float = min(0.25 * 2 ** (self._settings.max_attempts - attempts_left), 4.0)
        return random.uniform(longest / 2, longest)

    def client(self) -> Client:
        """The SDK's client, made when it is first needed."""
        with self._lock:
            if self._client is None:
                self.sse_key = self._settings.sse_key()
                access_key = self._credentials.current()
                if self.sse_key is not None:
                    self.secrets.add_sse_key(self.sse_key)
                if access_key is not None:
                    self.secrets.add_credentials(
                        (access_key.access_key_id, access_key.secret_access_key, access_key.session_token)
                    )
                self._client = self._connect(access_key)
            return self._client

    def _has_newer_credentials_than(self, client: Client | None) -> bool:
        with self._lock:
            # Another call may have found them already.
            if self._client is client:
                if not self._credentials.reload():
                    return False
                self._client = None
            return True

    def _endpoint(self) -> str:
        return self._settings.endpoint_url or "AWS"


def _may_have_expired(error: BackendError) -> bool:
    if error.code is None:
        # The answer to a HEAD has no body that could say it.
        return error.status in (400, 401, 403)
    return error.code in EXPIRED_CREDENTIALS


def _gave_up(error: Exception) -> bool:
    """Whether the server took the request and said nothing: it may still be at work on it."""
    chain = list(cause_chain(error))
    if any(isinstance(each, urllib3.exceptions.ConnectTimeoutError) for each in chain):
        return False
    return any(isinstance(each, (urllib3.exceptions.ReadTimeoutError, TimeoutError)) for each in chain)

"""The access key that the settings name, read from its files when it is needed and again when it expired."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, field

from backends.errors import cause_chain
from backends.settings import BucketSettings, read_secret_file


@dataclass(frozen=True)
class AccessKey:
    """What requests are signed with."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False, default=None)


class CredentialSource:
    """The access key of the settings, held until `reload`; None leaves it to the SDK's own chain."""

    def __init__(self, settings: BucketSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._current: AccessKey | None = None

    def current(self) -> AccessKey | None:
        """The access key. Raises `SettingsError` when one of its files cannot be read."""
        if not self._settings.has_access_key:
            return None
        with self._lock:
            if self._current is None:
                self._current = AccessKey(
                    self._value("access_key_id") or "",
                    self._value("secret_access_key") or "",
                    self._value("session_token"),
                )
            return self._current

    def reload(self) -> bool:
        """Forget what was read from files; False where there are none, so that nothing can have changed."""
        settings = self._settings
        if not (settings.access_key_id_path or settings.secret_access_key_path or settings.session_token_path):
            return False
        with self._lock:
            self._current = None
        return True

    def _value(self, name: str) -> str | None:
        secret = getattr(self._settings, name)
        if secret is not None:
            return str(secret.get_secret_value())
        path = getattr(self._settings, f"{name}_path")
        return None if path is None else read_secret_file(path, f"{name}_path").decode(errors="replace").strip()


# Shorter ones (test servers' "test") are no secrets, and would mask parts of ordinary words.
_SHORTEST_SECRET = 6


class Secrets:
    """What must appear in no message, and the means to keep it out."""

    def __init__(self, access_key: AccessKey | None, sse_key: bytes | None) -> None:
        self._values: list[str] = []
        if access_key is not None:
            key = access_key
            values = (key.access_key_id, key.secret_access_key, key.session_token)
            self._values += [value for value in values if value and len(value) >= _SHORTEST_SECRET]
        if sse_key is not None:
            self._values += [sse_key.decode("latin-1"), base64.b64encode(sse_key).decode(), sse_key.hex()]

    def scrub(self, text: str) -> str:
        """The text with every secret replaced by `***`."""
        for value in self._values:
            text = text.replace(value, "***")
        return text

    def conceal(self, error: Exception) -> Exception:
        """The exception as it is, or, when it or one behind it quotes a secret, what can be told of it."""
        told = [str(each) + repr(each) for each in cause_chain(error)]
        if any(value in text for value in self._values for text in told):
            return RuntimeError(self.scrub(f"{type(error).__name__}: {error}"))
        return error

"""The access key that the settings name, read from its files when it is needed and again when it expired."""

from __future__ import annotations

import base64
import configparser
import contextlib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from backends.errors import SettingsError, cause_chain
from backends.settings import BucketSettings, parse_credential, read_secret_file


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
                self._current = self._read()
            return self._current

    def reload(self) -> bool:
        """Forget what was read from files; False where they say the same still, or there are none."""
        settings = self._settings
        if not (settings.access_key_id_path or settings.secret_access_key_path or settings.session_token_path):
            return False
        with self._lock:
            # A file that cannot be read is told of by whoever reads it next.
            with contextlib.suppress(SettingsError):
                if self._read() == self._current:
                    return False
            self._current = None
        return True

    def _read(self) -> AccessKey:
        return AccessKey(
            self._value("access_key_id") or "",
            self._value("secret_access_key") or "",
            self._value("session_token"),
        )

    def _value(self, name: str) -> str | None:
        secret = getattr(self._settings, name)
        if secret is not None:
            return str(secret.get_secret_value())
        path = getattr(self._settings, f"{name}_path")
        if path is None:
            return None
        content = read_secret_file(path, f"{name}_path").decode(errors="replace")
        try:
            return parse_credential(content)
        except ValueError as error:
            raise SettingsError((f"{name}_path",), f"what {path} holds {error}") from None


# Shorter ones (test servers' "test") are no secrets, and would mask parts of ordinary words.
_SHORTEST_SECRET = 6
# Of credentials that are renewed every hour, the old ones are forgotten some day.
_MOST_CREDENTIALS = 100
# What stands for itself in `repr`.
_PLAIN = re.compile(r"[!#-&(-\[\]-~]+")


class Secrets:
    """What must appear in no message, and the means to keep it out."""

    def __init__(self) -> None:
        self._credentials: tuple[str, ...] = ()
        self._keys: tuple[str, ...] = ()

    def add_credentials(self, values: Iterable[str | None]) -> None:
        """Keep these secret too; those that they replace may still be told of."""
        # Also in parts: where Python shows a text, line breaks and the like are written otherwise.
        parts = [part for each in values if each for part in (each, *_PLAIN.findall(each))]
        new = [each for each in parts if len(each) >= _SHORTEST_SECRET and each not in self._credentials]
        if new:
            self._credentials = (*self._credentials, *dict.fromkeys(new))[-_MOST_CREDENTIALS:]

    def add_sse_key(self, key: bytes) -> None:
        """Keep an encryption key secret, in the forms in which it is written."""
        self._keys = (key.decode("latin-1"), base64.b64encode(key).decode(), key.hex())

    def scrub(self, text: str) -> str:
        """The text with every secret replaced by `***`."""
        for value in (*self._keys, *self._credentials):
            text = text.replace(value, "***")
        return text

    def conceal(self, error: Exception) -> Exception:
        """The exception as it is, or, when it or one behind it quotes a secret, what can be told of it."""
        chain = list(cause_chain(error))
        told = [str(each) + repr(each) for each in chain]
        # Who finds a fault in ~/.aws/credentials quotes the line.
        quotes_file = any(isinstance(each, configparser.Error) for each in chain)
        if quotes_file or any(self.scrub(text) != text for text in told):
            return RuntimeError(self.scrub(f"{type(error).__name__}: {error}"))
        return error

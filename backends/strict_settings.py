"""Blocks of settings that say what is wrong with them, and the values that stand in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from backends.errors import SettingsError

_Settings = TypeVar("_Settings", bound="StrictSettings")
_Value = TypeVar("_Value")

Reader = Callable[[object], _Value]
"""Takes a value as YAML has it; raises `ValueError` with what it must be, and not with what it is."""

_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class StrictSettings:
    """A block of settings that refuses what it does not know and never shows a value in an error.

    A setting is a field that is `Annotated` with its type and its `Reader`.
    """

    may_be_empty: ClassVar[frozenset[str]] = frozenset()
    """Settings for which an empty text counts as left out."""

    @classmethod
    def parse(cls: type[_Settings], values: object) -> _Settings:
        """Settings from a parsed YAML mapping; a key whose value is null counts as left out.

        Raises `SettingsError` for the first thing that is wrong. Does no I/O.
        """
        if not isinstance(values, Mapping):
            raise SettingsError((), "must be a mapping of settings")
        required = (field.name for field in fields(cls) if field.default is MISSING)
        given = {str(name): value for name, value in values.items() if value is not None}
        return cls(**cls._read(dict.fromkeys(required) | given))

    def changed(self: _Settings, values: Mapping[str, object]) -> _Settings:
        """The same with other values, as YAML has them; null takes a setting away. Raises as `parse`."""
        return replace(self, **self._read(values))

    @classmethod
    def _read(cls, values: Mapping[str, object]) -> dict[str, Any]:
        readers = {
            name: hint.__metadata__[0]
            for name, hint in get_type_hints(cls, include_extras=True).items()
            if hasattr(hint, "__metadata__")
        }
        defaults = {field.name: field.default for field in fields(cls)}
        read = {}
        for name, value in values.items():
            if name not in readers:
                raise SettingsError((name,), _unknown(name, list(readers)))
            if value is None or (value == "" and name in cls.may_be_empty):
                read[name] = defaults[name]
            else:
                read[name] = _read_one(name, value, readers[name])
            if read[name] is MISSING:
                raise SettingsError((name,), "required, but missing")
        return read


def _read_one(name: str, value: object, reader: Reader[object]) -> object:
    try:
        return reader(value)
    except SettingsError as error:
        raise SettingsError((name, *error.path), error.reason) from None
    except ValueError as error:
        raise SettingsError((name,), str(error)) from None


def _unknown(name: str, known: list[str]) -> str:
    import difflib  # Only a mistake needs it.

    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting; did you mean {near[0]!r}?" if near else "unknown setting"


class Secret:
    """A text that does not show itself, also where a whole block of settings is shown."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_secret_value(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "Secret('***')"


# --- readers ---


def text(value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError("must be a string; put the value in quotes")
    return value


def text_or_number(value: object) -> str:
    """A text that consists of digits, perhaps, and is taken without quotes too, as the ancestors took some."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value)


def switch(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be a boolean: true or false")
    return value


def path(value: object) -> Path:
    """The path of a file."""
    if isinstance(value, Path):
        return value
    return Path(text(value))


def one_of(*words: str) -> Reader[str]:
    """One of some words."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            *others, last = map(repr, words)
            raise ValueError(f"must be {', '.join(others)} or {last}" if others else f"must be {last}")
        return value

    return read


def count(least: int, most: int) -> Reader[int]:
    """A whole number between two others."""
    return lambda value: within(_integer(value), least, most)


def seconds(most: float) -> Reader[float]:
    """Seconds, more than none."""

    def read(value: object) -> float:
        try:
            number = float(_no_switch(value))
        except (TypeError, ValueError):
            raise ValueError("must be a number") from None
        if number <= 0:
            raise ValueError("must be greater than 0")
        if not number <= most:
            raise ValueError(f"must be less than or equal to {most}")
        return number

    return read


def size(least: int, most: int | None = None) -> Reader[int]:
    """Bytes, as `parse_size` takes them, between two others."""
    return lambda value: within(parse_size(value), least, most)


def parse_size(value: object) -> int:
    """Bytes of a size as Synapse writes them: a number, or one with K, M, G or T (powers of 1,024)."""
    if not isinstance(value, (bool, str)):
        return _integer(value)
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)B?\s*", str(value).upper())
    if not match:
        raise ValueError("must be a size such as 512K, 8M or 20G")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def _integer(value: object) -> int:
    value = _no_switch(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int):
        raise ValueError("must be an integer")
    return value


def _no_switch(value: Any) -> Any:
    """The value, which is to be a number: Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def within(number: int, least: int, most: int | None = None) -> int:
    """The number, which is to be between two others. Raises `ValueError`."""
    if number < least:
        raise ValueError(f"must be greater than or equal to {least}")
    if most is not None and number > most:
        raise ValueError(f"must be less than or equal to {most}")
    return number

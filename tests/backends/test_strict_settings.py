"""What every block of settings does with the values that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest

from backends.errors import SettingsError
from backends.strict_settings import Secret, StrictSettings, count, one_of, parse_size, seconds, size, text


@dataclass(frozen=True)
class Block(StrictSettings):
    name: Annotated[str, text]
    number: Annotated[int, count(1, 10)] = 5
    delay: Annotated[float, seconds(60)] = 1
    word: Annotated[str, one_of("one", "two", "three")] = "one"
    room: Annotated[int | None, size(0)] = None
    note: str = "no setting"

    may_be_empty: ClassVar[frozenset[str]] = frozenset({"word"})


def refusal(**values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        Block.parse({"name": "a", **values})
    return caught.value


def test_what_is_left_out_has_its_default() -> None:
    assert Block.parse({"name": "a"}) == Block("a")
    assert Block.parse({"name": "a", "number": None, "word": "", "unknown": None}) == Block("a")


@pytest.mark.parametrize("values", [{}, {"name": None}])
def test_what_is_required_is_missed(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="name: required, but missing"):
        Block.parse(values)


def test_a_field_without_a_reader_is_no_setting() -> None:
    assert refusal(note="b").path == ("note",)


@pytest.mark.parametrize(("value", "number"), [(7, 7), ("7", 7), (" 7 ", 7), (7.0, 7)])
def test_a_number_may_be_written_as_text(value: object, number: int) -> None:
    assert Block.parse({"name": "a", "number": value}).number == number
    assert Block.parse({"name": "a", "delay": value}).delay == number
    assert Block.parse({"name": "a", "room": value}).room == number


@pytest.mark.parametrize("value", [True, False, [], {}, "seven", 7.5, "7.5", float("nan"), float("inf"), 0, 11])
def test_what_is_no_number_of_its_range_is_refused(value: object) -> None:
    assert refusal(number=value).path == ("number",)


def test_the_words_that_may_be_used_are_told() -> None:
    assert refusal(word="four").reason == "must be 'one', 'two' or 'three'"
    assert refusal(word=["one"]).reason == "must be 'one', 'two' or 'three'"


@pytest.mark.parametrize("value", ["", "M", "-5M", "5P", "5 MiB", True, 5.5, []])
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_size(value)


def test_changed_settings_are_read_as_those_of_a_file() -> None:
    block = Block("a", number=7, room=5)
    assert block.changed({"room": "8M", "number": None}) == Block("a", room=8 << 20)
    assert block.changed({}) == block


@pytest.mark.parametrize(
    ("values", "words"), [({"number": 11}, "less than"), ({"nunber": 1}, "'number'"), ({"name": None}, "missing")]
)
def test_a_change_that_is_wrong_is_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Block("a").changed(values)


def test_a_secret_is_compared_but_not_shown() -> None:
    secret = Secret("of-someone")
    assert secret.get_secret_value() == "of-someone"
    assert (secret, hash(secret)) == (Secret("of-someone"), hash(Secret("of-someone")))
    assert secret != Secret("of-someone-else")
    assert "of-someone" not in f"{secret} {secret!r}"

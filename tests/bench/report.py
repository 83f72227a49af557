"""Takes measurements in alternation, compares them with targets, and writes `docs/benchmarks.md`, a section a program.

samples = alternate({"theirs": upload_by_theirs, "ours": upload_by_ours}, rounds=5, unit="s")
row = ratio("3,000 files", samples["theirs"], samples["ours"], at_least=5)
section = markdown("s3_media_upload", [row], conditions=["2026-11-01, a machine"], notes=["…"])
write_section("upload", section)
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from tests.bench.environments import ROOT

DOCUMENT = ROOT / "docs" / "benchmarks.md"

_INTRODUCTION = """\
# Benchmarks

Written by `./scripts/bench upload`, `serve` and `cache`, each of which replaces its own section. Ratios are taken
between programs that ran in turns, on the same files and against the same server; the numbers in brackets are the lowest
and the highest of all rounds.
"""


@dataclass(frozen=True)
class Samples:
    """What was measured of one contestant, a value a round."""

    name: str
    unit: str
    values: tuple[float, ...]
    note: str = ""
    """What is told beside them."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name} {_spread(self.values, self.unit)}{note}"


@dataclass(frozen=True)
class Row:
    """One line of a table: what was found, and whether it is what it must be."""

    what: str
    measured: str
    result: str
    target: str = ""
    is_met: bool | None = None
    """None where there is no target."""

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: ""}[self.is_met]
        return "; ".join(filter(None, (f"{self.what}: {self.result}", self.target, verdict, self.measured)))


def alternate(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    unit: str,
    what: str = "",
    before: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Measure all contestants in turns; who begins changes from round to round, so that a drift hits all alike.

    Each contestant is a function that prepares, measures and cleans up, and returns what it measured. `before` is
    called before each of them.
    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            before()
            values[name].append(contestants[name]())
            say(f"{what} round {number + 1} of {rounds}, {name}: {_number(values[name][-1])} {unit}".lstrip())
    return {name: Samples(name, unit, tuple(found)) for name, found in values.items()}


def ratio(
    what: str, above: Samples, below: Samples, *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """How many times `above` is `below`, round by round: old time / new time, or new throughput / old throughput.

    Where one has fewer rounds than the other, its rounds are used again.
    """
    rounds = max(len(above.values), len(below.values))
    pairs = zip(islice(cycle(above.values), rounds), islice(cycle(below.values), rounds), strict=True)
    return replace(
        _judged(what, Samples("", "×", tuple(a / b for a, b in pairs)), at_least, at_most),
        measured=f"{above}, {below}",
    )


def value(what: str, samples: Samples, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    """A measurement that has to keep to a bound by itself; its worst round counts."""
    return _judged(what, samples, at_least, at_most, worst=True)


def _judged(what: str, samples: Samples, at_least: float | None, at_most: float | None, *, worst: bool = False) -> Row:
    lowest, highest = (min(samples.values), max(samples.values)) if worst else (samples.median, samples.median)
    bounds, is_met = [], True
    if at_least is not None:
        bounds.append(f"at least {at_least:g} {samples.unit}")
        is_met &= lowest >= at_least
    if at_most is not None:
        bounds.append(f"at most {at_most:g} {samples.unit}")
        is_met &= highest <= at_most
    return Row(what, samples.name, _spread(samples.values, samples.unit), ", ".join(bounds), is_met if bounds else None)


def markdown(title: str, rows: Iterable[Row], *, conditions: Iterable[str], notes: Iterable[str] = ()) -> str:
    """A section: conditions, the table, and what has to be known to read it."""
    lines = [f"## {title}", "", *(f"- {condition}" for condition in conditions), ""]
    lines += ["| | result | must be | | measured, median and spread |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = {True: "met", False: "**missed**", None: ""}[row.is_met]
        lines.append(f"| {row.what} | {row.result} | {row.target} | {verdict} | {row.measured} |")
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def write_section(name: str, section: str, document: Path = DOCUMENT) -> None:
    """Put a section into the document, in place of the one that this name stood for."""
    text = document.read_text() if document.exists() else _INTRODUCTION
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{section}{end}\n"
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}\n", text, re.DOTALL)
    text = text.replace(found[0], block) if found else f"{text.rstrip()}\n\n{block}"
    document.parent.mkdir(exist_ok=True)
    document.write_text(text)


def say(sentence: str) -> None:
    """Tell those who wait what goes on."""
    print(f"  ▸ {sentence}", file=sys.stderr, flush=True)


def _spread(values: Sequence[float], unit: str) -> str:
    spread = "" if len(values) == 1 else f" ({_number(min(values))}–{_number(max(values))})"
    return f"{_number(statistics.median(values))}{spread} {unit}".rstrip()


def _number(number: float) -> str:
    """Three significant digits, and no fewer than all before the point."""
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    digits = max(0, 2 - (len(str(int(abs(number)))) - 1)) if abs(number) >= 1 else 3
    return f"{number:.{digits}f}"

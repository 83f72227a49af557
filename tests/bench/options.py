"""The options that all benchmarks take, and the end that they all come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import report
from tests.bench.conditions import conditions
from tests.bench.environments import ROOT
from tests.bench.report import Row


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    program: str
    parts: tuple[str, ...]
    """In the order in which they are to be measured."""
    quick: bool
    rounds: int | None
    """None leaves it to each part."""
    is_whole: bool
    """Whether the result says as much as it is meant to, so that it may be published."""

    @classmethod
    def parse(cls, program: str, description: str | None, parts: Sequence[str]) -> Options:
        """Read `sys.argv`; `program` is what stands behind `./scripts/bench`."""
        parser = argparse.ArgumentParser(
            prog=f"./scripts/bench {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            *("--only", "-o"), action="append", choices=parts, metavar="PART", help=f"one of: {', '.join(parts)}"
        )
        parser.add_argument("--quick", action="store_true", help="smaller numbers, one round: does it work at all?")
        parser.add_argument("--rounds", type=int, metavar="N", help="how often each is measured")
        given = parser.parse_args()
        if given.rounds is not None and given.rounds < 1:
            parser.error("--rounds: at least 1")
        chosen = tuple(part for part in parts if not given.only or part in given.only)
        rounds = given.rounds or (1 if given.quick else None)
        return cls(program, chosen, given.quick, rounds, chosen == tuple(parts) and not given.quick)

    def rounds_or(self, default: int) -> int:
        """How often to measure in a part that has its own idea of it."""
        return self.rounds or default


def finish(
    options: Options,
    title: str,
    rows: Sequence[Row],
    server_versions: Sequence[str],
    directory: Path,
    notes: Sequence[str],
) -> int:
    """Print the result, and write it into the document where the run was a whole one; 1 where a target was missed.

    A quick run misses no target: its numbers are too small to say anything.
    """
    section = report.markdown(title, rows, conditions=conditions(server_versions, directory), notes=notes)
    print(section)
    if options.is_whole:
        report.write_section(options.program, section)
        report.say(f"Written to {report.DOCUMENT.relative_to(ROOT)}.")
    else:
        report.say("Nothing was written: only a run of all parts, without --quick, is published.")
    missed = [row for row in rows if row.is_met is False]
    for row in missed:
        report.say(str(row))
    return 1 if missed and not options.quick else 0

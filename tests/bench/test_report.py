"""What the numbers come to, and how the document is put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bench.report import Row, Samples, alternate, markdown, ratio, value, write_section


def seconds(name: str, *values: float) -> Samples:
    return Samples(name, "s", values)


def test_ratio_compares_round_by_round() -> None:
    row = ratio("upload", seconds("theirs", 10, 30, 20), seconds("ours", 2, 5, 5))

    assert row.result == "5.00 (4.00–6.00) ×"
    assert row.measured == "theirs 20.0 (10.0–30.0) s, ours 5.00 (2.00–5.00) s"
    assert row.is_met is None


def test_median_of_ratios_has_to_reach_the_target() -> None:
    theirs, ours = seconds("theirs", 10, 30, 20), seconds("ours", 2, 5, 5)

    assert ratio("upload", theirs, ours, at_least=5).is_met is True
    assert ratio("upload", theirs, ours, at_least=5.1).is_met is False
    assert ratio("CPU", ours, theirs, at_most=0.2).is_met is True
    assert ratio("CPU", ours, theirs, at_most=0.19).is_met is False


def test_fewer_rounds_are_used_again() -> None:
    row = ratio("upload", seconds("theirs", 12), seconds("ours", 2, 3, 4))

    assert row.result == "4.00 (3.00–6.00) ×"


def test_worst_round_of_a_value_has_to_keep_to_its_bound() -> None:
    assert value("peak", Samples("", "MiB", (100, 149)), at_most=150).is_met is True
    assert value("peak", Samples("", "MiB", (100, 149)), at_most=148).is_met is False
    assert value("peak", Samples("", "MiB", (100, 149))).is_met is None


def test_who_begins_changes_from_round_to_round() -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return len(order)

        return measure

    samples = alternate({name: note(name) for name in "abc"}, rounds=3, unit="s")

    assert "".join(order) == "abc" + "bca" + "cab"
    assert samples["a"].values == (1, 6, 8)


def test_section_tells_what_was_missed() -> None:
    rows = [Row("slow", "m", "1 ×", "at least 5 ×", False), Row("fast", "m", "9 ×", "at least 5 ×", True)]

    section = markdown("Upload", rows, conditions=["a machine"], notes=["a note"])

    assert "| slow | 1 × | at least 5 × | **missed** | m |" in section
    assert "| fast | 9 × | at least 5 × | met | m |" in section
    assert "- a machine\n" in section and section.endswith("- a note\n")


def test_section_replaces_its_predecessor_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "benchmarks.md"

    write_section("upload", "## Upload\n\nold\n", document)
    write_section("serve", "## Serve\n\nkept\n", document)
    write_section("upload", "## Upload\n\nnew\n", document)

    text = document.read_text()
    assert text.startswith("# Benchmarks\n")
    assert text.index("new") < text.index("kept")
    assert "old" not in text and text.count("## Upload") == 1

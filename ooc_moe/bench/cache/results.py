"""What `ooc-moe bench cache` found about the cache: rows, their ratios against the targets, a table for the terminal and for a file.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.display.table import Table, markdown_table

NOTES = "## What bounds each"
_HEADINGS = ("part", "size", "path", "measured [quartiles]", "ratio", "must", "aim", "reached")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Of medians: a rate over its peer's is to be at least its targets, a time over its bound at most."""

    of: str
    value: float
    must: float | None = None
    aim: float | None = None
    at_most: bool = False

    @property
    def reached(self) -> str:
        """ "aim", "must" or "no"; "" without a target."""
        targets = [(name, target) for name, target in (("aim", self.aim), ("must", self.must)) if target is not None]
        met = [name for name, target in targets if (self.value <= target if self.at_most else self.value >= target)]
        return met[0] if met else "no" if targets else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One path of a part, with experts of one preset's size."""

    part: str
    size: str
    path: str
    unit: str
    spread: Spread
    ratios: tuple[Ratio, ...] = ()


def table(rows: Sequence[Row]) -> Table:
    """The results; a section for each part and size."""
    sections = [i for i in range(1, len(rows)) if (rows[i - 1].part, rows[i - 1].size) != (rows[i].part, rows[i].size)]
    return Table("", _HEADINGS, [_cells(row) for row in rows], alignment="l" * len(_HEADINGS), sections=sections)


def save(rows: Sequence[Row], facts: Mapping[str, str], path: Path) -> None:
    """Writes the file: what ran on what, the table, and the notes of an older one."""
    notes = f"{NOTES}\n\n(to be written: the profile of each path)"
    if path.exists():
        _, found, below = path.read_text().partition(NOTES)
        notes = found + below if found else notes
    lines = ["# ooc-moe bench cache: training with experts in the cache", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", markdown_table(table(rows))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", notes.rstrip(), ""]))


def _cells(row: Row) -> tuple[str, ...]:
    def column(texts: Sequence[str]) -> str:
        return "\n".join(texts) if any(texts) else ""

    ratios = row.ratios
    sign = {True: "<= ", False: ">= "}
    return (
        row.part,
        row.size,
        row.path,
        f"{row.spread.text} {row.unit}",
        column([f"{ratio.value:.2f} x {ratio.of}" for ratio in ratios]),
        column(["" if ratio.must is None else f"{sign[ratio.at_most]}{ratio.must:g}" for ratio in ratios]),
        column(["" if ratio.aim is None else f"{sign[ratio.at_most]}{ratio.aim:g}" for ratio in ratios]),
        column([ratio.reached for ratio in ratios]),
    )

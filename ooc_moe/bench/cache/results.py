"""The results of `ooc-moe bench cache`: rows, their ratios to a baseline, and the table that shows them. The part "layer" has its own rows
and table, in layer.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.bench.result_page import kept_notes, met_target
from ooc_moe.display.table import Table, markdown_table

NOTES = "## What bounds each"
_HEADINGS = ("part", "size", "path", "measured [quartiles]", "ratio", "must", "aim", "reached")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How one benchmark case (path) compares with another: the ratio of their medians, and the targets for this ratio.

    There are two targets: `must`, and the stricter `aim`; None where there is none. A ratio of rates should be at least its targets, a
    ratio of times at most.
    """

    of: str
    """What it is compared with, in words."""
    value: float
    must: float | None = None
    aim: float | None = None
    at_most: bool = False
    """True for a ratio of times: it meets a target if it is at most the target."""

    @property
    def reached(self) -> str:
        """Which target the ratio meets: "aim" (the stricter one), "must" or "no"; "" without a target."""
        return met_target(self.value, must=self.must, aim=self.aim, at_most=self.at_most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the result table: the times or speeds of one benchmark case to do a part's work, and their ratios to the baseline.

    `part` is one of the parts of the benchmark, `size` the preset that decides how large experts are, `path` says in words what was
    measured, and `unit` is the unit of `spread`, for example "ms".
    """

    part: str
    size: str
    path: str
    unit: str
    spread: Spread
    ratios: tuple[Ratio, ...] = ()


def table(rows: Sequence[Row]) -> Table:
    """Makes the table of all rows, with a section for each part of the benchmark and each preset."""
    sections = [i for i in range(1, len(rows)) if (rows[i - 1].part, rows[i - 1].size) != (rows[i].part, rows[i].size)]
    return Table("", _HEADINGS, [_cells(row) for row in rows], alignment="l" * len(_HEADINGS), sections=sections)


def save(rows: Sequence[Row], facts: Mapping[str, str], path: Path) -> None:
    """Writes the result page to `path`: `facts`, and the table of `rows`. Notes that people added to an existing page stay."""
    notes = kept_notes(path, NOTES, missing="to be written: the profile of each path")
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

"""The results of `ooc-moe bench cache`, the layer left out: rows, their ratios to a baseline, and the table that shows them."""

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
    """A path's median divided by that of its baseline. A ratio of rates should be at least its targets, a ratio of times at most."""

    of: str
    """The baseline, in words."""
    value: float
    must: float | None = None
    aim: float | None = None
    at_most: bool = False
    """Whether it is a ratio of times."""

    @property
    def reached(self) -> str:
        """The stricter target that the ratio meets: "aim", "must" or "no"; "" without a target."""
        return met_target(self.value, must=self.must, aim=self.aim, at_most=self.at_most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was measured of one path of a part, with experts of one preset's size."""

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
    """Writes the page: command, machine and versions, the table, and the notes of an existing page."""
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

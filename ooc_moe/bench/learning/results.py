"""What `ooc-moe bench learning` found: speeds and returns beside their peer's, tables for the terminal and for a file.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.display.table import Table, markdown_table
from ooc_moe.metrics import statistics

RATIO_MUST, RATIO_AIM = 2.0, 3.0
NOTES = "## What bounds it"
SPEED_HEADINGS = ("game", "SB3's environments", "ours, steps/s [quartiles]", "SB3, steps/s [quartiles]", "ratio", "must", "aim", "reached")
RETURNS_HEADINGS = ("game", "steps", "ours, each seed", "SB3, each seed", "means", "difference [95 %]", "nothing worse shown")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Environment steps per second, rollouts and updates together, in one game. `peer_envs` says whose environments SB3 had."""

    game: str
    peer_envs: str
    ours: Spread
    peer: Spread

    @property
    def judged(self) -> bool:
        """The targets are meant for SB3 as it comes; with our environments it shows what the learners alone do."""
        return self.peer_envs == "its own"

    @property
    def ratio(self) -> float:
        """Of medians."""
        return self.ours.median / self.peer.median

    @property
    def reached(self) -> str:
        """ "aim", "must" or "no"; "" where there is no target."""
        if not self.judged:
            return ""
        return "aim" if self.ratio >= RATIO_AIM else "must" if self.ratio >= RATIO_MUST else "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Returns:
    """Mean raw returns at the end of training on equal steps, one of each seed; NaN where no game ended."""

    game: str
    steps: int
    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def difference(self) -> tuple[float, float, float]:
        """Ours less SB3's: of the means, and its 95 % interval (bootstrap over seeds)."""
        return statistics.difference([self.ours], [self.peer])

    @property
    def not_worse(self) -> bool:
        """Whether the interval reaches zero; what is unsaid does not."""
        return bool(self.difference[2] >= 0)


def tables(speeds: Sequence[Speed], returns: Sequence[Returns]) -> list[Table]:
    """The speeds and the returns, each if it was measured."""
    return [Table("", headings, rows, alignment="l" * len(headings)) for headings, rows in _sections(speeds, returns)]


def save(speeds: Sequence[Speed], returns: Sequence[Returns], facts: Mapping[str, str], path: Path) -> None:
    """Writes the file: what ran on what, the tables, and the notes of an older one."""
    notes = f"{NOTES}\n\n(to be written: the profile)"
    if path.exists():
        _, found, below = path.read_text().partition(NOTES)
        notes = found + below if found else notes
    lines = ["# ooc-moe bench learning: our dense PPO beside Stable-Baselines3's", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for table in tables(speeds, returns):
        lines += ["", markdown_table(table)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", notes.rstrip(), ""]))


def _sections(speeds: Sequence[Speed], returns: Sequence[Returns]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    sections = [(SPEED_HEADINGS, [_speed_cells(row) for row in speeds]), (RETURNS_HEADINGS, [_returns_cells(row) for row in returns])]
    return [(headings, rows) for headings, rows in sections if rows]


def _speed_cells(row: Speed) -> tuple[str, ...]:
    targets = (f">= {RATIO_MUST:g}", f">= {RATIO_AIM:g}") if row.judged else ("", "")
    return row.game, row.peer_envs, row.ours.text, row.peer.text, f"{row.ratio:.2f}", *targets, row.reached


def _returns_cells(row: Returns) -> tuple[str, ...]:
    difference, low, high = row.difference
    means = " / ".join(f"{statistics.mean(values):.4g}" for values in (row.ours, row.peer))
    verdict = "unsaid" if math.isnan(difference) else "yes" if row.not_worse else "no"
    return row.game, f"{row.steps}", _points(row.ours), _points(row.peer), means, f"{difference:+.3g} [{low:+.3g}, {high:+.3g}]", verdict


def _points(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)

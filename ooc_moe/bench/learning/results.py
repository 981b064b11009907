"""The results of `ooc-moe bench learning`: our speeds and returns, those of Stable-Baselines3 (SB3), and the tables that compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.bench.result_page import kept_notes, met_target
from ooc_moe.display.table import Table, markdown_table
from ooc_moe.metrics import statistics

RATIO_MUST, RATIO_AIM = 2.0, 3.0
NOTES = "## What bounds it"
SPEED_HEADINGS = ("game", "SB3's environments", "ours, steps/s [quartiles]", "SB3, steps/s [quartiles]", "ratio", "must", "aim", "reached")
RETURNS_HEADINGS = ("game", "steps", "ours, each seed", "SB3, each seed", "means", "difference [95 %]", "nothing worse shown")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How many environment steps per second our learner and SB3's make in one game; the time covers playing (rollouts) and learning.

    `ours` is the speed of our PPO, `peer` that of Stable-Baselines3's (SB3).
    """

    game: str
    peer_envs: str
    """Whose environments SB3 played in: "its own" or "ours"."""
    ours: Spread
    peer: Spread

    @property
    def judged(self) -> bool:
        """Whether the ratio has targets: only where SB3 plays in its own environments.

        Where SB3 plays in our environments, the row is for information: it compares the learners alone.
        """
        return self.peer_envs == "its own"

    @property
    def ratio(self) -> float:
        """Our median speed divided by SB3's."""
        return self.ours.median / self.peer.median

    @property
    def reached(self) -> str:
        """Which target the ratio meets: "aim" (the stricter one), "must" or "no"; "" where no target applies."""
        if not self.judged:
            return ""
        return met_target(self.ratio, must=RATIO_MUST, aim=RATIO_AIM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Returns:
    """Mean raw returns at the end of training in one game, for our learner and SB3's after equally many steps.

    `ours` (our PPO) and `peer` (Stable-Baselines3's) have one value for each seed, NaN where no episode ended. `steps` is the length of the
    training in environment steps.
    """

    game: str
    steps: int
    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def difference(self) -> tuple[float, float, float]:
        """Our mean return minus SB3's, then the lower and the upper end of this difference's 95 % interval (bootstrap over seeds)."""
        return statistics.difference([self.ours], [self.peer])

    @property
    def not_worse(self) -> bool:
        """Whether nothing shows that our returns are worse: the upper end of the difference's interval is at least zero. False if NaN."""
        return bool(self.difference[2] >= 0)


def tables(speeds: Sequence[Speed], returns: Sequence[Returns]) -> list[Table]:
    """Makes the table of speeds and the table of returns; a table without rows is left out."""
    return [Table("", headings, rows, alignment="l" * len(headings)) for headings, rows in _sections(speeds, returns)]


def save(speeds: Sequence[Speed], returns: Sequence[Returns], facts: Mapping[str, str], path: Path) -> None:
    """Writes the result page to `path`: `facts` and the tables. Notes that people added to an existing page stay."""
    notes = kept_notes(path, NOTES, missing="to be written: the profile")
    lines = ["# ooc-moe bench learning: our dense PPO compared with Stable-Baselines3's", ""]
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

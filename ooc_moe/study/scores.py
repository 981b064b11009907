"""The scores of a study's runs on one scale for all games: 0 is random play, 1 is single-task.

Single-task is the score of a network that was trained on this game alone, as the mean over its seeds. A game counts if the single-task
network learned it well enough (the rules are in `_why_left_out`). Ratios such as retention use only the games that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ooc_moe.envs import REFERENCE_SCORES
from ooc_moe.metrics import measures
from ooc_moe.metrics.measures import Floats
from ooc_moe.metrics.run import RunRecord
from ooc_moe.study.study import Study, StudyRun

SINGLE = "single"
LEARNED_MIN = 0.2
"""A game with a smaller share learned than this is left out of ratios, because there is too little that could be forgotten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GameFacts:
    """What a study knows of one game: the raw returns that define the scale of its scores, and whether the game counts in ratios.

    On the scale, `random` (random play) is 0, `single` (a network trained on this game alone) is 1. Returns not measured are NaN.
    """

    game: str
    random: float
    """The mean return of random play."""
    constant: float
    """The mean return of the best constant action, played at every step."""
    single: float
    """The single-task return: that of a network that learned this game alone, as the mean over its seeds."""
    reference: float
    """The return of a human player; for pixel games, of best play."""
    cut: bool
    """Whether evaluation stopped some games of `single` before they were over. `single` is then a lower bound."""
    left_out: str
    """The reason why the game is left out of ratios; "" if it counts."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The value of a measure, such as retention, for one game in one run. The run is given by its order of the games and its seed."""

    order: str
    seed: int
    game: str
    value: float


Measure = Callable[[Floats, tuple[int, ...], Floats], Floats]
"""Computes a measure for each game, (G,).

From the normalised scores after each phase (P, G), the game trained in each phase (P,), and the normalised scores before any training (G,).
"""


def _per_game(values_PG: Floats) -> Floats:
    return np.array([measures.mean(column) for column in values_PG.T])


def retention(scores_PG: Floats, trained_P: Sequence[int]) -> Floats:
    """Computes what share of each game's score right after its training is left at the end (measures.retention), (G,).

    NaN for games of which less than `LEARNED_MIN` was learned. `scores_PG`: normalised scores of each game after each phase (the training
    in one game). `trained_P`: the game trained in each phase.
    """
    kept = measures.retention(scores_PG, trained_P, np.zeros(scores_PG.shape[1]))
    return np.where(measures.learning(scores_PG, trained_P) >= LEARNED_MIN, kept, np.nan)


MEASURES: dict[str, tuple[str, Measure]] = {
    "learning": ("right after the game's own training", lambda s, t, u: measures.learning(s, t)),
    "average": ("at the end", lambda s, t, u: measures.final(s)),
    "retention": (
        f"average / learning, of games that are not the last and of which at least {LEARNED_MIN} was learned",
        lambda s, t, u: retention(s, t),
    ),
    "forgetting": ("best earlier score - score at the end", lambda s, t, u: measures.forgetting(s, t)),
    "learning without the last game": ("", lambda s, t, u: measures.without_last(measures.learning(s, t), t)),
    "average without the last game": ("", lambda s, t, u: measures.without_last(measures.final(s), t)),
    "isolated forgetting, fixed scale": (
        "mean loss by one later game",
        lambda s, t, u: _per_game(measures.isolated_forgetting(s, t, np.ones(s.shape[1]))),
    ),
    "zero-shot transfer, fixed scale": (
        "mean gain by one earlier game",
        lambda s, t, u: _per_game(measures.zero_shot_transfer(s, t, u, np.ones(s.shape[1]))),
    ),
    "forward transfer": ("score before its own training - untrained score", lambda s, t, u: measures.forward_transfer(s, t, u)),
    "forward transfer without the last game": ("", lambda s, t, u: measures.without_last(measures.forward_transfer(s, t, u), t)),
}
"""By name, in the order of the tables: what the measure is in words, and the function that computes it from normalised scores."""

RAW_MEASURES: dict[str, tuple[str, Measure]] = {
    "isolated forgetting (CORA)": (
        "of raw returns, divided by the absolute value of the run's own best return (Powers et al. 2022); here the best at the ends of "
        "games' training, not at every point of it",
        lambda s, t, u: _per_game(measures.isolated_forgetting(s, t)),
    ),
    "zero-shot transfer (CORA)": ("likewise", lambda s, t, u: _per_game(measures.zero_shot_transfer(s, t, u))),
}
"""Like `MEASURES`, but computed from raw returns instead of normalised scores."""


@dataclass(frozen=True)
class StudyScores:
    """The finished runs of a study (`records`), with their scores on one scale for all games, and a list of the missing runs."""

    study: Study
    records: Mapping[StudyRun, RunRecord]
    missing: Mapping[StudyRun, str]
    """The runs that are not finished, each with the reason."""
    constants: Mapping[str, float]
    """By game: the mean raw return of the best constant action."""

    def of(self, variant: str) -> dict[StudyRun, RunRecord]:
        """Returns the finished runs of a variant, each with the metrics that it logged."""
        return {run: record for run, record in self.records.items() if run.variant == variant}

    @cached_property
    def variants(self) -> list[str]:
        """The variants that have a finished run, in the study's order."""
        return [name for name in self.study.seeds if self.of(name)]

    @cached_property
    def facts(self) -> dict[str, GameFacts]:
        """By game: the raw returns that its scores are compared with, and whether it counts."""
        return {game: self._facts_of(game) for game in self.study.games}

    @cached_property
    def counted(self) -> set[str]:
        """The games that count in ratios: those that the single-task network learned well enough."""
        return {game for game, facts in self.facts.items() if not facts.left_out}

    def _facts_of(self, game: str) -> GameFacts:
        events = [event for record in self.records.values() for event in record.evaluations if event["evaluated"] == game]
        own = [event for record in self.of(SINGLE).values() for event in record.last_evaluations if event["evaluated"] == game]
        random = measures.mean([event["random_mean"] for event in events])
        constant = self.constants.get(game, float("nan"))
        single = measures.mean([event["return_mean"] for event in own])
        cut = any(event.get("episodes_truncated") for event in own)
        reference = REFERENCE_SCORES[game.partition("@")[0]][1]
        returns = [value for event in own for value in event["returns"]]
        return GameFacts(
            game=game,
            random=random,
            constant=constant,
            single=single,
            reference=reference,
            cut=cut,
            left_out=_why_left_out(random, constant, single, reference, cut, returns),
        )

    def normalised(self, record: RunRecord) -> tuple[Floats, Floats]:
        """Returns a run's scores on the study's scale: after each phase for each game (P, G), and before any training (G,).

        A phase is the training in one game. NaN for games without a single-task score.
        """
        scores = record.scores
        random_G = [self.facts[game].random for game in scores.games]
        single_G = [self.facts[game].single for game in scores.games]
        return measures.normalise(scores.mean_PG, random_G, single_G), measures.normalise(scores.untrained_G, random_G, single_G)

    def cells(self, variant: str, name: str) -> list[Cell]:
        """Computes a measure for every finished run of a variant and each game that counts: one cell for each run and game.

        `name` is the measure's name, a key of MEASURES or RAW_MEASURES. Runs in which games take turns are evaluated only at their end.
        They have values only for measures whose name starts with "average".
        """
        found = []
        for run, record in self.of(variant).items():
            if run.config.switch_every and not name.startswith("average"):
                continue
            scores = record.scores
            if name in RAW_MEASURES:
                values_G = RAW_MEASURES[name][1](scores.mean_PG, scores.trained_P, scores.untrained_G)
            else:
                scores_PG, untrained_G = self.normalised(record)
                values_G = MEASURES[name][1](scores_PG, scores.trained_P, untrained_G)
            found += [
                Cell(run.order, run.config.seed, game, float(value))
                for game, value in zip(scores.games, values_G, strict=True)
                if game in self.counted
            ]
        return found

    def worst(self, variant: str, name: str = "forgetting") -> list[Cell]:
        """Returns one Cell for each finished run of a variant: the greatest value of a measure over its games. The Cell's game is ""."""
        by_run: dict[tuple[str, int], list[float]] = {}
        for cell in self.cells(variant, name):
            if not np.isnan(cell.value):
                by_run.setdefault((cell.order, cell.seed), []).append(cell.value)
        return [Cell(order, seed, "", max(values)) for (order, seed), values in by_run.items()]


def strata(cells: Sequence[Cell]) -> list[Floats]:
    """Groups cells by the order of the games: one array (runs, games) for each order, NaN for values that are not known.

    These groups are the strata from which a bootstrap draws runs (see statistics.py). Where a variant trains a separate network for each
    game, the game's name stands for the order, so that each game is a stratum.
    """
    orders: dict[str, dict[int, dict[str, float]]] = {}
    for cell in cells:
        if not np.isnan(cell.value):
            orders.setdefault(cell.order, {}).setdefault(cell.seed, {})[cell.game] = cell.value
    games = dict.fromkeys(cell.game for cell in cells)
    return [np.array([[run.get(game, np.nan) for game in games] for run in runs.values()]) for runs in orders.values()]


def _why_left_out(random: float, constant: float, single: float, reference: float, cut: bool, returns: Sequence[float]) -> str:
    """Returns why a game is left out of ratios; "" if it counts.

    A game counts if the single-task network learned enough of it, and if a player that does not look at the screen gets clearly less.

    Args:
        random: the mean return of random play.
        constant: the mean return of the best constant action.
        single: the single-task return.
        reference: the return of a human, or of best play.
        cut: whether evaluation stopped some games before they were over.
        returns: the returns of the episodes whose mean is `single`.
    """
    if np.isnan(single):
        return "no single-task run yet"
    if not single > random:
        return "single-task training is not above random play"
    share = (single - random) / (reference - random)
    if share < LEARNED_MIN:
        way = f"of the way from random play to the reference, {LEARNED_MIN} wanted"
        return f"evaluation cut its games; at least {share:.3f} {way}" if cut else f"single-task score is {share:.3f} {way}"
    for floor, name in ((constant, "the best constant action"), (random, "random play")):
        if not np.isnan(floor) and not measures.clearly_above(returns, floor):
            return f"single-task score is not above {name} (by two standard errors)"
    return ""

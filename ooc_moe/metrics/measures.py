"""Measures of continual learning (learning, forgetting, transfer), and of how much games share experts: pure functions of numpy arrays.

Letters of shapes: P phases (a phase is the time in which one game is trained), G games, E experts.

- `scores_PG`, written A in formulas: A[k, i] is the score of game i after phase k; NaN if the game was not evaluated then.
- `trained_P`: for each phase, the column of the game that it trained. A game may be trained in several phases; first(i) and last(i) are
  game i's first and last phase.

A value that is not defined is NaN, never 0: the game was never trained, never evaluated, or learned nothing that it could forget.

Always show forgetting together with `learning`: a method that never learns forgets nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Expert = TypeVar("Expert", bound=Hashable)


def normalise(scores: ArrayLike, floor_G: ArrayLike, ceiling_G: ArrayLike) -> Floats:
    """Rescales scores so that each game's floor becomes 0 and its ceiling 1: (score - floor) / (ceiling - floor).

    NaN where a game's ceiling is not above its floor.

    With random play as floor and `best_own` as ceiling, this is the run's own normalised score. With a human's score as ceiling, it is the
    human-normalised score (Mnih et al. 2015, "Human-level control", extended data table 2).

    Args:
        scores: raw scores (..., G); the last axis has the games.
        floor_G: for each game, the score that becomes 0.
        ceiling_G: for each game, the score that becomes 1.
    """
    floor, ceiling = np.asarray(floor_G, float), np.asarray(ceiling_G, float)
    span = np.where(ceiling > floor, ceiling - floor, np.nan)
    return np.asarray((np.asarray(scores, float) - floor) / span)


def best_own(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """The best score of each game i at the end of any phase k from its first training on, (G,): max over k >= first(i) of A[k, i].

    A phase is the training in one game; A[k, i] is the score of game i after phase k.
    """
    scores = np.asarray(scores_PG, float)
    return np.array([_max(scores[first:, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])


def learning(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """The score of each game i right after the last phase that trained it, (G,): A[last(i), i].

    A phase is the training in one game; A[k, i] is the score of game i after phase k. The mean over games is the learning accuracy, LA
    (Riemer et al. 2019).
    """
    scores = np.asarray(scores_PG, float)
    last = {game: phase for phase, game in enumerate(trained_P) if phase < len(scores)}
    return np.array([scores[last[game], game] if game in last else np.nan for game in range(scores.shape[1])])


def final(scores_PG: ArrayLike) -> Floats:
    """The final score of each game, after the last of all phases, (G,): A[P-1, i].

    The mean over games is ACC (Lopez-Paz & Ranzato 2017, eq. 2).
    """
    scores = np.asarray(scores_PG, float)
    return scores[-1].copy() if len(scores) else np.full(scores.shape[1], np.nan)


def forgetting(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """The forgetting of each game, (G,): how far its score fell from its best until the end of the run. Negative if it rose.

    It is (max over first(i) <= k < P-1 of A[k, i]) - A[P-1, i] (Chaudhry et al. 2018, eq. 3), where A[k, i] is the score of game i after
    phase k (the training in one game). NaN for the game of the last phase, because nothing was trained after it.
    """
    scores = np.asarray(scores_PG, float)
    before = np.array([_max(scores[first:-1, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])
    return np.where(_trained_last(scores, trained_P), np.nan, before - final(scores))


def retention(scores_PG: ArrayLike, trained_P: Sequence[int], floor_G: ArrayLike) -> Floats:
    """The share of each game's learning that is retained at the end, (G,): (A[P-1, i] - floor) / (A[last(i), i] - floor).

    A[k, i] is the score of game i after phase k; P-1 is the last of all phases, last(i) the last that trained the game. `floor_G` is the
    score of an agent that learned nothing, such as random play. NaN for the game of the last phase, and for a game whose score after
    training is not above the floor: it has nothing to retain.
    """
    scores = np.asarray(scores_PG, float)
    kept = normalise(final(scores), floor_G, learning(scores, trained_P))
    return np.where(_trained_last(scores, trained_P), np.nan, kept)


def forward_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike) -> Floats:
    """How much the training of earlier games raised each game's score before its own training began, (G,). NaN for the first game.

    It is A[first(i)-1, i] - untrained[i] (Lopez-Paz & Ranzato 2017, eq. 4), where A[k, i] is the score of game i after phase k, first(i)
    the phase that first trained it, and `untrained_G` the agent's scores before any training.
    """
    scores, untrained = np.asarray(scores_PG, float), np.asarray(untrained_G, float)
    return np.array([scores[first - 1, game] - untrained[game] if first else np.nan for game, first in _first_phases(scores, trained_P)])


def isolated_forgetting(scores_PG: ArrayLike, trained_P: Sequence[int], scale_G: ArrayLike | None = None) -> Floats:
    """Forgetting by phase, (P, G): how far game i's score fell while phase k trained another game, (A[k-1, i] - A[k, i]) / scale[i].

    A[k, i] is the score of game i after phase k (the training in one game). Negative if the score rose. NaN if game i was not trained
    before phase k, or is trained in it.

    With the default scale, `greatest_score`, this is CORA's isolated forgetting (Powers et al. 2022, "CORA", section 4). That scale is the
    run's own, so a method that learns little may seem to forget much. To compare methods, give a fixed scale: single-task score - random.
    """
    changes_PG, before_PG, own_PG = _score_changes(scores_PG, trained_P)
    return np.where(before_PG & ~own_PG, -changes_PG, np.nan) / _scale(scores_PG, scale_G)


def zero_shot_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike, scale_G: ArrayLike | None = None) -> Floats:
    """Transfer to games before their own training, by phase, (P, G): how much game i's score rose while phase k trained another game.

    It is (A[k, i] - A[k-1, i]) / scale[i]. A[k, i] is the score of game i after phase k (the training in one game), and A[-1] the agent's
    score before any training, `untrained_G`. NaN from game i's first phase on. CORA calls it zero-shot forward transfer (Powers et al.
    2022, section 4). The default scale is `greatest_score`, the run's own; to compare methods, give a fixed scale (see
    `isolated_forgetting`).
    """
    changes_PG, before_PG, own_PG = _score_changes(scores_PG, trained_P, untrained_G)
    return np.where(before_PG | own_PG, np.nan, changes_PG) / _scale(scores_PG, scale_G)


def greatest_score(scores_PG: ArrayLike) -> Floats:
    """The absolute value of each game's greatest score, (G,): |max over k of A[k, i]|. The benchmark CORA divides by this value.

    A[k, i] is the score of game i after phase k (the training in one game). NaN for a game that was never evaluated, or whose greatest
    score is 0. CORA takes the maximum over the whole training; this function takes it over the ends of phases, where scores were measured.
    """
    scores = np.asarray(scores_PG, float)
    greatest = np.abs([_max(scores[:, game]) for game in range(scores.shape[1])])
    return np.where(greatest > 0, greatest, np.nan)


def without_last(values_G: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """The values (G,) with NaN in place of the value of the game that was trained last.

    Nothing was trained after that game, so it could not be forgotten, and its value would make every mean of forgetting look too good.
    """
    values = np.array(values_G, float)
    if trained_P:
        values[trained_P[-1]] = np.nan
    return values


def clearly_above(returns: Sequence[float], floor: float) -> bool:
    """Whether the mean of `returns` is above `floor` by more than two standard errors. False for fewer than two returns."""
    return len(returns) > 1 and bool(np.mean(returns) - 2 * standard_error(returns) > floor)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of `values`. It is 0 for fewer than two values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def usage_shares(counts: ArrayLike) -> Floats:
    """Turns counts of tokens by expert, (..., E), into each expert's share of the tokens. Shares sum to 1; NaN if there are no tokens."""
    values = np.asarray(counts, float)
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, np.nan))


def thinned(counts_NE: ArrayLike, *, seed: int = 0) -> Floats:
    """Removes tokens at random from the token counts of each row, (N, E), until all rows have as many as the smallest row that has any.

    The tokens that stay are a sample without replacement. Overlaps can be compared only between rows of equal size, because the overlap of
    two samples of one distribution grows with their size.
    """
    counts = np.asarray(counts_NE, np.int64)
    totals = counts.sum(axis=1)
    least = totals[totals > 0].min(initial=totals.max(initial=0))
    rng = np.random.default_rng(seed)
    drawn = [rng.multivariate_hypergeometric(row, min(total, least)) for row, total in zip(counts, totals, strict=True)]
    return np.array(drawn, float).reshape(counts.shape)


def mass_overlap(counts_GE: ArrayLike) -> Floats:
    """The overlap of every two games' use of experts, (G, G): the share of tokens that both games send to the same experts.

    This is the sum over e of min(p_i(e), p_j(e)), where p_i(e) is expert e's share of game i's tokens; that is 1 - total variation
    distance. `counts_GE` counts the tokens of each game that went to each expert.
    """
    shares = usage_shares(counts_GE)
    return np.asarray(np.minimum(shares[:, None, :], shares[None, :, :]).sum(axis=-1))


def top_overlap(counts_GE: ArrayLike, top: int = 10) -> Floats:
    """The overlap of the most used experts of every two games, (G, G): 0 if they have none in common, 1 if all are the same.

    This is the Jaccard index |T_i & T_j| / |T_i | T_j|, where T_i is the set of the `top` experts that game i used most. It holds only
    experts with tokens; of equally used experts, the one with the lower number comes first. NaN for a game that used no expert.
    """
    counts = np.asarray(counts_GE, float)
    sets = [{int(e) for e in np.argsort(-row, kind="stable")[:top] if row[e] > 0} for row in counts]
    return np.array([[_jaccard(a, b) for b in sets] for a in sets]).reshape(len(sets), len(sets))


def mean_off_diagonal(matrix_GG: ArrayLike) -> float:
    """The mean of a matrix without its diagonal, that is over pairs of two different games. NaN for fewer than two games."""
    matrix = np.asarray(matrix_GG, float)
    return mean(matrix[~np.eye(len(matrix), dtype=bool)])


def cold_unchanged(before: Mapping[Expert, Any], after: Mapping[Expert, Any], trained: Set[Expert]) -> tuple[int, int]:
    """Counts the cold experts of a phase (the training in one game), and how many of them are unchanged after it.

    A cold expert was trained before the phase, and is not trained in it. So it should be the same after the phase, bit for bit.

    Args:
        before: expert -> checksums when the phase began, for all experts trained until then.
        after: expert -> checksums at the end of the phase.
        trained: the experts that the phase trained.

    Returns:
        The number of cold experts with equal checksums, and the number of all cold experts.
    """
    cold = before.keys() - trained
    return sum(after.get(expert) == before[expert] for expert in cold), len(cold)


def confusion(believed: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Floats:
    """The confusion matrix of the detector, (G, C): for each game played (row), the share of steps in which it was taken for each game.

    A column stands for a game that the detector may take it for. A row sums to 1, or is NaN if `believed` has nothing for the game played.

    Args:
        believed: for each game played, the name of the game that the detector believed to see -> share or number of steps.
        columns: the names of the games that the detector can believe to see, in the order of the result's columns.
    """
    counts = np.array([[float(row.get(name, 0)) for name in columns] for row in believed]).reshape(len(believed), len(columns))
    return usage_shares(counts)


def mean(values: ArrayLike) -> float:
    """The mean of the values that are not NaN. NaN if all values are NaN."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _first_phases(scores: Floats, trained_P: Sequence[int]) -> list[tuple[int, int | None]]:
    """Each game's number and the first phase that trained it. The phase is None if no evaluated phase trained the game."""
    trained = list(trained_P)[: len(scores)]
    return [(game, trained.index(game) if game in trained else None) for game in range(scores.shape[1])]


def _trained_last(scores: Floats, trained_P: Sequence[int]) -> NDArray[np.bool_]:
    last = trained_P[len(scores) - 1] if len(scores) else -1
    return np.asarray(np.arange(scores.shape[1]) == last)


def _score_changes(
    scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike | None = None
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Three arrays (P, G) about game i in phase k.

    They hold the change of its score since the phase before, whether an earlier phase trained it, and whether this phase trains it.
    """
    scores = np.asarray(scores_PG, float)
    first = np.full((1, scores.shape[1]), np.nan) if untrained_G is None else np.asarray(untrained_G, float)[None]
    own = np.zeros(scores.shape, bool)
    own[np.arange(len(scores)), list(trained_P)[: len(scores)]] = True
    before = np.cumsum(own, axis=0) - own > 0
    return np.diff(np.concatenate([first, scores]), axis=0), before, own


def _scale(scores_PG: ArrayLike, scale_G: ArrayLike | None) -> Floats:
    return greatest_score(scores_PG) if scale_G is None else np.asarray(scale_G, float)


def _max(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else float("nan")


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a and b else float("nan")

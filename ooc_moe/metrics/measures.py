"""Measures of continual learning, and of how games share experts: pure functions of numpy arrays.

Shapes: P phases (one for each game trained, in order), G games, E experts.

- `scores_PG`, written A in formulas: A[k, i] is the score of game i after phase k; NaN if the game was not evaluated then.
- `trained_P`: the column of the game that each phase trained. A game may be trained in several phases; first(i) and last(i) are game i's
  first and last phase.

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
    """(score - floor) / (ceiling - floor) by game: 0 at the floor, 1 at the ceiling; NaN where the ceiling is not above the floor.

    With random play as floor and `best_own` as ceiling, this is the run's own normalised score. With a human's score as ceiling, it is the
    human-normalised score (Mnih et al. 2015, "Human-level control", extended data table 2).

    Args:
        scores: (..., G).
        floor_G: the score that becomes 0.
        ceiling_G: the score that becomes 1.
    """
    floor, ceiling = np.asarray(floor_G, float), np.asarray(ceiling_G, float)
    span = np.where(ceiling > floor, ceiling - floor, np.nan)
    return np.asarray((np.asarray(scores, float) - floor) / span)


def best_own(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the best score of each game since its first phase: max over k >= first(i) of A[k, i]."""
    scores = np.asarray(scores_PG, float)
    return np.array([_max(scores[first:, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])


def learning(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the score of each game right after its last training: A[last(i), i].

    The mean over games is the learning accuracy, LA (Riemer et al. 2019).
    """
    scores = np.asarray(scores_PG, float)
    last = {game: phase for phase, game in enumerate(trained_P) if phase < len(scores)}
    return np.array([scores[last[game], game] if game in last else np.nan for game in range(scores.shape[1])])


def final(scores_PG: ArrayLike) -> Floats:
    """(G,) the last score of each game: A[P-1, i]. The mean over games is ACC (Lopez-Paz & Ranzato 2017, eq. 2)."""
    scores = np.asarray(scores_PG, float)
    return scores[-1].copy() if len(scores) else np.full(scores.shape[1], np.nan)


def forgetting(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) how far each game's score fell from its best to the end; negative if it rose.

    This is (max over first(i) <= k < P-1 of A[k, i]) - A[P-1, i] (Chaudhry et al. 2018, eq. 3). NaN for the game of the last phase, because
    nothing was trained after it.
    """
    scores = np.asarray(scores_PG, float)
    before = np.array([_max(scores[first:-1, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])
    return np.where(_trained_last(scores, trained_P), np.nan, before - final(scores))


def retention(scores_PG: ArrayLike, trained_P: Sequence[int], floor_G: ArrayLike) -> Floats:
    """(G,) the share of what a game learned that is left at the end: (A[P-1, i] - floor) / (A[last(i), i] - floor).

    NaN for the game of the last phase, and for a game whose score after training is not above the floor: it has nothing to retain.
    """
    scores = np.asarray(scores_PG, float)
    kept = normalise(final(scores), floor_G, learning(scores, trained_P))
    return np.where(_trained_last(scores, trained_P), np.nan, kept)


def forward_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike) -> Floats:
    """(G,) how much training the earlier games raised a game's score before its own training. NaN for the first game.

    This is A[first(i)-1, i] - untrained[i] (Lopez-Paz & Ranzato 2017, eq. 4).
    """
    scores, untrained = np.asarray(scores_PG, float), np.asarray(untrained_G, float)
    return np.array([scores[first - 1, game] - untrained[game] if first else np.nan for game, first in _first_phases(scores, trained_P)])


def isolated_forgetting(scores_PG: ArrayLike, trained_P: Sequence[int], scale_G: ArrayLike | None = None) -> Floats:
    """(P, G) how much an earlier game's score fell while phase k trained another game: (A[k-1, i] - A[k, i]) / scale[i].

    Negative if the score rose. NaN if game i was not trained before phase k, or is trained in it.

    With the default scale, `greatest_score`, this is CORA's isolated forgetting (Powers et al. 2022, "CORA", section 4). That scale is the
    run's own, so a method that learns little may seem to forget much. To compare methods, give a fixed scale: single-task score - random.
    """
    changes_PG, before_PG, own_PG = _score_changes(scores_PG, trained_P)
    return np.where(before_PG & ~own_PG, -changes_PG, np.nan) / _scale(scores_PG, scale_G)


def zero_shot_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike, scale_G: ArrayLike | None = None) -> Floats:
    """(P, G) how much an untrained game's score rose while phase k trained another game: (A[k, i] - A[k-1, i]) / scale[i].

    A[-1] stands for `untrained_G`. NaN from game i's first phase on. This is CORA's zero-shot forward transfer (Powers et al. 2022,
    section 4); the scale is that of `isolated_forgetting`.
    """
    changes_PG, before_PG, own_PG = _score_changes(scores_PG, trained_P, untrained_G)
    return np.where(before_PG | own_PG, np.nan, changes_PG) / _scale(scores_PG, scale_G)


def greatest_score(scores_PG: ArrayLike) -> Floats:
    """(G,) |max over k of A[k, i]|, CORA's scale |r_i,all,max|; NaN for a game that was never evaluated, or whose best score is 0.

    CORA takes the maximum over all of training; here it is over the ends of phases, where scores were measured.
    """
    scores = np.asarray(scores_PG, float)
    greatest = np.abs([_max(scores[:, game]) for game in range(scores.shape[1])])
    return np.where(greatest > 0, greatest, np.nan)


def without_last(values_G: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the values with NaN for the game trained last. Nothing was trained after it, so it would flatter every measure of forgetting."""
    values = np.array(values_G, float)
    if trained_P:
        values[trained_P[-1]] = np.nan
    return values


def clearly_above(returns: Sequence[float], floor: float) -> bool:
    """Whether the mean of `returns` lies more than two standard errors above `floor`; False for fewer than two returns."""
    return len(returns) > 1 and bool(np.mean(returns) - 2 * standard_error(returns) > floor)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 for fewer than two values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def usage_shares(counts: ArrayLike) -> Floats:
    """(..., E) token counts as shares that sum to 1; NaN where there are no tokens."""
    values = np.asarray(counts, float)
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, np.nan))


def thinned(counts_NE: ArrayLike, *, seed: int = 0) -> Floats:
    """(N, E) a sample of each row's tokens, drawn without replacement, as many as the smallest non-empty row has.

    Only rows of equal size can be compared: the overlap of two samples of one distribution grows with their size.
    """
    counts = np.asarray(counts_NE, np.int64)
    totals = counts.sum(axis=1)
    least = totals[totals > 0].min(initial=totals.max(initial=0))
    rng = np.random.default_rng(seed)
    drawn = [rng.multivariate_hypergeometric(row, min(total, least)) for row, total in zip(counts, totals, strict=True)]
    return np.array(drawn, float).reshape(counts.shape)


def mass_overlap(counts_GE: ArrayLike) -> Floats:
    """(G, G) the routed mass that two games have in common: sum over e of min(p_i(e), p_j(e)), which is 1 - total variation distance."""
    shares = usage_shares(counts_GE)
    return np.asarray(np.minimum(shares[:, None, :], shares[None, :, :]).sum(axis=-1))


def top_overlap(counts_GE: ArrayLike, top: int = 10) -> Floats:
    """(G, G) Jaccard index |T_i & T_j| / |T_i | T_j| of the `top` most used experts of each game; NaN for a game that used none.

    T_i holds only experts with tokens. Of equally used experts, the one with the lower number comes first.
    """
    counts = np.asarray(counts_GE, float)
    sets = [{int(e) for e in np.argsort(-row, kind="stable")[:top] if row[e] > 0} for row in counts]
    return np.array([[_jaccard(a, b) for b in sets] for a in sets]).reshape(len(sets), len(sets))


def mean_off_diagonal(matrix_GG: ArrayLike) -> float:
    """The mean over pairs of two different games; NaN for fewer than two games."""
    matrix = np.asarray(matrix_GG, float)
    return mean(matrix[~np.eye(len(matrix), dtype=bool)])


def cold_unchanged(before: Mapping[Expert, Any], after: Mapping[Expert, Any], trained: Set[Expert]) -> tuple[int, int]:
    """(number with equal checksums, number of all) of a phase's cold experts.

    A cold expert was trained before the phase, and is not trained in it. It should therefore be the same after the phase.

    Args:
        before: expert -> checksums, for all experts trained before the phase began.
        after: the same when the phase has ended.
        trained: the experts that the phase's game was routed to in training, without those that it only borrowed.
    """
    cold = before.keys() - trained
    return sum(after.get(expert) == before[expert] for expert in cold), len(cold)


def confusion(believed: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Floats:
    """(G, C) for each game played, the share of its steps in which the detector believed each name. A row sums to 1, or is NaN."""
    counts = np.array([[float(row.get(name, 0)) for name in columns] for row in believed]).reshape(len(believed), len(columns))
    return usage_shares(counts)


def mean(values: ArrayLike) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _first_phases(scores: Floats, trained_P: Sequence[int]) -> list[tuple[int, int | None]]:
    """(game, first phase) for every game; the phase is None if no evaluated phase trained the game."""
    trained = list(trained_P)[: len(scores)]
    return [(game, trained.index(game) if game in trained else None) for game in range(scores.shape[1])]


def _trained_last(scores: Floats, trained_P: Sequence[int]) -> NDArray[np.bool_]:
    last = trained_P[len(scores) - 1] if len(scores) else -1
    return np.asarray(np.arange(scores.shape[1]) == last)


def _score_changes(
    scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike | None = None
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Three arrays (P, G): score change since the phase before, whether an earlier phase trained the game, whether this phase trains it."""
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

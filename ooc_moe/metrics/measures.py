"""Measures of continual learning, and of how games share experts: pure functions of numpy arrays.

Shapes: P phases (one per game trained, in order), G games, E experts. A score matrix `scores_PG` holds in [k, i] the score of game i after
phase k, NaN where it was not evaluated; `trained_P` holds the column of the game each phase trained, so a game may come back.
What cannot be said (never trained, never evaluated, nothing learned to forget) is NaN, never 0. Knows nothing of runs and files.

Forgetting is only half of a measure: a method that never learns forgets nothing. Show it beside `learning`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Expert = TypeVar("Expert", bound=Hashable)


def normalise(scores: ArrayLike, floor_G: ArrayLike, ceiling_G: ArrayLike) -> Floats:
    """(score - floor) / (ceiling - floor) by game: 0 is the floor, 1 the ceiling; NaN where the ceiling is not above the floor.

    With floor = random play and ceiling = `best_own` it is the normalised score of this run; with ceiling = a human's score it is the
    human-normalised score (Mnih et al. 2015, "Human-level control", extended data table 2).

    Args:
        scores: (..., G).
        floor_G: the score that counts as nothing.
        ceiling_G: the score that counts as all.
    """
    floor, ceiling = np.asarray(floor_G, float), np.asarray(ceiling_G, float)
    span = np.where(ceiling > floor, ceiling - floor, np.nan)
    return np.asarray((np.asarray(scores, float) - floor) / span)


def best_own(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the best score of each game from its own first phase on: max over k >= first(i) of A[k, i]."""
    scores = np.asarray(scores_PG, float)
    return np.array([_max(scores[first:, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])


def learning(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the score of each game right after it was last trained: A[last(i), i].

    Its mean is LA, the learning accuracy (Riemer et al. 2019).
    """
    scores = np.asarray(scores_PG, float)
    last = {game: phase for phase, game in enumerate(trained_P) if phase < len(scores)}
    return np.array([scores[last[game], game] if game in last else np.nan for game in range(scores.shape[1])])


def final(scores_PG: ArrayLike) -> Floats:
    """(G,) the last score of each game: A[P-1, i]. Its mean is ACC, the average performance (Lopez-Paz & Ranzato 2017, eq. 2)."""
    scores = np.asarray(scores_PG, float)
    return scores[-1].copy() if len(scores) else np.full(scores.shape[1], np.nan)


def forgetting(scores_PG: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) max over first(i) <= k < P-1 of A[k, i], less A[P-1, i] (Chaudhry et al. 2018, eq. 3); negative when it got better since.

    NaN for games trained in the last phase: nothing came after that could have made the agent forget.
    """
    scores = np.asarray(scores_PG, float)
    before = np.array([_max(scores[first:-1, game]) if first is not None else np.nan for game, first in _first_phases(scores, trained_P)])
    return np.where(_trained_last(scores, trained_P), np.nan, before - final(scores))


def retention(scores_PG: ArrayLike, trained_P: Sequence[int], floor_G: ArrayLike) -> Floats:
    """(G,) the share of what was learned that is still there: (A[P-1, i] - floor) / (A[last(i), i] - floor).

    NaN for games trained in the last phase, and where learning is not above the floor: of nothing, everything is retained.
    """
    scores = np.asarray(scores_PG, float)
    kept = normalise(final(scores), floor_G, learning(scores, trained_P))
    return np.where(_trained_last(scores, trained_P), np.nan, kept)


def forward_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike) -> Floats:
    """(G,) what the earlier games gave to a game before its own: A[first(i)-1, i] - untrained[i] (Lopez-Paz & Ranzato 2017, eq. 4).

    NaN for the first game.
    """
    scores, untrained = np.asarray(scores_PG, float), np.asarray(untrained_G, float)
    return np.array([scores[first - 1, game] - untrained[game] if first else np.nan for game, first in _first_phases(scores, trained_P)])


def isolated_forgetting(scores_PG: ArrayLike, trained_P: Sequence[int], scale_G: ArrayLike | None = None) -> Floats:
    """(P, G) what learning another game took from a game that was learned before: (A[k-1, i] - A[k, i]) / scale[i].

    With the scale of `greatest_score` it is CORA's isolated forgetting (Powers et al. 2022, "CORA", section 4). That scale is the run's
    own, so a method that learns little may look as if it forgot much; a fixed scale (single-task score - random) compares methods.

    NaN where game i was not yet trained, or is trained, in phase k. Negative when it got better.
    """
    changes_PG, before_PG, own_PG = _changes(scores_PG, trained_P)
    return np.where(before_PG & ~own_PG, -changes_PG, np.nan) / _scale(scores_PG, scale_G)


def zero_shot_transfer(scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike, scale_G: ArrayLike | None = None) -> Floats:
    """(P, G) what learning another game gave to a game that was not trained yet: (A[k, i] - A[k-1, i]) / scale[i], A[-1] = untrained.

    CORA's zero-shot forward transfer (Powers et al. 2022, section 4); the scale as in `isolated_forgetting`. NaN from the game's own first
    phase on.
    """
    changes_PG, before_PG, own_PG = _changes(scores_PG, trained_P, untrained_G)
    return np.where(before_PG | own_PG, np.nan, changes_PG) / _scale(scores_PG, scale_G)


def greatest_score(scores_PG: ArrayLike) -> Floats:
    """(G,) |max over k of A[k, i]|, CORA's scale |r_i,all,max|; NaN for a game that was never evaluated, or whose best score is 0.

    One deviation: CORA's maximum is over all of training, this one over the ends of phases, where A was measured.
    """
    scores = np.asarray(scores_PG, float)
    greatest = np.abs([_max(scores[:, game]) for game in range(scores.shape[1])])
    return np.where(greatest > 0, greatest, np.nan)


def without_last(values_G: ArrayLike, trained_P: Sequence[int]) -> Floats:
    """(G,) the same, NaN for the game that was trained last: nothing came after it, so that it flatters every measure of what is left."""
    values = np.array(values_G, float)
    if trained_P:
        values[trained_P[-1]] = np.nan
    return values


def clearly_above(returns: Sequence[float], floor: float) -> bool:
    """Whether the mean of `returns` lies more than two standard errors above `floor`; False for fewer than two returns."""
    if len(returns) < 2:
        return False
    values = np.asarray(returns, float)
    return bool(values.mean() - 2 * values.std(ddof=1) / np.sqrt(len(values)) > floor)


def usage_shares(counts: ArrayLike) -> Floats:
    """Token counts (..., E) as shares that sum to 1; NaN where nothing was routed."""
    values = np.asarray(counts, float)
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, np.nan))


def thinned(counts_NE: ArrayLike, *, seed: int = 0) -> Floats:
    """(N, E) as many tokens in each row, drawn without replacement, as the smallest row has that is not empty.

    The overlap of two samples of one distribution grows with their size; only rows of one size may be compared.
    """
    counts = np.asarray(counts_NE, np.int64)
    totals = counts.sum(axis=1)
    least = totals[totals > 0].min(initial=totals.max(initial=0))
    rng = np.random.default_rng(seed)
    drawn = [rng.multivariate_hypergeometric(row, min(total, least)) for row, total in zip(counts, totals, strict=True)]
    return np.array(drawn, float).reshape(counts.shape)


def mass_overlap(counts_GE: ArrayLike) -> Floats:
    """(G, G) the routed mass two games have in common: sum over e of min(p_i(e), p_j(e)), 1 less their total variation distance."""
    shares = usage_shares(counts_GE)
    return np.asarray(np.minimum(shares[:, None, :], shares[None, :, :]).sum(axis=-1))


def top_overlap(counts_GE: ArrayLike, top: int = 10) -> Floats:
    """(G, G) Jaccard index |T_i & T_j| / |T_i | T_j| of the `top` most used experts of each game; NaN for a game that used none.

    Experts without tokens are not among them; ties go to the lower id.
    """
    counts = np.asarray(counts_GE, float)
    sets = [{int(e) for e in np.argsort(-row, kind="stable")[:top] if row[e] > 0} for row in counts]
    return np.array([[_jaccard(a, b) for b in sets] for a in sets]).reshape(len(sets), len(sets))


def mean_off_diagonal(matrix_GG: ArrayLike) -> float:
    """The mean over pairs of different games; NaN for fewer than two games."""
    matrix = np.asarray(matrix_GG, float)
    return mean(matrix[~np.eye(len(matrix), dtype=bool)])


def cold_unchanged(before: Mapping[Expert, Any], after: Mapping[Expert, Any], trained: Set[Expert]) -> tuple[int, int]:
    """(equal, all) cold experts of a phase: those that were trained before it and not in it; equal if so are their checksums.

    Args:
        before: expert -> checksums, of all that were trained when the phase began.
        after: the same when it ended.
        trained: what the phase's game was routed to in training, less what it only borrowed.
    """
    cold = before.keys() - trained
    return sum(after.get(expert) == before[expert] for expert in cold), len(cold)


def confusion(believed: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Floats:
    """(G, C) rows: the game played; columns: the share of its steps in which the detector believed that name. Rows sum to 1, or are NaN."""
    counts = np.array([[float(row.get(name, 0)) for name in columns] for row in believed]).reshape(len(believed), len(columns))
    return usage_shares(counts)


def mean(values: ArrayLike) -> float:
    """The mean of what is not NaN; NaN when nothing is."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _first_phases(scores: Floats, trained_P: Sequence[int]) -> list[tuple[int, int | None]]:
    """(game, its first phase) for every game; None when none of the evaluated phases trained it."""
    trained = list(trained_P)[: len(scores)]
    return [(game, trained.index(game) if game in trained else None) for game in range(scores.shape[1])]


def _trained_last(scores: Floats, trained_P: Sequence[int]) -> NDArray[np.bool_]:
    last = trained_P[len(scores) - 1] if len(scores) else -1
    return np.asarray(np.arange(scores.shape[1]) == last)


def _changes(
    scores_PG: ArrayLike, trained_P: Sequence[int], untrained_G: ArrayLike | None = None
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """(P, G) each: change since the phase before; whether the game was trained before phase k; whether it is trained in phase k."""
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

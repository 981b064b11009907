"""Statistics of few runs: interquartile mean, stratified bootstrap, permutation test; pure functions of numpy arrays.

As in rliable (Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice"), but strata may differ in size, and nothing beyond
numpy is needed (rliable brings arch, numba and more). A stratum is what is drawn alike: the runs of one order of the games. A run is drawn
whole, with all its games, as they share one network and are not independent. NaN stands for what is unsaid, and counts for nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
_DEALS_AT_ONCE = 500


def iqm(values: ArrayLike) -> Any:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter (rounded down, as scipy's trim_mean)."""
    ordered = np.sort(np.asarray(values, float), axis=-1)  # NaN comes last.
    known = (~np.isnan(ordered)).sum(axis=-1, keepdims=True)
    place, cut = np.arange(ordered.shape[-1]), known // 4
    return mean(np.where((cut <= place) & (place < known - cut), ordered, np.nan))


def mean(values: ArrayLike) -> Any:
    """The mean over the last axis; NaN of nothing."""
    array = np.asarray(values, float)
    known = ~np.isnan(array)
    count = known.sum(axis=-1)
    return (np.where(known, array, 0).sum(axis=-1) / np.where(count, count, np.nan))[()]


def bootstrap(
    strata: Sequence[ArrayLike], statistic: Callable[[Floats], Any] = mean, *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """(resamples,) the statistic of samples that draw from each stratum, with replacement, as many runs as it has.

    Args:
        strata: values (runs,) or (runs, games); a run without a value, and an empty stratum, count for nothing.
        statistic: of an array's last axis; leaves NaN out.
        resamples: how many.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [np.empty((resamples, 0))]
    for stratum in strata:
        values = np.asarray(stratum, float)
        runs_RG = values.reshape(len(values), -1)
        runs_RG = runs_RG[~np.isnan(runs_RG).all(axis=1)]
        if len(runs_RG):
            drawn.append(runs_RG[rng.integers(0, len(runs_RG), (resamples, len(runs_RG)))].reshape(resamples, -1))
    return np.asarray(statistic(np.concatenate(drawn, axis=1)))


def interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; NaN of what is unsaid.

    Of few runs it is narrower than it says: at 95 % it covered the mean of normal values 75 times in 100 for 3 runs, 81 for two strata
    of 3, 83 for 5, 87 for two strata of 5, and 91 for 10.
    """
    tail = 50 * (1 - level)
    low, high = np.percentile(np.asarray(samples, float), [tail, 100 - tail])
    return float(low), float(high)


def difference(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of the first strata - mean of the second, low, high): the 95 % interval is of independent bootstraps of both."""
    ours, theirs = bootstrap(first, resamples=resamples, seed=seed), bootstrap(second, resamples=resamples, seed=seed + 1)
    return mean(pooled(first)) - mean(pooled(second)), *interval(ours - theirs)


def pooled(strata: Sequence[ArrayLike]) -> Floats:
    """All values of all strata that are not NaN."""
    values = np.concatenate([np.asarray(stratum, float).ravel() for stratum in strata]) if strata else np.empty(0)
    return np.asarray(values[~np.isnan(values)])


def within_and_between(similarity_NN: ArrayLike, labels_N: Sequence[Hashable]) -> tuple[float, float]:
    """The mean similarity of two different members of one group, and of members of two groups; NaN where there are none."""
    similarity, same = np.asarray(similarity_NN, float), _same(labels_N)
    pairs = np.triu(np.ones_like(same), 1)
    return float(mean(similarity[pairs & same])), float(mean(similarity[pairs & ~same]))


def by_pair(similarity_NN: ArrayLike, labels_N: Sequence[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """`within_and_between` of every two groups alone; the names of a pair are in alphabetical order."""
    similarity, labels = np.asarray(similarity_NN, float), np.asarray(labels_N)
    chosen = {pair: np.flatnonzero(np.isin(labels, pair)) for pair in combinations(sorted(set(labels_N)), 2)}
    return {pair: within_and_between(similarity[np.ix_(rows, rows)], labels[rows].tolist()) for pair, rows in chosen.items()}


def separation_p(similarity_NN: ArrayLike, labels_N: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The p-value of "groups differ": how often labels dealt out at random separate similarities at least as well as the true ones.

    One-sided, for (mean within groups - mean between groups). Exact where there are at most `resamples` ways to deal the labels out;
    otherwise (1 + as good) / (1 + resamples) (Phipson & Smyth 2010). NaN where either mean is unsaid.
    """
    similarity = np.asarray(similarity_NN, float)
    upper = np.triu_indices(len(similarity), 1)
    values = similarity[upper]
    known = ~np.isnan(values)
    first, second, values = upper[0][known], upper[1][known], values[known]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels_N))}
    labels_1N = np.array([[numbers[label] for label in labels_N]])

    def gaps(labels_RN: NDArray[np.int64]) -> Floats:
        same_RP = labels_RN[:, first] == labels_RN[:, second]
        num_same, total_same = same_RP.sum(axis=1), same_RP @ values
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total_same / num_same - (values.sum() - total_same) / (len(values) - num_same))

    observed = gaps(labels_1N)[0]
    if np.isnan(observed):
        return float("nan")
    deals_RN, exact = _deals(labels_1N[0], resamples, seed)
    pieces = np.array_split(deals_RN, -(-len(deals_RN) // _DEALS_AT_ONCE))
    as_good = sum(int((gaps(piece) >= observed - 1e-12).sum()) for piece in pieces)
    return as_good / len(deals_RN) if exact else (1 + as_good) / (1 + len(deals_RN))


def _deals(labels_N: NDArray[np.int64], resamples: int, seed: int) -> tuple[NDArray[np.int64], bool]:
    """(R, N) ways to deal the labels out; whether they are all there are."""
    ways = math.factorial(len(labels_N)) // math.prod(map(math.factorial, Counter(labels_N.tolist()).values()))
    if ways <= resamples and len(labels_N) <= 9:  # Distinct ways are found among all n! orders: 362,880 for nine.
        return np.array(sorted(set(permutations(labels_N.tolist())))), True
    return np.random.default_rng(seed).permuted(np.tile(labels_N, (resamples, 1)), axis=1), False


def _same(labels_N: Sequence[Hashable]) -> NDArray[np.bool_]:
    return np.array([[a == b for b in labels_N] for a in labels_N], bool).reshape(len(labels_N), len(labels_N))

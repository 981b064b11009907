"""Judges the three parts of the project's claim: separation, caching, protection. This file is the rules, in words and in code.

1. Separation holds if the experts that two environments use overlap less when they play different games than when they play the same game.
   It is tested in every run with plain token routing, after the last game, by a permutation test over environments; p must be below 0.05
   in every run. Environments are compared over equally many tokens, and over all their episodes together, because evaluation does not
   log usage by episode. Each game has its own norms and embedding, which tell the router which game it is. The verdict therefore also
   reports how far an untrained network separates games.
2. Caching holds if training in blocks (each game's training in one piece) has more hits and shorter stalls than the same steps in turns of
   one update. This must be so in every HBM that has room for a game's pool (the experts that it may use), both in the trainer's
   measurements and in the simulator's replays. At least three switch intervals at three such sizes of HBM are needed. Smaller HBMs are not
   judged.
3. Protection holds if the full recipe retains more of what it learned than plain MoE and than a dense network: the 95 % intervals of both
   differences in retention must lie above zero. In addition its learning must be at least 0.9 of single-task. Only games that count by the
   rules of scores.py are used.

With fewer runs than a study wants there is no verdict, only the figures. Separation needs `verdict_seeds` seeds, in any orders; protection
needs as many in each of `verdict_orders` orders.

The rules were fixed before any run was made, with these exceptions:

- Since commit d7f9c71, made after four short caching runs, caching needs the whole grid of intervals and sizes. Before, it needed trainer
  and simulator.
- Since commit 8564c7a all three sizes of HBM must hold a game's pool. Before, one of the three was smaller.
- After a review of finished runs, separation compares equally many tokens, the bootstrap draws whole runs, and scores.py judges a game that
  evaluation cut off by the least that its games gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ooc_moe.display.formats import format_share
from ooc_moe.metrics import measures, statistics
from ooc_moe.metrics.run import RunRecord
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.scores import StudyScores, strata
from ooc_moe.study.study import StudyRun

FULL, MOE, DENSE, UNTRAINED = "full", "moe-token", "dense", "moe-untrained"
SIGNIFICANCE = 0.05
SMALL_GAP = 0.05  # The verdict reports a smaller gap, and names the pairs of games that have one. The rule does not depend on it.
LEARNING_MIN = 0.9
POINTS_MIN = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one part of the claim (`part`: separation, caching or protection) holds, and the figures from which this follows."""

    part: str
    holds: bool | None
    """Whether the part holds; None if there are fewer runs than the rule needs."""
    says: str
    """The figures behind the verdict, in sentences."""

    @property
    def word(self) -> str:
        """The verdict in words: "holds", "does not hold" or "no verdict"."""
        return {True: "holds", False: "does not hold", None: "no verdict"}[self.holds]


@dataclass(frozen=True, slots=True)
class Separation:
    """How differently games use experts in one run: the mean overlaps of environments that play the same game, and different games.

    The overlap of two environments is the share of tokens, from 0 to 1, that both environments send to the same experts.
    """

    run: StudyRun
    within: float
    """The mean overlap over pairs of environments that play the same game."""
    between: float
    """The mean overlap over pairs of environments that play different games."""
    p: float
    """The p-value of the permutation test that compares the two."""
    pairs: Mapping[tuple[str, str], tuple[float, float]]
    """By pair of games: (within, between), counting only the environments that play these two games."""

    @property
    def gap(self) -> float:
        """How differently games use experts: the overlap within games minus the overlap between games."""
        return self.within - self.between


def separations(found: StudyScores) -> list[Separation]:
    """Computes how differently games use experts, in each run with plain token routing that logged the use by environment.

    Runs of the untrained variant are included.
    """
    runs = [_separation(run, record) for variant in (MOE, UNTRAINED) for run, record in found.of(variant).items()]
    return [each for each in runs if each is not None]


def _separation(run: StudyRun, record: RunRecord) -> Separation | None:
    labels, counts_NE = record.usage_by_environment()
    if not len(labels):
        return None
    similarity_NN = measures.mass_overlap(measures.thinned(counts_NE))
    within, between = statistics.within_and_between(similarity_NN, labels)
    p = statistics.separation_p(similarity_NN, labels)
    return Separation(run, within, between, p, statistics.by_pair(similarity_NN, labels))


def pair_gaps(runs: Sequence[Separation]) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns, for each pair of games, (overlap within these games, overlap between them), as means over runs.

    The overlap of two environments is the share of tokens that both environments send to the same experts. Pairs of games with the smallest
    gap between the two overlaps come first.
    """
    by_pair: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for pair, values in run.pairs.items():
            by_pair.setdefault(pair, []).append(values)
    means = {pair: (measures.mean([w for w, _ in values]), measures.mean([b for _, b in values])) for pair, values in by_pair.items()}
    return dict(sorted(means.items(), key=lambda item: item[1][0] - item[1][1]))


def separation(found: StudyScores, separated: Sequence[Separation]) -> Verdict | None:
    """Judges the first part of the claim, separation, by the results of `separations`.

    None if the study has no variant with plain token routing.
    """
    if MOE not in found.study.seeds:
        return None
    runs = [each for each in separated if each.run.variant == MOE]
    if not runs:
        return Verdict("separation", None, "no run with plain token routing logged which environment used which expert.")
    worst = float(np.max([each.p for each in runs]))  # NaN if any is NaN.
    within, between, gap = _means(runs)
    says = (
        f"with plain token routing, two environments of one game have {within:.2f} of their routed mass in common, of two games "
        f"{between:.2f} ({_count(runs, 'run')}, largest p {worst:.2g})."
    )
    if worst < SIGNIFICANCE and gap < SMALL_GAP:
        says += f" The difference is not chance, but it is small: the gap of {gap:.3f} is below {SMALL_GAP}."
    close = [f"{one} and {other} ({w:.2f} and {b:.2f})" for (one, other), (w, b) in pair_gaps(runs).items() if not w - b >= SMALL_GAP]
    says += f" Less than {SMALL_GAP} apart: {', '.join(close)}." if close else f" Every two games are at least {SMALL_GAP} apart."
    says += _untrained([each for each in separated if each.run.variant == UNTRAINED], gap)
    if np.isnan(worst):
        return Verdict("separation", None, f"{says} In one run there is nothing to compare.")
    enough = len({each.run.config.seed for each in runs}) >= found.study.verdict_seeds
    if not enough:
        return Verdict("separation", None, f"{says} The rule needs {found.study.verdict_seeds} seeds.")
    return Verdict("separation", worst < SIGNIFICANCE, says)


def _untrained(runs: Sequence[Separation], trained_gap: float) -> str:
    if not runs:
        return ""
    within, between, gap = _means(runs)
    says = f" An untrained network of the same kind: {within:.2f} and {between:.2f} ({_count(runs, 'run')})"
    reason = "so the separation comes from the pictures and the per-game norms, not from learning"
    return f"{says}. That is at least as far apart, {reason}." if gap >= trained_gap else f"{says}."


def _means(runs: Sequence[Separation]) -> tuple[float, float, float]:
    within, between, gap = (measures.mean([getattr(each, name) for each in runs]) for name in ("within", "between", "gap"))
    return within, between, gap


def protection(found: StudyScores) -> Verdict | None:
    """Judges the third part of the claim, protection. None if the study lacks one of the variants full, plain MoE and dense."""
    study = found.study
    if not {FULL, MOE, DENSE} <= set(study.seeds):
        return None
    if not found.counted:
        return Verdict("protection", None, "no game counts, because single-task runs are missing or nothing was learned.")
    kept = {name: strata(found.cells(name, "retention")) for name in (FULL, MOE, DENSE)}
    without = [name for name, groups in kept.items() if not groups]
    if without:
        return Verdict("protection", None, f"there is nothing to compare yet for {', '.join(without)}.")
    learned = statistics.mean(statistics.pooled(strata(found.cells(FULL, "learning"))))
    gaps = {name: statistics.difference(kept[FULL], kept[name]) for name in (MOE, DENSE)}
    says = (
        "; ".join(f"retention(full) - retention({name}) = {_with_interval(*gap)}" for name, gap in gaps.items())
        + f"; learning(full) = {learned:.2f} of single-task."
    )
    missing = _missing_runs(found)
    if missing:
        return Verdict("protection", None, f"{says} {missing}")
    return Verdict("protection", bool(all(low > 0 for _, low, _ in gaps.values()) and learned >= LEARNING_MIN), says)


def caching(points: Sequence[CachingPoint], pool_experts: int) -> Verdict | None:
    """Judges the second part of the claim, caching, by measured and simulated hit rates and stalls. None without `points`.

    `pool_experts`: how many experts a game's pool (the experts that it may use) has. An HBM that holds fewer experts is not judged.
    """
    if not points:
        return None
    passed: list[str] = []
    failed: list[str] = []
    outside: list[str] = []
    for way, hbm in product(Way, sorted({point.hbm_experts for point in points})):
        here = {point.switch_every: point for point in points if point.way is way and point.hbm_experts == hbm}
        if {None, 1} <= here.keys():
            blocks, turns = here[None], here[1]
            figures = f"{way.value}, HBM {hbm}: hits {_hit_rates(blocks)} in blocks, {_hit_rates(turns)} in turns of one update, "
            figures += f"stall {blocks.stall_s:.3g} s and {turns.stall_s:.3g} s"
            if hbm < pool_experts:
                outside.append(figures + (", which is longer in blocks" if blocks.stall_s > 1.01 * turns.stall_s else ""))
            else:
                (passed if blocks.hit_rate > turns.hit_rate and blocks.stall_s < turns.stall_s else failed).append(figures)
    if not passed + failed:
        return Verdict("caching", None, "there are no runs yet both in blocks and in turns.")
    says = "; ".join([*passed, *(f"NOT SO: {figures}" for figures in failed)]) + "."
    says += " Each is one run of one seed: one pair of wall-clock stalls for each size, without a spread."
    if outside:
        says += f" Outside the rule, with HBM for less than a game's pool of {pool_experts}: {'; '.join(outside)}."
    judged_points = [point for point in points if point.way is Way.TRAINER and point.hbm_experts >= pool_experts]
    measured = {(point.hbm_experts, point.switch_every) for point in judged_points}
    sizes, intervals = {size for size, _ in measured}, {every for _, every in measured if every}
    if len(sizes) < POINTS_MIN or len(intervals) < POINTS_MIN or len(measured) < len(sizes) * (len(intervals) + 1):
        return Verdict(
            "caching",
            None,
            f"{says} The rule needs {POINTS_MIN} intervals at {POINTS_MIN} sizes of HBM that hold a pool, and blocks at each.",
        )
    return Verdict("caching", not failed, says)


def _hit_rates(point: CachingPoint) -> str:
    """Writes a point's hit rate as text, with Belady's in parentheses if it is known."""
    belady = "" if np.isnan(point.belady) else f" (Belady {format_share(point.belady, digits=2)})"
    return format_share(point.hit_rate, digits=2) + belady


def _with_interval(gap: float, low: float, high: float) -> str:
    return f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]" if low < high else f"{gap:+.2f}"  # With one run of each there is no spread.


def _missing_runs(found: StudyScores) -> str:
    """Returns a sentence that says which runs the rule on protection needs and does not have; "" if it has all."""
    study = found.study
    for name in (FULL, MOE, DENSE):
        seeds_of: dict[str, int] = {}
        for run in found.of(name):
            seeds_of[run.order] = seeds_of.get(run.order, 0) + 1
        complete = [order for order, count in seeds_of.items() if count >= study.verdict_seeds]
        if len(complete) < study.verdict_orders:
            return f"The rule needs {study.verdict_seeds} seeds in {_count(range(study.verdict_orders), 'order')}; of {name} there are " + (
                ", ".join(f"{count} in {order}" for order, count in seeds_of.items()) + "."
            )
    return ""


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"

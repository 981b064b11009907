"""The three verdicts. Their rules stand here in code, and were fixed before any run was made, but for this: since commit d7f9c71, made
after four short caching runs, caching wants the whole grid of intervals and sizes, where before it wanted trainer and simulator, and since
8564c7a three sizes that hold a game's pool, where before one of the three was smaller; and after a review of finished runs, separation
compares equally many tokens, the bootstrap draws whole runs, and scores.py judges games that evaluation cut off by the least that they
gave.

1. Separation: in every run with plain token routing (after the last game), the experts that two environments use overlap
   less when they play two games than when they play one: permutation test over environments, p < 0.05 in every run. Environments are
   compared by equally many tokens, each by those of all its episodes together, because evaluation does not log usage by episode. Each game
   has its own norms and embedding, which tell the router which game it is: what an untrained network separates is said beside.
2. Caching: wherever HBM holds a game's pool, games in blocks hit more often and stall less than the same steps in turns of one update, as
   the trainer measured it and as the simulator replays it; at least three intervals at three such sizes of HBM. Smaller HBMs are outside.
3. Protection: the 95 % intervals of retention(full) - retention(plain MoE) and of retention(full) - retention(dense) lie above zero, and
   learning(full) is at least 0.9 of single-task. Games that scores.py leaves out are not in it.

With fewer runs than a study wants, points and no verdict: separation wants `verdict_seeds` seeds in any orders, protection as many in each
of `verdict_orders` orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ooc_moe.metrics import measures, statistics
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.text_table import format_share
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.scores import StudyScores, strata
from ooc_moe.study.study import StudyRun

FULL, MOE, DENSE, UNTRAINED = "full", "moe-token", "dense", "moe-untrained"
SIGNIFICANCE = 0.05
SMALL_GAP = 0.05  # The verdict says when the gap is smaller, and names the pairs of games with a smaller one; the rule does not ask for it.
LEARNING_MIN = 0.9
POINTS_MIN = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about one part of the claim; `holds` is None where the rule wants more runs than there are."""

    part: str
    holds: bool | None
    says: str

    @property
    def word(self) -> str:
        """For people."""
        return {True: "holds", False: "does not hold", None: "no verdict"}[self.holds]


@dataclass(frozen=True, slots=True)
class Separation:
    """Overlap of expert usage in one run: routed mass in common, 0 to 1."""

    run: StudyRun
    within: float
    """Of environments that play one game."""
    between: float
    """Of environments that play two games."""
    p: float
    pairs: Mapping[tuple[str, str], tuple[float, float]]
    """(within, between) of every two games alone."""

    @property
    def gap(self) -> float:
        """within - between."""
        return self.within - self.between


def separations(found: StudyScores) -> list[Separation]:
    """One for each run with plain token routing, trained or not, that logged usage by environment."""
    made = [_separation(run, record) for variant in (MOE, UNTRAINED) for run, record in found.of(variant).items()]
    return [each for each in made if each is not None]


def _separation(run: StudyRun, record: RunRecord) -> Separation | None:
    labels, counts_NE = record.usage_by_environment()
    if not len(labels):
        return None
    similarity_NN = measures.mass_overlap(measures.thinned(counts_NE))
    within, between = statistics.within_and_between(similarity_NN, labels)
    p = statistics.separation_p(similarity_NN, labels)
    return Separation(run, within, between, p, statistics.by_pair(similarity_NN, labels))


def pair_gaps(runs: Sequence[Separation]) -> dict[tuple[str, str], tuple[float, float]]:
    """(within, between) of every two games, the means over runs; the pairs that are least apart first."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for pair, values in run.pairs.items():
            found.setdefault(pair, []).append(values)
    means = {pair: (measures.mean([w for w, _ in values]), measures.mean([b for _, b in values])) for pair, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: item[1][0] - item[1][1]))


def separation(found: StudyScores, separated: Sequence[Separation]) -> Verdict | None:
    """The first verdict, of what `separations` found; None for a study that does not ask it."""
    if MOE not in found.study.seeds:
        return None
    runs = [each for each in separated if each.run.variant == MOE]
    if not runs:
        return Verdict("separation", None, "no run with plain token routing logged which environment used which expert.")
    worst = float(np.max([each.p for each in runs]))  # NaN where one is.
    within, between, gap = _means(runs)
    says = (
        f"with plain token routing, environments of one game have {within:.2f} of their routed mass in common, of two games {between:.2f} "
        f"({_count(runs, 'run')}, largest p {worst:.2g})."
    )
    if worst < SIGNIFICANCE and gap < SMALL_GAP:
        says += f" It is not chance, but little: the gap of {gap:.3f} is below {SMALL_GAP}."
    close = [f"{one} and {other} ({w:.2f} and {b:.2f})" for (one, other), (w, b) in pair_gaps(runs).items() if not w - b >= SMALL_GAP]
    says += f" Not {SMALL_GAP} apart: {', '.join(close)}." if close else f" Every two games are at least {SMALL_GAP} apart."
    says += _untrained([each for each in separated if each.run.variant == UNTRAINED], gap)
    if np.isnan(worst):
        return Verdict("separation", None, f"{says} A run has nothing to compare.")
    enough = len({each.run.config.seed for each in runs}) >= found.study.verdict_seeds
    if not enough:
        return Verdict("separation", None, f"{says} The rule wants {found.study.verdict_seeds} seeds.")
    return Verdict("separation", worst < SIGNIFICANCE, says)


def _untrained(runs: Sequence[Separation], trained_gap: float) -> str:
    if not runs:
        return ""
    within, between, gap = _means(runs)
    says = f" An untrained network of the same kind: {within:.2f} and {between:.2f} ({_count(runs, 'run')})"
    doing = "at least as far apart, which is the pictures' and the per-game norms' doing, not learning's"
    return f"{says}, {doing}." if gap >= trained_gap else f"{says}."


def _means(runs: Sequence[Separation]) -> tuple[float, float, float]:
    within, between, gap = (measures.mean([getattr(each, name) for each in runs]) for name in ("within", "between", "gap"))
    return within, between, gap


def protection(found: StudyScores) -> Verdict | None:
    """The third verdict; None for a study that does not ask it."""
    study = found.study
    if not {FULL, MOE, DENSE} <= set(study.seeds):
        return None
    if not found.counted:
        return Verdict("protection", None, "no game counts: single-task runs are missing, or nothing was learned.")
    kept = {name: strata(found.cells(name, "retention")) for name in (FULL, MOE, DENSE)}
    without = [name for name, groups in kept.items() if not groups]
    if without:
        return Verdict("protection", None, f"nothing to compare yet of {', '.join(without)}.")
    learned = statistics.mean(statistics.pooled(strata(found.cells(FULL, "learning"))))
    gaps = {name: statistics.difference(kept[FULL], kept[name]) for name in (MOE, DENSE)}
    says = (
        "; ".join(f"retention(full) - retention({name}) = {_with_interval(*gap)}" for name, gap in gaps.items())
        + f"; learning(full) = {learned:.2f} of single-task."
    )
    short = _too_few(found)
    if short:
        return Verdict("protection", None, f"{says} {short}")
    return Verdict("protection", bool(all(low > 0 for _, low, _ in gaps.values()) and learned >= LEARNING_MIN), says)


def caching(points: Sequence[CachingPoint], pool_experts: int) -> Verdict | None:
    """The second verdict; None where nothing was measured."""
    if not points:
        return None
    judged: list[str] = []
    failed: list[str] = []
    outside: list[str] = []
    for way, hbm in product(Way, sorted({point.hbm_experts for point in points})):
        here = {point.switch_every: point for point in points if point.way is way and point.hbm_experts == hbm}
        if {None, 1} <= here.keys():
            blocks, turns = here[None], here[1]
            words = f"{way.value}, HBM {hbm}: hits {_beside(blocks)} in blocks, {_beside(turns)} in turns of one update, "
            words += f"stall {blocks.stall_s:.3g} s and {turns.stall_s:.3g} s"
            if hbm < pool_experts:
                outside.append(words + (", which is longer in blocks" if blocks.stall_s > 1.01 * turns.stall_s else ""))
            else:
                (judged if blocks.hit_rate > turns.hit_rate and blocks.stall_s < turns.stall_s else failed).append(words)
    if not judged + failed:
        return Verdict("caching", None, "blocks and turns are not both there yet.")
    says = "; ".join([*judged, *(f"NOT SO: {words}" for words in failed)]) + "."
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
            f"{says} The rule wants {POINTS_MIN} intervals at {POINTS_MIN} sizes of HBM that hold a pool, and blocks at each.",
        )
    return Verdict("caching", not failed, says)


def _beside(point: CachingPoint) -> str:
    belady = "" if np.isnan(point.belady) else f" (Belady {format_share(point.belady, digits=2)})"
    return format_share(point.hit_rate, digits=2) + belady


def _with_interval(gap: float, low: float, high: float) -> str:
    return f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]" if low < high else f"{gap:+.2f}"  # One run of each has no spread.


def _too_few(found: StudyScores) -> str:
    study = found.study
    for name in (FULL, MOE, DENSE):
        seeds_of: dict[str, int] = {}
        for run in found.of(name):
            seeds_of[run.order] = seeds_of.get(run.order, 0) + 1
        complete = [order for order, count in seeds_of.items() if count >= study.verdict_seeds]
        if len(complete) < study.verdict_orders:
            return f"The rule wants {study.verdict_seeds} seeds in {_count(range(study.verdict_orders), 'order')}; of {name} there are " + (
                ", ".join(f"{count} in {order}" for order, count in seeds_of.items()) + "."
            )
    return ""


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"

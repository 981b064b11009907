"""The tables of a study's results page. Uncertain values have their 95 % interval; a dash stands for a value that is not known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ooc_moe.display.formats import DASH, format_bytes, format_count, format_part, format_score, format_seconds, format_share
from ooc_moe.display.table import Table
from ooc_moe.metrics import measures, statistics
from ooc_moe.report.summary import ambiguous, of_reference
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.costs import Costs
from ooc_moe.study.scores import MEASURES, RAW_MEASURES, Cell, StudyScores, strata
from ooc_moe.study.verdicts import Separation, pair_gaps

_MAIN = ("learning", "average", "retention", "forgetting")
_INTERVALS = (
    "Mean over games, orders and seeds [95 % interval, by a bootstrap. It draws whole runs, with all their games, from the runs of each "
    "order; for the variant single, from the runs of each game. It treats the scores that define 0 and 1 as exactly known]."
)


def tables(
    found: StudyScores, costs: Mapping[str, Costs], separated: Sequence[Separation] = (), points: Sequence[CachingPoint] = ()
) -> list[Table]:
    """Makes all tables of a study. Tables without a row are left out.

    Args:
        found: the scores of the finished runs.
        costs: by variant, what it costs.
        separated: how differently games use experts, in each run with plain token routing.
        points: hit rates and stalls by HBM capacity and switch interval.
    """
    all_tables = [
        main_table(found),
        caching_table(points),
        robust_table(found),
        *(order_table(found, order) for order in found.study.orders if len(found.study.orders) > 1),
        other_table(found),
        human_table(found),
        memory_table(costs),
        work_table(found, costs),
        recognition_table(found),
        separation_table(separated),
        pair_table(separated),
        game_table(found),
        point_table(found),
    ]
    return [table for table in all_tables if table.rows]


def main_table(found: StudyScores) -> Table:
    """Makes the main table, with one row per variant: how much it learned, and how much of that is left at the end."""
    random, constant = _baselines(found)
    rows = [["random", "–", DASH, random, DASH, DASH, DASH], ["best constant action", "–", DASH, constant, DASH, DASH, DASH]]
    for name in found.variants:
        cells = [spread(found.cells(name, measure)) for measure in _MAIN]
        rows.append([name, str(len(found.of(name))), *cells, spread(found.worst(name))])
    counted = bool(found.counted)
    return Table(
        "Learning and forgetting",
        ["variant", "runs", *_MAIN, "worst forgetting"],
        rows if counted and found.variants else [],
        f"0 is random play, 1 is single-task: a network trained on this game alone. {_INTERVALS} "
        + " ".join(f"{name.capitalize()}: {MEASURES[name][0]}." for name in _MAIN)
        + " Worst forgetting: the forgetting of the game that was forgotten most, in each run.",
    )


def robust_table(found: StudyScores) -> Table:
    """Makes the table of robust means, with one row per variant: the main table's measures as interquartile means."""
    rows = [[name, *(spread(found.cells(name, each), statistics.iqm) for each in _MAIN)] for name in found.variants]
    return Table(
        "Interquartile means",
        ["variant", *_MAIN],
        rows if found.counted else [],
        "The mean of the middle half of the values of all games, orders and seeds [95 % interval] (Agarwal et al. 2021). It hides the case "
        "that a single game is forgotten; the first table does not.",
    )


def order_table(found: StudyScores, order: str) -> Table:
    """Makes the main table (how much was learned, and how much is left) from the runs of one order of the games: one row per variant."""
    rows = []
    for name in found.variants:
        cells = {each: [cell for cell in found.cells(name, each) if cell.order == order] for each in _MAIN}
        if any(cells.values()):
            rows.append([name, *(spread(cells[each]) for each in _MAIN)])
    games = ", ".join(found.study.orders[order])
    return Table(f"Order {order}", ["variant", *_MAIN], rows, f"{games}. As above.")


def other_table(found: StudyScores) -> Table:
    """Makes the table of the measures that the main table lacks, such as transfer and isolated forgetting: one row per variant."""
    names = [name for name in (*MEASURES, *RAW_MEASURES) if name not in _MAIN]
    rows = [[variant, *(spread(found.cells(variant, name)) for name in names)] for variant in found.variants]
    says = {name: says for name, (says, _) in (MEASURES | RAW_MEASURES).items() if name in names and says}
    return Table(
        "Other measures",
        ["variant", *names],
        rows if found.counted else [],
        f"{_INTERVALS} {' '.join(f'{name[0].upper()}{name[1:]}: {text}.' for name, text in says.items())} A game that was not "
        "trained yet is played with the head, pool and embedding of the known game that the detector takes it for. Transfer between games "
        "that demand opposite actions is therefore negative by construction.",
    )


def human_table(found: StudyScores) -> Table:
    """Makes the table with one row per variant: scores as shares of a human's, and the share of dormant (unresponsive) hidden units."""
    rows = []
    for name in found.variants:
        learned, kept, dormant = [], [], []
        for run, record in found.of(name).items():
            scores, at_end = record.scores, measures.final(record.scores.mean_PG)
            if not run.config.switch_every:
                own_G = measures.learning(scores.mean_PG, scores.trained_P)
                learned += [of_reference(record, game, score) for game, score in zip(scores.games, own_G, strict=True)]
            kept += [of_reference(record, game, score) for game, score in zip(scores.games, at_end, strict=True)]
            dormant += [_number(event.get("dormant")) for event in record.last_evaluations]
        values = [measures.mean(each) for each in (learned, kept, dormant)]
        if not np.isnan(values).all():
            rows.append([name, *(format_share(value) for value in values)])
    return Table(
        "Beside a human, and dormant units",
        ["variant", "learning", "average", "dormant units"],
        rows,
        "Means over games and runs. Learning, average: as above, but 0 % is the published score of random play and 100 % that of a human "
        "(pixel games: of best play); only games that evaluation played to their end are counted. Dormant units: hidden units of a game's "
        "experts that hardly respond to it after the last game (Sokar et al. 2023).",
    )


def memory_table(costs: Mapping[str, Costs]) -> Table:
    """Makes the table of memory, with one row per variant: parameters; bytes of cache, method against forgetting, and detector."""
    rows = []
    for name, cost in costs.items():
        kept = f"{format_bytes(cost.protection_bytes)} + {format_bytes(cost.exemplar_bytes)}"
        rows.append([name, *map(format_count, (cost.parameters, cost.dense_parameters)), format_bytes(cost.hbm_bytes), kept])
    return Table(
        "Costs in memory",
        ["variant", "parameters", "outside experts", "HBM cache", "kept for protection"],
        rows,
        "Means over runs. Single: the sum over all networks, except HBM, which is that of one network, because one is used at a time. "
        "Outside experts: stem, attention, heads, norms, embeddings and routers of all games, which never leave the GPU. HBM cache: its "
        "capacity, for parameters and moments of experts. Kept for protection: what the protection stores at the end (frames with features "
        "or outputs; Fisher matrices with anchors) + what the detector stores, which every variant has (frames).",
    )


def work_table(found: StudyScores, costs: Mapping[str, Costs]) -> Table:
    """Makes the table of work, with one row per variant: the bytes and experts that its runs move, and how long its runs take."""
    rows = []
    for name, cost in costs.items():
        rows.append(
            [
                name,
                format_bytes(cost.moved_bytes),
                format_count(cost.fetched),
                format_count(cost.cold_fetched),
                format_share(cost.cold_share),
                f"{format_part(cost.cold_equal, cost.cold)} in {cost.cold_runs} of {len(found.of(name))} runs" if cost.cold else DASH,
                f"{cost.train_s / 60:.1f} min",
                format_count(cost.steps_per_s),
                format_seconds(cost.stall_s),
            ]
        )
    return Table(
        "Costs in bytes moved and time",
        [
            *("variant", "bytes moved", "experts fetched", "of them cold", "cold tokens", "cold and equal"),
            *("training", "steps/s", "stall"),
        ],
        rows,
        "Means over runs; single: the sum over all networks. Bytes moved: into and out of HBM. Experts fetched: in training, ahead or on "
        "demand. Of them cold: the part that an earlier game had used. Cold tokens: the share of a later game's training tokens that cold "
        "experts computed. Cold and equal: of the experts that earlier games trained and that a game did not use or only borrowed, those "
        "whose parameters and moments stayed equal bit for bit; over all games of the runs that logged checksums. Cold experts are not "
        "counted where games take turns. Several runs shared the machine, so compare times with care.",
    )


def recognition_table(found: StudyScores) -> Table:
    """Makes the table with one row per variant: how well the detector recognised games in the evaluations after the last game."""
    fields = ("detector_accuracy", "nearest_mean_accuracy", "false_switches", "prefetch_recall")
    fates = ("prefetch_useful", "prefetch_late")
    rows = []
    for name in found.variants:
        records = [record for record in found.of(name).values() if len(record.games) > 1]
        events = [event for record in records for event in record.last_evaluations]
        accuracy, nearest, false, recall = ([_number(event.get(field)) for event in events] for field in fields)
        by_game = [[event.get("steps_to_detect_by_env") or [] for event in record.last_evaluations] for record in records]
        all_steps = [step for games in by_game for envs in games for step in envs]
        switched = [step for games in by_game for envs in games[1:] for step in envs if step is not None]
        useful, late = (sum(event.get("cache", {}).get(fate, 0) for event in events) for fate in fates)
        if events:
            worst = np.nanmin(accuracy) if not np.isnan(accuracy).all() else float("nan")
            rows.append(
                [
                    name,
                    format_share(measures.mean(accuracy)),
                    format_share(float(worst)),
                    format_share(measures.mean(nearest)),
                    format_score(measures.mean(switched)),
                    format_part(all_steps.count(None), len(all_steps)),
                    format_score(measures.mean(false)),
                    format_share(measures.mean(recall)),
                    format_share(late / (useful + late) if useful + late else float("nan")),
                ]
            )
    return Table(
        "Recognising games",
        ["variant", "detector", "worst game", "nearest mean", "steps to detect", "never", "false switches", "prefetch recall", "late"],
        rows,
        "After the last game, on episodes that were not trained on. Detector, nearest mean: the share of frames whose most probable game "
        "is the right one. Steps to detect: the steps from a switch to a new game until an environment acted with the new game's pool; the "
        "first game of an evaluation follows no other and is left out. Never: environments that never acted with the pool of the game that "
        "they played, the first game included; they are in no mean. False switches: per 1000 frames. Prefetch recall: the share of the "
        "needed experts that the detector named before their first use. Late: the share of the prefetched and used experts that were still "
        f"in flight at their first use.{_ambiguous_pairs(found)}",
    )


def _ambiguous_pairs(found: StudyScores) -> str:
    """Returns a sentence for each pair of games that looked alike in some run, so that nothing told them apart; "" without such pairs."""
    confused: dict[tuple[str, str], list[float]] = {}
    for record in found.records.values():
        for one, other, confusion in ambiguous(record):
            confused.setdefault((min(one, other), max(one, other)), []).append(confusion)
    return "".join(
        f" **Ambiguous: {one} and {other}**, confusion {measures.mean(values):.2f} in {len(values)} runs (1: nothing tells them apart)."
        for (one, other), values in confused.items()
    )


def separation_table(separated: Sequence[Separation]) -> Table:
    """Makes the table of separation: how much two environments (copies of games that are played at once) use the same experts.

    Each run with plain token routing has a row. It shows the overlap of two environments, which is the share of tokens that both
    environments send to the same experts: its mean over pairs that play the same game, its mean over pairs that play different games, the
    gap (the first mean minus the second), and the p-value of a test of the gap.
    """
    rows = [
        [each.run.variant, each.run.order, str(each.run.config.seed), *_apart(each.within, each.between), f"{each.p:.2g}"]
        for each in separated
    ]
    return Table(
        "Separation with plain token routing",
        ["variant", "order", "seed", "same game", "two games", "gap", "p"],
        rows,
        "The routed mass that two environments have in common in the last evaluation, as a mean over pairs. Each environment is thinned to "
        "as many tokens as the one with the fewest has. p: of a permutation test over environments. p can be small just because the "
        "environments of one game differ more among themselves than those of another, so look at the gap too. In every variant each game "
        "has its own norms and embedding; they tell the router which game it is.",
    )


def pair_table(separated: Sequence[Separation]) -> Table:
    """Makes the table with one row per variant and pair of games: how differently the two games use experts (their separation)."""
    variants = dict.fromkeys(each.run.variant for each in separated)
    gaps = {variant: pair_gaps([each for each in separated if each.run.variant == variant]) for variant in variants}
    return Table(
        "Separation of every two games",
        ["variant", "games", "same game", "two games", "gap"],
        [[variant, ", ".join(pair), *_apart(*values)] for variant, pairs in gaps.items() for pair, values in pairs.items()],
        "As above, for these two games alone; means over runs. The pairs with the smallest gap come first.",
    )


def _apart(within: float, between: float) -> list[str]:
    return [f"{value:.3f}" for value in (within, between, within - between)]


def caching_table(points: Sequence[CachingPoint]) -> Table:
    """Makes the table of hit rates and stalls, measured and simulated: one row per HBM capacity and interval between game switches."""
    rows = [
        [
            point.way.value,
            f"{point.hbm_experts} of {point.bank_experts}",
            "blocks" if point.switch_every is None else "1 update" if point.switch_every == 1 else f"{point.switch_every} updates",
            format_count(point.accesses),
            format_share(point.hit_rate, digits=2),
            format_share(point.belady, digits=2),
            f"{point.stall_s:.3g} s",
        ]
        for point in sorted(points, key=lambda point: (list(Way).index(point.way), -point.hbm_experts, -(point.switch_every or 10**9)))
    ]
    return Table(
        "Hits and stalls",
        ["by", "HBM", "turns", "accesses", "hit rate", "Belady", "stall"],
        rows,
        "Trainer: measured, with prefetching. Simulator: the trace of the run in blocks, reordered into turns and replayed through LRU and "
        "Belady's optimum, without prefetching, with the latencies that `ooc-moe simulate` assumes. Accesses: those of the layers' forward "
        "passes, in acting and training. Where HBM is smaller than a pool, backward and Adam fetch experts again; these fetches are not "
        "counted here.",
    )


def game_table(found: StudyScores) -> Table:
    """Makes the table with one row per game: the raw returns that its scores are compared with, and whether the game counts in ratios."""
    rows = [
        [
            facts.game,
            *(format_score(value) for value in (facts.random, facts.constant, facts.single, facts.reference)),
            facts.left_out or "counts",
        ]
        for facts in found.facts.values()
    ]
    return Table(
        "Games, raw returns",
        ["game", "random", "best constant", "single-task", "human or best", "in ratios"],
        rows if any(record.evaluations for record in found.records.values()) else [],
        "Means over seeds. A game that does not count is left out of every table of ratios above. Where evaluation cut games off, the "
        "returns up to that point are taken as a lower bound.",
    )


def point_table(found: StudyScores) -> Table:
    """Makes the table with one row per run, which the figures show as a point: its measures, as means over games that count in ratios."""
    rows = []
    for run, record in found.records.items():
        if not record.evaluations:
            continue
        cells = [
            measures.mean([c.value for c in found.cells(run.variant, name) if (c.order, c.seed) == (run.order, run.config.seed)])
            for name in _MAIN
        ]
        raw = ", ".join(
            f"{game} {format_score(score)}" for game, score in zip(record.games, measures.final(record.scores.mean_PG), strict=True)
        )
        rows.append([run.variant, run.order, str(run.config.seed), *(_two(value) for value in cells), raw])
    return Table("All runs", ["variant", "order", "seed", *_MAIN, "raw returns at the end"], rows, "Means over the games that count.")


def spread(cells: Sequence[Cell], statistic: Callable[[Any], Any] = statistics.mean) -> str:
    """Returns a statistic (by default the mean) of the cells' values, with its 95 % interval, as text: "0.98 [0.95, 1.00]".

    The interval is left out if no order of the games has two runs. The text is a dash if there are no values.
    """
    groups = strata(cells)
    if not groups:
        return DASH
    value = float(statistic(statistics.pooled(groups)))
    if max(map(len, groups)) < 2:
        return _two(value)  # One seed has no spread.
    low, high = statistics.interval(statistics.bootstrap(groups, statistic))
    return f"{_two(value)} [{_two(low)}, {_two(high)}]"


def _baselines(found: StudyScores) -> tuple[str, str]:
    facts = [found.facts[game] for game in sorted(found.counted)]
    constants = [measures.normalise([each.constant], [each.random], [each.single])[0] for each in facts]
    return _two(0.0), _two(measures.mean(constants))


def _two(value: float) -> str:
    return DASH if np.isnan(value) else f"{value:.2f}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")

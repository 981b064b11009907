"""The pictures of a run: each takes a RunRecord and draws one matplotlib Figure, or answers None when what it needs was not logged.

`CHARTS` lists them in order of reading, with a line on how to read each. Knows nothing of HTML and files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ooc_moe import measures
from ooc_moe.drawing import (
    COUNTS,
    FAINT,
    FATES,
    INK,
    PERCENT,
    TIERS,
    bar_widths,
    byte_axis,
    game_colours,
    heatmap,
    mark_games,
    running_mean,
    shaded,
    standard_error,
)
from ooc_moe.run_record import RunRecord
from ooc_moe.summary import format_score, verdict

WIDTH = 9.0
_COLUMNS_MAX = 4
# With more games than this, panels would be too small; they share one.
_PANELS_MAX = 8


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: its file name, title, a line on how to read it, what it needs, and what draws it."""

    name: str
    title: str
    reading: str
    needs: str
    draw: Callable[[RunRecord], Figure | None]


def learning_curves(record: RunRecord) -> Figure | None:
    """Points per 1000 steps and finished episodes' returns while each game was trained."""
    curves = {
        "points per 1000 steps": 1000 * record.series("reward_per_step"),
        "return of ended episodes": record.series("episode_return_mean"),
    }
    curves = {title: values for title, values in curves.items() if not np.isnan(values).all()}
    if not curves:
        return None
    if len(record.spans) > _PANELS_MAX:
        return _many_learning_curves(record, *next(iter(curves.items())))
    columns = min(max(len(record.spans), 2), _COLUMNS_MAX)
    blocks = -(-len(record.spans) // columns)
    figure = Figure(figsize=(WIDTH, 2.3 * blocks * len(curves)))
    grid = figure.subplots(blocks * len(curves), columns, squeeze=False)
    for row, (title, values) in enumerate(curves.items()):
        axes = list(grid[row * blocks : (row + 1) * blocks].flat)
        for ax, (game, start, end) in zip(axes, record.spans, strict=False):
            _learning_curve(ax, record, values, game, start, end)
            ax.set_ylabel(title if ax in grid[:, 0] else "")
        for ax in axes[len(record.spans) :]:
            ax.set_axis_off()
    return figure


def _learning_curve(ax: Axes, record: RunRecord, values: measures.Floats, game: str, start: float, end: float) -> None:
    colour = game_colours(record.games)[game]
    inside = (record.steps_U > start) & (record.steps_U <= end) & ~np.isnan(values)
    ax.plot(record.steps_U[inside], values[inside], "o", color=colour, markersize=3, alpha=0.35)
    ax.plot(record.steps_U[inside], running_mean(values[inside]), color=colour)
    ax.set_title(game, color=colour, fontweight="bold")
    ax.set_xlim(start, end or 1)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(COUNTS)
    ax.yaxis.set_major_formatter(COUNTS)


def _many_learning_curves(record: RunRecord, title: str, values: measures.Floats) -> Figure:
    figure = Figure(figsize=(WIDTH, 4))
    ax = figure.subplots()
    ax.set_yscale("symlog")
    ax.set_title(title)
    for game, start, end in record.spans:
        inside = (record.steps_U > start) & (record.steps_U <= end) & ~np.isnan(values)
        ax.plot(record.steps_U[inside], running_mean(values[inside]), color=game_colours(record.games)[game])
    _over_steps((ax,), record)
    return figure


def score_matrix(record: RunRecord) -> Figure | None:
    """Every game's score after every phase."""
    scores = record.scores
    if np.isnan(scores.mean_PG).all():
        return None
    normal_PG = measures.normalise(scores.mean_PG, scores.random_G, measures.best_own(scores.mean_PG, scores.trained_P))
    # A game whose best score is not above random has no scale; it is drawn as nothing learned.
    normal_PG = np.where(np.isnan(normal_PG) & ~np.isnan(scores.mean_PG), 0.0, normal_PG)
    rows = [f"after {game}" for game in record.schedule[: len(scores.mean_PG)]]
    columns = [f"{game}\n(random {format_score(score)})" for game, score in zip(scores.games, scores.random_G, strict=True)]
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(rows)))
    ax = figure.subplots()
    heatmap(ax, normal_PG, rows, columns, [[format_score(score) for score in row] for row in scores.mean_PG])
    for phase, game in enumerate(scores.trained_P):
        ax.add_patch(Rectangle((game - 0.49, phase - 0.47), 0.98, 0.94, fill=False, edgecolor=INK, linewidth=1.6))
    return figure


def forgetting(record: RunRecord) -> Figure | None:
    """For each game: random play, the score right after its own training, and the score at the end."""
    scores = record.scores
    own_G = measures.learning(scores.mean_PG, scores.trained_P)
    shown = [game for game in range(len(scores.games)) if not np.isnan(own_G[game])]
    if not shown:
        return None
    if len(shown) > _PANELS_MAX:
        return _many_learned_and_kept(record, shown)
    columns = min(max(len(shown), 2), _COLUMNS_MAX)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 2.9 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, game in zip(axes, shown, strict=False):
        _learned_and_kept(ax, record, game)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def _learned_and_kept(ax: Axes, record: RunRecord, game: int) -> None:
    scores = record.scores
    last = len(scores.mean_PG) - 1
    own = max(phase for phase, trained in enumerate(scores.trained_P) if trained == game)
    colour = game_colours(scores.games)[scores.games[game]]
    bars = [("random", float(scores.random_G[game]), 0.0, FAINT, 0.7)]
    for name, phase, alpha in (("after its\ntraining", own, 1.0), ("at the\nend", last, 0.55)):
        if alpha == 1.0 or last > own:
            bars.append((name, float(scores.mean_PG[phase, game]), standard_error(scores.returns.get((phase, game), [])), colour, alpha))
    for x, (_, height, error, fill, alpha) in enumerate(bars):
        ax.bar(x, height, 0.68, color=fill, alpha=alpha)
        if error:
            ax.errorbar(x, height, error, color=INK, elinewidth=1, capsize=3)
    ax.set_xticks(range(len(bars)), [name for name, *_ in bars])
    ax.set_title(f"{scores.games[game]}\n", color=colour, fontweight="bold")
    ax.annotate(
        verdict(scores, game), (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=9, color="#52606D"
    )
    ax.yaxis.set_major_formatter(COUNTS)
    ax.grid(visible=False, axis="x")


def _many_learned_and_kept(record: RunRecord, shown: list[int]) -> Figure:
    """One row per game between random play (0) and the best of this run (1)."""
    scores = record.scores
    ceiling_G = measures.best_own(scores.mean_PG, scores.trained_P)
    own_G, end_G = (
        measures.normalise(of(scores.mean_PG), scores.random_G, ceiling_G)[shown]
        for of in (lambda matrix_PG: measures.learning(matrix_PG, scores.trained_P), measures.final)
    )
    figure = Figure(figsize=(WIDTH, 1.2 + 0.17 * len(shown)))
    ax = figure.subplots()
    rows = np.arange(len(shown))
    ax.barh(rows, own_G, 0.7, color=FAINT, alpha=0.5, label="after its training")
    ax.plot(end_G, rows, "o", markersize=4, color=INK, label="at the end")
    ax.set_yticks(rows, [scores.games[game] for game in shown], fontsize=7)
    ax.set_xlabel("0: random play, 1: the best of this run; nothing: never better than random")
    ax.invert_yaxis()
    _legend(ax)
    return figure


def hit_rate(record: RunRecord) -> Figure | None:
    """The HBM cache's hit rate at each update, and where the missing experts came from."""
    accesses, hits = record.increments("cache", "accesses"), record.increments("cache", "hits")
    if not np.nansum(accesses):
        return None
    figure = Figure(figsize=(WIDTH, 4.8))
    top, bottom = figure.subplots(2, 1, sharex=True)
    rate = hits / np.where(accesses > 0, accesses, np.nan)
    top.plot(record.steps_U, rate, "o-", markersize=3, color=TIERS["hbm"][1])
    top.set_title("share of expert accesses that HBM served")
    # A cache that nearly always hits is shown from just below its worst update, or its dips would not be seen.
    worst = float(np.nanmin(rate))
    span = 1 - (0 if worst < 0.7 else np.floor(20 * (worst - 0.01)) / 20)
    top.set_ylim(1 - span, 1 + 0.04 * span)
    top.yaxis.set_major_formatter(PERCENT)
    fetched = {TIERS[tier]: record.increments("cache", "fetched_from", tier) for tier in ("dram", "nvme", "seed")}
    _stacked(bottom, record, fetched, "experts fetched into HBM in each update, by where the daemon found them")
    _over_steps((top, bottom), record)
    return figure


def tier_bytes(record: RunRecord) -> Figure | None:
    """What each tier holds against its capacity, and the bytes that moved between them."""
    held = {
        "hbm": record.series("cache", "resident") * record.series("cache", "expert_bytes"),
        "dram": record.series("store", "dram", "used_bytes"),
        "nvme": record.series("store", "nvme", "used_bytes"),
    }
    if all(np.isnan(values).all() for values in held.values()):
        return None
    figure = Figure(figsize=(WIDTH, 5.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for width, (tier, values) in zip((2, 3.6, 1.6), held.items(), strict=True):  # NVMe, drawn last, leaves an equal DRAM visible.
        name, colour = TIERS[tier]
        top.plot(record.steps_U, values, color=colour, label=name, linewidth=width)
    for tier, capacity in (
        ("hbm", record.last("cache", "capacity") * record.last("cache", "expert_bytes")),
        ("dram", record.last("store", "dram", "capacity_bytes")),
    ):
        if not np.isnan(capacity):
            top.axhline(capacity, color=TIERS[tier][1], linestyle=":", linewidth=1.3)
    top.set_title("bytes held by each tier (dotted: its capacity)")
    for name, path, tier, line in (
        ("into HBM", ("cache", "bytes_in"), "hbm", "-"),
        ("out of HBM", ("cache", "bytes_out"), "hbm", "--"),
        ("read from NVMe", ("store", "nvme", "read_bytes"), "nvme", "-"),
        ("written to NVMe", ("store", "nvme", "written_bytes"), "nvme", "--"),
    ):
        width = 3.2 if tier == "hbm" else 1.6
        bottom.plot(
            record.steps_U, np.nancumsum(record.increments(*path)), color=TIERS[tier][1], linestyle=line, linewidth=width, label=name
        )
    bottom.set_title("bytes moved since the start")
    for ax in (top, bottom):
        byte_axis(ax)
        _legend(ax)
    _over_steps((top, bottom), record)
    return figure


def prefetching(record: RunRecord) -> Figure | None:
    """What became of the experts that were prefetched, update by update."""
    if not np.nansum(record.increments("cache", "prefetch_issued")):
        return None
    figure = Figure(figsize=(WIDTH, 2.7))
    ax = figure.subplots()
    fates = {(fate, colour): record.increments("cache", f"prefetch_{fate}") for fate, colour in FATES.items()}
    _stacked(ax, record, fates, "prefetched experts in each update")
    _over_steps((ax,), record)
    return figure


def expert_usage(record: RunRecord) -> Figure | None:
    """Which experts each game's tokens went to in training."""
    counts_GE = record.training_usage()
    if not counts_GE.sum():
        return None
    colours_G3 = np.array([to_rgb(colour) for colour in game_colours(record.games).values()])
    figure = Figure(figsize=(WIDTH, 1.0 + 0.36 * len(record.games)))
    ax = figure.subplots()
    ax.imshow(shaded(np.nan_to_num(measures.usage_shares(counts_GE)), colours_G3), aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(record.games)), record.games)
    experts = record.num_experts
    for layer in range(1, counts_GE.shape[1] // experts):
        ax.axvline(layer * experts - 0.5, color=FAINT, linewidth=1)
    ax.set_xlabel("expert" if counts_GE.shape[1] == experts else f"expert ({experts} columns for each layer's bank)")
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    return figure


def overlap(record: RunRecord) -> Figure | None:
    """How much two games share experts, in training and as the agent itself routed in the last evaluation."""
    usages = [("training", record.training_usage()), ("last evaluation", record.evaluation_usage())]
    usages = [(name, counts) for name, counts in usages if counts.sum()]
    if not usages or len(record.games) < 2:
        return None
    figure = Figure(figsize=(WIDTH, (1.3 + 0.3 * min(len(record.games), 12)) * len(usages)))
    axes = figure.subplots(len(usages), 2, squeeze=False)
    for (left, right), (name, counts_GE) in zip(axes, usages, strict=True):
        for ax, title, matrix in (
            (left, "top-10 experts in common", measures.top_overlap(counts_GE)),
            (right, "routed mass in common", measures.mass_overlap(counts_GE)),
        ):
            heatmap(ax, matrix, record.games, record.games)
            ax.set_title(f"{name}: {title}")
        right.set_yticks([])
    return figure


def detector(record: RunRecord) -> Figure | None:
    """What the detector believed while each game was played without its name, and its accuracy while it was taught."""
    believed = [event for event in record.last_evaluations if event.get("believed")]
    accuracy = record.series("detector", "accuracy")
    if not believed and np.isnan(accuracy).all():
        return None
    figure = Figure(figsize=(WIDTH, 2.3 + 0.25 * min(len(record.games), 20)))
    left, right = figure.subplots(1, 2)
    if believed:
        names = list(dict.fromkeys([*record.games, *(name for event in believed for name in event["believed"])]))
        heatmap(left, measures.confusion([event["believed"] for event in believed], names), [e["evaluated"] for e in believed], names)
        left.set_title("last evaluation: played (row), believed (column)")
    else:
        left.set_axis_off()
    right.plot(record.steps_U, accuracy, color=INK)
    right.set_title("accuracy on the frames it was just taught")
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(PERCENT)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlabel("environment steps")
    mark_games(right, record.spans, game_colours(record.games), named=False)
    return figure


def _stacked(ax: Axes, record: RunRecord, counts: dict[tuple[str, str], measures.Floats], title: str) -> None:
    """Bars of each update, stacked: (name, colour) -> count."""
    below = np.zeros(len(record.steps_U))
    for (name, colour), values in counts.items():
        ax.bar(record.steps_U, np.nan_to_num(values), -bar_widths(record.steps_U), bottom=below, color=colour, label=name, align="edge")
        below += np.nan_to_num(values)
    ax.set_title(title)
    ax.yaxis.set_major_formatter(COUNTS)
    _legend(ax)


def _legend(ax: Axes) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.4)


def _over_steps(axes: tuple[Axes, ...], record: RunRecord) -> None:
    """Marks the games on panels that share their steps; names them on the first, labels the last."""
    for ax in axes:
        mark_games(ax, record.spans, game_colours(record.games), named=ax is axes[0])
    axes[-1].set_xlabel("environment steps")


CHARTS = (
    Chart(
        "score_matrix",
        "Scores after each phase",
        "Read a column downwards: how one game's mean return changed as other games were learned. Framed: right after its own training. "
        "White is random play, dark is the best this run reached in that game.",
        "an evaluation",
        score_matrix,
    ),
    Chart(
        "forgetting",
        "Learning and forgetting",
        "The step from grey to full colour is what was learned, the drop from there to the pale bar is what was forgotten. Forgetting says "
        "nothing where nothing was learned. Bars are mean returns, with standard errors; the last game has had no time to be forgotten.",
        "an evaluation",
        forgetting,
    ),
    Chart(
        "learning_curves",
        "Learning curves",
        "Raw score while each game was trained: dots are updates, the line is the mean of five.",
        "an update with rewards",
        learning_curves,
    ),
    Chart(
        "hit_rate",
        "Cache hits",
        "High between the switches (dashed) means that the experts of the moment fit into HBM; the dip at a switch is the price of a "
        "new game (mind where the axis begins). Below: the fetches that remain, many at a switch, few within a game.",
        "an update with cache counters",
        hit_rate,
    ),
    Chart(
        "tier_bytes",
        "Bytes by tier",
        "HBM and DRAM fill to their capacity and stay there; NVMe grows with every newly trained expert. Out of HBM: trained experts that "
        "were written back.",
        "an update with cache and daemon counters",
        tier_bytes,
    ),
    Chart(
        "prefetching",
        "Prefetching",
        "Useful: the expert was in HBM when asked for. Late: it was still on its way. Wasted: evicted before anybody asked.",
        "prefetched experts (prefetching may have been off)",
        prefetching,
    ),
    Chart(
        "expert_usage",
        "Expert usage",
        "One row per game; the darker a column, the more of the game's tokens that expert computed. A column that is dark in one row only "
        "is an expert of that game alone.",
        "an update with routing counts",
        expert_usage,
    ),
    Chart(
        "overlap",
        "Overlap between games",
        "Off the diagonal: what two games share. Experts in common: of the ten most used of each. Mass: the share of tokens routed alike; "
        "0 % is complete separation.",
        "the routing counts of two games",
        overlap,
    ),
    Chart(
        "detector",
        "Detector",
        "Left: the share of steps in which each belief was acted on; a dark diagonal means that games were recognised. Right: how well it "
        "knew the frames it was taught.",
        "an evaluation, or an update with detector figures",
        detector,
    ),
)

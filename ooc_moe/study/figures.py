"""Draws the figures of a study. Every run is shown as a point or a thin line of its own; a mean is drawn in addition, never instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ooc_moe.metrics import measures, statistics
from ooc_moe.report.drawing import FAINT, INK, WIDTH, game_colours, legend
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.scores import Cell, StudyScores, strata
from ooc_moe.study.verdicts import UNTRAINED

_DRAWN = {"learning": "right after its training", "average": "at the end of the run", "retention": "average / learning"}


def figures(found: StudyScores, points: Sequence[CachingPoint]) -> dict[str, Figure]:
    """Draws all figures for which there are results. Returns them by name: "measures" (learning and retention), "games" (scores after
    training) and "hits" (misses and stalls)."""
    draw: dict[str, Callable[[], Figure | None]] = {
        "measures": lambda: learning_and_retention(found),
        "games": lambda: scores_after_training(found),
        "hits": lambda: misses_and_stalls(points),
    }
    drawn = {name: function() for name, function in draw.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def learning_and_retention(found: StudyScores) -> Figure | None:
    """Draws learning, average and retention of each variant: a point for every run, the mean, and its 95 % interval.

    Learning is the score right after a game's training, average the score at the end of the run, retention their ratio. Each order of the
    games has a colour. Returns None if no variant has an average.
    """
    names = [name for name in found.variants if name != UNTRAINED and strata(found.cells(name, "average"))]
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + 0.42 * len(names)))
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    orders = list(found.study.orders)
    colours = game_colours(orders)
    for ax, (measure, says) in zip(axes, _DRAWN.items(), strict=True):
        ax.axvline(1, color=FAINT, linewidth=1, linestyle="--")
        for row, name in enumerate(names):
            cells = found.cells(name, measure)
            _draw_runs(ax, cells, row, lambda order: colours.get(order, INK))
            _draw_mean(ax, cells, row)
        ax.set_title(f"{measure}\n{says}")
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for order in orders:
        axes[-1].plot([], [], "o", color=colours[order], markersize=4, label=order)
    if any(found.study.variants[name].alone for name in names):
        axes[-1].plot([], [], "o", color=INK, markersize=4, label="one game alone")
    legend(axes[-1])
    # The axis starts at random play or below: one that starts at 0.99 would make tiny differences look large.
    axes[0].set_xlim(min(-0.05, axes[0].get_xlim()[0]), max(1.1, axes[0].get_xlim()[1]))
    figure.supxlabel("0: random play, 1 (dashed): a network of its own for each game", fontsize=10)
    return figure


def _draw_runs(ax: Axes, cells: Sequence[Cell], row: int, colour: Callable[[str], str]) -> None:
    """Draws a point for each run, at its mean over games, in the row of its variant. `colour` gives the colour of an order of the games."""
    runs: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        runs.setdefault((cell.order, cell.seed), []).append(cell.value)
    places = [0.0] if len(runs) == 1 else np.linspace(-0.28, 0.28, len(runs))
    for place, ((order, _), values) in zip(places, sorted(runs.items()), strict=True):
        ax.plot(measures.mean(values), row + place, "o", color=colour(order), markersize=3.5, alpha=0.6)


def _draw_mean(ax: Axes, cells: Sequence[Cell], row: int) -> None:
    """Draws the mean over runs and games in the row of a variant, with its 95 % interval if there are several runs."""
    groups = strata(cells)
    if sum(map(len, groups)) < 2:  # The mean of one run is that run's point.
        return
    value = float(statistics.mean(statistics.pooled(groups)))
    ax.plot(value, row, "|", color=INK, markersize=14, markeredgewidth=2)
    if max(map(len, groups)) > 1:
        low, high = statistics.interval(statistics.bootstrap(groups))
        ax.plot([low, high], [row, row], color=INK, linewidth=1.4)


def scores_after_training(found: StudyScores) -> Figure | None:
    """Draws each game's score from the end of its own training on, in the runs of the study's first order.

    Each variant has a panel. Thin lines are runs, the bold line is their mean. Returns None if no game was learned well enough to count
    (see scores.py), or if no run was evaluated after the training of each of its games.
    """
    order, schedule = next(iter(found.study.orders.items()))
    games = [game for game in dict.fromkeys(schedule) if game in found.counted]
    drawn = ((name, _scores_of(found, name, order)) for name in found.variants if name != UNTRAINED)
    variants = {name: scores_RPG for name, scores_RPG in drawn if scores_RPG is not None}
    if not variants or not games:
        return None
    columns = min(3, len(variants))
    rows = -(-len(variants) // columns)
    figure = Figure(figsize=(min(WIDTH, 2 + 3 * columns), 0.7 + 1.9 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    colours = game_colours(games)
    for ax, (name, scores_RPG) in zip(axes, variants.items(), strict=False):
        for game in games:
            own, column = schedule.index(game), list(dict.fromkeys(schedule)).index(game)
            later = range(own + 1, scores_RPG.shape[1] + 1)
            for scores_PG in scores_RPG:
                ax.plot(later, scores_PG[own:, column], ".-", color=colours[game], linewidth=0.7, markersize=3, alpha=0.35)
            ax.plot(later, scores_RPG[:, own:, column].mean(axis=0), "o-", color=colours[game], markersize=3.5, label=game)
        ax.set_title(name)
        ax.set_xticks(range(1, len(schedule) + 1))
        ax.tick_params(labelbottom=True)
    axes[0].set_ylim(min(-0.05, axes[0].get_ylim()[0]), max(1.1, axes[0].get_ylim()[1]))
    for ax in axes[len(variants) :]:
        ax.set_axis_off()
    legend(axes[columns - 1])
    figure.supylabel("score", fontsize=10)
    figure.supxlabel(f"games learned so far (order {order}); score 0: random play, 1: a network of its own", fontsize=10)
    return figure


def _scores_of(found: StudyScores, variant: str, order: str) -> measures.Floats | None:
    """Returns the normalised scores of a variant's runs in one order of the games: (runs, phases, games).

    A phase is the training in one game. None if there is no such run, or if its runs were evaluated only at their end.
    """
    scores = [
        found.normalised(record)[0] for run, record in found.of(variant).items() if run.order == order and not run.config.switch_every
    ]
    return np.stack(scores) if scores and len(scores[0]) > 1 else None


def misses_and_stalls(points: Sequence[CachingPoint]) -> Figure | None:
    """Draws misses and stalls against the switch interval, with a line for each HBM capacity; trainer and simulator side by side.

    The axes are logarithmic. On linear axes hit rates of 98.8 % and 99.9 % look alike, although one misses ten times as often as the other.
    Returns None if there are no points.
    """
    ways = [way for way in Way if any(point.way is way for point in points)]
    if not ways:
        return None
    figure = Figure(figsize=(WIDTH, 5.4))
    grid = figure.subplots(2, len(ways), squeeze=False, sharex=True, sharey="row")
    sizes = sorted({point.hbm_experts for point in points}, reverse=True)
    colours = game_colours([str(size) for size in sizes])
    intervals = sorted({point.switch_every for point in points if point.switch_every})
    # By interval: its place on the x axis. Blocks (None) are the longest interval.
    places = {every: every for every in intervals} | {None: 4 * max(intervals, default=1)}
    for (top, bottom), way in zip(grid.T, ways, strict=True):
        for rank, size in enumerate(sizes):
            found = {point.switch_every: point for point in points if point.way is way and point.hbm_experts == size}
            row = [found[every] for every in places if every in found]
            if not row:
                continue
            x = [places[point.switch_every] for point in row]
            # Lines drawn first are wider, so that lines that coincide can all be seen.
            look = {"color": colours[str(size)], "linewidth": 4 * 0.65**rank, "markersize": 8 * 0.75**rank}
            top.plot(x, [1 - p.hit_rate for p in row], "o-", label=f"{size} of {row[0].bank_experts}", **look)
            bottom.plot(x, [p.stall_s for p in row], "o-", **look)
            if way is Way.SIMULATOR:
                top.plot(x, [1 - p.belady for p in row], "s--", **look | {"linewidth": 1, "markersize": 4, "markerfacecolor": "white"})
        for ax in (top, bottom):
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(list(places.values()), [f"{every}" if every else "blocks" for every in places])
            ax.xaxis.set_minor_locator(NullLocator())
        top.set_title(f"{way.value}, without prefetching (dashed: Belady)" if way is Way.SIMULATOR else f"{way.value}, with prefetching")
        top.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
        bottom.set_xlabel("updates in a game before the next one's turn")
    grid[0, 0].set_ylabel("accesses that missed HBM")
    grid[1, 0].set_ylabel("stall")
    legend(grid[0, -1])
    grid[0, -1].get_legend().set_title("experts in HBM")
    return figure

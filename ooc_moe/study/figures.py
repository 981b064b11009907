"""The pictures of a study. Every run is a point; means stand beside their points, never instead of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ooc_moe import measures, statistics
from ooc_moe.drawing import FAINT, INK, PERCENT, WIDTH, game_colours, legend
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.scores import Cell, StudyScores, strata
from ooc_moe.study.verdicts import UNTRAINED


def figures(found: StudyScores, points: Sequence[CachingPoint]) -> dict[str, Figure]:
    """By name, those that have something to show."""
    draw: dict[str, Callable[[], Figure | None]] = {
        "measures": lambda: learning_and_retention(found),
        "games": lambda: scores_by_phase(found),
        "hits": lambda: hits(points),
    }
    made = {name: make() for name, make in draw.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def learning_and_retention(found: StudyScores) -> Figure | None:
    """Learning, average and retention of each variant: every run, the mean and its 95 % interval; one colour for each order."""
    names = [name for name in found.variants if name != UNTRAINED and strata(found.cells(name, "average"))]
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 1.4 + 0.42 * len(names)))
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    orders = list(found.study.orders)
    colours = game_colours(orders)
    for ax, measure in zip(axes, ("learning", "average", "retention"), strict=True):
        ax.axvline(1, color=FAINT, linewidth=1, linestyle="--")
        for row, name in enumerate(names):
            cells = found.cells(name, measure)
            _runs(ax, cells, row, lambda order: colours.get(order, INK))
            _mean(ax, cells, row)
        ax.set_title(measure)
        ax.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for order in orders:
        axes[-1].plot([], [], "o", color=colours[order], markersize=4, label=order)
    axes[-1].plot([], [], "o", color=INK, markersize=4, label="one game alone")
    legend(axes[-1])
    # From random play on: an axis that begins at 0.99 makes much of nothing.
    axes[0].set_xlim(min(-0.05, axes[0].get_xlim()[0]), max(1.1, axes[0].get_xlim()[1]))
    axes[1].set_xlabel("0: random play, 1: a network of its own")
    return figure


def _runs(ax: Axes, cells: Sequence[Cell], row: int, colour: Callable[[str], str]) -> None:
    """A point for each run: its mean over games."""
    runs: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        runs.setdefault((cell.order, cell.seed), []).append(cell.value)
    places = np.linspace(-0.28, 0.28, max(len(runs), 2))
    for place, ((order, _), values) in zip(places, sorted(runs.items()), strict=False):
        ax.plot(measures.mean(values), row + place, "o", color=colour(order), markersize=3.5, alpha=0.6)


def _mean(ax: Axes, cells: Sequence[Cell], row: int) -> None:
    groups = strata(cells)
    if not groups:
        return
    value = float(statistics.mean(statistics.pooled(groups)))
    ax.plot(value, row, "|", color=INK, markersize=14, markeredgewidth=2)
    if max(map(len, groups)) > 1:
        low, high = statistics.interval(statistics.bootstrap(groups))
        ax.plot([low, high], [row, row], color=INK, linewidth=1.4)


def scores_by_phase(found: StudyScores) -> Figure | None:
    """Each game's score after every phase in the first order: variants as lines, the mean of their seeds; the first one on top."""
    order, games = next(iter(found.study.orders.items()))
    drawn = ((name, _curve(found, name, order)) for name in found.variants if name != UNTRAINED)
    curves = {name: curve for name, curve in drawn if curve is not None and len(curve) > 1}
    games = tuple(game for game in games if game in found.counted)
    if not curves or not games:
        return None
    figure = Figure(figsize=(WIDTH, 2.6 * -(-len(games) // 3)))
    axes = list(figure.subplots(-(-len(games) // 3), 3, squeeze=False, sharey=True).flat)
    schedule = found.study.orders[order]
    colours = game_colours(list(curves))
    for ax, game in zip(axes, games, strict=False):
        column = list(dict.fromkeys(schedule)).index(game)
        for rank, (name, curve) in enumerate(curves.items()):
            if not np.isnan(curve[:-1, column]).all():  # One that was evaluated at its end only has no curve.
                look = {"color": colours[name], "markersize": 3, "linewidth": 2.6 if rank == 0 else 1.3, "zorder": 3 - rank / len(curves)}
                ax.plot(range(1, len(curve) + 1), curve[:, column], "o-", label=name, **look)
        ax.axvline(schedule.index(game) + 1, color=FAINT, linestyle="--", linewidth=0.9)
        ax.set_title(game)
        ax.set_xticks(range(1, len(schedule) + 1))
    for ax in axes[len(games) :]:
        ax.set_axis_off()
    legend(axes[min(2, len(games) - 1)])
    axes[0].set_ylabel("0: random, 1: single-task")
    figure.supxlabel(f"games learned, order {order} (dashed: this one)", fontsize=10)
    return figure


def _curve(found: StudyScores, variant: str, order: str) -> measures.Floats | None:
    scores = [found.normalised(record)[0] for run, record in found.of(variant).items() if run.order == order]
    if not scores:
        return None
    stacked = np.stack([each for each in scores if each.shape == scores[0].shape])
    known = ~np.isnan(stacked)
    return np.asarray(np.where(known, stacked, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan))


def hits(points: Sequence[CachingPoint]) -> Figure | None:
    """Hit rate against the switch interval, one line for each HBM capacity; simulator and trainer side by side."""
    ways = [way for way in Way if any(point.way is way for point in points)]
    if not ways:
        return None
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots(1, len(ways), squeeze=False, sharey=True)[0]
    sizes = sorted({point.hbm_experts for point in points})
    colours = game_colours([str(size) for size in sizes])
    longest = max((point.switch_every or 0 for point in points), default=1)
    for ax, way in zip(axes, ways, strict=True):
        for size in sizes:
            row = sorted((p.switch_every or 4 * longest, p) for p in points if p.way is way and p.hbm_experts == size)
            if not row:
                continue
            places, colour = [place for place, _ in row], colours[str(size)]
            ax.plot(places, [p.hit_rate for _, p in row], "o-", color=colour, label=f"{size} of {row[0][1].bank_experts}")
            if way is Way.SIMULATOR:
                ax.plot(places, [p.belady for _, p in row], "s--", color=colour, markersize=3, linewidth=1)
        ticks = sorted({point.switch_every or 4 * longest for point in points})
        ax.set_xscale("log")
        ax.set_xticks(ticks, ["blocks" if tick == 4 * longest else str(tick) for tick in ticks], minor=False)
        ax.minorticks_off()
        ax.set_title(f"{way.value}" + (" (dashed: Belady)" if way is Way.SIMULATOR else ""))
        ax.set_xlabel("updates in a game before the next one's turn")
        ax.yaxis.set_major_formatter(PERCENT)
    axes[0].set_ylabel("HBM hit rate")
    legend(axes[-1])
    return figure

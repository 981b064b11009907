"""Draws the charts of learning: learning curves, scores after each phase, forgetting, and the detector's beliefs.

Each public function draws one figure of a run, or returns None if the run has not logged what the figure needs. charts.py says how to read
the charts.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ooc_moe.display.formats import format_score
from ooc_moe.metrics import measures
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.drawing import (
    ACCENT,
    COUNTS,
    FAINT,
    INK,
    PERCENT,
    WIDTH,
    game_colours,
    heatmap,
    legend,
    mark_games,
    running_mean,
)
from ooc_moe.report.summary import verdict

_COLUMNS_MAX = 4
# With more games than this, panels would be too small, so all games share one panel.
_PANELS_MAX = 8


def _grid(panels: int) -> tuple[int, int]:
    """Arranges panels in a grid, (rows, columns), with as few empty places as possible: five panels stand in rows of three and two."""
    rows = -(-panels // _COLUMNS_MAX)
    return rows, max(-(-panels // rows), 2)


def learning_curves(record: RunRecord) -> Figure | None:
    """Draws the learning curve of each game: points per 1000 steps, and returns of finished episodes, while it was trained.

    Returns None if the run logged neither.
    """
    curves = {
        "points per 1000 steps": 1000 * record.series("reward_per_step"),
        "return of ended episodes": record.series("episode_return_mean"),
    }
    curves = {title: values for title, values in curves.items() if not np.isnan(values).all()}
    if not curves:
        return None
    if len(record.spans) > _PANELS_MAX:
        return _many_learning_curves(record, *next(iter(curves.items())))
    blocks, columns = _grid(len(record.spans))
    figure = Figure(figsize=(WIDTH, 2.3 * blocks * len(curves)))
    grid = figure.subplots(blocks * len(curves), columns, squeeze=False)
    for row, (title, values) in enumerate(curves.items()):
        axes = list(grid[row * blocks : (row + 1) * blocks].flat)
        for ax, (game, start, end) in zip(axes, record.spans, strict=False):
            _learning_curve(ax, record, values, game, start, end)
            ax.set_ylabel(title if ax in grid[:, 0] else "")
            ax.set_xlabel("environment steps" if row == len(curves) - 1 else "")
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
    if not inside.any():
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no episode ended", transform=ax.transAxes, ha="center", color=FAINT)


def _many_learning_curves(record: RunRecord, title: str, values: measures.Floats) -> Figure:
    figure = Figure(figsize=(WIDTH, 4))
    ax = figure.subplots()
    ax.set_yscale("symlog")
    ax.set_title(title)
    for game, start, end in record.spans:
        inside = (record.steps_U > start) & (record.steps_U <= end) & ~np.isnan(values)
        ax.plot(record.steps_U[inside], running_mean(values[inside]), color=game_colours(record.games)[game])
    mark_games(ax, record.spans, game_colours(record.games), named=True)
    ax.set_xlabel("environment steps")
    return figure


def score_matrix(record: RunRecord) -> Figure | None:
    """Draws the score matrix: a grid of every game's score after every phase (training of one game). None without evaluations."""
    scores = record.scores
    if np.isnan(scores.mean_PG).all():
        return None
    normal_PG = measures.normalise(scores.mean_PG, scores.random_G, measures.best_own(scores.mean_PG, scores.trained_P))
    # A game whose best score is not above random has no scale; it is drawn as nothing learned.
    normal_PG = np.where(np.isnan(normal_PG) & ~np.isnan(scores.mean_PG), 0.0, normal_PG)
    rows = [f"after {game}" for game in record.schedule[: len(scores.mean_PG)]]
    columns = list(scores.games)
    if len(columns) <= _PANELS_MAX:
        columns = [f"{game}\n(random {format_score(score)})" for game, score in zip(scores.games, scores.random_G, strict=True)]
    figure = Figure(figsize=(WIDTH, 1.3 + (0.42 if len(rows) <= 12 else 0.13) * len(rows)))
    ax = figure.subplots()
    heatmap(ax, normal_PG, rows, columns, [[format_score(score) for score in row] for row in scores.mean_PG])
    for phase, game in enumerate(scores.trained_P):
        ax.add_patch(
            Rectangle((game - 0.48, phase - 0.45), 0.96, 0.9, fill=False, edgecolor=ACCENT, linewidth=2.4 if len(rows) <= 12 else 0.8)
        )
    return figure


def forgetting(record: RunRecord) -> Figure | None:
    """Draws how much of each game was learned and forgotten, as bars: random play, the score right after its training, and at the end.

    None if no game was evaluated after its training.
    """
    scores = record.scores
    own_G = measures.learning(scores.mean_PG, scores.trained_P)
    shown = [game for game in range(len(scores.games)) if not np.isnan(own_G[game])]
    if not shown:
        return None
    if len(shown) > _PANELS_MAX:
        return _many_learned_and_kept(record, shown)
    rows, columns = _grid(len(shown))
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
            bars.append(
                (name, float(scores.mean_PG[phase, game]), measures.standard_error(scores.returns.get((phase, game), [])), colour, alpha)
            )
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
    """Draws what `forgetting` shows for many games: a row for each, on a scale from random play (0) to the best score of this run (1)."""
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
    ax.set_xlabel("0: random play, 1: the best of this run; no bar: never better than random")
    ax.set_ylim(len(shown) - 0.4, -0.6)
    legend(ax)
    return figure


def detector(record: RunRecord) -> Figure | None:
    """Draws how well the detector recognised games: which game it believed to see in the last evaluation, and its accuracy in training.

    Returns None if the run logged neither.
    """
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
    right.set_title("accuracy on the frames that it has just learned")
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(PERCENT)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlabel("environment steps")
    mark_games(right, record.spans, game_colours(record.games), named=False)
    return figure

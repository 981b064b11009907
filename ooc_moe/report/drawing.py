"""The parts that all charts share: one style, a colour for each game and tier, and functions that draw grids, axes and legends.

Charts are drawn with matplotlib's `Figure` objects instead of pyplot, so that figures share no state and need not be closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ooc_moe.metrics.measures import Floats

WIDTH = 9.0
"""The width of every figure, in inches."""
INK, FAINT, ACCENT = "#1F2933", "#9AA5B1", "#E8A33D"
TIERS = {"hbm": ("HBM", "#B3261E"), "dram": ("DRAM", "#E8A33D"), "nvme": ("NVMe", "#3B6FB6"), "seed": ("seed", "#B8BEC9")}
FATES = {"useful": "#2E8B57", "late": "#E8A33D", "wasted": "#B3261E"}
# Okabe & Ito's colours, which stay apart for colour-blind readers; yellow is left out (unreadable on white).
_GAME_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_ANNOTATED_CELLS_MAX = 150
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

# Any: matplotlib types the keys as a union of all its settings.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": "#C5CBD3",
    "axes.labelcolor": "#52606D",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECEFF3",
    "text.color": INK,
    "xtick.color": "#52606D",
    "ytick.color": "#52606D",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}

COUNTS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:,.2g}")
PERCENT = PercentFormatter(1.0)


def game_colours(games: Sequence[str]) -> dict[str, str]:
    """Chooses a colour for each game, by its place in the list: game -> "#RRGGBB".

    With more than seven games, their hues are spread evenly, and every other colour is dark.
    """
    if len(games) <= len(_GAME_COLOURS):
        return dict(zip(games, _GAME_COLOURS, strict=False))
    return {game: to_hex(tuple(hsv_to_rgb((rank / len(games), 0.75, (0.85, 0.5)[rank % 2])))) for rank, game in enumerate(games)}


def mark_games(ax: Axes, spans: Iterable[tuple[str, float, float]], colours: dict[str, str], *, named: bool) -> None:
    """Marks on a chart which game was trained when: shades the steps of each game in its colour, with a line at each switch of the game.

    Args:
        ax: the axes of the chart, with environment steps on the x axis.
        spans: (game, first step, last step) of each stretch of training, in order.
        colours: the colour of each game.
        named: whether to write the games' names above the axes. A name that would run into the next one is left out.
    """
    spans = list(spans)
    width = spans[-1][2] if spans else 0.0
    for game, start, end in spans:
        ax.axvspan(start, end, color=colours[game], alpha=0.07, linewidth=0, zorder=0)
        if start > 0:
            ax.axvline(start, color=FAINT, linewidth=0.9, linestyle="--")
        if named and (end - start) > 0.011 * len(game) * width:
            place = ((start + end) / 2, 1.0)
            ax.annotate(
                game,
                place,
                xycoords=ax.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                fontweight="bold",
                color=colours[game],
            )
    if named:
        ax.set_title(ax.get_title(loc="left"), pad=18)
    if width:
        ax.set_xlim(0, width)
    ax.xaxis.set_major_formatter(COUNTS)


def heatmap(ax: Axes, values_RC: Floats, rows: Sequence[str], columns: Sequence[str], texts: Sequence[Sequence[str]] | None = None) -> None:
    """Draws a matrix of shares as a grid of cells, from 0 (white) to 1 (dark); NaN is grey.

    Args:
        ax: the axes to draw on.
        values_RC: the shares, by row and column.
        rows: the names of the rows.
        columns: the names of the columns.
        texts: what to write into the cells in place of the shares in percent.
    """
    colours = np.full((*values_RC.shape, 3), 0.955)
    known = ~np.isnan(values_RC)
    strength = np.clip(values_RC[known], 0, 1)[:, None]
    colours[known] = 1 - strength * (1 - np.array([0.06, 0.32, 0.53]))
    ax.imshow(colours, aspect="auto", interpolation="nearest")
    if values_RC.size <= _ANNOTATED_CELLS_MAX:
        for row, column in zip(*np.nonzero(known), strict=True):
            text = texts[row][column] if texts else f"{100 * values_RC[row, column]:.0f} %"
            dark = values_RC[row, column] > 0.55
            ax.text(column, row, text, ha="center", va="center", color="white" if dark else INK, fontsize=9.5)
    small = max(len(rows), len(columns)) > 20
    longest = max(len(line) for name in columns for line in name.split("\n"))
    turned = 90 if small else 30 if longest * len(columns) > 120 * ax.get_position().width else 0
    ax.set_xticks(
        range(len(columns)), columns, rotation=turned, ha="right" if turned else "center", rotation_mode="anchor" if turned else None
    )
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labelsize=6 if small else 9.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def byte_axis(ax: Axes) -> None:
    """Labels the y axis with bytes from zero up, in round numbers of the largest binary unit that fits, such as MiB.

    Call it after everything was drawn on the axes, because it reads how high they reach.
    """
    ax.set_ylim(0, None)
    top = ax.get_ylim()[1]
    power = int(np.clip(np.log2(max(top, 1)) // 10, 0, len(_UNITS) - 1))
    ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / 1024**power))
    ticks = ticks[(ticks >= 0) & (ticks * 1024**power <= top)]
    ax.set_yticks(ticks * 1024**power, [f"{tick:g} {_UNITS[power]}" for tick in ticks])


def legend(ax: Axes) -> None:
    """Adds a legend, which explains the colours, to the right of the axes."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.4)


def bar_widths(steps_U: Floats) -> Floats:
    """The widths, (U,), of a chart with one bar for each update, so that bars touch: each reaches back to the step of the update before.

    `steps_U`: the environment steps at each update. Draw the bars at these steps with align="edge" and negated widths.
    """
    return np.asarray(np.diff(steps_U, prepend=0.0))


def running_mean(values: Floats, window: int = 5) -> Floats:
    """Smooths values: each becomes the mean of the `window` values around it. `window` must be odd.

    NaN values are left out of a mean, and at both ends it has fewer values.
    """
    if not len(values):
        return values
    padded = np.pad(np.asarray(values, float), window // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = ~np.isnan(windows)
    count = known.sum(axis=1)
    return np.asarray(np.where(known, windows, 0).sum(axis=1) / np.where(count > 0, count, np.nan))


def shaded(shares_RC: Floats, colours_R3: NDArray[np.float64]) -> Floats:
    """Turns a matrix of shares (R, C) into the colours of its cells (R, C, 3), from white to the row's own colour as the share grows.

    The strength of a colour is the square root of the share, so that small shares stay visible.
    """
    strength = np.sqrt(shares_RC / max(float(shares_RC.max()), 1e-12))
    return np.asarray(1 - strength[..., None] * (1 - colours_R3[:, None, :]))

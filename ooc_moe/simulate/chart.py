"""Draws the chart of a sweep (many replays of one trace).

It shows the hit rate over the share of experts that HBM holds, and over the interval between switches of the game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ooc_moe.display.formats import format_share_short
from ooc_moe.report.drawing import COUNTS, FAINT, PERCENT, STYLE, WIDTH, legend
from ooc_moe.simulate.sweep import Row
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import Belady

_COLOURS = {"lru": "#0072B2", "s3fifo": "#D55E00", "random": FAINT, "belady": "#1F2933"}
_SOURCE_COLOURS = {"perfect": "#009E73", "detector": "#CC79A7", "random": "#E69F00"}
_NAMES = {"lru": "LRU", "s3fifo": "S3-FIFO", "random": "random", "belady": "Belady (optimum)"}


def save_chart(path: Path, rows: Sequence[Row]) -> None:
    """Draws the chart of a sweep's results and writes it to a file. The end of the file's name chooses the format, for example .png.

    Raises:
        InvalidRequest: matplotlib does not know the format.
    """
    with rc_context(STYLE):
        figure = draw(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path)
        except ValueError as error:
            raise InvalidRequest(f"plot: {path}: {str(error).splitlines()[0]}") from error


def draw(rows: Sequence[Row]) -> Figure:
    """Draws the hit rates of a sweep (many replays of one trace) in up to two panels.

    The left panel has the capacity of HBM on its x axis, and shows the replays with the shortest interval between switches of the game. The
    right panel has that interval on its x axis, and shows the replays with the smallest capacity. A panel with only one value on its x axis
    is left out; if both have only one, the left one is drawn.
    """
    capacities = sorted({row.replayed.setup.hbm_experts for row in rows})
    intervals = sorted({row.switch_every for row in rows if row.switch_every is not None})
    panels: list[Callable[[Axes], None]] = []
    if len(capacities) > 1 or len(intervals) < 2:
        shortest = intervals[0] if intervals else None
        panels.append(lambda ax: _over_capacity(ax, [row for row in rows if row.switch_every == shortest], shortest))
    if len(intervals) > 1:
        panels.append(lambda ax: _over_interval(ax, [row for row in rows if row.replayed.setup.hbm_experts == capacities[0]]))
    figure = Figure(figsize=(WIDTH + 2, 3.6))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax)
        ax.yaxis.set_major_formatter(PERCENT)
    axes[0].set_ylabel("demand hit rate in training")
    legend(axes[-1])
    return figure


def _over_capacity(ax: Axes, rows: Sequence[Row], interval: int | None) -> None:
    _lines(ax, rows, lambda row: row.replayed.setup.hbm_experts / row.num_experts)
    ax.xaxis.set_major_formatter(PERCENT)
    ax.set_xlabel("HBM capacity / experts in the trace")
    ax.set_title("cache ratio" if interval is None else f"cache ratio; switching every {interval:,}")


def _over_interval(ax: Axes, rows: Sequence[Row]) -> None:
    _lines(ax, rows, lambda row: float(row.switch_every or 0))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(COUNTS)
    ax.set_xlabel("accesses between switches of the game")
    ratio = rows[0].replayed.setup.hbm_experts / rows[0].num_experts
    ax.set_title(f"switch interval; HBM for {format_share_short(ratio, digits=0)}")


def _lines(ax: Axes, rows: Sequence[Row], at: Callable[[Row], float]) -> None:
    """Draws the rows' hit rates as a line for each policy and prefetch source. `at` returns a row's place on the x axis."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        setup = row.replayed.setup
        series.setdefault((setup.policy, setup.prefetch.source), []).append((at(row), row.replayed.training.hit_rate))
    for (policy, source), points in series.items():
        colour = _COLOURS[policy] if source == "none" else _SOURCE_COLOURS[source]
        name = _NAMES[policy] if source == "none" else f"{_NAMES[policy]} + {source} prefetch"
        style = "--" if policy == Belady.name else "-" if source == "none" else ":"
        x, y = zip(*sorted(points), strict=True)
        ax.plot(x, y, style, marker="o", markersize=3.5, color=colour, label=name, zorder=3 if policy == Belady.name else 2)

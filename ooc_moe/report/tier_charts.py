"""Draws the charts of the memory tiers: hits, bytes, prefetching, and which experts the games use and share.

Each public function draws one figure of a run, or returns None if the run has not logged what the figure needs. charts.py says how to read
the charts.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ooc_moe.metrics import measures
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.drawing import (
    COUNTS,
    FAINT,
    FATES,
    PERCENT,
    TIERS,
    WIDTH,
    bar_widths,
    byte_axis,
    game_colours,
    heatmap,
    legend,
    mark_games,
    shaded,
)


def hit_rate(record: RunRecord) -> Figure | None:
    """Draws the hit rate of the HBM cache in each update, and how many experts were fetched into the cache from which tier.

    Returns None if the run logged no accesses.
    """
    accesses, hits = record.increments("cache", "accesses"), record.increments("cache", "hits")
    if not np.nansum(accesses):
        return None
    figure = Figure(figsize=(WIDTH, 4.8))
    top, bottom = figure.subplots(2, 1, sharex=True)
    rate = hits / np.where(accesses > 0, accesses, np.nan)
    top.plot(record.steps_U, rate, "o-", markersize=3, color=TIERS["hbm"][1])
    top.set_title("share of expert accesses that HBM served")
    # For a cache that nearly always hits, the axis begins just below the worst update; otherwise its dips would not be visible.
    worst = float(np.nanmin(rate))
    span = 1 - (0 if worst < 0.7 else np.floor(20 * (worst - 0.01)) / 20)
    top.set_ylim(1 - span, 1 + 0.04 * span)
    top.yaxis.set_major_formatter(PERCENT)
    fetched = {TIERS[tier]: record.increments("cache", "fetched_from", tier) for tier in ("dram", "nvme", "seed")}
    _stacked(bottom, record, fetched, "experts fetched into HBM in each update, by where the daemon found them")
    _over_steps((top, bottom), record)
    return figure


def tier_bytes(record: RunRecord) -> Figure | None:
    """Draws the bytes that each tier holds, its capacity, and the bytes moved between tiers. Returns None if no bytes were logged."""
    held = {
        "hbm": record.series("cache", "resident") * record.series("cache", "expert_bytes"),
        "dram": record.series("store", "dram", "used_bytes"),
        "nvme": record.series("store", "nvme", "used_bytes"),
    }
    if all(np.isnan(values).all() for values in held.values()):
        return None
    figure = Figure(figsize=(WIDTH, 5.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for width, (tier, values) in zip(
        (2, 3.6, 1.6), held.items(), strict=True
    ):  # NVMe is drawn last and thin, so that an equal line of DRAM stays visible.
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
            record.steps_U,
            np.nancumsum(record.increments(*path, evaluations=True)),
            color=TIERS[tier][1],
            linestyle=line,
            linewidth=width,
            label=name,
        )
    bottom.set_title("bytes moved since the start")
    for ax in (top, bottom):
        byte_axis(ax)
        legend(ax)
    _over_steps((top, bottom), record)
    return figure


def prefetching(record: RunRecord) -> Figure | None:
    """Draws what became of prefetched experts in each update: how many were useful, late or wasted.

    Useful: in HBM when they were asked for. Late: asked for before they arrived. Wasted: evicted before they were asked for. Returns None
    if nothing was prefetched.
    """
    if not np.nansum(record.increments("cache", "prefetch_issued", evaluations=True)):
        return None
    figure = Figure(figsize=(WIDTH, 2.7))
    ax = figure.subplots()
    fates = {(fate, colour): record.increments("cache", f"prefetch_{fate}", evaluations=True) for fate, colour in FATES.items()}
    _stacked(ax, record, fates, "prefetched experts in each update (and the evaluation before it)")
    _over_steps((ax,), record)
    return figure


def expert_usage(record: RunRecord) -> Figure | None:
    """Draws which experts each game used in training: a row for each game, and a column for each expert.

    The more of the game's tokens the expert computed, the darker the cell. Returns None if the use was not logged.
    """
    counts_GE = record.training_usage()
    if not counts_GE.sum():
        return None
    colours_G3 = np.array([to_rgb(colour) for colour in game_colours(record.games).values()])
    many = len(record.games) > 12
    figure = Figure(figsize=(WIDTH, 1.0 + (0.14 if many else 0.36) * len(record.games)))
    ax = figure.subplots()
    ax.imshow(shaded(np.nan_to_num(measures.usage_shares(counts_GE)), colours_G3), aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(record.games)), record.games, fontsize=6 if many else 10)
    experts = record.num_experts
    for layer in range(1, counts_GE.shape[1] // experts):
        ax.axvline(layer * experts - 0.5, color=FAINT, linewidth=1)
    ax.set_xlabel("expert" if counts_GE.shape[1] == experts else f"expert ({experts} columns for each layer's bank)")
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    return figure


def overlap(record: RunRecord) -> Figure | None:
    """Draws how much every two games use the same experts, in training and in the last evaluation.

    One panel shows how many of their ten most used experts two games have in common, the other panel what share of tokens both games send
    to the same experts.

    Returns None if the use of experts was not logged, or for a run of one game.
    """
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


def _stacked(ax: Axes, record: RunRecord, counts: dict[tuple[str, str], measures.Floats], title: str) -> None:
    """Draws a stacked bar for each update. `counts` holds the parts of the bars: (name, colour) -> the count in each update."""
    below = np.zeros(len(record.steps_U))
    for (name, colour), values in counts.items():
        ax.bar(record.steps_U, np.nan_to_num(values), -bar_widths(record.steps_U), bottom=below, color=colour, label=name, align="edge")
        below += np.nan_to_num(values)
    ax.set_ylim(0, 1.05 * max(1.0, float(below.max())))
    ax.set_title(title)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(COUNTS)
    legend(ax)


def _over_steps(axes: tuple[Axes, ...], record: RunRecord) -> None:
    """Marks on panels, one below the other, which game was trained when.

    The games' names are written above the first panel, and the label of the x axis below the last.
    """
    for ax in axes:
        mark_games(ax, record.spans, game_colours(record.games), named=ax is axes[0])
    axes[-1].set_xlabel("environment steps")

"""Lists the charts of a report in reading order, each with a title, a text on how to read it, and the function that draws it.

The functions are in learning_charts.py and tier_charts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.learning_charts import detector, forgetting, learning_curves, score_matrix
from ooc_moe.report.tier_charts import expert_usage, hit_rate, overlap, prefetching, tier_bytes


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a run's report: its title, the texts around it, and the function that draws it."""

    name: str
    """Name of its PNG file, without the ending."""
    title: str
    reading: str
    """The text that tells how to read the chart."""
    needs: str
    """What a run must have logged, so that the chart can be drawn."""
    draw: Callable[[RunRecord], Figure | None]
    """Draws the chart for a run. Returns None if the run has not logged what the chart needs."""


CHARTS = (
    Chart(
        "score_matrix",
        "Scores after each phase",
        "Read a column downwards to see how one game's mean score changed while other games were learned. The framed cell is the score "
        "right after the game's own training. Above the frame the game was not trained yet; below it the agent had time to forget the "
        "game. White: random play or worse. Dark: the best that this run reached in that game. Grey: not played.",
        "an evaluation",
        score_matrix,
    ),
    Chart(
        "forgetting",
        "Learning and forgetting",
        "The rise from the grey bar to the full-coloured one is what was learned; the drop from there to the pale bar is what was "
        "forgotten. Where nothing was learned, forgetting means nothing. Bars are mean scores with standard errors. The last game has no "
        "pale bar, because nothing was trained after it.",
        "an evaluation",
        forgetting,
    ),
    Chart(
        "learning_curves",
        "Learning curves",
        "The raw score while each game was trained. A dot is an update; the line is the mean of five updates.",
        "an update with rewards",
        learning_curves,
    ),
    Chart(
        "hit_rate",
        "Cache hits",
        "A high rate between the switches (dashed) means that the game's experts fit into HBM. The dip at a switch is the cost of loading "
        "the new game's experts. Note where the axis begins. The lower chart shows the remaining fetches: many at a switch, few within a "
        "game.",
        "an update with cache counters",
        hit_rate,
    ),
    Chart(
        "tier_bytes",
        "Bytes by tier",
        "HBM and DRAM fill up to their capacity and stay full. NVMe grows with each newly trained expert. Bytes out of HBM are trained "
        "experts that were written back.",
        "an update with cache and daemon counters",
        tier_bytes,
    ),
    Chart(
        "prefetching",
        "Prefetching",
        "Useful: the expert was in HBM when it was asked for. Late: it had not arrived yet. Wasted: it was evicted before it was asked "
        "for. The prefetches of the last evaluation are only in the table.",
        "prefetched experts (prefetching may have been off)",
        prefetching,
    ),
    Chart(
        "expert_usage",
        "Expert usage",
        "One row for each game. The darker a cell, the more of the game's tokens that expert computed. A column that is dark in one row "
        "only is an expert that one game uses alone.",
        "an update with routing counts",
        expert_usage,
    ),
    Chart(
        "overlap",
        "Overlap between games",
        "Cells off the diagonal show what two games share. Experts in common: among the ten experts that each game uses most. Mass: the "
        "share of tokens that are routed alike; 0 % is complete separation. In an evaluation the first steps of a game are played with the "
        "experts of the game before it.",
        "the routing counts of two games",
        overlap,
    ),
    Chart(
        "detector",
        "Detector",
        "Left: for each game played, the share of steps in which the agent acted on each belief. A dark diagonal means that the games were "
        "recognised; the first steps of a game are still played as the game before it. Right: the detector's accuracy on the frames of the "
        "current training. It falls at a switch, because the detector has not learned the new game yet.",
        "an evaluation, or an update with detector figures",
        detector,
    ),
)

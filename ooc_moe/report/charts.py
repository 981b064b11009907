"""The report's pictures in order of reading, each with a line on how to read it.

What draws them is in learning_charts.py and tier_charts.py. Knows nothing of HTML and files.
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
    """One picture: its file name, title, a line on how to read it, what it needs, and what draws it."""

    name: str
    title: str
    reading: str
    needs: str
    draw: Callable[[RunRecord], Figure | None]


CHARTS = (
    Chart(
        "score_matrix",
        "Scores after each phase",
        "Read a column downwards: how one game's mean score changed as other games were learned. Framed: right after its own training; "
        "above the frame it was not trained yet, below it there was time to forget it. White is random play or worse, dark the best this "
        "run reached in that game, grey was not played.",
        "an evaluation",
        score_matrix,
    ),
    Chart(
        "forgetting",
        "Learning and forgetting",
        "The step from grey to full colour is what was learned, the drop from there to the pale bar is what was forgotten. Forgetting says "
        "nothing where nothing was learned. Bars are mean scores, with standard errors; the last game has had no time to be forgotten.",
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
        "Useful: the expert was in HBM when asked for. Late: it was still on its way. Wasted: evicted before anybody asked. The last "
        "evaluation's are in the table only.",
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
        "0 % is complete separation. In an evaluation the first steps of a game are played with the experts of the one before it.",
        "the routing counts of two games",
        overlap,
    ),
    Chart(
        "detector",
        "Detector",
        "Left: the share of steps in which each belief was acted on; a dark diagonal means that games were recognised (the first steps of "
        "a game are played as the one before it). Right: how well it knew the frames of the moment in training; it falls at a switch, "
        "because nobody has taught it the new game yet.",
        "an evaluation, or an update with detector figures",
        detector,
    ),
)

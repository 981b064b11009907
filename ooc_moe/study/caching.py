"""Hit rate and stall of games in blocks beside the same steps in turns: as the trainer measured them, and as the simulator replays them.

The simulator replays the trace of the run in blocks, its accesses dealt out anew in turns, through the product's own LRU and through
Belady's optimum, without prefetching; the trainer prefetches, so it may beat Belady.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ooc_moe.config.run import RunConfig
from ooc_moe.metrics.run import RunRecord
from ooc_moe.metrics.trace import Trace, read_trace
from ooc_moe.simulate.replay import Setup, replay
from ooc_moe.simulate.synthetic_traces import with_turns
from ooc_moe.study.scores import StudyScores


class Way(Enum):
    """How a point was found."""

    TRAINER = "trainer"
    SIMULATOR = "simulator"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachingPoint:
    """One HBM capacity and one switch interval."""

    way: Way
    hbm_experts: int
    bank_experts: int
    switch_every: int | None
    """Updates in a game before the next one's turn; None: games in blocks."""
    accesses: int
    hit_rate: float
    belady: float
    """Belady's hit rate for the same accesses; NaN for the trainer, whose accesses in turns were not recorded."""
    stall_s: float


def caching_points(found: StudyScores) -> list[CachingPoint]:
    """All points of a study that has runs with HBMs of several sizes; none for one that recorded no trace."""
    traced = next((record for record in found.records.values() if _trace_of(record) is not None), None)
    if traced is None:
        return []
    measured = [_measured(record) for record in found.records.values()]
    intervals = sorted({point.switch_every for point in measured if point.switch_every}, reverse=True)
    sizes = sorted({point.hbm_experts for point in measured}, reverse=True)
    path = _trace_of(traced)
    assert path is not None
    return measured + _simulated(read_trace(path), RunConfig.read(traced.run_dir), sizes, [None, *intervals])


def _trace_of(record: RunRecord) -> Path | None:
    trace = record.config.get("trace")
    # Beside the run, wherever the run is now.
    return None if trace is None else record.run_dir / Path(trace).name


def _measured(record: RunRecord) -> CachingPoint:
    config = RunConfig.read(record.run_dir)
    accesses = record.total("cache", "accesses")
    return CachingPoint(
        way=Way.TRAINER,
        hbm_experts=config.agent.hbm_experts,
        bank_experts=record.num_experts,
        switch_every=config.switch_every or None,
        accesses=int(accesses),
        hit_rate=record.total("cache", "hits") / accesses,
        belady=float("nan"),
        stall_s=record.total("cache", "stall_s"),
    )


def _simulated(trace: Trace, config: RunConfig, sizes: list[int], intervals: list[int | None]) -> list[CachingPoint]:
    updates = len(config.games) * config.updates_per_game
    training = with_turns(trace, len(trace.keys_A))  # Evaluation left out.
    per_update = max(1, round(len(training.keys_A) / updates))
    points = []
    for every in intervals:
        played = training if every is None else with_turns(trace, every * per_update)
        for hbm in sizes:
            lru, best = (replay(played, Setup(hbm_experts=hbm, policy=policy)).training for policy in ("lru", "belady"))
            points.append(
                CachingPoint(
                    way=Way.SIMULATOR,
                    hbm_experts=hbm,
                    bank_experts=trace.num_experts,
                    switch_every=every,
                    accesses=lru.accesses,
                    hit_rate=lru.hit_rate,
                    belady=best.hit_rate,
                    stall_s=lru.stall_s,
                )
            )
    return points

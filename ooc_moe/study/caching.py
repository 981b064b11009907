"""Hit rates and stalls when games come in blocks, compared with the same steps when games take turns; measured and simulated.

In blocks, all training in one game is done before the next game begins. In turns, the trainer switches games every few updates:

    blocks      AAAAAAAA BBBBBBBB
    turns of 2  AA BB AA BB AA BB AA BB

The trainer measured blocks and turns in separate runs. The simulator takes the recorded accesses (the trace) of a run in blocks, reorders
them into turns, and replays them through the trainer's own LRU policy and through Belady's optimum. It does not prefetch. The trainer
prefetches, so it may beat Belady.
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
    """The way in which the hit rate and stall of a `CachingPoint` were found: measured by the trainer, or computed by the simulator."""

    TRAINER = "trainer"
    SIMULATOR = "simulator"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachingPoint:
    """One measurement or simulation of the caching study: how well a cache of one size works when games switch at one interval.

    `hit_rate` is the share of `accesses` whose expert was in HBM, and `stall_s` the seconds that the other accesses waited for experts. HBM
    has room for `hbm_experts` of the `bank_experts` experts.
    """

    way: Way
    hbm_experts: int
    bank_experts: int
    switch_every: int | None
    """How many updates a game gets before the trainer switches to the next one; None: games in blocks."""
    accesses: int
    hit_rate: float
    belady: float
    """The hit rate of Belady's optimum for the same accesses. NaN for the trainer, because its accesses in turns were not recorded."""
    stall_s: float


def caching_points(found: StudyScores) -> list[CachingPoint]:
    """Returns the hit rates and stalls that the runs measured, then simulated ones for the same HBM capacities and switch intervals.

    The simulator replays the recorded accesses (the trace) of one run. If no run has a trace, the list is empty: measured values are left
    out, too.
    """
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
    # The trace is in the run's directory, wherever that directory is now.
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
    training = with_turns(trace, len(trace.keys_A))  # Without the accesses of evaluations.
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

"""What each variant costs: parameters, bytes, fetches, time.

Of a variant that has a network for each game, all networks together; but of HBM what one of them takes, for one is used at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ooc_moe.config.run import RunConfig
from ooc_moe.metrics import measures
from ooc_moe.metrics.measures import Floats
from ooc_moe.metrics.run import RunRecord
from ooc_moe.session import checkpoint
from ooc_moe.study.scores import StudyScores

_FETCHED_FROM = ("dram", "nvme", "seed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Means over the runs of a variant; NaN where nothing was logged."""

    parameters: float
    dense_parameters: float
    """Of `parameters`, those outside experts."""
    hbm_bytes: float
    """What the cache of experts can hold."""
    protection_bytes: float
    """What protection keeps at the end: frames and what the network said of them, or Fisher matrices and anchors."""
    exemplar_bytes: float
    """The frames of every game that the detector keeps, whatever the protection."""
    moved_bytes: float
    """In and out of HBM, training and evaluation."""
    fetched: float
    """Experts brought into HBM while training, on demand or ahead."""
    cold_share: float
    """Of the tokens of a game's training, those computed by experts that an earlier game had used; the mean over games after the first.
    NaN where games take turns, for there none is earlier."""
    cold_fetched: float
    """Of `fetched`, the experts that an earlier game had used; NaN where fetches were not logged by expert, or games take turns."""
    cold_equal: int
    """Experts equal bit for bit after a game that did not use them, or only borrowed them, in all runs together."""
    cold: int
    """Of so many: see measures.cold_unchanged."""
    cold_runs: int
    """Of so many runs: the others logged no checksums."""
    train_s: float
    steps_per_s: float
    stall_s: float


def costs_by_variant(found: StudyScores) -> dict[str, Costs]:
    """The costs of each variant that has a finished run."""
    return {name: costs_of(found, name) for name in found.variants}


def costs_of(found: StudyScores, variant: str) -> Costs:
    """The costs of one variant."""
    networks = len(found.study.games) if found.study.variants[variant].alone else 1
    records = list(found.of(variant).values())
    rows = [_costs_of_run(record) for record in records]

    def mean(name: str) -> float:
        return measures.mean([getattr(row, name) for row in rows])

    sums = ("parameters", "dense_parameters", "protection_bytes", "exemplar_bytes", "moved_bytes", "fetched", "cold_fetched")
    return Costs(
        **{name: networks * mean(name) for name in (*sums, "train_s", "stall_s")},
        hbm_bytes=mean("hbm_bytes"),
        cold_share=mean("cold_share"),
        cold_equal=sum(row.cold_equal for row in rows),
        cold=sum(row.cold for row in rows),
        cold_runs=sum(row.cold_runs for row in rows),
        steps_per_s=mean("steps_per_s"),
    )


def _costs_of_run(record: RunRecord) -> Costs:
    config = RunConfig.read(record.run_dir)
    speed = record.series("steps_per_s")
    speed = speed[~np.isnan(speed)]
    agent = replace(config.agent, num_games=len(record.games), num_experts=record.num_experts)
    fetched = sum(np.nansum(record.increments("cache", "fetched_from", tier)) for tier in _FETCHED_FROM)
    protection_bytes, exemplar_bytes = _kept(record.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST)
    size = agent.estimate_params()
    return Costs(
        parameters=size.total,
        dense_parameters=size.dense,
        hbm_bytes=record.last("cache", "capacity") * record.last("cache", "expert_bytes"),
        protection_bytes=protection_bytes,
        exemplar_bytes=exemplar_bytes,
        moved_bytes=record.total("cache", "bytes_in") + record.total("cache", "bytes_out"),
        fetched=float(fetched),
        cold_share=cold_share(record),
        cold_fetched=cold_fetched(record),
        cold_equal=record.cold_unchanged[0],
        cold=record.cold_unchanged[1],
        cold_runs=int(record.cold_unchanged[1] > 0),
        train_s=float(np.sum(config.steps_per_update / speed)) if len(speed) else float("nan"),
        steps_per_s=float(np.median(speed)) if len(speed) else float("nan"),
        stall_s=float(np.nansum(record.increments("cache", "stall_s"))),
    )


def _kept(path: Path) -> tuple[float, float]:
    """Bytes that protection and the detector keep, as the dense file of a checkpoint has them; NaN where there is none."""
    if not path.exists():
        return float("nan"), float("nan")
    state = checkpoint.load(path).state
    return _num_bytes(state["protection"]), _num_bytes(state["detector"]["_extra_state"]["stored"])


def _num_bytes(state: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_num_bytes, parts))


def cold_share(record: RunRecord) -> float:
    """The mean over games, the first left out, of the share of a game's tokens that went to experts which an earlier game had used."""
    if record.config.get("switch_every"):
        return float("nan")
    usage_GE = record.training_usage()
    earlier_GE = _used_earlier(usage_GE)
    shares = [
        float(usage_E[earlier_E].sum() / usage_E.sum()) for usage_E, earlier_E in zip(usage_GE, earlier_GE, strict=True) if usage_E.sum()
    ]
    return measures.mean(shares[1:]) if len(shares) > 1 else float("nan")


def cold_fetched(record: RunRecord) -> float:
    """How often an expert came into HBM, on demand or ahead, while a game was trained before which another game had used it."""
    if record.config.get("switch_every") or not any("fetches" in event for event in record.updates):
        return float("nan")
    return float(record.training_fetches()[_used_earlier(record.training_usage())].sum())


def _used_earlier(usage_GE: Floats) -> NDArray[np.bool_]:
    """(G, E) whether an earlier game used the expert."""
    return np.asarray(np.cumsum(usage_GE, axis=0) - usage_GE > 0)

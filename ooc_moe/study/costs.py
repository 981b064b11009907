"""Computes what each variant of a study costs: parameters, bytes stored and moved, fetches of experts, and time.

Where a variant has a network for each game, the costs of all its networks are added up. Only the bytes of HBM are those of one network,
because one network is used at a time.
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
    """The costs of a variant, as means over its runs. A field is NaN if the runs did not log the numbers it is computed from.

    `train_s`: seconds of training. `steps_per_s`: environment steps per second. `stall_s`: seconds of training spent waiting for experts.
    """

    parameters: float
    dense_parameters: float
    """How many of the `parameters` are outside experts."""
    hbm_bytes: float
    """The capacity of the cache of experts in HBM."""
    protection_bytes: float
    """Bytes that the method against forgetting (replay, cloning or EWC) stores at the end of the run.

    These are frames and the network's outputs for them, or Fisher matrices and copies of old parameters.
    """
    exemplar_bytes: float
    """Bytes of the example frames of each game that the detector stores, whatever the method against forgetting is."""
    moved_bytes: float
    """Bytes moved into and out of HBM, in training and evaluation."""
    fetched: float
    """How often an expert was brought into HBM in training, on demand or ahead."""
    cold_share: float
    """The share of a game's training tokens that cold experts computed. Cold experts are those that an earlier game had used.

    The mean over all games but the first. NaN where games take turns, because then no game is earlier.
    """
    cold_fetched: float
    """How many of the `fetched` were cold experts. NaN where fetches were not logged by expert, or where games take turns."""
    cold_equal: int
    """How many of the `cold` experts stayed equal bit for bit while another game was trained; the sum over all runs."""
    cold: int
    """How many experts of earlier games were checked for changes while another game was trained; the sum over all runs.

    They are those that this game does not use, or only borrows (reads). They should stay unchanged. See measures.cold_unchanged.
    """
    cold_runs: int
    """How many runs logged the checksums from which `cold` and `cold_equal` are counted."""
    train_s: float
    steps_per_s: float
    stall_s: float


def costs_by_variant(found: StudyScores) -> dict[str, Costs]:
    """Returns, by variant, the costs of all variants that have a finished run."""
    return {name: costs_of(found, name) for name in found.variants}


def costs_of(found: StudyScores, variant: str) -> Costs:
    """Returns the costs of one variant: means over its runs, times the number of its networks if it has one for each game."""
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
    protection_bytes, exemplar_bytes = _stored_bytes(record.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST)
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


def _stored_bytes(path: Path) -> tuple[float, float]:
    """Returns how many bytes the method against forgetting stores, then how many the detector stores. NaN if there is no checkpoint.

    `path` is a checkpoint's file of everything but experts. The file holds the state of the method and of the detector.
    """
    if not path.exists():
        return float("nan"), float("nan")
    state = checkpoint.load(path).state
    return _num_bytes(state["protection"]), _num_bytes(state["detector"]["_extra_state"]["stored"])


def _num_bytes(state: Any) -> int:
    """Adds up the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(_num_bytes, parts))


def cold_share(record: RunRecord) -> float:
    """Returns the share of a game's training tokens that went to cold experts, those that an earlier game had used.

    It is the mean over all games but the first. NaN where games take turns, or with fewer than two games.
    """
    if record.config.get("switch_every"):
        return float("nan")
    usage_GE = record.training_usage()
    earlier_GE = _used_earlier(usage_GE)
    shares = [
        float(usage_E[earlier_E].sum() / usage_E.sum()) for usage_E, earlier_E in zip(usage_GE, earlier_GE, strict=True) if usage_E.sum()
    ]
    return measures.mean(shares[1:]) if len(shares) > 1 else float("nan")


def cold_fetched(record: RunRecord) -> float:
    """Counts how often cold experts, those that an earlier game had used, were fetched into HBM while a later game was trained.

    Fetches on demand and fetches ahead of use both count. NaN where games take turns, or where fetches were not logged by expert.
    """
    if record.config.get("switch_every") or not any("fetches" in event for event in record.updates):
        return float("nan")
    return float(record.training_fetches()[_used_earlier(record.training_usage())].sum())


def _used_earlier(usage_GE: Floats) -> NDArray[np.bool_]:
    """Returns, for each game G and expert E, whether a game that was trained before G used E: (G, E)."""
    return np.asarray(np.cumsum(usage_GE, axis=0) - usage_GE > 0)

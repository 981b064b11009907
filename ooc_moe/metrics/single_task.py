"""Reads single-task scores, the scores of agents that each learned one game alone. Reports show the scores of other runs as shares of
single-task scores.

A study computes the same scale from its own runs (study/scores.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ooc_moe.metrics import measures
from ooc_moe.metrics.run import RunRecord
from ooc_moe_wire.errors import InvalidRequest

# Settings that a run and a single-task run must share to be compared. Seeds may differ: the scores of several seeds are averaged.
_PROTOCOL = ("steps_per_game", "eval_envs", "eval_episodes", "eval_steps")


def with_single_task(record: RunRecord, run_dirs: Sequence[Path]) -> RunRecord:
    """Adds single-task scores to a run's record: returns a copy of `record` with its field `single_task` filled.

    The score of a game is the mean final return of the runs in `run_dirs` that learned this game alone.

    Raises:
        InvalidRequest: a run learned several games, or a game that `record` lacks; is not finished or not evaluated; or was trained or
            evaluated with other settings than `record`.
    """
    found: dict[str, list[float]] = {}
    for run_dir in run_dirs:
        single = RunRecord.read(run_dir)
        _check(single, record)
        found.setdefault(single.games[0], []).extend(event["return_mean"] for event in single.last_evaluations)
    return dataclasses.replace(record, single_task={game: measures.mean(means) for game, means in found.items()})


def _check(single: RunRecord, record: RunRecord) -> None:
    run_dir, games = single.run_dir, ", ".join(single.schedule)
    if len(single.schedule) != 1:
        raise InvalidRequest(f"single_task: {run_dir} learned {games or 'nothing'}, not one game alone")
    if games not in record.games:
        raise InvalidRequest(f"single_task: {run_dir} learned {games}, which {record.name} did not learn")
    for name in _PROTOCOL:
        if single.config.get(name) != record.config.get(name):
            raise InvalidRequest(
                f"single_task: {run_dir} has {name} {single.config.get(name)}, {record.name} has {record.config.get(name)}"
            )
    if not single.done or not single.last_evaluations:
        raise InvalidRequest(f"single_task: {run_dir} is not finished and evaluated")

"""What a network of its own learns of each game, read from runs of single games: the scale of a run on which training alone is 100 %.

summary.py and report.py show it; a study has the same scale, from runs of its own (study/scores.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ooc_moe.metrics import measures
from ooc_moe.metrics.run import RunRecord
from ooc_moe_wire.errors import InvalidRequest

# What a run and its measure must have in common. Seeds may differ: several of a game are averaged.
_PROTOCOL = ("steps_per_game", "eval_envs", "eval_episodes", "eval_steps")


def with_single_task(record: RunRecord, run_dirs: Sequence[Path]) -> RunRecord:
    """The same record, which knows the mean return of each game at the end of the runs that learned nothing else.

    Raises:
        InvalidRequest: one of them is no such run: it learned several games, or another one, is not finished, was not evaluated, or was
            trained or evaluated otherwise than `record`.
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
        raise InvalidRequest(f"single_task: {run_dir} learned {games}, which is none of the games of {record.name}")
    for name in _PROTOCOL:
        if single.config.get(name) != record.config.get(name):
            raise InvalidRequest(
                f"single_task: {run_dir} has {name} {single.config.get(name)}, {record.name} has {record.config.get(name)}"
            )
    if not single.done or not single.last_evaluations:
        raise InvalidRequest(f"single_task: {run_dir} is not finished and evaluated")

"""Reads the finished runs of a study and judges them. A study whose runs are not all finished has results too, with a list of the missing
runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ooc_moe.display.table import Table
from ooc_moe.metrics.run import RunRecord
from ooc_moe.study import verdicts
from ooc_moe.study.caching import CachingPoint, caching_points
from ooc_moe.study.costs import Costs, costs_by_variant
from ooc_moe.study.runner import State, state_of, steps_done, steps_of
from ooc_moe.study.scores import StudyScores
from ooc_moe.study.study import Study, StudyRun
from ooc_moe.study.tables import tables
from ooc_moe.study.verdicts import Separation, Verdict
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Everything that the finished runs of a study show.

    `found` has the runs with their scores, `costs` the costs by variant, `verdicts` whether each part of the claim holds, `separated` how
    differently games use experts in each run with plain token routing, and `points` the hit rates and stalls of the caching study.
    """

    found: StudyScores
    costs: Mapping[str, Costs]
    tables: list[Table]
    verdicts: list[Verdict]
    separated: list[Separation]
    points: list[CachingPoint]


def collect(study: Study, runs: Sequence[StudyRun], constants: Mapping[str, float]) -> StudyScores:
    """Reads the finished runs among `runs`, and notes why each of the other runs is missing.

    Args:
        study: the study that the runs belong to.
        runs: the runs to look for.
        constants: by game, the mean raw return of the best constant action.
    """
    records: dict[StudyRun, RunRecord] = {}
    missing: dict[StudyRun, str] = {}
    for run in runs:
        try:
            state = state_of(run.config)
        except InvalidRequest as error:
            missing[run] = str(error).partition(": ")[2]  # Leaves out the run's directory, which says nothing on other machines.
            continue
        if state is State.DONE:
            records[run] = RunRecord.read(run.config.run_dir)
        else:
            missing[run] = f"{state.value}, {steps_done(run.config.run_dir):,} of {steps_of(run.config):,} steps"
    return StudyScores(study, records, missing, constants)


def results_of(study: Study, runs: Sequence[StudyRun], constants: Mapping[str, float]) -> Results:
    """Reads the finished runs among `runs`, computes all tables, and judges each part of the claim.

    The arguments are explained at `collect`.
    """
    found = collect(study, runs, constants)
    costs, separated, points = costs_by_variant(found), verdicts.separations(found), caching_points(found)
    judged = (
        verdicts.separation(found, separated),
        verdicts.caching(points, study.recipe.agent.pool_size),
        verdicts.protection(found),
    )
    shorter = _remark_on_shorter_runs(found)
    return Results(
        found=found,
        costs=costs,
        tables=tables(found, costs, separated, points),
        verdicts=[replace(each, says=each.says + shorter) for each in judged if each is not None],
        separated=separated,
        points=points,
    )


def _remark_on_shorter_runs(found: StudyScores) -> str:
    """Returns a sentence to add to each verdict if runs were made with fewer steps than the study's own; otherwise ""."""
    study = found.study
    for run in found.records:
        steps, own = run.config.steps_per_game, study.variants[run.variant].change(study.recipe).steps_per_game
        if steps < own:
            return f" Runs are shorter than the study's own: {steps:,} steps in each game, not {own:,}."
    return ""

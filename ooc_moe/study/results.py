"""Reads a study's runs and writes its results: NAME.md (tables, verdicts, what made them), NAME_*.png, and NAME.json with every number.

A study that is not finished is written as far as it is, with what is missing.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from ooc_moe.metrics import measures
from ooc_moe.metrics.provenance import facts
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.drawing import STYLE
from ooc_moe.report.text_table import TextTable
from ooc_moe.study import verdicts
from ooc_moe.study.caching import CachingPoint, caching_points
from ooc_moe.study.costs import Costs, costs_by_variant
from ooc_moe.study.figures import figures
from ooc_moe.study.runner import State, state_of, steps_done, steps_of
from ooc_moe.study.scores import MEASURES, RAW_MEASURES, Cell, StudyScores
from ooc_moe.study.study import Study, StudyRun
from ooc_moe.study.tables import tables
from ooc_moe.study.verdicts import Separation, Verdict
from ooc_moe_wire.errors import InvalidRequest

NOTES = "## Notes"
_FIGURES = {
    "measures": "Every run a point, the mean of its games; the cross is the mean with its 95 % interval.",
    "games": "What became of each game from the end of its own training on: a falling line is forgetting. Bold: the mean; thin: every run.",
    "hits": "What it costs when games do not stay; all axes are logarithmic. Lines of two sizes lie on each other where the larger buys "
    "nothing.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What a study shows so far."""

    found: StudyScores
    costs: Mapping[str, Costs]
    tables: list[TextTable]
    verdicts: list[Verdict]
    separated: list[Separation]
    points: list[CachingPoint]


def collect(study: Study, runs: Sequence[StudyRun], constants: Mapping[str, float]) -> StudyScores:
    """The finished ones among `runs`, and why the others are missing. `constants`: the best constant action's mean return by game."""
    records: dict[StudyRun, RunRecord] = {}
    missing: dict[StudyRun, str] = {}
    for run in runs:
        try:
            state = state_of(run.config)
        except InvalidRequest as error:
            missing[run] = str(error).partition(": ")[2]  # Without the place on this machine.
            continue
        if state is State.DONE:
            records[run] = RunRecord.read(run.config.run_dir)
        else:
            missing[run] = f"{state.value}, {steps_done(run.config.run_dir):,} of {steps_of(run.config):,} steps"
    return StudyScores(study, records, missing, constants)


def results_of(study: Study, runs: Sequence[StudyRun], constants: Mapping[str, float]) -> Results:
    """Reads the runs and judges them."""
    found = collect(study, runs, constants)
    costs, separated, points = costs_by_variant(found), verdicts.separations(found), caching_points(found)
    spoken = (
        verdicts.separation(found, separated),
        verdicts.caching(points, study.recipe.agent.pool_size),
        verdicts.protection(found),
    )
    shorter = _shorter(found)
    return Results(
        found=found,
        costs=costs,
        tables=tables(found, costs, separated, points),
        verdicts=[replace(each, says=each.says + shorter) for each in spoken if each is not None],
        separated=separated,
        points=points,
    )


def _shorter(found: StudyScores) -> str:
    """What a verdict adds where runs were made with fewer steps than the study's."""
    study = found.study
    for run in found.records:
        steps, own = run.config.steps_per_game, study.variants[run.variant].change(study.recipe).steps_per_game
        if steps < own:
            return f" Runs are shorter than the study's own: {steps:,} steps in each game, not {own:,}."
    return ""


def write(results: Results, directory: Path, *, command: str) -> list[Path]:
    """Writes everything; returns the files. What an older NAME.md says under "Notes" stays."""
    study = results.found.study
    described = facts(Path(), command=command) | {"torch": importlib.metadata.version("torch")}  # Before a file of the checkout changes.
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    pictures = []
    with mpl.rc_context(STYLE):
        for name, figure in figures(results.found, results.points).items():
            path = directory / f"{study.name}_{name}.png"
            figure.savefig(path, format="png")
            paths.append(path)
            pictures.append(f"![{name}]({path.name})\n\n{_FIGURES[name]}")
    page = directory / f"{study.name}.md"
    page.write_text(_markdown(results, described, pictures, _notes_of(page)))
    numbers = directory / f"{study.name}.json"
    numbers.write_text(json.dumps(_plain(_numbers(results, described)), separators=(",", ":")) + "\n")
    return [page, numbers, *paths]


def _markdown(results: Results, described: dict[str, str], pictures: Sequence[str], notes: str) -> str:
    found = results.found
    study = found.study
    done, missing = len(found.records), len(found.missing)
    lines = [f"# ooc-moe study {study.name}", "", study.asks, ""]
    lines += [f"- {name}: {value}" for name, value in described.items()]
    lines += [f"- runs: {done} of {done + missing} are done" + (" (**not finished**: see the end)" if missing else "")]
    lines += [
        f"- made by: {who} ({count} runs)" for who, count in Counter(record.made_by for record in found.records.values()).items() if who
    ]
    lines += ["", "## Verdicts", ""]
    lines += [f"- **{each.part}: {each.word}.** {_sentence(each.says)}" for each in results.verdicts] or ["This study gives none."]
    lines += ["", f"The rules are in ooc_moe/study/verdicts.py. What this does not show: {study.limits}", "", notes.rstrip(), ""]
    lines += ["## Variants", "", *(f"- {name}: {study.variants[name].says}" for name in study.seeds), ""]
    lines += ["\n\n".join(pictures), ""] if pictures else []
    for table in results.tables:
        lines += [f"## {table.title}", "", *_markdown_table(table), "", table.note, ""]
    if found.missing:
        lines += ["## Missing", "", *(f"- {run.label}: {why}" for run, why in found.missing.items()), ""]
    configured, label = _configured(found)
    lines += [f"## The configuration of {label}", "", "```json", configured, "```", ""]
    return "\n".join(lines)


def _markdown_table(table: TextTable) -> list[str]:
    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    return [f"| {' | '.join(table.columns)} |", rule, *(f"| {' | '.join(row)} |" for row in table.rows)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _configured(found: StudyScores) -> tuple[str, str]:
    """The configuration of the first run of the most important variant that has one, as it was made, and which run that is."""
    study = found.study
    run = next((run for name in found.variants for run in found.of(name)), None)
    fields = json.loads((run.config if run else study.recipe).to_json())
    del fields["games"], fields["seed"], fields["trace"]
    fields |= {"orders": study.orders, "seeds": study.seeds}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return f"{{\n{lines}\n}}", run.label if run else "the full recipe"


def _notes_of(page: Path) -> str:
    if page.exists():
        _, found, below = page.read_text().partition(NOTES)
        if found:
            return found + below.partition("\n## ")[0]
    return f"{NOTES}\n\n(to be written: what it means)"


def _numbers(results: Results, described: dict[str, str]) -> dict[str, Any]:
    found = results.found
    return {
        "study": found.study.name,
        "facts": described,
        "verdicts": [asdict(each) for each in results.verdicts],
        "games": {game: asdict(each) for game, each in found.facts.items()},
        "costs": {name: asdict(cost) for name, cost in results.costs.items()},
        "caching": [asdict(point) | {"way": point.way.value} for point in results.points],
        "separation": [
            {"variant": each.run.variant, "order": each.run.order, "seed": each.run.config.seed}
            | {"within": each.within, "between": each.between, "p": each.p}
            | {"pairs": [[*pair, *values] for pair, values in each.pairs.items()]}
            for each in results.separated
        ],
        "measures": {
            variant: {name: _by_run(found.cells(variant, name)) for name in (*MEASURES, *RAW_MEASURES)} for variant in found.variants
        },
        "runs": [_numbers_of_run(run, record) for run, record in found.records.items()],
        "missing": {run.label: why for run, why in found.missing.items()},
    }


def _numbers_of_run(run: StudyRun, record: RunRecord) -> dict[str, Any]:
    scores = record.scores
    return {
        "variant": run.variant,
        "order": run.order,
        "seed": run.config.seed,
        "made_by": record.made_by,
        "games": scores.games,
        "trained": scores.trained_P,
        "mean_returns": scores.mean_PG,
        "random": scores.random_G,
        "untrained": scores.untrained_G,
        "last_evaluation": [
            {key: value for key, value in event.items() if key not in ("usage", "usage_by_env", "cache", "time")}
            for event in record.last_evaluations
        ],
        "training_mass_in_common": measures.mass_overlap(record.training_usage()),
    }


def _by_run(cells: Sequence[Cell]) -> dict[str, dict[int, dict[str, float]]]:
    """Order -> seed -> game -> value."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for cell in cells:
        found.setdefault(cell.order, {}).setdefault(cell.seed, {})[cell.game] = cell.value
    return found


def _plain(value: Any) -> Any:
    """In types that JSON has, with six digits; NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value

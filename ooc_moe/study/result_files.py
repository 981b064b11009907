"""Writes the results of a study as files. NAME is the study's name.

NAME.md      verdicts, figures, tables, and how they were made
NAME_*.png   the figures
NAME.json    every number
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from ooc_moe.display.table import markdown_table
from ooc_moe.metrics import measures
from ooc_moe.metrics.provenance import facts
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report.drawing import STYLE
from ooc_moe.study.figures import figures
from ooc_moe.study.results import Results
from ooc_moe.study.scores import MEASURES, RAW_MEASURES, Cell, StudyScores
from ooc_moe.study.study import StudyRun

NOTES = "## Notes"
_CAPTIONS = {
    "measures": "Every point is a run, as the mean over its games; the cross is the mean over runs with its 95 % interval.",
    "games": "The score of each game from the end of its own training on: a falling line is forgetting. Bold: the mean; thin: every run.",
    "hits": "What it costs when games take turns; all axes are logarithmic. The lines of two sizes coincide where the larger size gains "
    "nothing.",
}


def write(results: Results, directory: Path, *, command: str) -> list[Path]:
    """Writes page, figures and numbers of a study into `directory`, and returns the paths of all files.

    `command` is named on the page. The text under "Notes" of an existing page is kept.
    """
    study = results.found.study
    # Before any file is written: a results file inside the checkout would make it report uncommitted changes.
    described = facts(Path(), command=command) | {"torch": importlib.metadata.version("torch")}
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    figure_blocks = []
    with mpl.rc_context(STYLE):
        for name, figure in figures(results.found, results.points).items():
            path = directory / f"{study.name}_{name}.png"
            figure.savefig(path, format="png")
            paths.append(path)
            figure_blocks.append(f"![{name}]({path.name})\n\n{_CAPTIONS[name]}")
    page = directory / f"{study.name}.md"
    page.write_text(_markdown(results, described, figure_blocks, _notes_of(page)))
    numbers = directory / f"{study.name}.json"
    numbers.write_text(json.dumps(_plain(_numbers(results, described)), separators=(",", ":")) + "\n")
    return [page, numbers, *paths]


def _markdown(results: Results, described: dict[str, str], figure_blocks: Sequence[str], notes: str) -> str:
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
    lines += ["\n\n".join(figure_blocks), ""] if figure_blocks else []
    for table in results.tables:
        lines += [f"## {table.title}", "", markdown_table(table), "", table.note, ""]
    if found.missing:
        lines += ["## Missing", "", *(f"- {run.label}: {why}" for run, why in found.missing.items()), ""]
    configured, label = _configured(found)
    lines += [f"## The configuration of {label}", "", "```json", configured, "```", ""]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _configured(found: StudyScores) -> tuple[str, str]:
    """Returns the configuration that the page shows, as JSON, and the name of the run that has it.

    The run is the first finished one of the most important variant. Without a finished run, the study's recipe is returned.
    """
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
    """Nests the values of the cells: order -> seed -> game -> value."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for cell in cells:
        found.setdefault(cell.order, {}).setdefault(cell.seed, {})[cell.game] = cell.value
    return found


def _plain(value: Any) -> Any:
    """Converts `value`, nested as it may be, to types that JSON has. Floats are rounded to six digits; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value

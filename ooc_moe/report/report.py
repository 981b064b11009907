"""Writes a run's report, one self-contained HTML file with its charts as PNG files next to it; and prints the same tables on a terminal.

    ooc-moe report runs/NAME

Everything is read from the run's directory (config.json, metrics.jsonl), so a report can be written at any time, even while the run is in
progress. charts.py draws the charts, summary.py and tier_tables.py make the texts and tables, and this module puts all on a page.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from rich.console import Console

from ooc_moe.display.table import Table, html_table, print_table
from ooc_moe.metrics.run import RunRecord
from ooc_moe.metrics.single_task import with_single_task
from ooc_moe.report import summary, tier_tables
from ooc_moe.report.charts import CHARTS, Chart
from ooc_moe.report.drawing import STYLE


@dataclass(frozen=True, slots=True)
class _Part:
    """A section of the page: a question about the run, and the tables and the names of the charts that answer it."""

    question: str
    tables: tuple[Callable[[RunRecord], Table], ...]
    charts: tuple[str, ...]


_PARTS = (
    _Part(
        "What was learned, and what was kept?",
        (summary.score_table, summary.single_task_table, summary.measures_table),
        ("score_matrix", "forgetting", "learning_curves"),
    ),
    _Part("Did the experts of a game fit into HBM?", (tier_tables.tier_table,), ("hit_rate", "tier_bytes")),
    _Part("Were experts in HBM before they were needed?", (tier_tables.prefetch_table,), ("prefetching",)),
    _Part("Did each game use experts of its own?", (tier_tables.overlap_table,), ("expert_usage", "overlap")),
    _Part("Was the game on the screen recognised?", (summary.detector_table,), ("detector",)),
)

_GLOSSARY = (
    ("Expert", "one of many small networks that share the work; the agent uses a few of them for each frame."),
    ("HBM, DRAM, NVMe", "where experts are kept: the accelerator's memory (the host's in a run on a CPU), the daemon's memory, its disk."),
    ("Seed", "the number from which the first values of an expert are computed; an expert that was never trained is stored nowhere."),
    ("Daemon", "the storage process that keeps all experts, and sends and receives them."),
    ("Environment step", "one action in one copy of a game; an update learns from hundreds or thousands of steps."),
    ("Phase", "the time in which one game was learned; a game that comes back has several phases."),
    ("Detector", "the network that tells from the frames which game is on the screen."),
    (
        "Nearest mean",
        "a simple method to compare the detector with: it takes the known game whose average frame is closest, in random features.",
    ),
    ("Score, return", "the points of one episode, which is one play of a game from its start to its end."),
    ("Token", "one frame on its way through the network."),
    ("Pool", "the experts that belong to a game."),
    (
        "Cold expert",
        "an expert that was trained for an earlier game and is not trained now. It should not change; this is checked after each game.",
    ),
)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A chart of the page and its picture as PNG in base64, which is "" if the run has not logged what the chart needs."""

    chart: Chart
    png_base64: str


def write_report(run_dir: Path, single_task: Sequence[Path] = ()) -> Path:
    """Writes a run's report: `run_dir/report/index.html` and a PNG file for each chart next to it. Returns the path of the HTML file.

    Args:
        run_dir: the run's directory.
        single_task: directories of runs that each learned one of the run's games alone. The report shows the run's scores as shares of
            theirs.

    Raises:
        InvalidRequest: the directory holds no run, or a damaged one; or a run in `single_task` cannot be compared with it.
    """
    record = with_single_task(RunRecord.read(run_dir), single_task)
    directory = run_dir / "report"
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {chart.name: _picture(chart, record, directory) for chart in CHARTS}
    page = _template().render(
        record=record,
        headline=summary.headline(record),
        missing=summary.missing(record),
        facts=summary.facts(record),
        glossary=_GLOSSARY,
        html_table=html_table,
        parts=[
            {
                "question": part.question,
                "tables": [table for make in part.tables if (table := make(record)).rows or make is not summary.single_task_table],
                "pictures": [pictures[name] for name in part.charts],
            }
            for part in _PARTS
        ],
        settings=list(_flattened(record.config)),
        started=_clock(record.events[0]["time"]) if record.events else "",
        written=_clock(time.time()),
    )
    path = directory / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def print_summary(run_dir: Path, console: Console) -> None:
    """Prints the tables that summarise a run. Before them, prints what is missing if the run is not finished.

    Raises:
        InvalidRequest: the directory holds no run, or a damaged one.
    """
    record = RunRecord.read(run_dir)
    for notice in summary.missing(record):
        console.print(notice, style="yellow", markup=False, highlight=False)
    for table in summary.tables(record):
        if table.rows:
            print_table(table, console)
            console.print()


def _picture(chart: Chart, record: RunRecord, directory: Path) -> _Picture:
    """Draws a chart of the run and writes it as a PNG file to `directory`. If the run lacks what the chart needs, removes an older file."""
    path = directory / f"{chart.name}.png"
    with mpl.rc_context(STYLE):
        figure = chart.draw(record)
        if figure is None:
            path.unlink(missing_ok=True)
            return _Picture(chart, "")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    path.write_bytes(buffer.getvalue())
    return _Picture(chart, base64.b64encode(buffer.getvalue()).decode())


def _clock(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(unix_s))


def _template() -> Any:
    source = files("ooc_moe.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(source)


def _flattened(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields every setting of a nested configuration as (dotted name, value as text), for example ("ppo.epochs", "4")."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)

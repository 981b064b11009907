"""A run's report: one HTML file that needs nothing else, its pictures beside it, and the tables that the terminal shows.

Everything comes from the run directory (config.json, metrics.jsonl), so a report can be made at any time, also of a run that is going on.
What to draw is in charts.py, what to count in summary.py; this puts them on a page.

Run: ooc-moe report runs/NAME
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
    """A part of the page: a question, and the tables and charts (by name) that answer it."""

    question: str
    tables: tuple[Callable[[RunRecord], Table], ...]
    charts: tuple[str, ...]


_PARTS = (
    _Part(
        "What was learned, and what was kept?",
        (summary.score_table, summary.single_task_table, summary.measures_table),
        ("score_matrix", "forgetting", "learning_curves"),
    ),
    _Part("Did the experts of the moment fit?", (tier_tables.tier_table,), ("hit_rate", "tier_bytes")),
    _Part("Did experts come before they were needed?", (tier_tables.prefetch_table,), ("prefetching",)),
    _Part("Did each game use experts of its own?", (tier_tables.overlap_table,), ("expert_usage", "overlap")),
    _Part("Was the game on the screen recognised?", (summary.detector_table,), ("detector",)),
)

_WORDS = (
    ("Expert", "a small network, one of many that share the work; for each frame the agent uses a few of them."),
    ("HBM, DRAM, NVMe", "where experts are kept: the accelerator's memory (of the host, on a CPU run), the daemon's memory, its disk."),
    ("Seed", "an expert that was never trained is stored nowhere; its first values are computed from a number."),
    ("Daemon", "the storage process that keeps all experts, and sends and receives them."),
    ("Environment step", "one action in one copy of a game; an update learns from some hundreds or thousands of them."),
    ("Phase", "the time in which one game was learned; each game is one phase, unless it comes back."),
    ("Detector", "the network that tells from the frames which game is on the screen."),
    ("Nearest mean", "the detector's simplest rival: the known game whose average frame, seen through random features, is closest."),
    ("Score, return", "the points of one episode, which is one play of a game from its start to its end."),
    ("Token", "one frame on its way through the network."),
    ("Pool", "the experts that belong to a game."),
    ("Cold expert", "one of a game that is not being learned; it should stay as it is. Each is looked at again at each later game's end."),
)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A chart as it stands on the page; without `png_base64` it could not be drawn."""

    chart: Chart
    png_base64: str


def write_report(run_dir: Path, single_task: Sequence[Path] = ()) -> Path:
    """Writes `run_dir/report/index.html` and a PNG per chart beside it; returns the path of the HTML file.

    Args:
        run_dir: the run.
        single_task: runs that learned one of its games alone, to measure by.

    Raises:
        InvalidRequest: the directory holds no run, or a damaged one; or one of `single_task` cannot be compared.
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
        words=_WORDS,
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
        begun=_clock(record.events[0]["time"]) if record.events else "",
        written=_clock(time.time()),
    )
    path = directory / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def print_summary(run_dir: Path, console: Console) -> None:
    """Prints what is missing from a run, and its tables.

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
    """Draws a chart into the directory; removes an older picture of what can no longer be drawn."""
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
    """(dotted name, value) of every setting."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)

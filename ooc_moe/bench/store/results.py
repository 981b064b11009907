"""What the store benchmark found: rows, their ratios against the targets, one table for the terminal and for a file.

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.display.formats import format_size
from ooc_moe.display.table import Table, markdown_table

KIB, MIB = 1 << 10, 1 << 20
NOTES = "## What bounds each path"
_HEADINGS = ("", "path", "record", "GB/s [quartiles]", "ratio", "must", "aim", "reached")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a path owes its peer: by record size, the ratio it must reach, and the one it aims at (None: none of its own)."""

    peer: str
    by_size: Mapping[int, tuple[float, float | None]]


# By group and path. The ratio of medians is shown for every size, and judged where the size has a target.
TARGETS: dict[tuple[str, str], tuple[Target, ...]] = {
    ("fetch", "local"): (
        Target(peer="memcpy", by_size={256 * KIB: (0.5, 0.7), 8 * MIB: (0.85, 0.95)}),
        Target(peer="ray", by_size={8 * MIB: (1.0, None)}),
    ),
    ("fetch", "local xxh3"): (Target(peer="memcpy", by_size={8 * MIB: (0.6, None)}),),
    ("fetch", "stream"): (
        Target(peer="flight", by_size={8 * MIB: (0.9, 1.2)}),
        Target(peer="tcp", by_size={8 * MIB: (0.6, None)}),
    ),
    ("fetch", "stream unverified"): (Target(peer="grpc", by_size={}), Target(peer="flight", by_size={})),
    ("fetch", "stream unix"): (Target(peer="flight", by_size={}),),
    ("fetch", "grpc"): (Target(peer="tcp", by_size={}),),
    ("push", "local"): (
        Target(peer="raw", by_size={8 * MIB: (0.7, 0.9)}),
        Target(peer="lmdb", by_size={8 * MIB: (3.0, 5.0)}),
        Target(peer="rocksdb", by_size={8 * MIB: (3.0, 5.0)}),
    ),
    ("push", "stream"): (
        Target(peer="raw", by_size={}),
        Target(peer="lmdb", by_size={}),
        Target(peer="rocksdb", by_size={}),
    ),
    ("nvme", "local"): (Target(peer="raw", by_size={8 * MIB: (0.8, 0.95)}),),
    ("nvme", "stream"): (Target(peer="raw", by_size={}),),
}
# p99 of GetStats in milliseconds: must stay under, aims to stay under.
STATS_P99_MS = (25.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A path's median over its peer's."""

    peer: str
    value: float
    must: float | None = None
    aim: float | None = None

    @property
    def reached(self) -> str:
        """ "aim", "must" or "no"; "" without a target."""
        if self.must is None:
            return ""
        if self.aim is not None and self.value >= self.aim:
            return "aim"
        return "must" if self.value >= self.must else "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One path with records of one size."""

    group: str
    path: str
    record_bytes: int
    spread: Spread
    ratios: tuple[Ratio, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Of calls, in milliseconds."""

    p50_ms: float
    p99_ms: float
    max_ms: float

    @staticmethod
    def of(samples_ms: Sequence[float]) -> Latency:
        """Of at least one sample."""
        ordered = sorted(samples_ms)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
        return Latency(p50_ms=statistics.median(ordered), p99_ms=p99, max_ms=ordered[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsRow:
    """GetStats while streams run."""

    record_bytes: int
    calls: int
    latency: Latency
    echo: Latency  # Of an idle server of bare gRPC, asked in turn: what the processors alone cost.
    streams: int
    served: float  # GB/s of the streams meanwhile.

    @property
    def reached(self) -> str:
        """As `Ratio.reached`."""
        must, aim = STATS_P99_MS
        return "aim" if self.latency.p99_ms < aim else "must" if self.latency.p99_ms < must else "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """A run of the benchmark."""

    rows: tuple[Row, ...]
    stats: StatsRow | None
    missing: tuple[str, ...]
    facts: Mapping[str, str]  # Command, commit, date, machine, versions.
    rounds: int


def with_ratios(group: str, record_bytes: int, samples: Mapping[str, Sequence[float]]) -> list[Row]:
    """The rows of one group and size, in the order of `samples`."""
    spreads = {path: Spread.of(values) for path, values in samples.items()}
    rows = []
    for path, spread in spreads.items():
        ratios = [
            Ratio(peer=target.peer, value=spread.median / spreads[target.peer].median, must=must, aim=aim)
            for target in TARGETS.get((group, path), ())
            if target.peer in spreads
            for must, aim in (target.by_size.get(record_bytes, (None, None)),)
        ]
        rows.append(Row(group=group, path=path, record_bytes=record_bytes, spread=spread, ratios=tuple(ratios)))
    return rows


def table(results: Results, titles: Mapping[str, str], *, mark: str = "") -> Table:
    """The results by group. `titles` says what each group measures; `mark` is put around a group's title, for example ** in Markdown."""
    rows: list[tuple[str, ...]] = []
    sections = []
    for title, group in _cells(results, titles):
        sections.append(len(rows))
        rows += [("" if index else f"{mark}{title}{mark}", *cells) for index, cells in enumerate(group)]
    return Table("", _HEADINGS, rows, alignment="l" * len(_HEADINGS), sections=sections)


def markdown(results: Results, titles: Mapping[str, str], *, notes: str) -> str:
    """For a file: what ran, the table, what was missing, and the notes on what bounds each path."""
    lines = ["# ooc-moe bench store", ""]
    lines += [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [f"- missing: {missing}" for missing in results.missing]
    return "\n".join([*lines, "", markdown_table(table(results, titles, mark="**")), "", notes.rstrip(), ""])


def save(results: Results, titles: Mapping[str, str], path: Path) -> None:
    """Writes the file; the notes of an older one stay."""
    notes = f"{NOTES}\n\n(to be written: the profile of each path)"
    if path.exists():
        _, found, below = path.read_text().partition(NOTES)
        notes = found + below if found else notes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(results, titles, notes=notes))


def _cells(results: Results, titles: Mapping[str, str]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The table by group: a title, and its rows of cells."""
    groups = []
    for group, title in titles.items():
        rows = [_row_cells(row) for row in results.rows if row.group == group]
        if group == "stats" and results.stats:
            rows.append(_stats_cells(results.stats))
        if rows:
            groups.append((title, rows))
    return groups


def _row_cells(row: Row) -> tuple[str, ...]:
    def column(text: Callable[[Ratio], str]) -> str:
        return "\n".join(text(ratio) for ratio in row.ratios)

    spread = row.spread
    return (
        row.path,
        format_size(row.record_bytes),
        f"{spread.median:.2f} [{spread.q1:.2f}, {spread.q3:.2f}]",
        column(lambda ratio: f"{ratio.value:.2f} x {ratio.peer}"),
        column(lambda ratio: _number(ratio.must)),
        column(lambda ratio: _number(ratio.aim)),
        column(lambda ratio: ratio.reached),
    )


def _stats_cells(stats: StatsRow) -> tuple[str, ...]:
    must, aim = STATS_P99_MS
    return (
        "GetStats",
        format_size(stats.record_bytes),
        f"{stats.served:.2f} by {stats.streams} streams",
        f"p99 {stats.latency.p99_ms:.1f} ms (p50 {stats.latency.p50_ms:.1f}); an idle server's {stats.echo.p99_ms:.1f} ms",
        f"{must:.0f} ms",
        f"{aim:.0f} ms",
        stats.reached,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"

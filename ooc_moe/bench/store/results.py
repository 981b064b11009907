"""The results of the store benchmark: rows, their ratios to the peers, the targets for these ratios, and the table that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ooc_moe.bench.harness import Spread
from ooc_moe.bench.result_page import kept_notes, met_target
from ooc_moe.display.formats import format_size
from ooc_moe.display.table import Table, markdown_table

KIB, MIB = 1 << 10, 1 << 20
NOTES = "## What bounds each path"
_HEADINGS = ("", "path", "record", "GB/s [quartiles]", "ratio", "must", "aim", "reached")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A target: how fast one of our benchmark cases (paths) should be compared with the peer called `peer`, as a ratio of speeds."""

    peer: str
    by_size: Mapping[int, tuple[float, float | None]]
    """By record size in bytes: the ratio that must be reached, and the ratio that we aim at (None: no aim)."""


# By group and path. The table shows the ratio for every record size; only the sizes named here have a target.
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
# The p99 latency of GetStats in milliseconds: it must stay below the first, and we aim at staying below the second.
STATS_P99_MS = (25.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How one benchmark case (path) compares with a peer: its median speed divided by the peer's, and the targets for this ratio.

    `must` is the value to reach and `aim` a stricter one; None: no target for this record size.
    """

    peer: str
    value: float
    must: float | None = None
    aim: float | None = None

    @property
    def reached(self) -> str:
        """Which target the ratio meets: "aim" (the stricter one), "must" or "no"; "" without a target."""
        return met_target(self.value, must=self.must, aim=self.aim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the result table: the GB/s of one benchmark case to move records of one size, and its ratios to peers.

    `path` is the name of this way, and `group` the kind of work: fetch, push or nvme.
    """

    group: str
    path: str
    record_bytes: int
    spread: Spread
    ratios: tuple[Ratio, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """The latency of repeated calls in milliseconds: median, 99th percentile and maximum."""

    p50_ms: float
    p99_ms: float
    max_ms: float

    @staticmethod
    def of(samples_ms: Sequence[float]) -> Latency:
        """Computes median, 99th percentile and maximum from at least one sample."""
        ordered = sorted(samples_ms)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
        return Latency(p50_ms=statistics.median(ordered), p99_ms=p99, max_ms=ordered[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsRow:
    """The row of the result table for GetStats: its latency while client processes fetch from the daemon at full speed."""

    record_bytes: int
    calls: int
    latency: Latency
    echo: Latency
    """Latency of an idle plain gRPC server, called in turn with GetStats. It shows how much the busy processors alone cost."""
    streams: int
    """How many client processes fetched meanwhile."""
    served: float
    """GB/s that the daemon sent to these clients."""

    @property
    def reached(self) -> str:
        """Which target the 99th percentile stays below: "aim" (the stricter one), "must" or "no"."""
        must, aim = STATS_P99_MS
        return "aim" if self.latency.p99_ms < aim else "must" if self.latency.p99_ms < must else "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The results of the store benchmark: a row for each way to move records, GetStats under load, and the conditions."""

    rows: tuple[Row, ...]
    stats: StatsRow | None
    missing: tuple[str, ...]
    """The peers that could not be measured on this machine; for each a text that says what to install, or how its start failed."""
    facts: Mapping[str, str]
    """By name: command, commit, date, machine, versions."""
    rounds: int


def with_ratios(group: str, record_bytes: int, samples: Mapping[str, Sequence[float]]) -> list[Row]:
    """Makes the rows of the table for one group and record size, with the ratios to the peers that TARGETS names.

    Args:
        group: the kind of work: fetch, push or nvme.
        record_bytes: the record size.
        samples: by name of the benchmark case (path), its GB/s, one sample for each round. The rows have the order of this mapping.
    """
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
    """Makes the result table, with a section for each group (fetch, push, nvme, stats).

    `titles` says, by group, what the group measures. `mark` is put around each title, for example ** in Markdown.
    """
    rows: list[tuple[str, ...]] = []
    sections = []
    for title, group in _cells(results, titles):
        sections.append(len(rows))
        rows += [("" if index else f"{mark}{title}{mark}", *cells) for index, cells in enumerate(group)]
    return Table("", _HEADINGS, rows, alignment="l" * len(_HEADINGS), sections=sections)


def markdown(results: Results, titles: Mapping[str, str], *, notes: str) -> str:
    """Makes the text of the result page: command, machine and versions, missing peers, the table, and `notes`.

    `notes` is a text on what limits the speed of each benchmark case (path). `titles` says, by group, what the group measures.
    """
    lines = ["# ooc-moe bench store", ""]
    lines += [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [f"- missing: {missing}" for missing in results.missing]
    return "\n".join([*lines, "", markdown_table(table(results, titles, mark="**")), "", notes.rstrip(), ""])


def save(results: Results, titles: Mapping[str, str], path: Path) -> None:
    """Writes the result page to `path`. Notes that people added to an existing page stay.

    `titles` says, by group (fetch, push, nvme, stats), what the group measures.
    """
    notes = kept_notes(path, NOTES, missing="to be written: the profile of each path")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(results, titles, notes=notes))


def _cells(results: Results, titles: Mapping[str, str]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Makes the cells of the table. Returns, for each group with results, its title and its rows of texts."""
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

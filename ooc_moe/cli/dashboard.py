"""Draws the dashboard of `ooc-moe stats`: the daemon's three tiers, trainers with their HBM caches, latencies, queues and banks.

`render` turns one Stats message (and an earlier one, for rates) into Rich tables that fit into 80 columns: bars and names are shortened,
numbers are never folded. It shows the most useful counters; `ooc-moe stats --json` has all of them. Names that users chose are printed as
plain text, never as Rich markup.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ooc_moe.display.formats import DASH, format_bytes_short, format_count_short, format_seconds, format_share_short, format_uptime
from ooc_moe_wire.v1 import stats_pb2

# Wide enough for every row with whole names, where the output is not a terminal.
PIPE_WIDTH = 1000
_BAR_WIDTH_IN_A_PIPE = 20


def print_once(stats: stats_pb2.Stats) -> None:
    """Prints the dashboard once. On a terminal it is fitted to the width; in a pipe each row is one line, and names are not shortened."""
    if sys.stdout.isatty():
        Console().print(render(stats))
        return
    console = Console(width=PIPE_WIDTH)
    with console.capture() as captured:
        console.print(render(stats, whole_names=True))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def render(stats: stats_pb2.Stats, before: stats_pb2.Stats | None = None, *, whole_names: bool = False) -> RenderableType:
    """Draws the whole dashboard as something that Rich can print.

    Args:
        stats: the daemon's statistics to show.
        before: earlier statistics of the same daemon. With them, traffic is shown per second; without them, since the daemon's start.
        whole_names: whether to print names in full, however wide the table becomes.
    """
    parts: list[RenderableType] = [_headline(stats)]
    # The banks come last, because a terminal with few lines cuts off the last lines.
    for section in (_tiers(stats, before), _trainers(stats), _hbm(stats), _latencies(stats), _queues(stats), _banks(stats)):
        if isinstance(section, Text):
            parts += ["", section]
        elif section.row_count:
            parts += ["", _unshortened(section) if whole_names else section]
    return Group(*parts)


def _unshortened(table: Table) -> Table:
    """Makes a table's columns as wide as their longest cells, and its bars of a fixed width. Returns the same table."""
    for column in table.columns:
        column.max_width = None
        column.no_wrap = True
        if any(isinstance(cell, ProgressBar) for cell in column.cells):
            column.width = _BAR_WIDTH_IN_A_PIPE
    return table


def _headline(stats: stats_pb2.Stats) -> Text:
    text = Text.assemble((f"ooc-moe-server {stats.version}", "bold"), no_wrap=True, overflow="ellipsis")
    text.append(f"  {time.strftime('%H:%M:%S')}  up {format_uptime(stats.uptime_s)}")
    if stats.draining:
        text.append("  draining", style="bold yellow")
    if stats.dram.dirty_bytes:
        text.append(f"  {format_bytes_short(stats.dram.dirty_bytes)} not yet on NVMe", style="yellow")
    if num_corrupt := stats.dram.num_corrupt + stats.nvme.num_corrupt:
        text.append(f"  {num_corrupt:,} corrupt", style="bold red")
    return text.append(f"  {stats.data_dir}", style="dim")


def _tiers(stats: stats_pb2.Stats, before: stats_pb2.Stats | None) -> Table:
    flows = ("in", "out") if before is None else ("in/s", "out/s")
    table = _table("Tiers", "|", "used", "size", "records", "served", "hits", "evicted", *flows)
    seconds = stats.uptime_s - before.uptime_s if before is not None else 0.0
    hbm, total = _sum_of_hbm(stats), stats.total
    for name, tier, earlier, served, share in (
        ("HBM", hbm, before and _sum_of_hbm(before), hbm.reads, _share(hbm.reads, hbm.writes)),
        ("DRAM", stats.dram, before and before.dram, total.hits, _share(total.hits, total.misses)),
        ("NVMe", stats.nvme, before and before.nvme, total.nvme_reads, DASH),
    ):
        if tier.capacity_bytes:
            table.add_row(
                name,
                ProgressBar(total=tier.capacity_bytes, completed=tier.used_bytes),
                format_bytes_short(tier.used_bytes),
                format_bytes_short(tier.capacity_bytes),
                format_count_short(tier.num_records),
                format_count_short(served),
                share,
                format_count_short(tier.evictions),
                _flow(tier.written_bytes, earlier.written_bytes if earlier else None, seconds),
                _flow(tier.read_bytes, earlier.read_bytes if earlier else None, seconds),
            )
    table.add_row("seed", "", "", "", "", format_count_short(total.seeded))
    return table


def _sum_of_hbm(stats: stats_pb2.Stats) -> stats_pb2.TierStats:
    """Adds up the HBM caches of all trainers to the statistics of one tier, in which hits count as reads and misses as writes."""
    caches = [hbm for trainer in stats.trainers for hbm in trainer.hbm]
    return stats_pb2.TierStats(
        capacity_bytes=sum(hbm.capacity_experts * hbm.expert_bytes for hbm in caches),
        used_bytes=sum(hbm.resident_experts * hbm.expert_bytes for hbm in caches),
        num_records=sum(hbm.resident_experts for hbm in caches),
        reads=sum(hbm.hits for hbm in caches),
        writes=sum(hbm.misses for hbm in caches),
        written_bytes=sum(hbm.bytes_in for hbm in caches),
        read_bytes=sum(hbm.bytes_out for hbm in caches),
        evictions=sum(hbm.evictions for hbm in caches),
    )


def _trainers(stats: stats_pb2.Stats) -> Table:
    table = _table("Trainers", "|doing", "fetched", "DRAM hits", "pushed")
    for trainer in stats.trainers:
        access = trainer.access
        row = format_count_short(access.fetched_experts), _share(access.hits, access.misses), format_count_short(access.pushed_experts)
        table.add_row(_name(trainer.trainer), _name(trainer.activity), *row)
    return table


def _hbm(stats: stats_pb2.Stats) -> Table:
    table = _table("HBM", "|bank", "resident", "hits", "prefetch useful", "late", "wasted", "recall", "stalled")
    for trainer in stats.trainers:
        for hbm in trainer.hbm:
            table.add_row(
                _name(trainer.trainer),
                _name(hbm.bank),
                f"{hbm.resident_experts}/{hbm.capacity_experts}",
                _share(hbm.hits, hbm.misses),
                format_count_short(hbm.prefetch_useful),
                format_count_short(hbm.prefetch_late),
                format_count_short(hbm.prefetch_wasted),
                _share(hbm.prefetch_useful, hbm.misses + hbm.refetches),
                format_seconds(hbm.stall_s),
            )
    return table


def _latencies(stats: stats_pb2.Stats) -> Table:
    """Makes the table of latencies, with a column for each operation that happened at least once."""
    seen = {name: latency for name, latency in sorted(stats.latency.items()) if latency.count}
    table = _table("Latency in ms", *seen)
    if seen:
        table.add_row("p50", *(f"{latency.p50_ms:.2f}" for latency in seen.values()))
        table.add_row("p99", *(f"{latency.p99_ms:.2f}" for latency in seen.values()))
    return table


def _queues(stats: stats_pb2.Stats) -> Text:
    queues = stats.queues
    waiting = f"demand reads {queues.demand_reads}, prefetch reads {queues.prefetch_reads}, pushes {queues.pushes}"
    return Text.assemble(("Waiting  ", "bold"), f"{waiting}; open streams {queues.open_streams}, local {queues.local_sessions}")


def _banks(stats: stats_pb2.Stats) -> Table:
    table = _table("Banks", "in DRAM", "on NVMe", "fetched", "hits", "pushed", "refused", "|writer")
    for bank in stats.banks:
        access = bank.access
        table.add_row(
            _name(bank.bank),
            format_count_short(bank.dram_records),
            format_bytes_short(bank.nvme_bytes),
            format_count_short(access.fetched_experts),
            _share(access.hits, access.misses),
            format_count_short(access.pushed_experts),
            format_count_short(access.push_refused),
            _name(bank.writer_id[:8]),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """Makes the empty table of one section of the dashboard, with the section's title above the first column.

    `columns` names the other columns. One whose name begins with | is aligned to the left, and its cells may be shortened. All others
    hold numbers.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text(title, style="not dim bold"))
    for column in columns:
        if column.startswith("|"):
            table.add_column(column[1:], max_width=40)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(name: str) -> Text:
    return Text(name or DASH, no_wrap=True, overflow="ellipsis")


def _share(hits: int, misses: int) -> str:
    return format_share_short(hits / (hits + misses)) if hits + misses else DASH


def _flow(total: int, earlier: int | None, seconds: float) -> str:
    """Writes the traffic of a tier: the `total` bytes since the daemon's start, or bytes per second if an `earlier` total is given.

    The rate is left blank where there was no traffic, or where the daemon has restarted in between.
    """
    if earlier is None:
        return format_bytes_short(total)
    rate = round((total - earlier) / seconds) if seconds > 0 else 0
    return format_bytes_short(rate) if rate > 0 else ""

"""The daemon's statistics on a terminal: tiers, banks, trainers with their HBM caches, latencies and queues.

`render` turns one Stats message (and the one before, for rates) into Rich tables. Names that others chose are shown as plain text, never as
markup. Knows nothing of connections.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import humanize
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ooc_moe_wire.v1 import stats_pb2

DASH = "–"


def render(stats: stats_pb2.Stats, before: stats_pb2.Stats | None = None) -> RenderableType:
    """The whole dashboard. `before`: an earlier message of the same daemon; bytes per second are counted from it."""
    parts: list[RenderableType] = [_headline(stats), _tiers(stats, before)]
    if stats.trainers:
        parts.append(_trainers(stats))
    if any(trainer.hbm for trainer in stats.trainers):
        parts.append(_hbm(stats))
    if stats.banks:
        parts.append(_banks(stats))
    if any(latency.count for latency in stats.latency.values()):
        parts.append(_latencies(stats))
    parts.append(_queues(stats))
    return Group(*parts)


def _headline(stats: stats_pb2.Stats) -> Text:
    uptime = humanize.naturaldelta(stats.uptime_s)
    text = Text.assemble((f"ooc-moe-server {stats.version}", "bold"), f"  {stats.data_dir}  up {uptime}  at {time.strftime('%H:%M:%S')}")
    if stats.draining:
        text.append("  draining", style="bold yellow")
    return text


def _tiers(stats: stats_pb2.Stats, before: stats_pb2.Stats | None) -> Table:
    seconds = stats.uptime_s - before.uptime_s if before is not None else 0.0
    table = _table("Tiers", "tier", "used", "capacity", "", "records", "served", "hit rate", "in", "out", "evicted", "corrupt")
    for name, tier, earlier, served, rate in (
        ("DRAM", stats.dram, before and before.dram, stats.total.hits, _share(stats.total.hits, stats.total.hits + stats.total.misses)),
        (f"NVMe ({stats.nvme.io_mode or DASH})", stats.nvme, before and before.nvme, stats.total.nvme_reads, DASH),
    ):
        table.add_row(
            name,
            _bytes(tier.used_bytes),
            _bytes(tier.capacity_bytes),
            ProgressBar(total=max(tier.capacity_bytes, 1), completed=tier.used_bytes, width=12),
            f"{tier.num_records:,}",
            f"{served:,}",
            rate,
            _flow(tier.written_bytes, earlier.written_bytes if earlier else None, seconds),
            _flow(tier.read_bytes, earlier.read_bytes if earlier else None, seconds),
            f"{tier.evictions:,}",
            Text(f"{tier.num_corrupt:,}", style="bold red" if tier.num_corrupt else ""),
        )
    table.add_row("seed", DASH, DASH, "", DASH, f"{stats.total.seeded:,}", DASH, DASH, DASH, DASH, DASH)
    return table


def _trainers(stats: stats_pb2.Stats) -> Table:
    table = _table("Trainers", "trainer", "fetched", "DRAM hits", "NVMe", "seed", "pushed", "prefetched to DRAM", "doing")
    for trainer in stats.trainers:
        access = trainer.access
        table.add_row(
            Text(trainer.trainer or "(no name)"),
            f"{access.fetched_experts:,} ({_bytes(access.fetched_bytes)})",
            f"{access.hits:,} ({_share(access.hits, access.hits + access.misses)})",
            f"{access.nvme_reads:,}",
            f"{access.seeded:,}",
            f"{access.pushed_experts:,} ({_bytes(access.pushed_bytes)})",
            f"{access.prefetch_promoted:,}",
            Text(f"{trainer.activity} ({trainer.report_age_s:.0f} s ago)" if trainer.activity else DASH),
        )
    return table


def _hbm(stats: stats_pb2.Stats) -> Table:
    table = _table(
        "HBM caches", "trainer", "bank", "slots", "dirty", "hit rate", "misses", "prefetch useful/late/wasted", "in", "out", "stalled"
    )
    for trainer in stats.trainers:
        for hbm in trainer.hbm:
            table.add_row(
                Text(trainer.trainer or "(no name)"),
                Text(hbm.bank),
                f"{hbm.resident_experts}/{hbm.capacity_experts} ({_bytes(hbm.capacity_experts * hbm.expert_bytes)})",
                f"{hbm.dirty_experts}",
                _share(hbm.hits, hbm.hits + hbm.misses),
                f"{hbm.misses:,}",
                f"{hbm.prefetch_useful:,}/{hbm.prefetch_late:,}/{hbm.prefetch_wasted:,}",
                _bytes(hbm.bytes_in),
                _bytes(hbm.bytes_out),
                f"{hbm.stall_s:.1f} s",
            )
    return table


def _banks(stats: stats_pb2.Stats) -> Table:
    table = _table("Banks", "bank", "in DRAM", "on NVMe", "hits", "misses", "hit rate", "pushed", "refused", "writer")
    for bank in stats.banks:
        access = bank.access
        table.add_row(
            bank.bank,
            f"{bank.dram_records:,}",
            _bytes(bank.nvme_bytes),
            f"{access.hits:,}",
            f"{access.misses:,}",
            _share(access.hits, access.hits + access.misses),
            f"{access.pushed_experts:,}",
            f"{access.push_refused:,}",
            Text(bank.writer_id or DASH),
        )
    return table


def _latencies(stats: stats_pb2.Stats) -> Table:
    table = _table("Latency in ms, last 4096 of each", "operation", "count", "p50", "p90", "p99", "max")
    for name, latency in sorted(stats.latency.items()):
        if latency.count:
            figures = (latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.max_ms)
            table.add_row(name, f"{latency.count:,}", *(f"{figure:.2f}" for figure in figures))
    return table


def _queues(stats: stats_pb2.Stats) -> Text:
    waiting = {"demand reads": stats.queues.demand_reads, "prefetch reads": stats.queues.prefetch_reads, "pushes": stats.queues.pushes}
    queued = ", ".join(f"{name} {count}" for name, count in waiting.items())
    return Text(f"Waiting: {queued}. Open streams: {stats.queues.open_streams}.")


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    _add_columns(table, others)
    return table


def _add_columns(table: Table, names: Iterable[str]) -> None:
    for name in names:
        table.add_column(name, justify="left" if name in ("doing", "bank", "writer", "") else "right", overflow="fold")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else DASH


def _bytes(count: int) -> str:
    return humanize.naturalsize(count, binary=True)


def _flow(total: int, earlier: int | None, seconds: float) -> str:
    """Bytes since the start, and per second since the earlier message; a daemon that restarted has no rate yet."""
    if earlier is None or seconds <= 0:
        return _bytes(total)
    return f"{_bytes(total)} ({_bytes(round(max(total - earlier, 0) / seconds))}/s)"

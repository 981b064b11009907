"""Makes the tables of the memory tiers: what each tier held and moved, what became of prefetched experts, how much games share experts."""

from __future__ import annotations

import numpy as np

from ooc_moe.display.formats import DASH, format_bytes, format_count, format_ratio, format_seconds, format_share
from ooc_moe.display.table import Table
from ooc_moe.metrics import measures
from ooc_moe.metrics.run import RunRecord


def tier_table(record: RunRecord) -> Table:
    """Makes the table of tiers (HBM, DRAM, NVMe): bytes held, accesses or fetches that found their expert there, bytes moved."""
    accesses, hits = record.total("cache", "accesses"), record.total("cache", "hits")
    fetched = {tier: record.total("cache", "fetched_from", tier) for tier in ("dram", "nvme", "seed")}
    fetches = float(np.nansum(list(fetched.values())))
    expert_bytes = record.last("cache", "expert_bytes")
    rows = [
        [
            "HBM",
            format_bytes(record.last("cache", "resident") * expert_bytes),
            format_bytes(record.last("cache", "capacity") * expert_bytes),
            format_count(hits),
            format_ratio(hits, accesses),
            format_bytes(record.total("cache", "bytes_in")),
            format_bytes(record.total("cache", "bytes_out")),
        ]
    ]
    for tier, name in (("dram", "DRAM"), ("nvme", "NVMe")):
        rows.append(
            [
                name,
                format_bytes(record.last("store", tier, "used_bytes")),
                format_bytes(record.last("store", tier, "capacity_bytes")) if tier == "dram" else DASH,
                format_count(fetched[tier]),
                format_ratio(fetched[tier], fetches),
                format_bytes(record.total("store", tier, "written_bytes")),
                format_bytes(record.total("store", tier, "read_bytes")),
            ]
        )
    rows.append(["seed", DASH, DASH, format_count(fetched["seed"]), format_ratio(fetched["seed"], fetches), DASH, DASH])
    return Table(
        "Tiers",
        ["tier", "holds", "capacity", "served", "hit rate", "bytes in", "bytes out"],
        rows,
        "Training and evaluation together. HBM serves an access to an expert if it holds the expert; its hit rate is the share of all "
        "accesses. Otherwise the expert is fetched or prefetched from DRAM, from NVMe, or from its seed if it was never trained; their "
        "rates are shares of these fetches. The bytes of DRAM and NVMe are the daemon's, for all its trainers.",
        caption=f"Waited for experts: {format_seconds(record.total('cache', 'stall_s'))}.",
    )


def prefetch_table(record: RunRecord) -> Table:
    """Makes the table of prefetches into HBM: how many were useful, late, wasted, cancelled or refused.

    Useful: in HBM when asked for. Late: asked for before it arrived. Wasted: evicted before it was asked for. Cancelled: given up before it
    was loaded. Refused: not started, because it was not worth the fetch.
    """
    count, size = _prefetched(record, ""), _prefetched(record, "_bytes")
    scheduled, scheduled_size = _prefetched(record, "", scheduled=True), _prefetched(record, "_bytes", scheduled=True)
    rows = [
        [
            what,
            format_count(count[what]),
            format_bytes(size[what]),
            DASH if what == "refused" else format_ratio(size[what], size["issued"]),
            format_count(scheduled[what]),
            format_bytes(scheduled_size[what]),
        ]
        for what in count
    ]
    waited = count["useful"] + record.total("cache", "misses") + record.total("cache", "refetches")
    arrived = count["useful"] + count["late"] + count["wasted"]
    return Table(
        f"Prefetch into HBM (by {record.config['prefetch']})" if "prefetch" in record.config else "Prefetch into HBM",
        ["", "experts", "bytes", "share", "by the schedule", "bytes"],
        rows,
        "Useful: in HBM when it was asked for. Late: asked for before it arrived. Wasted: evicted before it was asked for. Refused: not "
        "worth a fetch, by the measured bandwidth and the free room; fetched nevertheless where admission only observes. By the schedule: "
        "fetched ahead of an update or of the next acting step, because HBM has no room for all their experts; not part of these ratios: "
        f"Precision (useful, of useful, late and wasted): {format_ratio(count['useful'], arrived)}. "
        f"In time (useful, of useful and of all that had to be waited for): {format_ratio(count['useful'], waited)}.",
    )


def _prefetched(record: RunRecord, unit: str, *, scheduled: bool = False) -> dict[str, float]:
    """Counts the prefetches by what became of them (issued, useful, late, ...), in experts (unit "") or in bytes (unit "_bytes").

    With `scheduled`, counts the fetches ahead of an update or an acting step whose experts were known, instead of the prefetches that
    the detector or another source asked for.
    """

    def total(what: str) -> float:
        return record.total("cache", "ahead", what + unit) if scheduled else record.total("cache", f"prefetch_{what}{unit}")

    count = {what: total(what) for what in ("issued", "useful", "late", "wasted", "cancelled")}
    ended = sum(count.values()) - count["issued"]
    return count | {"unused yet": count["issued"] - ended, "refused": total("refused")}


def overlap_table(record: RunRecord) -> Table:
    """Makes the table of how much games share experts, as means over pairs of games."""
    usages = (record.training_usage(), record.evaluation_usage())
    kinds = (("top-10 experts in common", measures.top_overlap), ("routed mass in common", measures.mass_overlap))
    rows = [[name, *(format_share(measures.mean_off_diagonal(measure(usage))) for usage in usages)] for name, measure in kinds]
    return Table(
        "Overlap between games",
        ["mean over pairs", "training", "last evaluation"],
        rows,
        "0 %: no two games use the same expert. 100 %: all use the same ones.",
    )

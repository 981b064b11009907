"""What a cache counts: the running `Counters`, and `CacheStats`, a copy of them at one moment, which reports and metrics read.

Experts are fetched before they are asked for in two ways, which are counted apart. Prefetches (`prefetch_*`) are guesses and may be wrong.
Fetches ahead (the dict `ahead`) are of experts that the schedule names, so they are known to be needed.

Tests check these equations. The second equation holds for prefetches and for fetches ahead, each counted in experts and in bytes:

    accesses = hits + misses
    issued   = useful + late + wasted + cancelled + those still queued, loading, or resident and not asked for yet

A refused prefetch does not count as issued.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ooc_moe_wire.v1 import stats_pb2

PrefetchCount = Literal["issued", "useful", "late", "wasted", "cancelled", "refused"]


@dataclass(slots=True, kw_only=True)
class Counters:
    """What one cache has counted since its start: numbers of experts, unless a name says otherwise. The cache changes them under its lock.

    Attributes:
        accesses: experts asked for by `ExpertCache.reading` with `counted` True.
        hits: of the accesses, those whose expert was ready in its slot.
        misses: all other accesses. An access whose expert a prefetch was just loading is a miss, and counts in `prefetch_late` too.
        refetches: experts that were not ready when backward or the optimizer asked for them again (`counted` False, or `updating`).
        prefetch_issued: experts accepted into the prefetch queue. For this counter and each of the next five, another counter named
            `..._bytes` counts the bytes.
        prefetch_useful: prefetched experts that were ready when they were first asked for.
        prefetch_late: prefetched experts that were asked for while they were still queued or loading.
        prefetch_wasted: prefetched experts that were evicted or dropped before they were asked for.
        prefetch_cancelled: experts that left the queue without a fetch, or could not be fetched.
        prefetch_refused: experts that the admission found not worth a fetch (see admission.py). They were not issued; where admission only
            observes, they were issued all the same.
        evictions: experts that left their slot to make room for another.
        write_backs: changed experts that were pushed to the store and acknowledged by it.
        bytes_in: bytes fetched, whether the training thread waited for them or not.
        bytes_out: bytes pushed and acknowledged.
        stall_s: seconds that the training thread waited for experts.
        fetched_from: how many experts came from each place: "dram", "nvme" and "seed" are the daemon's tiers. "write-back": experts that
            came back from the buffers of the write-back, because the daemon did not have their newest bytes yet (not in `bytes_in`).
        ahead: fetches that the schedule caused before the experts were asked for, by outcome: "issued", "useful", "late", "wasted",
            "cancelled", each also as "..._bytes".
    """

    accesses: int = 0
    hits: int = 0
    misses: int = 0
    refetches: int = 0
    prefetch_issued: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    evictions: int = 0
    write_backs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_s: float = 0.0
    prefetch_refused: int = 0
    prefetch_issued_bytes: int = 0
    prefetch_useful_bytes: int = 0
    prefetch_late_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_cancelled_bytes: int = 0
    prefetch_refused_bytes: int = 0
    fetched_from: dict[str, int] = field(default_factory=dict)
    ahead: dict[str, int] = field(default_factory=dict)

    def count_fetched(self, source: str) -> None:
        """Counts one expert that was fetched from `source`, a key of `fetched_from`."""
        self.fetched_from[source] = self.fetched_from.get(source, 0) + 1

    def count_prefetch(self, what: PrefetchCount, num_bytes: int, *, scheduled: bool = False) -> None:
        """Counts one event of an expert fetched ahead of demand, in experts and in bytes.

        Args:
            what: the event: the fetch was issued or refused, or how it turned out.
            num_bytes: the bytes of the expert.
            scheduled: whether the schedule asked for the fetch (counted in `ahead`), and not a prefetch (counted in `prefetch_*`).
        """
        for name, count in ((what, 1), (f"{what}_bytes", num_bytes)):
            if scheduled:
                self.ahead[name] = self.ahead.get(name, 0) + count
            else:
                setattr(self, f"prefetch_{name}", getattr(self, f"prefetch_{name}") + count)


_COUNTS = tuple(item.name for item in fields(Counters))
# The gauges that the protobuf message calls otherwise. All other fields of the message are named as here.
_GAUGE_OF_FIELD = {"capacity_experts": "capacity", "resident_experts": "resident", "dirty_experts": "dirty"}


@dataclass(slots=True, kw_only=True)
class CacheStats(Counters):
    """The state of a cache at one moment: how its slots are filled, and a copy of its counters.

    Stats can be added (`a + b`), for example those of the caches of two layers. The difference `later - earlier` has what was counted in
    between; its `capacity`, `resident`, `dirty` and `expert_bytes` are those of `later`.

    Attributes:
        bank: the bank's name; in a sum of different banks, the names joined with "+".
        capacity: the number of slots.
        resident: the number of experts in slots.
        dirty: of these experts, the number with changes that the store does not have.
        expert_bytes: bytes of one slot (both sections); in a sum, the larger.
    """

    bank: str
    capacity: int
    resident: int
    dirty: int
    expert_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits per access; 0 before the first access."""
        return self.hits / self.accesses if self.accesses else 0.0

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(
            bank=self.bank if self.bank == other.bank else f"{self.bank}+{other.bank}",
            capacity=self.capacity + other.capacity,
            resident=self.resident + other.resident,
            dirty=self.dirty + other.dirty,
            expert_bytes=max(self.expert_bytes, other.expert_bytes),
            **self._combined(other, 1),
        )

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        return replace(self, **self._combined(earlier, -1))

    def _combined(self, other: CacheStats, sign: int) -> dict[str, Any]:
        """Every counter of these stats plus `sign` times that of `other`. Counters that are dicts are combined key by key."""
        combined: dict[str, Any] = {}
        for name in _COUNTS:
            mine, others = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                combined[name] = {key: mine.get(key, 0) + sign * others.get(key, 0) for key in sorted({*mine, *others})}
            else:
                combined[name] = mine + sign * others
        return combined

    def to_dict(self) -> dict[str, Any]:
        """The stats as a dict of plain values for JSON, the counters last."""
        gauges = (item.name for item in fields(self) if item.name not in _COUNTS)
        return {name: getattr(self, name) for name in gauges} | copied_counts(self)

    def to_proto(self) -> stats_pb2.HbmStats:
        """The stats as the message that a trainer reports to the daemon. The message leaves out `accesses`, `fetched_from` and `ahead`."""
        names = [item.name for item in stats_pb2.HbmStats.DESCRIPTOR.fields]
        return stats_pb2.HbmStats(**{name: getattr(self, _GAUGE_OF_FIELD.get(name, name)) for name in names})


def copied_counts(counters: Counters) -> dict[str, Any]:
    """All counters by name. Counters that are dicts are copied."""
    counts = {name: getattr(counters, name) for name in _COUNTS}
    return {name: dict(count) if isinstance(count, dict) else count for name, count in counts.items()}

"""What a cache counts, and the snapshot of it that reports and metrics read.

Speculation (`prefetch_*`) may be wrong; what the schedule has fetched ahead (`ahead`) hardly ever is, so the two are counted apart.

Invariants that tests hold, in experts and in bytes, for each of the two: accesses = hits + misses; every prefetch issued ends as exactly
one of useful, late, wasted or cancelled, or is still queued, loading, or resident and unused. What is refused was never issued.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ooc_moe_wire.v1 import stats_pb2

PrefetchCount = Literal["issued", "useful", "late", "wasted", "cancelled", "refused"]


@dataclass(slots=True)
class Counters:
    """The running counts of one cache; changed under its lock."""

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
        """One expert came from there."""
        self.fetched_from[source] = self.fetched_from.get(source, 0) + 1

    def count_prefetch(self, what: PrefetchCount, num_bytes: int, *, foretold: bool = False) -> None:
        """One expert of so many bytes was issued or refused, or came to its end; `foretold`: by the schedule."""
        for name, count in ((what, 1), (f"{what}_bytes", num_bytes)):
            if foretold:
                self.ahead[name] = self.ahead.get(name, 0) + count
            else:
                setattr(self, f"prefetch_{name}", getattr(self, f"prefetch_{name}") + count)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """A cache at one moment, in experts unless a name says otherwise. The first group are gauges; the rest count from the cache's start.

    Attributes:
        bank: the bank's name; of a sum, the names joined with "+".
        expert_bytes: bytes of one slot (both sections).
        accesses: experts asked for by counted readings.
        hits: of the accesses, those that were ready in their slot.
        misses: the others; those that a prefetch was just bringing are among them, and in `prefetch_late`.
        refetches: fetched again for a reading that was not counted (backward, optimizer).
        prefetch_issued: accepted into the prefetch queue. Beside it and the following, the same in bytes.
        prefetch_useful: ready when first asked for.
        prefetch_late: asked for while still queued or loading.
        prefetch_wasted: evicted or forgotten before anybody asked.
        prefetch_cancelled: left the queue unread, or could not be fetched.
        prefetch_refused: judged not worth a fetch (see admission.py): not issued, or, where admission only observes, issued all the same.
        bytes_in: fetched, on demand and by prefetch.
        bytes_out: pushed and acknowledged.
        stall_s: time the training thread waited for experts.
        fetched_from: experts fetched, by the daemon's tier that held them: "dram", "nvme", "seed"; and "write-back": those that had not
            reached the daemon yet, and came back from their buffers (not in bytes_in).
        ahead: what the schedule had fetched before it was asked for: "issued", "useful", "late", "wasted", "cancelled", each also
            as "..._bytes".
    """

    bank: str
    capacity: int
    resident: int
    dirty: int
    expert_bytes: int

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
    fetched_from: Mapping[str, int] = field(default_factory=dict)
    ahead: Mapping[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Hits per access; 0 before the first."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def prefetch_recall(self) -> float:
        """Of the experts that were not resident for another reason when asked for, the share that a prefetch had ready; 0 without any."""
        asked = self.prefetch_useful + self.misses + self.refetches
        return self.prefetch_useful / asked if asked else 0.0

    @property
    def prefetch_precision(self) -> float:
        """Of the prefetches that came to their end with a fetch, the share that was ready when asked for; 0 without any."""
        ended = self.prefetch_useful + self.prefetch_late + self.prefetch_wasted
        return self.prefetch_useful / ended if ended else 0.0

    def __add__(self, other: CacheStats) -> CacheStats:
        """The sum over two caches (of two layers, say). `expert_bytes` is the larger."""
        return CacheStats(
            bank=self.bank if self.bank == other.bank else f"{self.bank}+{other.bank}",
            capacity=self.capacity + other.capacity,
            resident=self.resident + other.resident,
            dirty=self.dirty + other.dirty,
            expert_bytes=max(self.expert_bytes, other.expert_bytes),
            **self._combined(other, 1),
        )

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        """What was counted since `earlier`; the gauges are the present ones."""
        return replace(self, **self._combined(earlier, -1))

    def _combined(self, other: CacheStats, sign: int) -> dict[str, Any]:
        counts: dict[str, Any] = {name: getattr(self, name) + sign * getattr(other, name) for name in _NUMBERS}
        for name in _MAPPINGS:
            mine, others = getattr(self, name), getattr(other, name)
            counts[name] = {key: mine.get(key, 0) + sign * others.get(key, 0) for key in sorted({*mine, *others})}
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)} | {name: dict(getattr(self, name)) for name in _MAPPINGS}

    def to_proto(self) -> stats_pb2.HbmStats:
        """The message a trainer reports."""
        return stats_pb2.HbmStats(
            bank=self.bank,
            capacity_experts=self.capacity,
            resident_experts=self.resident,
            dirty_experts=self.dirty,
            expert_bytes=self.expert_bytes,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            write_backs=self.write_backs,
            prefetch_issued=self.prefetch_issued,
            prefetch_useful=self.prefetch_useful,
            prefetch_late=self.prefetch_late,
            prefetch_wasted=self.prefetch_wasted,
            prefetch_cancelled=self.prefetch_cancelled,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            stall_s=self.stall_s,
            refetches=self.refetches,
            prefetch_refused=self.prefetch_refused,
            prefetch_issued_bytes=self.prefetch_issued_bytes,
            prefetch_useful_bytes=self.prefetch_useful_bytes,
            prefetch_late_bytes=self.prefetch_late_bytes,
            prefetch_wasted_bytes=self.prefetch_wasted_bytes,
            prefetch_cancelled_bytes=self.prefetch_cancelled_bytes,
            prefetch_refused_bytes=self.prefetch_refused_bytes,
        )


_MAPPINGS = ("fetched_from", "ahead")
_NUMBERS = [item.name for item in fields(Counters) if item.name not in _MAPPINGS]

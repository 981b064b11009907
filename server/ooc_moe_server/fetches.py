"""Serving experts: what a FetchExperts stream does, without gRPC.

Experts come in the order that is fastest: unchanged ones, DRAM residents, then the others as they arrive. A fetch reads a few records ahead
and holds a pin only on those, so that a call may be larger than the DRAM tier. Knows nothing of how bytes travel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from ooc_moe_server.catalog import Bank, Record
from ooc_moe_server.dram import DramTier, Entry
from ooc_moe_server.promotions import Promotions
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.codec import HOLDS_NONE
from ooc_moe_wire.errors import CorruptRecord, InvalidRequest, TierFull
from ooc_moe_wire.v1 import expert_pb2

# Records that one call may have pinned or under way beyond the one it sends.
READ_AHEAD = 4
_LATENCY = {expert_pb2.TIER_DRAM: "fetch_dram", expert_pb2.TIER_NVME: "fetch_nvme", expert_pb2.TIER_SEED: "fetch_seed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One expert of a fetch. `entry` is pinned until the next one is asked for; None when unchanged or damaged."""

    expert: int
    version: int
    tier: expert_pb2.Tier.ValueType  # That held it when it was asked for.
    began: float = 0.0
    entry: Entry | None = None
    error: CorruptRecord | TierFull | None = None


class Fetch:
    """One call. `experts()` may be run once."""

    def __init__(
        self,
        bank: Bank,
        experts: Sequence[int],
        *,
        known_versions: Sequence[int],
        demand: bool,
        section_bytes: int,
        scopes: Scopes,
        dram: DramTier,
        promotions: Promotions,
        stats: Stats,
    ) -> None:
        """Checks the request. Raises UnknownExpert, InvalidRequest."""
        if not experts or len(set(experts)) != len(experts):
            raise InvalidRequest(f"experts: {len(experts)} ids, {len(set(experts))} of them different; at least one, each once")
        if known_versions and len(known_versions) != len(experts):
            raise InvalidRequest(f"known_versions: {len(known_versions)} for {len(experts)} experts")
        bank.check(experts)
        self._bank, self._demand, self._section_bytes, self._scopes = bank, demand, section_bytes, scopes
        self._dram, self._promotions, self._stats = dram, promotions, stats
        self._num_ahead = READ_AHEAD
        self._known = dict(zip(experts, known_versions or [HOLDS_NONE] * len(experts), strict=True))

    async def experts(self) -> AsyncGenerator[Served, None]:
        """Yields each expert once; close it to drop what was not taken.

        Raises:
            TierFull: pins left no room for too long.
        """
        self._scopes.count("fetched_experts", len(self._known))
        wanted = []
        for expert, known in self._known.items():
            record = self._bank.record(expert)
            if known != HOLDS_NONE and record.version == known:
                self._scopes.count("unchanged")
                yield Served(expert=expert, version=known, tier=self._tier(expert, record))
            else:
                wanted.append(expert)
        # Touched first, so that this call's own misses evict them last.
        residents: list[int] = []
        missing: deque[int] = deque()
        for expert in wanted:
            resident = self._dram.touch(self._bank.source(expert, self._bank.record(expert)))
            (residents if resident else missing).append(expert)
        ahead: set[asyncio.Task[Served]] = set()
        arrived: deque[asyncio.Task[Served]] = deque()
        try:
            self._read_ahead(missing, ahead, self._num_ahead)
            for expert in residents:
                if self._tier(expert, self._bank.record(expert)) != expert_pb2.TIER_DRAM:
                    missing.append(expert)  # Evicted meanwhile; to wait here would wait for pins that only this call can take back.
                    continue
                with self._lent(await self._acquire(expert)) as served:
                    yield served
            while missing or ahead or arrived:
                self._read_ahead(missing, ahead, self._num_ahead - len(arrived))
                if not arrived:
                    done, ahead = await asyncio.wait(ahead, return_when=asyncio.FIRST_COMPLETED)
                    arrived.extend(done)
                with self._lent(arrived.popleft().result()) as served:
                    if not isinstance(served.error, TierFull):
                        yield served
                    elif not ahead and not arrived:
                        raise served.error
                    else:  # The pins in the way may be our own: once more, and from now on one by one.
                        self._num_ahead = 1
                        missing.append(served.expert)
        finally:
            await self._abandon([*ahead, *arrived])

    def _read_ahead(self, missing: deque[int], ahead: set[asyncio.Task[Served]], limit: int) -> None:
        while missing and len(ahead) < limit:
            ahead.add(asyncio.create_task(self._acquire(missing.popleft())))

    async def _acquire(self, expert: int) -> Served:
        """The expert's present record, pinned, from wherever it is."""
        began = self._stats.clock()
        record = self._bank.record(expert)
        tier = self._tier(expert, record)
        entry = self._dram.take(self._bank.source(expert, record))
        error: CorruptRecord | TierFull | None = None
        was_prefetched = entry is not None and entry.wasted is not None
        try:
            entry = entry or await self._promotions.bring(self._bank, expert, record, urgent=self._demand)
            entry.wasted = None
        except (CorruptRecord, TierFull) as refusal:
            error = refusal
        if self._demand and not isinstance(error, TierFull):
            self._count(tier, was_prefetched)
        return Served(expert=expert, version=record.version, tier=tier, began=began, entry=entry, error=error)

    def _tier(self, expert: int, record: Record) -> expert_pb2.Tier.ValueType:
        if self._dram.holds(self._bank.source(expert, record)):
            return expert_pb2.TIER_DRAM
        return expert_pb2.TIER_NVME if record.slot else expert_pb2.TIER_SEED

    def _count(self, tier: expert_pb2.Tier.ValueType, was_prefetched: bool) -> None:
        """Counts a demand by the tier that held it."""
        if tier == expert_pb2.TIER_DRAM:
            self._scopes.count("hits")
            self._scopes.count("prefetch_hits", was_prefetched)
        else:
            self._scopes.count("misses")
            self._scopes.count("nvme_reads" if tier == expert_pb2.TIER_NVME else "seeded")

    @contextlib.contextmanager
    def _lent(self, served: Served) -> Iterator[Served]:
        """Counts what was sent, and takes the pin back."""
        try:
            yield served
            if served.entry:
                self._scopes.count("fetched_bytes", self._section_bytes)
                self._stats.took(_LATENCY[served.tier], served.began)
        finally:
            if served.entry:
                self._dram.unpin(served.entry)

    async def _abandon(self, tasks: Sequence[asyncio.Task[Served]]) -> None:
        """Takes back the pins of what nobody will ask for."""
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Served) and outcome.entry:
                self._dram.unpin(outcome.entry)

"""Serves one fetch of several experts: what the gRPC call FetchExperts does, without gRPC.

Experts come in the fastest order: first those whose version the caller has already, then those in DRAM, then the rest as they arrive from
NVMe or are made from the seed. A fetch loads a few records before they are asked for. Only these and the records that the fetch hands out
are pinned, so that a call may fetch more than the DRAM tier holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from ooc_moe_server.catalog.catalog import UNWRITTEN, Bank, Record, Source
from ooc_moe_server.dram.tier import DramTier, Entry
from ooc_moe_server.engine.promotions import Promotions
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.codec import HOLDS_NONE
from ooc_moe_wire.errors import CorruptRecord, InvalidRequest, TierFull
from ooc_moe_wire.v1 import expert_pb2

# Records that one call may have pinned or under way beyond those that it hands out. More than are read at once, so that the disk never
# waits for the call.
READ_AHEAD = 8
_LATENCY = {expert_pb2.TIER_DRAM: "fetch_dram", expert_pb2.TIER_NVME: "fetch_nvme", expert_pb2.TIER_SEED: "fetch_seed"}
# The expert, record and source of a resident.
_Resident = tuple[int, Record, Source]
# Returns how many records may be handed out now, at least one. May wait for room first.
Room = Callable[[], Awaitable[int]]


@dataclass(slots=True)
class Served:
    """The result of a fetch for one expert: its version and its record, pinned in DRAM (`entry`), or the error.

    `entry` is None when the caller has this version already, or when there is an error.
    """

    expert: int
    version: int
    tier: expert_pb2.Tier.ValueType  # The tier that held the record when it was asked for.
    began: float = 0.0
    entry: Entry | None = None
    error: CorruptRecord | TierFull | None = None
    was_prefetched: bool = False


class Fetch:
    """Finds or loads the records of several experts, and yields them pinned in DRAM. Call either `experts()` or `batches()`, once."""

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
        """Checks the request. Raises UnknownExpert, InvalidRequest.

        Args:
            bank: The bank of the experts.
            experts: The ids of the experts, each once.
            known_versions: For each expert, the version that the caller holds already; empty when the caller holds none.
            demand: Whether the caller waits for the experts now; False for speculation, which may use less room.
            section_bytes: The bytes that are sent of each record, for the counters.
            scopes: The counters that the fetch is added to.
            dram: The DRAM tier, in which records are pinned.
            promotions: Loads records into DRAM.
            stats: The daemon's counters.
        """
        if not experts or len(set(experts)) != len(experts):
            raise InvalidRequest(f"experts: {len(experts)} ids, {len(set(experts))} of them different; at least one, each once")
        if known_versions and len(known_versions) != len(experts):
            raise InvalidRequest(f"known_versions: {len(known_versions)} for {len(experts)} experts")
        bank.check(experts)
        self._bank, self._demand, self._section_bytes, self._scopes = bank, demand, section_bytes, scopes
        self._dram, self._promotions, self._stats = dram, promotions, stats
        self._alone: set[int] = set()  # Experts that found no room. They are tried again when this call holds no other pin.
        self._known = dict(zip(experts, known_versions or [HOLDS_NONE] * len(experts), strict=True))

    async def experts(self) -> AsyncGenerator[Served, None]:
        """Yields the result for each expert, whose record is pinned in DRAM until the next result is asked for.

        Close the generator to drop the results that were not yielded.

        Raises:
            TierFull: pins left no room for too long.
        """
        async with contextlib.aclosing(self.batches(_one)) as batches:
            async for batch in batches:
                for served in batch:  # Only unchanged experts, which have no pin, come several at a time.
                    try:
                        yield served
                        self.sent((served,))
                    finally:
                        if served.entry:
                            self._dram.unpin(served.entry)

    async def batches(self, room: Room) -> AsyncGenerator[list[Served], None]:
        """Yields the results for all experts in lists: each time the results that are ready, up to the number that `room` returns.

        `room` is called before each list, and may wait until the caller can take more. The caller must release the pin that keeps each
        record in DRAM.
        """
        self._scopes.count("fetched_experts", len(self._known))
        unchanged, residents, missing = self._sorted()
        if unchanged:
            self._scopes.count("unchanged", len(unchanged))
            yield unchanged
        ahead: set[asyncio.Task[Served]] = set()
        arrived: deque[asyncio.Task[Served]] = deque()
        try:
            self._read_ahead(missing, ahead, READ_AHEAD)
            while residents:
                if batch := self._pin_residents(residents, missing, await room()):
                    yield self._counted(batch)
            while missing or ahead or arrived:
                self._read_ahead(missing, ahead, (1 if self._alone else READ_AHEAD) - len(arrived))
                if not arrived:
                    done, ahead = await asyncio.wait(ahead, return_when=asyncio.FIRST_COMPLETED)
                    arrived.extend(done)
                batch = self._with_room(_landed(arrived, await room()), missing)
                if not self._alone:
                    self._read_ahead(missing, ahead, READ_AHEAD - len(arrived))
                if batch:
                    yield self._counted(batch)
        finally:
            await self._abandon([*ahead, *arrived])

    def sent(self, batch: Sequence[Served], *, leased: bool = False) -> None:
        """Counts the bytes and latencies of a batch of results that was sent to the caller. `leased`: sent as leases of shared memory."""
        num_bytes = self._section_bytes * sum(served.entry is not None for served in batch)
        self._scopes.count("fetched_bytes", num_bytes)
        if leased:
            self._scopes.count("leased_bytes", num_bytes)
        for served in batch:
            if served.entry:
                self._stats.add_latency(_LATENCY[served.tier], served.began)

    def _sorted(self) -> tuple[list[Served], deque[_Resident], deque[int]]:
        """Sorts the experts into unchanged (the caller has the version), resident in DRAM, and missing from DRAM.

        Also counts a use of the resident ones, so that loading the missing ones evicts them last.
        """
        bank = self._bank
        unchanged: list[Served] = []
        residents: deque[_Resident] = deque()
        missing: deque[int] = deque()
        bank.check(())
        for expert, known in self._known.items():
            record = bank.records.get(expert, UNWRITTEN)
            if known != HOLDS_NONE and record.version == known:
                unchanged.append(Served(expert, known, self._tier(expert, record)))
            elif self._dram.touch(source := bank.source(expert, record)):
                residents.append((expert, record, source))
            else:
                missing.append(expert)
        return unchanged, residents, missing

    def _pin_residents(self, residents: deque[_Resident], missing: deque[int], limit: int) -> list[Served]:
        """Pins the next records that were in DRAM, at most `limit`, and returns their results.

        A record that was evicted meanwhile is added to `missing`, to be loaded later. To wait for room here could mean to wait for the pins
        of this very fetch.
        """
        bank, began = self._bank, self._stats.clock()
        batch: list[Served] = []
        bank.check(())
        while residents and len(batch) < limit:
            expert, record, source = residents.popleft()
            if (present := bank.records.get(expert, UNWRITTEN)) is not record:
                record, source = present, bank.source(expert, present)
            entry = self._dram.pin_resident(source, demand=self._demand)
            if entry is None:
                missing.append(expert)
                continue
            batch.append(Served(expert, record.version, expert_pb2.TIER_DRAM, began, entry, None, entry.wasted is not None))
            entry.wasted = None
        return batch

    def _with_room(self, batch: list[Served], missing: deque[int]) -> list[Served]:
        """Returns the batch without the experts that found no room in DRAM. These are added to `missing`, to be tried once more, alone.

        This fetch's own pins may have taken the room.

        Raises:
            TierFull: an expert found no room although it was alone.
        """
        for served in batch:
            if isinstance(served.error, TierFull):
                if served.expert in self._alone:
                    raise served.error
                self._alone.add(served.expert)
                missing.append(served.expert)
        return [served for served in batch if not isinstance(served.error, TierFull)]

    def _read_ahead(self, missing: deque[int], ahead: set[asyncio.Task[Served]], limit: int) -> None:
        while missing and len(ahead) < limit:
            ahead.add(asyncio.create_task(self._acquire(missing.popleft())))

    async def _acquire(self, expert: int) -> Served:
        """Pins the current record of an expert in DRAM, and loads it first if it is not there. A failure becomes the result's `error`."""
        record = self._bank.record(expert)
        served = Served(expert, record.version, self._tier(expert, record), self._stats.clock())
        try:
            resident = self._dram.pin_resident(self._bank.source(expert, record), demand=self._demand)
            served.entry = resident or await self._promotions.promote(self._bank, expert, record, urgent=self._demand)
            served.was_prefetched = resident is not None and resident.wasted is not None
            served.entry.wasted = None
        except (CorruptRecord, TierFull) as refusal:
            served.error = refusal
        return served

    def _tier(self, expert: int, record: Record) -> expert_pb2.Tier.ValueType:
        if self._dram.holds(self._bank.source(expert, record)):
            return expert_pb2.TIER_DRAM
        return expert_pb2.TIER_NVME if record.slot else expert_pb2.TIER_SEED

    def _counted(self, batch: list[Served]) -> list[Served]:
        """Adds the experts of a batch to the counters of hits and misses, by the tier that held each record. Returns the batch."""
        if self._demand:
            tiers = [served.tier for served in batch]
            num_nvme, num_seeded = tiers.count(expert_pb2.TIER_NVME), tiers.count(expert_pb2.TIER_SEED)
            num_hits = len(batch) - num_nvme - num_seeded
            self._scopes.count("hits", num_hits)
            self._scopes.count("prefetch_hits", sum(served.was_prefetched for served in batch))
            self._scopes.count("misses", num_nvme + num_seeded)
            self._scopes.count("nvme_reads", num_nvme)
            self._scopes.count("seeded", num_seeded)
        return batch

    async def _abandon(self, tasks: Sequence[asyncio.Task[Served]]) -> None:
        """Cancels reads that are under way, and unpins the records of those that have ended."""
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Served) and outcome.entry:
                self._dram.unpin(outcome.entry)


def _landed(arrived: deque[asyncio.Task[Served]], limit: int) -> list[Served]:
    """Takes the results of finished loads from `arrived`, up to `limit`.

    Stops before a failed one. The next call raises its error, so that the pinned records taken before it are not lost.
    """
    batch: list[Served] = []
    while arrived and len(batch) < limit and not (batch and arrived[0].exception()):
        batch.append(arrived.popleft().result())
    return batch


async def _one() -> int:
    """Returns 1: a `Room` (the function that limits how many results `batches` yields at once) for yielding one at a time."""
    return 1

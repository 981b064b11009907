"""The DRAM tier: immutable records in the arena, pinned while they are used, evicted by policy.

    reserve -> staging entry (pinned, nameless) -> publish -> resident under its source -> evicted, or discarded -> bytes free again

Filled by demand misses, prefetches and pushes alike, and served from. Lives on the event loop; other threads only ever touch the bytes of
an entry that is pinned for them. Knows nothing of where records come from.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from ooc_moe_server.arena import Arena
from ooc_moe_server.catalog import Seed, Source
from ooc_moe_server.extents import Extent, Extents
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.policy import LRU, EvictionPolicy
from ooc_moe_wire.v1 import stats_pb2


class Entry:
    """One record in the arena. `source` is None while it is being filled, and again once it was discarded."""

    __slots__ = ("bank_id", "checksums", "extent", "pins", "record", "source", "wasted")

    extent: Extent[Entry]
    record: memoryview

    def __init__(self) -> None:
        self.pins = 1
        self.source: Source | None = None
        self.bank_id = 0
        self.checksums: Checksums | None = None
        self.wasted: Callable[[], None] | None = None  # Set: brought by a prefetch, not asked for since; called if it leaves so.

    @property
    def body(self) -> memoryview:
        """The sections, without the header block."""
        return self.record[BLOCK_BYTES:]


class DramTier:
    """Residents by source."""

    def __init__(self, arena: Arena, policy: EvictionPolicy[Source] | None = None) -> None:
        self.stats = stats_pb2.TierStats(capacity_bytes=arena.num_bytes)
        self.records_by_bank: Counter[int] = Counter()
        self._arena = arena
        self._policy: EvictionPolicy[Source] = policy or LRU()
        self._extents: Extents[Entry] = Extents(arena.num_bytes)
        self._residents: dict[Source, Entry] = {}
        self._pinned_bytes = 0
        self._room = asyncio.Event()  # Set whenever a pin or an extent went away.

    @property
    def unpinned_bytes(self) -> int:
        """Bytes that are free or could be freed, in however many pieces."""
        return self._extents.capacity - self._pinned_bytes

    def holds(self, source: Source) -> bool:
        """Whether it is resident; counts as no use."""
        return source in self._residents

    def touch(self, source: Source) -> bool:
        """Makes it the last to leave; False when it is not resident."""
        if source not in self._residents:
            return False
        self._policy.touch(source)
        return True

    def take(self, source: Source) -> Entry | None:
        """The resident, pinned for the caller and counted as used, or None."""
        if not self.touch(source):
            return None
        entry = self._residents[source]
        self.pin(entry)
        self.stats.reads += 1
        self.stats.read_bytes += entry.extent.size
        return entry

    def pin(self, entry: Entry) -> None:
        """Forbids that its bytes are reused, once more."""
        if entry.pins == 0:
            self._pinned_bytes += entry.extent.size
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Takes one pin back. A nameless entry's bytes are free with its last pin."""
        assert entry.pins > 0
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned_bytes -= entry.extent.size
            if entry.source is None:
                self._free(entry)
            self._room.set()

    def reserve(self, num_bytes: int) -> Entry:
        """A staging entry of `num_bytes` with one pin, evicting what it must.

        Raises:
            TierFull: pins leave no room.
        """
        entry = Entry()
        extent = self._extents.allocate(num_bytes, entry)
        if extent is None:
            self._make_room(num_bytes)
            extent = self._extents.allocate(num_bytes, entry)
            assert extent is not None
        entry.extent = extent
        entry.record = self._arena.view(extent.start, extent.size)
        self._pinned_bytes += extent.size
        return entry

    async def reserve_soon(self, num_bytes: int, patience_s: float) -> Entry:
        """As `reserve`, but waits for pins to go. Raises TierFull after `patience_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            self._room.clear()
            try:
                return self.reserve(num_bytes)
            except TierFull:
                if loop.time() >= deadline or num_bytes > self._extents.capacity:
                    raise
            try:
                async with asyncio.timeout_at(deadline):
                    await self._room.wait()
            except TimeoutError:
                continue  # One last try, which raises.

    def publish(self, entry: Entry, source: Source, checksums: Checksums, bank_id: int) -> None:
        """Makes a filled staging entry resident. Its pin stays the caller's."""
        assert entry.source is None, "published twice"
        assert source not in self._residents
        entry.source, entry.checksums, entry.bank_id = source, checksums, bank_id
        self._arena.complete(entry.extent.start)
        self._residents[source] = entry
        self._policy.insert(source)
        self.records_by_bank[bank_id] += 1
        self.stats.writes += 1
        self.stats.written_bytes += entry.extent.size

    def discard(self, source: Source) -> None:
        """Forgets a resident, if it is one; its bytes are free when its pins are gone."""
        entry = self._residents.pop(source, None)
        if entry is None:
            return
        self._policy.remove(source)
        self.records_by_bank[entry.bank_id] -= 1
        entry.source = None
        if entry.wasted:
            entry.wasted()
        if entry.pins == 0:
            self._free(entry)
            self._room.set()

    def discard_seeds(self, bank_id: int) -> None:
        """Forgets the seeded values of a bank that is gone."""
        for source in [source for source in self._residents if isinstance(source, Seed) and source.bank_id == bank_id]:
            self.discard(source)

    def snapshot_stats(self) -> stats_pb2.TierStats:
        """The counters, with the present occupancy."""
        self.stats.free_bytes = self._extents.free_bytes
        self.stats.used_bytes = self._extents.capacity - self._extents.free_bytes
        self.stats.pinned_bytes = self._pinned_bytes
        self.stats.num_records = len(self._residents)
        return self.stats

    def _free(self, entry: Entry) -> None:
        self._arena.spoil(entry.extent.start)
        self._extents.free(entry.extent)

    def _make_room(self, num_bytes: int) -> None:
        """Evicts the first window, in policy order of the residents it grows around, that `num_bytes` fit into."""
        for source in self._policy.victims():
            entry = self._residents[source]
            if entry.pins:
                continue
            window = self._extents.window(entry.extent, num_bytes, lambda owner: owner.pins == 0)
            if window is not None:
                return self._evict(window)
        raise TierFull(
            f"DRAM tier: no room for a record of {num_bytes} bytes; {self._pinned_bytes} of {self._extents.capacity} bytes are pinned"
        )

    def _evict(self, window: list[Extent[Entry]]) -> None:
        for extent in window:
            assert extent.owner is not None
            assert extent.owner.source is not None
            self.discard(extent.owner.source)
            self.stats.evictions += 1

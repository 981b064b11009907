"""The DRAM tier: immutable records in the arena, pinned while they are used, evicted by policy.

    reserve -> staging entry (pinned, nameless) -> publish -> resident under its source -> evicted, or discarded -> bytes free again

Filled by demand misses, prefetches and pushes alike, and served from. Who may evict whom:

- what is pinned stays;
- a demand or a push evicts anything else, in the policy's order;
- speculation evicts nothing that was demanded lately: the records demanded last keep half of the arena. What prefetches brought and nobody
  asked for may hold the other half; beyond that the oldest of it leaves first for the next prefetch, else the policy's order counts.

Lives on the event loop; other threads only ever touch the bytes of an entry that is pinned for them. Knows nothing of where records come
from.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from ooc_moe_server.catalog.catalog import Seed, Source
from ooc_moe_server.dram.arena import Arena
from ooc_moe_server.dram.extents import Extent, Extents
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.policy import LRU, EvictionPolicy
from ooc_moe_wire.v1 import stats_pb2


class Entry:
    """One record in the arena. `source` is None while it is being filled, and again once it was discarded."""

    __slots__ = ("announced", "bank_id", "checksums", "extent", "pins", "record", "source", "wasted")

    extent: Extent[Entry]
    record: memoryview

    def __init__(self) -> None:
        self.pins = 1
        self.source: Source | None = None
        self.bank_id = 0
        self.checksums: Checksums | None = None
        self.announced = False  # Touched, and not yet taken: the two are one use.
        self.wasted: Callable[[], None] | None = None  # Set: brought by a prefetch, not asked for since; called if it leaves so.

    @property
    def body(self) -> memoryview:
        """The sections, without the header block."""
        return self.record[BLOCK_BYTES:]


class _Share:
    """Residents that together hold a part of the arena, the oldest first."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.idle_bytes = 0  # Of these, unpinned.
        self.entries: OrderedDict[Entry, None] = OrderedDict()

    def add(self, entry: Entry) -> None:
        """Enters, or enters anew, as the newest."""
        self.drop(entry)
        self.entries[entry] = None
        self.num_bytes += entry.extent.size
        self.idle_bytes += entry.extent.size if entry.pins == 0 else 0

    def drop(self, entry: Entry) -> None:
        """Leaves, if it is in here."""
        if entry in self.entries:
            del self.entries[entry]
            self.num_bytes -= entry.extent.size
            self.idle_bytes -= entry.extent.size if entry.pins == 0 else 0

    def idles(self, entry: Entry, sign: int) -> None:
        """An entry, perhaps one in here, lost its last pin (+1) or got its first (-1)."""
        if entry in self.entries:
            self.idle_bytes += sign * entry.extent.size


class DramTier:
    """Residents by source."""

    def __init__(self, arena: Arena, policy: EvictionPolicy[Source] | None = None) -> None:
        self._arena = arena
        self._policy: EvictionPolicy[Source] = policy or LRU()
        self.stats = stats_pb2.TierStats(capacity_bytes=arena.num_bytes, policy=self._policy.name)
        self.records_by_bank: Counter[int] = Counter()
        self._extents: Extents[Entry] = Extents(arena.num_bytes)
        self._residents: dict[Source, Entry] = {}
        self._pinned_bytes = 0
        self._room = asyncio.Event()  # Set whenever a pin or an extent went away.
        self._num_waiting = 0  # Demands and pushes that wait for it.
        self._half = arena.num_bytes // 2
        self._protected = _Share()  # Demanded last: speculation evicts none of them.
        self._unasked = _Share()  # Brought by prefetches, not asked for since.

    @property
    def unpinned_bytes(self) -> int:
        """Bytes that are free or could be freed, in however many pieces."""
        return self._extents.capacity - self._pinned_bytes

    @property
    def speculative_bytes(self) -> int:
        """Bytes that are free or that speculation could free, in however many pieces."""
        return self.unpinned_bytes - self._protected.idle_bytes

    def holds(self, source: Source) -> bool:
        """Whether it is resident; counts as no use."""
        return source in self._residents

    def touch(self, source: Source) -> bool:
        """Announces that it will be taken, so that it leaves later than others; False when it is not resident."""
        entry = self._residents.get(source)
        if entry is None:
            return False
        self._policy.touch(source)
        entry.announced = True
        return True

    def take(self, source: Source, *, demand: bool = True) -> Entry | None:
        """The resident, pinned for the caller and counted as used, or None. `demand`: not for a prefetch."""
        entry = self._residents.get(source)
        if entry is None:
            return None
        if not entry.announced:
            self._policy.touch(source)
        entry.announced = False
        self.pin(entry)
        self.asked(entry, demand=demand)
        self.stats.reads += 1
        self.stats.read_bytes += entry.extent.size
        return entry

    def asked(self, entry: Entry, *, demand: bool) -> None:
        """Somebody asked for a resident; protects it from speculation for a while if that was a demand."""
        self._unasked.drop(entry)
        if demand and entry.source is not None:
            self._protected.add(entry)
            while self._protected.num_bytes > self._half:
                self._protected.drop(next(iter(self._protected.entries)))

    def pin(self, entry: Entry) -> None:
        """Forbids that its bytes are reused, once more."""
        if entry.pins == 0:
            self._pinned_bytes += entry.extent.size
            self._protected.idles(entry, -1)
            self._unasked.idles(entry, -1)
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Takes one pin back. A nameless entry's bytes are free with its last pin."""
        assert entry.pins > 0
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned_bytes -= entry.extent.size
            self._protected.idles(entry, 1)
            self._unasked.idles(entry, 1)
            if entry.source is None:
                self._free(entry)
            self._room.set()

    def reserve(self, num_bytes: int, *, speculative: bool = False) -> Entry:
        """A staging entry of `num_bytes` with one pin, evicting what it must, and may.

        Raises:
            TierFull: pins leave no room; or for speculation: what was demanded lately leaves none, or others wait for it.
        """
        if speculative and self._num_waiting:
            raise TierFull(f"DRAM tier: {self._num_waiting} demands and pushes wait for room")
        entry = Entry()
        extent = self._extents.allocate(num_bytes, entry)
        if extent is None:
            self._make_room(num_bytes, speculative)
            extent = self._extents.allocate(num_bytes, entry)
            assert extent is not None
        entry.extent = extent
        entry.record = self._arena.view(extent.start, extent.size)
        self._pinned_bytes += extent.size
        return entry

    async def reserve_soon(self, num_bytes: int, patience_s: float) -> Entry:
        """As `reserve` for a demand or a push, but waits for pins to go. Raises TierFull after `patience_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            self._room.clear()
            try:
                return self.reserve(num_bytes)
            except TierFull:
                if loop.time() >= deadline or num_bytes > self._extents.capacity:
                    raise
            self._num_waiting += 1
            try:
                async with asyncio.timeout_at(deadline):
                    await self._room.wait()
            except TimeoutError:
                continue  # One last try, which raises.
            finally:
                self._num_waiting -= 1

    def publish(
        self,
        entry: Entry,
        source: Source,
        checksums: Checksums,
        bank_id: int,
        *,
        replaces: Source | None = None,
        wasted: Callable[[], None] | None = None,
    ) -> None:
        """Makes a filled staging entry resident. Its pin stays the caller's.

        Args:
            entry: The staging entry.
            source: What it holds; not resident yet.
            checksums: Of its sections.
            bank_id: The bank it is counted under.
            replaces: The source that it is a newer version of; if that is resident, it is discarded, and its place and its uses pass on.
            wasted: Nobody has asked for it: a prefetch brought it. Called if it leaves before anybody does.
        """
        assert entry.source is None, "published twice"
        assert source not in self._residents
        entry.source, entry.checksums, entry.bank_id, entry.wasted = source, checksums, bank_id, wasted
        self._arena.complete(entry.extent.start)
        self._residents[source] = entry
        self.records_by_bank[bank_id] += 1
        self.stats.writes += 1
        self.stats.written_bytes += entry.extent.size
        older = self._residents.pop(replaces, None) if replaces is not None else None
        if older is None:
            self._policy.insert(source, entry.extent.size)
        else:
            assert older.source is not None
            self._policy.rename(older.source, source)
            self._policy.touch(source)
            was_protected = older in self._protected.entries
            self._forget(older)
            if was_protected:
                self.asked(entry, demand=True)
        if wasted:
            self._unasked.add(entry)

    def rename(self, old: Source, new: Source) -> None:
        """A resident, if it is one, goes by another name from now on: an unsaved version was written to a slot."""
        entry = self._residents.pop(old, None)
        if entry is not None:
            assert new not in self._residents
            self._residents[new] = entry
            entry.source = new
            self._policy.rename(old, new)

    def discard(self, source: Source) -> None:
        """Forgets a resident, if it is one; its bytes are free when its pins are gone."""
        entry = self._residents.pop(source, None)
        if entry is not None:
            self._policy.remove(source)
            self._forget(entry)

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

    def _forget(self, entry: Entry) -> None:
        """An entry is resident no longer; its bytes are free when its pins are gone."""
        self.records_by_bank[entry.bank_id] -= 1
        self._protected.drop(entry)
        self._unasked.drop(entry)
        entry.source = None
        if entry.wasted:
            entry.wasted()
        if entry.pins == 0:
            self._free(entry)
            self._room.set()

    def _free(self, entry: Entry) -> None:
        self._arena.spoil(entry.extent.start)
        self._extents.free(entry.extent)

    def _make_room(self, num_bytes: int, speculative: bool) -> None:
        """Evicts the first window, in order of the residents it grows around, that `num_bytes` fit into."""

        def movable(entry: Entry) -> bool:
            return entry.pins == 0 and not (speculative and entry in self._protected.entries)

        for source in self._overdue(num_bytes) if speculative else ():
            window = self._window(source, num_bytes, movable)
            if window is not None:
                return self._evict(window, None)
        for source in self._policy.victims():
            window = self._window(source, num_bytes, movable)
            if window is not None:
                return self._evict(window, source)
        raise TierFull(
            f"DRAM tier: no room for a record of {num_bytes} bytes; {self._pinned_bytes} of {self._extents.capacity} bytes are pinned"
            + (f", {self._protected.idle_bytes} others were demanded lately" if speculative else "")
        )

    def _overdue(self, num_bytes: int) -> Iterator[Source]:
        """What earlier prefetches brought in vain, the oldest first, when there would be too much of it."""
        if self._unasked.num_bytes + num_bytes > self._half:
            yield from (entry.source for entry in self._unasked.entries if entry.source is not None)

    def _window(self, source: Source, num_bytes: int, movable: Callable[[Entry], bool]) -> list[Extent[Entry]] | None:
        """The extents to free around a resident, or None when it, or too many beside it, must stay."""
        entry = self._residents[source]
        return self._extents.window(entry.extent, num_bytes, movable) if movable(entry) else None

    def _evict(self, window: list[Extent[Entry]], chosen: Source | None) -> None:
        """Empties a window. Only what the policy chose is evicted in its eyes; what lay beside it, or nobody asked for, just goes."""
        for extent in window:
            assert extent.owner is not None
            source = extent.owner.source
            assert source is not None
            del self._residents[source]
            if source == chosen:
                self._policy.evict(source)
            else:
                self._policy.remove(source)
            self._forget(extent.owner)
            self.stats.evictions += 1

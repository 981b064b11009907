"""The DRAM tier: a cache of records in the arena (shared memory). Records do not change there, and are evicted by a policy.

    reserve -> staging entry (pinned, without a source) -> publish -> resident under its source -> evicted or discarded -> free bytes

A source tells where a record's bytes come from (a slot on NVMe, the bank's seed, or an unsaved push). Records are found by their source.
A pin keeps a record from being evicted while it is in use. Fetches, prefetches and pushes all fill this one tier. The rules of eviction:

- A pinned record is not evicted.
- A demand (a fetch that a caller waits for) or a push may evict any other record, in the policy's order.
- Speculation (a prefetch) evicts no record that was demanded lately: the records demanded last are protected, up to half of the arena.
  Records that prefetches brought and that no caller asked for yet may fill the other half. Beyond that, the next prefetch first evicts the
  oldest of them; otherwise the policy's order applies.

To be used on the event loop only; other threads touch only the bytes of an entry that is pinned for them.
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
    """One record in the arena, and the number of its pins (uses under way).

    The tier finds the record by `source`, which is None while the entry is being filled, and again once it was evicted or discarded.
    """

    __slots__ = ("announced", "bank_id", "checksums", "extent", "pins", "record", "source", "wasted")

    extent: Extent[Entry]
    record: memoryview

    def __init__(self) -> None:
        self.pins = 1
        self.source: Source | None = None
        self.bank_id = 0
        self.checksums: Checksums | None = None
        self.announced = False  # `touch` counted a use of this resident, so that the next `pin_resident` counts none.
        self.wasted: Callable[[], None] | None = None  # Set while only a prefetch wanted the record; called if it leaves like that.

    @property
    def body(self) -> memoryview:
        """The bytes of the record's parameter and optimizer sections, without the header block."""
        return self.record[BLOCK_BYTES:]


class _AgeList:
    """A list of some of the records in DRAM, the oldest first. It also counts how many bytes they hold, in all and without pins."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.idle_bytes = 0  # The part of `num_bytes` that is not pinned.
        self.entries: OrderedDict[Entry, None] = OrderedDict()

    def add(self, entry: Entry) -> None:
        """Appends a record in DRAM as the newest of the list, or moves it there if it is in the list already."""
        self.drop(entry)
        self.entries[entry] = None
        self.num_bytes += entry.extent.size
        self.idle_bytes += entry.extent.size if entry.pins == 0 else 0

    def drop(self, entry: Entry) -> None:
        """Removes a record from the list, if it is in it."""
        if entry in self.entries:
            del self.entries[entry]
            self.num_bytes -= entry.extent.size
            self.idle_bytes -= entry.extent.size if entry.pins == 0 else 0

    def note_idle(self, entry: Entry, sign: int) -> None:
        """Updates `idle_bytes` when an entry lost its last pin (`sign` +1) or got its first pin (-1). The entry need not be in the list."""
        if entry in self.entries:
            self.idle_bytes += sign * entry.extent.size


class DramTier:
    """Keeps records in the arena, each found by its source (a slot, a seed or an unsaved push), and evicts records when room is needed.

    A record that is in the arena and can be found is called resident.
    """

    def __init__(self, arena: Arena, policy: EvictionPolicy[Source] | None = None) -> None:
        self._arena = arena
        self._policy: EvictionPolicy[Source] = policy or LRU()
        self.stats = stats_pb2.TierStats(capacity_bytes=arena.num_bytes, policy=self._policy.name)
        self.records_by_bank: Counter[int] = Counter()
        self._extents: Extents[Entry] = Extents(arena.num_bytes)
        self._residents: dict[Source, Entry] = {}
        self._pinned_bytes = 0
        self._room = asyncio.Event()  # Set whenever a pin is released or bytes become free.
        self._num_waiting = 0  # The number of demands and pushes that wait for room.
        self._half = arena.num_bytes // 2
        self._protected = _AgeList()  # The residents demanded last. Speculation evicts none of them.
        self._unasked = _AgeList()  # Residents that prefetches brought and that no caller asked for yet.

    @property
    def unpinned_bytes(self) -> int:
        """Bytes that are free or that evictions could free, because no pin holds them. These bytes may lie in several pieces."""
        return self._extents.capacity - self._pinned_bytes

    @property
    def speculative_bytes(self) -> int:
        """Bytes that a prefetch may use: free bytes, and bytes of records that a prefetch may evict (not pinned, and not demanded lately).

        These bytes may lie in several pieces.
        """
        return self.unpinned_bytes - self._protected.idle_bytes

    def holds(self, source: Source) -> bool:
        """Whether DRAM has the record of `source` (a slot on NVMe, an unsaved version, or a seed). Asking does not count as a use."""
        return source in self._residents

    def touch(self, source: Source) -> bool:
        """Counts a use of a record in DRAM before `pin_resident` pins it, so that until then the policy evicts other records first.

        `pin_resident` then does not count the same use again. Returns False when the record is not in DRAM.
        """
        entry = self._residents.get(source)
        if entry is None:
            return False
        self._policy.touch(source)
        entry.announced = True
        return True

    def pin_resident(self, source: Source, *, demand: bool = True) -> Entry | None:
        """Pins a record for the caller if it is in DRAM (resident), and counts the use. Returns its entry, or None when it is not in DRAM.

        `demand`: True when a caller waits for the record now, False for speculation (a prefetch). If True, no prefetch evicts the record
        until this record and those demanded after it take more than half of the arena.
        """
        entry = self._residents.get(source)
        if entry is None:
            return None
        if not entry.announced:
            self._policy.touch(source)
        entry.announced = False
        self.pin(entry)
        self.note_request(entry, demand=demand)
        self.stats.reads += 1
        self.stats.read_bytes += entry.extent.size
        return entry

    def note_request(self, entry: Entry, *, demand: bool) -> None:
        """Notes that a caller asked for a record in DRAM. The record then no longer counts as one that was prefetched in vain so far.

        `demand`: True when the caller waits for the record now (a demand). Then no prefetch evicts the record until this record and those
        demanded after it take more than half of the arena.
        """
        self._unasked.drop(entry)
        if demand and entry.source is not None:
            self._protected.add(entry)
            while self._protected.num_bytes > self._half:
                self._protected.drop(next(iter(self._protected.entries)))

    def pin(self, entry: Entry) -> None:
        """Adds a pin (a use under way) to an entry. While an entry has any pin, its bytes are not reused for another record."""
        if entry.pins == 0:
            self._pinned_bytes += entry.extent.size
            self._protected.note_idle(entry, -1)
            self._unasked.note_idle(entry, -1)
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Releases one pin (a use that was under way) of an entry.

        When the last pin of an entry that is not resident (never published, or evicted) is released, the bytes of the entry become free.
        """
        assert entry.pins > 0
        entry.pins -= 1
        if entry.pins == 0:
            self._pinned_bytes -= entry.extent.size
            self._protected.note_idle(entry, 1)
            self._unasked.note_idle(entry, 1)
            if entry.source is None:
                self._free(entry)
            self._room.set()

    def reserve(self, num_bytes: int, *, speculative: bool = False) -> Entry:
        """Returns a new staging entry: `num_bytes` of the arena, to be filled with a record. Evicts other records to make room.

        The entry has one pin (a use under way), which the caller must release. `speculative`: the room is for a prefetch, which may not
        evict every record.

        Raises:
            TierFull: pinned records leave no room. For a prefetch also: records demanded lately leave no room, or a demand or a push waits
                for room.
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
        """Reserves room for a record that a caller waits for or pushes, as `reserve` does, but waits for pins to be released if there is no
        room.

        Raises TierFull after `patience_s` seconds.
        """
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
                continue  # Tries a last time, and raises if there is still no room.
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
        """Makes a filled staging entry resident: from now on, fetches find the record by its source. The caller keeps its pin.

        Args:
            entry: The staging entry, which `reserve` returned.
            source: The source of the record; it must not be resident yet.
            checksums: The checksums of the record's sections (parameters, optimizer state).
            bank_id: The bank of the record; the tier counts its records by bank.
            replaces: The source of the older version. If that version is resident, it is discarded, and the new version takes its place
                in the policy.
            wasted: Called if the record leaves DRAM before a caller asked for it. Given when only a prefetch wants the record.
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
                self.note_request(entry, demand=True)
        if wasted:
            self._unasked.add(entry)

    def rename(self, old: Source, new: Source) -> None:
        """Changes the source by which a record in DRAM is found from `old` to `new`. Does nothing when the record is not in DRAM.

        Call `rename` when a version that was only in memory was committed: the version's source is then a slot.
        """
        entry = self._residents.pop(old, None)
        if entry is not None:
            assert new not in self._residents
            self._residents[new] = entry
            entry.source = new
            self._policy.rename(old, new)

    def discard(self, source: Source) -> None:
        """Removes the record of a source from DRAM, if the record is there. The bytes of a pinned record become free with its last pin."""
        entry = self._residents.pop(source, None)
        if entry is not None:
            self._policy.remove(source)
            self._forget(entry)

    def discard_seeds(self, bank_id: int) -> None:
        """Removes the initial values (computed from the seed) of a deleted bank from DRAM."""
        for source in [source for source in self._residents if isinstance(source, Seed) and source.bank_id == bank_id]:
            self.discard(source)

    def snapshot_stats(self) -> stats_pb2.TierStats:
        """Returns the counters of the tier, with the numbers of free, used and pinned bytes brought up to date."""
        self.stats.free_bytes = self._extents.free_bytes
        self.stats.used_bytes = self._extents.capacity - self._extents.free_bytes
        self.stats.pinned_bytes = self._pinned_bytes
        self.stats.num_records = len(self._residents)
        return self.stats

    def _forget(self, entry: Entry) -> None:
        """Finishes the removal of a record that is no longer in `_residents`. Its bytes become free now, or with its last pin."""
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
        """Evicts records so that `num_bytes` become free in one piece.

        Tries the records in the policy's order. As soon as `num_bytes` can be freed at a record and its neighbours, evicts these.
        `speculative`: the room is for a prefetch, which evicts no protected record. If too many prefetched records were never asked for, it
        tries those before all others.
        """

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
        """Yields the prefetched records that no caller asked for yet, the oldest first, if they take too much of the arena.

        They do if they and the `num_bytes` of one more such record exceed half of the arena. Otherwise yields nothing.
        """
        if self._unasked.num_bytes + num_bytes > self._half:
            yield from (entry.source for entry in self._unasked.entries if entry.source is not None)

    def _window(self, source: Source, num_bytes: int, movable: Callable[[Entry], bool]) -> list[Extent[Entry]] | None:
        """Returns the extents to free, a record's own and its neighbours', to make a hole of `num_bytes`. None if too many must stay."""
        entry = self._residents[source]
        return self._extents.window(entry.extent, num_bytes, movable) if movable(entry) else None

    def _evict(self, window: list[Extent[Entry]], chosen: Source | None) -> None:
        """Evicts all records of a window (neighbouring extents), and tells the policy.

        `chosen`, the record that the policy chose, is reported as evicted, and the others as removed. None: all are reported as removed.
        """
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

"""The NVMe tier: slabs below one directory, and who refers to which slot.

Reads and writes run in a thread pool; the bookkeeping lives on the event loop. A slot's life: taken -> written -> synced -> referred to by
records, snapshots and readers -> free when the last lets go. Knows nothing of the index: commits.py puts the steps in order.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ooc_moe_server.catalog import Catalog, Slot
from ooc_moe_server.slab import Slab, supports_direct_io, sync_directory
from ooc_moe_wire.v1 import stats_pb2

Result = TypeVar("Result")
NUM_IO_THREADS = 8


class NvmeTier:
    """All slabs of a data directory. `on_free` is called with every slot that nobody refers to any more."""

    def __init__(self, directory: Path, catalog: Catalog, *, on_free: Callable[[Slot], None]) -> None:
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
        self.direct = supports_direct_io(directory)
        self.num_corrupt = 0
        self._directory = directory
        self._on_free = on_free
        self._io = ThreadPoolExecutor(NUM_IO_THREADS, thread_name_prefix="io")
        self._references = Counter(_referred(catalog))
        self._slabs: dict[int, Slab] = {}
        self._extending: dict[int, asyncio.Lock] = {}
        self._stats = stats_pb2.TierStats(io_mode="direct" if self.direct else "buffered")
        self._used_bytes = sum(slot.record_bytes for slot in self._references)
        for record_bytes in {slot.record_bytes for slot in self._references} | _record_sizes(directory):
            self._open(record_bytes)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on an I/O thread."""
        return await asyncio.get_running_loop().run_in_executor(self._io, work)

    async def take(self, record_bytes: int) -> Slot:
        """A free slot, held once, of a slab that grows as needed. Raises OSError (ENOSPC when the disk is full)."""
        slab = self._slabs.get(record_bytes) or self._open(record_bytes)
        while (index := slab.take()) is None:
            async with self._extending[record_bytes]:
                if slab.num_free == 0:
                    slab.added(await self.run(slab.extend))
        slot = Slot(record_bytes, index)
        self._references[slot] = 1
        self._used_bytes += record_bytes
        return slot

    def hold(self, slot: Slot) -> None:
        """Refers to a slot once more."""
        assert self._references[slot] > 0
        self._references[slot] += 1

    def let_go(self, slot: Slot) -> None:
        """Takes a reference back; with the last one the slot is free to be written anew."""
        self._references[slot] -= 1
        if self._references[slot] == 0:
            del self._references[slot]
            self._used_bytes -= slot.record_bytes
            self._on_free(slot)
            self._slabs[slot.record_bytes].give_back(slot.index)

    async def write(self, slot: Slot, record: memoryview) -> None:
        """Writes a record into its slot; durable after `sync`. Raises OSError."""
        await self.run(lambda: self._slabs[slot.record_bytes].write(slot.index, record))
        self._stats.writes += 1
        self._stats.written_bytes += slot.record_bytes

    async def sync(self, slots: Iterable[Slot]) -> None:
        """Makes what was written to the slabs of these slots durable. Raises OSError."""
        slabs = [self._slabs[size] for size in {slot.record_bytes for slot in slots}]
        await asyncio.gather(*(self.run(slab.sync) for slab in slabs))

    async def read(self, slot: Slot, into: memoryview, check: Callable[[], None]) -> None:
        """Reads a record and runs `check` over it, on an I/O thread. The caller holds the slot. Raises OSError, and what `check` raises."""
        slab = self._slabs[slot.record_bytes]

        def read_and_check() -> None:
            slab.read(slot.index, into)
            check()

        self._stats.reads += 1
        self._stats.read_bytes += slot.record_bytes
        await self.run(read_and_check)

    def snapshot_stats(self) -> stats_pb2.TierStats:
        """The counters, with the present occupancy."""
        disk = os.statvfs(self._directory)
        self._stats.capacity_bytes = disk.f_blocks * disk.f_frsize
        self._stats.free_bytes = disk.f_bavail * disk.f_frsize
        self._stats.used_bytes = self._used_bytes
        self._stats.num_records = len(self._references)
        self._stats.num_corrupt = self.num_corrupt
        return self._stats

    def close(self) -> None:
        """Waits for the I/O under way and closes the files."""
        self._io.shutdown()
        for slab in self._slabs.values():
            slab.close()

    def _open(self, record_bytes: int) -> Slab:
        used = [slot.index for slot in self._references if slot.record_bytes == record_bytes]
        slab = Slab(self._directory / f"{record_bytes}.slab", record_bytes, direct=self.direct, used=used)
        self._slabs[record_bytes] = slab
        self._extending[record_bytes] = asyncio.Lock()
        return slab


def _referred(catalog: Catalog) -> Iterable[Slot]:
    for bank in catalog.banks.values():
        yield from (record.slot for record in bank.records.values() if record.slot)
    for snapshot in catalog.snapshots.values():
        for bank_id in snapshot.banks:
            yield from snapshot.slots(bank_id)


def _record_sizes(directory: Path) -> set[int]:
    return {int(path.stem) for path in directory.glob("*.slab") if path.stem.isdigit()}

"""The NVMe tier: the slabs (slot files, one per record size) of a data directory, and a reference count for each slot in use.

    allocate -> write -> sync -> referred to by records, snapshots and readers -> free, when the last reference is released

Reads and writes run in thread pools; the bookkeeping runs on the event loop. The caller takes care of the order: it syncs a slot before a
record that refers to it is committed (engine/commit_rounds.py).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ooc_moe_server.atomic_files import sync_directory
from ooc_moe_server.catalog.catalog import Catalog, Slot
from ooc_moe_server.nvme.slab import Slab, supports_direct_io
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.v1 import stats_pb2

Result = TypeVar("Result")
NUM_IO_THREADS = 8
# Writes have threads of their own, so that no read waits behind a queue of writes.
NUM_WRITE_THREADS = 4
QUOTA_RETRY_MS = 1000


class NvmeTier:
    """Stores records in files: allocates, reads, writes and syncs the slots of all slabs in a directory, and counts references to slots.

    Calls `on_free` with every slot that loses its last reference.
    """

    def __init__(self, directory: Path, catalog: Catalog, *, on_free: Callable[[Slot], None], quota_bytes: int | None = None) -> None:
        """Opens the slabs in `directory`. The slots that the records in `catalog` refer to are in use, and all others are free.

        `quota_bytes`: the most bytes that all slots in use may occupy; None: as much as the disk holds.
        """
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
        self.direct = supports_direct_io(directory)
        self.num_corrupt = 0
        self._directory = directory
        self._on_free = on_free
        self._quota_bytes = quota_bytes
        self._io = ThreadPoolExecutor(NUM_IO_THREADS, thread_name_prefix="io")
        self._writers = ThreadPoolExecutor(NUM_WRITE_THREADS, thread_name_prefix="write")
        self._references = Counter(_referred(catalog))
        self._slabs: dict[int, Slab] = {}
        self._extending: dict[int, asyncio.Lock] = {}
        self._stats = stats_pb2.TierStats(io_mode="direct" if self.direct else "buffered")
        self._used_bytes = sum(slot.record_bytes for slot in self._references)
        self._replacing: set[Slot] = set()  # Slots whose commit will free another slot of the same size.
        self._replaced_bytes = 0  # The bytes that will become free so; also for slots that still wait for their slab to grow.
        self._trimming: dict[Slab, asyncio.Task[None]] = {}
        for record_bytes in {slot.record_bytes for slot in self._references} | _record_sizes(directory):
            self._open(record_bytes)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on an I/O thread, waits for it, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._io, work)

    async def allocate(self, record_bytes: int, *, replaced: Slot | None = None) -> Slot:
        """Gives out a free slot that has disk space, with one reference.

        Args:
            record_bytes: The record size, which selects the slab. The slab grows as needed.
            replaced: The slot that will be released once the new one is committed. The quota counts the two slots as one; otherwise a full
                store could not even overwrite the records that it holds.

        Raises:
            TierFull: the quota is used up.
            OSError: ENOSPC when the disk is full.
        """
        replaced_bytes = record_bytes if self._is_sole(replaced) else 0
        self._check_quota(record_bytes, replaced_bytes)
        self._used_bytes += record_bytes  # Both are counted now, so that other calls see them while the slab grows.
        self._replaced_bytes += replaced_bytes
        try:
            slot = Slot(record_bytes, await self._allocate(record_bytes))
        except BaseException:
            self._used_bytes -= record_bytes
            self._replaced_bytes -= replaced_bytes
            raise
        self._references[slot] = 1
        if replaced_bytes:
            self._replacing.add(slot)
        return slot

    def hold(self, slot: Slot) -> None:
        """Adds a reference to a slot, so that its record stays on the disk."""
        assert self._references[slot] > 0
        self._references[slot] += 1

    def let_go(self, slot: Slot) -> None:
        """Releases one reference to a slot. When it was the last one, the slot becomes free and may be given to another record."""
        self._references[slot] -= 1
        if self._references[slot] == 0:
            self._forget(slot)
            slab = self._slabs[slot.record_bytes]
            slab.free(slot.index)
            self._trim_soon(slab)

    def condemn(self, slot: Slot) -> None:
        """Takes an allocated slot out of service because its content is unknown.

        The slot is not given out again in this run, but its disk space is freed, so that a failing device does not fill up.
        """
        self._forget(slot)
        slab = self._slabs[slot.record_bytes]
        slab.condemn(slot.index)
        self._trim_soon(slab)

    def end_replacing(self, slot: Slot) -> None:
        """Tells the quota to count `slot` in full from now on. Call it when the older slot that `slot` replaces was released."""
        if slot in self._replacing:
            self._replacing.remove(slot)
            self._replaced_bytes -= slot.record_bytes

    async def write(self, slot: Slot, record: memoryview, prepare: Callable[[], None] | None = None) -> int:
        """Runs `prepare`, then writes a record to its slot, both on a write thread. The record is durable after `sync`.

        Returns:
            The slab's epoch (the number of failed syncs so far) when the write began, for `is_doubtful`.

        Raises:
            OSError: the write failed.
            Exception: whatever `prepare` raises.
        """
        slab = self._slabs[slot.record_bytes]

        def prepare_and_write() -> int:
            if prepare:
                prepare()
            epoch = slab.epoch
            slab.write(slot.index, record)
            return epoch

        epoch = await asyncio.get_running_loop().run_in_executor(self._writers, prepare_and_write)
        self._stats.writes += 1
        self._stats.written_bytes += slot.record_bytes
        return epoch

    async def prepare(self, work: Callable[[], None]) -> None:
        """Runs `work`, which makes a record ready to be written, on a write thread, and waits for it."""
        await asyncio.get_running_loop().run_in_executor(self._writers, work)

    def is_doubtful(self, slot: Slot, epoch: int) -> bool:
        """Whether a record that was written to `slot` may be lost, because a sync of its slab failed since.

        `epoch`: the slab's epoch when the write began, as `write` returned it.
        """
        return self._slabs[slot.record_bytes].epoch != epoch

    async def sync(self, slots: Iterable[Slot]) -> dict[int, OSError]:
        """Syncs the slabs of these slots, so that everything that was written to these slabs is durable. Returns the errors of slabs whose
        sync failed, by the record size of the slab.

        After an error, every record that was written to that slab and is not durable yet may be lost (`is_doubtful`).
        """
        sizes = sorted({slot.record_bytes for slot in slots})
        errors = await asyncio.gather(*(self.run(lambda slab=self._slabs[size]: _sync(slab)) for size in sizes))  # type: ignore[misc]
        return {size: error for size, error in zip(sizes, errors, strict=True) if error}

    async def read(self, slot: Slot, into: memoryview, check: Callable[[], None]) -> None:
        """Reads a record into a buffer and runs `check`, both on an I/O thread. The caller must hold a reference to the slot.

        Raises:
            OSError: the read failed.
            Exception: whatever `check` raises.
        """
        slab = self._slabs[slot.record_bytes]

        def read_and_check() -> None:
            slab.read(slot.index, into)
            check()

        self._stats.reads += 1
        self._stats.read_bytes += slot.record_bytes
        await self.run(read_and_check)

    def snapshot_stats(self) -> stats_pb2.TierStats:
        """Returns the counters of the tier, with the numbers of used and free bytes brought up to date."""
        disk = os.statvfs(self._directory)
        self._stats.capacity_bytes = disk.f_blocks * disk.f_frsize
        self._stats.free_bytes = disk.f_bavail * disk.f_frsize
        if self._quota_bytes is not None:
            self._stats.capacity_bytes = self._quota_bytes
            self._stats.free_bytes = min(self._stats.free_bytes, max(0, self._quota_bytes - self._used_bytes))
        self._stats.used_bytes = self._used_bytes
        self._stats.num_records = len(self._references)
        self._stats.num_corrupt = self.num_corrupt
        return self._stats

    def trim(self) -> None:
        """Starts to give the disk space of surplus free slots back to the file system. Call it once, after opening the store.

        Some free slots keep their disk space for the next writes. `let_go` and `condemn` also start this for the slots that they free.
        """
        for slab in self._slabs.values():
            self._trim_soon(slab)

    async def drain(self) -> None:
        """Waits until no slab is giving disk space back to the file system."""
        while self._trimming:
            await asyncio.wait(self._trimming.values())

    def close(self) -> None:
        """Waits for the reads and writes under way, and closes the slab files."""
        self._writers.shutdown()
        self._io.shutdown()
        for slab in self._slabs.values():
            slab.close()

    def _open(self, record_bytes: int) -> Slab:
        used = [slot.index for slot in self._references if slot.record_bytes == record_bytes]
        slab = Slab(self._directory / f"{record_bytes}.slab", record_bytes, direct=self.direct, used=used)
        self._slabs[record_bytes] = slab
        self._extending[record_bytes] = asyncio.Lock()
        return slab

    def _forget(self, slot: Slot) -> None:
        del self._references[slot]
        self.end_replacing(slot)  # It was never committed, or long ago.
        self._used_bytes -= slot.record_bytes
        self._on_free(slot)

    def _is_sole(self, slot: Slot | None) -> bool:
        """Whether a slot has exactly one reference, so that it becomes free when its record releases it. False for None."""
        return slot is not None and self._references[slot] == 1

    def _check_quota(self, record_bytes: int, replaced_bytes: int) -> None:
        needed = self._used_bytes - self._replaced_bytes + record_bytes - replaced_bytes
        if self._quota_bytes is not None and needed > self._quota_bytes:
            raise TierFull(
                f"NVMe tier: a record of {record_bytes} bytes would exceed nvme_bytes={self._quota_bytes}, {self._used_bytes} are in use; "
                f"delete snapshots or banks, or start the daemon with a larger --nvme-bytes",
                retry_after_ms=QUOTA_RETRY_MS,
            )

    async def _allocate(self, record_bytes: int) -> int:
        slab = self._slabs.get(record_bytes) or self._open(record_bytes)
        while (index := slab.allocate()) is None:
            async with self._extending[record_bytes]:
                if slab.num_free == 0:
                    await self._extend(slab)
        return index

    async def _extend(self, slab: Slab) -> None:
        slots = slab.begin_extend()
        allocated = slots[:0]
        try:
            allocated = await self.run(lambda: slab.extend(slots))
        finally:
            slab.end_extend(slots, allocated)

    def _trim_soon(self, slab: Slab) -> None:
        if slab not in self._trimming:
            self._trimming[slab] = asyncio.create_task(self._trim(slab))

    async def _trim(self, slab: Slab) -> None:
        """Gives the disk space of surplus free slots back to the file system, in few large pieces.

        Meanwhile these slots are neither free nor bare (without disk space), so that none is allocated.
        """
        try:
            while surplus := slab.begin_punch():
                slab.end_punch(surplus, await self.run(lambda slots=surplus: _punch(slab, slots)))  # type: ignore[misc]
        finally:
            del self._trimming[slab]


def _sync(slab: Slab) -> OSError | None:
    """Syncs a slab to the disk. Returns the error instead of raising it."""
    try:
        slab.sync()
    except OSError as error:
        slab.note_failed_sync()
        return error
    return None


def _punch(slab: Slab, slots: Sequence[int]) -> OSError | None:
    """Gives the disk space of slots back to the file system. Returns the error instead of raising it."""
    try:
        slab.punch(slots)
    except OSError as error:
        return error
    return None


def _referred(catalog: Catalog) -> Iterable[Slot]:
    """Yields the slot of every written record of every bank and snapshot. A slot that several records share comes several times."""
    for bank in catalog.banks.values():
        yield from (record.slot for record in bank.records.values() if record.slot)
    for snapshot in catalog.snapshots.values():
        yield from snapshot.slots()


def _record_sizes(directory: Path) -> set[int]:
    return {int(path.stem) for path in directory.glob("*.slab") if path.stem.isdigit()}

"""The NVMe tier: slabs below one directory, and who refers to which slot.

Reads and writes run in thread pools; the bookkeeping lives on the event loop. A slot's life: taken -> written -> synced -> referred to by
records, snapshots and readers -> free when the last lets go, its disk kept for the next write or punched out. Knows nothing of the index:
commits.py puts the steps in order.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ooc_moe_server.catalog.catalog import Catalog, Slot
from ooc_moe_server.nvme.slab import Slab, supports_direct_io, sync_directory
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.v1 import stats_pb2

Result = TypeVar("Result")
NUM_IO_THREADS = 8
# Of their own, so that no read waits behind a queue of writes.
NUM_WRITE_THREADS = 4
QUOTA_RETRY_MS = 1000


class NvmeTier:
    """All slabs of a data directory. `on_free` is called with every slot that nobody refers to any more."""

    def __init__(self, directory: Path, catalog: Catalog, *, on_free: Callable[[Slot], None], quota_bytes: int | None = None) -> None:
        """`quota_bytes`: the most that all slots in use may take; None: what the disk holds."""
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
        self._replacing: set[Slot] = set()  # Slots that will set another's bytes free when they are committed.
        self._replaced_bytes = 0  # What these will set free, and those that wait for their slab to grow.
        self._trimming: dict[Slab, asyncio.Task[None]] = {}
        for record_bytes in {slot.record_bytes for slot in self._references} | _record_sizes(directory):
            self._open(record_bytes)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on an I/O thread."""
        return await asyncio.get_running_loop().run_in_executor(self._io, work)

    async def take(self, record_bytes: int, *, replaced: Slot | None = None) -> Slot:
        """A free slot with disk behind it, held once.

        Args:
            record_bytes: of its slab, which grows as needed.
            replaced: the slot that will be let go once this one is committed: the quota counts the two as one, or a full store could not
                even overwrite what it holds.

        Raises:
            TierFull: the quota is used up.
            OSError: ENOSPC when the disk is full.
        """
        replaced_bytes = record_bytes if self._is_sole(replaced) else 0
        self._check_quota(record_bytes, replaced_bytes)
        self._used_bytes += record_bytes  # At once, so that others see both while the slab grows.
        self._replaced_bytes += replaced_bytes
        try:
            slot = Slot(record_bytes, await self._take(record_bytes))
        except BaseException:
            self._used_bytes -= record_bytes
            self._replaced_bytes -= replaced_bytes
            raise
        self._references[slot] = 1
        if replaced_bytes:
            self._replacing.add(slot)
        return slot

    def hold(self, slot: Slot) -> None:
        """Refers to a slot once more."""
        assert self._references[slot] > 0
        self._references[slot] += 1

    def let_go(self, slot: Slot) -> None:
        """Takes a reference back; with the last one the slot is free to be written anew."""
        self._references[slot] -= 1
        if self._references[slot] == 0:
            self._forget(slot)
            slab = self._slabs[slot.record_bytes]
            slab.give_back(slot.index)
            self._trim_soon(slab)

    def condemn(self, slot: Slot) -> None:
        """Lets a taken slot go for ever: nobody knows what is in it. Its disk is freed, so that a failing device does not fill up."""
        self._forget(slot)
        slab = self._slabs[slot.record_bytes]
        slab.condemn(slot.index)
        self._trim_soon(slab)

    def committed(self, slot: Slot) -> None:
        """What the slot replaces has been let go."""
        if slot in self._replacing:
            self._replacing.remove(slot)
            self._replaced_bytes -= slot.record_bytes

    async def write(self, slot: Slot, record: memoryview, prepare: Callable[[], None] | None = None) -> int:
        """Runs `prepare` and then writes a record into its slot, both on a thread for writes; durable after `sync`.

        Returns:
            The slab's epoch when it began, for `is_doubtful`.

        Raises:
            OSError: and what `prepare` raises.
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
        """Runs `work` on a thread for writes."""
        await asyncio.get_running_loop().run_in_executor(self._writers, work)

    def is_doubtful(self, slot: Slot, epoch: int) -> bool:
        """Whether a sync of its slab failed after a write that began in that epoch and before it was durable."""
        return self._slabs[slot.record_bytes].epoch != epoch

    async def sync(self, slots: Iterable[Slot]) -> dict[int, OSError]:
        """Makes what was written to the slabs of these slots durable; returns by record size what failed.

        All that was written to a slab that failed and is not yet durable is in doubt from then on (`is_doubtful`).
        """
        sizes = sorted({slot.record_bytes for slot in slots})
        errors = await asyncio.gather(*(self.run(lambda slab=self._slabs[size]: _sync(slab)) for size in sizes))  # type: ignore[misc]
        return {size: error for size, error in zip(sizes, errors, strict=True) if error}

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
        if self._quota_bytes is not None:
            self._stats.capacity_bytes = self._quota_bytes
            self._stats.free_bytes = min(self._stats.free_bytes, max(0, self._quota_bytes - self._used_bytes))
        self._stats.used_bytes = self._used_bytes
        self._stats.num_records = len(self._references)
        self._stats.num_corrupt = self.num_corrupt
        return self._stats

    def trim(self) -> None:
        """Begins to give the disk of free slots beyond the reserve back; goes on by itself as slots become free."""
        for slab in self._slabs.values():
            self._trim_soon(slab)

    async def drain(self) -> None:
        """Returns when nothing is being trimmed."""
        while self._trimming:
            await asyncio.wait(self._trimming.values())

    def close(self) -> None:
        """Waits for the I/O under way and closes the files."""
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
        self.committed(slot)  # Or never will be.
        self._used_bytes -= slot.record_bytes
        self._on_free(slot)

    def _is_sole(self, slot: Slot | None) -> bool:
        """Whether only its record refers to it, no snapshot or fork, so that its end frees its bytes."""
        return slot is not None and self._references[slot] == 1

    def _check_quota(self, record_bytes: int, replaced_bytes: int) -> None:
        needed = self._used_bytes - self._replaced_bytes + record_bytes - replaced_bytes
        if self._quota_bytes is not None and needed > self._quota_bytes:
            raise TierFull(
                f"NVMe tier: nvme_bytes: {self._quota_bytes} allow no record of {record_bytes} bytes more, {self._used_bytes} are in use; "
                f"delete snapshots or banks, or start the daemon with a larger --nvme-bytes",
                retry_after_ms=QUOTA_RETRY_MS,
            )

    async def _take(self, record_bytes: int) -> int:
        slab = self._slabs.get(record_bytes) or self._open(record_bytes)
        while (index := slab.take()) is None:
            async with self._extending[record_bytes]:
                if slab.num_free == 0:
                    await self._extend(slab)
        return index

    async def _extend(self, slab: Slab) -> None:
        slots = slab.bare()
        allocated = slots[:0]
        try:
            allocated = await self.run(lambda: slab.extend(slots))
        finally:
            slab.extended(slots, allocated)

    def _trim_soon(self, slab: Slab) -> None:
        if slab not in self._trimming:
            self._trimming[slab] = asyncio.create_task(self._trim(slab))

    async def _trim(self, slab: Slab) -> None:
        """Behind, in few large pieces; slots on their way are neither free nor bare, so nobody can take them meanwhile."""
        try:
            while surplus := slab.surplus():
                slab.punched(surplus, await self.run(lambda slots=surplus: _punch(slab, slots)))  # type: ignore[misc]
        finally:
            del self._trimming[slab]


def _sync(slab: Slab) -> OSError | None:
    try:
        slab.sync()
    except OSError as error:
        slab.doubt()
        return error
    return None


def _punch(slab: Slab, slots: Sequence[int]) -> OSError | None:
    try:
        slab.punch(slots)
    except OSError as error:
        return error
    return None


def _referred(catalog: Catalog) -> Iterable[Slot]:
    for bank in catalog.banks.values():
        yield from (record.slot for record in bank.records.values() if record.slot)
    for snapshot in catalog.snapshots.values():
        for bank_id in snapshot.banks:
            yield from snapshot.slots(bank_id)


def _record_sizes(directory: Path) -> set[int]:
    return {int(path.stem) for path in directory.glob("*.slab") if path.stem.isdigit()}

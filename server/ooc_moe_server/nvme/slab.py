"""A slab: one file of equal slots, read and written whole, straight to the device where the file system allows it.

    bare (no disk behind it) -> extend -> free -> take -> used -> give_back -> free -> punch -> bare

Positional calls from any thread; the lists of slots belong to the event loop. Knows nothing of what a slot holds or who refers to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import logging
import mmap
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ooc_moe_wire.layout import BLOCK_BYTES

log = logging.getLogger(__name__)

# Growing by this much at a time keeps files contiguous and their metadata still.
GROWTH_BYTES = 16 << 20
# Free slots that keep their disk, for the next writes: at least so much, or so large a part of what is used. Space that was written before
# takes 8 MiB in 2.0 ms, fresh space in 3.5 ms, so what a trainer pushes again and again should fit; what is free beyond is punched out.
RESERVE_BYTES = 1 << 30
RESERVE_PART = 8
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h


class Slab:
    """The file of one record size, opened or made. Buffers must be 4 KiB aligned and `record_bytes` long."""

    def __init__(self, path: Path, record_bytes: int, *, direct: bool, used: Collection[int] = ()) -> None:
        self.record_bytes = record_bytes
        self.epoch = 0  # Raised by `doubt`.
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o644)
        if is_new:
            sync_directory(path.parent)
        # A file that lost its end keeps its numbers: what is used stays used, and reading it says what is wrong.
        self.num_slots = max(os.fstat(self._fd).st_size // record_bytes, max(used, default=-1) + 1)
        self._condemned: set[int] = set()
        taken = set(used)
        # Both are heaps. Whether the free slots of an older run have disk behind them is unknown. Some are kept, as if they had none, since
        # to allocate again what is allocated costs little; the others are punched out.
        self._bare = [slot for slot in range(self.num_slots) if slot not in taken]  # Without disk behind them.
        self._free: list[int] = []  # With disk behind them.
        num_kept = self._num_reserved
        self._surplus = self._bare[num_kept:]
        del self._bare[num_kept:]
        self._can_punch = True

    @property
    def num_free(self) -> int:
        """Slots that can be taken without `extend`."""
        return len(self._free)

    def take(self) -> int | None:
        """The lowest free slot, or None when there must be an `extend` first."""
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        """Makes a slot free."""
        heapq.heappush(self._free, slot)

    def condemn(self, slot: int) -> None:
        """Never gives a taken slot out again in this run; its disk is punched out with the surplus."""
        self._condemned.add(slot)
        self._surplus.append(slot)

    def bare(self) -> range:
        """Takes neighbouring slots to `extend` next: the lowest bare ones, else new ones at the end of the file."""
        count = max(1, GROWTH_BYTES // self.record_bytes)
        if not self._bare:
            self.num_slots += count
            return range(self.num_slots - count, self.num_slots)
        first = heapq.heappop(self._bare)
        end = first + 1
        while end - first < count and self._bare and self._bare[0] == end:
            end += 1
            heapq.heappop(self._bare)
        return range(first, end)

    def extend(self, slots: range) -> range:
        """Allocates the disk of bare slots, or of the first alone where there is no room for all; returns which. Raises OSError."""
        for part in (slots, slots[:1]):
            try:
                os.posix_fallocate(self._fd, part.start * self.record_bytes, len(part) * self.record_bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC or len(part) == 1:
                    raise
            else:
                return part
        raise AssertionError("unreachable")

    def extended(self, slots: range, allocated: range) -> None:
        """Gives the slots of `bare` back: those allocated are free now, the others bare again."""
        for slot in slots:
            heapq.heappush(self._free if slot in allocated else self._bare, slot)

    def surplus(self) -> list[int]:
        """Takes the free slots beyond the reserve, the highest, and condemned ones, to `punch` next; none where files cannot be punched."""
        if not self._can_punch:
            return []
        if len(self._free) > self._num_reserved:
            self._free.sort()  # A sorted list is a heap.
            self._surplus += self._free[self._num_reserved :]
            del self._free[self._num_reserved :]
        surplus, self._surplus = self._surplus, []
        return surplus

    def punch(self, slots: Sequence[int]) -> None:
        """Gives the disk behind slots back to the file system. Raises OSError, also where the file system cannot."""
        for run in _runs(slots):
            _punch(self._fd, run.start * self.record_bytes, len(run) * self.record_bytes)

    def punched(self, slots: Sequence[int], error: OSError | None) -> None:
        """Gives the slots of `surplus` back as bare ones, also when it failed: to allocate what is allocated does no harm."""
        if error:
            self._can_punch = False
            log.warning("slab of %d-byte records: freed space stays in the file: %s", self.record_bytes, error.strerror)
        for slot in slots:
            if slot not in self._condemned:
                heapq.heappush(self._bare, slot)

    def read(self, slot: int, into: memoryview) -> None:
        """Fills `into`. Raises OSError, also when the file ends early."""
        done = 0
        while done < self.record_bytes:
            count = os.preadv(self._fd, [into[done:]], slot * self.record_bytes + done)
            if count == 0:
                raise OSError(errno.EIO, f"slab ends {self.record_bytes - done} bytes before the end of slot {slot}")
            done += count

    def write(self, slot: int, record: memoryview) -> None:
        """Writes a whole slot; durable after `sync`. Raises OSError."""
        done = 0
        while done < self.record_bytes:
            count = os.pwritev(self._fd, [record[done:]], slot * self.record_bytes + done)
            if count == 0:
                raise OSError(errno.EIO, f"no byte of slot {slot} was written at {done} of {self.record_bytes}")
            done += count

    def sync(self) -> None:
        """Returns when all that was written is on the device. Raises OSError; then `doubt` is due."""
        os.fdatasync(self._fd)

    def doubt(self) -> None:
        """A sync failed: what was written before now may be lost, and no later sync will tell. Writes compare the epoch they began in."""
        self.epoch += 1

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    @property
    def _num_reserved(self) -> int:
        num_used = self.num_slots - len(self._free) - len(self._bare)
        return max(RESERVE_BYTES // self.record_bytes, num_used // RESERVE_PART)


def _runs(slots: Sequence[int]) -> list[range]:
    """Neighbours together."""
    runs: list[range] = []
    for slot in sorted(slots):
        if runs and runs[-1].stop == slot:
            runs[-1] = range(runs[-1].start, slot + 1)
        else:
            runs.append(range(slot, slot + 1))
    return runs


def _punch(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with a mode, which the standard library lacks. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if fallocate is None:
        raise OSError(errno.ENOSYS, "the C library has no fallocate")
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def supports_direct_io(directory: Path) -> bool:
    """Whether files below `directory` take O_DIRECT, found out by writing one."""
    path = directory / ".direct-io-probe"
    block = mmap.mmap(-1, BLOCK_BYTES)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o644)
        try:
            return os.pwritev(fd, [block], 0) == BLOCK_BYTES
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

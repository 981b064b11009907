"""A slab: one file of slots (places for one record) of equal size. A slot is read and written whole, with O_DIRECT where possible.

The states of a slot, and the calls between them:

    bare --begin_extend, extend, end_extend--> free --allocate--> used
      ^                                         | ^                 |
      +------- begin_punch, punch, end_punch ---+ +------free-------+

A bare slot has no disk space (or perhaps none: after a restart this is not known); a free slot has disk space and no record. Reads, writes,
`extend`, `punch` and `sync` may run on any thread. All other methods belong to the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import logging
import mmap
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ooc_moe_server.atomic_files import sync_directory
from ooc_moe_wire.layout import BLOCK_BYTES

log = logging.getLogger(__name__)

# A slab grows by this much at a time, so that its file stays contiguous and its metadata change rarely.
GROWTH_BYTES = 16 << 20
# Free slots keep disk blocks for the next writes: RESERVE_BYTES, or 1/RESERVE_PART of the used slots if that is more. Writing 8 MiB takes
# 2.0 ms to blocks that were written before and 3.5 ms to fresh ones, so the reserve should hold what a trainer pushes again and again.
# The blocks of all other free slots are punched out.
RESERVE_BYTES = 1 << 30
RESERVE_PART = 8
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h


class Slab:
    """The file that holds all records of one size in numbered slots (places for one record). Created if it does not exist.

    `direct`: open it with O_DIRECT. `used`: the slots that hold records already. Buffers that are read or written must be 4 KiB aligned and
    `record_bytes` long.
    """

    def __init__(self, path: Path, record_bytes: int, *, direct: bool, used: Collection[int] = ()) -> None:
        self.record_bytes = record_bytes
        self.epoch = 0  # Raised by `note_failed_sync`.
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o644)
        if is_new:
            sync_directory(path.parent)
        # A slot that is used stays used even if the file lost its end; reading it then raises OSError.
        self.num_slots = max(os.fstat(self._fd).st_size // record_bytes, max(used, default=-1) + 1)
        self._condemned: set[int] = set()
        is_used = set(used)
        # Both lists are heaps. Which unused slots of an earlier run have disk blocks is unknown. All count as bare, since to allocate
        # blocks twice costs little. Those beyond the reserve are punched out.
        self._bare = [slot for slot in range(self.num_slots) if slot not in is_used]
        self._free: list[int] = []
        num_kept = self._num_reserved
        self._surplus = self._bare[num_kept:]
        del self._bare[num_kept:]
        self._can_punch = True

    @property
    def num_free(self) -> int:
        """The number of slots that `allocate` can give out before the slab must be extended."""
        return len(self._free)

    def allocate(self) -> int | None:
        """Gives out the lowest free slot. Returns None when no slot is free: the slab must be extended first."""
        return heapq.heappop(self._free) if self._free else None

    def free(self, slot: int) -> None:
        """Marks a used slot as free: it keeps its disk space, and `allocate` may give it out again."""
        heapq.heappush(self._free, slot)

    def condemn(self, slot: int) -> None:
        """Takes a used slot out of service: it is never given out again in this run. The next `punch` frees its disk space."""
        self._condemned.add(slot)
        self._surplus.append(slot)

    def begin_extend(self) -> range:
        """Chooses the slots for the next `extend`: the lowest slots without disk space, or else new slots at the end of the file.

        The slots are neighbours. Then call `extend`, and `end_extend` even if it failed.
        """
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
        """Allocates disk space for all of `slots`, or only for the first slot if the disk has not enough room for all.

        Returns the slots that got disk space. Raises OSError.
        """
        for part in (slots, slots[:1]):
            try:
                os.posix_fallocate(self._fd, part.start * self.record_bytes, len(part) * self.record_bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC or len(part) == 1:
                    raise
            else:
                return part
        raise AssertionError("unreachable")

    def end_extend(self, slots: range, allocated: range) -> None:
        """Ends what `begin_extend` began: lets `allocate` give out the slots `allocated`, which got disk space.

        The rest of `slots` got no disk space, and waits for a later `extend`.
        """
        for slot in slots:
            heapq.heappush(self._free if slot in allocated else self._bare, slot)

    def begin_punch(self) -> list[int]:
        """Chooses the slots whose disk space is to be given back to the file system. Call `punch` with them, and then `end_punch`.

        The chosen slots are the condemned ones (out of service) and the highest free ones; a number of free slots keeps its disk space for
        the next writes. Returns no slots where the file system cannot punch holes into files.
        """
        if not self._can_punch:
            return []
        if len(self._free) > self._num_reserved:
            self._free.sort()  # A sorted list is a heap.
            self._surplus += self._free[self._num_reserved :]
            del self._free[self._num_reserved :]
        surplus, self._surplus = self._surplus, []
        return surplus

    def punch(self, slots: Sequence[int]) -> None:
        """Gives the disk space of slots back to the file system.

        Raises OSError, also where the file system cannot punch holes into files.
        """
        for run in _runs(slots):
            _punch(self._fd, run.start * self.record_bytes, len(run) * self.record_bytes)

    def end_punch(self, slots: Sequence[int], error: OSError | None) -> None:
        """Ends what `begin_punch` began: notes that the slots have no disk space any more.

        Condemned slots (out of service) among `slots` are never used again.

        `error`: what `punch` raised, or None. The slots are treated in the same way: a later `extend` of slots that kept their disk space
        does no harm. After an error, no more slots are punched.
        """
        if error:
            self._can_punch = False
            log.warning("slab of %d-byte records: freed space stays in the file: %s", self.record_bytes, error.strerror)
        for slot in slots:
            if slot not in self._condemned:
                heapq.heappush(self._bare, slot)

    def read(self, slot: int, into: memoryview) -> None:
        """Reads a whole slot into the buffer `into`. Raises OSError, also when the file ends before the end of the slot."""
        num_read = transfer(os.preadv, self._fd, into, slot * self.record_bytes)
        if num_read < self.record_bytes:
            raise OSError(errno.EIO, f"slab ends {self.record_bytes - num_read} bytes before the end of slot {slot}")

    def write(self, slot: int, record: memoryview) -> None:
        """Writes a record to its slot, over the whole length of the slot. It is durable only after `sync`. Raises OSError."""
        num_written = transfer(os.pwritev, self._fd, record, slot * self.record_bytes)
        if num_written < self.record_bytes:
            raise OSError(errno.EIO, f"no byte of slot {slot} was written at {num_written} of {self.record_bytes}")

    def sync(self) -> None:
        """Makes durable what was written to the slab before the call. Raises OSError; call `note_failed_sync` then."""
        os.fdatasync(self._fd)

    def note_failed_sync(self) -> None:
        """Increments the slab's epoch (the number of failed syncs). Call it after a failed `sync`.

        What was written before and is not durable yet may be lost, and no later sync reports that. The older epoch of such a write shows
        that it must be written again.
        """
        self.epoch += 1

    def close(self) -> None:
        """Closes the slab's file."""
        os.close(self._fd)

    @property
    def _num_reserved(self) -> int:
        num_used = self.num_slots - len(self._free) - len(self._bare)
        return max(RESERVE_BYTES // self.record_bytes, num_used // RESERVE_PART)


def transfer(call: Callable[[int, list[memoryview], int], int], fd: int, buffer: memoryview, offset: int) -> int:
    """Reads or writes a whole buffer at `offset` of a file, by as many calls of `os.preadv` or `os.pwritev` (`call`) as it takes.

    Returns the number of bytes that were moved: fewer than the buffer has if a call moved none. Raises OSError.
    """
    done = 0
    while done < len(buffer) and (count := call(fd, [buffer[done:]], offset + done)):
        done += count
    return done


def _runs(slots: Sequence[int]) -> list[range]:
    """Groups slot numbers into ranges of neighbours, in ascending order."""
    runs: list[range] = []
    for slot in sorted(slots):
        if runs and runs[-1].stop == slot:
            runs[-1] = range(runs[-1].start, slot + 1)
        else:
            runs.append(range(slot, slot + 1))
    return runs


def _punch(fd: int, offset: int, size: int) -> None:
    """Gives the disk space of a range of a file back to the file system, by fallocate(2), whose modes the standard library lacks.

    Raises OSError.
    """
    library = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if fallocate is None:
        raise OSError(errno.ENOSYS, "the C library has no fallocate")
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def supports_direct_io(directory: Path) -> bool:
    """Whether files in `directory` can be opened with O_DIRECT. Writes a small file to find out, and removes it."""
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

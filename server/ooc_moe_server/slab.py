"""A slab: one file of equal slots, read and written whole, straight to the device where the file system allows it.

Positional calls from any thread; the list of free slots belongs to the event loop. Knows nothing of what a slot holds or who refers to it.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import mmap
import os
from collections.abc import Collection
from pathlib import Path

from ooc_moe_wire.layout import BLOCK_BYTES

# Growing by this much at a time keeps files contiguous and their metadata still.
GROWTH_BYTES = 16 << 20


class Slab:
    """The file of one record size, opened or made. Buffers must be 4 KiB aligned and `record_bytes` long."""

    def __init__(self, path: Path, record_bytes: int, *, direct: bool, used: Collection[int] = ()) -> None:
        self.record_bytes = record_bytes
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o644)
        if is_new:
            sync_directory(path.parent)
        # A file that lost its end keeps its numbers: what is used stays used, and reading it says what is wrong.
        self.num_slots = max(os.fstat(self._fd).st_size // record_bytes, max(used, default=-1) + 1)
        taken = set(used)
        self._free = [slot for slot in range(self.num_slots) if slot not in taken]

    @property
    def num_free(self) -> int:
        """Slots that can be taken without growing."""
        return len(self._free)

    def take(self) -> int | None:
        """The lowest free slot, or None when the slab must grow."""
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        """Makes a slot free."""
        heapq.heappush(self._free, slot)

    def extend(self) -> int:
        """Allocates disk for more slots and returns how many; call `added` with it on the event loop. Raises OSError."""
        for count in (max(1, GROWTH_BYTES // self.record_bytes), 1):
            try:
                os.posix_fallocate(self._fd, self.num_slots * self.record_bytes, count * self.record_bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC or count == 1:
                    raise
            else:
                return count
        raise AssertionError("unreachable")

    def added(self, count: int) -> None:
        """Makes the slots of `extend` free."""
        for slot in range(self.num_slots, self.num_slots + count):
            heapq.heappush(self._free, slot)
        self.num_slots += count

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
            done += os.pwritev(self._fd, [record[done:]], slot * self.record_bytes + done)

    def sync(self) -> None:
        """Returns when all that was written is on the device. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


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

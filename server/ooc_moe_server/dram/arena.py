"""The memory of the DRAM tier: the arena, which holds the records, and a table of generations, which tells whether a record is complete.

Each of the two is a memfd (a file in memory) that is allocated in full at the start and mapped once. A memfd is page aligned, so that
O_DIRECT can read into it, and it can be passed to another process. The two memfds are sealed, so that no other process can map them for
writing.

There is one generation, a 64-bit number, for each 4 KiB block of the arena. The generation of a record's first block is odd while the
record may be incomplete, and even once it is complete (see v1/local.proto).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from ooc_moe_wire.errors import InvalidRequest, TierFull
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.local import F_SEAL_FUTURE_WRITE

# Memory that stays free for the operating system and for the daemon itself.
HEADROOM_BYTES = 256 << 20


class Arena:
    """The shared memory that holds records, and the generation of each record: a number that is even once the record is complete."""

    def __init__(self, num_bytes: int) -> None:
        """Allocates `num_bytes` of memory, and touches every page, so that none is missing later.

        This takes about 0.3 s per GiB, so call the constructor off the event loop.

        Raises:
            TierFull: the kernel does not have that many pages.
        """
        self.num_bytes = num_bytes
        try:
            self.fd, memory = _sealed_memory("ooc-moe-arena", num_bytes)
            self.generations_fd, words = _sealed_memory("ooc-moe-generations", num_bytes // BLOCK_BYTES * 8)
        except OSError as error:
            raise TierFull(f"dram_bytes: {num_bytes} bytes of memory cannot be allocated ({error.strerror})") from error
        self._view = memoryview(memory)
        self._generations = memoryview(words).cast("Q")
        np.frombuffer(words, dtype=np.uint64)[:] = 1

    def close(self) -> None:
        """Closes the file descriptors of the arena. The kernel frees the memory when no process maps it any more."""
        os.close(self.fd)
        os.close(self.generations_fd)

    def view(self, start: int, size: int) -> memoryview:
        """Returns the bytes [start, start + size) of the arena as a writable view, without a copy."""
        return self._view[start : start + size]

    def complete(self, start: int) -> None:
        """Makes the generation of the record at `start` even, which tells readers that the record is complete.

        Call `complete` when all bytes of the record are there.
        """
        assert self.generation(start) % 2 == 1, "complete twice"
        self._generations[start // BLOCK_BYTES] += 1

    def spoil(self, start: int) -> None:
        """Makes the generation of the record at `start` odd, which tells readers that its bytes may change.

        Call `spoil` before overwriting the record.
        """
        self._generations[start // BLOCK_BYTES] |= 1

    def generation(self, start: int) -> int:
        """Returns the generation of the record at `start`: odd while the record may be incomplete, even once it is complete."""
        return self._generations[start // BLOCK_BYTES]


def _sealed_memory(name: str, num_bytes: int) -> tuple[int, mmap.mmap]:
    """Makes a memfd with allocated pages. Returns its descriptor and a writable mapping.

    The memfd is then sealed, so that no later mapping can write to it. Raises OSError.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd, memory


def check_dram_bytes(num_bytes: int) -> None:
    """Raises an error if a DRAM tier of `num_bytes` would not fit into the free memory. Call it before memory is allocated.

    Without this check the kernel would grant the memory, and kill the daemon later.

    Raises:
        InvalidRequest: not a positive multiple of 4 KiB, or more than the memory that is left; the message names both sizes.
    """
    if num_bytes < BLOCK_BYTES or num_bytes % BLOCK_BYTES:
        raise InvalidRequest(f"dram_bytes: {num_bytes} is not a positive multiple of {BLOCK_BYTES}")
    available = available_bytes()
    if num_bytes + HEADROOM_BYTES > available:
        raise InvalidRequest(
            f"dram_bytes: {num_bytes} bytes do not fit; {available} bytes of memory are available, {HEADROOM_BYTES} of them stay free"
        )


def available_bytes() -> int:
    """Returns how much memory can still be allocated: the kernel's estimate, or less where a control group limits the daemon."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def _cgroup_number(name: str) -> int | None:
    """Reads the number in the file `name` of the daemon's control group (version 2).

    None where there is no such file, or where it says "max".
    """
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        return int((Path("/sys/fs/cgroup") / group.lstrip("/") / name).read_text())
    except (OSError, ValueError):
        return None

"""The memory of the DRAM tier: one memfd, allocated in full at the start, mapped once.

A memfd (rather than a bytearray) is page aligned, so that O_DIRECT reads land in it, and can be handed to another process. Knows nothing of
records.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ooc_moe_wire.errors import InvalidRequest, TierFull
from ooc_moe_wire.layout import BLOCK_BYTES

# Left to the operating system and to the daemon itself.
HEADROOM_BYTES = 256 << 20


class Arena:
    """`num_bytes` of shared memory, every page present."""

    def __init__(self, num_bytes: int) -> None:
        """Allocates and touches the pages; takes about 0.3 s per GiB, so call it off the event loop.

        Raises:
            TierFull: the kernel has not that many pages.
        """
        self.num_bytes = num_bytes
        self._fd = os.memfd_create("ooc-moe-arena", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, num_bytes)
            self._map = mmap.mmap(self._fd, num_bytes)
        except OSError as error:
            os.close(self._fd)
            raise TierFull(f"dram_bytes: {num_bytes} bytes of memory cannot be allocated ({error.strerror})") from error
        self._view = memoryview(self._map)

    def view(self, start: int, size: int) -> memoryview:
        """Writable bytes [start, start + size), no copy."""
        return self._view[start : start + size]


def check_dram_bytes(num_bytes: int) -> None:
    """Refuses a size that cannot work, before anything is touched: the kernel would grant it and kill us later.

    Raises:
        InvalidRequest: not a positive multiple of 4 KiB, or more than the memory that is left; the message names both.
    """
    if num_bytes < BLOCK_BYTES or num_bytes % BLOCK_BYTES:
        raise InvalidRequest(f"dram_bytes: {num_bytes} is not a positive multiple of {BLOCK_BYTES}")
    available = available_bytes()
    if num_bytes + HEADROOM_BYTES > available:
        raise InvalidRequest(
            f"dram_bytes: {num_bytes} bytes do not fit; {available} bytes of memory are available, {HEADROOM_BYTES} of them stay free"
        )


def available_bytes() -> int:
    """Memory that can still be had: the kernel's estimate, or less where a control group limits us."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def _cgroup_number(name: str) -> int | None:
    """A number of our own control group (version 2), or None where there is none or it says "max"."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        return int((Path("/sys/fs/cgroup") / group.lstrip("/") / name).read_text())
    except (OSError, ValueError):
        return None

"""A daemon's DRAM tier, mapped for reading, and the copies from it.

What is copied is known to be whole only when its generation, looked at before and after, is the lease's: `copy` and `copy_hashed` say so.
The mappings live on when the daemon dies, or the session is closed under a copy: nothing is unmapped under a reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ooc_moe_wire.codec import Checksums, copy_hashed
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BLOCK_BYTES


class LocalMemory:
    """The arena, and the generations of what lies in it.

    Raises:
        InvalidRequest: the memory is shorter than the daemon said, or could shrink under a reader.
    """

    def __init__(self, arena_fd: int, generations_fd: int, arena_bytes: int) -> None:
        self._arena: NDArray[np.uint8] = np.frombuffer(_map(arena_fd, arena_bytes), np.uint8)
        self._generations = memoryview(_map(generations_fd, arena_bytes // BLOCK_BYTES * 8)).cast("Q")

    # Processors other than x86 may reorder the loads of the copy and of the generation; the checksum then catches a torn copy.

    def copy(self, offset: int, generation: int, into: memoryview) -> bool:
        """Copies a record's bytes from its body's `offset` on, as many as fit; False when they may have been overwritten meanwhile."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return False
        np.copyto(np.frombuffer(into, np.uint8), self._arena[offset : offset + len(into)])
        return generations[block] == generation

    def copy_hashed(self, offset: int, generation: int, into: memoryview, parameter_bytes: int) -> Checksums | None:
        """As `copy`, with the checksums of the copy; None where it says False."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return None
        checksums = copy_hashed(self._arena[offset : offset + len(into)], np.frombuffer(into, np.uint8), parameter_bytes)
        return checksums if generations[block] == generation else None


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    """The daemon's memory, for reading. Raises InvalidRequest when it is too short, or could become so under a reader (SIGBUS)."""
    seals = 0
    with suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < num_bytes:
        raise InvalidRequest(f"local plane: the daemon's memory is not {num_bytes} bytes, sealed against shrinking")
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

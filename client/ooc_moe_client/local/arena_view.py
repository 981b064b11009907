"""`ArenaView`: a daemon's DRAM tier, mapped for reading, and copies from it.

Each record has a generation, which the daemon makes odd before it overwrites the record. A copy is whole if the generation was that of the
lease before the copy and after it:

    generation == lease's?  ->  copy  ->  generation == lease's?      yes both times: the copy is whole

The mapping outlives the daemon and the session: nothing is unmapped while it is read.
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


class ArenaView:
    """The arena, and the table of its records' generations.

    Raises:
        InvalidRequest: the memory is shorter than the daemon said, or could shrink while it is read.
    """

    def __init__(self, arena_fd: int, generations_fd: int, arena_bytes: int) -> None:
        self._arena: NDArray[np.uint8] = np.frombuffer(_map(arena_fd, arena_bytes), np.uint8)
        self._generations = memoryview(_map(generations_fd, arena_bytes // BLOCK_BYTES * 8)).cast("Q")

    # Processors other than x86 may reorder the loads of copy and generation. A torn copy is then caught by its checksum.

    def copy(self, offset: int, generation: int, into: memoryview) -> bool:
        """Fills `into` with bytes of the arena from `offset` on, where a record's body begins. False: the record was overwritten."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return False
        np.copyto(np.frombuffer(into, np.uint8), self._arena[offset : offset + len(into)])
        return generations[block] == generation

    def copy_hashed(self, offset: int, generation: int, into: memoryview, parameter_bytes: int) -> Checksums | None:
        """As `copy`, but returns the checksums of the copied bytes, or None when the record was overwritten."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return None
        checksums = copy_hashed(self._arena[offset : offset + len(into)], np.frombuffer(into, np.uint8), parameter_bytes)
        return checksums if generations[block] == generation else None


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps the daemon's memory for reading.

    Raises InvalidRequest when the memory is too short, or could become so: reading beyond its end would kill this process (SIGBUS).
    """
    seals = 0
    with suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < num_bytes:
        raise InvalidRequest(f"local plane: the daemon's memory is not {num_bytes} bytes, sealed against shrinking")
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

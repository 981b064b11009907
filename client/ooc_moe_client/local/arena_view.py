"""`ArenaView`: the daemon's DRAM tier, mapped into this process for reading; records are copied from there.

The daemon's DRAM tier is one block of shared memory, the arena. The daemon may overwrite a record while this process copies it. To notice
that, each record has a generation, a number that the daemon makes odd before it overwrites the record. A copy is good if the generation was
that of the lease both before and after the copy:

    generation == lease's?  ->  copy  ->  generation == lease's?      yes both times: the copy is good

The mapping may be used even after the daemon or the session has ended: nothing is unmapped while it is read.
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
    """The daemon's shared memory, mapped for reading: the arena with the records, and the table of the records' generations.

    Raises:
        InvalidRequest: the memory is shorter than the daemon said, or could shrink while it is read.
    """

    def __init__(self, arena_fd: int, generations_fd: int, arena_bytes: int) -> None:
        self._arena: NDArray[np.uint8] = np.frombuffer(_map(arena_fd, arena_bytes), np.uint8)
        self._generations = memoryview(_map(generations_fd, arena_bytes // BLOCK_BYTES * 8)).cast("Q")

    # Processors other than x86 may reorder the loads of copy and generation. A torn copy is then caught by its checksum.

    def copy(self, offset: int, generation: int, into: memoryview) -> bool:
        """Copies a record's body (parameters, optimizer state) from the arena (the daemon's DRAM tier) to `into`.

        Returns False when the daemon has overwritten the record.

        Args:
            offset: where the body begins in the arena.
            generation: the record's generation when it was leased.
            into: the memory to fill; its length says how many bytes to copy.
        """
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return False
        np.copyto(np.frombuffer(into, np.uint8), self._arena[offset : offset + len(into)])
        return generations[block] == generation

    def copy_hashed(self, offset: int, generation: int, into: memoryview, parameter_bytes: int) -> Checksums | None:
        """Copies as `copy` does, and returns the checksums of the copied bytes, or None when the daemon has overwritten the record.

        `parameter_bytes` says where the parameter section ends: each section has a checksum of its own.
        """
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return None
        checksums = copy_hashed(self._arena[offset : offset + len(into)], np.frombuffer(into, np.uint8), parameter_bytes)
        return checksums if generations[block] == generation else None


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps `num_bytes` of the daemon's shared memory for reading.

    Raises InvalidRequest when the memory is shorter, or could become shorter: reading beyond its end would kill this process (SIGBUS).
    """
    seals = 0
    with suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < num_bytes:
        raise InvalidRequest(f"local plane: the daemon's memory is not {num_bytes} bytes, sealed against shrinking")
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

"""The records (blocks of bytes, one for each expert) that the store benchmark moves, and the caller's memory that they are fetched into.

A child process fills the records into shared memory, so that no page of them was written by the process that measures. The values are
finite float32 numbers that do not compress, like a trainer's parameters.

The child process is: python -m ooc_moe.bench.store.records FD NUM_BYTES
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import xxhash
from numpy.typing import NDArray

from ooc_moe.bench.child_process import child_process, report_ready, run_as_child
from ooc_moe.bench.harness import WrongBytes
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec

FEW, MANY = 32, 256
SMALL_BYTES = 1 << 20
# One sample of fetches moves at least this many bytes.
SAMPLE_BYTES = 256 << 20


class Records:
    """The records that the store benchmark moves: `count` records of `record_bytes` bytes each, and memory of the same size to fetch into.

    `source` has the records: shared memory, read-only, that another process has filled. `destination` is the memory for fetches:
    page-aligned, with all its pages allocated.
    """

    def __init__(self, fd: int, record_bytes: int, count: int) -> None:
        self.fd, self.record_bytes, self.count = fd, record_bytes, count
        self.num_bytes = record_bytes * count
        self.source: NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, self.num_bytes, prot=mmap.PROT_READ), np.uint8)
        memory = mmap.mmap(-1, self.num_bytes)
        with contextlib.suppress(OSError):  # numpy does the same for its own large arrays.
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.destination: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.blank()
        self._digests = [xxhash.xxh3_64_intdigest(self.body(index)) for index in range(count)]

    @property
    def ids(self) -> range:
        """The numbers of the records, from 0 to `count` - 1; they are also the records' expert ids in a bank."""
        return range(self.count)

    @property
    def layout(self) -> Layout:
        """The layout of an expert of exactly `record_bytes`.

        About a third are parameters, the rest is optimizer state, as with Adam's two moments.
        """
        parameter_bytes = max(BLOCK_BYTES, self.record_bytes // 3 // BLOCK_BYTES * BLOCK_BYTES)
        optimizer_bytes = self.record_bytes - parameter_bytes
        return Layout(
            parameters=(TensorSpec(name="w", shape=(parameter_bytes // 4,)),),
            optimizer=(TensorSpec(name="w.moments", shape=(optimizer_bytes // 4,)),) if optimizer_bytes else (),
        )

    def body(self, index: int) -> memoryview:
        """The bytes of record `index` as they must arrive: a part of `source`."""
        return self.source[index * self.record_bytes : (index + 1) * self.record_bytes].data

    def into(self, index: int) -> memoryview:
        """The memory that record `index` is fetched into: a part of `destination`."""
        return self.destination[index * self.record_bytes : (index + 1) * self.record_bytes].data

    def blank(self) -> None:
        """Overwrites the destination, so that bytes left there by an earlier fetch cannot pass for newly fetched ones."""
        self.destination[:] = 0xA5

    def check(self) -> None:
        """Checks the destination after a fetch: raises WrongBytes unless it holds every record."""
        for index in self.ids:
            self.check_body(index, self.into(index))

    def check_body(self, index: int, body: memoryview | bytes) -> None:
        """Raises WrongBytes unless `body` equals record `index`; compares length and xxh3 checksum."""
        if len(body) != self.record_bytes or xxhash.xxh3_64_intdigest(body) != self._digests[index]:
            raise WrongBytes(f"record {index} of {self.count} did not arrive as it was sent")


def check_record_bytes(record_bytes: int) -> None:
    """Raises InvalidRequest for a record size that O_DIRECT cannot move: one that is not a multiple of a block, or below two blocks."""
    if record_bytes < 2 * BLOCK_BYTES or record_bytes % BLOCK_BYTES:
        raise InvalidRequest(f"sizes: {record_bytes} bytes is not a multiple of {BLOCK_BYTES}, or less than {2 * BLOCK_BYTES}")


def count_of(record_bytes: int, *, quick: bool) -> int:
    """Returns how many records of `record_bytes` bytes one measured call moves: fewer if the records are large; a quarter as many if
    `quick`."""
    return (MANY if record_bytes < SMALL_BYTES else FEW) // (4 if quick else 1)


@contextmanager
def filled_records(record_bytes: int, count: int) -> Iterator[Records]:
    """Yields `count` records that a child process has filled; their shared memory is closed at the end."""
    fd = os.memfd_create("ooc-moe-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, record_bytes * count)
        with child_process("ooc_moe.bench.store.records", fd, record_bytes * count, pass_fds=(fd,)):
            pass
        yield Records(fd, record_bytes, count)
    finally:
        os.close(fd)


def map_source(fd: str, num_bytes: str) -> mmap.mmap:
    """Maps the shared memory of the records, read-only, in a child process that inherited its file descriptor.

    The arguments are those of the child's command line, as text.
    """
    return mmap.mmap(int(fd), int(num_bytes), prot=mmap.PROT_READ)


def _fill(fd: str, num_bytes: str) -> None:
    """Fills the shared memory `fd` with the records' values: finite float32 numbers that do not compress. Reports ready at the end."""
    memory = np.frombuffer(mmap.mmap(int(fd), int(num_bytes)), np.uint64)
    generator = np.random.default_rng(0)
    for start in range(0, len(memory), 1 << 20):
        part = memory[start : start + (1 << 20)]
        part[:] = generator.integers(0, 1 << 64, size=len(part), dtype=np.uint64)
        part &= np.uint64(0xBFFFFFFF_BFFFFFFF)  # Keeps each exponent below its largest value, which means NaN or infinity.
    report_ready()


if __name__ == "__main__":
    run_as_child(_fill)

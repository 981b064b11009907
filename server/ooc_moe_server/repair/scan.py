"""Reads the slabs of a stopped daemon: header blocks, and bodies to compare them with their checksums.

Calls may run on any thread, and use a bounded amount of memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import xxhash

from ooc_moe_server.catalog.catalog import Slot
from ooc_moe_server.nvme.slab import transfer
from ooc_moe_wire.codec import Checksums, RecordHeader
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BLOCK_BYTES, Layout

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_THREADS = 4
_READ_BYTES = 1 << 20
_BLANK = bytes(BLOCK_BYTES)


class Track(Protocol):
    """Passes items through, and shows how many of `total` have passed."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterable[Item]: ...  # noqa: D102


class Slabs:
    """The slabs of a data directory, open for reading."""

    def __init__(self, data_dir: Path) -> None:
        """Raises OSError."""
        self._fds = {
            int(path.stem): os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            for path in sorted((data_dir / "slabs").glob("*.slab"))
            if path.stem.isdigit()
        }
        for fd in self._fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # Without it, reading a header would read ahead into the body.

    def slots(self) -> Iterator[Slot]:
        """Yields every slot, used or not, slab by slab and in order."""
        for record_bytes, fd in self._fds.items():
            for index in range(os.fstat(fd).st_size // record_bytes):
                yield Slot(record_bytes, index)

    def header(self, slot: Slot) -> RecordHeader | None:
        """Reads the header block of a slot; None where nothing was ever written. Raises CorruptRecord when it is damaged or unreadable."""
        block = bytearray(BLOCK_BYTES)
        try:
            self._read(slot, 0, memoryview(block))
        except OSError as error:
            raise CorruptRecord(f"{slot_name(slot)}: {error.strerror}") from error
        return None if block == _BLANK else RecordHeader.unpack(memoryview(block), what=slot_name(slot))

    def check_body(self, slot: Slot, parameter_bytes: int, expected: Checksums) -> str | None:
        """Compares the sections of a slot with their checksums. Describes what is wrong, or returns None."""
        optimizer_bytes = slot.record_bytes - BLOCK_BYTES - parameter_bytes
        try:
            if self._xxh3(slot, BLOCK_BYTES, parameter_bytes) != expected.parameters:
                return "the parameter section's checksum does not match"
            if optimizer_bytes and self._xxh3(slot, BLOCK_BYTES + parameter_bytes, optimizer_bytes) != expected.optimizer:
                return "the optimizer section's checksum does not match"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return None

    def close(self) -> None:
        """Closes the files."""
        for fd in self._fds.values():
            os.close(fd)

    def _xxh3(self, slot: Slot, start: int, num_bytes: int) -> int:
        digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(min(num_bytes, _READ_BYTES)))
        for at in range(start, start + num_bytes, _READ_BYTES):
            part = buffer[: min(_READ_BYTES, start + num_bytes - at)]
            self._read(slot, at, part)
            digest.update(part)
        return int(digest.intdigest())

    def _read(self, slot: Slot, offset: int, into: memoryview) -> None:
        fd = self._fds.get(slot.record_bytes)
        if fd is None:
            raise OSError(errno.ENOENT, "the slab is missing")
        if transfer(os.preadv, fd, into, slot.index * slot.record_bytes + offset) < len(into):
            raise OSError(errno.EIO, "the slab ends before the end of the slot")


@contextmanager
def open_slabs(data_dir: Path) -> Iterator[Slabs]:
    """Opens the slabs of a data directory, and closes them afterwards. Raises OSError."""
    slabs = Slabs(data_dir)
    try:
        yield slabs
    finally:
        slabs.close()


def map_tracked(work: Callable[[Item], Result], items: list[Item], what: str, track: Track) -> Iterator[Result]:
    """Yields the results of `work` in the order of the items; a few threads do the work, and `track` shows the progress."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="scan") as pool:
        yield from track(pool.map(work, items), what, len(items))


def untracked(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """A `Track` that shows nothing."""
    return items


def has_sizes_of(header: RecordHeader, layout: Layout) -> bool:
    """Whether the sections of a record have the sizes of a layout."""
    return (header.parameter_bytes, header.optimizer_bytes) == (layout.parameter_bytes, layout.optimizer_bytes)


def slot_name(slot: Slot) -> str:
    """A slot as messages name it."""
    return f"slot {slot.index} of slab {slot.record_bytes}"

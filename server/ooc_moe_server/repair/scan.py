"""Reads the slabs (files of records) of a stopped daemon: header blocks, and whole records, to compare their bytes with their checksums.

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
    """A function that yields `items` unchanged, and shows how many of `total` it has yielded so far, labelled `what`."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterable[Item]: ...  # noqa: D102


class Slabs:
    """The slabs (files of records) of a data directory, opened for reading only. Reads and checks the records in them."""

    def __init__(self, data_dir: Path) -> None:
        """Opens all slabs of the data directory. Raises OSError."""
        self._fds = {
            int(path.stem): os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            for path in sorted((data_dir / "slabs").glob("*.slab"))
            if path.stem.isdigit()
        }
        for fd in self._fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # Without it, reading a header would read ahead into the body.

    def slots(self) -> Iterator[Slot]:
        """Yields every slot (place for one record) of every slab in order, whether it is in use or not."""
        for record_bytes, fd in self._fds.items():
            for index in range(os.fstat(fd).st_size // record_bytes):
                yield Slot(record_bytes, index)

    def header(self, slot: Slot) -> RecordHeader | None:
        """Reads the header of the record in a slot. Returns None when nothing was ever written to the slot.

        Raises:
            CorruptRecord: the header is damaged or cannot be read.
        """
        block = bytearray(BLOCK_BYTES)
        try:
            self._read(slot, 0, memoryview(block))
        except OSError as error:
            raise CorruptRecord(f"{slot_name(slot)}: {error.strerror}") from error
        return None if block == _BLANK else RecordHeader.unpack(memoryview(block), what=slot_name(slot))

    def check_body(self, slot: Slot, parameter_bytes: int, expected: Checksums) -> str | None:
        """Compares both sections of the record in a slot with their expected checksums. Returns what is wrong, or None.

        `parameter_bytes`: the size of the first section; the rest is the optimizer section.
        """
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
        """Closes the slab files."""
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
    """Opens the slabs (files of records) of a data directory, yields the slabs, and closes them when the context ends. Raises OSError."""
    slabs = Slabs(data_dir)
    try:
        yield slabs
    finally:
        slabs.close()


def map_tracked(work: Callable[[Item], Result], items: list[Item], what: str, track: Track) -> Iterator[Result]:
    """Calls `work` for every item on a few threads, and yields the results in the order of the items.

    `track` shows the progress, with the label `what`.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="scan") as pool:
        yield from track(pool.map(work, items), what, len(items))


def untracked(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Yields the items unchanged and shows no progress: a `Track` for callers that want to see no progress."""
    return items


def has_sizes_of(header: RecordHeader, layout: Layout) -> bool:
    """Whether the sections of the record with this header have the sizes that a layout (the sizes of a bank's records) demands."""
    return (header.parameter_bytes, header.optimizer_bytes) == (layout.parameter_bytes, layout.optimizer_bytes)


def slot_name(slot: Slot) -> str:
    """Returns the text by which messages name a slot: its number and its slab."""
    return f"slot {slot.index} of slab {slot.record_bytes}"

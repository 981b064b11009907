"""Reads slabs without a daemon: header blocks, and whether bodies are what was written. Any thread, in bounded memory.

Knows nothing of banks, nor of who refers to which slot.
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
from ooc_moe_wire.codec import Checksums, RecordHeader
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BLOCK_BYTES

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_THREADS = 4
_READ_BYTES = 1 << 20
_BLANK = bytes(BLOCK_BYTES)


class Track(Protocol):
    """Passes items through, and shows how many of `total` have come."""

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
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # Or each header would bring its neighbours' bodies.

    def slots(self) -> Iterator[Slot]:
        """Every slot, used or not, in order of place."""
        for record_bytes, fd in self._fds.items():
            for index in range(os.fstat(fd).st_size // record_bytes):
                yield Slot(record_bytes, index)

    def header(self, slot: Slot) -> RecordHeader | None:
        """The header block of a slot; None where nothing was ever written. Raises CorruptRecord: it is damaged, or cannot be read."""
        block = bytearray(BLOCK_BYTES)
        try:
            self._read(slot, 0, memoryview(block))
        except OSError as error:
            raise CorruptRecord(f"{name(slot)}: {error.strerror}") from error
        return None if block == _BLANK else RecordHeader.unpack(memoryview(block), what=name(slot))

    def check_body(self, slot: Slot, parameter_bytes: int, expected: Checksums) -> str | None:
        """What is wrong with the sections of a slot, or None."""
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
        done = 0
        while done < len(into):
            count = os.preadv(fd, [into[done:]], slot.index * slot.record_bytes + offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the slab ends before it")
            done += count


@contextmanager
def opened(data_dir: Path) -> Iterator[Slabs]:
    """The slabs, closed afterwards. Raises OSError."""
    slabs = Slabs(data_dir)
    try:
        yield slabs
    finally:
        slabs.close()


def each(work: Callable[[Item], Result], items: list[Item], what: str, track: Track) -> Iterator[Result]:
    """The results of `work` in the order of the items, made by a few threads."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="scan") as pool:
        yield from track(pool.map(work, items), what, len(items))


def untracked(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Shows nothing."""
    return items


def name(slot: Slot) -> str:
    """For messages."""
    return f"slot {slot.index} of slab {slot.record_bytes}"

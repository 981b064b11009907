"""COMMITTED: how far the index has come, kept synced outside of it, so that an index that lost commits is noticed.

Two blocks of 4 KiB, written in turn, each with its own checksum: a write that is cut off spoils the older of the two at worst. The file is
allocated once and only ever overwritten in place, so that a full disk cannot refuse a write. Knows nothing of what was committed.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ooc_moe_server.atomic_files import write_durably
from ooc_moe_wire.layout import BLOCK_BYTES

_NUM_BLOCKS = 2
_MAGIC = b"OOCMOECM"
# magic, sequence, next version, next snapshot id; then the xxh3 of these
_FIELDS = struct.Struct("<8sQQQ")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The state of the last commit."""

    sequence: int = 0
    next_version: int = 1  # No record of this version or a newer one was committed.
    next_snapshot_id: int = 1


class CommittedFile:
    """The file, open for writing; made when it is not there. Raises OSError."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            renew(path, Committed())
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, committed: Committed) -> None:
        """Returns when it is on the device. Raises OSError; the state written before is then still there."""
        block = _packed(committed)
        if os.pwrite(self._fd, block, committed.sequence % _NUM_BLOCKS * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError(errno.EIO, "COMMITTED: a block was written in part")
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def renew(path: Path, committed: Committed) -> None:
    """Makes the file anew with both blocks equal, in one step. Raises OSError."""
    write_durably(path, _packed(committed) * _NUM_BLOCKS)


def read(path: Path) -> tuple[Committed | None, int]:
    """The newest sound block, or None; and how many blocks are damaged (a missing file has two). Raises OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, _NUM_BLOCKS
    blocks = [_unpacked(content[at : at + BLOCK_BYTES]) for at in range(0, _NUM_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)]
    sound = [block for block in blocks if block]
    return max(sound, key=lambda block: block.sequence, default=None), _NUM_BLOCKS - len(sound)


def _packed(committed: Committed) -> bytes:
    fields = _FIELDS.pack(_MAGIC, committed.sequence, committed.next_version, committed.next_snapshot_id)
    return (fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))).ljust(BLOCK_BYTES, b"\0")


def _unpacked(block: bytes) -> Committed | None:
    fields, check = block[: _FIELDS.size], block[_FIELDS.size : _FIELDS.size + _CHECK.size]
    if len(check) < _CHECK.size or _CHECK.unpack(check)[0] != xxhash.xxh3_64_intdigest(fields):
        return None
    magic, sequence, next_version, next_snapshot_id = _FIELDS.unpack(fields)
    return Committed(sequence=sequence, next_version=next_version, next_snapshot_id=next_snapshot_id) if magic == _MAGIC else None

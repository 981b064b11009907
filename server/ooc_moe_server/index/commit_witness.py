"""The file COMMITTED: holds the number of the last transaction that the index committed, so that an index that lost commits is noticed.

    block 0 (4 KiB): commits 0, 2, 4, ...
    block 1 (4 KiB): commits 1, 3, 5, ...

Each block carries its own checksum. A write that a crash cuts off damages one block; the other one still shows the commit before. The file
is allocated once and then overwritten in place, so that a full disk cannot refuse a write.
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
class LastCommit:
    """The content of the file COMMITTED: the number of the index's last commit, and the lowest version and snapshot id unused after it."""

    sequence: int = 0
    next_version: int = 1  # All committed records have lower versions.
    next_snapshot_id: int = 1


class CommitWitness:
    """Keeps the file COMMITTED open, and writes the number of the index's last commit to it. Creates the file if it does not exist.

    Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            renew(path, LastCommit())
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, last: LastCommit) -> None:
        """Writes `last`, which describes the index's last commit, to the file, and returns when it is on the device.

        Raises OSError; the file then still shows the commit before.
        """
        block = _packed(last)
        if os.pwrite(self._fd, block, last.sequence % _NUM_BLOCKS * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError(errno.EIO, "COMMITTED: a block was written in part")
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Closes the file COMMITTED."""
        os.close(self._fd)


def renew(path: Path, last: LastCommit) -> None:
    """Replaces the file COMMITTED in one step by a new one that holds `last` in both of its blocks. Raises OSError."""
    write_durably(path, _packed(last) * _NUM_BLOCKS)


def read(path: Path) -> tuple[LastCommit | None, int]:
    """Reads the file COMMITTED. Returns the newest commit in it (None if no block is sound), and how many of its two blocks are damaged.

    A missing file counts as two damaged blocks. Raises OSError.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, _NUM_BLOCKS
    blocks = [_unpacked(content[at : at + BLOCK_BYTES]) for at in range(0, _NUM_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)]
    sound = [block for block in blocks if block]
    return max(sound, key=lambda block: block.sequence, default=None), _NUM_BLOCKS - len(sound)


def _packed(last: LastCommit) -> bytes:
    fields = _FIELDS.pack(_MAGIC, last.sequence, last.next_version, last.next_snapshot_id)
    return (fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))).ljust(BLOCK_BYTES, b"\0")


def _unpacked(block: bytes) -> LastCommit | None:
    """Decodes a block of COMMITTED. Returns None when the block is damaged."""
    fields, check = block[: _FIELDS.size], block[_FIELDS.size : _FIELDS.size + _CHECK.size]
    if len(check) < _CHECK.size or _CHECK.unpack(check)[0] != xxhash.xxh3_64_intdigest(fields):
        return None
    magic, sequence, next_version, next_snapshot_id = _FIELDS.unpack(fields)
    return LastCommit(sequence=sequence, next_version=next_version, next_snapshot_id=next_snapshot_id) if magic == _MAGIC else None

"""Keeps disk space in reserve, so that a store on a full disk can still start, and can still delete banks and snapshots to make room.

The reserve is the file RESERVE, which only occupies space. When the disk is full, a step that must not fail empties the file and so gets
room. The file is filled again as soon as the disk has room. Pushes never use the reserve.

The methods of `Reserve` block, so they belong on a thread and not on the event loop.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# More than a start and the first transactions need.
RESERVE_BYTES_MIN = 4 << 20
# The reserve is not filled in smaller steps than this.
_STEP_BYTES = 64 << 10
_ROOM_BYTES_TO_START = 1 << 20


class Reserve:
    """Keeps disk space in the file RESERVE of a data directory, and frees it when a step that must not fail finds the disk full."""

    def __init__(self, data_dir: Path) -> None:
        self._path, self._index = data_dir / "RESERVE", data_dir / "index.sqlite"
        self._is_kept = False  # False during a start, which may need the space.
        self._is_short = False

    @property
    def held_bytes(self) -> int:
        """The number of bytes of disk space that the file RESERVE occupies now."""
        return _size(self._path)

    def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` and returns its result; if the disk is full, empties the reserve and runs `work` once more.

        If `work` raises, it must have changed nothing, so that it can be repeated. Raises what `work` raises.
        """
        try:
            result = work()
        except (OSError, sqlite3.Error) as error:
            if not is_disk_full(error) or not self.empty():
                raise
            result = work()
        if self._is_kept:
            self.fill()
        return result

    def require(self) -> None:
        """Fills the reserve, and raises OSError (ENOSPC) if the disk has too little room for that.

        Call it before a step that may be refused, such as adding a bank, so that disk space stays available for steps that must not fail.
        """
        self.fill()
        if self.held_bytes < RESERVE_BYTES_MIN:
            raise OSError(errno.ENOSPC, "the disk is full, and its reserve is in use")

    def fill(self) -> None:
        """Fills the reserve as far as the disk has room. Once this was called, every later `run` fills the reserve again at its end."""
        self._is_kept = True
        wanted, held = self._wanted_bytes(), self.held_bytes
        if held >= wanted:
            return
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            held = _grow(fd, held, wanted)
        finally:
            os.close(fd)
        if held < wanted and not self._is_short:
            log.warning("the disk is full: %d of %d reserved bytes are held", held, wanted)
        self._is_short = held < wanted

    def empty(self) -> bool:
        """Frees the disk space of the reserve. Returns False when the reserve was empty already."""
        if not self.held_bytes:
            return False
        log.warning("the disk is full: emptying the reserve of %d bytes", self.held_bytes)
        os.truncate(self._path, 0)
        return True

    def make_room(self) -> None:
        """Empties the reserve if the disk is almost full. Call it when the daemon starts, before anything is written.

        The steps of a start fail in too many ways on a full disk to repeat each one, as `run` does.
        """
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize < _ROOM_BYTES_TO_START:
            self.empty()

    def _wanted_bytes(self) -> int:
        """Returns the size that the reserve should have: a minimum, and twice the size of the index.

        Deleting a bank may write every page of the index to its WAL, and the manifests of snapshots, which are no longer than the index.
        """
        return RESERVE_BYTES_MIN + 2 * (_size(self._index) >> 20 << 20)


def _grow(fd: int, held: int, wanted: int) -> int:
    """Extends an open file from `held` bytes to `wanted` bytes, or as far as the disk has room. Returns its new size."""
    step = wanted - held
    while held < wanted and step >= _STEP_BYTES:
        try:
            os.posix_fallocate(fd, held, min(step, wanted - held))
            held += min(step, wanted - held)
        except OSError as error:
            if not is_disk_full(error):
                raise
            os.ftruncate(fd, held)  # Some file systems keep the part that fitted.
            step //= 2
    return held


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of a file or of SQLite means that the disk is full, or that the user's quota on it is used up."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

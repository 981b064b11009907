"""Space kept back, so that a full disk can neither stop the store from starting nor from deleting what fills it.

RESERVE is a file that only occupies room. Whoever must go on gives it up, and it is taken again as soon as there is room; pushes never
touch it. Synchronous; knows nothing of what the room is needed for.
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

# The first transactions and a start take less.
RESERVE_BYTES_MIN = 4 << 20
# Less room than this is as good as none.
_STEP_BYTES = 64 << 10
_ROOM_BYTES_TO_START = 1 << 20


class Reserve:
    """The file RESERVE of a data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._path, self._index = data_dir / "RESERVE", data_dir / "index.sqlite"
        self._is_kept = False  # Not during a start, which needs the room.
        self._is_short = False

    @property
    def held_bytes(self) -> int:
        """What it occupies."""
        return _size(self._path)

    def run(self, work: Callable[[], Result]) -> Result:
        """Runs `work`, which changes all or nothing; once more without the reserve when the disk is full. Raises what `work` raises."""
        try:
            result = work()
        except (OSError, sqlite3.Error) as error:
            if not is_disk_full(error) or not self.give_up():
                raise
            result = work()
        if self._is_kept:
            self.take()
        return result

    def require(self) -> None:
        """For what can be refused: raises OSError (ENOSPC) while the reserve is in use, so that what cannot be refused finds room."""
        self.take()
        if self.held_bytes < RESERVE_BYTES_MIN:
            raise OSError(errno.ENOSPC, "the disk is full, and its reserve is in use")

    def take(self) -> None:
        """Takes what is missing, as far as there is room; from then on `run` does so too."""
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

    def give_up(self) -> bool:
        """Frees the room; False when there was none to free."""
        if not self.held_bytes:
            return False
        log.warning("the disk is full: giving up the reserve of %d bytes", self.held_bytes)
        os.truncate(self._path, 0)
        return True

    def make_room(self) -> None:
        """Gives it up if the disk is all but full: for a start, whose first steps fail in too many ways to try each twice."""
        disk = os.statvfs(self._path.parent)
        if disk.f_bavail * disk.f_frsize < _ROOM_BYTES_TO_START:
            self.give_up()

    def _wanted_bytes(self) -> int:
        """Deleting a bank may write every page of the index to its WAL, and snapshots' manifests, which are no longer than the index."""
        return RESERVE_BYTES_MIN + 2 * (_size(self._index) >> 20 << 20)


def _grow(fd: int, held: int, wanted: int) -> int:
    """Allocates as much of a file as there is room for; returns its new size."""
    step = wanted - held
    while held < wanted and step >= _STEP_BYTES:
        try:
            os.posix_fallocate(fd, held, min(step, wanted - held))
            held += min(step, wanted - held)
        except OSError as error:
            if not is_disk_full(error):
                raise
            os.ftruncate(fd, held)  # Some file systems keep the part that did fit.
            step //= 2
    return held


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of files or of SQLite says that there is no room."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""`Staging`: the memory from which the daemon copies pushed bodies on the local plane.

The daemon copies a body into its own memory before it checks and writes it. The body's place is freed when the outcome arrives.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from bisect import insort
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Staging:
    """A memfd of a fixed, sealed size, divided into places. The daemon maps `fd`, which is closed with the last reference to this."""

    def __init__(self, num_bytes: int) -> None:
        """Makes the memfd. Its pages are allocated when they are first used. Raises OSError."""
        self.num_bytes = num_bytes
        fd = os.memfd_create("ooc-moe-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)
        self._free = [(0, num_bytes)]  # (start, end), sorted, never adjacent
        self._allocated: dict[int, int] = {}  # start -> end
        self._changed = threading.Condition()

    @property
    def fd(self) -> int:
        """The file descriptor of the memory."""
        return self._file.fileno()

    def allocate(self, num_bytes: int, *, wanted: Callable[[], bool]) -> int | None:
        """Allocates a place, and returns its start. It is the lowest one that fits, because pages there are in use already.

        Waits for a place as long as `wanted()` is true, which is asked again after each `wake`. None when it is false.
        """
        with self._changed:
            while wanted():
                for index, (start, end) in enumerate(self._free):
                    if end - start >= num_bytes:
                        self._free[index : index + 1] = [(start + num_bytes, end)] if end - start > num_bytes else []
                        self._allocated[start] = start + num_bytes
                        return start
                self._changed.wait()
        return None

    def bytes_at(self, start: int) -> NDArray[np.uint8]:
        """The bytes of an allocated place."""
        return self._bytes[start : self._allocated[start]]

    def free(self, start: int) -> None:
        """Frees a place, whose body is no longer read."""
        with self._changed:
            insort(self._free, (start, self._allocated.pop(start)))
            merged: list[tuple[int, int]] = []
            for begin, end in self._free:
                if merged and merged[-1][1] == begin:
                    begin = merged.pop()[0]
                merged.append((begin, end))
            self._free = merged
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes waiting `allocate` calls ask again whether they are still wanted."""
        with self._changed:
            self._changed.notify_all()

"""Staging memory: where bodies lie while they are pushed over the local plane.

The daemon copies a body into its own memory before it checks or writes it, and answers when it is done: until then its place is taken.
Knows nothing of sockets or experts.
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
    """A memfd of a fixed size, sealed so that it keeps it. `fd` is the daemon's to map; it closes with the last reference."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError. Pages come as they are used."""
        self.num_bytes = num_bytes
        fd = os.memfd_create("ooc-moe-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._file = os.fdopen(fd, "r+b", buffering=0)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8)
        self._free = [(0, num_bytes)]  # (start, end), sorted, never adjacent
        self._taken: dict[int, int] = {}  # start -> end
        self._changed = threading.Condition()

    @property
    def fd(self) -> int:
        """Of the memory."""
        return self._file.fileno()

    def take(self, num_bytes: int, *, wanted: Callable[[], bool]) -> int | None:
        """The start of a free place, waited for while `wanted` (asked again after each `wake`); None when it no longer is.

        The lowest place: its pages are there already.
        """
        with self._changed:
            while wanted():
                for index, (start, end) in enumerate(self._free):
                    if end - start >= num_bytes:
                        self._free[index : index + 1] = [(start + num_bytes, end)] if end - start > num_bytes else []
                        self._taken[start] = start + num_bytes
                        return start
                self._changed.wait()
        return None

    def place(self, start: int) -> NDArray[np.uint8]:
        """The bytes of a place that is taken."""
        return self._bytes[start : self._taken[start]]

    def give_back(self, start: int) -> None:
        """Its body is no longer read."""
        with self._changed:
            insort(self._free, (start, self._taken.pop(start)))
            merged: list[tuple[int, int]] = []
            for begin, end in self._free:
                if merged and merged[-1][1] == begin:
                    begin = merged.pop()[0]
                merged.append((begin, end))
            self._free = merged
            self._changed.notify_all()

    def wake(self) -> None:
        """Lets those that wait ask whether they still want to."""
        with self._changed:
            self._changed.notify_all()

"""`Staging`: shared memory through which pushed bodies (the bytes of experts) reach a daemon on the same host.

The client writes a body into a place of this memory. The daemon copies it into its own memory before it checks and writes it. The place is
freed when the daemon has answered the push.
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
    """Shared memory (a memfd) of a fixed size, in which each pushed body (an expert's bytes) gets a place from which the daemon reads it.

    The daemon maps the same memory through `fd`. The descriptor is closed with the last reference to this object.
    """

    def __init__(self, num_bytes: int) -> None:
        """Creates shared memory of `num_bytes`, which can neither shrink nor grow. Pages take memory when they are first used.

        Raises OSError.
        """
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
        """The file descriptor of the shared memory, to be sent to the daemon."""
        return self._file.fileno()

    def allocate(self, num_bytes: int, *, wanted: Callable[[], bool]) -> int | None:
        """Allocates a place of `num_bytes`, and returns its start. Waits until a place is free, as long as `wanted()` returns True.

        `wanted` is called again whenever a place was freed and after each `wake`. When it returns False, the result is None. Of several
        free places, the lowest is chosen, because pages there are in use already.
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
        """The bytes of the allocated place that begins at `start`, as a writable array without a copy."""
        return self._bytes[start : self._allocated[start]]

    def free(self, start: int) -> None:
        """Frees the place that begins at `start`. Call this when the daemon no longer reads the body in it."""
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
        """Makes waiting `allocate` calls call `wanted` again. Call this when one of them may no longer need its place."""
        with self._changed:
            self._changed.notify_all()

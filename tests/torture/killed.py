"""Copies a store's directory while its engine runs. The copy equals what a kill at this moment would leave.

The copy is taken between two steps of the event loop, while no pool thread works, so that it is one consistent state of the files. The
engine may be closed afterwards. The copy holds everything that was handed to the operating system, synced or not; power_loss.py simulates
the loss of what was not synced.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class Threads:
    """Tracks the work in all thread pools inside `watched`, so that a copy can be taken while no thread works."""

    def __init__(self) -> None:
        self._work: set[Future[Any]] = set()

    def rest(self) -> None:
        """Waits until no tracked work is running."""
        wait(self._work)
        self._work.clear()

    def copy(self, directory: Path, copy: Path) -> None:
        """Copies a store's directory as a kill would leave it, without LOCK and daemon.json."""
        self.rest()
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("LOCK", "daemon.json", "*-shm"))

    @contextmanager
    def watched(self) -> Iterator[Threads]:
        """Tracks the work that is handed to any thread pool inside the block; yields `self`."""
        real = ThreadPoolExecutor.submit

        def submit(pool: ThreadPoolExecutor, *arguments: Any, **options: Any) -> Future[Any]:
            future = real(pool, *arguments, **options)
            self._work = {each for each in self._work if not each.done()} | {future}
            return future

        with mock.patch.object(ThreadPoolExecutor, "submit", submit):
            yield self

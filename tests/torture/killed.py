"""A store killed without a kill: a copy of its directory as its files are now, while its engine still runs.

The copy is taken between two steps of the event loop and while no thread of a pool works, so that it is one state of the files; the engine
it came from may be closed afterwards. Nothing is lost that was handed to the operating system: for that, see power_loss.py.
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
    """All work handed to thread pools while `watched`."""

    def __init__(self) -> None:
        self._work: set[Future[Any]] = set()

    def rest(self) -> None:
        """Returns when none is under way."""
        wait(self._work)
        self._work.clear()

    def copy(self, directory: Path, copy: Path) -> None:
        """Copies a store as a kill would leave it; `LOCK` and daemon.json tell nothing and stay behind."""
        self.rest()
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("LOCK", "daemon.json", "*-shm"))

    @contextmanager
    def watched(self) -> Iterator[Threads]:
        """Watches every pool from now on."""
        real = ThreadPoolExecutor.submit

        def submit(pool: ThreadPoolExecutor, *arguments: Any, **options: Any) -> Future[Any]:
            future = real(pool, *arguments, **options)
            self._work = {each for each in self._work if not each.done()} | {future}
            return future

        with mock.patch.object(ThreadPoolExecutor, "submit", submit):
            yield self

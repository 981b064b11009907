"""The lock under which index and catalog change: for one commit round (of pushes), or one change of banks and snapshots, at a time.

A snapshot, for example, needs every record in the index. The snapshot first lends the lock to commit rounds, which write the unsaved
records:

    change:  acquire -> lend ........................... -> work -> release
    rounds:                    round, round, round
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CatalogLock:
    """Lets one commit round (of pushes) or one change of banks and snapshots run at a time.

    While a change runs, pushes with durability MEMORY, which need no round, wait with `wait_until_unchanging` before they become visible.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()  # Held by a round, or by a change that has not lent it.
        self._is_lent = False
        self._returned = asyncio.Condition(self._lock)
        self._no_change = asyncio.Event()  # No change is under way.
        self._no_change.set()

    @property
    def is_changing(self) -> bool:
        """Whether a change of banks or snapshots is running."""
        return not self._no_change.is_set()

    @asynccontextmanager
    async def round(self) -> AsyncIterator[None]:
        """Holds the lock for one commit round (the commit of waiting pushes) while the context is open."""
        async with self._lock:
            yield

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Holds the lock for one change of banks or snapshots while the context is open."""
        async with self._lock:
            await self._returned.wait_for(lambda: not self._is_lent)
            self._no_change.clear()
            try:
                yield
            finally:
                self._no_change.set()

    @asynccontextmanager
    async def lent_to_rounds(self) -> AsyncIterator[None]:
        """Lends the lock of a caller inside `change` to commit rounds while the context is open. No other change begins meanwhile."""
        self._is_lent = True
        self._lock.release()
        try:
            yield
        finally:
            await self._lock.acquire()
            self._is_lent = False
            self._returned.notify_all()

    async def wait_until_unchanging(self) -> None:
        """Waits until no change of banks or snapshots is running. Call this before making a record visible to fetches outside of a commit
        round.
        """
        while self.is_changing:
            await self._no_change.wait()

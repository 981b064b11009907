"""Lets the event loop use the index: runs work on the index's own thread, and gives out version numbers that are never used twice.

Also keeps the slots (places of records on the disk) of failed commits out of use as long as a crash could make these commits take
effect after all.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ooc_moe_server.catalog.catalog import Catalog, Slot
from ooc_moe_server.index.database import VERSION_RESERVE, Index
from ooc_moe_server.index.tables import Write
from ooc_moe_server.nvme.reserve import is_disk_full
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_wire.errors import Internal, OocMoeError, TierFull

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class IndexThread:
    """Gives the event loop access to the index, which only one thread may use: commits records, and gives out new version numbers."""

    def __init__(self, catalog: Catalog, index: Index, executor: ThreadPoolExecutor, nvme: NvmeTier) -> None:
        self._catalog, self._index, self._executor, self._nvme = catalog, index, executor, nvme
        # After a crash the index issues no version below this one again. `Index.load` saved the first such limit.
        self._versions_below = catalog.next_version + VERSION_RESERVE
        # The slots of commits that failed. A crash may still bring such a commit back, until a later commit has overwritten it.
        self._quarantine: set[Slot] = set()
        self._last_complaint = ""  # So that an error that repeats is logged once.

    async def run(self, work: Callable[[Index], Result]) -> Result:
        """Calls `work` with the index on the one thread that may use it, waits, and returns the result.

        Raises TierFull (disk full) or Internal.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._index)
        except (OSError, sqlite3.Error) as error:
            raise self.translated(error, "index") from error

    async def take_version(self) -> int:
        """Gives out a version number that was never given out before and never will be again, even after a crash.

        Raises TierFull, Internal.
        """
        while self._catalog.next_version >= self._versions_below:
            await self._put([])
        return self._catalog.take_version()

    async def commit(self, writes: list[Write], slots: Iterable[Slot]) -> None:
        """Stores records in the index as the current ones of their experts, in one transaction.

        `slots`: the places of these records on the disk. If the commit fails, its slots stay out of use (in quarantine) until a later
        commit succeeds: after a crash, the failed commit could turn out to be on the disk. Raises TierFull, Internal.
        """
        quarantined = set(self._quarantine)
        try:
            await self._put(writes)
        except Exception:
            self._quarantine.update(slots)
            raise
        self._last_complaint = ""
        self._end_quarantine(quarantined)

    async def clear_quarantine(self) -> None:
        """Frees the slots of failed commits, if there are any, by an empty commit that succeeds. Otherwise these slots would fill the disk.

        Raises:
            TierFull, Internal: the empty commit failed.
        """
        if self._quarantine:
            await self.commit([], [])

    def translated(self, error: Exception, what: str) -> OocMoeError:
        """Translates an error as `store_error` does, and logs it if it is unexpected. `what`: what failed, for the message.

        An error that repeats is logged once, until a commit succeeds.
        """
        translated = store_error(error, what=what)
        complaint = f"{type(error).__name__}: {error}"
        if translated is not error and complaint != self._last_complaint:
            self._last_complaint = complaint
            if isinstance(translated, TierFull):
                log.warning("%s", translated)
            else:
                log.error("%s failed", what, exc_info=error)
        return translated

    async def _put(self, writes: list[Write]) -> None:
        """Stores records in one index transaction, which also saves how far version numbers were given out."""

        def put(index: Index) -> int:
            next_version = self._catalog.next_version  # Read on this thread, so that the saved number never decreases.
            index.put_records(writes, next_version)
            return next_version

        self._versions_below = await self.run(put) + VERSION_RESERVE

    def _end_quarantine(self, quarantined: set[Slot]) -> None:
        for slot in self._quarantine & quarantined:
            self._quarantine.discard(slot)
            self._nvme.let_go(slot)


def store_error(error: Exception, *, what: str) -> OocMoeError:
    """Translates an error of a file or of SQLite into the one that the caller gets: TierFull when the disk is full, otherwise Internal.

    An OocMoeError is returned unchanged. `what`: what failed, for the message.
    """
    if isinstance(error, OocMoeError):
        return error
    if is_disk_full(error):
        return TierFull(f"NVMe tier: {what}: the disk is full", retry_after_ms=1000)
    return Internal(f"{what}: {type(error).__name__}: {error}")

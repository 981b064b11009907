"""The event loop's access to the index: it runs work on the index's thread, issues versions, and keeps the slots of failed commits."""

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
    """One index, and the executor with the one thread that may use it."""

    def __init__(self, catalog: Catalog, index: Index, executor: ThreadPoolExecutor, nvme: NvmeTier) -> None:
        self._catalog, self._index, self._executor, self._nvme = catalog, index, executor, nvme
        # After a crash the index issues no version below this one again. `Index.load` saved the first such limit.
        self._versions_below = catalog.next_version + VERSION_RESERVE
        # The slots of commits that failed. A crash may still bring such a commit back, until a later commit has overwritten it.
        self._quarantine: set[Slot] = set()
        self._last_complaint = ""  # So that an error that repeats is logged once.

    async def run(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work` on the index's thread. Raises TierFull (disk full) or Internal."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._index)
        except (OSError, sqlite3.Error) as error:
            raise self.translated(error, "index") from error

    async def take_version(self) -> int:
        """Issues a version that is never issued again, even after a crash. Raises TierFull, Internal."""
        while self._catalog.next_version >= self._versions_below:
            await self._put([])
        return self._catalog.take_version()

    async def commit(self, writes: list[Write], slots: Iterable[Slot]) -> None:
        """Makes records current. After a failure their slots stay in quarantine until a commit succeeds. Raises TierFull, Internal."""
        quarantined = set(self._quarantine)
        try:
            await self._put(writes)
        except Exception:
            self._quarantine.update(slots)
            raise
        self._last_complaint = ""
        self._end_quarantine(quarantined)

    async def clear_quarantine(self) -> None:
        """Makes an empty commit if slots are in quarantine, which frees them: failing commits must not use up the disk.

        Raises:
            TierFull, Internal: the commit failed.
        """
        if self._quarantine:
            await self.commit([], [])

    def translated(self, error: Exception, what: str) -> OocMoeError:
        """Translates as `store_error`, and logs an unexpected error: once, until a commit succeeds."""
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
        """Runs one index transaction, which also saves which versions are used."""

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
    """Translates an error of a file or of the index into the error that the caller gets: TierFull when the disk is full, else Internal."""
    if isinstance(error, OocMoeError):
        return error
    if is_disk_full(error):
        return TierFull(f"NVMe tier: {what}: the disk is full", retry_after_ms=1000)
    return Internal(f"{what}: {type(error).__name__}: {error}")

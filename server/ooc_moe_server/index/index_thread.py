"""The index as the event loop sees it: its thread, which versions are saved as used, and the slots of commits that failed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ooc_moe_server.catalog.catalog import Catalog, Slot
from ooc_moe_server.index.database import VERSION_RESERVE, Index, Write
from ooc_moe_server.nvme.reserve import is_disk_full
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_wire.errors import Internal, OocMoeError, TierFull

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class IndexThread:
    """One index and its thread."""

    def __init__(self, catalog: Catalog, index: Index, executor: ThreadPoolExecutor, nvme: NvmeTier) -> None:
        self._catalog, self._index, self._executor, self._nvme = catalog, index, executor, nvme
        self._versions_below = catalog.next_version + VERSION_RESERVE  # The index will begin beyond these after a crash; `load` saved it.
        # An index commit that failed may still be found after a crash, until a later one went over it.
        self._quarantine: set[Slot] = set()
        self._complaint = ""

    async def run(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work` on the index's thread. Raises TierFull (disk full) or Internal."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._index)
        except (OSError, sqlite3.Error) as error:
            raise self.translated(error, "index") from error

    async def take_version(self) -> int:
        """A version that no crash brings back: the index has saved that it is used. Raises TierFull, Internal."""
        while self._catalog.next_version >= self._versions_below:
            await self._put([])
        return self._catalog.take_version()

    async def commit(self, writes: list[Write], slots: Iterable[Slot]) -> None:
        """Makes records current. When it fails their slots are kept from use until a later commit succeeds. Raises TierFull, Internal."""
        quarantined = set(self._quarantine)
        try:
            await self._put(writes)
        except Exception:
            self._quarantine.update(slots)
            raise
        self._complaint = ""
        self._let_go(quarantined)

    async def clear_quarantine(self) -> None:
        """Commits nothing if slots are in quarantine, so that failing commits cannot use up the disk. Raises TierFull, Internal."""
        if self._quarantine:
            await self.commit([], [])

    def translated(self, error: Exception, what: str) -> OocMoeError:
        """As `store_error`; the log has what we did not expect, once until a commit succeeds."""
        translated = store_error(error, what=what)
        complaint = f"{type(error).__name__}: {error}"
        if translated is not error and complaint != self._complaint:
            self._complaint = complaint
            if isinstance(translated, TierFull):
                log.warning("%s", translated)
            else:
                log.error("%s failed", what, exc_info=error)
        return translated

    async def _put(self, writes: list[Write]) -> None:
        """One index transaction; it also saves which versions are used."""

        def put(index: Index) -> int:
            next_version = self._catalog.next_version  # Read here, so that what is saved never goes back.
            index.put_records(writes, next_version)
            return next_version

        self._versions_below = await self.run(put) + VERSION_RESERVE

    def _let_go(self, quarantined: set[Slot]) -> None:
        for slot in self._quarantine & quarantined:
            self._quarantine.discard(slot)
            self._nvme.let_go(slot)


def store_error(error: Exception, *, what: str) -> OocMoeError:
    """What a failure of files or index means to the caller."""
    if isinstance(error, OocMoeError):
        return error
    if is_disk_full(error):
        return TierFull(f"NVMe tier: {what}: the disk is full", retry_after_ms=1000)
    return Internal(f"{what}: {type(error).__name__}: {error}")

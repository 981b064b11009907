"""Carries received pushes to the disk. A DURABLE push is acknowledged after it is committed, and a MEMORY push before it is written.

    DURABLE   submit -> verify, write -> round (commit_rounds.py) -> visible, acknowledged
    MEMORY    submit -> verify -> visible, acknowledged, pinned (write_behind.py) -> write -> round -> an ordinary record

Every change of the index runs under one lock (catalog_lock.py), so that the catalog does not change during a commit round. push.py draws
the states of a push.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from ooc_moe_server.catalog.catalog import Bank, Catalog
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.catalog_lock import CatalogLock
from ooc_moe_server.engine.commit_rounds import CommitRounds
from ooc_moe_server.engine.push import Push, PushState
from ooc_moe_server.engine.slot_writer import SlotWriter
from ooc_moe_server.engine.unsaved_records import UnsavedRecords
from ooc_moe_server.engine.write_behind import WriteBehind
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.index_thread import IndexThread
from ooc_moe_server.nvme.tier import QUOTA_RETRY_MS, NvmeTier
from ooc_moe_server.stats import Stats
from ooc_moe_wire.errors import CorruptRecord, OocMoeError, TierFull

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# The part of the arena that unsaved records may fill: they cannot be evicted, and reads need room. Beyond it, a MEMORY push is acknowledged
# after its commit, as a DURABLE one is.
UNSAVED_SHARE = 1 / 4
DRAIN_TRIES = 3


class Committer:
    """Verifies, writes and commits received pushes. Also lets other code change the index between commits, for example to add a bank."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        index_executor: ThreadPoolExecutor,
        dram: DramTier,
        nvme: NvmeTier,
        stats: Stats,
        *,
        bank_bytes: int | None = None,
    ) -> None:
        """`bank_bytes`: the most bytes that the records of one bank may take; None: no limit."""
        self._dram, self._nvme, self._bank_bytes = dram, nvme, bank_bytes
        self._lock = CatalogLock()
        self._index = IndexThread(catalog, index, index_executor, nvme)
        self._unsaved = UnsavedRecords(int(dram.stats.capacity_bytes * UNSAVED_SHARE))
        self._slots = SlotWriter(self._index, nvme, self._unsaved)
        self._rounds = CommitRounds(self._index, self._lock, self._slots, self._unsaved, dram, nvme, stats)
        self._write_behind = WriteBehind(self._index, self._lock, self._slots, self._rounds, self._unsaved, dram, nvme)
        self._tasks: dict[asyncio.Task[None], Push] = {}

    @property
    def num_in_flight(self) -> int:
        """The number of pushes that were received and have not ended yet: they are not committed, refused or dropped."""
        return len(self._tasks)

    @property
    def unsaved_bytes(self) -> int:
        """The number of bytes that were acknowledged in memory and are not durable yet."""
        return self._unsaved.num_bytes

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Holds the lock for one change of banks or snapshots.

        While the context is open, no push is committed or becomes visible to fetches. When it ends, unsaved records (acknowledged in memory
        only) are dropped if the change replaced them or deleted their bank.
        """
        async with self._lock.change():
            try:
                yield
            finally:
                self._write_behind.drop_replaced()

    async def write_back(self, banks: Collection[Bank] | None = None) -> None:
        """Writes records that are in memory only (unsaved) to the disk, and returns when `banks` (None: all banks) have none left.

        Call `write_back` inside `exclusive`, before the change itself. Commit rounds (group commits of pushes) can run meanwhile.

        Raises:
            TierFull, Internal: a record could not be written; the record stays in memory.
        """
        await self._write_behind.flush(banks)

    async def on_index(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work` with the index on the index's thread, and returns its result. Raises TierFull (disk full) or Internal."""
        return await self._index.run(work)

    def check_quota(self, bank: Bank, expert: int) -> None:
        """Raises TierFull when a push of this expert would make its bank exceed `bank_bytes`. Raises UnknownExpert, UnknownBank."""
        if self._bank_bytes is None or bank.record(expert).is_written:
            return
        others = bank.pushing.keys() - {expert}
        num_coming = sum(not bank.record(pushed).is_written for pushed in others if pushed < bank.num_experts)
        num_records = bank.num_written + num_coming
        if (num_records + 1) * bank.layout.record_bytes > self._bank_bytes:
            raise TierFull(
                f"bank {bank.name!r}: a record of {bank.layout.record_bytes} bytes would exceed bank_bytes={self._bank_bytes}, "
                f"{num_records} records are written; use fewer experts, or start the daemon with a larger --bank-bytes",
                retry_after_ms=QUOTA_RETRY_MS,
            )

    def submit(self, push: Push) -> None:
        """Starts to verify, write and commit a received push, and returns at once. The push goes on even if its sender disconnects.

        `push.outcome` becomes the new version or the error.
        """
        push.bank.pushing[push.expert] = push
        task = asyncio.create_task(self._carry(push))
        self._tasks[task] = push
        task.add_done_callback(self._tasks.pop)

    async def drain(self) -> None:
        """Waits until every push is committed, refused or dropped, before the daemon stops.

        Unsaved records that cannot be written even now are logged, and lost.
        """
        errors: list[OocMoeError] = []
        for _ in range(DRAIN_TRIES):
            while coming := [push.outcome for push in self._tasks.values() if not push.outcome.done()]:
                await asyncio.wait(coming)
            errors = await self._write_behind.try_all()
            if not errors:
                break
        if errors:
            pushes = [unsaved.push for unsaved in self._unsaved]
            lost = ", ".join(f"{push.bank.name!r} expert {push.expert} version {push.version}" for push in pushes)
            log.error("lost: acknowledged in memory, and cannot be written: %s: %s", lost, errors[0])
        self._write_behind.end()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._rounds.finish()

    async def _carry(self, push: Push) -> None:
        """Carries a push from its receipt to its end: committed, refused or dropped."""
        record_bytes = push.bank.layout.record_bytes
        is_behind = push.in_memory and self._unsaved.reserve(record_bytes)
        try:
            if is_behind:
                await self._write_behind.run(push)
            else:
                await self._commit(push)
        except Exception as error:
            if isinstance(error, CorruptRecord):
                self._dram.stats.num_corrupt += 1
            push.refuse(self._index.translated(error, push.name))
        finally:
            if push.slot:
                self._nvme.let_go(push.slot)
            if is_behind:
                self._unsaved.release(record_bytes)
            self._dram.unpin(push.entry)

    async def _commit(self, push: Push) -> None:
        """Writes the record of a push to the disk and commits it, which acknowledges the push. Raises the error that refuses the push."""
        await self._slots.allocate(push)
        push.version = await self._index.take_version()
        push.enter(PushState.WRITING)
        await self._slots.write(push, push.verify_and_pack)
        push.enter(PushState.IN_ROUND)
        await self._rounds.join(push)

"""Write-behind: a push with durability MEMORY is acknowledged at once, and written to the disk afterwards.

    run:  verify, take a slot and a version -> visible, acknowledged -> try to write and commit -> an ordinary record
                                                                           ^        |
                                                                           +--------+  failed: after a delay, or when `flush` asks

Until the commit the record is pinned in DRAM, and a crash loses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace

from ooc_moe_server.catalog.catalog import Bank, Unsaved
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.catalog_lock import CatalogLock
from ooc_moe_server.engine.commit_rounds import CommitRounds
from ooc_moe_server.engine.push import Push, PushState
from ooc_moe_server.engine.slot_writer import SlotWriter
from ooc_moe_server.engine.unsaved_records import UnsavedRecord, UnsavedRecords, new_attempt
from ooc_moe_server.index.index_thread import IndexThread
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_wire.errors import OocMoeError

log = logging.getLogger(__name__)

# Records that are written back at the same time. Few, so that durable pushes find a free thread, and so that a newer push often finds the
# older record not yet written.
WRITE_BACKS_MAX = 2
RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0


class WriteBehind:
    """Acknowledges pushes as soon as they are in memory, and writes their records to the disk afterwards."""

    def __init__(
        self,
        index: IndexThread,
        lock: CatalogLock,
        slots: SlotWriter,
        rounds: CommitRounds,
        unsaved: UnsavedRecords,
        dram: DramTier,
        nvme: NvmeTier,
    ) -> None:
        self._index, self._lock, self._slots, self._rounds, self._unsaved = index, lock, slots, rounds, unsaved
        self._dram, self._nvme = dram, nvme
        self._writes_at_once = asyncio.Semaphore(WRITE_BACKS_MAX)
        self._is_ending = False

    async def run(self, push: Push) -> None:
        """Carries a MEMORY push from its receipt to its end: acknowledges the push, then tries to write its record to the disk until the
        push is committed or dropped.

        Each push needs a task of its own to run this. Raises the error that refuses the push.
        """
        unsaved = await self._acknowledge(push)
        try:
            await self._write_back(unsaved)
        finally:
            if push.state is not PushState.COMMITTED:
                push.enter(PushState.DROPPED)
            unsaved.attempt.set_result(None)

    async def flush(self, banks: Collection[Bank] | None = None) -> None:
        """Writes records that are in memory only (unsaved) to the disk, and returns when `banks` (None: all banks) have none left.

        Call `flush` inside `CatalogLock.change`, before the change itself. The lock is lent to commit rounds (group commits) meanwhile.

        Raises:
            TierFull, Internal: a record could not be written; the record stays in memory.
        """

        def wanted() -> list[UnsavedRecord]:
            return [unsaved for unsaved in self._unsaved if banks is None or unsaved.push.bank in banks]

        if not wanted():
            return
        async with self._lock.lent_to_rounds():
            for is_last in (False, True):  # The first try may have been under way already, and failed for a cause that is gone.
                errors = await _attempts(wanted())
                if errors and is_last:
                    raise errors[0]

    async def try_all(self) -> list[OocMoeError]:
        """Tries once to write and commit each unsaved record. Waits for all tries, and returns the errors of those that failed."""
        return await _attempts(list(self._unsaved))

    def end(self) -> None:
        """Stops writing unsaved records to the disk: tries under way are finished, and failed ones are not repeated."""
        self._is_ending = True
        for unsaved in self._unsaved:
            unsaved.retry_now.set()

    def drop_replaced(self) -> None:
        """Drops the unsaved records that fetches do not get any more. Call this after a change that restored or deleted banks."""
        for unsaved in list(self._unsaved):
            push = unsaved.push
            current = push.bank.records.get(push.expert)
            if not push.bank.deleted and current is not None and current.version == push.version:
                continue
            self._unsaved.pop(push.bank, push.expert)
            if unsaved.indexed.slot:
                self._nvme.let_go(unsaved.indexed.slot)
            self._dram.discard(Unsaved(push.version))
            unsaved.abandon()

    async def _acknowledge(self, push: Push) -> UnsavedRecord:
        """Makes the record of a push visible to fetches before it is written to the disk, and acknowledges the push.

        Takes a slot on the disk first, so that a full disk refuses the push now and not later.
        """
        await self._nvme.prepare(push.verify)
        await self._slots.allocate(push)
        push.version = await self._index.take_version()
        await self._lock.wait_until_unchanging()
        push.bank.check_base(push.expert, push.base_version)
        push.header().pack_into(push.entry.record)
        bank, expert = push.bank, push.expert
        task = asyncio.current_task()
        assert task is not None
        unsaved = UnsavedRecord(push=push, indexed=self._unsaved.indexed(bank, expert), task=task)
        older = self._unsaved.newest(bank, expert)
        replaced = bank.put(expert, replace(push.record(), slot=None, unsaved=True))
        self._unsaved.add(unsaved)
        if older:
            older.abandon()
        self._dram.publish(push.entry, Unsaved(push.version), push.checksums, bank.id, replaces=bank.source(expert, replaced))
        push.enter(PushState.UNSAVED)
        return unsaved

    async def _write_back(self, unsaved: UnsavedRecord) -> None:
        """Tries to write an unsaved record to the disk until it is in the index, was replaced by a newer one, or `end` was called."""
        push, delay_s = unsaved.push, RETRY_S_MIN
        while push in self._unsaved and not self._is_ending:
            error = await self._try_once(push)
            if error is None or push not in self._unsaved:
                return
            push.enter(PushState.UNSAVED)
            attempt, unsaved.attempt = unsaved.attempt, new_attempt()
            attempt.set_result(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await unsaved.retry_now.wait()
            unsaved.retry_now.clear()
            delay_s = min(2 * delay_s, RETRY_S_MAX)

    async def _try_once(self, push: Push) -> OocMoeError | None:
        """Tries once to write the record of a push to its slot and to commit it. Returns the error if that fails."""
        try:
            async with self._writes_at_once:
                push.enter(PushState.WRITING_BACK)
                if push.slot is None:
                    await self._slots.allocate(push)
                await self._slots.write(push)
            push.enter(PushState.SAVING)
            await self._rounds.join(push)
        except Exception as error:
            return self._index.translated(error, "write-back")
        return None


async def _attempts(records: Iterable[UnsavedRecord]) -> list[OocMoeError]:
    """Waits until one try to write each of these records has ended: the try under way, or the next one. Returns their errors."""
    attempts = []
    for unsaved in records:
        unsaved.retry_now.set()
        attempts.append(unsaved.attempt)
    if attempts:
        await asyncio.wait(attempts)
    return [error for attempt in attempts if (error := attempt.result()) is not None]

"""Group commit: one round makes the records of all waiting pushes durable, and puts them into the index in one transaction.

    join -> round:  fdatasync each slab -> one index transaction -> visible, acknowledged
                        |
                        +-- failed: write the records of that slab anew to other slots, then sync again

After a failed fdatasync, any write to the same file that was not durable before may be lost, and no later fdatasync reports it. So every
such record is written anew, to another slot.
"""

from __future__ import annotations

import asyncio
from collections import deque

from ooc_moe_server.catalog.catalog import Unsaved
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.catalog_lock import CatalogLock
from ooc_moe_server.engine.push import Push, PushState
from ooc_moe_server.engine.slot_writer import SlotWriter
from ooc_moe_server.engine.unsaved_records import UnsavedRecords
from ooc_moe_server.index.index_thread import IndexThread
from ooc_moe_server.index.tables import Write
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_server.stats import Stats
from ooc_moe_wire.errors import OocMoeError

ROUND_MAX = 256
# How often a record is written and synced in one round. After that the device is given up on, and the push is refused.
SYNC_TRIES = 3


class CommitRounds:
    """Commits pushes whose records are written, in rounds: a round commits many pushes that wait, in one index transaction.

    The next round begins when the last one has ended.
    """

    def __init__(
        self,
        index: IndexThread,
        lock: CatalogLock,
        slots: SlotWriter,
        unsaved: UnsavedRecords,
        dram: DramTier,
        nvme: NvmeTier,
        stats: Stats,
    ) -> None:
        self._index, self._lock, self._slots, self._unsaved = index, lock, slots, unsaved
        self._dram, self._nvme, self._stats = dram, nvme, stats
        self._waiting: deque[Push] = deque()
        self._results: dict[Push, asyncio.Future[OocMoeError | None]] = {}  # Of the pushes in `join`.
        self._task: asyncio.Task[None] | None = None

    async def join(self, push: Push) -> None:
        """Queues a push to be committed by the next round. Waits until the push is committed, or until a newer push replaced its record.

        The record of the push must have been written to its slot.

        Raises the error if the push is refused.
        """
        result: asyncio.Future[OocMoeError | None] = asyncio.get_running_loop().create_future()
        self._results[push] = result
        self._waiting.append(push)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        if error := await result:
            raise error

    async def finish(self) -> None:
        """Waits until no push waits for a round and the last round has ended."""
        if self._task:
            await self._task

    async def _run(self) -> None:
        while self._waiting:
            async with self._lock.round():
                batch = self._next_batch()
                try:
                    await self._commit(await self._make_durable(batch))
                except Exception as error:
                    for push in batch:
                        self._end_join(push, self._index.translated(error, "commit"))

    def _end_join(self, push: Push, error: OocMoeError | None) -> None:
        """Lets the call of `join` for a push return, or raise `error`. Does nothing if that call has ended already."""
        result = self._results.pop(push, None)
        if result is not None and not result.done():
            result.set_result(error)

    def _next_batch(self) -> list[Push]:
        """Takes the next pushes to commit from those that wait, at most one for each expert."""
        candidates = [self._waiting.popleft() for _ in range(min(len(self._waiting), ROUND_MAX))]
        current = [push for push in candidates if self._is_current(push)]
        # The commit of a durable push replaces the unsaved record of the same expert. Until then, the unsaved record keeps waiting.
        durable = {(push.bank, push.expert) for push in current if not push.is_acknowledged_unsaved}
        batch: list[Push] = []
        for push in current:
            is_postponed = push.is_acknowledged_unsaved and (push.bank, push.expert) in durable
            (self._waiting if is_postponed else batch).append(push)
        return batch

    def _is_current(self, push: Push) -> bool:
        """Whether a push is still to be committed. If not, ends its call of `join`.

        It is not if its bank was restored or deleted, or if a newer push of the expert came.
        """
        if push.is_acknowledged_unsaved:
            if push not in self._unsaved:
                self._end_join(push, None)
            return push in self._unsaved
        try:
            push.bank.check_base(push.expert, push.base_version)
        except OocMoeError as error:
            self._end_join(push, error)
            return False
        return True

    async def _make_durable(self, batch: list[Push]) -> list[Push]:
        """Syncs the slabs of a batch of pushes, and writes their records anew after a failed sync.

        Returns the pushes whose records are durable; `join` raises for the rest.
        """
        durable: list[Push] = []
        failed: dict[int, OSError] = {}
        for _ in range(SYNC_TRIES):
            written = await asyncio.gather(*(self._write_anew_if_doubtful(push) for push in batch))
            batch = [push for push, is_written in zip(batch, written, strict=True) if is_written]
            if not batch:
                break
            failed = await self._nvme.sync([push.slot for push in batch if push.slot])
            for error in failed.values():
                self._index.translated(error, "sync")  # Logs it, once.
            durable += [push for push in batch if push.bank.layout.record_bytes not in failed]
            batch = [push for push in batch if push.bank.layout.record_bytes in failed]
        for push in batch:
            self._slots.condemn(push)
            self._end_join(push, self._index.translated(failed[push.bank.layout.record_bytes], "sync"))
        return durable

    async def _write_anew_if_doubtful(self, push: Push) -> bool:
        """Writes the record of a push to another slot if a sync failed after its last write, so that its bytes may be lost.

        Returns False if that failed; the call of `join` has then ended with the error.
        """
        assert push.slot is not None
        if not self._nvme.is_doubtful(push.slot, push.epoch):
            return True
        self._slots.condemn(push)
        try:
            await self._slots.allocate(push)
            await self._slots.write(push)
        except Exception as error:
            self._end_join(push, self._index.translated(error, push.name))
            return False
        return True

    async def _commit(self, batch: list[Push]) -> None:
        """Commits pushes whose bytes are durable: puts their records into the index in one transaction, and then shows them to fetches."""
        if not batch:
            return
        began = self._stats.clock()
        writes = [Write(bank_id=push.bank.id, expert=push.expert, record=push.record()) for push in batch]
        try:
            await self._index.commit(writes, [push.slot for push in batch if push.slot])
        except Exception as error:
            for push in batch:
                push.slot = None  # The index keeps it in quarantine.
                self._end_join(push, self._index.translated(error, "commit"))
            return
        self._stats.add_latency("commit", began)
        for push in batch:
            if push.is_acknowledged_unsaved:
                self._mark_saved(push)
            else:
                self._show(push)
            push.enter(PushState.COMMITTED)
            self._end_join(push, None)

    def _show(self, push: Push) -> None:
        """Makes the record of a committed durable push visible to fetches, and releases the slot of the record that it replaced."""
        bank, expert = push.bank, push.expert
        older = self._unsaved.pop(bank, expert)
        if older:
            older.abandon()
        replaced = bank.put(expert, push.record())
        assert push.slot is not None
        self._dram.publish(push.entry, push.slot, push.checksums, bank.id, replaces=bank.source(expert, replaced))
        self._slots.hand_over(push, older.indexed if older else replaced)

    def _mark_saved(self, push: Push) -> None:
        """Turns the record of a MEMORY push, which is committed now, from an unsaved into an ordinary record of the same version."""
        bank, expert, record = push.bank, push.expert, push.record()
        newest = self._unsaved.newest(bank, expert)
        assert newest is not None
        if newest.push is not push:  # A newer push was acknowledged during the round.
            replaced, newest.indexed = newest.indexed, record
            self._slots.hand_over(push, replaced)
            return
        self._unsaved.pop(bank, expert)
        bank.put(expert, record)
        self._dram.rename(Unsaved(push.version), self._slots.hand_over(push, newest.indexed))

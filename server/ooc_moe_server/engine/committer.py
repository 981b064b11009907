"""The way of a push to the disk: verified in the arena, written to a free slot, synced, committed in the index, and only then visible.

    DURABLE   submit -> verify, write -> round -> visible, acknowledged
    MEMORY    submit -> verify -> visible, acknowledged, pinned (unsaved.py) -> write -> round -> an ordinary record
    a round   fdatasync -> one index transaction, for all that wait

A failed sync says nothing about what it was asked to make durable, nor about anything else written to that file: all of it is written anew,
elsewhere. Every change of the index runs under this module's locks, so that a round sees a catalog that stands still.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from ooc_moe_server.catalog.catalog import Bank, Catalog, Record, Slot, Unsaved
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.push import Push, check_base, future
from ooc_moe_server.engine.write_behind import UnsavedRecords
from ooc_moe_server.index.database import Index, Write
from ooc_moe_server.index.index_thread import IndexWriter
from ooc_moe_server.nvme.reserve import is_disk_full
from ooc_moe_server.nvme.tier import QUOTA_RETRY_MS, NvmeTier
from ooc_moe_server.stats import Stats
from ooc_moe_wire.errors import CorruptRecord, OocMoeError, TierFull

log = logging.getLogger(__name__)
Result = TypeVar("Result")

ROUND_MAX = 256
# A group whose sync failed is written anew so often in all; then the device is given up on, and the pushes are refused.
SYNC_TRIES = 3
# Of the arena, what may be acknowledged and not yet written: it cannot be evicted, and reads need room. Beyond it, pushes are acknowledged
# after their commit.
UNSAVED_SHARE = 1 / 4
# Written back at the same time: few, so that durable pushes find a thread, and that a newer push finds the older not yet written.
WRITE_BACKS_MAX = 2
RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0
DRAIN_TRIES = 3


class Committer:
    """Takes pushes to the disk in rounds, and lets others change the index between rounds."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        index_thread: ThreadPoolExecutor,
        dram: DramTier,
        nvme: NvmeTier,
        stats: Stats,
        *,
        bank_bytes: int | None = None,
    ) -> None:
        """`bank_bytes`: the most that the records of one bank may take."""
        self._index = IndexWriter(catalog, index, index_thread, nvme)
        self._dram, self._nvme, self._stats, self._bank_bytes = dram, nvme, stats, bank_bytes
        self._lock = asyncio.Lock()  # Held by a round, or by a change, which lends it to rounds while they write back.
        self._lent = False
        self._returned = asyncio.Condition(self._lock)
        self._calm = asyncio.Event()  # No change is under way: records may become visible outside of rounds.
        self._calm.set()
        self._unsaved: UnsavedRecords[Push] = UnsavedRecords(int(dram.stats.capacity_bytes * UNSAVED_SHARE))
        self._behind = asyncio.Semaphore(WRITE_BACKS_MAX)
        self._tasks: dict[asyncio.Task[None], Push] = {}
        self._waiting: deque[Push] = deque()
        self._round: asyncio.Task[None] | None = None
        self._ending = False

    @property
    def num_in_flight(self) -> int:
        """Pushes received and not yet durable."""
        return len(self._tasks)

    @property
    def unsaved_bytes(self) -> int:
        """Acknowledged in memory and not yet durable."""
        return self._unsaved.num_bytes

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """No round runs inside and no push becomes visible; whoever changes banks or snapshots does it here.

        Records may be replaced and banks deleted whatever is unsaved of them: that is dropped at the end.
        """
        async with self._lock:
            await self._returned.wait_for(lambda: not self._lent)
            self._calm.clear()
            try:
                yield
            finally:
                self._drop_replaced()
                self._calm.set()

    async def write_back(self, banks: Collection[Bank] | None = None) -> None:
        """Returns when these banks (None: all) have no unsaved record; called first inside `exclusive`: durable pushes may still land.

        Raises:
            TierFull, Internal: a record could not be written; it stays in memory.
        """
        if not any(banks is None or push.bank in banks for push in self._unsaved):
            return
        self._lent = True
        self._lock.release()
        try:
            for tries_left in (1, 0):  # A try may have been under way, with a cause that is gone.
                errors = await self._tried([push for push in self._unsaved if banks is None or push.bank in banks])
                if errors and not tries_left:
                    raise errors[0]
        finally:
            await self._lock.acquire()
            self._lent = False
            self._returned.notify_all()

    async def on_index(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work` on the index's thread. Raises TierFull (disk full) or Internal."""
        return await self._index.run(work)

    def check_quota(self, bank: Bank, expert: int) -> None:
        """Raises TierFull when one more record is more than a bank may have; UnknownExpert, UnknownBank."""
        if self._bank_bytes is None or bank.record(expert).is_written:
            return
        coming = sum(not bank.record(pushed).is_written for pushed in bank.pushing.keys() - {expert} if pushed < bank.num_experts)
        if (bank.num_written + coming + 1) * bank.layout.record_bytes > self._bank_bytes:
            raise TierFull(
                f"bank {bank.name!r}: bank_bytes: {self._bank_bytes} allow no record of {bank.layout.record_bytes} bytes more, "
                f"{bank.num_written + coming} are written; use fewer experts, or start the daemon with a larger --bank-bytes",
                retry_after_ms=QUOTA_RETRY_MS,
            )

    def submit(self, push: Push) -> None:
        """Takes over a received push, whatever becomes of its sender; its `outcome` tells the end."""
        push.bank.pushing[push.expert] = push
        task = asyncio.create_task(self._carry(push))
        self._tasks[task], push.task = push, task
        task.add_done_callback(self._tasks.pop)

    async def drain(self) -> None:
        """Returns when nothing is on its way and nothing unsaved, or cannot be saved, which is logged: for the end."""
        errors: list[OocMoeError] = []
        for _ in range(DRAIN_TRIES):
            while coming := [push.outcome for push in self._tasks.values() if not push.outcome.done()]:
                await asyncio.wait(coming)
            errors = await self._tried(list(self._unsaved))
            if not errors:
                break
        if errors:
            lost = ", ".join(f"{push.bank.name!r} expert {push.expert} version {push.version}" for push in self._unsaved)
            log.error("lost, acknowledged in memory and not to be written: %s: %s", lost, errors[0])
        self._ending = True
        for push in self._unsaved:
            push.hurry.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._round:
            await self._round

    # One push.

    async def _carry(self, push: Push) -> None:
        """The whole life of a push."""
        record_bytes = push.bank.layout.record_bytes
        push.in_memory = push.in_memory and self._unsaved.reserve(record_bytes)
        try:
            if push.in_memory:
                await self._acknowledge(push)
                await self._write_back(push)
            else:
                push.slot = await self._take_slot(push)
                push.version = await self._index.take_version()
                await self._write(push, push.verify_and_pack)
                await self._join_round(push)
        except Exception as error:
            if isinstance(error, CorruptRecord):
                self._dram.stats.num_corrupt += 1
            assert not push.acknowledged, "a write-back ends by itself"
            self._settle(push, self._index.translated(error, push.name))
        finally:
            if push.slot:
                self._nvme.let_go(push.slot)
            if push.in_memory:
                self._unsaved.release(record_bytes)
            push.tried.set_result(None)
            self._dram.unpin(push.entry)

    async def _acknowledge(self, push: Push) -> None:
        """Makes a push visible before it is written. Its slot is taken first, so that a full disk refuses it now and not later."""
        await self._nvme.prepare(push.verify)
        push.slot = await self._take_slot(push)
        push.version = await self._index.take_version()
        while not self._calm.is_set():
            await self._calm.wait()
        check_base(push.bank, push.expert, push.base_version)
        push.header().pack_into(push.entry.record)
        bank, expert = push.bank, push.expert
        indexed = self._unsaved.indexed(bank, expert)
        older = self._unsaved.newest(bank, expert)
        old = bank.put(expert, replace(push.record(), slot=None, unsaved=True))
        self._unsaved.add(push, indexed)
        if older:
            self._give_up(older)
        self._dram.publish(push.entry, Unsaved(push.version), push.checksums, bank.id, replaces=bank.source(expert, old))
        self._settle(push, push.version)

    async def _write_back(self, push: Push) -> None:
        """Tries until it is in the index, or replaced."""
        delay_s = RETRY_S_MIN
        while push in self._unsaved and not self._ending:
            error = await self._try_to_save(push)
            if error is None or push not in self._unsaved:
                return
            tried, push.tried = push.tried, future()
            tried.set_result(error)
            with suppress(TimeoutError), _waiting(push):
                async with asyncio.timeout(delay_s):
                    await push.hurry.wait()
            push.hurry.clear()
            delay_s = min(2 * delay_s, RETRY_S_MAX)

    async def _try_to_save(self, push: Push) -> OocMoeError | None:
        try:
            with _waiting(push):
                await self._behind.acquire()
            try:
                push.slot = push.slot or await self._take_slot(push)
                await self._write(push, _nothing)
            finally:
                self._behind.release()
            await self._join_round(push)
        except Exception as error:
            return self._index.translated(error, "write-back")
        return None

    def _give_up(self, push: Push) -> None:
        """Ends what carries an unsaved push that is moot: now, or after the step that is under way."""
        assert push.task is not None
        if push.is_waiting:
            push.task.cancel()

    async def _tried(self, pushes: Iterable[Push]) -> list[OocMoeError]:
        """Waits for the end of a try to write each back; returns what failed."""
        futures = []
        for push in pushes:
            push.hurry.set()
            futures.append(push.tried)
        if futures:
            await asyncio.wait(futures)
        return [error for future in futures if (error := future.result()) is not None]

    async def _take_slot(self, push: Push) -> Slot:
        await self._index.clear_quarantine()
        replaced = self._unsaved.indexed(push.bank, push.expert).slot
        return await self._nvme.take(push.bank.layout.record_bytes, replaced=replaced)

    async def _write(self, push: Push, prepare: Callable[[], None]) -> None:
        """Writes to the push's slot. Raises OSError, and the slot is gone then; what `prepare` raises."""
        assert push.slot is not None
        try:
            push.epoch = await self._nvme.write(push.slot, push.entry.record, prepare)
        except OSError as error:
            if not is_disk_full(error):
                self._condemn(push)
            raise

    def _condemn(self, push: Push) -> None:
        assert push.slot is not None
        slot, push.slot = push.slot, None
        self._nvme.condemn(slot)

    def _settle(self, push: Push, outcome: int | OocMoeError) -> None:
        del push.bank.pushing[push.expert]
        push.outcome.set_result(outcome)

    # Rounds.

    async def _join_round(self, push: Push) -> None:
        """Returns when a round has committed a push, or found that nobody needs it any more. Raises what refused it."""
        push.in_round = future()
        self._waiting.append(push)
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._rounds())
        error = await push.in_round
        if error:
            raise error

    async def _rounds(self) -> None:
        while self._waiting:
            async with self._lock:
                batch = self._batch()
                try:
                    await self._commit(await self._make_durable(batch))
                except Exception as error:
                    for push in batch:
                        _answer(push, self._index.translated(error, "commit"))

    def _batch(self) -> list[Push]:
        """Of those that wait, the ones to commit; each expert once."""
        candidates = [self._waiting.popleft() for _ in range(min(len(self._waiting), ROUND_MAX))]
        batch = [push for push in candidates if self._is_current(push)]
        # A durable push over an unsaved one makes it moot when it is committed; until then, the older keeps waiting.
        contested = {(push.bank, push.expert) for push in batch if not push.acknowledged}
        self._waiting.extend(push for push in batch if push.acknowledged and (push.bank, push.expert) in contested)
        return [push for push in batch if not (push.acknowledged and (push.bank, push.expert) in contested)]

    def _is_current(self, push: Push) -> bool:
        """Whether it is still to be committed; it is answered if not (the bank was restored or deleted meanwhile, or a newer push came)."""
        if push.acknowledged:
            if push not in self._unsaved:
                _answer(push, None)
            return push in self._unsaved
        try:
            check_base(push.bank, push.expert, push.base_version)
        except OocMoeError as error:
            _answer(push, error)
            return False
        return True

    async def _make_durable(self, batch: list[Push]) -> list[Push]:
        """Syncs what was written, and writes anew what a failed sync casts doubt on; returns the durable ones, the others are answered."""
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
            self._condemn(push)
            _answer(push, self._index.translated(failed[push.bank.layout.record_bytes], "sync"))
        return durable

    async def _write_anew_if_doubtful(self, push: Push) -> bool:
        """False: that failed, and the push is answered."""
        assert push.slot is not None
        if not self._nvme.is_doubtful(push.slot, push.epoch):
            return True
        self._condemn(push)
        try:
            push.slot = await self._take_slot(push)
            await self._write(push, _nothing)
        except Exception as error:
            _answer(push, self._index.translated(error, push.name))
            return False
        return True

    async def _commit(self, batch: list[Push]) -> None:
        if not batch:
            return
        began = self._stats.clock()
        writes = [Write(bank_id=push.bank.id, expert=push.expert, record=push.record()) for push in batch]
        try:
            await self._index.commit(writes, [push.slot for push in batch if push.slot])
        except Exception as error:
            for push in batch:
                push.slot = None  # In quarantine.
                _answer(push, self._index.translated(error, "commit"))
            return
        self._stats.took("commit", began)
        for push in batch:
            if push.acknowledged:
                self._save(push)
            else:
                self._show(push)
            _answer(push, None)

    def _show(self, push: Push) -> None:
        """Makes a committed push visible, and frees what it replaced."""
        bank, expert = push.bank, push.expert
        if older := self._unsaved.newest(bank, expert):
            self._give_up(older)
        indexed = self._unsaved.pop(bank, expert)
        old = bank.put(expert, push.record())
        assert push.slot is not None
        self._dram.publish(push.entry, push.slot, push.checksums, bank.id, replaces=bank.source(expert, old))
        self._pass_slot_on(push, indexed or old)
        push.durable = True
        self._settle(push, push.version)

    def _save(self, push: Push) -> None:
        """Makes a record that was committed behind its acknowledgement an ordinary one, of the same version."""
        bank, expert, record = push.bank, push.expert, push.record()
        newest = self._unsaved.newest(bank, expert)
        assert newest is not None
        if newest is not push:  # A newer one came meanwhile.
            self._pass_slot_on(push, self._unsaved.set_indexed(newest, record))
            return
        indexed = self._unsaved.pop(bank, expert)
        assert indexed is not None
        bank.put(expert, record)
        self._dram.rename(Unsaved(push.version), self._pass_slot_on(push, indexed))
        push.durable = True

    def _pass_slot_on(self, push: Push, indexed: Record) -> Slot:
        """The push's slot, which a record refers to from now on; frees that of the record it replaced in the index."""
        assert push.slot is not None
        slot, push.slot = push.slot, None
        if indexed.slot:
            self._nvme.let_go(indexed.slot)
        self._nvme.committed(slot)
        return slot

    def _drop_replaced(self) -> None:
        """Forgets the unsaved records that a change of their banks replaced."""
        for push in list(self._unsaved):
            current = push.bank.records.get(push.expert)
            if not push.bank.deleted and current is not None and current.version == push.version:
                continue
            indexed = self._unsaved.pop(push.bank, push.expert)
            if indexed and indexed.slot:
                self._nvme.let_go(indexed.slot)
            self._dram.discard(Unsaved(push.version))
            self._give_up(push)


@contextmanager
def _waiting(push: Push) -> Iterator[None]:
    push.is_waiting = True
    try:
        yield
    finally:
        push.is_waiting = False


def _nothing() -> None:
    """Nothing is to be done before the write."""


def _answer(push: Push, error: OocMoeError | None) -> None:
    if not push.in_round.done():
        push.in_round.set_result(error)

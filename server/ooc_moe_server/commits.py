"""The way of a push to the disk: verified in the arena, written to a free slot, synced, committed in the index, and only then visible.

    submit -> verify -> slot and version -> write   (each push on its own, at once)
           -> round: fdatasync, one index transaction, visible, acknowledged   (all that wait, together)

Every change of the index runs under this module's lock, so that a round sees a catalog that stands still.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ooc_moe_server.catalog import Bank, Catalog, Record, Slot
from ooc_moe_server.dram import DramTier, Entry
from ooc_moe_server.index import VERSION_RESERVE, Index, Write
from ooc_moe_server.nvme import NvmeTier
from ooc_moe_server.stats import Stats
from ooc_moe_wire.codec import Checksums, RecordHeader, verify
from ooc_moe_wire.errors import CorruptRecord, Internal, OocMoeError, StaleVersion, TierFull, UnknownBank

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# Between taking a version and committing it; below the reserve that keeps versions from being used twice.
PUSHES_IN_FLIGHT_MAX = VERSION_RESERVE // 4
ROUND_MAX = 256


@dataclass(slots=True, kw_only=True, eq=False)
class Push:
    """One write on its way. `outcome` becomes the version, or the error that refused it."""

    bank: Bank
    expert: int
    base_version: int
    writer_id: str
    push_number: int
    checksums: Checksums
    entry: Entry  # Filled by the receiver, whose pin passes to `submit`.
    version: int = 0
    slot: Slot | None = None
    outcome: asyncio.Future[int | OocMoeError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def record(self) -> Record:
        """What becomes current."""
        return Record(
            version=self.version, slot=self.slot, checksums=self.checksums, writer_id=self.writer_id, push_number=self.push_number
        )

    def header(self) -> RecordHeader:
        """The header block's content."""
        return RecordHeader(
            bank_id=self.bank.uuid,
            expert=self.expert,
            version=self.version,
            parameter_bytes=self.bank.layout.parameter_bytes,
            optimizer_bytes=self.bank.layout.optimizer_bytes,
            checksums=self.checksums,
            writer_id=self.writer_id,
            push_number=self.push_number,
            base_version=self.base_version,
        )


class Committer:
    """Takes pushes to the disk in rounds, and lets others change the index between rounds."""

    def __init__(self, catalog: Catalog, index: Index, index_thread: ThreadPoolExecutor, dram: DramTier, nvme: NvmeTier, stats: Stats):
        self._catalog, self._index, self._index_thread = catalog, index, index_thread
        self._dram, self._nvme, self._stats = dram, nvme, stats
        self._lock = asyncio.Lock()
        self._in_flight = asyncio.Semaphore(PUSHES_IN_FLIGHT_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: list[Push] = []
        self._round: asyncio.Task[None] | None = None
        # Slots of failed rounds: an index commit that failed may still be found after a crash, until a later one went over it.
        self._quarantine: list[Slot] = []

    @property
    def num_in_flight(self) -> int:
        """Pushes received and not yet durable."""
        return len(self._tasks)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """No round runs inside; whoever changes banks or snapshots does it here."""
        async with self._lock:
            yield

    async def on_index(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work` on the index's thread. Raises TierFull (disk full) or Internal."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._index_thread, work, self._index)
        except (OSError, sqlite3.Error) as error:
            raise store_error(error, what="index") from error

    def submit(self, push: Push) -> None:
        """Takes over a received push, whatever becomes of its sender; its `outcome` tells the end."""
        push.bank.pushing[push.expert] = push
        task = asyncio.create_task(self._take_to_disk(push))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Returns when nothing is on its way."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._round:
            await self._round

    async def _take_to_disk(self, push: Push) -> None:
        what = f"bank {push.bank.name!r}, expert {push.expert}, push {push.push_number}"
        async with self._in_flight:
            try:
                await self._write(push, what)
            except Exception as error:
                self._refuse(push, store_error(error, what=what))
                return
            self._waiting.append(push)
            if self._round is None or self._round.done():
                self._round = asyncio.create_task(self._rounds())
            await push.outcome

    async def _write(self, push: Push, what: str) -> None:
        layout, entry = push.bank.layout, push.entry
        try:
            await self._nvme.run(lambda: verify(layout, entry.body, push.checksums, what=what))
        except CorruptRecord:
            self._dram.stats.num_corrupt += 1
            raise
        push.slot = await self._nvme.take(layout.record_bytes)
        push.version = self._catalog.take_version()
        push.header().pack_into(entry.record)
        await self._nvme.write(push.slot, entry.record)

    async def _rounds(self) -> None:
        while self._waiting:
            async with self._lock:
                batch, self._waiting = self._waiting[:ROUND_MAX], self._waiting[ROUND_MAX:]
                await self._commit([push for push in batch if self._is_current(push)])

    def _is_current(self, push: Push) -> bool:
        """Whether its base is still current; it is refused if not (the bank was restored or deleted meanwhile)."""
        try:
            current = push.bank.record(push.expert).version
            if current != push.base_version:
                raise stale(push.bank, push.expert, push.base_version, current)
        except (StaleVersion, UnknownBank) as error:
            self._refuse(push, error)
            return False
        return True

    async def _commit(self, batch: list[Push]) -> None:
        began = self._stats.clock()
        writes = [Write(bank_id=push.bank.id, expert=push.expert, record=push.record()) for push in batch]
        try:
            await self._nvme.sync([push.slot for push in batch if push.slot])
            await self.on_index(lambda index: index.put_records(writes, self._catalog.next_version))
        except Exception as error:
            for push in batch:
                self._refuse(push, store_error(error, what="commit"))
            return
        self._stats.took("commit", began)
        for push in batch:
            self._show(push)
        while self._quarantine:
            self._nvme.let_go(self._quarantine.pop())

    def _show(self, push: Push) -> None:
        """Makes a committed push visible, and frees what it replaced."""
        bank, expert = push.bank, push.expert
        old = bank.put(expert, push.record())
        self._dram.discard(bank.source(expert, old))
        if old.slot:
            self._nvme.let_go(old.slot)
        assert push.slot is not None
        self._dram.publish(push.entry, push.slot, push.checksums, bank.id)
        self._dram.unpin(push.entry)
        self._settle(push, push.version)

    def _refuse(self, push: Push, error: OocMoeError) -> None:
        self._dram.unpin(push.entry)
        if push.slot:
            self._quarantine.append(push.slot)
        self._settle(push, error)

    def _settle(self, push: Push, outcome: int | OocMoeError) -> None:
        del push.bank.pushing[push.expert]
        push.outcome.set_result(outcome)


def stale(bank: Bank, expert: int, base: int, current: int) -> StaleVersion:
    """The error of an update that started from another version."""
    return StaleVersion(f"expert {expert} of bank {bank.name!r}: base_version {base} is not the current version {current}")


def store_error(error: Exception, *, what: str) -> OocMoeError:
    """What a failure of files or index means to the caller; the log has what we did not expect."""
    if isinstance(error, OocMoeError):
        return error
    disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if disk_full or (isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL):
        log.warning("%s: the disk is full", what)
        return TierFull(f"NVMe tier: {what}: the disk is full", retry_after_ms=1000)
    log.error("%s failed", what, exc_info=error)
    return Internal(f"{what}: {type(error).__name__}: {error}")

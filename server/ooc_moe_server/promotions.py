"""Bringing records into DRAM, from NVMe or from the seed: demand before prefetch, each record once however many wait for it.

    demand queue ------\\
                         -> at most READS_MAX at a time -> DRAM
    speculation queue --/   (only while no demand waits)

Event loop only; the bytes move in the I/O threads. Knows nothing of calls and streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from ooc_moe_server.catalog import Bank, Record, Slot, Source
from ooc_moe_server.dram import DramTier, Entry
from ooc_moe_server.nvme import NvmeTier
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.codec import Checksums, verify
from ooc_moe_wire.errors import CorruptRecord, OocMoeError, TierFull

log = logging.getLogger(__name__)

READS_MAX = 4
SPECULATIVE_READS_MAX = 2
PREFETCH_QUEUE_MAX = 4096


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One record to bring. Held for its waiters, for a prefetch, or both."""

    source: Source
    bank: Bank
    expert: int
    checksums: Checksums | None  # Of the index row; None for a seeded value.
    waiters: list[asyncio.Future[Entry]] = field(default_factory=list)
    prefetch: Scopes | None = None  # Who asked for the prefetch.
    deadline: float | None = None  # Of the prefetch, by the clock of the stats.

    @property
    def is_awaited(self) -> bool:
        """Whether anyone still waits for it."""
        return any(not waiter.done() for waiter in self.waiters)


class Promotions:
    """The queues and the reads under way."""

    def __init__(self, dram: DramTier, nvme: NvmeTier, stats: Stats, *, patience_s: float) -> None:
        """`patience_s`: how long a demand waits for pins to go before it is refused with TierFull."""
        self._dram, self._nvme, self._stats, self._patience_s = dram, nvme, stats, patience_s
        self._jobs: dict[Source, Job] = {}  # Queued and under way.
        self._demand: OrderedDict[Source, Job] = OrderedDict()
        self._speculation: OrderedDict[Source, Job] = OrderedDict()
        self._running: dict[asyncio.Task[None], bool] = {}  # Whether it began as speculation.

    @property
    def num_demand(self) -> int:
        """Demand reads queued or under way."""
        return sum(job.is_awaited for job in self._jobs.values())

    @property
    def num_prefetch(self) -> int:
        """Prefetch reads queued or under way."""
        return len(self._jobs) - self.num_demand

    async def bring(self, bank: Bank, expert: int, record: Record, *, urgent: bool) -> Entry:
        """The record's entry, pinned for the caller, once it is there.

        Raises:
            CorruptRecord: what was read is not what was written. TierFull: pins left no room for too long.
        """
        job = self._job(bank, expert, record)
        if urgent and job.source in self._speculation:
            self._demand[job.source] = self._speculation.pop(job.source)
        elif job.source not in self._jobs:
            self._enqueue(job, self._demand if urgent else self._speculation)
        waiter: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        job.waiters.append(waiter)
        self._pump()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._dram.unpin(waiter.result())  # It came in the moment the caller left.
            raise

    def prefetch(self, bank: Bank, expert: int, record: Record, scopes: Scopes, deadline: float | None) -> bool:
        """Queues a promotion; True also when it is on its way already, False when the queue is full."""
        job = self._job(bank, expert, record)
        if job.source in self._jobs:
            return True
        if len(self._speculation) >= PREFETCH_QUEUE_MAX:
            return False
        job.prefetch, job.deadline = scopes, deadline
        self._enqueue(job, self._speculation)
        self._pump()
        return True

    def cancel(self, bank: Bank, experts: Collection[int]) -> int:
        """Drops queued promotions that nobody waits for, all of the bank's when `experts` is empty; returns how many."""
        wanted = [
            job for job in self._speculation.values() if job.bank is bank and not job.is_awaited and (not experts or job.expert in experts)
        ]
        for job in wanted:
            self._abandon(job)
        return len(wanted)

    async def drain(self) -> None:
        """Drops the queued speculation and returns when nothing is under way."""
        for job in list(self._speculation.values()):
            self._abandon(job)
        while self._running:
            await asyncio.wait(self._running)

    def _job(self, bank: Bank, expert: int, record: Record) -> Job:
        source = bank.source(expert, record)
        return self._jobs.get(source) or Job(source=source, bank=bank, expert=expert, checksums=record.checksums)

    def _enqueue(self, job: Job, queue: OrderedDict[Source, Job]) -> None:
        self._jobs[job.source] = job
        queue[job.source] = job
        if isinstance(job.source, Slot):
            self._nvme.hold(job.source)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.source]
        if isinstance(job.source, Slot):
            self._nvme.let_go(job.source)

    def _abandon(self, job: Job) -> None:
        """Drops a job that waits in the speculation queue."""
        del self._speculation[job.source]
        self._forget(job)
        if job.prefetch:
            job.prefetch.count("prefetch_cancelled")

    def _pump(self) -> None:
        """Starts what may start."""
        while len(self._running) < READS_MAX:
            if self._demand:
                _, job = self._demand.popitem(last=False)
                speculative = False
            elif self._speculation and sum(self._running.values()) < SPECULATIVE_READS_MAX:
                job = next(iter(self._speculation.values()))
                if self._is_too_late(job):
                    self._abandon(job)
                    continue
                del self._speculation[job.source]
                speculative = True
            else:
                return
            task = asyncio.create_task(self._run(job))
            self._running[task] = speculative
            task.add_done_callback(self._ended)

    def _is_too_late(self, job: Job) -> bool:
        """Nobody waits, and the prefetch's deadline has passed or there is none to make it for."""
        return not job.is_awaited and (job.prefetch is None or (job.deadline is not None and self._stats.clock() > job.deadline))

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._pump()

    async def _run(self, job: Job) -> None:
        try:
            if job.is_awaited or job.prefetch:
                self._deliver(job, await self._fill(job))
        except OocMoeError as error:
            self._fail(job, error)
        except Exception as error:
            log.exception("bank %r, expert %d: not brought to DRAM", job.bank.name, job.expert)
            self._fail(job, error)
        finally:
            self._forget(job)

    async def _fill(self, job: Job) -> Entry:
        """A staging entry that holds the record."""
        patience_s = self._patience_s if job.is_awaited else 0.0
        entry = await self._dram.reserve_soon(job.bank.layout.record_bytes, patience_s)
        try:
            if isinstance(job.source, Slot):
                await self._read(job, job.source, entry)
            else:
                entry.checksums = await self._nvme.run(lambda: _materialise(job, entry))
        except BaseException:
            self._dram.unpin(entry)
            raise
        return entry

    async def _read(self, job: Job, slot: Slot, entry: Entry) -> None:
        began = self._stats.clock()
        layout, expected = job.bank.layout, job.checksums
        assert expected is not None
        what = f"bank {job.bank.name!r}, expert {job.expert}"
        try:
            await self._nvme.read(slot, entry.record, lambda: verify(layout, entry.body, expected, what=what))
        except (OSError, CorruptRecord) as error:
            self._nvme.num_corrupt += 1
            log.error("%s in slot %d of slab %d is damaged: %s", what, slot.index, slot.record_bytes, error)
            raise CorruptRecord(str(error) if isinstance(error, CorruptRecord) else f"{what}: cannot be read: {error}") from error
        entry.checksums = expected
        self._stats.took("nvme_read", began)

    def _deliver(self, job: Job, entry: Entry) -> None:
        assert entry.checksums is not None
        self._dram.publish(entry, job.source, entry.checksums, job.bank.id)
        for waiter in job.waiters:
            if not waiter.done():
                self._dram.pin(entry)
                waiter.set_result(entry)
        if job.prefetch and not job.waiters:
            scopes = job.prefetch
            scopes.count("prefetch_promoted")
            entry.wasted = lambda: scopes.count("prefetch_wasted")
        self._dram.unpin(entry)

    def _fail(self, job: Job, error: Exception) -> None:
        for waiter in job.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        if job.prefetch and isinstance(error, TierFull):
            job.prefetch.count("prefetch_rejected")


def _materialise(job: Job, entry: Entry) -> Checksums:
    """Writes the seeded value."""
    layout = job.bank.layout
    layout.initialize(entry.body, seed=job.bank.spec.seed, expert=job.expert)
    return Checksums.of(layout, entry.body)

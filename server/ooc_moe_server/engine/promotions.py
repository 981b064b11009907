"""Bringing records into DRAM, from NVMe or from the seed: demand before speculation, each record once however many wait for it.

    demand queue ------------\\
                               -> I/O threads -> DRAM
    speculation, by priority -/

Demand reads start at once, at most READS_MAX of them: speculation under way takes none of their places. Speculation starts only while no
demand waits, in the places that demand leaves, and never waits for room. Both queues are bounded.

Event loop only; the bytes move in the I/O threads. Knows nothing of calls and streams.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ooc_moe_server.catalog.catalog import Bank, Record, Slot, Source
from ooc_moe_server.dram.tier import DramTier, Entry
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.codec import Checksums, verify
from ooc_moe_wire.errors import CorruptRecord, OocMoeError, TierFull

log = logging.getLogger(__name__)

READS_MAX = 4
SPECULATIVE_READS_MAX = 2
# Callers that wait for a record, and prefetches that wait for their turn.
WAITERS_MAX = 8192
PREFETCH_QUEUE_MAX = 4096
RETRY_AFTER_MS = 100


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One record to bring. Held for its waiters, for a prefetch, or both."""

    source: Source
    bank: Bank
    expert: int
    checksums: Checksums | None  # Of the index row; None for a seeded value.
    waiters: list[asyncio.Future[Entry]] = field(default_factory=list)
    urgent: bool = False  # A demand waits, or waited, for it.
    prefetch: Scopes | None = None  # Who asked for the prefetch.
    priority: int = 0
    deadline: float = math.inf  # Of the prefetch, by the clock of the stats.

    @property
    def is_awaited(self) -> bool:
        """Whether anyone still waits for it."""
        return any(not waiter.done() for waiter in self.waiters)

    @property
    def is_outdated(self) -> bool:
        """Whether the expert has another record by now."""
        bank = self.bank
        return bank.deleted or self.expert >= bank.num_experts or bank.source(self.expert, bank.record(self.expert)) != self.source


class Speculation:
    """Jobs by priority, the higher first, and among equals the earlier."""

    def __init__(self) -> None:
        self._jobs: dict[int, OrderedDict[Source, Job]] = {}  # By priority; none is empty.
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Job]:
        for priority in sorted(self._jobs, reverse=True):
            yield from self._jobs[priority].values()

    def __contains__(self, job: Job) -> bool:
        return job.source in self._jobs.get(job.priority, ())

    def add(self, job: Job) -> None:
        """Goes to the end of its priority."""
        self._jobs.setdefault(job.priority, OrderedDict())[job.source] = job
        self._length += 1

    def remove(self, job: Job) -> None:
        """Leaves from wherever it stands."""
        equals = self._jobs[job.priority]
        del equals[job.source]
        if not equals:
            del self._jobs[job.priority]
        self._length -= 1

    def first(self) -> Job:
        """The next to be served."""
        return next(iter(self._jobs[max(self._jobs)].values()))


class Promotions:
    """The queues and the reads under way."""

    def __init__(self, dram: DramTier, nvme: NvmeTier, stats: Stats, *, patience_s: float) -> None:
        """`patience_s`: how long a demand waits for pins to go before it is refused with TierFull."""
        self._dram, self._nvme, self._stats, self._patience_s = dram, nvme, stats, patience_s
        self._jobs: dict[Source, Job] = {}  # Queued and under way.
        self._demand: OrderedDict[Source, Job] = OrderedDict()
        self._speculation = Speculation()
        self._demand_reads: set[asyncio.Task[None]] = set()  # Under way.
        self._speculative_reads: set[asyncio.Task[None]] = set()
        self._num_waiters = 0
        self._first_deadline = math.inf  # No prefetch in the queue is too late before it.
        self.num_demand = 0  # Jobs that a demand waits, or waited, for; queued or under way.

    @property
    def num_prefetch(self) -> int:
        """Other jobs queued or under way."""
        return len(self._jobs) - self.num_demand

    async def bring(self, bank: Bank, expert: int, record: Record, *, urgent: bool) -> Entry:
        """The record's entry, pinned for the caller, once it is there.

        Raises:
            CorruptRecord: what was read is not what was written.
            TierFull: pins left no room for too long; or too many wait already. For speculation also: there is no room that it may take.
        """
        if self._num_waiters >= WAITERS_MAX:
            raise TierFull(f"DRAM tier: {self._num_waiters} reads wait already", retry_after_ms=RETRY_AFTER_MS)
        job = self._job(bank, expert, record)
        if urgent:
            self._demand_now(job)
        elif job.source not in self._jobs:
            self._admit(job)
            self._speculation.add(job)
        waiter: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        job.waiters.append(waiter)
        self._num_waiters += 1
        self._pump()
        try:
            entry = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._dram.unpin(waiter.result())  # It came in the moment the caller left.
            raise
        finally:
            self._num_waiters -= 1
        self._dram.asked(entry, demand=urgent)
        return entry

    def prefetch(self, bank: Bank, expert: int, record: Record, scopes: Scopes, deadline: float | None, priority: int = 0) -> bool:
        """Queues a promotion; False when the queue is full.

        True also when it is on its way already: the higher of both priorities and the later of both deadlines count then.
        """
        job = self._job(bank, expert, record)
        deadline = math.inf if deadline is None else deadline
        if job.source not in self._jobs:
            if not self._has_place():
                return False
            job.prefetch, job.deadline, job.priority = scopes, deadline, priority
            self._admit(job)
            self._speculation.add(job)
        else:
            job.deadline = deadline if job.prefetch is None else max(job.deadline, deadline)
            job.prefetch = job.prefetch or scopes
            if job in self._speculation and priority > job.priority:
                self._speculation.remove(job)
                job.priority = priority
                self._speculation.add(job)
        self._first_deadline = min(self._first_deadline, job.deadline)
        self._pump()
        return True

    def cancel(self, bank: Bank, experts: Iterable[int]) -> int:
        """Drops queued promotions that nobody waits for, all of the bank's when `experts` is empty; returns how many."""
        wanted = set(experts)
        jobs = [job for job in self._speculation if job.bank is bank and (not wanted or job.expert in wanted) and not job.is_awaited]
        for job in jobs:
            self._abandon(job)
        return len(jobs)

    async def drain(self) -> None:
        """Drops the queued speculation that nobody waits for, and returns when nothing is under way."""
        for job in [job for job in self._speculation if not job.is_awaited]:
            self._abandon(job)
        while reads := self._demand_reads | self._speculative_reads:
            await asyncio.wait(reads)

    def _job(self, bank: Bank, expert: int, record: Record) -> Job:
        source = bank.source(expert, record)
        return self._jobs.get(source) or Job(source=source, bank=bank, expert=expert, checksums=record.checksums)

    def _admit(self, job: Job) -> None:
        self._jobs[job.source] = job
        if isinstance(job.source, Slot):
            self._nvme.hold(job.source)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.source]
        self.num_demand -= job.urgent
        if isinstance(job.source, Slot):
            self._nvme.let_go(job.source)

    def _demand_now(self, job: Job) -> None:
        """Puts a new job, or one that waits among the speculation, into the demand queue. One under way goes on, as a demand."""
        if job.source not in self._jobs:
            self._admit(job)
            self._demand[job.source] = job
        elif job in self._speculation:
            self._speculation.remove(job)
            self._demand[job.source] = job
        self.num_demand += not job.urgent
        job.urgent = True

    def _has_place(self) -> bool:
        """Whether one more prefetch may wait; those that are too late make place."""
        if len(self._speculation) >= PREFETCH_QUEUE_MAX and self._stats.clock() > self._first_deadline:
            for job in [job for job in self._speculation if self._is_moot(job)]:
                self._abandon(job)
            self._first_deadline = min((job.deadline for job in self._speculation), default=math.inf)
        return len(self._speculation) < PREFETCH_QUEUE_MAX

    def _abandon(self, job: Job) -> None:
        """Drops a job that waits among the speculation."""
        self._speculation.remove(job)
        self._forget(job)
        if job.prefetch:
            job.prefetch.count("prefetch_cancelled")

    def _pump(self) -> None:
        """Starts what may start."""
        while self._demand and len(self._demand_reads) < READS_MAX:
            self._start(self._demand.popitem(last=False)[1], self._demand_reads)
        while self._speculation and self._may_speculate():
            job = self._speculation.first()
            if self._is_moot(job):
                self._abandon(job)
                continue
            self._speculation.remove(job)
            self._start(job, self._speculative_reads)

    def _may_speculate(self) -> bool:
        num_free = READS_MAX - len(self._demand_reads) - len(self._speculative_reads)  # None while a demand waits.
        return num_free > 0 and len(self._speculative_reads) < SPECULATIVE_READS_MAX

    def _is_moot(self, job: Job) -> bool:
        """Nobody waits for it, and there is no prefetch to make it for (any more)."""
        return not job.is_awaited and (job.prefetch is None or self._stats.clock() > job.deadline or job.is_outdated)

    def _start(self, job: Job, reads: set[asyncio.Task[None]]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            reads.discard(task)
            self._pump()

        task = asyncio.create_task(self._run(job))
        reads.add(task)
        task.add_done_callback(ended)

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
        num_bytes = job.bank.layout.record_bytes
        if job.urgent:
            entry = await self._dram.reserve_soon(num_bytes, self._patience_s if job.is_awaited else 0.0)
        else:
            entry = self._dram.reserve(num_bytes, speculative=True)
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
        waiters = [waiter for waiter in job.waiters if not waiter.done()]
        scopes = None if waiters else job.prefetch
        if scopes is not None:
            scopes.count("prefetch_promoted")
        if not waiters and job.is_outdated:
            if scopes is not None:
                scopes.count("prefetch_wasted")
        else:
            wasted = None if scopes is None else partial(scopes.count, "prefetch_wasted")
            self._dram.publish(entry, job.source, entry.checksums, job.bank.id, wasted=wasted)
        for waiter in waiters:
            self._dram.pin(entry)
            waiter.set_result(entry)
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

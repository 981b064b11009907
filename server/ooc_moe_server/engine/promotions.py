"""Promotions: records are read from NVMe, or made from the seed, into DRAM. A record is read once, however many callers wait for it.

    demand queue ------------------\\
                                     -> I/O threads -> DRAM
    speculation queue, by priority -/

A demand is a fetch whose caller waits for the record now; speculation is a prefetch, or a fetch that is not urgent.

- Up to READS_MAX demands are read at once. Speculative reads do not count towards this limit, so they never delay the start of a demand.
- Speculation starts only while fewer than READS_MAX reads run (demands and speculation), and at most SPECULATIVE_READS_MAX
  speculative ones. Speculation never waits for room in DRAM: without room it fails.
- Each of the two queues has a maximal length.

To be used on the event loop only; the bytes move in the I/O threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
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
# Bounds of the queues: callers that wait for a record, and queued prefetches.
WAITERS_MAX = 8192
PREFETCH_QUEUE_MAX = 4096
RETRY_AFTER_MS = 100


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """The loading (promotion) of one record into DRAM, queued or under way: for callers who wait for the record, for a prefetch, or for
    callers and a prefetch.
    """

    source: Source
    bank: Bank
    expert: int
    checksums: Checksums | None  # From the index; None for a seeded value.
    waiters: list[asyncio.Future[Entry]] = field(default_factory=list)
    urgent: bool = False  # A demand waits for it, or has waited.
    prefetch: Scopes | None = None  # The counters of the caller who asked for a prefetch; None: no prefetch.
    priority: int = 0
    deadline: float = math.inf  # The deadline of the prefetch, by the clock of the stats.

    @property
    def is_awaited(self) -> bool:
        """Whether any caller still waits for the record."""
        return any(not waiter.done() for waiter in self.waiters)

    @property
    def is_outdated(self) -> bool:
        """Whether the record is no longer the current one of its expert, or the expert does not exist any more."""
        bank = self.bank
        return bank.deleted or self.expert >= bank.num_experts or bank.source(self.expert, bank.record(self.expert)) != self.source


class Speculation:
    """The queue of promotions that no caller urgently waits for. The highest priority comes first, and among equals the earliest job."""

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
        """Appends a job (the loading of one record) behind the jobs of the same priority."""
        self._jobs.setdefault(job.priority, OrderedDict())[job.source] = job
        self._length += 1

    def remove(self, job: Job) -> None:
        """Removes a job (the loading of one record) from the queue, wherever the job stands."""
        equals = self._jobs[job.priority]
        del equals[job.source]
        if not equals:
            del self._jobs[job.priority]
        self._length -= 1

    def first(self) -> Job:
        """Returns the job to start next. The queue must not be empty."""
        return next(iter(self._jobs[max(self._jobs)].values()))


class Promotions:
    """Loads records into DRAM (promotes them), from NVMe or from the bank's seed: queues the requests, and runs a few reads at a time."""

    def __init__(self, dram: DramTier, nvme: NvmeTier, stats: Stats, *, patience_s: float) -> None:
        """`patience_s`: how long a demand waits for room in DRAM (for pins to be released) before it gets TierFull."""
        self._dram, self._nvme, self._stats, self._patience_s = dram, nvme, stats, patience_s
        self._jobs: dict[Source, Job] = {}  # Queued and under way.
        self._demand: OrderedDict[Source, Job] = OrderedDict()
        self._speculation = Speculation()
        self._demand_reads: set[asyncio.Task[None]] = set()  # Under way.
        self._speculative_reads: set[asyncio.Task[None]] = set()
        self._num_waiters = 0
        self._first_deadline = math.inf  # No queued prefetch has an earlier deadline.
        self.num_demand = 0  # Urgent jobs, queued or under way.

    @property
    def num_prefetch(self) -> int:
        """The number of promotions, queued or under way, that no caller waits for urgently: prefetches and fetches that are not urgent."""
        return len(self._jobs) - self.num_demand

    async def promote(self, bank: Bank, expert: int, record: Record, *, urgent: bool) -> Entry:
        """Loads a record into DRAM unless it is being loaded already, waits for it, and returns its entry, pinned for the caller.

        `urgent`: the caller waits for the record now (a demand). If False, the promotion waits in the speculation queue.

        Raises:
            CorruptRecord: the record is damaged or cannot be read.
            TierFull: pinned records left no room for too long, or too many callers wait already. Without `urgent`: there is no room now
                that speculation may use.
        """
        if self._num_waiters >= WAITERS_MAX:
            raise TierFull(f"DRAM tier: {self._num_waiters} reads wait already", retry_after_ms=RETRY_AFTER_MS)
        job = self._job(bank, expert, record)
        if urgent:
            self._demand_now(job)
        elif job.source not in self._jobs:
            self._queue_speculation(job)
        waiter: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        job.waiters.append(waiter)
        self._num_waiters += 1
        self._start_reads()
        try:
            entry = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._dram.unpin(waiter.result())  # The record arrived when the caller had just been cancelled.
            raise
        finally:
            self._num_waiters -= 1
        self._dram.note_request(entry, demand=urgent)
        return entry

    def prefetch(self, bank: Bank, expert: int, record: Record, scopes: Scopes, deadline: float | None, priority: int = 0) -> bool:
        """Queues the promotion of a record to DRAM without waiting for it. Returns False when the queue is full.

        `scopes`: the counters of the caller. `deadline`: a prefetch that has not started by then is dropped. A record that is queued or
        under way already is not queued twice: its job (the queued loading) gets the higher of the old and the new priority, and the later
        of the old and the new deadline.
        """
        job = self._job(bank, expert, record)
        deadline = math.inf if deadline is None else deadline
        if job.source not in self._jobs:
            if not self._has_place():
                return False
            job.prefetch, job.deadline, job.priority = scopes, deadline, priority
            self._queue_speculation(job)
        else:
            job.deadline = deadline if job.prefetch is None else max(job.deadline, deadline)
            job.prefetch = job.prefetch or scopes
            if job in self._speculation and priority > job.priority:
                self._speculation.remove(job)
                job.priority = priority
                self._speculation.add(job)
        self._first_deadline = min(self._first_deadline, job.deadline)
        self._start_reads()
        return True

    def cancel(self, bank: Bank, experts: Iterable[int]) -> int:
        """Cancels queued promotions (loads into DRAM) that no caller waits for: of these experts, or of the whole bank when `experts` is
        empty.

        Returns:
            How many promotions were cancelled.
        """
        wanted = set(experts)
        return self._abandon_all(lambda job: job.bank is bank and (not wanted or job.expert in wanted) and not job.is_awaited)

    async def drain(self) -> None:
        """Cancels the queued promotions that no caller waits for, and waits until no read is under way."""
        self._abandon_all(lambda job: not job.is_awaited)
        while reads := self._demand_reads | self._speculative_reads:
            await asyncio.wait(reads)

    def _job(self, bank: Bank, expert: int, record: Record) -> Job:
        source = bank.source(expert, record)
        return self._jobs.get(source) or Job(source=source, bank=bank, expert=expert, checksums=record.checksums)

    def _queue_speculation(self, job: Job) -> None:
        """Adds a new job to the speculation queue."""
        self._admit(job)
        self._speculation.add(job)

    def _admit(self, job: Job) -> None:
        """Registers a new job, and adds a reference to its slot so that the record stays readable."""
        self._jobs[job.source] = job
        if isinstance(job.source, Slot):
            self._nvme.hold(job.source)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.source]
        self.num_demand -= job.urgent
        if isinstance(job.source, Slot):
            self._nvme.let_go(job.source)

    def _demand_now(self, job: Job) -> None:
        """Makes a job urgent: moves it to the demand queue, unless it is being read already."""
        if job.source not in self._jobs:
            self._admit(job)
            self._demand[job.source] = job
        elif job in self._speculation:
            self._speculation.remove(job)
            self._demand[job.source] = job
        self.num_demand += not job.urgent
        job.urgent = True

    def _has_place(self) -> bool:
        """Whether the speculation queue has room for one more prefetch.

        A full queue first drops the prefetches whose deadline has passed.
        """
        if len(self._speculation) >= PREFETCH_QUEUE_MAX and self._stats.clock() > self._first_deadline:
            self._abandon_all(self._is_needless)
            self._first_deadline = min((job.deadline for job in self._speculation), default=math.inf)
        return len(self._speculation) < PREFETCH_QUEUE_MAX

    def _abandon_all(self, condition: Callable[[Job], bool]) -> int:
        """Drops the jobs of the speculation queue that meet a condition. Returns how many were dropped."""
        jobs = [job for job in self._speculation if condition(job)]
        for job in jobs:
            self._abandon(job)
        return len(jobs)

    def _abandon(self, job: Job) -> None:
        """Drops a job of the speculation queue, and counts its prefetch as cancelled."""
        self._speculation.remove(job)
        self._forget(job)
        if job.prefetch:
            job.prefetch.count("prefetch_cancelled")

    def _start_reads(self) -> None:
        """Starts the queued jobs that may start now: demands first, then speculation (the module docstring has the limits)."""
        while self._demand and len(self._demand_reads) < READS_MAX:
            self._start(self._demand.popitem(last=False)[1], self._demand_reads)
        while self._speculation and self._may_speculate():
            job = self._speculation.first()
            if self._is_needless(job):
                self._abandon(job)
                continue
            self._speculation.remove(job)
            self._start(job, self._speculative_reads)

    def _may_speculate(self) -> bool:
        num_free = READS_MAX - len(self._demand_reads) - len(self._speculative_reads)  # 0 while a demand waits.
        return num_free > 0 and len(self._speculative_reads) < SPECULATIVE_READS_MAX

    def _is_needless(self, job: Job) -> bool:
        """Whether a job has no purpose any more: no caller waits for its record, and no prefetch wants it.

        No prefetch wants it if none was asked for, if its deadline has passed, or if the record is outdated.
        """
        return not job.is_awaited and (job.prefetch is None or self._stats.clock() > job.deadline or job.is_outdated)

    def _start(self, job: Job, reads: set[asyncio.Task[None]]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            reads.discard(task)
            self._start_reads()

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
            log.exception("bank %r, expert %d: the promotion failed", job.bank.name, job.expert)
            self._fail(job, error)
        finally:
            self._forget(job)

    async def _fill(self, job: Job) -> Entry:
        """Reserves room in DRAM for the record of a job, and reads or computes the record into it. Returns its staging entry."""
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
        """Reads the record of a job from its slot into an entry, and verifies it. Raises CorruptRecord."""
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
        self._stats.add_latency("nvme_read", began)

    def _deliver(self, job: Job, entry: Entry) -> None:
        """Makes a filled entry resident in DRAM, and gives it to each waiting caller with a pin.

        If no caller waits and the record is outdated, the entry is dropped.
        """
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
        """Raises the error in every caller that waits for the job."""
        for waiter in job.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        if job.prefetch and isinstance(error, TierFull):
            job.prefetch.count("prefetch_rejected")


def _materialise(job: Job, entry: Entry) -> Checksums:
    """Computes the initial value of a job's expert from the bank's seed, and writes it into the entry. Returns its checksums."""
    layout = job.bank.layout
    layout.initialize(entry.body, seed=job.bank.spec.seed, expert=job.expert)
    return Checksums.of(layout, entry.body)

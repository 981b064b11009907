"""Promotions without an engine. Reads of the disk end when the test says so, and the test sets the clock."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_moe_server.catalog.catalog import Bank, Record, Slot
from ooc_moe_server.dram.arena import Arena
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine import promotions as promotions_module
from ooc_moe_server.engine.promotions import READS_MAX, SPECULATIVE_READS_MAX, Promotions
from ooc_moe_server.stats import Stats
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import CorruptRecord, TierFull
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec

LAYOUT = Layout(parameters=(TensorSpec(name="w", shape=(8,)),))
RECORD = LAYOUT.record_bytes
NUM_EXPERTS = 40


class Disk:
    """Stands in for the NVMe tier."""

    def __init__(self) -> None:
        self.num_corrupt = 0
        self.held: Counter[Slot] = Counter()
        self.order: list[int] = []  # Experts in the order of the reads.
        self.under_way: dict[int, asyncio.Future[None]] = {}

    def hold(self, slot):
        self.held[slot] += 1

    def let_go(self, slot):
        self.held[slot] -= 1

    async def read(self, slot, into, check):
        self.order.append(slot.index)
        gate = self.under_way[slot.index] = asyncio.get_running_loop().create_future()
        try:
            await gate
        finally:
            del self.under_way[slot.index]

    async def finish(self, *experts: int, error: Exception | None = None) -> None:
        """Ends the named reads under way, or all of them, and lets the waiting tasks go on."""
        for expert in experts or tuple(self.under_way):
            gate = self.under_way[expert]
            if error is None:
                gate.set_result(None)
            else:
                gate.set_exception(error)
        await settled()

    async def finish_all(self) -> None:
        """Ends reads until no new one begins."""
        while self.under_way:
            await self.finish()


async def settled() -> None:
    """Returns when every task that does not wait for the disk has gone on."""
    for _ in range(12):
        await asyncio.sleep(0)


def make_bank(bank_id: int = 1, name: str = "b") -> Bank:
    """A bank whose expert e lies in slot e."""
    spec = BankSpec(name=name, num_experts=NUM_EXPERTS, layout=LAYOUT)
    bank = Bank(id=bank_id, uuid=bytes(16), spec=spec, num_experts=NUM_EXPERTS, created_unix_ms=0, forked_from="")
    for expert in range(NUM_EXPERTS):
        bank.put(expert, record_in(expert + 100 * (bank_id - 1)))
    return bank


def record_in(slot: int, version: int = 1) -> Record:
    return Record(version=version, slot=Slot(RECORD, slot), checksums=Checksums(0, 0))


class Rig:
    """Promotions into a DRAM tier that holds a number of records."""

    def __init__(self, records: int = NUM_EXPERTS) -> None:
        self.now = 100.0
        self.disk, self.bank = Disk(), make_bank()
        self.stats = Stats(clock=lambda: self.now)
        self.dram = DramTier(Arena(records * RECORD))
        self.promotions = Promotions(self.dram, self.disk, self.stats, patience_s=0.0)
        self.scopes = self.stats.scopes("t")

    def prefetch(self, *experts: int, priority: int = 0, for_s: float | None = None) -> list[bool]:
        deadline = None if for_s is None else self.now + for_s
        bank = self.bank
        return [self.promotions.prefetch(bank, each, bank.record(each), self.scopes, deadline, priority) for each in experts]

    def demand(self, *experts: int, urgent: bool = True) -> list[asyncio.Task]:
        bank = self.bank
        return [asyncio.create_task(self.promotions.promote(bank, each, bank.record(each), urgent=urgent)) for each in experts]

    def holds(self, expert: int) -> bool:
        return self.dram.holds(Slot(RECORD, expert))

    async def busy_with_demand(self) -> list[asyncio.Task]:
        """Demands for experts 30 to 33 take all places."""
        tasks = self.demand(*range(30, 30 + READS_MAX))
        await settled()
        return tasks


def test_prefetches_are_read_by_priority_and_among_equals_in_order():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        rig.prefetch(0, 1)
        rig.prefetch(2, 3, priority=7)
        rig.prefetch(4, priority=3)
        rig.prefetch(5, priority=7)
        await rig.disk.finish_all()
        assert rig.disk.order[READS_MAX:] == [2, 3, 5, 4, 0, 1]

    asyncio.run(scenario())


def test_asking_again_raises_a_prefetchs_priority_and_never_lowers_it():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        rig.prefetch(0, 1, 2, priority=1)
        assert rig.prefetch(2, priority=5) == [True]
        rig.prefetch(0, priority=0)
        assert rig.promotions.num_prefetch == 3
        await rig.disk.finish_all()
        assert rig.disk.order[READS_MAX:] == [2, 0, 1]

    asyncio.run(scenario())


def test_demand_reads_start_at_once_whatever_speculation_is_under_way():
    async def scenario():
        rig = Rig()
        rig.prefetch(*range(10))
        await settled()
        assert rig.disk.order == [0, 1]  # SPECULATIVE_READS_MAX
        await rig.busy_with_demand()
        assert len(rig.disk.under_way) == SPECULATIVE_READS_MAX + READS_MAX
        await rig.disk.finish_all()

    asyncio.run(scenario())


def test_speculation_starts_only_in_places_that_demand_leaves():
    async def scenario():
        rig = Rig()
        rig.demand(*range(30, 30 + READS_MAX + 1))
        await settled()
        rig.prefetch(0, 1, 2)
        await settled()
        assert sorted(rig.disk.under_way) == [30, 31, 32, 33]
        await rig.disk.finish(30)
        assert sorted(rig.disk.under_way) == [31, 32, 33, 34]  # A demand waited.
        await rig.disk.finish(31)
        assert sorted(rig.disk.under_way) == [0, 32, 33, 34]
        await rig.disk.finish(32, 33, 34)
        assert sorted(rig.disk.under_way) == [0, 1]
        await rig.disk.finish_all()

    asyncio.run(scenario())


@pytest.mark.parametrize("under_way", [False, True])
def test_a_prefetch_that_is_demanded_becomes_a_demand(under_way):
    async def scenario():
        rig = Rig()
        if not under_way:
            await rig.busy_with_demand()
        rig.prefetch(0)
        await settled()
        (task,) = rig.demand(0)
        await settled()
        assert rig.promotions.num_prefetch == 0
        assert rig.promotions.num_demand == len(rig.disk.order) + (not under_way)
        await rig.disk.finish_all()
        rig.dram.unpin(await task)
        assert rig.disk.order.count(0) == 1
        assert (rig.stats.total.prefetch_promoted, rig.stats.total.prefetch_wasted) == (0, 0)  # The record arrived too late to be useful.

    asyncio.run(scenario())


def test_one_read_serves_all_who_ask_for_the_same_record():
    async def scenario():
        rig = Rig()
        tasks = rig.demand(0, 0, urgent=False) + rig.demand(0, 0)
        rig.prefetch(0)
        await settled()
        await rig.disk.finish_all()
        entries = {await task for task in tasks}
        assert len(entries) == 1
        assert entries.pop().pins == 4
        assert rig.disk.order == [0]

    asyncio.run(scenario())


def test_a_prefetch_outlives_the_fetch_that_first_asked_for_the_record():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        (fetch,) = rig.demand(0, urgent=False)
        await settled()
        assert rig.prefetch(0) == [True]
        fetch.cancel()
        await settled()
        await rig.disk.finish_all()
        assert rig.holds(0)
        assert rig.stats.total.prefetch_promoted == 1

    asyncio.run(scenario())


def test_a_record_that_nobody_waits_for_any_more_is_not_read():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        for task in rig.demand(0) + rig.demand(1, urgent=False):
            await settled()
            task.cancel()
        await settled()
        await rig.disk.finish_all()
        assert len(rig.disk.order) == READS_MAX
        assert (rig.promotions.num_demand, rig.promotions.num_prefetch) == (0, 0)

    asyncio.run(scenario())


def test_a_prefetch_is_dropped_after_its_deadline_and_the_later_of_two_counts():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        rig.prefetch(0, 1, 2, 3, for_s=5.0)
        rig.prefetch(1, for_s=50.0)
        rig.prefetch(1, for_s=1.0)
        rig.prefetch(2)
        (task,) = rig.demand(3, urgent=False)
        await settled()
        rig.now += 20.0
        await rig.disk.finish_all()
        assert sorted(rig.disk.order[READS_MAX:]) == [1, 2, 3]  # A caller waits for 3.
        assert rig.stats.total.prefetch_cancelled == 1
        rig.dram.unpin(await task)

    asyncio.run(scenario())


def test_the_prefetch_queue_is_bounded_and_what_is_too_late_makes_place(monkeypatch):
    monkeypatch.setattr(promotions_module, "PREFETCH_QUEUE_MAX", 3)

    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        rig.prefetch(0, for_s=5.0)
        assert rig.prefetch(1, 2, 3) == [True, True, False]
        assert rig.prefetch(1) == [True]  # On its way already.
        rig.now += 20.0
        assert rig.prefetch(4, 5) == [True, False]
        await rig.disk.finish_all()
        assert sorted(rig.disk.order[READS_MAX:]) == [1, 2, 4]

    asyncio.run(scenario())


def test_callers_beyond_the_bound_are_told_when_to_come_back(monkeypatch):
    monkeypatch.setattr(promotions_module, "WAITERS_MAX", 3)

    async def scenario():
        rig = Rig()
        tasks = rig.demand(0, 1) + rig.demand(2, urgent=False)
        await settled()
        for urgent in (True, False):
            with pytest.raises(TierFull, match="3 reads wait") as refused:
                await rig.demand(0, urgent=urgent)[0]
            assert refused.value.retry_after_ms > 0
        tasks[0].cancel()
        await settled()
        tasks += rig.demand(5)
        await settled()
        await rig.disk.finish_all()
        assert [task.cancelled() for task in tasks] == [True, False, False, False]

    asyncio.run(scenario())


def test_cancelling_drops_what_is_named_of_its_bank_and_what_nobody_waits_for():
    async def scenario():
        rig = Rig()
        other = make_bank(2, "other")
        await rig.busy_with_demand()
        rig.prefetch(0, 1, 2, 3, priority=1)
        rig.prefetch(4, 5)
        rig.promotions.prefetch(other, 0, other.record(0), rig.scopes, None)
        (task,) = rig.demand(3, urgent=False)
        await settled()
        assert rig.promotions.cancel(rig.bank, [1, 3, 5, 39]) == 2
        assert rig.promotions.cancel(rig.bank, [1]) == 0
        assert rig.promotions.num_prefetch == 5
        assert rig.promotions.cancel(rig.bank, []) == 3
        await rig.disk.finish_all()
        assert sorted(rig.disk.order[READS_MAX:]) == [3, 100]
        assert rig.stats.total.prefetch_cancelled == 5
        rig.dram.unpin(await task)

    asyncio.run(scenario())


def test_a_prefetch_of_a_record_that_was_replaced_is_not_read_or_not_kept():
    async def scenario():
        rig = Rig()
        rig.prefetch(0, 1)
        await settled()
        rig.prefetch(2)
        for expert in (0, 2):
            rig.bank.put(expert, record_in(50 + expert, version=2))
        await rig.disk.finish_all()
        assert rig.disk.order == [0, 1]
        assert [expert for expert in range(60) if rig.holds(expert)] == [1]
        access = rig.stats.total
        assert (access.prefetch_promoted, access.prefetch_wasted, access.prefetch_cancelled) == (2, 1, 1)

    asyncio.run(scenario())


def test_a_prefetch_for_which_demands_leave_no_room_is_rejected_and_a_demand_for_it_is_not():
    async def scenario():
        rig = Rig(records=2)
        tasks = rig.demand(0, 1)
        await settled()
        await rig.disk.finish_all()
        rig.prefetch(2)
        await settled()
        assert rig.stats.total.prefetch_rejected == 1  # Both are pinned.
        for task in tasks:
            rig.dram.unpin(task.result())
        rig.prefetch(2)
        await settled()
        await rig.disk.finish_all()
        assert [rig.holds(expert) for expert in range(3)] == [False, True, True]  # 1 was demanded last.
        (third,) = rig.demand(3)
        await settled()
        await rig.disk.finish_all()
        third.result()
        assert rig.holds(3)

    asyncio.run(scenario())


def test_a_demand_that_joins_speculation_before_it_has_room_takes_the_room_of_a_demand():
    async def scenario():
        rig = Rig(records=2)
        for expert in (0, 1):
            (task,) = rig.demand(expert)
            await settled()
            await rig.disk.finish_all()
        rig.dram.unpin(task.result())  # 0 is pinned; 1 was demanded last, so that speculation finds no room.
        rig.prefetch(2)
        (task,) = rig.demand(2)
        await asyncio.sleep(0)
        await settled()
        await rig.disk.finish_all()
        assert task.result().source == Slot(RECORD, 2)

    asyncio.run(scenario())


def test_a_damaged_record_is_an_error_for_all_who_wait_and_for_nobody_else():
    async def scenario():
        rig = Rig()
        tasks = rig.demand(0, 0, 1)
        await settled()
        await rig.disk.finish(0, error=CorruptRecord("a flipped byte"))
        await rig.disk.finish_all()
        for task in tasks[:2]:
            with pytest.raises(CorruptRecord, match="a flipped byte"):
                task.result()
        assert tasks[2].result().source == Slot(RECORD, 1)
        assert rig.disk.num_corrupt == 1
        rig.dram.unpin(tasks[2].result())
        assert rig.dram.snapshot_stats().pinned_bytes == 0

    asyncio.run(scenario())


def test_draining_drops_speculation_and_finishes_what_somebody_waits_for():
    async def scenario():
        rig = Rig()
        await rig.busy_with_demand()
        rig.prefetch(0, 1)
        (task,) = rig.demand(2, urgent=False)
        await settled()
        draining = asyncio.create_task(rig.promotions.drain())
        await settled()
        assert not draining.done()
        await rig.disk.finish_all()
        await draining
        assert task.result().source == Slot(RECORD, 2)
        assert 0 not in rig.disk.order
        assert rig.promotions.num_prefetch == 0

    asyncio.run(scenario())


STEPS = st.tuples(
    st.sampled_from(["demand", "fetch", "prefetch", "prefetch", "leave", "cancel", "finish", "finish", "fail", "replace", "later"]),
    st.integers(0, 9),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(STEPS, max_size=60), st.integers(1, 6))
def test_under_any_sequence_limits_hold_nobody_is_forgotten_and_nothing_is_left_over(steps, records):
    async def scenario():
        rig = Rig(records)
        promotions, disk = rig.promotions, rig.disk
        tasks: list[asyncio.Task] = []
        next_slot = 1000
        for step, number in steps:
            resident = rig.dram.holds(rig.bank.source(number, rig.bank.record(number)))
            if step in ("demand", "fetch") and not resident:
                tasks += rig.demand(number, urgent=step == "demand")
            elif step == "prefetch" and not resident:
                rig.prefetch(number, priority=number % 3, for_s=10.0)
            elif step == "leave" and tasks:
                tasks[number % len(tasks)].cancel()
            elif step == "cancel":
                promotions.cancel(rig.bank, [number, number + 1])
            elif step in ("finish", "fail") and disk.under_way:
                chosen = sorted(disk.under_way)[number % len(disk.under_way)]
                await disk.finish(chosen, error=OSError("injected") if step == "fail" else None)
            elif step == "replace":
                next_slot += 1
                rig.bank.put(number, record_in(next_slot))
            elif step == "later":
                rig.now += number
            await settled()
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is None:
                    rig.dram.unpin(task.result())
            tasks = [task for task in tasks if not task.done()]
            jobs = promotions._jobs.values()
            assert promotions.num_demand == sum(job.urgent for job in jobs)
            assert promotions.num_prefetch == sum(not job.urgent for job in jobs)
            assert len(promotions._speculation) == len(list(promotions._speculation))
            assert len(promotions._demand_reads) <= READS_MAX
            assert len(promotions._speculative_reads) <= SPECULATIVE_READS_MAX
            assert +disk.held == Counter({job.source: 1 for job in jobs})
        draining = asyncio.create_task(promotions.drain())
        await settled()
        await disk.finish_all()
        await draining
        await settled()
        for task in tasks:
            assert task.done(), "somebody waits for ever"
            if not task.cancelled() and task.exception() is None:
                rig.dram.unpin(task.result())
        assert not promotions._jobs
        assert promotions._num_waiters == 0
        assert rig.dram.snapshot_stats().pinned_bytes == 0

    asyncio.run(scenario())

"""The engine without gRPC: queues, faults and races. Random operations are in tests/torture/test_model.py."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import threading

import pytest

from ooc_moe_server.engine import promotions
from ooc_moe_server.index.database import Index
from ooc_moe_server.nvme.slab import Slab
from ooc_moe_wire.errors import InvalidRequest, NotTheWriter, TierFull, UnknownBank
from ooc_moe_wire.v1 import expert_pb2
from tests.server.engine_store import LAYOUT, RECORD, Store, body_of, failing, opened, until

RESIDENT, QUEUED, REJECTED = expert_pb2.PREFETCH_RESIDENT, expert_pb2.PREFETCH_QUEUED, expert_pb2.PREFETCH_REJECTED


class Gate:
    """Holds NVMe reads back; `order` lists the slots in the order of the reads."""

    def __init__(self, monkeypatch) -> None:
        self.order: list[int] = []
        self.open = threading.Event()
        real_read = Slab.read

        def read(slab, slot, into):
            self.order.append(slot)
            assert self.open.wait(30)
            real_read(slab, slot, into)

        monkeypatch.setattr(Slab, "read", read)


async def written(store: Store, num_experts: int) -> None:
    """Writes experts to NVMe and drops them from DRAM; expert e lies in slot e."""
    for expert in range(num_experts):
        await store.push({expert: body_of(expert)})
        assert store.bank.record(expert).slot.index == expert
    store.drop_from_dram(*range(num_experts))


def test_misses_of_one_expert_at_the_same_time_are_one_read(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            await written(store, 1)
            answers = await asyncio.gather(*(store.bodies(0) for _ in range(5)))
            assert answers == [{0: body_of(0)}] * 5
            stats = store.engine.snapshot_stats()
            assert (stats.nvme.reads, stats.total.misses, stats.total.nvme_reads) == (1, 5, 5)

    asyncio.run(scenario())


def test_demand_reads_go_before_prefetches_and_a_prefetch_that_is_demanded_moves_up(tmp_path, monkeypatch):
    async def scenario():
        async with opened(tmp_path) as store:
            await written(store, 8)
            gate = Gate(monkeypatch)
            assert store.prefetch(0, 1, 2, 3, 4) == [QUEUED] * 5
            await until(lambda: len(gate.order) == promotions.SPECULATIVE_READS_MAX)  # The others wait: speculation has half the reads.
            demands = [asyncio.create_task(store.bodies(expert)) for expert in (6, 7, 4)]
            await until(lambda: len(gate.order) == promotions.SPECULATIVE_READS_MAX + 3)  # Demands start at once, next to the speculation.
            assert store.engine.snapshot_stats().queues.demand_reads == 3
            gate.open.set()
            assert [await demand for demand in demands] == [{expert: body_of(expert)} for expert in (6, 7, 4)]
            await until(lambda: len(gate.order) == 7)
            assert set(gate.order[:2]) == {0, 1}
            assert set(gate.order[2:5]) == {6, 7, 4}  # 4 was last in the queue of speculation.
            assert set(gate.order[5:]) == {2, 3}

    asyncio.run(scenario())


def test_cancelled_prefetches_are_not_read_but_awaited_ones_are(tmp_path, monkeypatch):
    async def scenario():
        async with opened(tmp_path) as store:
            await written(store, 6)
            gate = Gate(monkeypatch)
            store.prefetch(0, 1, 2, 3, 4)
            fetching = asyncio.create_task(anext(store.fetch(5, demand=False)))
            await until(lambda: len(gate.order) == 2)
            assert store.engine.promotions.cancel(store.bank, {2, 0, 5}) == 1  # 0 is being read, 5 is waited for.
            assert store.engine.promotions.cancel(store.bank, ()) == 2
            gate.open.set()
            assert (await fetching).expert == 5
            assert sorted(gate.order) == [0, 1, 5]
            access = store.engine.snapshot_stats().total
            assert (access.prefetch_requested, access.prefetch_cancelled) == (5, 3)
            store.engine.dram.unpin((await asyncio.gather(fetching))[0].entry)

    asyncio.run(scenario())


def test_a_prefetch_that_has_not_begun_by_its_deadline_is_dropped(tmp_path, monkeypatch):
    async def scenario():
        async with opened(tmp_path) as store:
            await written(store, 4)
            gate = Gate(monkeypatch)
            now = store.engine.stats.clock()
            store.prefetch(0, 1)
            await until(lambda: len(gate.order) == 2)
            store.prefetch(2, deadline_s=5.0)
            store.prefetch(3, deadline_s=50.0)
            monkeypatch.setattr(store.engine.stats, "clock", lambda: now + 20.0)
            gate.open.set()
            await until(lambda: store.prefetch(3) == [RESIDENT])
            assert 2 not in gate.order
            assert store.engine.snapshot_stats().total.prefetch_cancelled == 1

    asyncio.run(scenario())


def test_the_prefetch_queue_is_bounded_and_says_when_it_is_full(tmp_path, monkeypatch):
    async def scenario():
        async with opened(tmp_path) as store:
            await written(store, 6)
            monkeypatch.setattr(promotions, "PREFETCH_QUEUE_MAX", 2)
            gate = Gate(monkeypatch)
            store.prefetch(0, 1)
            await until(lambda: len(gate.order) == 2)
            assert store.prefetch(2, 3, 4, 2) == [QUEUED, QUEUED, REJECTED, QUEUED]
            gate.open.set()
            assert store.engine.snapshot_stats().total.prefetch_rejected == 1

    asyncio.run(scenario())


def test_a_prefetched_record_that_leaves_unused_is_counted_as_wasted(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=2) as store:
            store.prefetch(0)
            await until(lambda: store.prefetch(0) == [RESIDENT])
            await store.bodies(0)
            store.prefetch(1)
            await until(lambda: store.prefetch(1) == [RESIDENT])
            await store.bodies(2, 3)
            access = store.engine.snapshot_stats().total
            assert (access.prefetch_promoted, access.prefetch_hits, access.prefetch_wasted) == (2, 1, 1)

    asyncio.run(scenario())


def test_when_all_of_dram_is_pinned_fetch_push_and_prefetch_say_so_and_recover(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=1) as store:
            served = store.fetch(0)
            held = await anext(served)
            with pytest.raises(TierFull, match="pinned"):
                await store.bodies(1)
            assert (await store.push({1: body_of(1)}))[1].error.kind == "TierFull"
            assert store.prefetch(1) == [REJECTED]
            assert bytes(held.entry.body) == bytes(LAYOUT.body_bytes)
            await served.aclose()
            assert (await store.push({1: body_of(1)}))[1].version > 0
            assert await store.bodies(1) == {1: body_of(1)}

    asyncio.run(scenario())


def test_a_demand_waits_for_a_pin_to_go(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=1, patience_s=30) as store:
            served = store.fetch(0)
            await anext(served)
            waiting = asyncio.create_task(store.bodies(1))
            await until(lambda: store.engine.snapshot_stats().queues.demand_reads == 1)
            await served.aclose()
            assert list(await waiting) == [1]

    asyncio.run(scenario())


def test_one_call_larger_than_dram_is_served_whole(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=2, patience_s=30) as store:
            for expert in range(0, 16, 2):
                await store.push({expert: body_of(expert)})
            bodies = await store.bodies(*range(16))
            assert bodies == {expert: bytes(LAYOUT.body_bytes) if expert % 2 else body_of(expert) for expert in range(16)}

    asyncio.run(scenario())


def test_a_call_never_waits_for_its_own_pins(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=3) as store:
            await written(store, 9)
            await store.bodies(6, 7, 8)
            assert await store.bodies(6, 0, 7, 1, 8, 2, 3, 4, 5) == {expert: body_of(expert) for expert in range(9)}

    asyncio.run(scenario())


def test_a_caller_that_leaves_at_any_moment_leaves_no_pin_behind(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=16, patience_s=30) as store:
            await written(store, 8)
            for steps in range(60):
                fetching = asyncio.create_task(store.bodies(*range(12)))
                for _ in range(steps):
                    await asyncio.sleep(0)
                fetching.cancel()
                await asyncio.wait([fetching])
                await until(lambda: store.engine.snapshot_stats().queues.demand_reads == 0)
                await until(lambda: store.engine.snapshot_stats().dram.pinned_bytes == 0)
                store.drop_from_dram(*range(8))

    asyncio.run(scenario())


def test_a_record_being_sent_outlives_its_replacement_and_its_slot_is_not_reused(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push({0: body_of(1)})
            served = store.fetch(0)
            old = await anext(served)
            await store.push({0: body_of(2)})
            await store.push({1: body_of(3), 2: body_of(4)})
            assert bytes(old.entry.body) == body_of(1)
            await served.aclose()
            assert await store.bodies(0) == {0: body_of(2)}

    asyncio.run(scenario())


def test_a_bank_deleted_in_the_middle_of_a_fetch_and_a_push_ends_both_without_harm(tmp_path):
    async def scenario():
        async with opened(tmp_path, records=16) as store:
            await written(store, 8)
            served = store.fetch(*range(16))
            first = await anext(served)
            async with store.engine.committer.exclusive():
                deleting = asyncio.create_task(store.engine.changes.delete_bank("b"))
                await asyncio.sleep(0)
                pushing = asyncio.create_task(store.push({8: body_of(8)}))
                await until(lambda: store.waiting)
            with pytest.raises(NotTheWriter):
                await deleting
            assert (await pushing)[8].version > 0
            await store.engine.changes.delete_bank("b")
            assert bytes(first.entry.body) == body_of(first.expert)
            with pytest.raises(UnknownBank):
                async for _ in served:
                    pass
            await served.aclose()
            assert store.engine.snapshot_stats().dram.pinned_bytes == 0
            assert store.engine.snapshot_stats().nvme.used_bytes == 0

    asyncio.run(scenario())


def test_a_restore_that_comes_before_a_push_makes_it_stale(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            snapshot = await store.engine.changes.create_snapshot(["b"], "")
            await store.push({0: body_of(0)})
            async with store.engine.committer.exclusive():
                restoring = asyncio.create_task(store.engine.changes.restore_snapshot(snapshot.id, store.writer_id))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                pushing = asyncio.create_task(store.push({0: body_of(1), 1: body_of(2)}))  # Expert 1 was never written.
                await until(lambda: len(store.waiting) == 2)
            await restoring
            assert {outcome.error.kind for outcome in (await pushing).values()} == {"StaleVersion"}
            assert await store.bodies(0, 1) == {0: bytes(LAYOUT.body_bytes), 1: bytes(LAYOUT.body_bytes)}
            await store.push({1: body_of(1)})
            assert store.engine.snapshot_stats().nvme.used_bytes == RECORD  # The refused pushes' slots came back.

    asyncio.run(scenario())


def test_pushes_that_wait_share_one_commit(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            async with store.engine.committer.exclusive():  # A round cannot begin.
                pushing = asyncio.create_task(store.push({expert: body_of(expert) for expert in range(6)}))
                await until(lambda: len(store.waiting) >= 5)
            await pushing
            assert store.engine.stats.latency()["commit"].count <= 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "error", "kind"),
    [
        ("write", errno.EIO, "Internal"),
        ("write", errno.ENOSPC, "TierFull"),
        ("sync", errno.EIO, "Internal"),
        ("extend", errno.ENOSPC, "TierFull"),
        ("extend", errno.EDQUOT, "TierFull"),
    ],
)
def test_a_failing_disk_refuses_pushes_and_keeps_what_was_committed(tmp_path, monkeypatch, method, error, kind):
    async def scenario():
        async with opened(tmp_path) as store:
            if method != "extend":
                await store.push({0: body_of(0)})
            with monkeypatch.context() as broken:
                broken.setattr(Slab, method, failing(OSError(error, "injected")))
                outcomes = await store.push({0: body_of(1), 1: body_of(1)})
                assert {outcome.error.kind for outcome in outcomes.values()} == {kind}
            before = bytes(LAYOUT.body_bytes) if method == "extend" else body_of(0)
            assert await store.bodies(0, 1) == {0: before, 1: bytes(LAYOUT.body_bytes)}
            outcomes = await store.push({0: body_of(2), 1: body_of(3)})
            assert all(outcome.version > 0 for outcome in outcomes.values())
            assert store.engine.snapshot_stats().dram.pinned_bytes == 0
            used = store.engine.snapshot_stats().nvme.used_bytes
            assert used == 2 * RECORD  # The slots of the failed pushes are free again.
        async with opened(tmp_path) as store:
            assert await store.bodies(0, 1) == {0: body_of(2), 1: body_of(3)}

    asyncio.run(scenario())


def test_the_slot_of_a_failed_index_commit_waits_for_a_good_one_before_it_is_reused_and_no_other_is_spent_meanwhile(tmp_path, monkeypatch):
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    async def scenario():
        async with opened(tmp_path) as store:
            with monkeypatch.context() as broken:
                broken.setattr(Index, "put_records", failing(full))
                for expert in (0, 1, 1):
                    assert (await store.push({expert: body_of(9)}))[expert].error.kind == "TierFull"
                # A crash could bring back the commit that refers to this slot.
                assert store.engine.snapshot_stats().nvme.used_bytes == RECORD
            await store.push({2: body_of(2)})
            assert store.engine.snapshot_stats().nvme.used_bytes == RECORD
            assert store.bank.record(2).slot.index == 0
            assert await store.bodies(0, 2) == {0: bytes(LAYOUT.body_bytes), 2: body_of(2)}

    asyncio.run(scenario())


def test_a_change_is_carried_to_its_end_when_its_caller_leaves(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            taking = asyncio.create_task(store.engine.changes.create_snapshot(["b"], "mine"))
            await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            await store.engine.changes.drain()
            assert [snapshot.name for snapshot in store.engine.catalog.snapshots.values()] == ["mine"]

    asyncio.run(scenario())


def test_a_bad_fetch_counts_nothing(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            with pytest.raises(InvalidRequest):
                store.fetch(1, 1)
            assert store.engine.snapshot_stats().total.fetched_experts == 0

    asyncio.run(scenario())

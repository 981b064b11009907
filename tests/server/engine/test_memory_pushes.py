"""Pushes acknowledged in memory: they are visible at once and written later. What a crash may lose, and what it may not."""

import asyncio
import errno
import logging
import shutil
import threading

import pytest

from ooc_moe_server.engine import write_behind
from ooc_moe_server.index.database import VERSION_RESERVE, Index
from ooc_moe_server.nvme.slab import Slab
from ooc_moe_wire.codec import chunks
from ooc_moe_wire.errors import Internal
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import expert_pb2
from tests.server.engine_store import LAYOUT, RECORD, SEEDED, body_of, failing, opened, until


class Disk:
    """Writes to slabs: they wait until `open` is set, and fail while `error` is set."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.error = threading.Event(), None
        self.written: list[int] = []
        real_write = Slab.write

        def write(slab, slot, record):
            assert self.open.wait(30)
            if self.error:
                raise self.error
            self.written.append(slot)
            real_write(slab, slot, record)

        monkeypatch.setattr(Slab, "write", write)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def crashed(store_dir, copy_dir):
    """A copy of the directory, as a kill -9 now would leave it."""
    return shutil.copytree(store_dir, copy_dir, ignore=shutil.ignore_patterns("LOCK"))


async def saved(store) -> None:
    await until(lambda: store.stats.dram.dirty_bytes == 0)


def test_a_memory_push_is_acknowledged_and_visible_before_anything_is_written(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path) as store:
            outcome = await store.push_one(0, 1, in_memory=True)
            assert (outcome.version > 0, outcome.durable, outcome.error.kind) == (True, False, "")
            assert await store.bodies(0) == {0: body_of(1)}
            assert store.bank.record(0).version == outcome.version
            assert store.bank.num_written == 1
            stats = store.stats
            assert (stats.nvme.writes, stats.dram.dirty_bytes, stats.dram.pinned_bytes) == (0, RECORD, RECORD)
            disk.open.set()
            await saved(store)
            assert store.bank.record(0).version == outcome.version
            stats = store.stats
            assert (stats.nvme.writes, stats.nvme.used_bytes, stats.dram.pinned_bytes) == (1, RECORD, 0)
            assert await store.bodies(0) == {0: body_of(1)}
            assert store.stats.nvme.reads == 0  # The record stayed in DRAM, under the source of its slot.
            store.drop_from_dram(0)
            assert await store.bodies(0) == {0: body_of(1)}

    asyncio.run(scenario())


def test_an_orderly_end_leaves_nothing_unsaved(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path, records=32) as store:
            outcomes = await store.push({expert: body_of(expert) for expert in range(8)}, in_memory=True)
            assert not any(outcome.durable for outcome in outcomes.values())
            disk.open.set()
        async with opened(tmp_path) as store:
            assert await store.bodies(*range(8)) == {expert: body_of(expert) for expert in range(8)}
            assert {expert: store.bank.record(expert).version for expert in range(8)} == {e: o.version for e, o in outcomes.items()}

    asyncio.run(scenario())


def test_a_crash_may_take_a_memory_push_whole_and_the_next_push_over_it_says_so(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path / "a") as store:
            disk.open.set()
            older = await store.push_one(0, 1)
            disk.open.clear()
            lost = await store.push_one(0, 2, in_memory=True)
            copy = crashed(tmp_path / "a", tmp_path / "b")
            disk.open.set()
        async with opened(copy) as store:
            assert await store.bodies(0) == {0: body_of(1)}
            assert store.bank.record(0).version == older.version
            refused = await store.push_one(0, 3, base_version=lost.version)
            assert refused.error.kind == "LostUpdate"
            assert all(str(each.version) in refused.error.message for each in (older, lost))
            assert (await store.push_one(0, 3)).version > lost.version

    asyncio.run(scenario())


def test_versions_acknowledged_in_memory_never_come_again_after_a_crash_however_many_there_were(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path / "a", records=64) as store:
            newest = 0
            for number in range(40):
                # Stands for as many pushes, without a durable one in between.
                store.engine.catalog.next_version += VERSION_RESERVE // 16 - 1
                outcome = await store.push_one(number % 8, number, in_memory=True)
                assert outcome.version > newest
                newest = outcome.version
            assert newest > 2 * VERSION_RESERVE
            copy = crashed(tmp_path / "a", tmp_path / "b")
            disk.open.set()
        async with opened(copy) as store:
            assert (await store.push_one(0, 1)).version > newest

    asyncio.run(scenario())


def test_no_version_is_acknowledged_that_could_not_be_saved(tmp_path, disk, monkeypatch):
    async def scenario():
        async with opened(tmp_path) as store:
            disk.open.set()
            store.engine.catalog.next_version += VERSION_RESERVE
            with monkeypatch.context() as broken:
                broken.setattr(Index, "put_records", failing(OSError(errno.EIO, "injected")))
                assert (await store.push_one(0, 1, in_memory=True)).error.kind == "Internal"
            assert await store.bodies(0) == {0: SEEDED}
            assert (await store.push_one(0, 1, in_memory=True)).version

    asyncio.run(scenario())


def test_no_version_in_a_header_comes_again_after_a_crash_even_where_a_change_of_many_experts_failed_before(tmp_path):
    async def scenario():
        async with opened(tmp_path / "a") as store:
            store.engine.catalog.next_version += 3 * VERSION_RESERVE  # Stands for a restore whose commit fails after it took versions.
            async with store.engine.committer.exclusive():  # No round can begin.
                pushing = asyncio.create_task(store.push_one(0, 1))
                await until(lambda: store.waiting)
                version = store.waiting[0].version
                copy = crashed(tmp_path / "a", tmp_path / "b")
            await pushing
        async with opened(copy) as store:
            assert (await store.push_one(0, 2)).version > version

    asyncio.run(scenario())


@pytest.mark.parametrize("base", ["older", "newer"])
def test_a_memory_push_over_another_version_is_refused(tmp_path, base):
    async def scenario():
        async with opened(tmp_path) as store:
            first = await store.push_one(0, 1, in_memory=True)
            refused = await store.push_one(0, 2, in_memory=True, base_version=first.version + (1 if base == "newer" else -1))
            assert refused.error.kind == ("LostUpdate" if base == "newer" else "StaleVersion")
            assert await store.bodies(0) == {0: body_of(1)}

    asyncio.run(scenario())


def test_a_repeat_answers_the_same_version_and_what_is_true_of_it_now(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path) as store:
            first = await store.push_one(0, 1, in_memory=True, push_number=5)
            again = await store.push_one(0, 1, in_memory=True, push_number=5, base_version=0)
            assert again == first
            disk.open.set()
            await saved(store)
            again = await store.push_one(0, 1, in_memory=True, push_number=5, base_version=0)
            assert (again.version, again.durable) == (first.version, True)
            assert store.stats.nvme.writes == 1

    asyncio.run(scenario())


def test_damaged_bytes_are_refused_and_never_seen(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            writer = store.writer()
            await store.begin(writer, 0, body_of(1), in_memory=True)
            for chunk in chunks(memoryview(body_of(2))):
                writer.add(chunk)
            await writer.wait_outcomes()
            writer.close()
            assert writer.outcomes.get_nowait().error.kind == "CorruptRecord"
            assert await store.bodies(0) == {0: SEEDED}
            stats = store.stats
            assert (stats.dram.pinned_bytes, stats.dram.dirty_bytes, stats.nvme.used_bytes) == (0, 0, 0)

    asyncio.run(scenario())


def test_a_newer_memory_push_makes_writing_the_older_needless(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path, records=32) as store:
            await store.push({14: body_of(14), 15: body_of(15)}, in_memory=True)  # Occupy the writers.
            for number in range(4):
                newest = await store.push_one(0, number, in_memory=True)
            disk.open.set()
            await saved(store)
            assert store.stats.nvme.writes == 3
            assert store.bank.record(0).version == newest.version
            assert store.stats.nvme.used_bytes == 3 * RECORD
        async with opened(tmp_path) as store:
            assert await store.bodies(0) == {0: body_of(3)}

    asyncio.run(scenario())


def test_a_newer_memory_push_during_the_older_ones_commit_ends_with_the_newer(tmp_path, monkeypatch):
    gate = threading.Event()
    real = Index.put_records

    def put_records(index, writes, next_version):
        assert gate.wait(30)
        real(index, writes, next_version)

    async def scenario():
        async with opened(tmp_path, records=32) as store:
            monkeypatch.setattr(Index, "put_records", put_records)
            await store.push_one(0, 1, in_memory=True)
            await until(lambda: store.engine._index_executor._work_queue.empty() and store.engine.committer._lock._lock.locked())
            newer = await store.push_one(0, 2, in_memory=True)
            gate.set()
            await saved(store)
            assert store.bank.record(0).version == newer.version
            store.drop_from_dram(0)
            assert await store.bodies(0) == {0: body_of(2)}
            assert store.stats.nvme.used_bytes == RECORD

    asyncio.run(scenario())


def test_a_durable_push_over_an_unsaved_one_makes_that_one_moot(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push_one(0, 1, in_memory=True)
            pushing = asyncio.create_task(store.push_one(0, 2))
            await until(lambda: 0 in store.bank.pushing)
            assert await store.bodies(0) == {0: body_of(1)}  # The newer one is not committed.
            disk.open.set()
            outcome = await pushing
            assert outcome.durable
            await saved(store)
            assert store.bank.record(0).version == outcome.version
            stats = store.stats
            assert (stats.nvme.used_bytes, stats.dram.pinned_bytes) == (RECORD, 0)
            store.drop_from_dram(0)
            assert await store.bodies(0) == {0: body_of(2)}

    asyncio.run(scenario())


def test_both_in_one_round_end_with_the_durable_one(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            waiting = store.waiting
            async with store.engine.committer._lock.round():  # No round can begin.
                older = await store.push_one(0, 1, in_memory=True)
                await until(lambda: len(waiting) == 1)
                pushing = asyncio.create_task(store.push_one(0, 2, base_version=older.version))
                await until(lambda: len(waiting) == 2)
            outcome = await pushing
            await saved(store)
            assert (outcome.durable, store.bank.record(0).version) == (True, outcome.version)
            assert store.stats.nvme.used_bytes == RECORD
            assert store.stats.dram.pinned_bytes == 0

    asyncio.run(scenario())


def test_beyond_their_share_of_the_arena_memory_pushes_become_durable_ones(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path, records=16, patience_s=30) as store:  # A quarter of the arena holds four.
            outcomes = await store.push({expert: body_of(expert) for expert in range(4)}, in_memory=True)
            assert not any(outcome.durable for outcome in outcomes.values())
            pushing = asyncio.create_task(store.push_one(4, 4, in_memory=True))
            await until(lambda: 4 in store.bank.pushing)
            assert store.stats.dram.dirty_bytes == 4 * RECORD
            disk.open.set()
            assert (await pushing).durable
            await saved(store)
            assert not (await store.push_one(5, 5, in_memory=True)).durable

    asyncio.run(scenario())


@pytest.mark.parametrize("cause", ["write", "sync", "index"])
def test_a_failed_write_back_keeps_the_record_and_is_tried_again_until_it_is_saved(tmp_path, monkeypatch, caplog, cause):
    monkeypatch.setattr(write_behind, "RETRY_S_MIN", 0.001)
    monkeypatch.setattr(write_behind, "RETRY_S_MAX", 0.001)
    target, name = {"write": (Slab, "write"), "sync": (Slab, "sync"), "index": (Index, "put_records")}[cause]
    tries = 0

    def fail(*arguments):
        nonlocal tries
        tries += 1
        raise OSError(errno.EIO, "injected")

    async def scenario():
        async with opened(tmp_path) as store:
            await store.push_one(0, 1)
            with monkeypatch.context() as broken:
                broken.setattr(target, name, fail)
                outcome = await store.push_one(0, 2, in_memory=True)
                await until(lambda: tries > 10)
                assert await store.bodies(0) == {0: body_of(2)}
                assert store.stats.dram.dirty_bytes == RECORD
            await saved(store)
            assert (await store.push_one(0, 2, in_memory=True, push_number=2, base_version=1)).durable
            assert store.stats.nvme.used_bytes == RECORD
        async with opened(tmp_path) as store:
            assert await store.bodies(0) == {0: body_of(2)}
            assert store.bank.record(0).version == outcome.version

    asyncio.run(scenario())
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_a_snapshot_and_a_fork_contain_what_was_acknowledged_in_memory(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path / "a") as store:
            await store.push_one(0, 1, in_memory=True)
            taking = asyncio.create_task(store.engine.changes.create_snapshot(["b"], "s"))
            await until(lambda: store.engine.committer._lock.is_changing)
            # This push waits, since it would change the state of the snapshot.
            later = asyncio.create_task(store.push_one(1, 2, in_memory=True))
            disk.open.set()
            snapshot = await taking
            await later
            assert [record.slot is not None for record in snapshot.banks[store.bank.id].records.values()] == [True]
            await saved(store)
            disk.open.clear()
            await store.push_one(2, 3, in_memory=True)
            forking = asyncio.create_task(store.engine.changes.fork_bank("b", "fork", 0))
            disk.open.set()
            await forking
            copy = crashed(tmp_path / "a", tmp_path / "b")
        async with opened(copy) as store:
            assert await store.bodies(0, 1, 2) == {0: body_of(1), 1: body_of(2), 2: body_of(3)}
            store.bank = store.engine.catalog.bank("fork")
            assert await store.bodies(0, 1, 2) == {0: body_of(1), 1: body_of(2), 2: body_of(3)}

    asyncio.run(scenario())


def test_a_snapshot_of_what_cannot_be_written_is_refused_and_nothing_is_lost(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path) as store:
            disk.error = OSError(errno.EIO, "injected")
            disk.open.set()
            await store.push_one(0, 1, in_memory=True)
            with pytest.raises(Internal, match="injected"):
                await store.engine.changes.create_snapshot(["b"], "s")
            assert await store.bodies(0) == {0: body_of(1)}
            disk.error = None
            snapshot = await store.engine.changes.create_snapshot(["b"], "s")
            assert list(snapshot.banks[store.bank.id].records) == [0]

    asyncio.run(scenario())


@pytest.mark.parametrize("change", ["restore", "delete"])
def test_a_restore_and_a_deletion_drop_what_is_unsaved_with_its_pins_and_slots(tmp_path, disk, change):
    async def scenario():
        async with opened(tmp_path) as store:
            disk.open.set()
            await store.push_one(0, 1)
            snapshot = await store.engine.changes.create_snapshot(["b"], "s")
            await store.push_one(0, 2)
            disk.open.clear()
            dropped = await store.push_one(0, 3, in_memory=True)
            await store.push_one(1, 4, in_memory=True)
            if change == "restore":
                await store.engine.changes.restore_snapshot(snapshot.id, "")
                assert store.bank.record(0).version > dropped.version
                assert await store.bodies(0, 1) == {0: body_of(1), 1: SEEDED}
                assert (await store.push_one(0, 5, base_version=dropped.version)).error.kind == "StaleVersion"
            else:
                await store.engine.changes.delete_bank("b")
                store.bank = await store.engine.changes.create_bank(BankSpec(name="b", num_experts=16, layout=LAYOUT))
                assert await store.bodies(0, 1) == {0: SEEDED, 1: SEEDED}
            disk.open.set()
            await saved(store)
            stats = store.stats
            assert (stats.dram.pinned_bytes, stats.nvme.used_bytes) == (0, RECORD if change == "restore" else 0)

    asyncio.run(scenario())


def test_what_cannot_be_saved_at_the_end_is_named_in_the_log(tmp_path, disk, caplog):
    async def scenario():
        async with opened(tmp_path) as store:
            disk.error = OSError(errno.EIO, "injected")
            disk.open.set()
            await store.push({3: body_of(3), 5: body_of(5)}, in_memory=True)

    asyncio.run(scenario())
    (message,) = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert all(word in message for word in ("'b'", "expert 3", "expert 5", "injected"))


def test_a_daemon_killed_after_memory_pushes_serves_no_torn_record_and_goes_on(daemon, connect):
    client = connect(daemon.target)
    client.create("b")
    stream = client.stream("b")
    acknowledged = dict.fromkeys(range(8), 0)
    for number in range(1, 65):
        expert = number % 8
        header = client.push_header(expert, client.random_body(number), base_version=acknowledged[expert], push_number=number)
        header.durability = expert_pb2.MEMORY
        stream.send(header=header)
        stream.body(client.random_body(number))
        acknowledged[expert] = stream.outcome().version
    assert min(acknowledged.values()) > 0
    daemon.kill()
    client = connect(daemon.start().target)
    pushed = {expert: [client.random_body(number) for number in range(expert or 8, 65, 8)] for expert in range(8)}
    got = client.fetch("b", range(8))
    stream = client.stream("b")
    for expert, each in got.items():
        assert bytes(each.body) in [client.seeded(expert), *pushed[expert]]
        assert each.header.version <= acknowledged[expert]
        outcome = stream.push(expert, client.random_body(99), base_version=acknowledged[expert], push_number=100)
        if each.header.version < acknowledged[expert]:
            assert outcome.error.kind == "LostUpdate"
        else:
            assert outcome.version > max(acknowledged.values())
    stream.close()

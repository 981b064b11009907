"""What survives kill -9, restarts, damaged files, failed syncs, and a DRAM tier that is far too small."""

import asyncio
import errno
import os
import threading

import grpc
import pytest

from ooc_moe_wire.codec import Checksums, RecordHeader, chunks
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import expert_pb2, snapshot_pb2
from tests.server.engine_store import LAYOUT, RECORD, SEEDED, body_of, opened, until


@pytest.fixture
def writer(daemon, connect):
    """A client of a daemon of its own, with a bank "b"."""
    client = connect(daemon.target)
    client.create("b")
    return client


def slab(daemon, client):
    return daemon.data_dir / "slabs" / f"{client.layout.record_bytes}.slab"


def test_kill_9_in_the_middle_of_pushing_loses_no_acknowledged_push(daemon, writer, connect):
    acknowledged: dict[int, tuple[int, int]] = {}  # expert -> (body's number, version)
    enough = threading.Event()

    def push_until_the_daemon_dies():
        stream = writer.stream("b")
        number = 0
        try:
            while True:
                for expert in range(8):
                    number += 1
                    base = acknowledged.get(expert, (0, 0))[1]
                    outcome = stream.push(expert, writer.random_body(number), base_version=base, push_number=number)
                    acknowledged[expert] = (number, outcome.version)
                    if number == 50:
                        enough.set()
        except grpc.RpcError:
            stream.hang_up()

    thread = threading.Thread(target=push_until_the_daemon_dies)
    thread.start()
    assert enough.wait(60)
    daemon.kill()
    thread.join()
    client = connect(daemon.start().target)
    got = client.fetch("b", range(8))
    for expert, (number, version) in acknowledged.items():
        if got[expert].header.version == version:
            assert got[expert].body == client.random_body(number)
        else:  # The one push that was committed and whose acknowledgement was lost.
            assert got[expert].header.version > version
            assert got[expert].body == client.random_body(number + 8)
    newest = max(got[expert].header.version for expert in got)
    assert min(client.put("b", {0: client.random_body(0)}, push_number=10_000).values()) > newest


def test_a_push_repeated_after_a_crash_gets_its_first_outcome(daemon, writer, connect):
    stream = writer.stream("b")
    first = stream.push(1, writer.random_body(1), base_version=0, push_number=9)
    daemon.restart()
    client = connect(daemon.target)
    assert client.stream("b").push(1, client.random_body(1), base_version=0, push_number=9) == first
    access = client.stats().total
    assert (access.push_repeats, access.pushed_experts) == (1, 0)


def test_banks_snapshots_and_slots_in_use_come_back_after_a_crash(daemon, writer, connect):
    writer.put("b", {1: writer.random_body(1)})
    snapshot = writer.snapshot(["b"], name="kept")
    writer.put("b", {1: writer.random_body(2), 2: writer.random_body(3)}, push_number=2)
    used = writer.stats().nvme.used_bytes
    bank = writer.create("b")
    daemon.restart()
    client = connect(daemon.target)
    assert client.create("b") == bank
    assert client.stats().nvme.used_bytes == used
    assert list(client.call(client.snapshots.ListSnapshots, snapshot_pb2.ListSnapshotsRequest()).snapshots) == [snapshot]
    # The push allocates free slots only.
    client.put("b", {expert: client.random_body(10 + expert) for expert in range(3, 8)}, push_number=3)
    assert (client.body("b", 1), client.body("b", 2)) == (client.random_body(2), client.random_body(3))
    client.call(client.snapshots.RestoreSnapshot, snapshot_pb2.RestoreSnapshotRequest(id=snapshot.id))
    assert client.body("b", 1) == client.random_body(1)


def test_an_orderly_stop_keeps_everything_too(daemon, writer, connect):
    versions = writer.put("b", {1: writer.random_body(1)})
    assert daemon.stop() == 0
    got = connect(daemon.start().target).fetch("b", [1])[1]
    assert (got.body, got.header.version) == (writer.random_body(1), versions[1])
    assert got.header.served_from == expert_pb2.TIER_NVME


def test_records_on_disk_name_their_origin(daemon, writer):
    versions = writer.put("b", {5: writer.random_body(5)})
    record = slab(daemon, writer).read_bytes()[: writer.layout.record_bytes]
    header = RecordHeader.unpack(memoryview(record), what="slot 0")
    assert (header.expert, header.version) == (5, versions[5])
    assert record[4096:] == writer.random_body(5)


def test_a_flipped_byte_damages_its_expert_alone_and_is_never_served(daemon, writer, connect):
    writer.put("b", {expert: writer.random_body(expert) for expert in range(4)})
    daemon.stop()
    path = slab(daemon, writer)
    content = bytearray(path.read_bytes())
    position = content.index(writer.random_body(2)) + 5000
    content[position] ^= 1
    path.write_bytes(content)
    client = connect(daemon.start().target)
    for _ in range(2):
        got = client.fetch("b", range(4))
        assert {expert: each.header.error.kind for expert, each in got.items()} == {0: "", 1: "", 2: CorruptRecord.__name__, 3: ""}
        assert got[2].body == b""
        assert "expert 2" in got[2].header.error.message
    assert client.stats().nvme.num_corrupt == 2
    client.put("b", {3: client.random_body(9)}, push_number=2)
    stream = client.stream("b")  # A new write heals it.
    assert stream.push(2, client.random_body(8), base_version=got[2].header.version, push_number=3).version > 0
    stream.close()
    assert client.body("b", 2) == client.random_body(8)


def test_a_slab_that_lost_its_end_damages_only_what_lay_there(daemon, writer, connect):
    writer.put("b", {expert: writer.random_body(expert) for expert in range(4)})
    daemon.stop()
    with slab(daemon, writer).open("r+b") as file:
        file.truncate(3 * writer.layout.record_bytes)
    got = connect(daemon.start().target).fetch("b", range(4))
    assert sorted(each.header.error.kind for each in got.values()) == ["", "", "", CorruptRecord.__name__]


def test_a_bank_many_times_the_dram_tier_is_served_whole(start_daemon, connect):
    client = connect(start_daemon(dram_bytes="96KiB").target)  # Room for eight records.
    client.create("b", num_experts=64)
    bodies = {expert: client.random_body(expert) for expert in range(0, 64, 2)}
    client.put("b", bodies)
    for _ in range(2):
        got = client.fetch("b", range(64))
        assert all(got[expert].body == bodies.get(expert, client.seeded(expert)) for expert in range(64))
    stats = client.stats()
    assert stats.dram.evictions > 64
    assert stats.dram.used_bytes <= stats.dram.capacity_bytes == 96 << 10
    assert stats.total.nvme_reads > 0
    client.fetch("b", [1, 2])
    before = client.stats().total
    assert {each.header.served_from for each in client.fetch("b", [1, 2]).values()} == {expert_pb2.TIER_DRAM}
    assert client.stats().total.hits == before.hits + 2


class Syncs:
    """Makes fdatasync of slabs fail a number of times, for one record size or for all. Other files sync as usual."""

    def __init__(self, monkeypatch) -> None:
        self.num_failures, self.record_bytes, self.num_calls = 0, 0, 0
        real = os.fdatasync

        def fdatasync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith(".slab") and (not self.record_bytes or path.endswith(f"/{self.record_bytes}.slab")):
                self.num_calls += 1
                if self.num_failures:
                    self.num_failures -= 1
                    raise OSError(errno.EIO, "injected")
            real(fd)

        monkeypatch.setattr(os, "fdatasync", fdatasync)


@pytest.fixture
def syncs(monkeypatch):
    return Syncs(monkeypatch)


def slots(store, *experts):
    return {store.bank.record(expert).slot.index for expert in experts}


def test_what_a_failed_sync_was_for_is_written_anew_to_other_slots_that_alone_are_used_from_then_on(tmp_path, syncs):
    async def scenario():
        async with opened(tmp_path, records=32) as store:
            for tries in (1, 2):
                syncs.num_failures = tries
                assert (await store.push_one(0, tries)).durable
                assert slots(store, 0) == {1 if tries == 1 else 4}  # 0, 2, 3: their content is unknown.
            await store.push({expert: body_of(expert) for expert in range(1, 12)})
            assert slots(store, *range(12)).isdisjoint({0, 2, 3})
            stats = store.stats
            assert (stats.nvme.used_bytes, stats.dram.pinned_bytes) == (12 * RECORD, 0)
        async with opened(tmp_path) as store:
            assert await store.bodies(0, 5) == {0: body_of(2), 5: body_of(5)}

    asyncio.run(scenario())


def test_when_syncs_go_on_failing_the_push_is_refused_and_the_store_recovers_with_the_disk(tmp_path, syncs):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push_one(0, 1)
            syncs.num_failures, syncs.num_calls = 1000, 0
            refused = await store.push_one(0, 2)
            assert (refused.error.kind, syncs.num_calls) == ("Internal", 3)
            assert await store.bodies(0, 1) == {0: body_of(1), 1: SEEDED}
            syncs.num_failures = 0
            assert (await store.push_one(0, 3)).durable
            assert store.stats.nvme.used_bytes == RECORD
        async with opened(tmp_path) as store:
            assert await store.bodies(0) == {0: body_of(3)}

    asyncio.run(scenario())


def test_a_failed_sync_casts_doubt_on_writes_that_only_wait_for_the_next_one(tmp_path, monkeypatch):
    """Of two pushes, the sync of one fails. The other was written before that, and its own sync succeeds afterwards."""
    in_sync, go_on = threading.Event(), threading.Event()
    real, num_calls = os.fdatasync, 0

    def fdatasync(fd):
        nonlocal num_calls
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".slab"):
            num_calls += 1
            if num_calls == 1:
                in_sync.set()
                assert go_on.wait(30)
                raise OSError(errno.EIO, "injected")
        real(fd)

    async def scenario():
        async with opened(tmp_path) as store:
            monkeypatch.setattr(os, "fdatasync", fdatasync)
            first = asyncio.create_task(store.push({0: body_of(0), 1: body_of(1)}))
            await until(in_sync.is_set)
            await until(lambda: store.stats.nvme.writes == 2)
            go_on.set()
            assert all(outcome.durable for outcome in (await first).values())
            assert slots(store, 0, 1).isdisjoint({0, 1})
            assert store.stats.nvme.writes == 4

    asyncio.run(scenario())


def test_a_slab_whose_sync_fails_holds_up_no_other(tmp_path, syncs):
    other_layout = Layout(parameters=(TensorSpec(name="w", shape=(3000,)),))

    async def scenario():
        async with opened(tmp_path) as store:
            await store.engine.changes.create_bank(BankSpec(name="other", num_experts=2, layout=other_layout))
            syncs.record_bytes, syncs.num_failures = other_layout.record_bytes, 1000
            async with store.engine.committer.exclusive():  # So that both are in one round.
                pushing = asyncio.create_task(store.push_one(0, 1))
                refused = asyncio.create_task(push_to_other(store, other_layout))
                await until(lambda: len(store.waiting) == 2)
            assert (await pushing).durable
            assert (await refused).error.kind == "Internal"

    async def push_to_other(store, layout):
        body = bytes(layout.body_bytes)
        writer = store.engine.open_writer("other", "w", store.scopes)
        sums = Checksums.of(layout, memoryview(body))
        await writer.begin(
            expert_pb2.PushHeader(expert=0, push_number=1, parameter_bytes=layout.parameter_bytes, parameter_xxh3=sums.parameters)
        )
        for chunk in chunks(memoryview(body)):
            writer.add(chunk)
        await writer.wait_outcomes()
        writer.close()
        return writer.outcomes.get_nowait()

    asyncio.run(scenario())
    assert LAYOUT.record_bytes != other_layout.record_bytes

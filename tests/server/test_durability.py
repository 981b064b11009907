"""What survives: kill -9, restarts, damaged files, a DRAM tier that is far too small."""

import threading

import grpc
import pytest

from ooc_moe_wire.codec import RecordHeader
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.v1 import expert_pb2, snapshot_pb2


@pytest.fixture
def writer(daemon, connect):
    """A client of the test's own daemon, with a bank "b"."""
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
    client.put("b", {expert: client.random_body(10 + expert) for expert in range(3, 8)}, push_number=3)  # Takes free slots only.
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

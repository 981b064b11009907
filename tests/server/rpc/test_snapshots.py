"""SnapshotService, by plain stubs against a daemon."""

import pytest

from ooc_moe_wire.errors import InvalidRequest, NotTheWriter, SnapshotExists, UnknownBank, UnknownSnapshot
from ooc_moe_wire.v1 import bank_pb2, expert_pb2, snapshot_pb2


def restore(client, snapshot_id, writer_id=""):
    return client.call(client.snapshots.RestoreSnapshot, snapshot_pb2.RestoreSnapshotRequest(id=snapshot_id, writer_id=writer_id))


def delete(client, snapshot_id):
    return client.call(client.snapshots.DeleteSnapshot, snapshot_pb2.DeleteSnapshotRequest(id=snapshot_id))


def listed(client, bank=""):
    return client.call(client.snapshots.ListSnapshots, snapshot_pb2.ListSnapshotsRequest(bank=bank)).snapshots


def test_a_restore_brings_every_expert_back_under_newer_versions(client, bank):
    client.put(bank, {1: client.random_body(1)})
    snapshot = client.snapshot([bank])
    newest = max(client.put(bank, {1: client.random_body(2), 2: client.random_body(3)}, push_number=2).values())
    restore(client, snapshot.id)
    got = client.fetch(bank, [0, 1, 2])
    assert [bytes(got[expert].body) for expert in range(3)] == [client.seeded(0), client.random_body(1), client.seeded(2)]
    assert got[0].header.version == 0
    assert min(got[1].header.version, got[2].header.version) > newest


def test_an_expert_restored_to_its_seed_shows_as_such_and_takes_pushes(client, bank):
    snapshot = client.snapshot([bank])
    client.put(bank, {1: client.random_body(1)})
    restore(client, snapshot.id)
    info = client.call(client.experts.ListExperts, expert_pb2.ListExpertsRequest(bank=bank)).experts[1]
    assert (list(info.tiers), info.parameter_xxh3) == ([expert_pb2.TIER_SEED], 0)
    assert info.version > 0
    client.put(bank, {1: client.random_body(2)}, push_number=2)
    assert client.body(bank, 1) == client.random_body(2)


def test_a_push_from_before_a_restore_is_stale_after_it_even_when_repeated(client, bank):
    client.put(bank, {1: client.random_body(1)}, push_number=7)
    restore(client, client.snapshot([bank]).id)
    stream = client.stream(bank)
    assert stream.push(1, client.random_body(1), base_version=0, push_number=7).error.kind == "StaleVersion"
    stream.close()


def test_a_restore_keeps_the_banks_size(client, bank):
    snapshot = client.snapshot([bank])
    client.call(client.banks.GrowBank, bank_pb2.GrowBankRequest(bank=bank, num_experts=10))
    client.put(bank, {9: client.random_body(9)})
    restore(client, snapshot.id)
    assert client.body(bank, 9) == client.seeded(9)


def test_a_restore_is_refused_to_all_but_the_open_writer(client, bank):
    client.put(bank, {1: client.random_body(1)})
    snapshot = client.snapshot([bank])
    stream = client.stream(bank, "trainer")
    for writer_id in ("", "stranger"):
        with client.refused(NotTheWriter, "trainer"):
            restore(client, snapshot.id, writer_id)
    restore(client, snapshot.id, "trainer")
    stream.close()


def test_slots_are_freed_when_neither_bank_nor_snapshot_refers_to_them(client, bank):
    record_bytes, before = client.layout.record_bytes, client.stats().nvme.used_bytes
    client.put(bank, {1: client.random_body(1)})
    client.put(bank, {1: client.random_body(2)}, push_number=2)
    assert client.stats().nvme.used_bytes == before + record_bytes  # The replaced record is gone.
    snapshot = client.snapshot([bank])
    client.put(bank, {1: client.random_body(3)}, push_number=3)
    assert client.stats().nvme.used_bytes == before + 2 * record_bytes  # The snapshot keeps its record.
    delete(client, snapshot.id)
    assert client.stats().nvme.used_bytes == before + record_bytes


def test_a_snapshot_of_several_banks_is_one_cut(client, bank):
    client.create(bank + "-2")
    client.put(bank, {1: client.random_body(1)})
    client.put(bank + "-2", {1: client.random_body(2)}, writer_id="other")
    snapshot = client.snapshot([bank, bank + "-2"], name=bank)
    assert (list(snapshot.banks), snapshot.num_experts, snapshot.bytes) == ([bank, bank + "-2"], 2, 2 * client.layout.record_bytes)
    client.put(bank, {1: client.random_body(3)}, push_number=2)
    client.put(bank + "-2", {1: client.random_body(4)}, push_number=2, writer_id="other")
    restore(client, snapshot.id)
    assert (client.body(bank, 1), client.body(bank + "-2", 1)) == (client.random_body(1), client.random_body(2))
    assert [each.id for each in listed(client, bank + "-2")] == [snapshot.id]


def test_a_name_makes_a_snapshot_repeatable_and_no_name_makes_another(client, bank):
    named = client.snapshot([bank], name="mine")
    assert client.snapshot([bank], name="mine") == named
    client.create("elsewhere")
    with client.refused(SnapshotExists, "mine"):
        client.snapshot(["elsewhere"], name="mine")
    unnamed = [client.snapshot([bank]), client.snapshot([bank])]
    assert [each.name for each in unnamed] == [f"snapshot-{each.id}" for each in unnamed]
    assert [each.id for each in listed(client, bank)] == [unnamed[1].id, unnamed[0].id, named.id]


def test_a_snapshot_named_like_the_next_default_does_not_block_it(client, bank):
    taken = client.snapshot([bank]).id + 2
    client.snapshot([bank], name=f"snapshot-{taken}")
    assert client.snapshot([bank]).name == f"snapshot-{taken + 1}"


@pytest.mark.parametrize("banks", [[], ["twice", "twice"]])
def test_a_list_of_no_banks_or_of_one_twice_is_refused(client, banks):
    with client.refused(InvalidRequest, "banks"):
        client.snapshot(banks)


def test_unknown_banks_and_snapshots_are_refused(client, bank):
    with client.refused(UnknownBank, "nowhere"):
        client.snapshot([bank, "nowhere"])
    snapshot = client.snapshot([bank])
    delete(client, snapshot.id)
    for call in (delete, restore):
        with client.refused(UnknownSnapshot, str(snapshot.id)):
            call(client, snapshot.id)


def test_deleting_a_bank_takes_its_part_out_of_snapshots(client, bank):
    client.create(bank + "-2")
    alone, both = client.snapshot([bank]), client.snapshot([bank, bank + "-2"])
    client.call(client.banks.DeleteBank, bank_pb2.DeleteBankRequest(bank=bank))
    shown = {each.id: list(each.banks) for each in listed(client)}
    assert alone.id not in shown
    assert shown[both.id] == [bank + "-2"]

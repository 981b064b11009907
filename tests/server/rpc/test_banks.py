"""BankService, by plain stubs against a daemon."""

from dataclasses import replace

import pytest

from ooc_moe_wire.errors import BankExists, InvalidRequest, NotTheWriter, UnknownBank, UnknownExpert, UnknownSnapshot
from ooc_moe_wire.v1 import bank_pb2


def create(client, spec):
    return client.call(client.banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec.to_proto()))


def grow(client, bank, num_experts):
    return client.call(client.banks.GrowBank, bank_pb2.GrowBankRequest(bank=bank, num_experts=num_experts))


def fork(client, source, name, snapshot_id=0):
    return client.call(client.banks.ForkBank, bank_pb2.ForkBankRequest(source=source, name=name, snapshot_id=snapshot_id))


def delete(client, bank):
    return client.call(client.banks.DeleteBank, bank_pb2.DeleteBankRequest(bank=bank))


def get(client, bank):
    return client.call(client.banks.GetBank, bank_pb2.GetBankRequest(bank=bank))


def test_creating_an_equal_bank_again_answers_the_bank_as_it_stands(client, bank):
    grow(client, bank, 12)
    again = create(client, client.spec(bank, num_experts=8))
    assert again.spec.num_experts == 12
    assert again.record_bytes == client.layout.record_bytes


@pytest.mark.parametrize("change", [{"seed": 2}, {"layout": "wider"}])
def test_another_spec_under_a_taken_name_is_refused(client, bank, change):
    spec = client.spec(bank)
    if change == {"layout": "wider"}:
        change = {"layout": replace(spec.layout, optimizer=())}
    with client.refused(BankExists, bank):
        create(client, replace(spec, **change))


def test_a_malformed_spec_is_refused_naming_the_field(client):
    specs = {word: client.spec("fine").to_proto() for word in ("bank name", "num_experts", "dtype", "algorithm", "repeat")}
    specs["bank name"].name = "no spaces"
    specs["num_experts"].num_experts = 0
    specs["dtype"].parameters[0].dtype = "float128"
    specs["algorithm"].parameters[0].initializer.algorithm = "normal_v0"
    specs["repeat"].optimizer[0].name = "w"
    for word, spec in specs.items():
        with client.refused(InvalidRequest, word):
            client.call(client.banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec))


def test_a_record_that_the_dram_tier_cannot_hold_is_refused_with_both_sizes(client, shared_daemon, connect):
    spec = bank_pb2.BankSpec(name="huge", num_experts=1, parameters=[bank_pb2.Tensor(name="w", shape=[32 << 20], dtype="uint8")])
    with client.refused(InvalidRequest, str((32 << 20) + 4096), str(32 << 20)):
        client.call(client.banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec))


def test_a_bank_grows_and_never_shrinks(client, bank):
    with client.refused(UnknownExpert, "expert 9"):
        client.fetch(bank, [9])
    assert grow(client, bank, 10).spec.num_experts == 10
    assert client.body(bank, 9) == client.seeded(9)
    assert grow(client, bank, 3).spec.num_experts == 10
    with client.refused(InvalidRequest, "num_experts"):
        grow(client, bank, 1 << 41)


def test_every_call_on_an_unknown_bank_says_so(client):
    for call in (get, delete, lambda client, name: grow(client, name, 3), lambda client, name: fork(client, name, "other")):
        with client.refused(UnknownBank, "nowhere"):
            call(client, "nowhere")


def test_banks_are_listed_by_name(client, bank):
    client.create("a-first")
    names = [each.spec.name for each in client.call(client.banks.ListBanks, bank_pb2.ListBanksRequest()).banks]
    assert names == sorted(names)
    assert {"a-first", bank} <= set(names)


def test_a_bank_tells_what_was_written_and_who_writes(client, bank):
    versions = client.put(bank, {1: client.random_body(1), 2: client.random_body(2)})
    stream = client.stream(bank, "someone")
    state = get(client, bank)
    assert (state.num_written, state.newest_version, state.writer_id) == (2, max(versions.values()), "someone")
    stream.close()
    assert get(client, bank).writer_id == ""


def test_a_deleted_bank_is_gone_and_its_name_is_free(client, bank):
    client.put(bank, {1: client.random_body(1)})
    used = client.stats().nvme.used_bytes
    delete(client, bank)
    assert client.stats().nvme.used_bytes == used - client.layout.record_bytes
    with client.refused(UnknownBank):
        delete(client, bank)
    client.create(bank)
    assert client.body(bank, 1) == client.seeded(1)


def test_a_bank_with_an_open_writer_is_not_deleted(client, bank):
    stream = client.stream(bank, "busy")
    with client.refused(NotTheWriter, "busy"):
        delete(client, bank)
    stream.close()
    delete(client, bank)


def test_a_fork_shares_bytes_under_new_versions_and_then_parts(client, bank):
    body = client.random_body(1)
    versions = client.put(bank, {1: body})
    used = client.stats().nvme.used_bytes
    forked = fork(client, bank, bank + "-fork")
    assert (forked.forked_from, forked.num_written) == (bank, 1)
    assert client.stats().nvme.used_bytes == used
    got = client.fetch(bank + "-fork", [0, 1])
    assert got[1].body == body
    assert got[1].header.version > versions[1]
    assert (got[0].body, got[0].header.version) == (client.seeded(0), 0)
    client.put(bank + "-fork", {1: client.random_body(2)}, writer_id="forker")
    assert client.body(bank, 1) == body
    delete(client, bank)
    assert client.body(bank + "-fork", 1) == client.random_body(2)


def test_a_fork_of_a_snapshot_has_the_snapshots_size_and_values(client, bank):
    client.put(bank, {1: client.random_body(1)})
    snapshot = client.snapshot([bank])
    client.put(bank, {1: client.random_body(2)}, push_number=2)
    grow(client, bank, 20)
    assert fork(client, bank, bank + "-old", snapshot.id).spec.num_experts == 8
    assert client.body(bank + "-old", 1) == client.random_body(1)


def test_a_fork_is_refused_for_a_taken_name_a_bad_name_and_a_foreign_snapshot(client, bank):
    client.create("stranger")
    with client.refused(BankExists):
        fork(client, bank, "stranger")
    with client.refused(InvalidRequest, "bank name"):
        fork(client, bank, "no spaces")
    with client.refused(UnknownSnapshot, "999999"):
        fork(client, bank, "other", 999999)
    with client.refused(UnknownSnapshot, "stranger"):
        fork(client, "stranger", "other", client.snapshot([bank]).id)

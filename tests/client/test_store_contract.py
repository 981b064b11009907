"""What every store of experts does: one suite for the fake in memory and for a daemon over TCP, a Unix socket and the local plane."""

import numpy as np
import pytest

from ooc_moe_client.store import Durability, ExpertStore, PrefetchState, Push, Sections, Tier
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import (
    BankExists,
    InvalidRequest,
    LostUpdate,
    NotTheWriter,
    SnapshotExists,
    StaleVersion,
    UnknownBank,
    UnknownExpert,
    UnknownSnapshot,
)
from ooc_moe_wire.layout import Layout, TensorSpec
from ooc_moe_wire.v1 import stats_pb2
from tests.client.conftest import LAYOUT, NUM_EXPERTS, Connect, body, read, spec, write

# Banks


def test_creating_an_equal_bank_again_answers_the_bank_as_it_stands(connect: Connect, bank: str):
    store = connect()
    made = store.create_bank(spec(bank))
    assert (made.spec, made.num_written, made.newest_version, made.writer_id) == (spec(bank), 0, 0, "")
    assert made.record_bytes == LAYOUT.record_bytes
    store.grow_bank(bank, NUM_EXPERTS + 4)
    assert store.create_bank(spec(bank)).spec.num_experts == NUM_EXPERTS + 4


@pytest.mark.parametrize("change", [{"seed": 8}, {"layout": Layout(parameters=LAYOUT.parameters)}])
def test_a_bank_of_another_spec_is_refused(connect: Connect, bank: str, change: dict):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(BankExists, match=bank):
        store.create_bank(spec(bank, **change))


def test_growing_never_shrinks(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    assert store.grow_bank(bank, NUM_EXPERTS + 2).spec.num_experts == NUM_EXPERTS + 2
    assert store.grow_bank(bank, 1).spec.num_experts == NUM_EXPERTS + 2
    assert read(store, bank, [NUM_EXPERTS + 1])[NUM_EXPERTS + 1][0] == 0


def test_banks_are_listed_by_name_and_gone_once_deleted(connect: Connect, bank: str):
    store = connect()
    names = [f"{bank}/b", f"{bank}/a"]
    for name in names:
        store.create_bank(spec(name))
    assert [known.spec.name for known in store.list_banks() if known.spec.name in names] == sorted(names)
    store.delete_bank(names[0])
    assert [known.spec.name for known in store.list_banks() if known.spec.name in names] == names[1:]
    with pytest.raises(UnknownBank, match=names[0]):
        store.get_bank(names[0])
    with pytest.raises(UnknownBank, match=names[0]):
        store.delete_bank(names[0])


def test_a_deleted_bank_may_come_back_with_another_layout(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    read(store, bank, [0])
    store.delete_bank(bank)
    other = Layout(parameters=(TensorSpec(name="wide", shape=(2000,)),))
    connect().create_bank(spec(bank, layout=other))
    memory = bytearray(other.body_bytes)
    assert [item.version for item in store.fetch(bank, [1], into=lambda _: memoryview(memory))] == [0]


def test_whatever_is_asked_of_an_unknown_bank_names_it(connect: Connect, bank: str):
    store = connect()
    for call in (
        lambda: store.get_bank(bank),
        lambda: store.grow_bank(bank, 3),
        lambda: store.delete_bank(bank),
        lambda: store.fork_bank(bank, f"{bank}-fork"),
        lambda: read(store, bank, [0]),
        lambda: write(store, bank, {0: 1.0}),
        lambda: store.open_for_writing(bank),
        lambda: store.prefetch(bank, [0]),
        lambda: list(store.list_experts(bank)),
        lambda: store.create_snapshot([bank]),
    ):
        with pytest.raises(UnknownBank, match=bank):
            call()


# Fetching


def test_an_unwritten_expert_is_made_from_its_seed(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    expected = bytearray(LAYOUT.body_bytes)
    for expert, (version, got) in read(store, bank, range(NUM_EXPERTS)).items():
        LAYOUT.initialize(expected, seed=7, expert=expert)
        assert version == 0
        assert got == expected


def test_the_parameters_alone_are_a_prefix_of_the_whole(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    versions = write(store, bank, {2: 5.0})
    memory = bytearray(LAYOUT.parameter_bytes)
    (fetched,) = store.fetch(bank, [2], into=lambda _: memoryview(memory), sections=Sections.PARAMETERS)
    assert fetched.version == versions[2]
    assert memory == body(5.0)[: LAYOUT.parameter_bytes]


def test_an_expert_that_is_known_moves_no_bytes(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    versions = write(store, bank, {0: 1.0, 1: 2.0})
    memory = bytearray(LAYOUT.body_bytes)
    fetched = {
        item.expert: item
        for item in store.fetch(bank, [0, 1, 2, 3], into=lambda _: memoryview(memory), known_versions=[versions[0], None, 0, 17])
    }
    assert {expert for expert, item in fetched.items() if item.unchanged} == {0, 2}
    assert {expert: item.version for expert, item in fetched.items()} == {0: versions[0], 1: versions[1], 2: 0, 3: 0}


def test_where_an_expert_was_found_is_told(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    memory = bytearray(LAYOUT.body_bytes)
    tiers = [item.served_from for _ in range(2) for item in store.fetch(bank, [4], into=lambda _: memoryview(memory))]
    assert tiers == [Tier.SEED, Tier.DRAM]


@pytest.mark.parametrize(
    ("experts", "known", "message"),
    [([], None, "empty"), ([1, 2, 1], None, "expert 1 is repeated"), ([-1], None, "expert -1"), ([1, 2], [0], "1 known_versions")],
)
def test_a_malformed_fetch_is_refused_before_anything_comes(connect: Connect, bank: str, experts: list, known: list, message: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(InvalidRequest, match=message):
        list(store.fetch(bank, experts, into=lambda _: pytest.fail("asked for memory"), known_versions=known))


def test_an_expert_outside_the_bank_is_named_before_anything_comes(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(UnknownExpert, match=str(NUM_EXPERTS)):
        list(store.fetch(bank, [0, NUM_EXPERTS], into=lambda _: pytest.fail("asked for memory")))
    with pytest.raises(UnknownExpert, match="17"):
        store.prefetch(bank, [17])


def test_memory_of_another_size_is_refused(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(InvalidRequest, match="expert 0"):
        list(store.fetch(bank, [0], into=lambda _: memoryview(bytearray(17))))


def test_a_fetch_may_be_left_in_the_middle(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    memory = bytearray(LAYOUT.body_bytes)
    fetching = store.fetch(bank, range(NUM_EXPERTS), into=lambda _: memoryview(memory))
    next(fetching)
    fetching.close()
    assert len(read(store, bank, range(NUM_EXPERTS))) == NUM_EXPERTS


# Pushing


def test_what_was_pushed_is_fetched_by_everyone_under_a_newer_version(connect: Connect, bank: str):
    writer, reader = connect(), connect()
    writer.create_bank(spec(bank))
    first = write(writer, bank, {3: 1.0, 1: 2.0})
    second = write(writer, bank, {3: 3.0}, first)
    assert 0 < min(first.values()) < max(first.values()) < second[3]
    assert read(reader, bank, [1, 3, 0]) == {
        1: (first[1], body(2.0)),
        3: (second[3], body(3.0)),
        0: read(writer, bank, [0])[0],
    }
    known = reader.get_bank(bank)
    assert (known.num_written, known.newest_version) == (2, second[3])
    assert known.writer_id != ""


def test_an_update_of_an_older_version_is_refused_and_the_others_are_written(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    first = write(store, bank, {0: 1.0})
    outcomes = write(store, bank, {0: 9.0, 1: 2.0}, {0: 0})
    assert isinstance(outcomes[0], StaleVersion)
    assert "expert 0" in str(outcomes[0])
    assert read(store, bank, [0, 1]) == {0: (first[0], body(1.0)), 1: (outcomes[1], body(2.0))}


def test_an_update_of_a_version_that_is_gone_is_a_lost_update(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    versions = write(store, bank, {0: 1.0})
    outcomes = write(store, bank, {0: 2.0, 1: 2.0, 2: 2.0}, {0: versions[0] + 1, 1: versions[0]})
    assert isinstance(outcomes[0], LostUpdate)
    assert isinstance(outcomes[1], LostUpdate)
    assert isinstance(outcomes[2], int)
    assert read(store, bank, [0])[0] == (versions[0], body(1.0))


def test_a_push_to_memory_is_visible_at_once_and_built_upon(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    version = 0
    for value in (1.0, 2.0, 3.0):
        pushed = Push(expert=4, base_version=version, body=body(value))
        (outcome,) = store.push(bank, [pushed], durability=Durability.MEMORY)
        assert isinstance(outcome, int)
        assert outcome > version
        version = outcome
        assert read(store, bank, [4])[4] == (version, body(value))
    (durable,) = store.push(bank, [Push(expert=4, base_version=version, body=body(4.0))])
    assert read(connect(), bank, [4])[4] == (durable, body(4.0))


def test_what_was_taken_back_on_purpose_is_no_lost_update(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    taken = store.create_snapshot([bank])
    write(store, bank, {0: 1.0, 1: 1.0})
    store.restore_snapshot(taken.id)
    seeded = bytearray(LAYOUT.body_bytes)
    LAYOUT.initialize(seeded, seed=7, expert=0)
    assert read(store, bank, [0])[0][1] == seeded
    store.release(bank)
    store.delete_bank(bank)
    store.create_bank(spec(bank))
    assert read(store, bank, [0, 1])[0] == (0, seeded)
    assert isinstance(write(store, bank, {0: 5.0})[0], int)


def test_a_push_of_an_expert_outside_the_bank_is_its_outcome(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    outcomes = write(store, bank, {NUM_EXPERTS: 1.0, 0: 1.0})
    assert isinstance(outcomes[NUM_EXPERTS], UnknownExpert)
    assert isinstance(outcomes[0], int)


@pytest.mark.parametrize("num_bytes", [0, 4096, LAYOUT.body_bytes - 1, LAYOUT.body_bytes + 1, 2 * LAYOUT.body_bytes])
def test_a_body_of_another_length_is_refused_and_nothing_of_the_call_is_written(connect: Connect, bank: str, num_bytes: int):
    store = connect()
    store.create_bank(spec(bank))
    pushes = [Push(expert=0, base_version=0, body=body(1.0)), Push(expert=1, base_version=0, body=bytes(num_bytes))]
    with pytest.raises(InvalidRequest, match=f"expert 1: body is {num_bytes} bytes"):
        store.push(bank, pushes)
    assert store.get_bank(bank).num_written == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["b1", "w1.exp_avg"])
def test_nan_and_infinity_are_refused_naming_expert_and_tensor(connect: Connect, bank: str, value: float, tensor: str):
    store = connect()
    store.create_bank(spec(bank))
    spoilt = body(1.0)
    LAYOUT.arrays(spoilt)[tensor].flat[-1] = value
    with pytest.raises(InvalidRequest, match=f"expert 4: tensor '{tensor}'"):
        store.push(bank, [Push(expert=0, base_version=0, body=body(1.0)), Push(expert=4, base_version=0, body=spoilt)])
    assert store.get_bank(bank).num_written == 0


def test_an_expert_pushed_twice_in_one_call_is_refused(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(InvalidRequest, match="expert 2 is repeated"):
        store.push(bank, [Push(expert=2, base_version=0, body=body(1.0))] * 2)


def test_a_second_writer_is_refused_until_the_first_releases_the_bank(connect: Connect, bank: str):
    first, second = connect(), connect()
    first.create_bank(spec(bank))
    versions = write(first, bank, {0: 1.0})
    with pytest.raises(NotTheWriter, match=bank):
        second.open_for_writing(bank)
    with pytest.raises(NotTheWriter, match=bank):
        write(second, bank, {1: 1.0})
    assert read(second, bank, [0])[0][0] == versions[0]
    first.release(bank)
    first.release(bank)
    assert isinstance(write(second, bank, {0: 2.0}, versions)[0], int)
    with pytest.raises(NotTheWriter, match=bank):
        write(first, bank, {1: 1.0})


def test_a_bank_is_held_from_its_opening_on(connect: Connect, bank: str):
    first, second = connect(), connect()
    first.create_bank(spec(bank))
    first.open_for_writing(bank)
    first.open_for_writing(bank)
    with pytest.raises(NotTheWriter):
        second.open_for_writing(bank)
    first.close()
    second.open_for_writing(bank)
    assert second.get_bank(bank).writer_id != ""


def test_an_open_bank_is_not_deleted(connect: Connect, bank: str):
    first, second = connect(), connect()
    first.create_bank(spec(bank))
    first.open_for_writing(bank)
    with pytest.raises(NotTheWriter, match=bank):
        second.delete_bank(bank)
    assert second.get_bank(bank).spec == spec(bank)


# Prefetching, listing


def test_a_prefetched_expert_is_in_dram_afterwards(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    assert store.prefetch(bank, [5]) == [PrefetchState.QUEUED]
    read(store, bank, [5])
    assert store.prefetch(bank, [5]) == [PrefetchState.RESIDENT]
    assert store.cancel_prefetch(bank) == 0


def test_all_experts_are_listed_with_versions_and_checksums(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank, num_experts=2500))
    versions = write(store, bank, {1700: 4.0})
    listed = list(store.list_experts(bank))
    assert [info.expert for info in listed] == list(range(2500))
    assert {info.expert: info.version for info in listed if info.version} == versions
    expected = Checksums.of(LAYOUT, memoryview(body(4.0)))
    assert (listed[1700].parameter_xxh3, listed[1700].optimizer_xxh3) == (expected.parameters, expected.optimizer)
    assert listed[3].tiers == (Tier.SEED,)
    assert {info.record_bytes for info in listed} == {LAYOUT.record_bytes}


# Snapshots and forks


def test_a_snapshot_brings_back_what_it_took_under_newer_versions(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    first = write(store, bank, {0: 1.0, 1: 1.0})
    taken = store.create_snapshot([bank])
    assert (taken.banks, taken.num_experts) == ((bank,), 2)
    second = write(store, bank, {1: 2.0, 2: 2.0}, first)
    assert store.restore_snapshot(taken.id).id == taken.id
    restored = read(store, bank, [0, 1, 2])
    assert {expert: got for expert, (_, got) in restored.items()} == {0: body(1.0), 1: body(1.0), 2: restored[2][1]}
    assert restored[0][0] > second[2]
    assert restored[1][0] > second[2]
    seeded = bytearray(LAYOUT.body_bytes)
    LAYOUT.initialize(seeded, seed=7, expert=2)
    assert restored[2][1] == seeded
    assert isinstance(write(store, bank, {2: 9.0}, second)[2], StaleVersion)
    versions = {expert: version for expert, (version, _) in restored.items()}
    assert all(isinstance(outcome, int) for outcome in write(store, bank, {0: 3.0, 1: 3.0, 2: 3.0}, versions).values())


def test_snapshots_are_listed_newest_first_and_deleted(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    taken = [store.create_snapshot([bank], name=f"{bank}-{name}") for name in "ab"]
    assert store.list_snapshots(bank) == taken[::-1]
    assert store.create_snapshot([bank], name=f"{bank}-a") == taken[0]
    store.delete_snapshot(taken[0].id)
    assert store.list_snapshots(bank) == taken[1:]
    for call in (store.delete_snapshot, store.restore_snapshot):
        with pytest.raises(UnknownSnapshot, match=str(taken[0].id)):
            call(taken[0].id)


def test_the_name_of_another_banks_snapshot_is_refused(connect: Connect, bank: str):
    store = connect()
    for name in (bank, f"{bank}-other"):
        store.create_bank(spec(name))
    store.create_snapshot([bank], name=bank)
    with pytest.raises(SnapshotExists, match=bank):
        store.create_snapshot([f"{bank}-other"], name=bank)


def test_a_snapshot_is_not_restored_under_another_writer(connect: Connect, bank: str):
    writer, other = connect(), connect()
    writer.create_bank(spec(bank))
    write(writer, bank, {0: 1.0})
    taken = writer.create_snapshot([bank])
    with pytest.raises(NotTheWriter, match=bank):
        other.restore_snapshot(taken.id)
    writer.restore_snapshot(taken.id)


def test_a_fork_begins_as_its_source_and_goes_its_own_way(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    first = write(store, bank, {0: 1.0})
    taken = store.create_snapshot([bank])
    second = write(store, bank, {0: 2.0}, first)
    present, past = store.fork_bank(bank, f"{bank}-present"), store.fork_bank(bank, f"{bank}-past", snapshot_id=taken.id)
    assert (present.forked_from, present.num_written, present.spec.seed) == (bank, 1, 7)
    assert read(store, f"{bank}-present", [0])[0][1] == body(2.0)
    version, got = read(store, past.spec.name, [0])[0]
    assert got == body(1.0)
    assert version > second[0]
    assert read(store, past.spec.name, [1])[1] == read(store, bank, [1])[1]
    write(store, past.spec.name, {0: 3.0}, {0: version})
    assert read(store, bank, [0])[0] == (second[0], body(2.0))
    with pytest.raises(BankExists, match="past"):
        store.fork_bank(bank, past.spec.name)
    with pytest.raises(UnknownSnapshot, match="999999"):
        store.fork_bank(bank, f"{bank}-never", snapshot_id=999999)


def test_a_fork_of_a_snapshot_is_as_large_as_the_bank_was_then(connect: Connect, bank: str):
    store = connect()
    then = store.create_bank(spec(bank)).spec.num_experts
    taken = store.create_snapshot([bank])
    store.grow_bank(bank, then + 3)
    assert store.fork_bank(bank, f"{bank}-past", snapshot_id=taken.id).spec.num_experts == then
    assert store.fork_bank(bank, f"{bank}-present").spec.num_experts == then + 3


def test_a_deleted_bank_leaves_its_snapshots_which_go_with_their_last_bank(connect: Connect, bank: str):
    store, names = connect(), [bank, f"{bank}-other"]
    for name in names:
        store.create_bank(spec(name))
    with pytest.raises(InvalidRequest, match="different banks"):
        store.create_snapshot([bank, bank])
    taken = store.create_snapshot(names)
    store.delete_bank(names[0])
    assert [snapshot.banks for snapshot in store.list_snapshots() if snapshot.id == taken.id] == [(names[1],)]
    store.delete_bank(names[1])
    assert all(snapshot.id != taken.id for snapshot in store.list_snapshots())


def checksums(store: ExpertStore, bank: str) -> dict[int, tuple[int, int]]:
    """The two checksums of each expert, as a listing shows them."""
    return {info.expert: (info.parameter_xxh3, info.optimizer_xxh3) for info in store.list_experts(bank)}


def test_an_expert_that_was_restored_to_its_seed_is_not_written(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    first = write(store, bank, {0: 1.0})
    taken = store.create_snapshot([bank])
    second = write(store, bank, {0: 2.0, 1: 2.0}, first)
    assert store.get_bank(bank).num_written == 2
    store.restore_snapshot(taken.id)
    restored = store.get_bank(bank)
    assert restored.num_written == 1
    assert restored.newest_version == max(info.version for info in store.list_experts(bank)) > second[1]


def test_the_checksums_of_a_restored_seed_are_those_of_an_unwritten_expert(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    taken = store.create_snapshot([bank])
    write(store, bank, {0: 1.0})
    written = Checksums.of(LAYOUT, memoryview(body(1.0)))
    assert checksums(store, bank)[0] == (written.parameters, written.optimizer)
    store.restore_snapshot(taken.id)
    assert checksums(store, bank) == dict.fromkeys(range(NUM_EXPERTS), (0, 0))


def test_a_restored_seed_is_made_anew(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    read(store, bank, [0])
    taken = store.create_snapshot([bank])
    write(store, bank, {0: 1.0})
    store.restore_snapshot(taken.id)
    assert next(store.list_experts(bank)).tiers == (Tier.SEED,)
    memory = bytearray(LAYOUT.body_bytes)
    tiers = [item.served_from for _ in range(2) for item in store.fetch(bank, [0], into=lambda _: memoryview(memory))]
    assert tiers == [Tier.SEED, Tier.DRAM]


def test_neither_a_snapshot_nor_a_fork_counts_a_restored_seed(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    empty = store.create_snapshot([bank])
    write(store, bank, {0: 1.0})
    restored = store.restore_snapshot(empty.id)
    assert (restored.num_experts, restored.bytes) == (0, 0)
    write(store, bank, {1: 1.0})
    taken = store.create_snapshot([bank])
    assert (taken.num_experts, taken.bytes) == (1, LAYOUT.record_bytes)
    fork = store.fork_bank(bank, f"{bank}-fork")
    assert fork.num_written == 1
    versions = {info.expert: info.version for info in store.list_experts(fork.spec.name)}
    assert versions == dict.fromkeys(range(NUM_EXPERTS), 0) | {1: fork.newest_version}


def test_a_restored_bank_keeps_the_size_it_has_grown_to(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    taken = store.create_snapshot([bank])
    store.grow_bank(bank, NUM_EXPERTS + 2)
    write(store, bank, {NUM_EXPERTS + 1: 1.0})
    store.restore_snapshot(taken.id)
    restored = store.get_bank(bank)
    assert (restored.spec.num_experts, restored.num_written) == (NUM_EXPERTS + 2, 0)
    assert read(store, bank, [NUM_EXPERTS + 1])[NUM_EXPERTS + 1][0] == restored.newest_version


def test_a_snapshot_that_lost_a_bank_counts_the_experts_of_the_others(connect: Connect, bank: str):
    store, names = connect(), [bank, f"{bank}-other"]
    for number, name in enumerate(names, start=1):
        store.create_bank(spec(name))
        write(store, name, dict.fromkeys(range(number), 1.0))
    taken = store.create_snapshot(names)
    assert (taken.num_experts, taken.bytes) == (3, 3 * LAYOUT.record_bytes)
    store.release(names[0])
    store.delete_bank(names[0])
    (left,) = (snapshot for snapshot in store.list_snapshots() if snapshot.id == taken.id)
    assert (left.banks, left.num_experts, left.bytes) == ((names[1],), 2, 2 * LAYOUT.record_bytes)
    assert store.restore_snapshot(taken.id) == left


def test_a_snapshot_name_has_at_most_128_bytes(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    longest = bank.ljust(126, "x") + "é"
    assert store.create_snapshot([bank], name=longest).name == longest
    with pytest.raises(InvalidRequest, match="129 bytes are more than 128"):
        store.create_snapshot([bank], name="x" + longest)
    assert len(store.list_snapshots(bank)) == 1


def test_a_snapshot_without_a_name_is_named_by_its_id_unless_the_name_is_taken(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    first = store.create_snapshot([bank])
    assert first.name == f"snapshot-{first.id}"
    chosen = store.create_snapshot([bank], name=f"snapshot-{first.id + 2}")
    third = store.create_snapshot([bank])
    assert (chosen.id, third.id, third.name) == (first.id + 1, first.id + 3, f"snapshot-{first.id + 3}")


@pytest.mark.parametrize("name", ["", "two words", "x" * 129])
def test_a_name_that_no_bank_may_have_is_refused_for_a_fork(connect: Connect, bank: str, name: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(InvalidRequest, match="bank name"):
        store.fork_bank(bank, name)


def test_a_fork_of_another_banks_snapshot_is_refused_and_uses_up_no_version(connect: Connect, bank: str):
    store, other = connect(), f"{bank}-other"
    for name in (bank, other):
        store.create_bank(spec(name))
    versions = write(store, bank, {0: 1.0})
    taken = store.create_snapshot([other])
    with pytest.raises(UnknownSnapshot, match=f"snapshot {taken.id}"):
        store.fork_bank(bank, f"{bank}-fork", snapshot_id=taken.id)
    with pytest.raises(BankExists, match=other):
        store.fork_bank(bank, other, snapshot_id=taken.id)
    assert write(store, bank, {0: 2.0}, versions) == {0: versions[0] + 1}


def test_growth_beyond_any_bank_is_refused(connect: Connect, bank: str):
    store = connect()
    store.create_bank(spec(bank))
    with pytest.raises(InvalidRequest, match="num_experts"):
        store.grow_bank(bank, 1 << 40)
    assert store.grow_bank(bank, 0).spec.num_experts == NUM_EXPERTS


def test_one_error_has_one_wording(connect: Connect, bank: str):
    store, other = connect(), connect()
    store.create_bank(spec(bank))
    versions = write(store, bank, {0: 1.0})
    missing = 1 << 50
    for call, error, message in (
        (lambda: store.create_bank(spec(bank, seed=8)), BankExists, f"bank '{bank}' exists with another seed: 7, not 8"),
        (lambda: read(store, bank, [NUM_EXPERTS]), UnknownExpert, f"expert {NUM_EXPERTS}: bank '{bank}' has experts 0 to 5"),
        (lambda: store.get_bank(f"{bank}-none"), UnknownBank, f"bank '{bank}-none' does not exist"),
        (lambda: store.restore_snapshot(missing), UnknownSnapshot, f"snapshot {missing} does not exist"),
        (lambda: other.delete_bank(bank), NotTheWriter, f"bank '{bank}': writer '{store.get_bank(bank).writer_id}' has it open"),
        (lambda: other.open_for_writing(bank), NotTheWriter, f"bank '{bank}': writer '{store.get_bank(bank).writer_id}' has it open"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message
    outcomes = write(store, bank, {0: 1.0, 1: 1.0}, {1: versions[0]})
    assert str(outcomes[0]) == f"expert 0 of bank '{bank}': base_version 0 is not the current version {versions[0]}"
    assert str(outcomes[1]).startswith(f"expert 1 of bank '{bank}': base_version {versions[0]} is not the current version 0")


# Statistics


def test_fetches_and_pushes_are_counted(connect: Connect, bank: str):
    store = connect(bank)
    store.create_bank(spec(bank))
    before = store.stats().total
    read(store, bank, [0, 1])
    read(store, bank, [0])
    write(store, bank, {0: 1.0})
    after = store.stats().total
    assert after.hits - before.hits == 1
    assert after.seeded - before.seeded == 2
    assert after.pushed_bytes - before.pushed_bytes == LAYOUT.body_bytes
    watching = store.watch_stats(0.1)
    assert next(watching).total.pushed_experts == after.pushed_experts
    watching.close()


def test_the_newest_report_of_a_trainer_is_shown(connect: Connect, bank: str):
    store = connect(f"trainer of {bank}")
    for capacity in (3, 4):
        store.report_trainer([stats_pb2.HbmStats(bank=bank, capacity_experts=capacity)], "testing")
    (shown,) = [trainer for trainer in connect().stats().trainers if trainer.trainer == f"trainer of {bank}"]
    assert (shown.activity, shown.hbm[0].capacity_experts) == ("testing", 4)

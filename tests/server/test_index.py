import sqlite3

import pytest

from ooc_moe_server.catalog import Bank, BankState, Record, Slot, Snapshot
from ooc_moe_server.index import VERSION_RESERVE, Index, Write
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec

SPEC = BankSpec(name="b", num_experts=4, layout=Layout(parameters=(TensorSpec(name="w", shape=(3,)),)), seed=2**64 - 1)
WRITTEN = Record(version=7, slot=Slot(8192, 3), checksums=Checksums(2**64 - 1, 2**63), writer_id="w", push_number=2**64 - 1)
SEEDED_AGAIN = Record(version=8, slot=None, checksums=None)


def new_bank(name="b"):
    return Bank(id=0, uuid=b"u" * 16, spec=SPEC, num_experts=6, created_unix_ms=5, forked_from="origin")


@pytest.fixture
def index(tmp_path):
    index = Index(tmp_path / "index.sqlite")
    yield index
    index.close()


def reopened(tmp_path):
    return Index(tmp_path / "index.sqlite").load()


def test_a_bank_comes_back_whole_with_its_records_and_unsigned_words(tmp_path, index):
    bank_id = index.create_bank(new_bank(), next_version=1)
    index.put_records([Write(bank_id=bank_id, expert=0, record=WRITTEN), Write(bank_id=bank_id, expert=3, record=SEEDED_AGAIN)], 9)
    bank = reopened(tmp_path).banks["b"]
    assert bank.records == {0: WRITTEN, 3: SEEDED_AGAIN}
    assert (bank.spec, bank.num_experts, bank.uuid, bank.forked_from) == (SPEC, 6, b"u" * 16, "origin")
    assert (bank.num_written, bank.newest_version) == (1, 8)


def test_versions_start_beyond_all_that_uncommitted_writes_may_have_used(tmp_path, index):
    index.put_records([], next_version=100)
    first = reopened(tmp_path).next_version
    assert first == 100 + VERSION_RESERVE
    assert reopened(tmp_path).next_version > first  # Even when nothing was committed in between.


def test_a_snapshot_keeps_the_records_of_its_moment(tmp_path, index):
    bank_id = index.create_bank(new_bank(), 1)
    index.put_records([Write(bank_id=bank_id, expert=0, record=WRITTEN)], 9)
    index.create_snapshot(Snapshot(id=4, name="s", created_unix_ms=6, banks={bank_id: BankState(num_experts=6, records={})}))
    index.put_records([Write(bank_id=bank_id, expert=0, record=SEEDED_AGAIN)], 10)
    catalog = reopened(tmp_path)
    assert catalog.snapshots[4].banks[bank_id].records == {0: WRITTEN}
    assert catalog.next_snapshot_id == 5
    index.delete_snapshot(4)
    assert reopened(tmp_path).snapshots == {}


def test_deleting_a_bank_removes_its_part_of_snapshots_and_those_of_nothing_else(tmp_path, index):
    ids = [index.create_bank(bank, 1) for bank in (new_bank(), _named("c"))]
    states = {bank_id: BankState(num_experts=6, records={}) for bank_id in ids}
    index.create_snapshot(Snapshot(id=1, name="both", created_unix_ms=0, banks=states))
    index.create_snapshot(Snapshot(id=2, name="one", created_unix_ms=0, banks={ids[0]: states[ids[0]]}))
    index.delete_bank(ids[0])
    catalog = reopened(tmp_path)
    assert list(catalog.banks) == ["c"]
    assert {snapshot.name: list(snapshot.banks) for snapshot in catalog.snapshots.values()} == {"both": [ids[1]]}


def _named(name):
    bank = new_bank()
    bank.spec = BankSpec(name=name, num_experts=4, layout=SPEC.layout)
    return bank


def test_a_failed_transaction_leaves_nothing_behind_and_the_next_one_works(tmp_path, index):
    bank_id = index.create_bank(new_bank(), 1)
    with pytest.raises(sqlite3.Error):
        index.create_bank(new_bank(), 2)  # The name is taken.
    index.put_records([Write(bank_id=bank_id, expert=1, record=WRITTEN)], 9)
    assert reopened(tmp_path).banks["b"].records == {1: WRITTEN}


def test_a_file_that_is_no_index_is_refused(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptRecord, match="index"):
        Index(tmp_path / "index.sqlite").load()

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from random import Random

import pytest

from ooc_moe_server.catalog.catalog import Bank, BankState, Record, Slot, Snapshot
from ooc_moe_server.index import commit_witness
from ooc_moe_server.index.database import VERSION_RESERVE, Index
from ooc_moe_server.index.tables import Write
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from tests.server.engine_store import failing, flip

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


def _named(name):
    bank = new_bank()
    bank.spec = BankSpec(name=name, num_experts=4, layout=SPEC.layout)
    return bank


@pytest.fixture
def filled(tmp_path):
    """The directory of a closed index with a bank of 30 records, another bank, and a snapshot of both."""
    directory = tmp_path / "store"
    directory.mkdir()
    index = Index(directory / "index.sqlite")
    index.load()
    ids = [index.create_bank(bank, 1) for bank in (new_bank(), _named("c"))]
    writes = [Write(bank_id=ids[0], expert=expert, record=replace(WRITTEN, version=expert + 1)) for expert in range(30)]
    index.put_records([*writes, Write(bank_id=ids[1], expert=0, record=SEEDED_AGAIN)], 40)
    states = {bank_id: BankState(num_experts=6, records={}) for bank_id in ids}
    index.create_snapshot(Snapshot(id=1, name="both", created_unix_ms=0, banks=states))
    index.close()
    return directory


def content(catalog):
    """The content of a catalog as comparable values."""
    banks = {bank.name: (bank.id, bank.uuid, bank.spec, bank.num_experts, bank.records) for bank in catalog.banks.values()}
    snapshots = {
        snapshot.id: (snapshot.name, {bank_id: (state.num_experts, state.records) for bank_id, state in snapshot.banks.items()})
        for snapshot in catalog.snapshots.values()
    }
    return banks, snapshots, catalog.next_snapshot_id


def read(directory):
    index = Index(directory / "index.sqlite")
    try:
        return index.read()
    finally:
        index.close()


def refused(directory, words):
    return pytest.raises(CorruptRecord, match=f"(?s)index: .*{words}.*ooc-moe-server rebuild {directory}")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE records SET version = version + 1 WHERE expert = 7",
        "UPDATE records SET slot = 9 WHERE expert = 7",
        "UPDATE records SET writer_id = x'ff' WHERE expert = 7",
        "UPDATE records SET slab = NULL WHERE expert = 7",
        "UPDATE banks SET num_experts = 99 WHERE name = 'c'",
        "UPDATE banks SET spec = x'0102' WHERE name = 'c'",
        "UPDATE snapshots SET name = 'other'",
        "UPDATE snapshot_banks SET num_experts = 1",
        "UPDATE snapshot_records SET expert = 1000 WHERE expert = 7",
        "UPDATE meta SET next_version = 1",
        "UPDATE meta SET sequence = sequence + 1",
    ],
)
def test_a_changed_value_is_noticed_and_its_table_named(filled, damage):
    with closing(sqlite3.connect(filled / "index.sqlite")) as db, db:
        db.execute(damage)
    with refused(filled, f"table {damage.split()[1]} is damaged"):
        read(filled)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM records WHERE expert = 7", "rows are missing"),
        ("DELETE FROM records", "rows are missing"),
        ("DELETE FROM banks WHERE name = 'c'", "do not fit together"),
        ("DELETE FROM snapshot_banks", "do not fit together"),
        ("DELETE FROM snapshot_records WHERE expert = 7", "rows are missing"),
        ("DELETE FROM meta", "0 rows instead of one"),
        ("INSERT INTO meta SELECT * FROM meta", "2 rows instead of one"),
        ("DROP TABLE snapshots", "no such table"),
    ],
)
def test_a_vanished_row_is_noticed(filled, damage, words):
    with closing(sqlite3.connect(filled / "index.sqlite")) as db, db:
        db.execute(damage)
    with refused(filled, words):
        read(filled)


def test_a_sound_record_of_no_bank_is_damage_and_no_traceback(filled):
    index = Index(filled / "index.sqlite")
    index.put_records([Write(bank_id=99, expert=0, record=WRITTEN)], 50)
    index.close()
    with refused(filled, "do not fit together"):
        read(filled)


def test_any_flipped_byte_is_noticed_or_harmless(filled):
    sound = content(read(filled))
    index = Index(filled / "index.sqlite")
    index.put_records([Write(bank_id=1, expert=3, record=replace(WRITTEN, version=100))], 101)
    live = filled.with_name("live")
    shutil.copytree(filled, live)  # With a WAL that holds the last commit, as a crash leaves it.
    index.close()
    newest = content(read(filled))
    assert newest != sound
    random, noticed = Random(7), 0
    files = {path.name: path.read_bytes() for path in live.iterdir()}
    assert files["index.sqlite-wal"]
    for _ in range(150):
        name = random.choice(["index.sqlite", "index.sqlite-wal", "COMMITTED"])
        flipped = bytearray(files[name])
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        for path in live.iterdir():
            path.unlink()
        for other, original in files.items():
            if not other.endswith("-shm"):
                (live / other).write_bytes(flipped if other == name else original)
        try:
            assert content(read(live)) == newest
        except CorruptRecord:
            noticed += 1
    assert noticed > 20


def test_an_index_that_fell_behind_is_refused(filled):
    for path in filled.iterdir():
        shutil.copy(path, path.with_name(path.name + ".old"))
    index = Index(filled / "index.sqlite")
    index.put_records([Write(bank_id=1, expert=3, record=replace(WRITTEN, version=100))], 101)
    index.close()
    shutil.copy(filled / "index.sqlite.old", filled / "index.sqlite")
    with refused(filled, "behind: it ends at commit 5, and commit 6 was acknowledged"):
        read(filled)


@pytest.mark.parametrize("lost", [["index.sqlite"], ["index.sqlite", "COMMITTED"]])
def test_a_store_without_its_index_is_not_begun_anew(filled, lost):
    (filled / "banks").mkdir()
    (filled / "banks" / "aa.json").touch()
    for name in lost:
        (filled / name).unlink()
    with refused(filled, "index.sqlite is missing or empty"):
        read(filled)
    assert not (filled / "index.sqlite").exists()


def test_an_index_cut_to_nothing_is_refused_and_one_of_a_new_store_is_made(filled, tmp_path):
    (filled / "index.sqlite").write_bytes(b"")
    with refused(filled, "missing or empty"):
        read(filled)
    assert read_new(tmp_path / "new").banks == {}


def test_a_first_start_that_was_cut_off_can_be_repeated_but_a_lost_schema_is_no_first_start(filled, tmp_path):
    (tmp_path / "new").mkdir()
    for directory in (tmp_path / "new", filled):
        (directory / "index.sqlite").unlink(missing_ok=True)
        with closing(sqlite3.connect(directory / "index.sqlite")) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA user_version=1")
        assert (directory / "index.sqlite").stat().st_size > 0
    assert read(tmp_path / "new").banks == {}
    with refused(filled, "missing or empty"):
        read(filled)


def read_new(directory):
    directory.mkdir()
    return read(directory)


def test_a_wal_that_lost_its_end_is_refused(filled):
    index = Index(filled / "index.sqlite")
    index.load()
    live = filled.with_name("live")
    index.put_records([Write(bank_id=1, expert=3, record=WRITTEN)], 50)
    shutil.copytree(filled, live, ignore=shutil.ignore_patterns("*-shm"))
    index.close()
    wal = live / "index.sqlite-wal"
    wal.write_bytes(wal.read_bytes()[:-100])
    with refused(live, "behind"):
        read(live)


@pytest.mark.parametrize("block", [0, 1])
def test_one_damaged_block_of_committed_is_a_warning_and_is_written_anew(filled, block, caplog):
    sequence = commit_witness.read(filled / "COMMITTED")[0].sequence
    flip(filled / "COMMITTED", 4096 * block + 9)
    index = Index(filled / "index.sqlite")
    assert "one block of COMMITTED is damaged" in caplog.text
    index.load()
    index.put_records([], 60)
    last, num_damaged = commit_witness.read(filled / "COMMITTED")
    assert (last.sequence, num_damaged) == (sequence + 2, 0)  # `load` commits too.
    index.close()


@pytest.mark.parametrize("how", ["flipped", "empty", "gone"])
def test_nothing_is_trusted_when_committed_is_gone(filled, how):
    path = filled / "COMMITTED"
    if how == "flipped":
        flip(path, 9)
        flip(path, 4096 + 9)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with refused(filled, "COMMITTED is missing or damaged"):
        read(filled)


def test_a_crash_before_committed_was_written_is_no_damage(filled):
    before = (filled / "COMMITTED").read_bytes()
    index = Index(filled / "index.sqlite")
    index.put_records([Write(bank_id=1, expert=3, record=replace(WRITTEN, version=100))], 101)
    index.close()
    (filled / "COMMITTED").write_bytes(before)
    assert read(filled).banks["b"].records[3].version == 100


def test_a_commit_stands_without_its_witness_and_the_next_one_waits_for_it(filled, monkeypatch):
    index = Index(filled / "index.sqlite")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing(OSError(errno.EIO, "broken")))
        index.put_records([Write(bank_id=1, expert=3, record=replace(WRITTEN, version=100))], 101)  # It is durable: no error.
        with pytest.raises(OSError, match="broken"):
            index.put_records([Write(bank_id=1, expert=4, record=replace(WRITTEN, version=102))], 103)
    assert commit_witness.read(filled / "COMMITTED")[0].sequence == 5
    index.put_records([Write(bank_id=1, expert=5, record=replace(WRITTEN, version=104))], 105)
    assert commit_witness.read(filled / "COMMITTED")[0].sequence == 7
    index.close()
    records = read(filled).banks["b"].records
    assert (records[3].version, records[4].version, records[5].version) == (100, 5, 104)


def test_a_full_disk_does_not_keep_committed_from_being_written(filled):
    """The file never grows: both blocks exist from the start."""
    index = Index(filled / "index.sqlite")
    stat = (filled / "COMMITTED").stat()
    for version in range(50, 60):
        index.put_records([], version)
    assert ((filled / "COMMITTED").stat().st_size, (filled / "COMMITTED").stat().st_ino) == (stat.st_size, stat.st_ino)
    index.close()

"""The index: what is committed, in SQLite (WAL, synchronous=FULL). One transaction per call; a call that returns is durable.

Synchronous, for the one thread that owns it. Stores what it is told and decides nothing; catalog.py is its mirror in memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ooc_moe_server.catalog import Bank, BankState, Catalog, Record, Slot, Snapshot
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import bank_pb2

# Versions this far beyond the newest committed one may stand in the header of a write that never committed; a start skips them,
# so that no version is ever used twice. More than the pushes that can be in flight.
VERSION_RESERVE = 4096

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE banks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uuid BLOB NOT NULL, name TEXT NOT NULL UNIQUE, spec BLOB NOT NULL,
    num_experts INTEGER NOT NULL, created_unix_ms INTEGER NOT NULL, forked_from TEXT NOT NULL);
-- slot NULL: the seeded value under a newer version. Checksums and push numbers are unsigned 64-bit words stored as signed ones.
CREATE TABLE records (
    bank INTEGER NOT NULL, expert INTEGER NOT NULL, version INTEGER NOT NULL, slab INTEGER, slot INTEGER,
    parameter_xxh3 INTEGER, optimizer_xxh3 INTEGER, writer_id TEXT NOT NULL, push_number INTEGER NOT NULL,
    PRIMARY KEY (bank, expert)) WITHOUT ROWID;
CREATE TABLE snapshots (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_unix_ms INTEGER NOT NULL);
CREATE TABLE snapshot_banks (
    snapshot INTEGER NOT NULL, bank INTEGER NOT NULL, num_experts INTEGER NOT NULL, PRIMARY KEY (snapshot, bank)) WITHOUT ROWID;
CREATE TABLE snapshot_records (
    snapshot INTEGER NOT NULL, bank INTEGER NOT NULL, expert INTEGER NOT NULL, version INTEGER NOT NULL, slab INTEGER, slot INTEGER,
    parameter_xxh3 INTEGER, optimizer_xxh3 INTEGER, writer_id TEXT NOT NULL, push_number INTEGER NOT NULL,
    PRIMARY KEY (snapshot, bank, expert)) WITHOUT ROWID;
INSERT INTO meta VALUES ('next_version', 1), ('next_snapshot_id', 1);
"""
_RECORD_COLUMNS = "expert, version, slab, slot, parameter_xxh3, optimizer_xxh3, writer_id, push_number"
_Row = tuple[int, int, int | None, int | None, int | None, int | None, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A record that becomes current."""

    bank_id: int
    expert: int
    record: Record


class Index:
    """The index file at `path`, opened or made. Raises CorruptRecord when it cannot be read."""

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            if is_new or not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
        except sqlite3.DatabaseError as error:
            raise CorruptRecord(f"index {path.name}: {error}") from error

    def load(self) -> Catalog:
        """Reads everything, and skips the versions that uncommitted writes may have used. Raises CorruptRecord."""
        try:
            catalog = self._load()
        except sqlite3.DatabaseError as error:
            raise CorruptRecord(f"index: {error}") from error
        with self._transaction():
            self.save_next_version(catalog.next_version)
        return catalog

    def put_records(self, writes: Iterable[Write], next_version: int) -> None:
        """Makes records current."""
        rows = [(write.bank_id, *_row(write.expert, write.record)) for write in writes]
        with self._transaction():
            self._insert_records(rows)
            self.save_next_version(next_version)

    def create_bank(self, bank: Bank, next_version: int) -> int:
        """Adds a bank with its records (a fork has some) and returns its id; `bank.id` is not read."""
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO banks (uuid, name, spec, num_experts, created_unix_ms, forked_from) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    bank.uuid,
                    bank.name,
                    bank.spec.to_proto().SerializeToString(deterministic=True),
                    bank.num_experts,
                    bank.created_unix_ms,
                    bank.forked_from,
                ),
            )
            assert cursor.lastrowid is not None
            self._insert_records([(cursor.lastrowid, *_row(expert, record)) for expert, record in bank.records.items()])
            self.save_next_version(next_version)
        return cursor.lastrowid

    def grow_bank(self, bank_id: int, num_experts: int) -> None:
        """Sets a bank's size."""
        with self._transaction():
            self._db.execute("UPDATE banks SET num_experts = ? WHERE id = ?", (num_experts, bank_id))

    def delete_bank(self, bank_id: int) -> None:
        """Removes a bank and its part of every snapshot, and snapshots of nothing else."""
        with self._transaction():
            self._db.execute("DELETE FROM banks WHERE id = ?", (bank_id,))
            for table in ("records", "snapshot_records", "snapshot_banks"):
                self._db.execute(f"DELETE FROM {table} WHERE bank = ?", (bank_id,))
            self._db.execute("DELETE FROM snapshots WHERE id NOT IN (SELECT snapshot FROM snapshot_banks)")

    def create_snapshot(self, snapshot: Snapshot) -> None:
        """Adds a snapshot of the present records of its banks."""
        with self._transaction():
            self._db.execute("INSERT INTO snapshots VALUES (?, ?, ?)", (snapshot.id, snapshot.name, snapshot.created_unix_ms))
            self._db.execute("UPDATE meta SET value = ? WHERE key = 'next_snapshot_id'", (snapshot.id + 1,))
            for bank_id, state in snapshot.banks.items():
                self._db.execute("INSERT INTO snapshot_banks VALUES (?, ?, ?)", (snapshot.id, bank_id, state.num_experts))
                self._db.execute(
                    f"INSERT INTO snapshot_records SELECT ?, bank, {_RECORD_COLUMNS} FROM records WHERE bank = ?", (snapshot.id, bank_id)
                )

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Removes a snapshot."""
        with self._transaction():
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
            for table in ("snapshot_records", "snapshot_banks"):
                self._db.execute(f"DELETE FROM {table} WHERE snapshot = ?", (snapshot_id,))

    def close(self) -> None:
        """Closes the file; SQLite folds the WAL into it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _insert_records(self, rows: Sequence[tuple[int | str | None, ...]]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def save_next_version(self, next_version: int) -> None:
        """Sets what the next start begins with: the reserve beyond `next_version`."""
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'next_version'", (next_version + VERSION_RESERVE,))

    def _load(self) -> Catalog:
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        catalog = Catalog(next_version=meta["next_version"], next_snapshot_id=meta["next_snapshot_id"])
        banks: dict[int, Bank] = {}
        for bank_id, uuid, _name, spec, num_experts, created_unix_ms, forked_from in self._db.execute("SELECT * FROM banks"):
            banks[bank_id] = Bank(
                id=bank_id,
                uuid=uuid,
                spec=BankSpec.from_proto(bank_pb2.BankSpec.FromString(spec)),
                num_experts=num_experts,
                created_unix_ms=created_unix_ms,
                forked_from=forked_from,
            )
        for bank_id, *row in self._db.execute(f"SELECT bank, {_RECORD_COLUMNS} FROM records"):
            banks[bank_id].put(*_record(row))
        catalog.banks = {bank.name: bank for bank in banks.values()}
        for snapshot_id, name, created_unix_ms in self._db.execute("SELECT * FROM snapshots"):
            catalog.snapshots[snapshot_id] = Snapshot(id=snapshot_id, name=name, created_unix_ms=created_unix_ms, banks={})
        for snapshot_id, bank_id, num_experts in self._db.execute("SELECT * FROM snapshot_banks"):
            catalog.snapshots[snapshot_id].banks[bank_id] = BankState(num_experts=num_experts, records={})
        for snapshot_id, bank_id, *row in self._db.execute(f"SELECT snapshot, bank, {_RECORD_COLUMNS} FROM snapshot_records"):
            expert, record = _record(row)
            catalog.snapshots[snapshot_id].banks[bank_id].records[expert] = record
        return catalog


def _row(expert: int, record: Record) -> _Row:
    slab, slot = (record.slot.record_bytes, record.slot.index) if record.slot else (None, None)
    parameters = _signed(record.checksums.parameters) if record.checksums else None
    optimizer = _signed(record.checksums.optimizer) if record.checksums else None
    return expert, record.version, slab, slot, parameters, optimizer, record.writer_id, _signed(record.push_number)


def _record(row: list[int]) -> tuple[int, Record]:
    expert, version, slab, slot, parameters, optimizer, writer_id, push_number = row
    return expert, Record(
        version=version,
        slot=None if slot is None else Slot(slab, slot),
        checksums=None if parameters is None else Checksums(_unsigned(parameters), _unsigned(optimizer)),
        writer_id=str(writer_id),
        push_number=_unsigned(push_number),
    )


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _unsigned(word: int) -> int:
    return word + (1 << 64) if word < 0 else word

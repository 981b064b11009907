"""The index: an SQLite file that stores all banks, records and snapshots. Each call that changes it is one durable transaction.

SQLite runs with WAL and synchronous=FULL. Rows carry checksums (tables.py). The number of the last transaction is also kept outside the
index, in the file COMMITTED (commit_witness.py), which shows whether an index lost its last commits. `Index(...)`
compares the index with COMMITTED; `load` checks every row.

Calls block, and belong to the one thread that owns the index. The Catalog in memory mirrors the content of the index.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ooc_moe_server.catalog.catalog import Bank, Catalog, Snapshot
from ooc_moe_server.catalog.records import record_of, record_row
from ooc_moe_server.index import commit_witness
from ooc_moe_server.index.commit_witness import CommitWitness, LastCommit
from ooc_moe_server.index.tables import Connection, Meta, Tables, Write, damaged, reading

log = logging.getLogger(__name__)

# Versions this far beyond the newest committed one may stand in the header of a write that never committed; a start skips them,
# so that no version is ever used twice. More than the pushes that can be in flight.
VERSION_RESERVE = 4096


def connect(path: Path) -> Connection:
    """Opens the SQLite file at `path` in autocommit mode."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


class Index:
    """The index, an SQLite file at `path`: lists the banks and snapshots of a store, and for each expert where its record lies on the disk.

    Beside the SQLite file, the file COMMITTED holds the number of the index's last transaction. Creates both files (SQLite and COMMITTED)
    if the directory holds no store yet. Raises CorruptRecord if the SQLite file is unreadable, or is missing although there is a store.
    """

    def __init__(self, path: Path, connect: Callable[[Path], Connection] = connect) -> None:
        self._path = path
        self._witness_path = path.with_name("COMMITTED")
        self._sequence_of_failure: int | None = None  # The sequence number before the transaction that failed last.
        self._unwitnessed: LastCommit | None = None  # A commit that COMMITTED does not show yet.
        if not path.exists() or path.stat().st_size == 0:
            self._refuse_to_begin_anew()
        self._db = connect(path)
        self._tables = Tables(self._db, path)
        try:
            with reading(path):
                list(self._db.execute("PRAGMA journal_mode=WAL"))
                list(self._db.execute("PRAGMA synchronous=FULL"))
                if not self._tables.exist:
                    self._refuse_to_begin_anew()  # Again, for a file without tables: a first start that was cut off leaves one.
                    self._tables.create()
                self._check_against_witness()
            self._witness = CommitWitness(self._witness_path)
        except BaseException:
            self._db.close()
            raise

    def load(self) -> Catalog:
        """Reads and checks the whole index when the daemon starts, and returns its content as a catalog. Raises CorruptRecord.

        Also advances the next version past all numbers that a push may have got before a crash without being committed.
        """
        catalog = self.read()
        with self._transaction(catalog.next_version):
            pass
        return catalog

    def read(self) -> Catalog:
        """Reads and checks the whole index without changing it, and returns its content as a catalog. Raises CorruptRecord."""
        with reading(self._path):
            self._tables.check_pages()
            return self._tables.catalog()

    def put_records(self, writes: Iterable[Write], next_version: int) -> None:
        """Stores each record as the current one of its expert. `next_version`: the lowest version that is not given out yet."""
        with self._transaction(next_version) as meta:
            self._tables.put_records(meta, writes)

    def restore_banks(self, bank_ids: Iterable[int], writes: Iterable[Write], next_version: int) -> None:
        """Stores each record as the current one of its expert, for a restore. Sets the `base_version` of the banks to `next_version`.

        `rebuild` ignores the records of a bank on the disk whose versions are lower than the bank's `base_version`.
        """
        with self._transaction(next_version) as meta:
            self._tables.put_records(meta, writes)
            for bank_id in bank_ids:
                self._tables.revise_bank(meta, bank_id, base_version=next_version)

    def create_bank(self, bank: Bank, next_version: int) -> int:
        """Adds a bank with its records (a fork has some), and returns the id that the index chose for it.

        The fields `id`, `revision` and `base_version` of `bank` are ignored.
        """
        with self._transaction(next_version) as meta:
            bank_id = meta.next_bank_id
            meta.next_bank_id += 1
            self._tables.add_bank(meta, replace(bank, id=bank_id, revision=meta.sequence, base_version=next_version))
        return bank_id

    def grow_bank(self, bank_id: int, num_experts: int) -> None:
        """Sets the number of experts of a bank to `num_experts`."""
        with self._transaction() as meta:
            self._tables.revise_bank(meta, bank_id, num_experts=num_experts)

    def delete_bank(self, bank_id: int) -> None:
        """Removes a bank, its records, and its part of every snapshot. A snapshot that has no other bank is removed too."""
        tables = self._tables
        with self._transaction() as meta:
            touched = [snapshot for (snapshot,) in self._db.execute("SELECT snapshot FROM snapshot_banks WHERE bank = ?", (bank_id,))]
            tables.remove(meta, "banks", "id = ?", (bank_id,))
            for table in ("records", "snapshot_records", "snapshot_banks"):
                tables.remove(meta, table, "bank = ?", (bank_id,))
            for snapshot in touched:
                ((_, name, created_unix_ms, _),) = tables.rows("snapshots", "id = ?", (snapshot,))
                tables.remove(meta, "snapshots", "id = ?", (snapshot,))
                if list(self._db.execute("SELECT bank FROM snapshot_banks WHERE snapshot = ? LIMIT 1", (snapshot,))):
                    tables.insert(meta, "snapshots", [(snapshot, name, created_unix_ms, meta.sequence)])

    def create_snapshot(self, snapshot: Snapshot) -> None:
        """Adds a snapshot. Its records are copied from the rows of its banks in the index; the records in `snapshot` are ignored."""
        tables = self._tables
        with self._transaction() as meta:
            meta.next_snapshot_id = snapshot.id + 1
            tables.insert(meta, "snapshots", [(snapshot.id, snapshot.name, snapshot.created_unix_ms, meta.sequence)])
            for bank_id, state in snapshot.banks.items():
                tables.insert(meta, "snapshot_banks", [(snapshot.id, bank_id, state.num_experts)])
                tables.insert(meta, "snapshot_records", [(snapshot.id, *row) for row in tables.rows("records", "bank = ?", (bank_id,))])

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Removes a snapshot and its rows. The banks do not change."""
        with self._transaction() as meta:
            self._tables.remove(meta, "snapshots", "id = ?", (snapshot_id,))
            for table in ("snapshot_records", "snapshot_banks"):
                self._tables.remove(meta, table, "snapshot = ?", (snapshot_id,))

    def fill(self, catalog: Catalog, sequence: int) -> None:
        """Writes a whole catalog into a new, empty index, in one transaction. `sequence`: the number that this transaction gets."""
        tables = self._tables
        with self._transaction(catalog.next_version) as meta:
            meta.sequence, meta.next_snapshot_id = sequence, catalog.next_snapshot_id
            for bank in catalog.banks.values():
                meta.next_bank_id = max(meta.next_bank_id, bank.id + 1)
                tables.add_bank(meta, bank)
            for snapshot in catalog.snapshots.values():
                tables.insert(meta, "snapshots", [(snapshot.id, snapshot.name, snapshot.created_unix_ms, snapshot.revision)])
                for bank_id, state in snapshot.banks.items():
                    tables.insert(meta, "snapshot_banks", [(snapshot.id, bank_id, state.num_experts)])
                    rows = [(snapshot.id, bank_id, *record_row(expert, record)) for expert, record in state.records.items()]
                    tables.insert(meta, "snapshot_records", rows)

    def bank(self, uuid: bytes) -> Bank | None:
        """Reads the bank that has this uuid, with its records. Returns None when there is no such bank (any more). Raises CorruptRecord."""
        with reading(self._path):
            banks = self._tables.banks("uuid = ?", (uuid,))
            for bank in banks.values():
                for _, *row in self._tables.rows("records", "bank = ?", (bank.id,)):
                    bank.put(*record_of(row))
            return next(iter(banks.values()), None)

    def snapshot(self, snapshot_id: int) -> tuple[Snapshot, dict[int, bytes]] | None:
        """Reads a snapshot. Returns it with the uuids of its banks, by bank id, or None when there is no such snapshot.

        Raises CorruptRecord.
        """
        with reading(self._path):
            snapshot = self._tables.snapshots("id = ?", "snapshot = ?", (snapshot_id,)).get(snapshot_id)
            if snapshot is None:
                return None
            return snapshot, {bank_id: bank.uuid for bank_id, bank in self._tables.banks().items() if bank_id in snapshot.banks}

    def close(self) -> None:
        """Closes the files of the index. SQLite folds its WAL (the log of recent commits) into the index file."""
        self._witness.close()
        self._db.close()

    @contextmanager
    def _transaction(self, next_version: int | None = None) -> Iterator[Meta]:
        """Runs the context as one transaction: all its rows and `meta` change, or nothing does. Yields `meta`. Writes COMMITTED afterwards.

        `next_version`: the lowest version that is not given out yet, or None if the transaction uses no version.
        """
        self._write_owed_witness()
        list(self._db.execute("BEGIN IMMEDIATE"))
        before = self._sequence_of_failure
        try:
            meta = self._tables.read_meta()
            before = meta.sequence
            if self._sequence_of_failure not in (None, before):
                raise OSError(errno.EIO, "index: a commit that was reported as failed went through; restart the daemon")
            meta.sequence += 1
            if next_version is not None:
                meta.next_version = max(meta.next_version, next_version + VERSION_RESERVE)
            yield meta
            self._tables.write_meta(meta)
            list(self._db.execute("COMMIT"))
        except BaseException:
            self._sequence_of_failure = before
            if self._db.in_transaction:
                list(self._db.execute("ROLLBACK"))
            raise
        self._sequence_of_failure = None
        self._unwitnessed = _last_commit(meta)
        self._witness_commit()

    def _witness_commit(self) -> None:
        """Writes COMMITTED after a commit. A failure is logged, and the write is repeated before the next transaction.

        The commit stands even if COMMITTED cannot be written: it is durable in the index. If this method raised, the caller would take the
        commit for failed and reuse its slots, to which the index refers. So it does not raise, and the next transaction begins only when
        COMMITTED is written. Thus COMMITTED lacks at most one commit, whose loss is unnoticed only if the index is damaged before then.
        """
        try:
            self._write_owed_witness()
        except OSError:
            log.exception("COMMITTED was not written: the index takes no other change before it is")

    def _write_owed_witness(self) -> None:
        """Writes COMMITTED if a failed write left it without the last commit. Raises OSError.

        Called before a transaction begins, so that an error refuses this transaction.
        """
        if self._unwitnessed:
            self._witness.write(self._unwitnessed)
            self._unwitnessed = None

    def _refuse_to_begin_anew(self) -> None:
        """Raises CorruptRecord if this directory had an index before, which is lost: to create an empty one would hide the loss."""
        last, _ = commit_witness.read(self._witness_path)
        directory = self._path.parent
        others = [*directory.glob("banks/*.json"), *directory.glob("snapshots/*.json"), *directory.glob("slabs/*.slab")]
        if (last and last.sequence) or (last is None and (others or self._witness_path.exists())):
            raise damaged(self._path, f"{self._path.name} is missing or empty")

    def _check_against_witness(self) -> None:
        """Raises CorruptRecord if COMMITTED shows a later commit than the index has, so that the index lost commits.

        The index may have one more commit than COMMITTED shows, if the daemon ended between the commit and the write of COMMITTED.
        """
        last, num_damaged = commit_witness.read(self._witness_path)
        sequence = self._tables.read_meta().sequence
        if last is None:
            if sequence:
                raise damaged(self._path, "COMMITTED is missing or damaged, so that it is unknown whether commits are missing")
            if self._witness_path.exists():
                commit_witness.renew(self._witness_path, LastCommit())
            return
        if sequence < last.sequence:
            raise damaged(self._path, f"it is behind: it ends at commit {sequence}, and commit {last.sequence} was acknowledged")
        if num_damaged:
            log.warning("one block of COMMITTED is damaged; the other one says commit %d", last.sequence)


def _last_commit(meta: Meta) -> LastCommit:
    next_version = max(1, meta.next_version - VERSION_RESERVE)
    return LastCommit(sequence=meta.sequence, next_version=next_version, next_snapshot_id=meta.next_snapshot_id)

"""The index: what is committed, in SQLite (WAL, synchronous=FULL). One transaction per call; a call that returns is durable.

SQLite can lose committed rows without a word when its files are damaged (a flip in the WAL hides every later commit), and returns a flipped
row as if it were sound. So each row carries an xxh3 of its values; `meta` holds the XOR of them all, which notices rows that vanished or
came back, and a sequence number, which is also kept outside (committed.py) and notices an index that fell behind. `load` checks all of it.

Synchronous, for the one thread that owns it. Stores what it is told and decides nothing; catalog.py is its mirror in memory.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from ooc_moe_server.catalog.catalog import Bank, BankState, Catalog, Record, Snapshot
from ooc_moe_server.catalog.records import Row, bank_of, bank_row, checksum, record_of, record_row, sealed
from ooc_moe_server.index import commit_witness as committed
from ooc_moe_server.index.commit_witness import Committed, CommittedFile
from ooc_moe_wire.errors import CorruptRecord, OocMoeError

log = logging.getLogger(__name__)

# Versions this far beyond the newest committed one may stand in the header of a write that never committed; a start skips them,
# so that no version is ever used twice. More than the pushes that can be in flight.
VERSION_RESERVE = 4096

_RECORD_COLUMNS = """expert INTEGER NOT NULL, version INTEGER NOT NULL, slab INTEGER, slot INTEGER,
    parameter_xxh3 INTEGER, optimizer_xxh3 INTEGER, writer_id TEXT NOT NULL, push_number INTEGER NOT NULL, xxh3 INTEGER NOT NULL"""
# slot NULL: the seeded value under a newer version. Checksums and push numbers are unsigned 64-bit words stored as signed ones.
_SCHEMA = (
    """CREATE TABLE meta (
    sequence INTEGER NOT NULL, next_version INTEGER NOT NULL, next_snapshot_id INTEGER NOT NULL, next_bank_id INTEGER NOT NULL,
    digest INTEGER NOT NULL, xxh3 INTEGER NOT NULL)""",
    """CREATE TABLE banks (
    id INTEGER PRIMARY KEY, uuid BLOB NOT NULL, name TEXT NOT NULL UNIQUE, spec BLOB NOT NULL, num_experts INTEGER NOT NULL,
    created_unix_ms INTEGER NOT NULL, forked_from TEXT NOT NULL, revision INTEGER NOT NULL, base_version INTEGER NOT NULL,
    xxh3 INTEGER NOT NULL)""",
    f"CREATE TABLE records (bank INTEGER NOT NULL, {_RECORD_COLUMNS}, PRIMARY KEY (bank, expert)) WITHOUT ROWID",
    """CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_unix_ms INTEGER NOT NULL, revision INTEGER NOT NULL,
    xxh3 INTEGER NOT NULL)""",
    """CREATE TABLE snapshot_banks (
    snapshot INTEGER NOT NULL, bank INTEGER NOT NULL, num_experts INTEGER NOT NULL, xxh3 INTEGER NOT NULL,
    PRIMARY KEY (snapshot, bank)) WITHOUT ROWID""",
    f"""CREATE TABLE snapshot_records (
    snapshot INTEGER NOT NULL, bank INTEGER NOT NULL, {_RECORD_COLUMNS}, PRIMARY KEY (snapshot, bank, expert)) WITHOUT ROWID""",
)
# SQLite takes 32766 parameters in a statement.
_KEYS_MAX = 1000


class Connection(Protocol):
    """What the index needs of a database: a `sqlite3.Connection` in autocommit mode, or one that a test made."""

    @property
    def in_transaction(self) -> bool: ...  # noqa: D102

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Iterable[Any]: ...  # noqa: D102

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A record that becomes current."""

    bank_id: int
    expert: int
    record: Record


@dataclass(slots=True, kw_only=True)
class _Meta:
    """The one row of `meta`."""

    sequence: int = 0  # Of the last transaction.
    next_version: int = 1
    next_snapshot_id: int = 1
    next_bank_id: int = 1
    digest: int = 0  # XOR of the checksums of all other rows.


def connect(path: Path) -> Connection:
    """Opens SQLite's file."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


class Index:
    """The index file at `path`, opened or made, with COMMITTED beside it.

    Raises CorruptRecord when it cannot be read, or when it is missing though the directory holds a store.
    """

    def __init__(self, path: Path, connect: Callable[[Path], Connection] = connect) -> None:
        self._path = path
        self._committed_path = path.with_name("COMMITTED")
        self._sequence_of_failure: int | None = None  # Where the index stood before the transaction that failed last.
        self._owed: Committed | None = None
        if not path.exists() or path.stat().st_size == 0:
            self._refuse_to_begin_anew()
        self._db = connect(path)
        try:
            with self._reading():
                list(self._db.execute("PRAGMA journal_mode=WAL"))
                list(self._db.execute("PRAGMA synchronous=FULL"))
                if not list(self._db.execute("SELECT name FROM sqlite_master LIMIT 1")):
                    self._refuse_to_begin_anew()  # Again, for a file that holds nothing: a first start that was cut off leaves one.
                    self._make()
                self._check_committed()
            self._committed = CommittedFile(self._committed_path)
        except BaseException:
            self._db.close()
            raise

    def load(self) -> Catalog:
        """Reads and checks everything, and skips the versions that uncommitted writes may have used. Raises CorruptRecord."""
        catalog = self.read()
        with self._transaction(catalog.next_version):
            pass
        return catalog

    def read(self) -> Catalog:
        """Reads and checks everything, and changes nothing. Raises CorruptRecord."""
        with self._reading():
            self._check_pages()
            return self._read()

    def put_records(self, writes: Iterable[Write], next_version: int) -> None:
        """Makes records current."""
        with self._transaction(next_version) as meta:
            self._put(meta, writes)

    def restore_banks(self, bank_ids: Iterable[int], writes: Iterable[Write], next_version: int) -> None:
        """Makes records current, and older versions of these banks' other experts invalid; no version from `next_version` on is."""
        with self._transaction(next_version) as meta:
            self._put(meta, writes)
            for bank_id in bank_ids:
                self._revise_bank(meta, bank_id, base_version=next_version)

    def create_bank(self, bank: Bank, next_version: int) -> int:
        """Adds a bank with its records (a fork has some) and returns its id; `bank.id`, `revision`, `base_version` are not read."""
        with self._transaction(next_version) as meta:
            bank_id = meta.next_bank_id
            meta.next_bank_id += 1
            self._add_bank(meta, replace(bank, id=bank_id, revision=meta.sequence, base_version=next_version))
        return bank_id

    def grow_bank(self, bank_id: int, num_experts: int) -> None:
        """Sets a bank's size."""
        with self._transaction() as meta:
            self._revise_bank(meta, bank_id, num_experts=num_experts)

    def delete_bank(self, bank_id: int) -> None:
        """Removes a bank and its part of every snapshot, and snapshots of nothing else."""
        with self._transaction() as meta:
            touched = [snapshot for (snapshot,) in self._db.execute("SELECT snapshot FROM snapshot_banks WHERE bank = ?", (bank_id,))]
            self._remove(meta, "banks", "id = ?", (bank_id,))
            for table in ("records", "snapshot_records", "snapshot_banks"):
                self._remove(meta, table, "bank = ?", (bank_id,))
            for snapshot in touched:
                ((_, name, created_unix_ms, _),) = self._rows("snapshots", "id = ?", (snapshot,))
                self._remove(meta, "snapshots", "id = ?", (snapshot,))
                if list(self._db.execute("SELECT bank FROM snapshot_banks WHERE snapshot = ? LIMIT 1", (snapshot,))):
                    self._insert(meta, "snapshots", [(snapshot, name, created_unix_ms, meta.sequence)])

    def create_snapshot(self, snapshot: Snapshot) -> None:
        """Adds a snapshot of the present records of its banks; the records in `snapshot` are not read."""
        with self._transaction() as meta:
            meta.next_snapshot_id = snapshot.id + 1
            self._insert(meta, "snapshots", [(snapshot.id, snapshot.name, snapshot.created_unix_ms, meta.sequence)])
            for bank_id, state in snapshot.banks.items():
                self._insert(meta, "snapshot_banks", [(snapshot.id, bank_id, state.num_experts)])
                self._insert(meta, "snapshot_records", [(snapshot.id, *row) for row in self._rows("records", "bank = ?", (bank_id,))])

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Removes a snapshot."""
        with self._transaction() as meta:
            self._remove(meta, "snapshots", "id = ?", (snapshot_id,))
            for table in ("snapshot_records", "snapshot_banks"):
                self._remove(meta, table, "snapshot = ?", (snapshot_id,))

    def fill(self, catalog: Catalog, sequence: int) -> None:
        """Writes a whole catalog into a new index, which then stands at `sequence`."""
        with self._transaction(catalog.next_version) as meta:
            meta.sequence, meta.next_snapshot_id = sequence, catalog.next_snapshot_id
            for bank in catalog.banks.values():
                meta.next_bank_id = max(meta.next_bank_id, bank.id + 1)
                self._add_bank(meta, bank)
            for snapshot in catalog.snapshots.values():
                self._insert(meta, "snapshots", [(snapshot.id, snapshot.name, snapshot.created_unix_ms, snapshot.revision)])
                for bank_id, state in snapshot.banks.items():
                    self._insert(meta, "snapshot_banks", [(snapshot.id, bank_id, state.num_experts)])
                    rows = [(snapshot.id, bank_id, *record_row(expert, record)) for expert, record in state.records.items()]
                    self._insert(meta, "snapshot_records", rows)

    def bank(self, uuid: bytes) -> Bank | None:
        """A bank as it is committed, or None when there is none (any more). Raises CorruptRecord."""
        with self._reading():
            banks = self._read_banks("uuid = ?", (uuid,))
            for bank in banks.values():
                for _, *row in self._rows("records", "bank = ?", (bank.id,)):
                    bank.put(*record_of(row))
            return next(iter(banks.values()), None)

    def snapshot(self, snapshot_id: int) -> tuple[Snapshot, dict[int, bytes]] | None:
        """A snapshot as it is committed with the uuids of its banks by id, or None. Raises CorruptRecord."""
        with self._reading():
            snapshot = self._read_snapshots("id = ?", "snapshot = ?", (snapshot_id,)).get(snapshot_id)
            if snapshot is None:
                return None
            return snapshot, {bank_id: bank.uuid for bank_id, bank in self._read_banks().items() if bank_id in snapshot.banks}

    def close(self) -> None:
        """Closes the files; SQLite folds the WAL into its own."""
        self._committed.close()
        self._db.close()

    @property
    def committed(self) -> Committed:
        """Where the index stands. Raises CorruptRecord."""
        with self._reading():
            return _committed(self._read_meta())

    # Transactions.

    @contextmanager
    def _transaction(self, next_version: int | None = None) -> Iterator[_Meta]:
        """One transaction: rows and `meta` change together, or nothing does; then COMMITTED follows."""
        self._pay()
        list(self._db.execute("BEGIN IMMEDIATE"))
        before = self._sequence_of_failure
        try:
            meta = self._read_meta()
            before = meta.sequence
            if self._sequence_of_failure not in (None, before):
                raise OSError(errno.EIO, "index: a commit that was reported as failed went through; restart the daemon")
            meta.sequence += 1
            if next_version is not None:
                meta.next_version = max(meta.next_version, next_version + VERSION_RESERVE)
            yield meta
            list(self._db.execute("DELETE FROM meta"))
            self._db.executemany("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", sealed("meta", [astuple(meta)]))
            list(self._db.execute("COMMIT"))
        except BaseException:
            self._sequence_of_failure = before
            if self._db.in_transaction:
                list(self._db.execute("ROLLBACK"))
            raise
        self._sequence_of_failure = None
        self._owed = _committed(meta)
        self._settle()

    def _settle(self) -> None:
        """Writes COMMITTED after a commit.

        When that fails, the commit stands all the same: it is durable in the index, and the records it refers to must not be taken for
        refused, or their slots would be written anew under rows that a restart finds. So the call returns, and the debt is paid before
        the next transaction begins (see `_pay`): at most one commit is ever without its witness, and it can be lost unnoticed only if the
        index is damaged as well, and then.
        """
        try:
            self._pay()
        except OSError:
            log.exception("COMMITTED was not written: the index takes no other change before it is")

    def _pay(self) -> None:
        """Writes what COMMITTED is owed. Raises OSError; nothing was begun then, so the caller may take it for refused."""
        if self._owed:
            self._committed.write(self._owed)
            self._owed = None

    def _put(self, meta: _Meta, writes: Iterable[Write]) -> None:
        rows = {(write.bank_id, write.expert): (write.bank_id, *record_row(write.expert, write.record)) for write in writes}
        keys = iter(rows)
        while some := list(islice(keys, _KEYS_MAX)):
            places = ", ".join(["(?, ?)"] * len(some))
            # A join in this order, because SQLite answers `(bank, expert) IN (VALUES ...)` by reading the whole table.
            replaced = self._db.execute(
                f"WITH keys (b, e) AS (VALUES {places}) SELECT xxh3 FROM keys CROSS JOIN records ON bank = b AND expert = e",
                [word for key in some for word in key],
            )
            for (check,) in replaced:
                meta.digest ^= check
        self._insert(meta, "records", rows.values(), or_replace=True)

    def _add_bank(self, meta: _Meta, bank: Bank) -> None:
        self._insert(meta, "banks", [bank_row(bank)])
        self._insert(meta, "records", [(bank.id, *record_row(expert, record)) for expert, record in bank.records.items()])

    def _revise_bank(self, meta: _Meta, bank_id: int, **changes: Any) -> None:
        bank = self._read_banks("id = ?", (bank_id,))[bank_id]
        self._remove(meta, "banks", "id = ?", (bank_id,))
        self._insert(meta, "banks", [bank_row(replace(bank, revision=meta.sequence, **changes))])

    def _insert(self, meta: _Meta, table: str, rows: Iterable[Row], *, or_replace: bool = False) -> None:
        with_checksums = sealed(table, rows)
        for row in with_checksums:
            meta.digest ^= row[-1]
        if with_checksums:
            places = ", ".join("?" * len(with_checksums[0]))
            self._db.executemany(f"INSERT {'OR REPLACE ' if or_replace else ''}INTO {table} VALUES ({places})", with_checksums)

    def _remove(self, meta: _Meta, table: str, where: str, parameters: Sequence[Any]) -> None:
        for (check,) in self._db.execute(f"SELECT xxh3 FROM {table} WHERE {where}", parameters):
            meta.digest ^= check
        list(self._db.execute(f"DELETE FROM {table} WHERE {where}", parameters))

    # Reading, and what is checked.

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns whatever a damaged index leads to into CorruptRecord; a disk that is full or fails is no damage."""
        try:
            yield
        except CorruptRecord:
            raise
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_TROUBLE:
                raise
            raise damaged(self._path, str(error)) from error
        except (OocMoeError, DecodeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise damaged(self._path, f"its rows do not fit together ({type(error).__name__}: {error})") from error

    def _refuse_to_begin_anew(self) -> None:
        """A new index is for a new store: where records were committed, its absence is a loss."""
        last, _ = committed.read(self._committed_path)
        directory = self._path.parent
        others = [*directory.glob("banks/*.json"), *directory.glob("snapshots/*.json"), *directory.glob("slabs/*.slab")]
        if (last and last.sequence) or (last is None and (others or self._committed_path.exists())):
            raise damaged(self._path, f"{self._path.name} is missing or empty")

    def _make(self) -> None:
        list(self._db.execute("BEGIN IMMEDIATE"))
        for statement in _SCHEMA:
            list(self._db.execute(statement))
        self._db.executemany("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", sealed("meta", [astuple(_Meta())]))
        list(self._db.execute("COMMIT"))

    def _check_committed(self) -> None:
        """Compares the sequence numbers. An index ahead is sound: the daemon ended between the two writes."""
        last, num_damaged = committed.read(self._committed_path)
        sequence = self._read_meta().sequence
        if last is None:
            if sequence:
                raise damaged(self._path, "COMMITTED is missing or damaged, so that nobody knows whether commits are missing")
            if self._committed_path.exists():
                committed.renew(self._committed_path, Committed())
            return
        if sequence < last.sequence:
            raise damaged(self._path, f"it is behind: it ends at commit {sequence}, and commit {last.sequence} was acknowledged")
        if num_damaged:
            log.warning("one block of COMMITTED is damaged; the other one says commit %d", last.sequence)

    def _read_meta(self) -> _Meta:
        rows = [_unsealed("meta", row, self._path) for row in self._db.execute("SELECT * FROM meta")]
        if len(rows) != 1:
            raise damaged(self._path, f"table meta has {len(rows)} rows instead of one")
        return _Meta(**dict(zip((field.name for field in fields(_Meta)), rows[0], strict=True)))

    def _rows(self, table: str, where: str = "", parameters: Sequence[Any] = (), meta: _Meta | None = None) -> Iterator[Row]:
        """The rows of a table without their checksums, which are checked, and taken out of the digest of `meta`."""
        clause = f" WHERE {where}" if where else ""
        for row in self._db.execute(f"SELECT * FROM {table}{clause}", parameters):
            if meta:
                meta.digest ^= row[-1]
            yield _unsealed(table, row, self._path)

    def _check_pages(self) -> None:
        """What SQLite itself finds wrong: no row shows it, and a later write would stumble over it."""
        for (line,) in self._db.execute("PRAGMA integrity_check"):
            if line != "ok":
                raise damaged(self._path, str(line))

    def _read(self) -> Catalog:
        meta = self._read_meta()
        banks = self._read_banks(meta=meta)
        for bank_id, *row in self._rows("records", meta=meta):
            banks[bank_id].put(*record_of(row))
        snapshots = self._read_snapshots(meta=meta)
        if meta.digest:
            raise damaged(self._path, "rows are missing, or came back after they were deleted (their checksums do not add up)")
        if any(bank_id not in banks for snapshot in snapshots.values() for bank_id in snapshot.banks):
            raise damaged(self._path, "a snapshot names a bank that does not exist")
        return Catalog(
            banks={bank.name: bank for bank in banks.values()},
            snapshots=snapshots,
            next_version=meta.next_version,
            next_snapshot_id=meta.next_snapshot_id,
        )

    def _read_banks(self, where: str = "", parameters: Sequence[Any] = (), meta: _Meta | None = None) -> dict[int, Bank]:
        return {row[0]: bank_of(row) for row in self._rows("banks", where, parameters, meta)}

    def _read_snapshots(
        self, where: str = "", where_parts: str = "", parameters: Sequence[Any] = (), meta: _Meta | None = None
    ) -> dict[int, Snapshot]:
        snapshots = {
            snapshot_id: Snapshot(id=snapshot_id, name=name, created_unix_ms=created_unix_ms, banks={}, revision=revision)
            for snapshot_id, name, created_unix_ms, revision in self._rows("snapshots", where, parameters, meta)
        }
        for snapshot_id, bank_id, num_experts in self._rows("snapshot_banks", where_parts, parameters, meta):
            snapshots[snapshot_id].banks[bank_id] = BankState(num_experts=num_experts, records={})
        for snapshot_id, bank_id, *row in self._rows("snapshot_records", where_parts, parameters, meta):
            expert, record = record_of(row)
            snapshots[snapshot_id].banks[bank_id].records[expert] = record
        return snapshots


_DISK_TROUBLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
)


def damaged(path: Path, what: str) -> CorruptRecord:
    """The error of an index that must not be trusted; it names the way out."""
    return CorruptRecord(f"index: {what}; `ooc-moe-server rebuild {path.parent}` makes it anew from the records")


def _committed(meta: _Meta) -> Committed:
    next_version = max(1, meta.next_version - VERSION_RESERVE)
    return Committed(sequence=meta.sequence, next_version=next_version, next_snapshot_id=meta.next_snapshot_id)


def _unsealed(table: str, row: Row, path: Path) -> Row:
    """The values of a row. Raises CorruptRecord when its checksum is not theirs."""
    values = row[:-1]
    if checksum(table, values) != row[-1]:
        raise damaged(path, f"a row of table {table} is damaged (it begins with {ascii(values[:3])[:100]})")
    return values

"""Reads and writes the tables of the index, row by row. Every row is stored with a checksum, which is checked when the row is read.

SQLite can lose committed rows without an error when its files are damaged (a flipped bit in the WAL hides every later commit), and it
returns a flipped row as if it were sound. Therefore:

- each row carries an xxh3 of its values;
- the table `meta`, with one row, holds the digest (the XOR of all other rows' checksums), which shows whether rows vanished or came back.

database.py adds the transactions around these calls.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from ooc_moe_server.catalog.catalog import Bank, BankState, Catalog, Record, Snapshot
from ooc_moe_server.catalog.records import Row, bank_of, bank_row, checksum, record_of, record_row, sealed
from ooc_moe_wire.errors import CorruptRecord, OocMoeError

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
# Errors of the disk or the process, which say nothing about the content of the index.
_DISK_TROUBLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
)


class Connection(Protocol):
    """The methods of a database connection that the index uses: a `sqlite3.Connection` in autocommit mode, or a replacement in a test."""

    @property
    def in_transaction(self) -> bool: ...  # noqa: D102

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Iterable[Any]: ...  # noqa: D102

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """A change to be made in the index: `record` becomes the current record of the expert `expert` in the bank `bank_id`."""

    bank_id: int
    expert: int
    record: Record


@dataclass(slots=True, kw_only=True)
class Meta:
    """The index's data about itself, the one row of the table `meta`: the number of its last transaction, the next unused ids, the digest.

    The digest is the XOR of the checksums of all other rows.
    """

    sequence: int = 0  # The number of the last transaction.
    next_version: int = 1
    next_snapshot_id: int = 1
    next_bank_id: int = 1
    digest: int = 0  # XOR of the checksums of all other rows.


class Tables:
    """Reads and writes the rows of the index through the connection `db`.

    Methods that write take the `Meta` of the transaction under way, and update its digest (the XOR of all rows' checksums).
    """

    def __init__(self, db: Connection, path: Path) -> None:
        """`path`: the path of the index file, which error messages name."""
        self._db, self._path = db, path

    @property
    def exist(self) -> bool:
        """Whether the SQLite file has any table yet."""
        return bool(list(self._db.execute("SELECT name FROM sqlite_master LIMIT 1")))

    def create(self) -> None:
        """Creates all tables in one transaction. They are empty except for the row of `meta`."""
        list(self._db.execute("BEGIN IMMEDIATE"))
        for statement in _SCHEMA:
            list(self._db.execute(statement))
        self._db.executemany("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", sealed("meta", [astuple(Meta())]))
        list(self._db.execute("COMMIT"))

    def read_meta(self) -> Meta:
        """Reads the one row of the table `meta`. Raises CorruptRecord."""
        rows = [self._unsealed("meta", row) for row in self._db.execute("SELECT * FROM meta")]
        if len(rows) != 1:
            raise damaged(self._path, f"table meta has {len(rows)} rows instead of one")
        return Meta(**dict(zip((field.name for field in fields(Meta)), rows[0], strict=True)))

    def write_meta(self, meta: Meta) -> None:
        """Replaces the one row of the table `meta`."""
        list(self._db.execute("DELETE FROM meta"))
        self._db.executemany("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", sealed("meta", [astuple(meta)]))

    def insert(self, meta: Meta, table: str, rows: Iterable[Row], *, or_replace: bool = False) -> None:
        """Adds rows to a table, and their checksums to the digest (the XOR of all rows' checksums) in `meta`.

        `or_replace`: rows with the same key are replaced. The caller must then remove their checksums from the digest.
        """
        with_checksums = sealed(table, rows)
        for row in with_checksums:
            meta.digest ^= row[-1]
        if with_checksums:
            places = ", ".join("?" * len(with_checksums[0]))
            self._db.executemany(f"INSERT {'OR REPLACE ' if or_replace else ''}INTO {table} VALUES ({places})", with_checksums)

    def remove(self, meta: Meta, table: str, where: str, parameters: Sequence[Any]) -> None:
        """Deletes the rows of a table that the SQL condition `where` selects, and removes their checksums from the digest in `meta`."""
        for (check,) in self._db.execute(f"SELECT xxh3 FROM {table} WHERE {where}", parameters):
            meta.digest ^= check
        list(self._db.execute(f"DELETE FROM {table} WHERE {where}", parameters))

    def put_records(self, meta: Meta, writes: Iterable[Write]) -> None:
        """Stores each record as the current one of its expert, in place of the expert's older record if there is one."""
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
        self.insert(meta, "records", rows.values(), or_replace=True)

    def add_bank(self, meta: Meta, bank: Bank) -> None:
        """Adds the row of a bank, and the rows of its records."""
        self.insert(meta, "banks", [bank_row(bank)])
        self.insert(meta, "records", [(bank.id, *record_row(expert, record)) for expert, record in bank.records.items()])

    def revise_bank(self, meta: Meta, bank_id: int, **changes: Any) -> None:
        """Changes fields of a bank's row (`changes`: new values by name), and sets its revision to the number of this transaction."""
        bank = self.banks("id = ?", (bank_id,))[bank_id]
        self.remove(meta, "banks", "id = ?", (bank_id,))
        self.insert(meta, "banks", [bank_row(replace(bank, revision=meta.sequence, **changes))])

    def rows(self, table: str, where: str = "", parameters: Sequence[Any] = (), meta: Meta | None = None) -> Iterator[Row]:
        """Yields the rows of a table, or those that the SQL condition `where` selects, without their checksums.

        `meta`: if given, each row's checksum is removed from the digest (the XOR of all rows' checksums) in `meta`. Once all tables are
        read, a digest of zero shows that no row is missing or superfluous.

        Raises:
            CorruptRecord: the checksum of a row does not match.
        """
        clause = f" WHERE {where}" if where else ""
        for row in self._db.execute(f"SELECT * FROM {table}{clause}", parameters):
            if meta:
                meta.digest ^= row[-1]
            yield self._unsealed(table, row)

    def banks(self, where: str = "", parameters: Sequence[Any] = (), meta: Meta | None = None) -> dict[int, Bank]:
        """Reads all banks, or those that the SQL condition `where` selects, without their records. Returns them by id.

        `meta`: if given, the checksums of the rows are removed from its digest. Raises CorruptRecord.
        """
        return {row[0]: bank_of(row) for row in self.rows("banks", where, parameters, meta)}

    def snapshots(
        self, where: str = "", where_parts: str = "", parameters: Sequence[Any] = (), meta: Meta | None = None
    ) -> dict[int, Snapshot]:
        """Reads snapshots with their banks and records: all, or those that SQL conditions select. Returns them by id. Raises CorruptRecord.

        `where` applies to the table of snapshots, `where_parts` to the tables of their banks and records; both use the same `parameters`.
        `meta`: if given, the checksums of the rows are removed from its digest.
        """
        snapshots = {
            snapshot_id: Snapshot(id=snapshot_id, name=name, created_unix_ms=created_unix_ms, banks={}, revision=revision)
            for snapshot_id, name, created_unix_ms, revision in self.rows("snapshots", where, parameters, meta)
        }
        for snapshot_id, bank_id, num_experts in self.rows("snapshot_banks", where_parts, parameters, meta):
            snapshots[snapshot_id].banks[bank_id] = BankState(num_experts=num_experts, records={})
        for snapshot_id, bank_id, *row in self.rows("snapshot_records", where_parts, parameters, meta):
            expert, record = record_of(row)
            snapshots[snapshot_id].banks[bank_id].records[expert] = record
        return snapshots

    def catalog(self) -> Catalog:
        """Reads and checks every row, and returns the catalog. Raises CorruptRecord, also when the digest shows missing or extra rows."""
        meta = self.read_meta()
        banks = self.banks(meta=meta)
        for bank_id, *row in self.rows("records", meta=meta):
            banks[bank_id].put(*record_of(row))
        snapshots = self.snapshots(meta=meta)
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

    def check_pages(self) -> None:
        """Raises CorruptRecord if SQLite's own check finds damage that reading rows does not show, but that a later write would fail on."""
        for (line,) in self._db.execute("PRAGMA integrity_check"):
            if line != "ok":
                raise damaged(self._path, str(line))

    def _unsealed(self, table: str, row: Row) -> Row:
        """Compares a row with the checksum at its end, and returns the row without the checksum. Raises CorruptRecord if they differ."""
        values = row[:-1]
        if checksum(table, values) != row[-1]:
            raise damaged(self._path, f"a row of table {table} is damaged (it begins with {ascii(values[:3])[:100]})")
        return values


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Runs the context, and turns every error that a damaged index can cause into CorruptRecord. `path`: the index file, for the message.

    An error of the disk or of memory does not mean damage, and is raised as it is.
    """
    try:
        yield
    except CorruptRecord:
        raise
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_TROUBLE:
            raise
        raise damaged(path, str(error)) from error
    except (OocMoeError, DecodeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise damaged(path, f"its rows do not fit together ({type(error).__name__}: {error})") from error


def damaged(path: Path, what: str) -> CorruptRecord:
    """Makes the error for an index that must not be trusted. `what`: what is wrong.

    The message names the command that repairs the index.
    """
    return CorruptRecord(f"index: {what}; `ooc-moe-server rebuild {path.parent}` makes it anew from the records")

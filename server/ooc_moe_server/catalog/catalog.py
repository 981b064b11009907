"""The catalog: the banks, their current records and the snapshots, in memory. The index (index/database.py) keeps the same on disk.

The catalog shows what is committed, and what was acknowledged in memory (`Record.unsaved`). It holds no bytes: a record refers to a slot,
or to the bank's seed. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import OocMoeError, UnknownBank
from ooc_moe_wire.layout import BankSpec, Layout
from ooc_moe_wire.rules import check_base_version, check_experts, find_bank, find_snapshot, snapshot_counts
from ooc_moe_wire.v1 import bank_pb2, snapshot_pb2, stats_pb2


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the slab of its record size. Its bytes do not change while a record, snapshot or reader refers to it."""

    record_bytes: int
    index: int


@dataclass(frozen=True, slots=True)
class Seed:
    """The initial value of an expert, which is computed from the bank's seed."""

    bank_id: int
    expert: int


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A version that lies in DRAM only: it was pushed with durability MEMORY and is not committed yet."""

    version: int


# Where the bytes of a record come from. The DRAM tier finds records by it; forks and restores share the source of the original.
Source = Slot | Seed | Unsaved


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The current record of one expert, or one that a snapshot keeps."""

    version: int
    slot: Slot | None  # None for the seeded value, and while the record is unsaved.
    checksums: Checksums | None  # None for the seeded value.
    writer_id: str = ""  # The writer and the number of its push, by which a repeated push is recognised.
    push_number: int = 0
    unsaved: bool = False  # Acknowledged in memory, and not in the index yet.

    @property
    def is_written(self) -> bool:
        """Whether a push wrote it; False for the seeded value."""
        return self.slot is not None or self.unsaved


UNWRITTEN = Record(version=0, slot=None, checksums=None)


class Lease(Protocol):
    """The part of an open writer that the catalog knows."""

    writer_id: str


class PushUnderWay(Protocol):
    """The part of a push under way that the catalog knows."""

    writer_id: str
    push_number: int
    outcome: asyncio.Future[int | OocMoeError]

    @property
    def is_durable(self) -> bool:
        """Whether the pushed record is committed, so that it survives a crash."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Bank:
    """A bank in its present state."""

    id: int
    uuid: bytes
    spec: BankSpec  # As it was created; the field `num_experts` below is the present number.
    num_experts: int
    created_unix_ms: int
    forked_from: str
    revision: int = 0  # The index's sequence number when the bank was last created, grown or restored. Pushes do not count.
    base_version: int = 1  # Of records with an older version, a rebuild takes only those of the manifest.
    records: dict[int, Record] = field(default_factory=dict)  # Experts without an entry are UNWRITTEN.
    num_written: int = 0
    newest_version: int = 0
    writer: Lease | None = None
    pushing: dict[int, PushUnderWay] = field(default_factory=dict)  # By expert: received, and without an outcome yet.
    deleted: bool = False
    access: stats_pb2.AccessStats = field(default_factory=stats_pb2.AccessStats)

    @property
    def name(self) -> str:
        """The name of the bank."""
        return self.spec.name

    @property
    def writer_id(self) -> str:
        """The id of the writer that has it open; empty when none has."""
        return self.writer.writer_id if self.writer else ""

    @property
    def layout(self) -> Layout:
        """The layout of its experts."""
        return self.spec.layout

    def check(self, experts: Sequence[int]) -> None:
        """Raises UnknownExpert for the first id outside the bank, and UnknownBank once the bank is deleted."""
        if self.deleted:
            raise UnknownBank(f"bank {self.name!r} was deleted")
        check_experts(self.name, experts, self.num_experts)

    def record(self, expert: int) -> Record:
        """The current record of an expert. Raises UnknownExpert, UnknownBank."""
        self.check((expert,))
        return self.records.get(expert, UNWRITTEN)

    def check_base(self, expert: int, base_version: int) -> None:
        """Refuses an update that started from another version than the current one.

        Raises:
            StaleVersion: there is a newer version.
            LostUpdate: there is only an older version: a crash took one that was acknowledged in memory.
            UnknownExpert, UnknownBank: there is none.
        """
        check_base_version(self.name, expert, base_version=base_version, current=self.record(expert).version)

    def source(self, expert: int, record: Record) -> Source:
        """Where the bytes of `record` come from."""
        if record.unsaved:
            return Unsaved(record.version)
        return record.slot or Seed(self.id, expert)

    def put(self, expert: int, record: Record) -> Record:
        """Makes `record` current; returns the record that it replaces."""
        old = self.records.get(expert, UNWRITTEN)
        self.records[expert] = record
        self.num_written += record.is_written - old.is_written
        self.newest_version = max(self.newest_version, record.version)
        return old

    def to_proto(self) -> bank_pb2.Bank:
        """The bank as a message."""
        return bank_pb2.Bank(
            spec=replace(self.spec, num_experts=self.num_experts).to_proto(),
            num_written=self.num_written,
            newest_version=self.newest_version,
            writer_id=self.writer_id,
            record_bytes=self.layout.record_bytes,
            created_unix_ms=self.created_unix_ms,
            forked_from=self.forked_from,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class BankState:
    """A bank's part of a snapshot."""

    num_experts: int
    records: dict[int, Record]


@dataclass(slots=True, kw_only=True, eq=False)
class Snapshot:
    """A snapshot: the states of its banks by bank id."""

    id: int
    name: str
    created_unix_ms: int
    banks: dict[int, BankState]
    revision: int = 0  # The index's sequence number when it was created, or when one of its banks was last deleted.

    def records(self) -> Iterator[tuple[int, int, Record]]:
        """Yields the id of the bank, the expert and the record, for every record of every bank."""
        for bank_id, state in self.banks.items():
            for expert, record in state.records.items():
                yield bank_id, expert, record

    def slots(self) -> list[Slot]:
        """The slots that the records refer to, one for each written record."""
        return [record.slot for _, _, record in self.records() if record.slot]


@dataclass(slots=True, kw_only=True)
class Catalog:
    """All banks by name, all snapshots by id, and the next version."""

    banks: dict[str, Bank] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    next_version: int = 1
    next_snapshot_id: int = 1

    def bank(self, name: str) -> Bank:
        """Returns a bank. Raises UnknownBank."""
        return find_bank(self.banks, name)

    def snapshot(self, snapshot_id: int) -> Snapshot:
        """Returns a snapshot. Raises UnknownSnapshot."""
        return find_snapshot(self.snapshots, snapshot_id)

    def bank_by_id(self, bank_id: int) -> Bank:
        """Returns the bank with an id, which must exist."""
        return next(bank for bank in self.banks.values() if bank.id == bank_id)

    def take_version(self) -> int:
        """Takes the next version of the store-wide sequence."""
        version = self.next_version
        self.next_version += 1
        return version

    def snapshot_to_proto(self, snapshot: Snapshot) -> snapshot_pb2.Snapshot:
        """A snapshot as a message."""
        banks = {self.bank_by_id(bank_id): part for bank_id, part in snapshot.banks.items()}
        num_experts, num_bytes = snapshot_counts((bank.layout.record_bytes, part.records.values()) for bank, part in banks.items())
        return snapshot_pb2.Snapshot(
            id=snapshot.id,
            name=snapshot.name,
            banks=[bank.name for bank in banks],
            created_unix_ms=snapshot.created_unix_ms,
            num_experts=num_experts,
            bytes=num_bytes,
        )


def unix_ms() -> int:
    """The wall-clock time in milliseconds since 1970, to be shown to people."""
    return time.time_ns() // 1_000_000

"""What the store holds, in memory: banks, their current records, snapshots. The index (index.py) keeps the same on disk.

Everything here shows committed state, and what was acknowledged in memory (`Record.unsaved`); it is read and changed on the event loop
alone. Knows nothing of bytes: a record is a slot, or the bank's seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import OocMoeError, UnknownBank
from ooc_moe_wire.layout import BankSpec, Layout
from ooc_moe_wire.rules import check_experts, find_bank, find_snapshot, snapshot_counts
from ooc_moe_wire.v1 import bank_pb2, snapshot_pb2, stats_pb2


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the slab of its record size. Its bytes never change while anything refers to it."""

    record_bytes: int
    index: int


@dataclass(frozen=True, slots=True)
class Seed:
    """The initial value of an expert, made from its bank's seed."""

    bank_id: int
    expert: int


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A version that lies in DRAM only: pushed with Durability MEMORY, not yet written."""

    version: int


# What an immutable record is made from, and so what names it in the DRAM tier: forks and restores share it.
Source = Slot | Seed | Unsaved


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The present state of one expert."""

    version: int
    slot: Slot | None  # None: the seeded value, or unsaved.
    checksums: Checksums | None  # None for the seeded value.
    writer_id: str = ""  # Who wrote it, by which push: what a repeat is recognised by.
    push_number: int = 0
    unsaved: bool = False  # Acknowledged in memory; not in the index.

    @property
    def is_written(self) -> bool:
        """Whether anybody ever pushed it."""
        return self.slot is not None or self.unsaved


UNWRITTEN = Record(version=0, slot=None, checksums=None)


class Lease(Protocol):
    """What the catalog knows of an open writer."""

    writer_id: str


class PushUnderWay(Protocol):
    """What the catalog knows of a write on its way to the disk."""

    writer_id: str
    push_number: int
    outcome: asyncio.Future[int | OocMoeError]
    durable: bool  # Of a version that is its outcome.


@dataclass(slots=True, kw_only=True, eq=False)
class Bank:
    """A bank as it stands."""

    id: int
    uuid: bytes
    spec: BankSpec  # As created; `num_experts` below is the present one.
    num_experts: int
    created_unix_ms: int
    forked_from: str
    revision: int = 0  # The index's sequence number when the bank last changed (made, grown, restored); a push is no change.
    base_version: int = 1  # Headers of older versions than this never became current after the last restore.
    records: dict[int, Record] = field(default_factory=dict)  # Experts without an entry are UNWRITTEN.
    num_written: int = 0
    newest_version: int = 0
    writer: Lease | None = None
    pushing: dict[int, PushUnderWay] = field(default_factory=dict)  # Received, not yet committed or refused.
    deleted: bool = False
    access: stats_pb2.AccessStats = field(default_factory=stats_pb2.AccessStats)

    @property
    def name(self) -> str:
        """Its name."""
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
        """Raises UnknownExpert for the first id outside the bank, UnknownBank once it is deleted: its slots are others' then."""
        if self.deleted:
            raise UnknownBank(f"bank {self.name!r} was deleted")
        check_experts(self.name, experts, self.num_experts)

    def record(self, expert: int) -> Record:
        """The current record of an expert. Raises UnknownExpert, UnknownBank."""
        self.check((expert,))
        return self.records.get(expert, UNWRITTEN)

    def source(self, expert: int, record: Record) -> Source:
        """What the bytes of `record` are made from."""
        if record.unsaved:
            return Unsaved(record.version)
        return record.slot or Seed(self.id, expert)

    def put(self, expert: int, record: Record) -> Record:
        """Makes `record` current; returns the one it replaces."""
        old = self.records.get(expert, UNWRITTEN)
        self.records[expert] = record
        self.num_written += record.is_written - old.is_written
        self.newest_version = max(self.newest_version, record.version)
        return old

    def to_proto(self) -> bank_pb2.Bank:
        """Its message."""
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
    """A named state of banks, by bank id."""

    id: int
    name: str
    created_unix_ms: int
    banks: dict[int, BankState]
    revision: int = 0  # As a bank's: it was taken, or lost a bank that was deleted.

    def slots(self, bank_id: int) -> list[Slot]:
        """The slots its part of a bank refers to."""
        return [record.slot for record in self.banks[bank_id].records.values() if record.slot]


@dataclass(slots=True, kw_only=True)
class Catalog:
    """All banks by name, all snapshots by id, and the next version."""

    banks: dict[str, Bank] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    next_version: int = 1
    next_snapshot_id: int = 1

    def bank(self, name: str) -> Bank:
        """Raises UnknownBank."""
        return find_bank(self.banks, name)

    def snapshot(self, snapshot_id: int) -> Snapshot:
        """Raises UnknownSnapshot."""
        return find_snapshot(self.snapshots, snapshot_id)

    def bank_by_id(self, bank_id: int) -> Bank:
        """The bank of an id that a snapshot names."""
        return next(bank for bank in self.banks.values() if bank.id == bank_id)

    def take_version(self) -> int:
        """The next version of the store-wide sequence."""
        version = self.next_version
        self.next_version += 1
        return version

    def snapshot_to_proto(self, snapshot: Snapshot) -> snapshot_pb2.Snapshot:
        """Its message."""
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
    """The time of day, for people."""
    return time.time_ns() // 1_000_000

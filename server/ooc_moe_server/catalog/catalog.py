"""The catalog: all banks, the current record of each expert, and all snapshots, in memory. The index (index/database.py) stores it on disk.

The catalog also contains records that the index does not have yet: they were acknowledged in memory only (`Record.unsaved`). The catalog
holds no bytes of experts: a record tells which slot of a file holds the bytes, or that they are computed from the bank's seed. To be used
on the event loop only.
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
    """The place of one record (the stored form of an expert) in a slab: the file that holds all records of `record_bytes` bytes.

    The bytes in a slot do not change while a record, a snapshot or a reader refers to it.
    """

    record_bytes: int
    index: int


@dataclass(frozen=True, slots=True)
class Seed:
    """The source of an expert's initial value, whose bytes are not stored but computed from the bank's seed when they are needed."""

    bank_id: int
    expert: int


@dataclass(frozen=True, slots=True)
class Unsaved:
    """The source of a version whose bytes are in DRAM only: it was pushed with durability MEMORY, and is not committed yet."""

    version: int


# Where the bytes of a record come from. The DRAM tier finds records by it; forks and restores share the source of the original.
Source = Slot | Seed | Unsaved


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Describes one version of an expert: its number, the slot that holds its bytes, their checksums, and who pushed it.

    The version is the one that fetches get now (the current one), or an older one that a snapshot keeps.
    """

    version: int
    slot: Slot | None  # None for the seeded value, and while the record is unsaved.
    checksums: Checksums | None  # None for the seeded value.
    writer_id: str = ""  # The writer and the number of its push, by which a repeated push is recognised.
    push_number: int = 0
    unsaved: bool = False  # Acknowledged in memory, and not in the index yet.

    @property
    def is_written(self) -> bool:
        """Whether a push wrote this version; False for the initial value, which is computed from the seed."""
        return self.slot is not None or self.unsaved


UNWRITTEN = Record(version=0, slot=None, checksums=None)


class Lease(Protocol):
    """The one attribute of an open writer that the catalog uses: its id. An open writer alone may push to its bank."""

    writer_id: str


class PushUnderWay(Protocol):
    """The attributes of a push under way that the catalog uses.

    The attributes tell whether a later push repeats this push, and how this push ended.
    """

    writer_id: str
    push_number: int
    outcome: asyncio.Future[int | OocMoeError]

    @property
    def is_durable(self) -> bool:
        """Whether the pushed record is committed, so that it survives a crash."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Bank:
    """A bank (a named set of experts) as it is now: its spec and size, the current record of each expert, its writer and its counters."""

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
        """The id of the writer that has the bank open for pushes; empty when no writer has it open."""
        return self.writer.writer_id if self.writer else ""

    @property
    def layout(self) -> Layout:
        """The layout that all experts of the bank share: their tensors, and the size of a record."""
        return self.spec.layout

    def check(self, experts: Sequence[int]) -> None:
        """Checks that the bank has these experts.

        Raises UnknownExpert for the first id that it lacks, and UnknownBank if the bank was deleted.
        """
        if self.deleted:
            raise UnknownBank(f"bank {self.name!r} was deleted")
        check_experts(self.name, experts, self.num_experts)

    def record(self, expert: int) -> Record:
        """Returns the current record of an expert. Raises UnknownExpert, UnknownBank."""
        self.check((expert,))
        return self.records.get(expert, UNWRITTEN)

    def check_base(self, expert: int, base_version: int) -> None:
        """Raises an error unless an update of an expert started from the expert's current version. `base_version`: the version from which
        the update started.

        Raises:
            StaleVersion: the current version is newer than `base_version`.
            LostUpdate: the current version is older: a crash lost a version that was acknowledged in memory.
            UnknownExpert, UnknownBank: there is no such expert or bank.
        """
        check_base_version(self.name, expert, base_version=base_version, current=self.record(expert).version)

    def source(self, expert: int, record: Record) -> Source:
        """Returns where the bytes of a record come from: a `Slot`, a `Seed`, or an `Unsaved` (in DRAM only).

        `record` may be any record of `expert`, also an older one than the current one.
        """
        if record.unsaved:
            return Unsaved(record.version)
        return record.slot or Seed(self.id, expert)

    def put(self, expert: int, record: Record) -> Record:
        """Makes `record` the current record of an expert: the one that fetches get. Changes only memory. Returns the previous record."""
        old = self.records.get(expert, UNWRITTEN)
        self.records[expert] = record
        self.num_written += record.is_written - old.is_written
        self.newest_version = max(self.newest_version, record.version)
        return old

    def to_proto(self) -> bank_pb2.Bank:
        """Converts the bank to the message that describes it to callers."""
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
    """One bank in a snapshot: its number of experts and their records at the moment when the snapshot was taken."""

    num_experts: int
    records: dict[int, Record]


@dataclass(slots=True, kw_only=True, eq=False)
class Snapshot:
    """A snapshot: for each of its banks (by bank id), the number of experts and their records at the moment when the snapshot was taken."""

    id: int
    name: str
    created_unix_ms: int
    banks: dict[int, BankState]
    revision: int = 0  # The index's sequence number when it was created, or when one of its banks was last deleted.

    def records(self) -> Iterator[tuple[int, int, Record]]:
        """Yields (bank id, expert, record) for every record in the snapshot."""
        for bank_id, state in self.banks.items():
            for expert, record in state.records.items():
                yield bank_id, expert, record

    def slots(self) -> list[Slot]:
        """Returns the slot of each record in the snapshot that a push wrote. Initial values have no slot.

        A slot that several records share is in the list several times.
        """
        return [record.slot for _, _, record in self.records() if record.slot]


@dataclass(slots=True, kw_only=True)
class Catalog:
    """Describes in memory what the store holds: banks by name and snapshots by id. Also has the lowest unused version and snapshot id."""

    banks: dict[str, Bank] = field(default_factory=dict)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    next_version: int = 1
    next_snapshot_id: int = 1

    def bank(self, name: str) -> Bank:
        """Returns the bank with this name. Raises UnknownBank."""
        return find_bank(self.banks, name)

    def snapshot(self, snapshot_id: int) -> Snapshot:
        """Returns the snapshot with this id. Raises UnknownSnapshot."""
        return find_snapshot(self.snapshots, snapshot_id)

    def bank_by_id(self, bank_id: int) -> Bank:
        """Returns the bank with this id. The bank must exist."""
        return next(bank for bank in self.banks.values() if bank.id == bank_id)

    def take_version(self) -> int:
        """Returns an unused version number for a record, and advances the counter, so that this run does not give the number out again."""
        version = self.next_version
        self.next_version += 1
        return version

    def snapshot_to_proto(self, snapshot: Snapshot) -> snapshot_pb2.Snapshot:
        """Converts a snapshot to the message that describes it to callers: its banks, and its number of experts and bytes."""
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
    """Returns the wall-clock time in milliseconds since 1970, to be shown to people."""
    return time.time_ns() // 1_000_000

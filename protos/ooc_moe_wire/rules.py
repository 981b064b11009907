"""The rules that every store of experts follows: the daemon, and the client's in-memory store.

Each rule is a pure function of values, so that the two stores cannot drift apart. They differ in how they keep bytes; they agree on which
version, name, count or error a call gives. An example, a restore:

    now         {0: version 7, 1: version 8}    expert 1 was not written when the snapshot was taken
    snapshot    {0: version 3}
    restored    {0: the bytes of version 3, as version 9;  1: its seeded value, as version 10}
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

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
from ooc_moe_wire.layout import BankSpec

SNAPSHOT_NAME_BYTES_MAX = 128


class StoredRecord(Protocol):
    """The present state of one expert, as far as the rules need it."""

    @property
    def is_written(self) -> bool:
        """Whether the expert's bytes were pushed. False: they are the seeded value, perhaps under a newer version after a restore."""


class NumberedPush(Protocol):
    """The identity of a push: the writer that sent it, and its number among all pushes of that writer, from 1 on."""

    @property
    def writer_id(self) -> str:
        """The writer that sent it."""

    @property
    def push_number(self) -> int:
        """Its number."""


Record = TypeVar("Record", bound=StoredRecord)
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


# Finding


def find_bank(banks: Mapping[str, Item], name: str) -> Item:
    """The bank of that name. Raises UnknownBank."""
    if name not in banks:
        raise UnknownBank(f"bank {name!r} does not exist")
    return banks[name]


def find_snapshot(snapshots: Mapping[int, Item], snapshot_id: int) -> Item:
    """The snapshot of that id. Raises UnknownSnapshot."""
    if snapshot_id not in snapshots:
        raise UnknownSnapshot(f"snapshot {snapshot_id} does not exist")
    return snapshots[snapshot_id]


def check_experts(bank: str, experts: Iterable[int], num_experts: int) -> None:
    """Raises UnknownExpert for the first id that is not one of the bank's `num_experts`."""
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise UnknownExpert(f"expert {expert}: bank {bank!r} has experts 0 to {num_experts - 1}")


# Banks


def check_same_bank(present: BankSpec, asked: BankSpec) -> None:
    """Checks that the bank that a caller creates is equal to the one that exists. The number of experts may differ by growth.

    Raises:
        BankExists: the layout or the seed is another one; the message says which.
    """
    if replace(present, num_experts=asked.num_experts) != asked:
        difference = "layout" if present.layout != asked.layout else f"seed: {present.seed}, not {asked.seed}"
        raise BankExists(f"bank {asked.name!r} exists with another {difference}")


def check_new_name(name: str, banks: Container[str]) -> None:
    """Raises BankExists when a fork would take the name of a bank that exists."""
    if name in banks:
        raise BankExists(f"bank {name!r} exists")


def grown(spec: BankSpec, num_experts: int) -> BankSpec:
    """The spec of a bank that was asked to have at least `num_experts`. A bank never shrinks. Raises InvalidRequest for too many."""
    return replace(spec, num_experts=max(spec.num_experts, num_experts))


def check_writer(bank: str, holder: str, writer_id: str = "") -> None:
    """Checks that a caller may write or change a bank: no other writer has it open.

    Args:
        bank: the bank's name, for the message.
        holder: the id of the writer that has the bank open; empty when none has.
        writer_id: the id of the writer that asks; empty for a caller that must find the bank closed.

    Raises:
        NotTheWriter: another writer has it open.
    """
    if holder and holder != writer_id:
        raise NotTheWriter(f"bank {bank!r}: writer {holder!r} has it open")


# Pushes


def check_base_version(bank: str, expert: int, *, base_version: int, current: int) -> None:
    """Checks that an update started from the current version.

    Raises:
        StaleVersion: there is a newer version.
        LostUpdate: there is only an older version: a crash took one that was acknowledged in memory.
    """
    what = f"expert {expert} of bank {bank!r}: base_version {base_version} is not the current version {current}"
    if base_version > current:
        raise LostUpdate(f"{what}: the store lost the newer one, which it had not yet written")
    if base_version != current:
        raise StaleVersion(what)


def is_repeat(earlier: NumberedPush, writer_id: str, push_number: int) -> bool:
    """Whether a push repeats `earlier`: its writer sent it again, under its old number, because no acknowledgement came.

    The writer then gets the outcome of `earlier`, and nothing is written. Only a store behind a network sees repeats.
    """
    return (earlier.writer_id, earlier.push_number) == (writer_id, push_number)


def listed_checksums(checksums: Checksums | None) -> Checksums:
    """The checksums that a listing shows. An expert with its seeded value has none (None), and is listed with zeros."""
    return checksums or Checksums(0, 0)


# Snapshots and forks


def check_snapshot_banks(banks: Sequence[str]) -> None:
    """Raises InvalidRequest unless these are one or more names, each once."""
    if not banks or len(set(banks)) != len(banks):
        raise InvalidRequest(f"banks: {list(banks)} is not a list of one or more different banks")


def check_snapshot_name(name: str) -> None:
    """Raises InvalidRequest for a name that is too long in UTF-8."""
    num_bytes = len(name.encode())
    if num_bytes > SNAPSHOT_NAME_BYTES_MAX:
        raise InvalidRequest(f"name: {num_bytes} bytes are more than {SNAPSHOT_NAME_BYTES_MAX}")


def check_same_snapshot(name: str, present: Collection[Hashable], asked: Collection[Hashable]) -> None:
    """Checks that a snapshot that is taken under an existing name is of the same banks. The existing one is then returned.

    Args:
        name: the name of both.
        present: the banks of the snapshot that exists, by id or by name.
        asked: the banks that the call names, in the same form.

    Raises:
        SnapshotExists: they differ.
    """
    if set(present) != set(asked):
        raise SnapshotExists(f"snapshot {name!r} exists, of other banks")


def snapshot_id_and_name(name: str, next_id: int, taken_names: Container[str]) -> tuple[int, str]:
    """The id and the name of a new snapshot. Without a name it is called "snapshot-ID", and ids whose name is taken are skipped."""
    if name:
        return next_id, name
    while f"snapshot-{next_id}" in taken_names:
        next_id += 1
    return next_id, f"snapshot-{next_id}"


def snapshot_counts(parts: Iterable[tuple[int, Iterable[StoredRecord]]]) -> tuple[int, int]:
    """Counts the written experts that a snapshot refers to, and the bytes of their records.

    Args:
        parts: for each bank that the snapshot still has, the bytes of one record, and the bank's records at that time.
    """
    written = [record_bytes for record_bytes, records in parts for record in records if record.is_written]
    return len(written), sum(written)


def snapshot_part(parts: Mapping[Key, Item], bank: Key, *, snapshot_id: int, bank_name: str) -> Item:
    """A bank's part of a snapshot, to fork it. Raises UnknownSnapshot when the snapshot is not of that bank."""
    if bank not in parts:
        raise UnknownSnapshot(f"snapshot {snapshot_id} is not of bank {bank_name!r}")
    return parts[bank]


def restored_records(present: Iterable[int], snapshot: Mapping[int, Record], unwritten: Record) -> dict[int, Record]:
    """The records that a restore makes current, in order of experts; the store gives each a new version.

    Args:
        present: the experts that have a record now, or that are being pushed: a push from before the restore must not land after it.
        snapshot: the bank's records when the snapshot was taken.
        unwritten: the record of an expert that the snapshot does not have: its seeded value.
    """
    return {expert: snapshot.get(expert, unwritten) for expert in sorted({*present, *snapshot})}


def forked_records(source: Mapping[int, Record]) -> dict[int, Record]:
    """The records that a fork begins with, in order of experts; the store gives each a new version.

    Only written records are taken over. The fork has its source's seed, and so the same seeded values, as version 0.
    """
    return {expert: record for expert, record in sorted(source.items()) if record.is_written}

"""The rules that every store of experts follows, the daemon as well as the client's in-memory store.

Each rule is a pure function. The daemon's store and the in-memory store call these functions, so the two agree on which version, name,
count or error a call gives, although they keep the experts' bytes in different ways. An example, the restore of a snapshot:

    now         {0: version 7, 1: version 8}    expert 1 was not written when the snapshot was taken
    snapshot    {0: version 3}
    restored    {0: the bytes of version 3, as version 9;  1: its seeded value, as version 10}

An expert's seeded value is its initial value, which is computed from the bank's seed.
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
    """One expert's state in a store, reduced to what the rules need to know: whether the expert was ever written."""

    @property
    def is_written(self) -> bool:
        """Whether the expert's bytes came from a push.

        False: they are the initial value from the bank's seed, perhaps under a newer version after a restore.
        """


class NumberedPush(Protocol):
    """What identifies a push: the writer that sent it, and its number among all pushes of that writer, from 1 on."""

    @property
    def writer_id(self) -> str:
        """The id of the writer that sent the push."""

    @property
    def push_number(self) -> int:
        """The number of the push among all pushes of its writer."""


Record = TypeVar("Record", bound=StoredRecord)
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


# Finding


def find_bank(banks: Mapping[str, Item], name: str) -> Item:
    """Returns the bank of that name. Raises UnknownBank when there is none."""
    if name not in banks:
        raise UnknownBank(f"bank {name!r} does not exist")
    return banks[name]


def find_snapshot(snapshots: Mapping[int, Item], snapshot_id: int) -> Item:
    """Returns the snapshot of that id. Raises UnknownSnapshot when there is none."""
    if snapshot_id not in snapshots:
        raise UnknownSnapshot(f"snapshot {snapshot_id} does not exist")
    return snapshots[snapshot_id]


def check_experts(bank: str, experts: Iterable[int], num_experts: int) -> None:
    """Raises UnknownExpert when an expert id is not in the bank, whose ids are 0 to `num_experts` - 1."""
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise UnknownExpert(f"expert {expert}: bank {bank!r} has experts 0 to {num_experts - 1}")


# Banks


def check_same_bank(present: BankSpec, asked: BankSpec) -> None:
    """Checks that a bank to be created equals the existing bank of its name, so that the existing one can be returned.

    The number of experts may differ, because the existing bank may have grown.

    Raises:
        BankExists: the layout or the seed differs; the message says which.
    """
    if replace(present, num_experts=asked.num_experts) != asked:
        difference = "layout" if present.layout != asked.layout else f"seed: {present.seed}, not {asked.seed}"
        raise BankExists(f"bank {asked.name!r} exists with another {difference}")


def check_new_name(name: str, banks: Container[str]) -> None:
    """Checks the name of a fork (a bank made as a copy of another). Raises BankExists when a bank already has that name."""
    if name in banks:
        raise BankExists(f"bank {name!r} exists")


def grown(spec: BankSpec, num_experts: int) -> BankSpec:
    """Returns the spec of a bank after it was grown to at least `num_experts`. A bank never shrinks.

    Raises InvalidRequest when that is more experts than a bank may have.
    """
    return replace(spec, num_experts=max(spec.num_experts, num_experts))


def check_writer(bank: str, holder: str, writer_id: str = "") -> None:
    """Checks that a caller may write or change a bank, that is, no other writer has it open.

    Args:
        bank: the bank's name, for the message.
        holder: the id of the writer that has the bank open; empty when none has.
        writer_id: the id of the writer that asks; empty for a call, such as a deletion, for which the bank must not be open at all.

    Raises:
        NotTheWriter: another writer has the bank open.
    """
    if holder and holder != writer_id:
        raise NotTheWriter(f"bank {bank!r}: writer {holder!r} has it open")


# Pushes


def check_base_version(bank: str, expert: int, *, base_version: int, current: int) -> None:
    """Checks that a push updates the expert's current version: `base_version`, from which the update started, equals `current`.

    Raises:
        StaleVersion: the store's version is newer.
        LostUpdate: the store's version is older: the store lost the newer version in a crash, after acknowledging but before writing that
            version.
    """
    what = f"expert {expert} of bank {bank!r}: base_version {base_version} is not the current version {current}"
    if base_version > current:
        raise LostUpdate(f"{what}: the store lost the newer one, which it had not yet written")
    if base_version != current:
        raise StaleVersion(what)


def is_repeat(earlier: NumberedPush, writer_id: str, push_number: int) -> bool:
    """Whether a push is a repeat of `earlier`: sent again by the same writer under the same number, because no acknowledgement came.

    The writer then gets the outcome of `earlier`, and nothing is written. Only a store behind a network sees repeats.
    """
    return (earlier.writer_id, earlier.push_number) == (writer_id, push_number)


def listed_checksums(checksums: Checksums | None) -> Checksums:
    """The checksums that a list of experts shows for one expert: the expert's own, or zeros when the expert was never written (None)."""
    return checksums or Checksums(0, 0)


# Snapshots and forks


def check_snapshot_banks(banks: Sequence[str]) -> None:
    """Checks the names of the banks to snapshot. Raises InvalidRequest when there is none, or one is repeated."""
    if not banks or len(set(banks)) != len(banks):
        raise InvalidRequest(f"banks: {list(banks)} is not a list of one or more different banks")


def check_snapshot_name(name: str) -> None:
    """Checks the name of a snapshot. Raises InvalidRequest when it has more than SNAPSHOT_NAME_BYTES_MAX bytes in UTF-8."""
    num_bytes = len(name.encode())
    if num_bytes > SNAPSHOT_NAME_BYTES_MAX:
        raise InvalidRequest(f"name: {num_bytes} bytes are more than {SNAPSHOT_NAME_BYTES_MAX}")


def check_same_snapshot(name: str, present: Collection[Hashable], asked: Collection[Hashable]) -> None:
    """Checks that a snapshot to be taken has the same banks as the existing snapshot of its name, so that the existing one can be returned.

    Args:
        name: the name of the existing snapshot and of the one to be taken.
        present: the banks of the existing snapshot, by id or by name.
        asked: the banks that the call names, in the same form.

    Raises:
        SnapshotExists: the banks differ.
    """
    if set(present) != set(asked):
        raise SnapshotExists(f"snapshot {name!r} exists, of other banks")


def snapshot_id_and_name(name: str, next_id: int, taken_names: Container[str]) -> tuple[int, str]:
    """Chooses and returns the id and the name of a new snapshot.

    The id is `next_id`, and the name is `name`. If `name` is empty, the name is "snapshot-ID" instead, with the first id from `next_id` on
    whose name is not taken.
    """
    if name:
        return next_id, name
    while f"snapshot-{next_id}" in taken_names:
        next_id += 1
    return next_id, f"snapshot-{next_id}"


def snapshot_counts(parts: Iterable[tuple[int, Iterable[StoredRecord]]]) -> tuple[int, int]:
    """Counts the written experts in a snapshot, and the bytes of their records. Returns both numbers.

    Args:
        parts: for each bank in the snapshot that was not deleted, the size of one record, and the bank's records in the snapshot.
    """
    written = [record_bytes for record_bytes, records in parts for record in records if record.is_written]
    return len(written), sum(written)


def snapshot_part(parts: Mapping[Key, Item], bank: Key, *, snapshot_id: int, bank_name: str) -> Item:
    """Returns what a snapshot keeps of one bank. Raises UnknownSnapshot when the snapshot does not include the bank."""
    if bank not in parts:
        raise UnknownSnapshot(f"snapshot {snapshot_id} is not of bank {bank_name!r}")
    return parts[bank]


def restored_records(present: Iterable[int], snapshot: Mapping[int, Record], unwritten: Record) -> dict[int, Record]:
    """Returns the record that each expert gets when a snapshot of its bank is restored, by expert, in order.

    The store gives each record a new version.

    Args:
        present: the experts that have a record now, and those that are being pushed: a push from before the restore must not be written
            after it.
        snapshot: the bank's records in the snapshot.
        unwritten: the record for experts that the snapshot does not have; it stands for the initial value.
    """
    return {expert: snapshot.get(expert, unwritten) for expert in sorted({*present, *snapshot})}


def forked_records(source: Mapping[int, Record]) -> dict[int, Record]:
    """Returns the records that a fork (a copy of a bank) starts with, by expert, in order. The store gives each record a new version.

    Only written records are copied. All other experts of the fork have the same initial values as in the source, because the fork has the
    source's seed; their version is 0.
    """
    return {expert: record for expert, record in sorted(source.items()) if record.is_written}

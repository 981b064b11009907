"""`ooc-moe-server rebuild`: makes a damaged or lost index anew from the other files of the data directory.

These are the manifests, the file COMMITTED (which holds the number of the index's last commit), and the header of every record.

The manifests (JSON files beside the index) tell which banks and snapshots exist, and which records were current when a bank last changed or
the daemon last started. A newer record on the disk was current too if all of these hold for its header:

    it names a bank that has a manifest                                  (otherwise the bank was deleted)
    its version is at least the manifest's `base_version`                (otherwise an earlier crash may have cut the write off)
    its version is below COMMITTED's `next_version`                      (otherwise the last crash may have cut the write off)
    it replaced the version of the manifest's row, or a newer one        (otherwise a restore refused the push)

Each expert gets the newest of these records whose body (its two sections: parameters, optimizer state) is undamaged. A push may come back
although it was refused if it failed in the last run because of an error of the disk, and was never repeated.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ooc_moe_server.atomic_files import move_aside, sync_directory
from ooc_moe_server.catalog.catalog import UNWRITTEN, Bank, Catalog, Record, Slot, Snapshot
from ooc_moe_server.index import commit_witness, manifests
from ooc_moe_server.index.commit_witness import LastCommit
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.open_store import open_files, read_copied_index
from ooc_moe_server.nvme.reserve import Reserve
from ooc_moe_server.repair import scan
from ooc_moe_server.repair.scan import Slabs, Track, untracked
from ooc_moe_wire.codec import RecordHeader
from ooc_moe_wire.errors import CorruptRecord

log = logging.getLogger(__name__)

# How far versions and snapshot ids jump when COMMITTED does not tell which were used.
_LEAP = 1 << 32
_INDEX_FILES = ("", "-wal", "-shm")


@dataclass(slots=True)
class Rebuilt:
    """The report of a rebuild: how many banks, experts and snapshots were recovered, and what was damaged or lost."""

    num_banks: int = 0
    num_experts: int = 0  # Experts with a written record.
    num_snapshots: int = 0
    num_bytes: int = 0  # The bytes of the records that were verified.
    damage: list[str] = field(default_factory=list)  # One line for each damaged or lost thing.
    notes: list[str] = field(default_factory=list)  # Other remarks, which are no damage.

    @property
    def is_whole(self) -> bool:
        """Whether everything was recovered: no damage was found."""
        return not self.damage


@dataclass(slots=True)
class _Seen:
    """What the record headers on the disk tell: the records of each expert that may be its current one, all headers, the newest version."""

    candidates: dict[tuple[bytes, int], list[Record]] = field(default_factory=lambda: defaultdict(list))  # By bank and expert.
    headers: dict[Slot, RecordHeader] = field(default_factory=dict)
    newest_version: int = 0


def rebuild(data_dir: Path, track: Track = untracked) -> Rebuilt:
    """Makes the index of a data directory anew, and moves the old index aside. The caller must have locked the directory.

    `track`: shows the progress. Returns what was recovered and what was not. Raises OocMoeError, OSError.
    """
    result = Rebuilt()
    last, _ = commit_witness.read(data_dir / "COMMITTED")
    if last is None:
        result.notes.append(f"COMMITTED is missing or damaged: versions and snapshot ids leap by {_LEAP}")
    banks, snapshots = _read_manifests(data_dir, result)
    with scan.open_slabs(data_dir) as slabs:
        seen = _scan(slabs, banks, last, result, track)
        _choose(slabs, banks, seen, result, track)
        kept = _bind(snapshots, banks, result)
        _check_snapshots(slabs, kept, banks, result, track)
    catalog, sequence = _catalog(banks, kept, seen, last)
    reserve = Reserve(data_dir)
    reserve.run(lambda: _replace_index(data_dir, catalog, sequence))
    next_version = max(catalog.next_version, last.next_version if last else 0)
    renewed = LastCommit(sequence=sequence, next_version=next_version, next_snapshot_id=catalog.next_snapshot_id)
    reserve.run(lambda: commit_witness.renew(data_dir / "COMMITTED", renewed))
    open_files(data_dir).index.close()  # Checks the new index, and makes the manifests equal to it.
    result.num_banks, result.num_snapshots = len(catalog.banks), len(kept)
    result.num_experts = sum(bank.num_written for bank in catalog.banks.values())
    return result


def _read_manifests(data_dir: Path, result: Rebuilt) -> tuple[dict[bytes, Bank], list[tuple[Snapshot, dict[int, bytes]]]]:
    """Reads all manifests. Returns the banks by uuid, and the snapshots, each with the uuids of its banks.

    The content of a damaged manifest is taken from the old index if that is sound; otherwise it is lost.
    """
    banks: dict[bytes, Bank] = {}
    snapshots: list[tuple[Snapshot, dict[int, bytes]]] = []
    old: Catalog | None = None
    for path in manifests.paths(data_dir):
        try:
            content = manifests.read(path)
            if isinstance(content, Bank):
                banks[content.uuid] = content
            else:
                snapshots.append(content)
        except (CorruptRecord, OSError) as error:
            old = old or _old_catalog(data_dir)
            found = _from_old_index(old, path, banks, snapshots)
            aside = move_aside(path)
            outcome = "it was taken from the old index" if found else "what it described is lost, unless a copy of it is put back"
            result.damage.append(f"{error}; {outcome} (moved to {aside.name})")
    for older, newer in _namesakes(banks.values()):
        result.damage.append(f"bank {older.name!r}: two manifests have this name; {newer.uuid.hex()} is the newer one and was taken")
        del banks[older.uuid]
    for number, bank in enumerate(sorted(banks.values(), key=lambda bank: (bank.created_unix_ms, bank.name)), start=1):
        bank.id = number
    return banks, snapshots


def _namesakes(banks: Iterable[Bank]) -> list[tuple[Bank, Bank]]:
    """Returns the pairs of banks that have the same name, the older bank first in each pair."""
    newest: dict[str, Bank] = {}
    pairs = []
    for bank in sorted(banks, key=lambda bank: bank.revision):
        if bank.name in newest:
            pairs.append((newest[bank.name], bank))
        newest[bank.name] = bank
    return pairs


def _old_catalog(data_dir: Path) -> Catalog:
    """Returns the content of the old index if all of it is sound, otherwise an empty catalog."""
    try:
        return read_copied_index(data_dir)
    except Exception as error:  # Expected: a damaged index is the usual reason for a rebuild.
        log.debug("the old index: %s", error)
        return Catalog()


def _from_old_index(old: Catalog, path: Path, banks: dict[bytes, Bank], snapshots: list[tuple[Snapshot, dict[int, bytes]]]) -> bool:
    """Takes the bank or snapshot of a damaged manifest from the old index, and adds it to `banks` or `snapshots`.

    Returns whether it was found.
    """
    for bank in old.banks.values():
        if bank.uuid.hex() == path.stem and path.parent.name == "banks":
            bank.base_version = old.next_version  # A sound index holds every committed record of the bank.
            banks[bank.uuid] = bank
            return True
    for snapshot in old.snapshots.values():
        if str(snapshot.id) == path.stem and path.parent.name == "snapshots":
            snapshots.append((snapshot, {bank_id: old.bank_by_id(bank_id).uuid for bank_id in snapshot.banks}))
            return True
    return False


def _scan(slabs: Slabs, banks: dict[bytes, Bank], last: LastCommit | None, result: Rebuilt, track: Track) -> _Seen:
    """Reads the header of every record on the disk, and collects the records that may be the current ones of their experts."""
    seen = _Seen()
    strangers: Counter[bytes] = Counter()

    def read(slot: Slot) -> RecordHeader | CorruptRecord | None:
        try:
            return slabs.header(slot)
        except CorruptRecord as error:
            return error

    slots = list(slabs.slots())
    for slot, header in zip(slots, scan.map_tracked(read, slots, "headers", track), strict=True):
        if isinstance(header, CorruptRecord):
            result.damage.append(f"{header}: if it held the newest record of an expert, that record is lost")
        elif header is not None:
            seen.headers[slot] = header
            seen.newest_version = max(seen.newest_version, header.version)
            bank = banks.get(header.bank_id)
            if bank is None:
                strangers[header.bank_id] += 1
            elif _was_current(header, bank, last) and _fits(header, slot, bank, result):
                seen.candidates[bank.uuid, header.expert].append(_record(header, slot))
    if strangers:
        result.notes.append(f"{strangers.total()} records of {len(strangers)} deleted banks (without a manifest) are left out")
    return seen


def _was_current(header: RecordHeader, bank: Bank, last: LastCommit | None) -> bool:
    """Whether a record was the current one of its expert at some time after the manifest was written.

    The module docstring has the rules.
    """
    row = bank.records.get(header.expert, UNWRITTEN)
    is_committed = last is None or header.version < last.next_version
    return header.version > row.version and header.base_version >= row.version and header.version >= bank.base_version and is_committed


def _fits(header: RecordHeader, slot: Slot, bank: Bank, result: Rebuilt) -> bool:
    """Whether the record in a slot has the section sizes of its bank. A misfit is added to the reported damage.

    If the record's expert is beyond the number in the manifest, grows the bank.
    """
    if slot.record_bytes != bank.layout.record_bytes or not scan.has_sizes_of(header, bank.layout):
        what = f"a record of bank {bank.name!r}, expert {header.expert}, with the sizes of another layout"
        result.damage.append(f"{scan.slot_name(slot)}: {what}")
        return False
    if header.expert >= bank.num_experts:
        result.damage.append(f"bank {bank.name!r} has {bank.num_experts} experts by its manifest, and a record of expert {header.expert}")
        bank.num_experts = header.expert + 1
    return True


def _record(header: RecordHeader, slot: Slot) -> Record:
    return Record(version=header.version, slot=slot, checksums=header.checksums, writer_id=header.writer_id, push_number=header.push_number)


def _choose(slabs: Slabs, banks: dict[bytes, Bank], seen: _Seen, result: Rebuilt, track: Track) -> None:
    """Makes the newest undamaged record of each expert the current one, and adds damaged ones to the report."""
    experts = [(bank, expert) for bank in banks.values() for expert in sorted(bank.records)]
    experts += [(banks[uuid], expert) for uuid, expert in seen.candidates if expert not in banks[uuid].records]

    def choose(item: tuple[Bank, int]) -> tuple[Bank, int, Record, list[str]]:
        bank, expert = item
        records = sorted(seen.candidates.get((bank.uuid, expert), ()), key=lambda record: record.version, reverse=True)
        if expert in bank.records:
            records.append(bank.records[expert])
        return bank, expert, *_newest_sound(slabs, bank, expert, records, seen)

    for bank, expert, record, damage in scan.map_tracked(choose, experts, "records", track):
        bank.put(expert, record)
        result.damage += damage
        result.num_bytes += record.slot.record_bytes if record.slot else 0


def _newest_sound(slabs: Slabs, bank: Bank, expert: int, records: list[Record], seen: _Seen) -> tuple[Record, list[str]]:
    """Returns the first undamaged one of `records` (newest first), or the newest if all are damaged; and the damage, one line each."""
    what = f"bank {bank.name!r}, expert {expert}"
    damage: list[str] = []
    for record in records:
        problem = _problem(slabs, bank, record, seen)
        if problem is None:
            if damage:
                damage.append(f"{what}: version {record.version} is current again" + ("" if record.slot else ", its initial value"))
            return record, damage
        damage.append(f"{what}: version {record.version} is damaged, or was never written to its end: {problem}")
    return records[0], [*damage, f"{what}: lost; fetches raise CorruptRecord until it is written anew, or a snapshot is restored"]


def _problem(slabs: Slabs, bank: Bank, record: Record, seen: _Seen | None) -> str | None:
    """Describes what is wrong with a record, or returns None when it is sound.

    With `seen`, the header in its slot must have the same checksums.
    """
    if record.slot is None or record.checksums is None:
        return None
    header = seen.headers.get(record.slot) if seen else None
    if header and header.checksums != record.checksums:
        return f"{scan.slot_name(record.slot)} holds another record"
    problem = slabs.check_body(record.slot, bank.layout.parameter_bytes, record.checksums)
    return problem and f"{scan.slot_name(record.slot)}: {problem}"


def _bind(snapshots: Iterable[tuple[Snapshot, dict[int, bytes]]], banks: dict[bytes, Bank], result: Rebuilt) -> list[Snapshot]:
    """Returns the snapshots with the new ids of their banks, without deleted banks, and without snapshots that have no bank left."""
    kept = []
    for snapshot, uuids in snapshots:
        states = {banks[uuids[place]].id: state for place, state in snapshot.banks.items() if uuids[place] in banks}
        if len(states) < len(snapshot.banks):
            result.notes.append(f"snapshot {snapshot.id} {snapshot.name!r}: one of its banks does not exist any more")
        if states:
            kept.append(replace(snapshot, banks=states))
    return kept


def _check_snapshots(slabs: Slabs, snapshots: list[Snapshot], banks: dict[bytes, Bank], result: Rebuilt, track: Track) -> None:
    """Verifies the records that only snapshots refer to, and adds the damaged ones to the report.

    A damaged record stays in its snapshot; after a restore of that snapshot, a fetch of the record raises CorruptRecord.
    """
    by_id = {bank.id: bank for bank in banks.values()}
    verified = {(record.slot, record.checksums) for bank in banks.values() for record in bank.records.values()}
    parts: list[tuple[Bank, int, Record, Snapshot]] = []
    for snapshot in snapshots:
        for bank_id, expert, record in snapshot.records():
            if (record.slot, record.checksums) not in verified:
                parts.append((by_id[bank_id], expert, record, snapshot))

    def check(part: tuple[Bank, int, Record, Snapshot]) -> str | None:
        bank, _, record, _ = part
        return _problem(slabs, bank, record, None)

    for (bank, expert, record, snapshot), problem in zip(parts, scan.map_tracked(check, parts, "snapshots", track), strict=True):
        result.num_bytes += record.slot.record_bytes if record.slot else 0
        if problem:
            result.damage.append(f"snapshot {snapshot.id} {snapshot.name!r}: bank {bank.name!r}, expert {expert} is lost: {problem}")


def _catalog(banks: dict[bytes, Bank], snapshots: list[Snapshot], seen: _Seen, last: LastCommit | None) -> tuple[Catalog, int]:
    """Returns the content of the new index as a catalog, and the number of the index's first transaction.

    Versions, snapshot ids and sequence numbers continue beyond all that were used, so that none is used twice.
    """
    records = [record for bank in banks.values() for record in bank.records.values()]
    records += [record for snapshot in snapshots for _, _, record in snapshot.records()]
    newest = max([seen.newest_version, *(record.version for record in records), *(bank.base_version for bank in banks.values())], default=0)
    newest_snapshot = max((snapshot.id for snapshot in snapshots), default=0)
    revision = max([*(bank.revision for bank in banks.values()), *(snapshot.revision for snapshot in snapshots)], default=0)
    catalog = Catalog(
        banks={bank.name: bank for bank in banks.values()},
        snapshots={snapshot.id: snapshot for snapshot in snapshots},
        next_version=max(newest + 1, last.next_version) if last else newest + 1 + _LEAP,
        next_snapshot_id=max(newest_snapshot + 1, last.next_snapshot_id) if last else newest_snapshot + 1 + _LEAP,
    )
    return catalog, max(revision, last.sequence if last else 0) + 1


def _replace_index(data_dir: Path, catalog: Catalog, sequence: int) -> None:
    """Builds the new index in a directory of its own, moves the files of the old index aside, and moves the new index to its place.

    A crash between the two moves leaves no index. The daemon then refuses to start with an empty one, and the rebuild can be repeated.
    """
    workshop = data_dir / "index.rebuilding"
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir()
    try:
        index = Index(workshop / "index.sqlite")
        try:
            index.fill(catalog, sequence)
        finally:
            index.close()  # Folds the WAL into the index file.
        _sync(workshop / "index.sqlite")
        path = data_dir / "index.sqlite"
        if any(path.with_name(path.name + suffix).exists() for suffix in _INDEX_FILES):
            _move_index_aside(path)
        os.replace(workshop / "index.sqlite", path)
        sync_directory(data_dir)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _move_index_aside(path: Path) -> None:
    number = 1
    while any(path.with_name(f"{path.name}.damaged-{number}{suffix}").exists() for suffix in _INDEX_FILES):
        number += 1
    for suffix in _INDEX_FILES:
        old = path.with_name(path.name + suffix)
        if old.exists():
            os.rename(old, path.with_name(f"{path.name}.damaged-{number}{suffix}"))
    sync_directory(path.parent)  # A WAL that is left behind would be taken for the WAL of the new index.


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

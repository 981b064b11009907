"""`ooc-moe-server verify`: reads everything that is committed, and says what is not as it was written. Changes nothing.

Knows nothing of repairing: `rebuild` makes a damaged index anew, a push or a restored snapshot replaces a damaged record, and a start of
the daemon makes manifests equal to the index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ooc_moe_server.catalog.catalog import Bank, Catalog, Record, Slot
from ooc_moe_server.index import commit_witness as committed
from ooc_moe_server.index import manifests
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.open_store import copied_index
from ooc_moe_server.repair import scan
from ooc_moe_server.repair.scan import Slabs, Track, untracked
from ooc_moe_wire.codec import Checksums, RecordHeader
from ooc_moe_wire.errors import CorruptRecord


@dataclass(slots=True)
class Verified:
    """What was read, and what is wrong with it."""

    num_banks: int = 0
    num_snapshots: int = 0
    num_records: int = 0  # Slots that were read.
    num_bytes: int = 0
    findings: list[str] = field(default_factory=list)  # One line each.
    notes: list[str] = field(default_factory=list)  # What is not as it will be after the next start, and no damage.

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"clean": self.is_clean, **asdict(self)}


@dataclass(frozen=True, slots=True)
class _Reference:
    """One record that refers to a slot."""

    what: str
    bank: Bank
    record: Record


def verify(data_dir: Path, track: Track = untracked) -> Verified:
    """Checks a data directory that the caller holds. Raises OSError."""
    result = Verified()
    catalog = _check_index(data_dir, result)
    if catalog is None:
        result.notes.append("which records are committed is not known without an index: none was read")
        return result
    result.num_banks, result.num_snapshots = len(catalog.banks), len(catalog.snapshots)
    _check_manifests(data_dir, catalog, result)
    with scan.opened(data_dir) as slabs:
        _check_records(slabs, catalog, result, track)
    return result


def _check_index(data_dir: Path, result: Verified) -> Catalog | None:
    if not (data_dir / "index.sqlite").exists() and not (data_dir / "COMMITTED").exists() and not list(data_dir.glob("slabs/*.slab")):
        result.notes.append("nothing was ever committed here")
        return Catalog()
    last, num_damaged = committed.read(data_dir / "COMMITTED")
    if last and num_damaged:
        result.findings.append("COMMITTED: one of its two blocks is damaged; the next commits write both anew")
    try:
        if not (data_dir / "index.sqlite").exists():
            raise CorruptRecord(f"index: index.sqlite is missing; `ooc-moe-server rebuild {data_dir}` makes it anew from the records")
        with copied_index(data_dir) as path:
            index = Index(path)
            try:
                return index.read()
            finally:
                index.close()
    except CorruptRecord as error:
        result.findings.append(str(error))
        return None


def _check_manifests(data_dir: Path, catalog: Catalog, result: Verified) -> None:
    """Damaged ones are findings. One that differs is not: the daemon may have ended between its commit and its manifest."""
    bank_dir, snapshot_dir = manifests.directories(data_dir)
    revisions = {bank_dir / f"{bank.uuid.hex()}.json": bank.revision for bank in catalog.banks.values()}
    revisions |= {snapshot_dir / f"{snapshot.id}.json": snapshot.revision for snapshot in catalog.snapshots.values()}
    found = {*bank_dir.glob("*.json"), *snapshot_dir.glob("*.json")}
    for path in sorted(found | revisions.keys()):
        name = f"manifest {path.parent.name}/{path.name}"
        if path not in found:
            result.notes.append(f"{name} is missing; the next start writes it")
            continue
        try:
            revision = manifests.read_bank(path).revision if path.parent == bank_dir else manifests.read_snapshot(path)[0].revision
        except (CorruptRecord, OSError) as error:
            result.findings.append(f"{error}; the next start writes it anew from the index")
            continue
        if revision != revisions.get(path):
            result.notes.append(f"{name} is not as the index says; the next start makes it so")


def _check_records(slabs: Slabs, catalog: Catalog, result: Verified, track: Track) -> None:
    references: dict[Slot, list[_Reference]] = defaultdict(list)
    for reference in _references(catalog):
        if reference.record.slot:
            references[reference.record.slot].append(reference)

    def check(item: tuple[Slot, list[_Reference]]) -> list[str]:
        return _findings(slabs, *item)

    for (slot, _), findings in zip(references.items(), scan.each(check, list(references.items()), "records", track), strict=True):
        result.findings += findings
        result.num_records += 1
        result.num_bytes += slot.record_bytes


def _references(catalog: Catalog) -> Iterator[_Reference]:
    by_id = {bank.id: bank for bank in catalog.banks.values()}
    for bank in catalog.banks.values():
        for expert, record in bank.records.items():
            yield _Reference(f"bank {bank.name!r}, expert {expert}, version {record.version}", bank, record)
    for snapshot in catalog.snapshots.values():
        for bank_id, state in snapshot.banks.items():
            for expert, record in state.records.items():
                what = f"snapshot {snapshot.id} {snapshot.name!r}, bank {by_id[bank_id].name!r}, expert {expert}, version {record.version}"
                yield _Reference(what, by_id[bank_id], record)


def _findings(slabs: Slabs, slot: Slot, references: list[_Reference]) -> list[str]:
    """What is wrong with a slot, for each that refers to it. The body is read once, however many do."""
    try:
        header = slabs.header(slot)
    except CorruptRecord:
        header = None
    bodies: dict[tuple[int, Checksums], str | None] = {}
    findings = []
    for reference in references:
        assert reference.record.checksums is not None
        problem = _contradiction(header, slot, reference)
        if problem is None:
            body = reference.bank.layout.parameter_bytes, reference.record.checksums
            if body not in bodies:
                bodies[body] = slabs.check_body(slot, *body)
            problem = bodies[body]
        if problem is None and header is None:
            problem = "the header block is damaged: the daemon serves the record, but a rebuild could miss it"
        if problem:
            findings.append(f"{reference.what}: {scan.name(slot)}: {problem}")
    return findings


def _contradiction(header: RecordHeader | None, slot: Slot, reference: _Reference) -> str | None:
    """Where the header and the index differ. A header older than the index row is a fork's or a restore's, which share bytes."""
    layout, record = reference.bank.layout, reference.record
    if slot.record_bytes != layout.record_bytes:
        return f"the bank's records have {layout.record_bytes} bytes"
    if header is None:
        return None
    if (header.parameter_bytes, header.optimizer_bytes) != (layout.parameter_bytes, layout.optimizer_bytes):
        return "its header has the sizes of another layout"
    if header.checksums != record.checksums or header.version > record.version:
        return f"it holds another record, of version {header.version}"
    return None

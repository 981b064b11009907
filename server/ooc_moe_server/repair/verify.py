"""`ooc-moe-server verify`: reads the index, the manifests and all records of a data directory, and reports damage. Changes no file.

Damage is repaired in other ways: `rebuild` makes a damaged index anew, a push or a restored snapshot replaces a damaged record, and a start
of the daemon makes the manifests equal to the index.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ooc_moe_server.catalog.catalog import Bank, Catalog, Record, Slot
from ooc_moe_server.index import commit_witness, manifests
from ooc_moe_server.index.open_store import read_copied_index
from ooc_moe_server.repair import scan
from ooc_moe_server.repair.scan import Slabs, Track, untracked
from ooc_moe_wire.codec import Checksums, RecordHeader
from ooc_moe_wire.errors import CorruptRecord


@dataclass(slots=True)
class Verified:
    """The report of `verify`: how much was read, what damage was found (`findings`), and differences that are no damage (`notes`)."""

    num_banks: int = 0
    num_snapshots: int = 0
    num_records: int = 0  # The number of slots that were read.
    num_bytes: int = 0
    findings: list[str] = field(default_factory=list)  # One line for each damage.
    notes: list[str] = field(default_factory=list)  # Differences that are no damage: the next start removes them.

    @property
    def is_clean(self) -> bool:
        """Whether no damage was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Returns this report as a dict that can be written as a JSON object."""
        return {"clean": self.is_clean, **asdict(self)}


@dataclass(frozen=True, slots=True)
class _Reference:
    """A record of a bank or of a snapshot, which refers to a slot. `what` describes it for messages."""

    what: str
    bank: Bank
    record: Record


def verify(data_dir: Path, track: Track = untracked) -> Verified:
    """Checks a data directory: its index, its manifests, and every record. The caller must have locked the directory.

    `track`: shows the progress. Raises OSError.
    """
    result = Verified()
    catalog = _check_index(data_dir, result)
    if catalog is None:
        result.notes.append("no record was read: without an index it is not known which records are committed")
        return result
    result.num_banks, result.num_snapshots = len(catalog.banks), len(catalog.snapshots)
    _check_manifests(data_dir, catalog, result)
    with scan.open_slabs(data_dir) as slabs:
        _check_records(slabs, catalog, result, track)
    return result


def _check_index(data_dir: Path, result: Verified) -> Catalog | None:
    """Checks COMMITTED and the index, and adds damage to the findings. Returns the catalog, or None when the index is damaged."""
    if not (data_dir / "index.sqlite").exists() and not (data_dir / "COMMITTED").exists() and not list(data_dir.glob("slabs/*.slab")):
        result.notes.append("nothing was ever committed here")
        return Catalog()
    last, num_damaged = commit_witness.read(data_dir / "COMMITTED")
    if last and num_damaged:
        result.findings.append("COMMITTED: one of its two blocks is damaged; the next commits write both anew")
    try:
        if not (data_dir / "index.sqlite").exists():
            raise CorruptRecord(f"index: index.sqlite is missing; `ooc-moe-server rebuild {data_dir}` makes it anew from the records")
        return read_copied_index(data_dir)
    except CorruptRecord as error:
        result.findings.append(str(error))
        return None


def _check_manifests(data_dir: Path, catalog: Catalog, result: Verified) -> None:
    """Adds damaged manifests to the findings. A manifest that differs from the index is only a note.

    The daemon may have ended between a commit and the write of its manifest.
    """
    bank_dir, snapshot_dir = manifests.directories(data_dir)
    revisions = {bank_dir / f"{bank.uuid.hex()}.json": bank.revision for bank in catalog.banks.values()}
    revisions |= {snapshot_dir / f"{snapshot.id}.json": snapshot.revision for snapshot in catalog.snapshots.values()}
    found = manifests.paths(data_dir)
    for path in sorted({*found, *revisions}):
        name = f"manifest {path.parent.name}/{path.name}"
        if path not in found:
            result.notes.append(f"{name} is missing; the next start writes it")
            continue
        try:
            content = manifests.read(path)
        except (CorruptRecord, OSError) as error:
            result.findings.append(f"{error}; the next start writes it anew from the index")
            continue
        revision = content.revision if isinstance(content, Bank) else content[0].revision
        if revision != revisions.get(path):
            result.notes.append(f"{name} differs from the index; the next start makes it equal")


def _check_records(slabs: Slabs, catalog: Catalog, result: Verified, track: Track) -> None:
    """Reads every slot that a record of a bank or snapshot refers to, and adds damaged records to the findings."""
    references: dict[Slot, list[_Reference]] = defaultdict(list)
    for reference in _references(catalog):
        if reference.record.slot:
            references[reference.record.slot].append(reference)

    def check(item: tuple[Slot, list[_Reference]]) -> list[str]:
        return _findings(slabs, *item)

    for (slot, _), findings in zip(references.items(), scan.map_tracked(check, list(references.items()), "records", track), strict=True):
        result.findings += findings
        result.num_records += 1
        result.num_bytes += slot.record_bytes


def _references(catalog: Catalog) -> Iterator[_Reference]:
    by_id = {bank.id: bank for bank in catalog.banks.values()}
    for bank in catalog.banks.values():
        for expert, record in bank.records.items():
            yield _Reference(f"bank {bank.name!r}, expert {expert}, version {record.version}", bank, record)
    for snapshot in catalog.snapshots.values():
        for bank_id, expert, record in snapshot.records():
            what = f"snapshot {snapshot.id} {snapshot.name!r}, bank {by_id[bank_id].name!r}, expert {expert}, version {record.version}"
            yield _Reference(what, by_id[bank_id], record)


def _findings(slabs: Slabs, slot: Slot, references: list[_Reference]) -> list[str]:
    """Checks the record in a slot. Describes what is wrong once for each record of `references`, all of which refer to this slot.

    References with the same checksums share one read.
    """
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
            findings.append(f"{reference.what}: {scan.slot_name(slot)}: {problem}")
    return findings


def _contradiction(header: RecordHeader | None, slot: Slot, reference: _Reference) -> str | None:
    """Describes how the header in a slot contradicts the index, or returns None when it does not.

    A header with an older version than the index row is no contradiction: forks and restores give new versions to the same bytes.
    """
    layout, record = reference.bank.layout, reference.record
    if slot.record_bytes != layout.record_bytes:
        return f"the bank's records have {layout.record_bytes} bytes"
    if header is None:
        return None
    if not scan.has_sizes_of(header, layout):
        return "its header has the sizes of another layout"
    if header.checksums != record.checksums or header.version > record.version:
        return f"it holds another record, of version {header.version}"
    return None

"""Manifests: one JSON file for each bank and snapshot, from which `rebuild` makes a lost index anew.

    banks/<uuid>.json     a bank: its spec and size, and the records that were current when it last changed or the daemon last started
    snapshots/<id>.json   a snapshot: the records that it refers to, with the uuids of their banks

- A push writes no manifest: the header of the pushed record on the disk tells which version it replaced.
- A deleted bank has no manifest, so that a rebuild cannot bring its records back.
- A change of a bank or snapshot is committed in the index first, and acknowledged when its manifests are written. A manifest that could not
  be written is called owed, and is written before the next change. Every start makes all manifests equal to the index.

Each file is one object, {"xxh3": ..., "content": {...}}; the checksum covers the bytes of the content as they stand in the file.

Calls block, and belong on the index's thread.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash
from google.protobuf import json_format

from ooc_moe_server.atomic_files import remove_durably, sync_directory, write_durably
from ooc_moe_server.catalog.catalog import Bank, BankState, Catalog, Snapshot
from ooc_moe_server.catalog.records import record_of, record_row
from ooc_moe_server.index.database import Index
from ooc_moe_wire.errors import CorruptRecord, OocMoeError
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import bank_pb2

log = logging.getLogger(__name__)

FORMAT = 1
_PREFIX, _MIDDLE, _SUFFIX = b'{"xxh3": "', b'", "content": ', b"}\n"
_XXH3_CHARS = 16
_CONTENT_AT = len(_PREFIX) + _XXH3_CHARS + len(_MIDDLE)
# Rows that are encoded in one call: the encoder blocks all other threads during a call.
_ROWS_AT_ONCE = 500


class Manifests:
    """Writes the manifests of a data directory: JSON copies of its banks and snapshots, from which `rebuild` makes a lost index anew.

    After a change, call `owe_bank` or `owe_snapshot`, which marks a manifest as out of date, and then `write_owed`, which writes it.
    """

    def __init__(self, data_dir: Path, *, base_version: int) -> None:
        """`base_version`: the first version that this run of the daemon gives out, which is written into the manifests.

        `rebuild` ignores a record on the disk that has an older version and is in no manifest: the index did not list it at the start.
        """
        self._banks, self._snapshots = directories(data_dir)
        self._base_version = base_version
        self._owed_banks: set[bytes] = set()
        self._owed_snapshots: set[int] = set()

    @property
    def is_owing(self) -> bool:
        """Whether a manifest is owed: a bank or snapshot changed, and its file does not show it yet."""
        return bool(self._owed_banks or self._owed_snapshots)

    def owe_bank(self, uuid: bytes) -> None:
        """Marks the manifest of a bank as out of date, because the bank changed or was deleted."""
        self._owed_banks.add(uuid)

    def owe_snapshot(self, snapshot_id: int) -> None:
        """Marks the manifest of a snapshot as out of date, because the snapshot changed or was deleted."""
        self._owed_snapshots.add(snapshot_id)

    def write_owed(self, index: Index) -> None:
        """Brings the out-of-date manifests up to date: writes those whose bank or snapshot is in the index, and removes the rest.

        Raises OSError; the manifests that were not written stay marked as out of date.
        """
        for uuid in list(self._owed_banks):
            bank = index.bank(uuid)
            _write_or_remove(self._bank_path(uuid), self._encode_bank(bank) if bank else None)
            self._owed_banks.discard(uuid)
        for snapshot_id in list(self._owed_snapshots):
            found = index.snapshot(snapshot_id)
            _write_or_remove(self._snapshot_path(snapshot_id), encode_snapshot(*found) if found else None)
            self._owed_snapshots.discard(snapshot_id)

    def owe_all(self, catalog: Catalog) -> None:
        """Marks the manifests of all banks and snapshots in the catalog as out of date."""
        self._owed_banks.update(bank.uuid for bank in catalog.banks.values())
        self._owed_snapshots.update(catalog.snapshots)

    def reconcile(self, catalog: Catalog) -> None:
        """Makes all manifests equal to the catalog of a sound index, and removes files that the catalog does not know. Raises OSError.

        A snapshot's manifest whose first fields are right already is not written again, which is faster.
        """
        for directory in (self._banks, self._snapshots):
            if not directory.exists():
                directory.mkdir()
                sync_directory(directory.parent)
        uuids = {bank.id: bank.uuid for bank in catalog.banks.values()}
        for bank in catalog.banks.values():
            write_durably(self._bank_path(bank.uuid), self._encode_bank(bank))
        for snapshot in catalog.snapshots.values():
            path = self._snapshot_path(snapshot.id)
            if not _begins_with(path, _snapshot_head(snapshot, uuids)):
                write_durably(path, encode_snapshot(snapshot, uuids))
        known = {self._bank_path(uuid) for uuid in uuids.values()} | {self._snapshot_path(number) for number in catalog.snapshots}
        for path in {*self._banks.glob("*.json"), *self._snapshots.glob("*.json")} - known:
            log.warning("%s/%s: removed, because the index does not know it", path.parent.name, path.name)
            remove_durably(path)
        self._owed_banks.clear()
        self._owed_snapshots.clear()

    def _encode_bank(self, bank: Bank) -> bytes:
        head = {
            "format": FORMAT,
            "uuid": bank.uuid.hex(),
            "spec": json_format.MessageToDict(bank.spec.to_proto()),
            "num_experts": bank.num_experts,
            "created_unix_ms": bank.created_unix_ms,
            "forked_from": bank.forked_from,
            "revision": bank.revision,
            "base_version": max(bank.base_version, self._base_version),
        }
        return _encode(head, (record_row(expert, record) for expert, record in sorted(bank.records.items())))

    def _bank_path(self, uuid: bytes) -> Path:
        return self._banks / f"{uuid.hex()}.json"

    def _snapshot_path(self, snapshot_id: int) -> Path:
        return self._snapshots / f"{snapshot_id}.json"


def directories(data_dir: Path) -> tuple[Path, Path]:
    """Returns the directory of the banks' manifests and the directory of the snapshots' manifests."""
    return data_dir / "banks", data_dir / "snapshots"


def paths(data_dir: Path) -> list[Path]:
    """Returns the paths of all manifests in a data directory, sorted."""
    return sorted(path for directory in directories(data_dir) for path in directory.glob("*.json"))


def read(path: Path) -> Bank | tuple[Snapshot, dict[int, bytes]]:
    """Reads the manifest of a bank if it lies in the directory "banks", otherwise of a snapshot. Raises CorruptRecord, OSError.

    Returns what `read_bank` or `read_snapshot` returns.
    """
    return read_bank(path) if path.parent.name == "banks" else read_snapshot(path)


def read_bank(path: Path) -> Bank:
    """Reads the manifest of a bank, and returns the bank with its records. The bank's id is 0, because only the index gives ids.

    Raises CorruptRecord, OSError.
    """
    content = _decode(path)
    try:
        bank = Bank(
            id=0,
            uuid=bytes.fromhex(content["uuid"]),
            spec=BankSpec.from_proto(json_format.ParseDict(content["spec"], bank_pb2.BankSpec())),
            num_experts=content["num_experts"],
            created_unix_ms=content["created_unix_ms"],
            forked_from=content["forked_from"],
            revision=content["revision"],
            base_version=content["base_version"],
        )
        for row in content["records"]:
            bank.put(*record_of(row))
    except (OocMoeError, json_format.ParseError, LookupError, ValueError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if path.stem != bank.uuid.hex():
        raise _damaged(path, f"it is of bank {bank.uuid.hex()}")
    return bank


def read_snapshot(path: Path) -> tuple[Snapshot, dict[int, bytes]]:
    """Reads the manifest of a snapshot. Raises CorruptRecord, OSError.

    Returns:
        The snapshot, and the uuids of its banks by bank id. The bank ids are 0, 1, ... in the order of the file, because manifests
        hold no bank ids.
    """
    content = _decode(path)
    try:
        snapshot = Snapshot(
            id=content["id"],
            name=content["name"],
            created_unix_ms=content["created_unix_ms"],
            revision=content["revision"],
            banks={place: BankState(num_experts=bank["num_experts"], records={}) for place, bank in enumerate(content["banks"])},
        )
        uuids = {place: bytes.fromhex(bank["uuid"]) for place, bank in enumerate(content["banks"])}
        for place, *row in content["records"]:
            expert, record = record_of(row)
            snapshot.banks[place].records[expert] = record
    except (LookupError, ValueError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if path.stem != str(snapshot.id):
        raise _damaged(path, f"it is of snapshot {snapshot.id}")
    return snapshot, uuids


def encode_snapshot(snapshot: Snapshot, uuids: dict[int, bytes]) -> bytes:
    """Returns the content of a snapshot's manifest file. `uuids`: the uuid of each bank of the snapshot, by bank id."""
    rows = (
        (place, *record_row(expert, record))
        for place, state in enumerate(snapshot.banks.values())
        for expert, record in sorted(state.records.items())
    )
    return _encode(_snapshot_head(snapshot, uuids), rows)


def _snapshot_head(snapshot: Snapshot, uuids: dict[int, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": snapshot.id,
        "name": snapshot.name,
        "created_unix_ms": snapshot.created_unix_ms,
        "revision": snapshot.revision,
        "banks": [{"uuid": uuids[bank_id].hex(), "num_experts": state.num_experts} for bank_id, state in snapshot.banks.items()],
    }


def _encode(head: dict[str, Any], rows: Iterable[Sequence[Any]]) -> bytes:
    content = (_text(head)[:-1] + ', "records": [' + ",\n".join(_texts(rows)) + "]}").encode()
    return _PREFIX + f"{xxhash.xxh3_64_intdigest(content):0{_XXH3_CHARS}x}".encode() + _MIDDLE + content + _SUFFIX


def _text(value: Any) -> str:
    return json.dumps(value)


def _texts(rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    rows = iter(rows)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        yield _text(some)[1:-1]


def _content(path: Path) -> bytes:
    """Reads the part of a manifest that its checksum covers. Raises CorruptRecord when the checksum does not match; OSError."""
    raw = path.read_bytes()
    content, xxh3 = raw[_CONTENT_AT : -len(_SUFFIX)], raw[len(_PREFIX) : len(_PREFIX) + _XXH3_CHARS]
    if f"{xxhash.xxh3_64_intdigest(content):0{_XXH3_CHARS}x}".encode() != xxh3:
        raise _damaged(path, "its checksum does not match")
    return content


def _decode(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_content(path))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f"it is not of format {FORMAT}")
    return content


def _begins_with(path: Path, head: dict[str, Any]) -> bool:
    """Whether the manifest at `path` is undamaged and its fields other than the records equal `head`.

    If so, its records are right too, because `head` contains the revision, which grows with each change.
    """
    try:
        return _content(path).startswith(_text(head)[:-1].encode())
    except (CorruptRecord, OSError):
        return False


def _write_or_remove(path: Path, content: bytes | None) -> None:
    if content is None:
        remove_durably(path)
        return
    if not path.parent.exists():
        os.mkdir(path.parent)
        sync_directory(path.parent.parent)
    write_durably(path, content)


def _damaged(path: Path, what: str) -> CorruptRecord:
    return CorruptRecord(f"manifest {path.parent.name}/{path.name}: {what}")

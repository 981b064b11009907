"""Converts records and banks to the rows of the index (the SQLite file) and back, and adds the checksum that every row carries.

A row is a tuple of plain values, so that manifests (the JSON copies of the index) can hold the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import xxhash

from ooc_moe_server.catalog.catalog import Bank, Record, Slot
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import bank_pb2

Row = tuple[Any, ...]
# expert, version, slab, slot, parameter checksum, optimizer checksum, writer id, push number. Slot None: the seeded value, under a newer
# version.
RecordRow = tuple[int, int, int | None, int | None, int | None, int | None, str, int]


def record_row(expert: int, record: Record) -> RecordRow:
    """Converts the record of an expert to a row of the index."""
    slab, slot = (record.slot.record_bytes, record.slot.index) if record.slot else (None, None)
    parameters = _signed(record.checksums.parameters) if record.checksums else None
    optimizer = _signed(record.checksums.optimizer) if record.checksums else None
    return expert, record.version, slab, slot, parameters, optimizer, record.writer_id, _signed(record.push_number)


def record_of(row: Sequence[Any]) -> tuple[int, Record]:
    """Converts a row of the index to the expert's id and its record. The inverse of `record_row`."""
    expert, version, slab, slot, parameters, optimizer, writer_id, push_number = row
    return expert, Record(
        version=version,
        slot=None if slot is None else Slot(slab, slot),
        checksums=None if parameters is None else Checksums(_unsigned(parameters), _unsigned(optimizer)),
        writer_id=writer_id,
        push_number=_unsigned(push_number),
    )


def bank_row(bank: Bank) -> Row:
    """Converts a bank to a row of the index. The row holds no records of the bank: these have rows of their own."""
    spec = bank.spec.to_proto().SerializeToString(deterministic=True)
    return (
        bank.id,
        bank.uuid,
        bank.name,
        spec,
        bank.num_experts,
        bank.created_unix_ms,
        bank.forked_from,
        bank.revision,
        bank.base_version,
    )


def bank_of(row: Row) -> Bank:
    """Converts a row of the index to a bank without records. The inverse of `bank_row`."""
    bank_id, uuid, _name, spec, num_experts, created_unix_ms, forked_from, revision, base_version = row
    return Bank(
        id=bank_id,
        uuid=uuid,
        spec=BankSpec.from_proto(bank_pb2.BankSpec.FromString(spec)),
        num_experts=num_experts,
        created_unix_ms=created_unix_ms,
        forked_from=forked_from,
        revision=revision,
        base_version=base_version,
    )


def sealed(table: str, rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of the table named `table`, each with the row's checksum appended as its last value."""
    return [(*row, checksum(table, row)) for row in rows]


def checksum(table: str, values: Row) -> int:
    """Computes the checksum of a row, as a signed 64-bit number: the xxh3 of the table's name and Python's `ascii(values)`.

    `ascii` writes values of different types differently: `ascii((1,))` and `ascii(("1",))` differ.
    """
    return _signed(int(xxhash.xxh3_64_intdigest((table + ascii(values)).encode())))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _unsigned(word: int) -> int:
    return word + (1 << 64) if word < 0 else word

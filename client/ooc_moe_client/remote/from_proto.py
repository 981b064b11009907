"""Converts protobuf messages from the daemon to the types of the store interface. Fields of the same name have the same meaning."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from ooc_moe_client.store import Bank, ExpertInfo, Snapshot, Tier
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import bank_pb2, expert_pb2, snapshot_pb2


def bank_from(message: bank_pb2.Bank) -> Bank:
    """Converts the message that describes a bank to a `Bank`."""
    return Bank(**_fields(message, Bank) | {"spec": BankSpec.from_proto(message.spec)})


def expert_from(message: expert_pb2.ExpertInfo) -> ExpertInfo:
    """Converts one entry of a list of experts to an `ExpertInfo`."""
    return ExpertInfo(**_fields(message, ExpertInfo) | {"tiers": tuple(map(Tier, message.tiers))})


def snapshot_from(message: snapshot_pb2.Snapshot) -> Snapshot:
    """Converts the message that describes a snapshot to a `Snapshot`."""
    return Snapshot(**_fields(message, Snapshot) | {"banks": tuple(message.banks)})


def _fields(message: Message, kind: type[Bank | ExpertInfo | Snapshot]) -> dict[str, Any]:
    """The values of all fields of the dataclass `kind`, by name, read from the message's fields of the same names."""
    return {item.name: getattr(message, item.name) for item in fields(kind)}

"""Messages of the wire as values of the store interface. Knows nothing of calls."""

from __future__ import annotations

from ooc_moe_client.store import Bank, ExpertInfo, Snapshot, Tier
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import bank_pb2, expert_pb2, snapshot_pb2


def bank_from(message: bank_pb2.Bank) -> Bank:
    """A bank."""
    return Bank(
        spec=BankSpec.from_proto(message.spec),
        num_written=message.num_written,
        newest_version=message.newest_version,
        writer_id=message.writer_id,
        record_bytes=message.record_bytes,
        created_unix_ms=message.created_unix_ms,
        forked_from=message.forked_from,
    )


def expert_from(message: expert_pb2.ExpertInfo) -> ExpertInfo:
    """One row of a listing."""
    return ExpertInfo(
        expert=message.expert,
        version=message.version,
        tiers=tuple(Tier(tier) for tier in message.tiers),
        record_bytes=message.record_bytes,
        parameter_xxh3=message.parameter_xxh3,
        optimizer_xxh3=message.optimizer_xxh3,
    )


def snapshot_from(message: snapshot_pb2.Snapshot) -> Snapshot:
    """A snapshot."""
    return Snapshot(
        id=message.id,
        name=message.name,
        banks=tuple(message.banks),
        created_unix_ms=message.created_unix_ms,
        num_experts=message.num_experts,
        bytes=message.bytes,
    )

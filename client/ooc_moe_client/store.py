"""What a trainer can ask of a store of experts: the `ExpertStore` interface and the values it speaks in.

`RemoteStore` (remote.py) asks a daemon over gRPC; `InMemoryStore` (in_memory.py) answers from a dict, for tests. Both give the same
outcomes and raise the same errors (`ooc_moe_wire.errors`). Knows nothing of caches or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ooc_moe_wire.layout import BankSpec, Buffer
from ooc_moe_wire.v1 import stats_pb2


class Sections(Enum):
    """Which part of an expert travels."""

    ALL = 0
    PARAMETERS = 1


class Plane(Enum):
    """How bytes travel between a store and its daemon: in streams of messages, or on one host through shared memory."""

    AUTO = "auto"  # Local where it can be had.
    STREAM = "stream"
    LOCAL = "local"


class Durability(Enum):
    """When a push is acknowledged."""

    DURABLE = 0  # After the commit: it survives a crash.
    MEMORY = 1  # Once it lies in the daemon's DRAM; a crash before it was written back loses it.


class Priority(Enum):
    """Demand is served before prefetch, everywhere."""

    DEMAND = 0
    PREFETCH = 1


class Tier(Enum):
    """Where the daemon found an expert. SEED: never written, made from the bank's seed."""

    DRAM = 1
    NVME = 2
    SEED = 3


class PrefetchState(Enum):
    """The daemon's answer to a prefetch of one expert."""

    REJECTED = 0
    RESIDENT = 1
    QUEUED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """A bank as it stands. `spec.num_experts` is the present number."""

    spec: BankSpec
    num_written: int
    newest_version: int
    writer_id: str
    record_bytes: int
    created_unix_ms: int
    forked_from: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """One fetched expert; its bytes lie where `into` said. `unchanged`: the known version is current and no bytes came."""

    expert: int
    version: int
    served_from: Tier
    unchanged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One expert to write. `body` is `layout.body_bytes` long and must not change until the push returns."""

    expert: int
    base_version: int
    body: Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertInfo:
    """One expert of a listing."""

    expert: int
    version: int
    tiers: tuple[Tier, ...]
    record_bytes: int
    parameter_xxh3: int
    optimizer_xxh3: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A named state of one or more banks. `bytes` counts what it refers to, shared or not."""

    id: int
    name: str
    banks: tuple[str, ...]
    created_unix_ms: int
    num_experts: int
    bytes: int


class ExpertStore(Protocol):
    """A store of experts. Synchronous, safe to use from several threads; every method may raise Unavailable or DeadlineExceeded."""

    def create_bank(self, spec: BankSpec) -> Bank:
        """Makes the bank, or answers it when an equal spec exists. Raises BankExists for another spec."""

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises the number of experts to at least `num_experts`."""

    def get_bank(self, name: str) -> Bank:
        """Raises UnknownBank."""

    def list_banks(self) -> list[Bank]:
        """In order of names."""

    def delete_bank(self, name: str) -> None:
        """Removes the bank and its part of every snapshot. Raises UnknownBank, NotTheWriter."""

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """Makes bank `name` from the present state of `source`, or from a snapshot of it."""

    def fetch(
        self,
        bank: str,
        experts: Sequence[int],
        *,
        into: Callable[[int], memoryview],
        sections: Sections = Sections.ALL,
        priority: Priority = Priority.DEMAND,
        known_versions: Sequence[int | None] | None = None,
    ) -> Iterator[Fetched]:
        """Yields experts as they arrive and are verified, in any order, each once.

        Args:
            bank: the bank's name.
            experts: distinct ids, at least one.
            into: gives the writable memory for an expert: `body_bytes`, or `parameter_bytes` for `Sections.PARAMETERS`. It is called once
                or more (again after a broken stream); what it returns is undefined until that expert is yielded.
            sections: parameters alone are cheaper to move.
            priority: demand goes before prefetch.
            known_versions: one per expert, None where nothing is held; an expert that is current moves no bytes.

        Raises:
            UnknownBank, UnknownExpert, TierFull.
            CorruptRecord, LostUpdate (an older version than a push through this store was acknowledged with): after yielding the experts
                that are sound.
        """

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """Writes experts; one outcome per push, in order: the new version, or the error that refused it.

        StaleVersion refuses what is based on an older version than the present one, LostUpdate what is based on one that is gone.
        Where the daemon went away for good in the middle, what it had answered keeps its outcome, and the error is that of the others: they
        may have been written, and the next push of such an expert, from the same version, finds out. Where it had answered nothing, the
        error is raised. The first push to a bank opens it for writing (see `release`).

        Raises:
            NotTheWriter: another writer has the bank open.
            InvalidRequest: a body of the wrong length, or NaN or infinity in a tensor, which it names. Nothing of the call was sent.
        """

    def open_for_writing(self, bank: str) -> None:
        """Takes the bank's lease now rather than at the first push. Raises NotTheWriter."""

    def release(self, bank: str) -> None:
        """Gives the lease back. No error when it was not held."""

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """Asks the daemon to bring experts from NVMe to DRAM; returns at once."""

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """Drops queued promotions (all of the bank when `experts` is empty); returns how many."""

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """All experts by id, fetched page by page."""

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """Takes the committed state of the banks in one cut."""

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """Newest first; of one bank, or of all."""

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """Brings its banks back to it; their records get new versions. Raises UnknownSnapshot, NotTheWriter."""

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Raises UnknownSnapshot."""

    def stats(self) -> stats_pb2.Stats:
        """The daemon's counters (message documented in v1/stats.proto)."""

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """The counters now and then once per interval, until the iterator is closed."""

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """Shows this trainer's HBM counters in the daemon's statistics."""

    def close(self) -> None:
        """Releases every bank and the channel."""

"""`ExpertStore`: the interface of every store of experts, and the values that go in and out of it.

`RemoteStore` (remote/store.py) is a daemon's store over gRPC; `InMemoryStore` (in_memory.py) keeps everything in this process. Both give
the same outcomes and raise the same errors (`ooc_moe_wire.errors`), which one test suite checks for both. Methods are documented here
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ooc_moe_wire.layout import BankSpec, Buffer, Layout
from ooc_moe_wire.v1 import stats_pb2


class Sections(Enum):
    """The part of an expert that is fetched: everything, or the parameters without the optimizer's moments."""

    ALL = 0
    PARAMETERS = 1

    def num_bytes(self, layout: Layout) -> int:
        """The bytes of this part of an expert."""
        return layout.body_bytes if self is Sections.ALL else layout.parameter_bytes

    def includes(self, other: Sections) -> bool:
        """Whether these sections include all of `other`."""
        return self is Sections.ALL or other is Sections.PARAMETERS


class Plane(Enum):
    """How bytes travel between a store and its daemon."""

    AUTO = "auto"  # LOCAL where the daemon is on this host and allows it, else STREAM.
    STREAM = "stream"  # In gRPC messages.
    LOCAL = "local"  # Through memory that this process shares with the daemon.


class Durability(Enum):
    """When a push is acknowledged."""

    DURABLE = 0  # After the commit: the write survives a crash.
    MEMORY = 1  # When the write lies in the daemon's DRAM. The daemon writes it back later; a crash before that loses it.


class Priority(Enum):
    """How urgent a fetch is. The daemon serves all demand before any prefetch."""

    DEMAND = 0
    PREFETCH = 1


class Tier(Enum):
    """Where the daemon found an expert. SEED: the expert is not written, and was computed from its bank's seed."""

    DRAM = 1
    NVME = 2
    SEED = 3


class PrefetchState(Enum):
    """What became of a request to promote one expert to DRAM."""

    REJECTED = 0  # There is no room, in the queue or in DRAM.
    RESIDENT = 1  # The expert was in DRAM already.
    QUEUED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """The present state of a bank: it has `spec.num_experts` experts, of which `num_written` are not at their seeded value."""

    spec: BankSpec
    num_written: int
    newest_version: int
    writer_id: str
    record_bytes: int
    created_unix_ms: int
    forked_from: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """One fetched expert. Its bytes are in the memory that `into` gave. `unchanged`: the known version is current, and no bytes came."""

    expert: int
    version: int
    served_from: Tier
    unchanged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One expert to write. `base_version` is the version that the update started from. `body` is `layout.body_bytes` long; leave it
    alone until the push returns.
    """

    expert: int
    base_version: int
    body: Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertInfo:
    """One row of a listing. The checksums of an expert that is not written are 0."""

    expert: int
    version: int
    tiers: tuple[Tier, ...]
    record_bytes: int
    parameter_xxh3: int
    optimizer_xxh3: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A named state of one or more banks. It counts the written experts that it refers to, and their bytes, shared with others or not."""

    id: int
    name: str
    banks: tuple[str, ...]
    created_unix_ms: int
    num_experts: int
    bytes: int


class ExpertStore(Protocol):
    """A store of experts. Every method blocks, may be called from several threads, and may raise Unavailable or DeadlineExceeded.

    A store is one writer. The first push to a bank takes the bank's lease, and other writers are refused until `release` or `close`.
    """

    def create_bank(self, spec: BankSpec) -> Bank:
        """Creates a bank; returns the present one when a bank of an equal spec exists. Raises BankExists for another spec of that name."""

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises the bank's number of experts to at least `num_experts`. A bank never shrinks. Raises UnknownBank, InvalidRequest."""

    def get_bank(self, name: str) -> Bank:
        """The present state of a bank. Raises UnknownBank."""

    def list_banks(self) -> list[Bank]:
        """All banks, in order of their names."""

    def delete_bank(self, name: str) -> None:
        """Deletes a bank and its part of every snapshot. Raises UnknownBank, and NotTheWriter while any writer has it open."""

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """Creates bank `name` with the experts of `source`, as they are now or as they were in a snapshot.

        Raises UnknownBank, BankExists, UnknownSnapshot, and InvalidRequest for a name that no bank may have.
        """

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
        """Yields each expert once, when its bytes have arrived and were verified. The order is the store's.

        Args:
            bank: the bank's name.
            experts: distinct ids, at least one.
            into: returns the writable memory for an expert, `sections.num_bytes(layout)` long. It is called again for the same expert
                after a broken connection. The content of that memory is undefined until the expert is yielded.
            sections: which part of each expert to fetch.
            priority: DEMAND when the caller needs the experts now, PREFETCH when it will need them later.
            known_versions: for each expert the version that the caller has, or None. If that is current, no bytes are moved.

        Raises:
            UnknownBank, UnknownExpert.
            TierFull: the daemon has no room to bring an expert to DRAM.
            CorruptRecord: the bytes of an expert do not match their checksum. Raised after the sound experts were yielded.
            LostUpdate: an expert has an older version than this store's last push of it was acknowledged with. Raised likewise.
        """

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """Writes experts, and returns one outcome per push, in order: the new version, or the error that refused the push.

        StaleVersion refuses an update of a version that is older than the current one. LostUpdate refuses an update of a version that the
        store no longer has.

        When the daemon goes away for good in the middle, pushes that it answered keep their outcomes, and the others get the error as
        theirs. Those may or may not have been written; the next push of such an expert from the same version finds out. When the daemon
        answered none, the error is raised.

        Raises:
            NotTheWriter: another writer has the bank open.
            InvalidRequest: a body has the wrong length, or a tensor, which the message names, holds NaN or infinity. Nothing was sent.
        """

    def open_for_writing(self, bank: str) -> None:
        """Takes the bank's lease now rather than at the first push. Raises UnknownBank, NotTheWriter."""

    def release(self, bank: str) -> None:
        """Gives the bank's lease back. Does nothing when this store does not hold it."""

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """Asks the daemon to promote experts from NVMe to DRAM, and returns at once. Raises UnknownBank, UnknownExpert."""

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """Cancels queued promotions of these experts, or of the whole bank when `experts` is empty; returns how many."""

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """Yields all experts of a bank in order of their ids."""

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """Takes a snapshot of the committed state of all these banks at one moment.

        Without a name it is called "snapshot-ID". With the name of a snapshot of the same banks, that snapshot is returned.

        Raises UnknownBank, SnapshotExists (the name belongs to a snapshot of other banks), InvalidRequest.
        """

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """The snapshots that hold `bank` (empty: all snapshots), the newest first."""

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """Brings the banks of a snapshot back to their state in it, under new versions. Their number of experts stays as it is.

        Raises UnknownSnapshot, NotTheWriter.
        """

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Deletes a snapshot; the banks keep their state. Raises UnknownSnapshot."""

    def stats(self) -> stats_pb2.Stats:
        """The daemon's counters. v1/stats.proto documents them."""

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """Yields the counters now, and then once per interval, until the iterator is closed."""

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """Sends this trainer's HBM counters to the daemon, which shows them in its statistics. `activity`: what the trainer does now."""

    def close(self) -> None:
        """Releases every bank, and ends the connection."""

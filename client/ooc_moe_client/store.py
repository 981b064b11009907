"""`ExpertStore`: the interface of every store of experts, and the types of its arguments and results.

`RemoteStore` (remote/store.py) uses a daemon's store over gRPC; `InMemoryStore` (in_memory.py) keeps all experts in this process. Both
stores give the same outcomes and raise the same errors (`ooc_moe_wire.errors`); one test suite checks that for both stores. The methods are
fully documented in this file only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ooc_moe_wire.layout import BankSpec, Buffer, Layout
from ooc_moe_wire.v1 import stats_pb2


class Sections(Enum):
    """Which part of an expert to fetch: ALL is the parameters and the optimizer's moments, PARAMETERS is the parameters alone."""

    ALL = 0
    PARAMETERS = 1

    def num_bytes(self, layout: Layout) -> int:
        """The number of bytes that these sections of one expert take in the given layout."""
        return layout.body_bytes if self is Sections.ALL else layout.parameter_bytes

    def includes(self, other: Sections) -> bool:
        """Whether these sections contain all of `other`. ALL includes ALL and PARAMETERS; PARAMETERS includes only PARAMETERS."""
        return self is Sections.ALL or other is Sections.PARAMETERS


class Plane(Enum):
    """The way by which bytes travel between a client and its daemon.

    STREAM: in gRPC messages. LOCAL: through memory that this process shares with the daemon. AUTO: LOCAL where the daemon is on this host
    and allows it, else STREAM.
    """

    AUTO = "auto"
    STREAM = "stream"
    LOCAL = "local"


class Durability(Enum):
    """How safe a pushed expert must be before the daemon acknowledges the push.

    DURABLE: acknowledged when the write is committed to NVMe, so it survives a crash. MEMORY: acknowledged when the write lies in the
    daemon's DRAM. The daemon writes it to NVMe later; a crash before that loses it.
    """

    DURABLE = 0
    MEMORY = 1


class Priority(Enum):
    """How urgent a fetch is: DEMAND when the caller waits for the experts, PREFETCH when it will need them later.

    The daemon serves all DEMAND fetches before any PREFETCH.
    """

    DEMAND = 0
    PREFETCH = 1


class Tier(Enum):
    """The place where the daemon found an expert: in its DRAM, in its NVMe files, or in neither (SEED).

    A SEED expert was never written; its bytes were computed from its bank's seed.
    """

    DRAM = 1
    NVME = 2
    SEED = 3


class PrefetchState(Enum):
    """The daemon's answer to a request to promote (copy ahead of use) one expert from NVMe to DRAM.

    REJECTED: there is no room, in the queue or in DRAM. RESIDENT: the expert was in DRAM already. QUEUED: the copy is queued or under way.
    """

    REJECTED = 0
    RESIDENT = 1
    QUEUED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Bank:
    """A description of a bank (a named set of experts) at the time of the call.

    Attributes:
        spec: the bank's name, layout and seed, and its number of experts.
        num_written: how many experts no longer have their initial value, which is computed from the seed.
        newest_version: the highest version number of any of its experts.
        writer_id: the writer that has the bank open; empty when none has.
        record_bytes: the size of one expert's record in the store, its header block included.
        created_unix_ms: when the bank was created, in milliseconds since 1970.
        forked_from: the bank that this one was forked (copied) from; empty when it is no fork.
    """

    spec: BankSpec
    num_written: int
    newest_version: int
    writer_id: str
    record_bytes: int
    created_unix_ms: int
    forked_from: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """The result of fetching one expert. The expert's bytes are not in it: they are in the memory that the `into` of the fetch returned.

    Attributes:
        expert: the expert's id.
        version: the version that the store has.
        served_from: where the daemon found the expert.
        unchanged: True when the caller's known version is the store's version. Then no bytes were moved.
    """

    expert: int
    version: int
    served_from: Tier
    unchanged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One expert to write to the store.

    Attributes:
        expert: its id.
        base_version: the version that the caller read and then updated.
        body: the new bytes of both sections (parameters, optimizer state), `layout.body_bytes` long. Do not change them before the push
            returns.
    """

    expert: int
    base_version: int
    body: Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertInfo:
    """What `list_experts` says of one expert.

    Attributes:
        expert: the expert's id.
        version: its version number.
        tiers: the places where the store has its bytes.
        record_bytes: the size of its record in the store.
        parameter_xxh3: the checksum of its parameters; 0 for an expert that was never written.
        optimizer_xxh3: the checksum of its optimizer moments; 0 for an expert that was never written.
    """

    expert: int
    version: int
    tiers: tuple[Tier, ...]
    record_bytes: int
    parameter_xxh3: int
    optimizer_xxh3: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A saved state of one or more banks, with an id and a name.

    Attributes:
        id: the snapshot's number.
        name: the snapshot's name.
        banks: the names of the banks.
        created_unix_ms: when the snapshot was taken, in milliseconds since 1970.
        num_experts: how many written experts the snapshot keeps.
        bytes: the size of these experts' records. It includes records that other snapshots, or the banks as they are now, also use.
    """

    id: int
    name: str
    banks: tuple[str, ...]
    created_unix_ms: int
    num_experts: int
    bytes: int


class ExpertStore(Protocol):
    """The interface of a store of experts: fetches and pushes experts, and manages banks (named sets of experts) and snapshots.

    Every method blocks, may be called from several threads, and may raise Unavailable or DeadlineExceeded.

    Each store object counts as one writer. Its first push to a bank takes the bank's lease, the sole right to write the bank. Other writers
    are then refused until this store calls `release` or `close`.
    """

    def create_bank(self, spec: BankSpec) -> Bank:
        """Creates a bank, or returns the existing bank when that has an equal spec (it may have grown since).

        Raises:
            BankExists: a bank of that name has another layout or seed.
        """

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises the bank's number of experts to `num_experts`, if it has fewer. A bank never shrinks.

        Raises UnknownBank, InvalidRequest.
        """

    def get_bank(self, name: str) -> Bank:
        """Returns the description of a bank as it is now. Raises UnknownBank."""

    def list_banks(self) -> list[Bank]:
        """Returns the descriptions of all banks, sorted by name."""

    def delete_bank(self, name: str) -> None:
        """Deletes a bank, and its experts in every snapshot. Raises UnknownBank, and NotTheWriter while any writer has the bank open."""

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """Creates a bank called `name` as a copy of the bank `source`: as `source` is now, or as it was in the snapshot `snapshot_id`.

        Raises UnknownBank, BankExists, UnknownSnapshot, and InvalidRequest when `name` is not allowed as a bank's name.
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
        """Fetches experts into the caller's memory. Yields each expert once, when its bytes have arrived and were verified, in any order.

        Args:
            bank: the bank's name.
            experts: distinct ids, at least one.
            into: returns the writable memory for an expert, `sections.num_bytes(layout)` long. It is called again for the same expert after
                a broken connection. The content of that memory is undefined until the expert is yielded.
            sections: which part of each expert to fetch.
            priority: DEMAND when the caller needs the experts now, PREFETCH when it will need them later.
            known_versions: for each expert the version that the caller has, or None. If that is the store's version, no bytes are moved.

        Raises:
            UnknownBank, UnknownExpert.
            TierFull: the daemon has no room to bring an expert to DRAM.
            CorruptRecord: the bytes of an expert do not match their checksum. Raised after all undamaged experts were yielded.
            LostUpdate: the store returned an older version of an expert than the one it had acknowledged to this client's last push. Raised
                after all other experts were yielded, too.
        """

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """Writes experts to the store. Returns one outcome per push, in the order of `pushes`.

        An outcome is the new version, or the error that refused the push. StaleVersion: `base_version` is older than the store's version.
        LostUpdate: `base_version` is newer than the store's version, so the store has lost it.

        When the daemon goes away and does not come back during the call, pushes that it has answered keep their outcomes. For all others
        the error becomes the outcome: they may or may not have been written. To find out, push the expert again from the same
        `base_version`. When the daemon answered none of the pushes, the error is raised.

        Args:
            bank: the bank's name.
            pushes: the experts to write, each once.
            durability: when the daemon acknowledges a push. DURABLE: when it survives a crash. MEMORY: already when its bytes are in the
                daemon's DRAM.

        Raises:
            NotTheWriter: another writer has the bank open.
            InvalidRequest: a body has the wrong length, or a tensor, which the message names, holds NaN or infinity. Nothing was sent.
        """

    def open_for_writing(self, bank: str) -> None:
        """Takes the bank's lease (the sole right to write) now; otherwise the first push takes it. Raises UnknownBank, NotTheWriter."""

    def release(self, bank: str) -> None:
        """Gives back the bank's lease (the sole right to write). Does nothing when this store does not hold the lease."""

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """Asks the daemon to copy experts from its NVMe to its DRAM, and returns before that is done, with one answer per expert.

        Raises UnknownBank, UnknownExpert.
        """

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """Cancels prefetches of these experts that the daemon has queued but not begun. Returns the number of cancelled prefetches.

        When `experts` is empty, the queued prefetches of the whole bank are cancelled.
        """

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """Yields the version, tiers, size and checksums of every expert of a bank, in order of expert ids."""

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """Takes a snapshot: saves the state that all these banks have at one common moment.

        Pushes that were acknowledged in memory (see `Durability`) are written to NVMe first. Without a name, the snapshot is called
        "snapshot-ID". When a snapshot of the same banks already has the name, that snapshot is returned.

        Raises UnknownBank, SnapshotExists (a snapshot of other banks has the name), InvalidRequest.
        """

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """Returns the snapshots that include `bank`, the newest first. With an empty `bank`, returns all snapshots."""

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """Gives every expert of the snapshot's banks the bytes it had in the snapshot, under a new version. Returns the snapshot.

        Experts that had not been written when the snapshot was taken go back to their initial values. The banks keep their number of
        experts, even if they have grown.

        Raises UnknownSnapshot, NotTheWriter.
        """

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Deletes a snapshot. The banks themselves do not change. Raises UnknownSnapshot."""

    def stats(self) -> stats_pb2.Stats:
        """Returns the daemon's counters. v1/stats.proto documents them."""

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """Yields the daemon's counters now, and then every `interval_s` seconds, until the caller closes the iterator."""

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """Sends the counters of this trainer's HBM caches to the daemon, which shows them in its statistics.

        Args:
            hbm: the counters, one message per cache.
            activity: a short text that says what the trainer is doing, for example "training krull".
        """

    def close(self) -> None:
        """Releases every bank that this store has open for writing, and ends the connection to the daemon."""

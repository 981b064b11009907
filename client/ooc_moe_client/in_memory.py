"""`InMemoryStore`: a store of experts in this process, for tests, quick starts, and runs too small to need a daemon.

    store = InMemoryStore()
    store.create_bank(BankSpec(name="ffn", num_experts=8, layout=layout))
    other = store.connect()                       # a second writer on the same banks

Calls have the same outcomes and errors as with a daemon, because both follow `ooc_moe_wire.rules`. Tiers, durability and time are not
modelled: an expert that was read once counts as being in DRAM, and a write lasts as long as the process.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ooc_moe_client.store import Bank, Durability, ExpertInfo, Fetched, PrefetchState, Priority, Push, Sections, Snapshot, Tier
from ooc_moe_client.validation import check_distinct, check_known_versions, check_memory, checked_bodies
from ooc_moe_wire import rules
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import stats_pb2


@dataclass(frozen=True, slots=True)
class _Record:
    """One expert's version and bytes. `body` is None when the expert has its initial value, which is computed from the bank's seed."""

    version: int
    body: bytes | None

    @property
    def is_written(self) -> bool:
        """Whether the expert's bytes were pushed. Implements `rules.StoredRecord`."""
        return self.body is not None


_UNWRITTEN = _Record(0, None)


@dataclass(slots=True, eq=False)
class _Bank:
    spec: BankSpec
    records: dict[int, _Record] = field(default_factory=dict)
    seeds_in_dram: set[int] = field(default_factory=set)  # unwritten experts that were touched
    newest_version: int = 0
    writer_id: str = ""
    created_unix_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    forked_from: str = ""

    def check(self, experts: Sequence[int]) -> None:
        """Raises UnknownExpert for an id outside the bank."""
        rules.check_experts(self.spec.name, experts, self.spec.num_experts)

    def record(self, expert: int) -> _Record:
        """The expert's version and bytes."""
        return self.records.get(expert, _UNWRITTEN)

    def body(self, expert: int) -> bytes:
        """The expert's bytes. Those of an unwritten expert are computed anew at each call."""
        written = self.record(expert).body
        if written is not None:
            return written
        seeded = bytearray(self.spec.layout.body_bytes)
        self.spec.layout.initialize(seeded, seed=self.spec.seed, expert=expert)
        return bytes(seeded)

    def put(self, expert: int, record: _Record) -> None:
        """Replaces the expert's record by this one."""
        self.records[expert] = record
        self.newest_version = max(self.newest_version, record.version)

    def is_in_dram(self, expert: int) -> bool:
        """Whether the expert counts as being in DRAM: it was written, or read at least once (`touch`)."""
        return self.record(expert).is_written or expert in self.seeds_in_dram

    def touch(self, expert: int) -> Tier:
        """Notes that the expert is read, and returns the tier to report: SEED at the first read of an unwritten expert, else DRAM."""
        tier = Tier.DRAM if self.is_in_dram(expert) else Tier.SEED
        self.seeds_in_dram.add(expert)
        return tier

    def info(self, expert: int) -> ExpertInfo:
        """What `list_experts` says of this expert."""
        record, layout = self.record(expert), self.spec.layout
        sums = rules.listed_checksums(None if record.body is None else Checksums.of(layout, memoryview(record.body)))
        return ExpertInfo(
            expert=expert,
            version=record.version,
            tiers=(Tier.DRAM if self.is_in_dram(expert) else Tier.SEED,),
            record_bytes=layout.record_bytes,
            parameter_xxh3=sums.parameters,
            optimizer_xxh3=sums.optimizer,
        )

    def to_public(self) -> Bank:
        """Converts the bank to the `Bank` that the store interface returns."""
        return Bank(
            spec=self.spec,
            num_written=sum(record.is_written for record in self.records.values()),
            newest_version=self.newest_version,
            writer_id=self.writer_id,
            record_bytes=self.spec.layout.record_bytes,
            created_unix_ms=self.created_unix_ms,
            forked_from=self.forked_from,
        )


@dataclass(frozen=True, slots=True)
class _SnapshotPart:
    """What a snapshot keeps of one bank: the records, the number of experts, and the size of a record."""

    records: dict[int, _Record]
    num_experts: int
    record_bytes: int


@dataclass(slots=True)
class _Snapshot:
    id: int
    name: str
    parts: dict[str, _SnapshotPart]  # by bank
    created_unix_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def to_public(self) -> Snapshot:
        """Converts the snapshot to the `Snapshot` that the store interface returns."""
        num_experts, num_bytes = rules.snapshot_counts((part.record_bytes, part.records.values()) for part in self.parts.values())
        return Snapshot(
            id=self.id,
            name=self.name,
            banks=tuple(self.parts),
            created_unix_ms=self.created_unix_ms,
            num_experts=num_experts,
            bytes=num_bytes,
        )


@dataclass(slots=True)
class _State:
    """The banks, snapshots and counters of one store, which all its `InMemoryStore` handles share. `lock` guards all fields."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    banks: dict[str, _Bank] = field(default_factory=dict)
    snapshots: dict[int, _Snapshot] = field(default_factory=dict)
    newest_version: int = 0
    next_snapshot_id: int = 1
    stats: stats_pb2.Stats = field(default_factory=stats_pb2.Stats)

    def bank(self, name: str) -> _Bank:
        """The bank of that name. Raises UnknownBank."""
        return rules.find_bank(self.banks, name)

    def put_anew(self, bank: _Bank, expert: int, body: bytes | None) -> int:
        """Replaces an expert's bytes under the store's next version, and returns that version. `body` None: back to the initial value."""
        self.newest_version += 1
        bank.put(expert, _Record(self.newest_version, body))
        return self.newest_version


class InMemoryStore:
    """A store of experts in the memory of this process, for tests and runs without a daemon. It implements `ExpertStore`.

    The store treats this object as one writer, and each object that `connect` returns as another writer.
    """

    def __init__(self, *, trainer: str = "") -> None:
        self._state = _State()
        self._trainer = trainer
        self._writer_id = uuid.uuid4().hex

    def connect(self, trainer: str = "") -> InMemoryStore:
        """Returns another `InMemoryStore` with the same banks and snapshots. The store treats it as another writer.

        `trainer`: the name under which `report_trainer` of the new object keeps the trainer's counters.
        """
        handle = InMemoryStore(trainer=trainer)
        handle._state = self._state
        return handle

    # Banks

    def create_bank(self, spec: BankSpec) -> Bank:
        """Creates a bank, or returns the existing bank if that has an equal spec. Contract: `ExpertStore.create_bank`."""
        with self._state.lock:
            bank = self._state.banks.setdefault(spec.name, _Bank(spec))
            rules.check_same_bank(bank.spec, spec)
            return bank.to_public()

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises a bank's number of experts. Contract: `ExpertStore.grow_bank`."""
        with self._state.lock:
            bank = self._state.bank(name)
            bank.spec = rules.grown(bank.spec, num_experts)
            return bank.to_public()

    def get_bank(self, name: str) -> Bank:
        """Returns the description of a bank. Contract: `ExpertStore.get_bank`."""
        with self._state.lock:
            return self._state.bank(name).to_public()

    def list_banks(self) -> list[Bank]:
        """Returns the descriptions of all banks, sorted by name. Contract: `ExpertStore.list_banks`."""
        with self._state.lock:
            return [bank.to_public() for _, bank in sorted(self._state.banks.items())]

    def delete_bank(self, name: str) -> None:
        """Deletes a bank, and its experts in every snapshot. Contract: `ExpertStore.delete_bank`."""
        with self._state.lock:
            rules.check_writer(name, self._state.bank(name).writer_id)
            del self._state.banks[name]
            for snapshot in list(self._state.snapshots.values()):
                snapshot.parts.pop(name, None)
                if not snapshot.parts:
                    del self._state.snapshots[snapshot.id]

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """Creates the bank `name` as a copy of the bank `source`: as `source` is now, or as it was in a snapshot.

        Contract: `ExpertStore.fork_bank`.
        """
        with self._state.lock:
            origin = self._state.bank(source)
            rules.check_new_name(name, self._state.banks)
            records, num_experts = origin.records, origin.spec.num_experts
            if snapshot_id is not None:
                snapshot = rules.find_snapshot(self._state.snapshots, snapshot_id)
                part = rules.snapshot_part(snapshot.parts, source, snapshot_id=snapshot_id, bank_name=source)
                records, num_experts = part.records, part.num_experts
            fork = _Bank(replace(origin.spec, name=name, num_experts=num_experts), forked_from=source)
            for expert, record in rules.forked_records(records).items():
                self._state.put_anew(fork, expert, record.body)
            self._state.banks[name] = fork
            return fork.to_public()

    # Experts

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
        """Copies experts into the caller's memory, and yields each. Contract: `ExpertStore.fetch`."""
        check_distinct(bank, experts)
        check_known_versions(bank, experts, known_versions)
        with self._state.lock:
            self._state.bank(bank).check(experts)
        for index, expert in enumerate(experts):
            known = known_versions[index] if known_versions else None
            version, body, tier = self._read(bank, expert, sections, priority)
            unchanged = known == version
            if not unchanged:
                memory = into(expert)
                check_memory(bank, expert, memory, len(body))
                memory[:] = body
            yield Fetched(expert=expert, version=version, served_from=tier, unchanged=unchanged)

    def _read(self, name: str, expert: int, sections: Sections, priority: Priority) -> tuple[int, bytes, Tier]:
        with self._state.lock:
            bank = self._state.bank(name)
            body = bank.body(expert)[: sections.num_bytes(bank.spec.layout)]
            tier = bank.touch(expert)
            counts = self._state.stats.total
            counts.fetched_experts += 1
            counts.fetched_bytes += len(body)
            if priority is Priority.DEMAND:
                counts.hits += tier is Tier.DRAM
                counts.misses += tier is Tier.SEED
                counts.seeded += tier is Tier.SEED
            return bank.record(expert).version, body, tier

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """Writes experts. DURABLE and MEMORY mean the same here, and no answer can be lost. Contract: `ExpertStore.push`."""
        with self._state.lock:
            layout = self._state.bank(bank).spec.layout
        bodies = checked_bodies(bank, layout, pushes)
        with self._state.lock:
            self.open_for_writing(bank)
            return [self._push_one(bank, push, body) for push, body in zip(pushes, bodies, strict=True)]

    def _push_one(self, name: str, push: Push, body: memoryview) -> int | OocMoeError:
        bank = self._state.bank(name)
        try:
            bank.check([push.expert])
            rules.check_base_version(name, push.expert, base_version=push.base_version, current=bank.record(push.expert).version)
        except OocMoeError as refusal:
            return refusal
        bank.seeds_in_dram.discard(push.expert)
        self._state.stats.total.pushed_experts += 1
        self._state.stats.total.pushed_bytes += len(body)
        return self._state.put_anew(bank, push.expert, bytes(body))

    def open_for_writing(self, bank: str) -> None:
        """Takes the sole right to write the bank. Contract: `ExpertStore.open_for_writing`."""
        with self._state.lock:
            opened = self._state.bank(bank)
            rules.check_writer(bank, opened.writer_id, self._writer_id)
            opened.writer_id = self._writer_id

    def release(self, bank: str) -> None:
        """Gives back the right to write the bank, if this object holds that right. Contract: `ExpertStore.release`."""
        with self._state.lock:
            opened = self._state.banks.get(bank)
            if opened is not None and opened.writer_id == self._writer_id:
                opened.writer_id = ""

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """Treats the experts as being in DRAM from now on. Contract: `ExpertStore.prefetch`.

        The answer for an expert is RESIDENT if the expert counted as being in DRAM already; else QUEUED.
        """
        with self._state.lock:
            promoted = self._state.bank(bank)
            promoted.check(experts)
            return [PrefetchState.RESIDENT if promoted.touch(expert) is Tier.DRAM else PrefetchState.QUEUED for expert in experts]

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """Checks the ids and returns 0, because this store never queues a prefetch. Contract: `ExpertStore.cancel_prefetch`."""
        with self._state.lock:
            self._state.bank(bank).check(experts)
            return 0

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """Yields the version, size and checksums of every expert, in order of ids. Contract: `ExpertStore.list_experts`."""
        with self._state.lock:
            listed = self._state.bank(bank)
            return iter([listed.info(expert) for expert in range(listed.spec.num_experts)])

    # Snapshots

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """Saves the present state of banks under an id and a name. Contract: `ExpertStore.create_snapshot`."""
        with self._state.lock:
            rules.check_snapshot_banks(banks)
            rules.check_snapshot_name(name)
            members = [self._state.bank(bank) for bank in banks]
            known = {snapshot.name: snapshot for snapshot in self._state.snapshots.values()}
            if name in known:
                rules.check_same_snapshot(name, known[name].parts, banks)
                return known[name].to_public()
            snapshot_id, name = rules.snapshot_id_and_name(name, self._state.next_snapshot_id, known)
            parts = {
                bank.spec.name: _SnapshotPart(dict(bank.records), bank.spec.num_experts, bank.spec.layout.record_bytes) for bank in members
            }
            snapshot = self._state.snapshots[snapshot_id] = _Snapshot(snapshot_id, name, parts)
            self._state.next_snapshot_id = snapshot_id + 1
            return snapshot.to_public()

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """Returns the snapshots that include `bank` (empty: all), the newest first. Contract: `ExpertStore.list_snapshots`."""
        with self._state.lock:
            newest_first = sorted(self._state.snapshots.items(), reverse=True)
            return [snapshot.to_public() for _, snapshot in newest_first if not bank or bank in snapshot.parts]

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """Gives the experts the bytes they had in a snapshot, under new versions. Contract: `ExpertStore.restore_snapshot`."""
        with self._state.lock:
            snapshot = rules.find_snapshot(self._state.snapshots, snapshot_id)
            for name in snapshot.parts:
                rules.check_writer(name, self._state.bank(name).writer_id, self._writer_id)
            for name, part in snapshot.parts.items():
                bank = self._state.bank(name)
                for expert, record in rules.restored_records(bank.records, part.records, _UNWRITTEN).items():
                    self._state.put_anew(bank, expert, record.body)
            return snapshot.to_public()

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Deletes a snapshot; the banks stay as they are. Contract: `ExpertStore.delete_snapshot`."""
        with self._state.lock:
            rules.find_snapshot(self._state.snapshots, snapshot_id)
            del self._state.snapshots[snapshot_id]

    # Statistics

    def stats(self) -> stats_pb2.Stats:
        """Returns the store's counters: fetches, pushes, and the trainers' reports. All other counters are zero.

        Contract: `ExpertStore.stats`.
        """
        with self._state.lock:
            copy = stats_pb2.Stats()
            copy.CopyFrom(self._state.stats)
            return copy

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """Yields the counters now, and again after each interval. Contract: `ExpertStore.watch_stats`."""
        while True:
            yield self.stats()
            time.sleep(interval_s)

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """Keeps this trainer's counters for `stats`, until its next report. Contract: `ExpertStore.report_trainer`."""
        report = stats_pb2.TrainerStats(trainer=self._trainer, hbm=hbm, activity=activity)
        with self._state.lock:
            others = [known for known in self._state.stats.trainers if known.trainer != self._trainer]
            del self._state.stats.trainers[:]
            self._state.stats.trainers.extend([*others, report])

    def close(self) -> None:
        """Releases every bank that this object has open for writing. The banks stay for other objects from `connect`.

        Contract: `ExpertStore.close`.
        """
        with self._state.lock:
            for name in self._state.banks:
                self.release(name)

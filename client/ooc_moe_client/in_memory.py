"""`InMemoryStore`: the store interface answered from dicts, for tests and for runs too small to deserve a daemon.

Outcomes and errors are the daemon's: seeded experts, versions that are never reused, one writer per bank, snapshots, forks. Deliberately
knows nothing of tiers, durability or time: what was touched once is "in DRAM".
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ooc_moe_client.store import Bank, Durability, ExpertInfo, Fetched, PrefetchState, Priority, Push, Sections, Snapshot, Tier
from ooc_moe_client.validation import check_distinct, check_known_versions, check_memory, checked_bodies
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import (
    BankExists,
    InvalidRequest,
    LostUpdate,
    NotTheWriter,
    OocMoeError,
    SnapshotExists,
    StaleVersion,
    UnknownBank,
    UnknownExpert,
    UnknownSnapshot,
)
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import stats_pb2


@dataclass(slots=True)
class _Record:
    version: int
    body: bytes


@dataclass(slots=True)
class _Bank:
    spec: BankSpec
    records: dict[int, _Record] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    writer_id: str = ""
    created_unix_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    forked_from: str = ""

    def read(self, expert: int) -> _Record:
        """The present record; the seeded one (version 0) when it was never written."""
        return self.records.get(expert) or _Record(0, self.seeded(expert))

    def seeded(self, expert: int) -> bytes:
        """The body it begins with."""
        body = bytearray(self.spec.layout.body_bytes)
        self.spec.layout.initialize(body, seed=self.spec.seed, expert=expert)
        return bytes(body)

    def served_from(self, expert: int) -> Tier:
        """DRAM, or SEED the first time an unwritten expert is touched."""
        tier = Tier.DRAM if expert in self.touched or expert in self.records else Tier.SEED
        self.touched.add(expert)
        return tier

    def answer(self) -> Bank:
        """The bank as the interface shows it."""
        return Bank(
            spec=self.spec,
            num_written=len(self.records),
            newest_version=max((record.version for record in self.records.values()), default=0),
            writer_id=self.writer_id,
            record_bytes=self.spec.layout.record_bytes,
            created_unix_ms=self.created_unix_ms,
            forked_from=self.forked_from,
        )


@dataclass(slots=True)
class _Snapshot:
    answer: Snapshot
    records: dict[str, dict[int, _Record]]
    num_experts: dict[str, int]


@dataclass(slots=True)
class _State:
    """What all handles of one store share."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    banks: dict[str, _Bank] = field(default_factory=dict)
    snapshots: dict[int, _Snapshot] = field(default_factory=dict)
    newest_version: int = 0
    newest_snapshot: int = 0
    stats: stats_pb2.Stats = field(default_factory=stats_pb2.Stats)

    def next_version(self) -> int:
        """The next store-wide sequence number."""
        self.newest_version += 1
        return self.newest_version

    def bank(self, name: str) -> _Bank:
        """Raises UnknownBank."""
        if name not in self.banks:
            raise UnknownBank(f"no bank is named {name!r}")
        return self.banks[name]

    def bank_of(self, name: str, experts: Sequence[int]) -> _Bank:
        """The bank, if all ids are in it. Raises UnknownBank, UnknownExpert."""
        bank = self.bank(name)
        for expert in experts:
            if not 0 <= expert < bank.spec.num_experts:
                raise UnknownExpert(f"bank {name!r}: expert {expert} is not below {bank.spec.num_experts}")
        return bank

    def snapshot(self, snapshot_id: int) -> _Snapshot:
        """Raises UnknownSnapshot."""
        if snapshot_id not in self.snapshots:
            raise UnknownSnapshot(f"no snapshot has the id {snapshot_id}")
        return self.snapshots[snapshot_id]


class InMemoryStore:
    """One handle (one writer) on a store in this process; `connect` makes further ones on the same experts."""

    def __init__(self, *, trainer: str = "") -> None:
        self._state = _State()
        self._trainer = trainer
        self._writer_id = uuid.uuid4().hex

    def connect(self, trainer: str = "") -> InMemoryStore:
        """A second handle, another writer, on the same banks and snapshots."""
        handle = InMemoryStore(trainer=trainer)
        handle._state = self._state
        return handle

    # Banks

    def create_bank(self, spec: BankSpec) -> Bank:
        """See ExpertStore."""
        with self._state.lock:
            known = self._state.banks.get(spec.name)
            if known is None:
                known = self._state.banks[spec.name] = _Bank(spec)
            if replace(spec, num_experts=known.spec.num_experts) != known.spec:
                raise BankExists(f"bank {spec.name!r} exists with another layout or seed")
            return known.answer()

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """See ExpertStore."""
        with self._state.lock:
            bank = self._state.bank(name)
            bank.spec = replace(bank.spec, num_experts=max(num_experts, bank.spec.num_experts))
            return bank.answer()

    def get_bank(self, name: str) -> Bank:
        """See ExpertStore."""
        with self._state.lock:
            return self._state.bank(name).answer()

    def list_banks(self) -> list[Bank]:
        """See ExpertStore."""
        with self._state.lock:
            return [bank.answer() for _, bank in sorted(self._state.banks.items())]

    def delete_bank(self, name: str) -> None:
        """See ExpertStore."""
        with self._state.lock:
            bank = self._state.bank(name)
            if bank.writer_id:
                raise NotTheWriter(f"bank {name!r} is open for writing by {bank.writer_id!r}")
            del self._state.banks[name]
            for snapshot in list(self._state.snapshots.values()):
                snapshot.records.pop(name, None)
                snapshot.answer = replace(snapshot.answer, banks=tuple(snapshot.records))
                if not snapshot.records:
                    del self._state.snapshots[snapshot.answer.id]

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """See ExpertStore."""
        with self._state.lock:
            origin = self._state.bank(source)
            records, num_experts = origin.records, origin.spec.num_experts
            if snapshot_id is not None:
                snapshot = self._state.snapshot(snapshot_id)
                if source not in snapshot.records:
                    raise UnknownSnapshot(f"snapshot {snapshot_id} does not hold bank {source!r}")
                records, num_experts = snapshot.records[source], snapshot.num_experts[source]
            if name in self._state.banks:
                raise BankExists(f"bank {name!r} exists")
            forked = {expert: _Record(self._state.next_version(), record.body) for expert, record in sorted(records.items())}
            spec = replace(origin.spec, name=name, num_experts=num_experts)
            bank = self._state.banks[name] = _Bank(spec, forked, forked_from=source)
            return bank.answer()

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
        """See ExpertStore."""
        check_distinct(bank, experts)
        check_known_versions(bank, experts, known_versions)
        with self._state.lock:
            self._state.bank_of(bank, experts)
        for index, expert in enumerate(experts):
            known = known_versions[index] if known_versions else None
            record, tier, num_bytes = self._read(bank, expert, sections, priority)
            unchanged = known == record.version
            if not unchanged:
                memory = into(expert)
                check_memory(bank, expert, memory, num_bytes)
                memory[:] = record.body[:num_bytes]
            yield Fetched(expert=expert, version=record.version, served_from=tier, unchanged=unchanged)

    def _read(self, name: str, expert: int, sections: Sections, priority: Priority) -> tuple[_Record, Tier, int]:
        with self._state.lock:
            bank = self._state.bank(name)
            layout = bank.spec.layout
            num_bytes = layout.body_bytes if sections is Sections.ALL else layout.parameter_bytes
            tier = bank.served_from(expert)
            access = self._state.stats.total
            access.fetched_experts += 1
            access.fetched_bytes += num_bytes
            if priority is Priority.DEMAND:
                access.hits += tier is Tier.DRAM
                access.misses += tier is Tier.SEED
                access.seeded += tier is Tier.SEED
            return bank.read(expert), tier, num_bytes

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """See ExpertStore. What is in memory is as durable as it gets here."""
        with self._state.lock:
            layout = self._state.bank(bank).spec.layout
        bodies = checked_bodies(bank, layout, pushes)
        with self._state.lock:
            self.open_for_writing(bank)
            return [self._push_one(bank, push, body) for push, body in zip(pushes, bodies, strict=True)]

    def _push_one(self, name: str, push: Push, body: memoryview) -> int | OocMoeError:
        bank = self._state.bank(name)
        if push.expert >= bank.spec.num_experts:
            return UnknownExpert(f"bank {name!r}: expert {push.expert} is not below {bank.spec.num_experts}")
        present = bank.records[push.expert].version if push.expert in bank.records else 0
        if push.base_version != present:
            refusal = StaleVersion if push.base_version < present else LostUpdate
            return refusal(f"bank {name!r}, expert {push.expert}: based on version {push.base_version}, the present one is {present}")
        record = bank.records[push.expert] = _Record(self._state.next_version(), bytes(body))
        self._state.stats.total.pushed_experts += 1
        self._state.stats.total.pushed_bytes += len(body)
        return record.version

    def open_for_writing(self, bank: str) -> None:
        """See ExpertStore."""
        with self._state.lock:
            opened = self._state.bank(bank)
            if opened.writer_id not in ("", self._writer_id):
                raise NotTheWriter(f"bank {bank!r} is open for writing by {opened.writer_id!r}")
            opened.writer_id = self._writer_id

    def release(self, bank: str) -> None:
        """See ExpertStore."""
        with self._state.lock:
            opened = self._state.banks.get(bank)
            if opened is not None and opened.writer_id == self._writer_id:
                opened.writer_id = ""

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """See ExpertStore. Promotes at once: a second call answers RESIDENT."""
        with self._state.lock:
            promoted = self._state.bank_of(bank, experts)
            tiers = [promoted.served_from(expert) for expert in experts]
            return [PrefetchState.RESIDENT if tier is Tier.DRAM else PrefetchState.QUEUED for tier in tiers]

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """See ExpertStore. Nothing is ever queued here."""
        with self._state.lock:
            self._state.bank_of(bank, experts)
            return 0

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """See ExpertStore."""
        with self._state.lock:
            listed = self._state.bank(bank)
            return iter([_info(listed, expert) for expert in range(listed.spec.num_experts)])

    # Snapshots

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """See ExpertStore."""
        with self._state.lock:
            if not banks or len(set(banks)) < len(banks):
                raise InvalidRequest(f"banks: {list(banks)} is not a list of one or more different banks")
            taken = {bank: dict(self._state.bank(bank).records) for bank in banks}
            for known in self._state.snapshots.values():
                if name and known.answer.name == name:
                    if set(known.records) == set(taken):
                        return known.answer
                    raise SnapshotExists(f"snapshot {name!r} exists, of banks {', '.join(known.answer.banks)}")
            self._state.newest_snapshot += 1
            answer = Snapshot(
                id=self._state.newest_snapshot,
                name=name or f"snapshot-{self._state.newest_snapshot}",
                banks=tuple(banks),
                created_unix_ms=time.time_ns() // 1_000_000,
                num_experts=sum(map(len, taken.values())),
                bytes=sum(len(records) * self._state.bank(bank).spec.layout.record_bytes for bank, records in taken.items()),
            )
            self._state.snapshots[answer.id] = _Snapshot(answer, taken, {bank: self._state.bank(bank).spec.num_experts for bank in taken})
            return answer

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """See ExpertStore."""
        with self._state.lock:
            answers = [snapshot.answer for snapshot in self._state.snapshots.values() if not bank or bank in snapshot.records]
            return sorted(answers, key=lambda answer: -answer.id)

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """See ExpertStore."""
        with self._state.lock:
            snapshot = self._state.snapshot(snapshot_id)
            for name in snapshot.records:
                writer_id = self._state.bank(name).writer_id
                if writer_id not in ("", self._writer_id):
                    raise NotTheWriter(f"bank {name!r} is open for writing by {writer_id!r}")
            for name, records in snapshot.records.items():
                bank = self._state.bank(name)
                bodies = {expert: bank.seeded(expert) for expert in bank.records} | {
                    expert: record.body for expert, record in records.items()
                }
                bank.records = {expert: _Record(self._state.next_version(), body) for expert, body in sorted(bodies.items())}
            return snapshot.answer

    def delete_snapshot(self, snapshot_id: int) -> None:
        """See ExpertStore."""
        with self._state.lock:
            self._state.snapshot(snapshot_id)
            del self._state.snapshots[snapshot_id]

    # Statistics

    def stats(self) -> stats_pb2.Stats:
        """See ExpertStore. Access counters and trainers' reports; tiers, latencies and queues stay zero."""
        with self._state.lock:
            copy = stats_pb2.Stats()
            copy.CopyFrom(self._state.stats)
            return copy

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """See ExpertStore."""
        while True:
            yield self.stats()
            time.sleep(interval_s)

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """See ExpertStore. A report never expires here."""
        report = stats_pb2.TrainerStats(trainer=self._trainer, hbm=hbm, activity=activity)
        with self._state.lock:
            others = [known for known in self._state.stats.trainers if known.trainer != self._trainer]
            del self._state.stats.trainers[:]
            self._state.stats.trainers.extend([*others, report])

    def close(self) -> None:
        """See ExpertStore. The banks stay for the other handles."""
        with self._state.lock:
            for name in self._state.banks:
                self.release(name)


def _info(bank: _Bank, expert: int) -> ExpertInfo:
    written = bank.records.get(expert)
    checksums = Checksums.of(bank.spec.layout, memoryview(written.body)) if written else Checksums(0, 0)
    return ExpertInfo(
        expert=expert,
        version=written.version if written else 0,
        tiers=(Tier.DRAM,) if written or expert in bank.touched else (Tier.SEED,),
        record_bytes=bank.spec.layout.record_bytes,
        parameter_xxh3=checksums.parameters,
        optimizer_xxh3=checksums.optimizer,
    )

"""`RemoteStore`: the store interface over gRPC, synchronous.

Every call but WatchStats and PushExperts has a deadline; Unavailable is retried with jitter, so that a restart of the daemon in the middle
is only a pause. Deliberately knows nothing of caches.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from ooc_moe_client.remote.connection import Connection, Responses
from ooc_moe_client.remote.fetch_stream import FetchStream
from ooc_moe_client.remote.from_proto import bank_from, expert_from, snapshot_from
from ooc_moe_client.remote.plane_choice import Planes
from ooc_moe_client.remote.push_stream import BankWriter, Item
from ooc_moe_client.remote.read_floor import Acknowledged
from ooc_moe_client.store import Bank, Durability, ExpertInfo, Fetched, Plane, PrefetchState, Priority, Push, Sections, Snapshot
from ooc_moe_client.validation import check_distinct, check_known_versions, checked_bodies
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import OocMoeError, TierFull, Unavailable, UnknownBank, UnknownSnapshot
from ooc_moe_wire.layout import BankSpec, Layout
from ooc_moe_wire.v1 import (
    bank_pb2,
    bank_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
)


class RemoteStore:
    """The experts of a daemon. See `ExpertStore` for the methods.

    Args:
        target: "host:port" or "unix:PATH".
        trainer: the name under which the daemon counts this caller; at most 128 printable ASCII characters.
        timeout_s: the deadline of a call; a fetch gets more by its bytes.
        patience_s: how long a daemon that went away is waited for before Unavailable is raised.
        plane: how bytes travel. With LOCAL, fetches and pushes raise InvalidRequest where that is impossible.
        verify: compare what arrived with its checksums.
    """

    def __init__(
        self,
        target: str,
        *,
        trainer: str = "",
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        plane: Plane = Plane.AUTO,
        verify: bool = True,
    ) -> None:
        self._connection = Connection(target, trainer=trainer, timeout_s=timeout_s, patience_s=patience_s)
        self._planes = Planes(self._connection, plane)
        self._verify = verify
        channel = self._connection.channel
        self._banks = bank_pb2_grpc.BankServiceStub(channel)
        self._experts = expert_pb2_grpc.ExpertServiceStub(channel)
        self._snapshots = snapshot_pb2_grpc.SnapshotServiceStub(channel)
        self._stats = stats_pb2_grpc.StatsServiceStub(channel)
        self._writer_id = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._known_banks: dict[str, Bank] = {}
        self._acknowledged = Acknowledged()
        self._writers: dict[str, BankWriter] = {}
        self._unanswered: dict[tuple[str, int], _Unanswered] = {}  # by bank and expert

    @property
    def plane(self) -> Plane:
        """How bytes travel now: STREAM or LOCAL. Asks the daemon if need be, and raises what `fetch` would."""
        return Plane.STREAM if self._connection.retry(self._planes.local) is None else Plane.LOCAL

    # Banks

    def create_bank(self, spec: BankSpec) -> Bank:
        """See ExpertStore."""
        return self._known(self._connection.call(self._banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec.to_proto())))

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """See ExpertStore."""
        return self._known(self._connection.call(self._banks.GrowBank, bank_pb2.GrowBankRequest(bank=name, num_experts=num_experts)))

    def get_bank(self, name: str) -> Bank:
        """See ExpertStore."""
        return self._known(self._connection.call(self._banks.GetBank, bank_pb2.GetBankRequest(bank=name)))

    def list_banks(self) -> list[Bank]:
        """See ExpertStore."""
        return [bank_from(bank) for bank in self._connection.call(self._banks.ListBanks, bank_pb2.ListBanksRequest()).banks]

    def delete_bank(self, name: str) -> None:
        """See ExpertStore."""
        self.get_bank(name)
        with suppress(UnknownBank):  # It was there: a retry found that the first try had succeeded.
            self._connection.call(self._banks.DeleteBank, bank_pb2.DeleteBankRequest(bank=name))
        self._known_banks.pop(name, None)
        self._acknowledged.forget(name)

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """See ExpertStore. Not retried once it was sent."""
        self.get_bank(source)
        request = bank_pb2.ForkBankRequest(source=source, name=name, snapshot_id=snapshot_id or 0)
        return self._known(self._connection.once(self._banks.ForkBank, request))

    def _known(self, message: bank_pb2.Bank) -> Bank:
        bank, name = bank_from(message), message.spec.name
        older = self._known_banks.get(name)
        if older is not None and older.created_unix_ms != bank.created_unix_ms:
            self._acknowledged.forget(name)  # Another store deleted it, and somebody made this one.
        self._known_banks[name] = bank
        return bank

    def _layout(self, bank: str) -> Layout:
        return (self._known_banks.get(bank) or self.get_bank(bank)).spec.layout

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
        """See ExpertStore. Patience counts from the last expert that came."""
        check_distinct(bank, experts)
        check_known_versions(bank, experts, known_versions)
        stream = FetchStream(
            self._connection,
            self._planes,
            self._acknowledged,
            bank,
            self._layout(bank),
            experts,
            into=into,
            sections=sections,
            priority=priority,
            known_versions=known_versions,
            verify=self._verify,
        )
        try:
            while (arrived := self._connection.retry(stream.next)) is not None:
                yield from arrived
        finally:
            stream.cancel()
        if stream.error is not None:
            raise stream.error

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """See ExpertStore. An expert that found no room in the daemon is tried again a few times."""
        layout = self._layout(bank)
        bodies = checked_bodies(bank, layout, pushes)
        items = [
            Item(
                expert=push.expert,
                base_version=self._base_version(bank, push),
                body=body,
                layout=layout,
                durability=durability,
            )
            for push, body in zip(pushes, bodies, strict=True)
        ]
        error: OocMoeError | None = None  # why some have no outcome
        try:
            self._connection.retry(lambda: self._push_unsettled(bank, items))
        except OocMoeError as raised:
            if all(item.outcome is None for item in items):
                raise
            error = raised
        finally:
            for push, item in zip(pushes, items, strict=True):
                self._remember_unanswered(bank, push, item)
        outcomes: list[int | Exception] = []
        for item in items:
            outcome = error if item.outcome is None else item.outcome
            assert outcome is not None
            if isinstance(outcome, int):
                self._acknowledged.note(bank, item.expert, outcome)
            outcomes.append(outcome)
        return outcomes

    def _push_unsettled(self, bank: str, items: Sequence[Item]) -> None:
        """Pushes what has no outcome, or found no room; raises TierFull while any finds none."""
        unsettled = [item for item in items if item.outcome is None or isinstance(item.outcome, TierFull)]
        for item in unsettled:
            item.outcome = None
        self._writer(bank).push(unsettled)
        full = next((item.outcome for item in unsettled if isinstance(item.outcome, TierFull)), None)
        if full is not None:
            raise full

    def _base_version(self, bank: str, push: Push) -> int:
        """The version to start from: where an earlier push got no answer but was written, it is the version that it made."""
        lost = self._unanswered.get((bank, push.expert))
        if lost is None or lost.base_version != push.base_version:
            return push.base_version
        request = expert_pb2.ListExpertsRequest(bank=bank, start=push.expert, page_size=1)
        present = self._connection.call(self._experts.ListExperts, request).experts[0]
        written = Checksums(present.parameter_xxh3, present.optimizer_xxh3) in lost.checksums
        return present.version if written else push.base_version

    def _remember_unanswered(self, bank: str, push: Push, item: Item) -> None:
        key = (bank, push.expert)
        if isinstance(item.outcome, int):
            self._unanswered.pop(key, None)
        elif item.outcome is None and item.checksums is not None:
            lost = self._unanswered.get(key)
            if lost is None or lost.base_version != push.base_version:
                lost = self._unanswered[key] = _Unanswered(push.base_version)
            lost.checksums.add(item.checksums)

    def _writer(self, bank: str) -> BankWriter:
        with self._lock:
            writer = self._writers.get(bank)
            if writer is None or writer.ended:
                writer = self._writers[bank] = BankWriter(self._connection, self._planes, bank, self._writer_id, self._numbers)
            return writer

    def open_for_writing(self, bank: str) -> None:
        """See ExpertStore."""
        self._writer(bank).wait_until_open()

    def release(self, bank: str) -> None:
        """See ExpertStore."""
        with self._lock:
            writer = self._writers.pop(bank, None)
        if writer is not None:
            writer.release()

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """See ExpertStore."""
        request = expert_pb2.PrefetchExpertsRequest(bank=bank, experts=experts)
        return [PrefetchState(state) for state in self._connection.call(self._experts.PrefetchExperts, request).states]

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """See ExpertStore."""
        request = expert_pb2.CancelPrefetchRequest(bank=bank, experts=experts)
        return self._connection.call(self._experts.CancelPrefetch, request).num_cancelled

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """See ExpertStore."""
        start = 0
        while True:
            page = self._connection.call(self._experts.ListExperts, expert_pb2.ListExpertsRequest(bank=bank, start=start))
            yield from map(expert_from, page.experts)
            start = page.next_start
            if not start:
                return

    # Snapshots

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """See ExpertStore. Without a name it is not retried once it was sent."""
        request = snapshot_pb2.CreateSnapshotRequest(banks=banks, name=name)
        if name:
            return snapshot_from(self._connection.call(self._snapshots.CreateSnapshot, request))
        self.list_snapshots()
        return snapshot_from(self._connection.once(self._snapshots.CreateSnapshot, request))

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """See ExpertStore."""
        answer = self._connection.call(self._snapshots.ListSnapshots, snapshot_pb2.ListSnapshotsRequest(bank=bank))
        return [snapshot_from(snapshot) for snapshot in answer.snapshots]

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """See ExpertStore."""
        request = snapshot_pb2.RestoreSnapshotRequest(id=snapshot_id, writer_id=self._writer_id)
        restored = snapshot_from(self._connection.call(self._snapshots.RestoreSnapshot, request))
        for bank in restored.banks:
            self._acknowledged.forget(bank)
        return restored

    def delete_snapshot(self, snapshot_id: int) -> None:
        """See ExpertStore."""
        if all(snapshot.id != snapshot_id for snapshot in self.list_snapshots()):
            raise UnknownSnapshot(f"no snapshot has the id {snapshot_id}")
        with suppress(UnknownSnapshot):  # As in delete_bank.
            self._connection.call(self._snapshots.DeleteSnapshot, snapshot_pb2.DeleteSnapshotRequest(id=snapshot_id))

    # Statistics

    def stats(self) -> stats_pb2.Stats:
        """See ExpertStore."""
        return self._connection.call(self._stats.GetStats, stats_pb2.GetStatsRequest())

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """See ExpertStore. Goes on after a restart of the daemon."""
        calls: list[Responses[stats_pb2.Stats]] = []

        def following() -> stats_pb2.Stats:
            with self._connection.errors():
                if not calls:
                    request = stats_pb2.WatchStatsRequest(interval_ms=round(interval_s * 1000))
                    calls.append(self._stats.WatchStats(request, metadata=self._connection.metadata))
                try:
                    stats = next(calls[0], None)
                except grpc.RpcError:
                    calls.clear()
                    raise
            if stats is None:
                calls.clear()
                raise Unavailable(f"daemon at {self._connection.target}: it ended the statistics")
            self._connection.answered()
            return stats

        try:
            while True:
                yield self._connection.retry(following)
        finally:
            for call in calls:
                call.cancel()

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """See ExpertStore. Not retried: the next report says more."""
        self._connection.once(self._stats.ReportTrainer, stats_pb2.ReportTrainerRequest(hbm=hbm, activity=activity))

    def close(self) -> None:
        """See ExpertStore."""
        for bank in list(self._writers):
            self.release(bank)
        self._planes.close()
        self._connection.close()


@dataclass(slots=True)
class _Unanswered:
    """Pushes of one expert from one version, as their caller knew it, whose answers never came. Any of them may have been written."""

    base_version: int
    checksums: set[Checksums] = field(default_factory=set)

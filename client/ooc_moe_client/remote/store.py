"""`RemoteStore`: the store of experts that a daemon keeps, reached over gRPC.

    store = RemoteStore("127.0.0.1:50051", trainer="mine")

Every call but WatchStats and PushExperts has a deadline. Unavailable is retried after random pauses, so that a restart of the daemon in the
middle of a run only costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import grpc

from ooc_moe_client.remote.connection import Connection, Responses
from ooc_moe_client.remote.fetch import Fetch
from ooc_moe_client.remote.from_proto import bank_from, expert_from, snapshot_from
from ooc_moe_client.remote.pending_experts import PendingExperts
from ooc_moe_client.remote.plane_choice import PlaneChoice
from ooc_moe_client.remote.pusher import Pusher
from ooc_moe_client.remote.read_floor import ReadFloor
from ooc_moe_client.store import Bank, Durability, ExpertInfo, Fetched, Plane, PrefetchState, Priority, Push, Sections, Snapshot
from ooc_moe_client.validation import check_distinct, check_known_versions
from ooc_moe_wire.errors import Unavailable, UnknownBank, UnknownSnapshot
from ooc_moe_wire.layout import BankSpec, Layout
from ooc_moe_wire.rules import find_snapshot
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
    """A daemon's store, over gRPC. It implements `ExpertStore`. Calls are retried while the daemon is away, unless a method says otherwise.

    Args:
        target: the daemon's address, "host:port" or "unix:PATH".
        trainer: the caller's name, under which the daemon counts its calls; at most 128 printable ASCII characters.
        timeout_s: the deadline of a call, in seconds; a fetch gets more, in proportion to its bytes.
        patience_s: for how many seconds calls are retried when the daemon went away, before Unavailable is raised.
        plane: how bytes travel. With LOCAL (through shared memory), fetches and pushes raise InvalidRequest when that is impossible.
        verify: whether to check fetched bytes against their checksums.
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
        self._planes = PlaneChoice(self._connection, plane)
        self._verify = verify
        self._read_floor = ReadFloor()
        self._pusher = Pusher(self._connection, self._planes, self._read_floor)
        self._known_banks: dict[str, Bank] = {}
        channel = self._connection.channel
        self._banks = bank_pb2_grpc.BankServiceStub(channel)
        self._experts = expert_pb2_grpc.ExpertServiceStub(channel)
        self._snapshots = snapshot_pb2_grpc.SnapshotServiceStub(channel)
        self._stats = stats_pb2_grpc.StatsServiceStub(channel)

    @property
    def plane(self) -> Plane:
        """How bytes travel at present: STREAM (in gRPC messages) or LOCAL (through shared memory).

        If that is not decided yet, asks the daemon; this may raise what `fetch` raises.
        """
        return Plane.STREAM if self._connection.retry(self._planes.local) is None else Plane.LOCAL

    # Banks

    def create_bank(self, spec: BankSpec) -> Bank:
        """Creates a bank, or returns the existing bank if that has an equal spec. Contract: `ExpertStore.create_bank`."""
        return self._remember_bank(self._connection.call(self._banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec.to_proto())))

    def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises a bank's number of experts. Contract: `ExpertStore.grow_bank`."""
        return self._remember_bank(
            self._connection.call(self._banks.GrowBank, bank_pb2.GrowBankRequest(bank=name, num_experts=num_experts))
        )

    def get_bank(self, name: str) -> Bank:
        """Returns the description of a bank. Contract: `ExpertStore.get_bank`."""
        return self._remember_bank(self._connection.call(self._banks.GetBank, bank_pb2.GetBankRequest(bank=name)))

    def list_banks(self) -> list[Bank]:
        """Returns the descriptions of all banks, sorted by name. Contract: `ExpertStore.list_banks`."""
        return [bank_from(bank) for bank in self._connection.call(self._banks.ListBanks, bank_pb2.ListBanksRequest()).banks]

    def delete_bank(self, name: str) -> None:
        """Deletes a bank, and its experts in every snapshot. Contract: `ExpertStore.delete_bank`."""
        self.get_bank(name)
        with suppress(UnknownBank):  # It existed just now: an earlier try of this call has deleted it.
            self._connection.call(self._banks.DeleteBank, bank_pb2.DeleteBankRequest(bank=name))
        self._known_banks.pop(name, None)
        self._read_floor.forget(name)

    def fork_bank(self, source: str, name: str, *, snapshot_id: int | None = None) -> Bank:
        """Creates the bank `name` as a copy of the bank `source`: as `source` is now, or as it was in a snapshot.

        Contract: `ExpertStore.fork_bank`. Once the request was sent it is not retried: a repeat would find that the bank exists.
        """
        self.get_bank(source)
        request = bank_pb2.ForkBankRequest(source=source, name=name, snapshot_id=snapshot_id or 0)
        return self._remember_bank(self._connection.call_once(self._banks.ForkBank, request))

    def _remember_bank(self, message: bank_pb2.Bank) -> Bank:
        bank, name = bank_from(message), message.spec.name
        older = self._known_banks.get(name)
        if older is not None and older.created_unix_ms != bank.created_unix_ms:
            self._read_floor.forget(name)  # The bank was deleted meanwhile, and created anew.
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
        """Receives experts into the caller's memory, and yields each. Contract: `ExpertStore.fetch`.

        When the daemon goes away, retries for `patience_s` seconds, counted anew from each expert that comes.
        """
        check_distinct(bank, experts)
        check_known_versions(bank, experts, known_versions)
        pending = PendingExperts(
            bank,
            self._layout(bank),
            experts,
            into=into,
            sections=sections,
            priority=priority,
            known_versions=known_versions,
            read_floor=self._read_floor,
        )
        fetch = Fetch(self._connection, self._planes, pending, verify=self._verify)
        try:
            while (fetched := self._connection.retry(fetch.next)) is not None:
                yield from fetched
        finally:
            fetch.cancel()
        if pending.error is not None:
            raise pending.error

    def push(self, bank: str, pushes: Sequence[Push], *, durability: Durability = Durability.DURABLE) -> list[int | Exception]:
        """Sends experts to the daemon, which writes them. Contract: `ExpertStore.push`.

        When the daemon has no room for an expert (TierFull), that push is tried again a few times.
        """
        return self._pusher.push(bank, self._layout(bank), pushes, durability)

    def open_for_writing(self, bank: str) -> None:
        """Takes the sole right to write the bank. Contract: `ExpertStore.open_for_writing`."""
        self._pusher.open_for_writing(bank)

    def release(self, bank: str) -> None:
        """Gives back the right to write the bank, if this store holds that right. Contract: `ExpertStore.release`."""
        self._pusher.release(bank)

    def prefetch(self, bank: str, experts: Sequence[int]) -> list[PrefetchState]:
        """Asks the daemon to copy experts from NVMe to DRAM. Contract: `ExpertStore.prefetch`."""
        request = expert_pb2.PrefetchExpertsRequest(bank=bank, experts=experts)
        return [PrefetchState(state) for state in self._connection.call(self._experts.PrefetchExperts, request).states]

    def cancel_prefetch(self, bank: str, experts: Sequence[int] = ()) -> int:
        """Cancels the daemon's queued prefetches, and returns their number. Contract: `ExpertStore.cancel_prefetch`."""
        request = expert_pb2.CancelPrefetchRequest(bank=bank, experts=experts)
        return self._connection.call(self._experts.CancelPrefetch, request).num_cancelled

    def list_experts(self, bank: str) -> Iterator[ExpertInfo]:
        """Yields the version, tiers, size and checksums of every expert, in order of ids. Contract: `ExpertStore.list_experts`."""
        start = 0
        while True:
            page = self._connection.call(self._experts.ListExperts, expert_pb2.ListExpertsRequest(bank=bank, start=start))
            yield from map(expert_from, page.experts)
            start = page.next_start
            if not start:
                return

    # Snapshots

    def create_snapshot(self, banks: Sequence[str], *, name: str = "") -> Snapshot:
        """Saves the present state of banks under an id and a name. Contract: `ExpertStore.create_snapshot`.

        Without a name, the request is not retried once it was sent: a repeat would make a second snapshot.
        """
        request = snapshot_pb2.CreateSnapshotRequest(banks=banks, name=name)
        if name:
            return snapshot_from(self._connection.call(self._snapshots.CreateSnapshot, request))
        self.list_snapshots()
        return snapshot_from(self._connection.call_once(self._snapshots.CreateSnapshot, request))

    def list_snapshots(self, bank: str = "") -> list[Snapshot]:
        """Returns the snapshots that include `bank` (empty: all), the newest first. Contract: `ExpertStore.list_snapshots`."""
        response = self._connection.call(self._snapshots.ListSnapshots, snapshot_pb2.ListSnapshotsRequest(bank=bank))
        return [snapshot_from(snapshot) for snapshot in response.snapshots]

    def restore_snapshot(self, snapshot_id: int) -> Snapshot:
        """Gives the experts the bytes they had in a snapshot, under new versions. Contract: `ExpertStore.restore_snapshot`."""
        request = snapshot_pb2.RestoreSnapshotRequest(id=snapshot_id, writer_id=self._pusher.writer_id)
        restored = snapshot_from(self._connection.call(self._snapshots.RestoreSnapshot, request))
        for bank in restored.banks:
            self._read_floor.forget(bank)
        return restored

    def delete_snapshot(self, snapshot_id: int) -> None:
        """Deletes a snapshot; the banks stay as they are. Contract: `ExpertStore.delete_snapshot`."""
        find_snapshot({snapshot.id: snapshot for snapshot in self.list_snapshots()}, snapshot_id)
        with suppress(UnknownSnapshot):  # As in delete_bank.
            self._connection.call(self._snapshots.DeleteSnapshot, snapshot_pb2.DeleteSnapshotRequest(id=snapshot_id))

    # Statistics

    def stats(self) -> stats_pb2.Stats:
        """Returns the daemon's counters. Contract: `ExpertStore.stats`."""
        return self._connection.call(self._stats.GetStats, stats_pb2.GetStatsRequest())

    def watch_stats(self, interval_s: float = 1.0) -> Iterator[stats_pb2.Stats]:
        """Yields the daemon's counters now, and again after each interval. Contract: `ExpertStore.watch_stats`.

        When the daemon restarts, the iterator continues.
        """
        calls: list[Responses[stats_pb2.Stats]] = []

        def next_stats() -> stats_pb2.Stats:
            with self._connection.translated_errors():
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
                raise Unavailable(f"daemon at {self._connection.target}: the daemon ended the stream of statistics")
            self._connection.note_alive()
            return stats

        try:
            while True:
                yield self._connection.retry(next_stats)
        finally:
            for call in calls:
                call.cancel()

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        """Sends the counters of this trainer's caches to the daemon. Contract: `ExpertStore.report_trainer`.

        Not retried, because the next report has newer counters.
        """
        self._connection.call_once(self._stats.ReportTrainer, stats_pb2.ReportTrainerRequest(hbm=hbm, activity=activity))

    def close(self) -> None:
        """Releases every bank, and ends the connection to the daemon. Contract: `ExpertStore.close`."""
        self._pusher.close()
        self._planes.close()
        self._connection.close()

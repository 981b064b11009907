"""The five gRPC services. Each method turns a message into a call of the engine (the store behind gRPC), and the result into a message.

Methods raise OocMoeError, which interceptor.py turns into a gRPC status. Methods that stream their answers write them to the context
instead of yielding them (interceptor.py says why). mypy's stubs of a servicer do not foresee such methods: hence `type: ignore[override]`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc.aio

from ooc_moe_server.catalog.catalog import Bank
from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.engine.fetch import Fetch
from ooc_moe_server.engine.writer import Writer
from ooc_moe_server.local.plane import LocalPlane, Session
from ooc_moe_server.rpc import replies
from ooc_moe_server.rpc.pacing import MessagePacer
from ooc_moe_server.stats import Scopes
from ooc_moe_wire.codec import TRAINER_BYTES_MAX, TRAINER_KEY, ChunkView
from ooc_moe_wire.errors import InvalidRequest, LeaseExpired, Unavailable, require_at_least
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import (
    bank_pb2,
    bank_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    local_pb2,
    local_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
)

WATCH_INTERVAL_MS = 1000
WATCH_INTERVAL_MS_MIN = 100
Context = grpc.aio.ServicerContext[Any, Any]


class BankService(bank_pb2_grpc.BankServiceServicer):
    """Creates, grows, lists, deletes and forks banks (named sets of experts). Contract: bank.proto."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    async def CreateBank(self, request: bank_pb2.CreateBankRequest, context: Context) -> bank_pb2.Bank:
        """Creates a bank, or returns the existing bank of that name if its spec (what the bank's experts look like) is the same."""
        return (await self._engine().changes.create_bank(BankSpec.from_proto(request.spec))).to_proto()

    async def GrowBank(self, request: bank_pb2.GrowBankRequest, context: Context) -> bank_pb2.Bank:
        """Raises the number of experts of a bank; the new experts have their initial values."""
        return (await self._engine().changes.grow_bank(request.bank, request.num_experts)).to_proto()

    async def GetBank(self, request: bank_pb2.GetBankRequest, context: Context) -> bank_pb2.Bank:
        """Returns the description of one bank."""
        return self._engine().catalog.bank(request.bank).to_proto()

    async def ListBanks(self, request: bank_pb2.ListBanksRequest, context: Context) -> bank_pb2.ListBanksResponse:
        """Returns the descriptions of all banks, sorted by name."""
        return bank_pb2.ListBanksResponse(banks=[bank.to_proto() for _, bank in sorted(self._engine().catalog.banks.items())])

    async def DeleteBank(self, request: bank_pb2.DeleteBankRequest, context: Context) -> bank_pb2.DeleteBankResponse:
        """Removes a bank and its part of every snapshot."""
        await self._engine().changes.delete_bank(request.bank)
        return bank_pb2.DeleteBankResponse()

    async def ForkBank(self, request: bank_pb2.ForkBankRequest, context: Context) -> bank_pb2.Bank:
        """Creates a bank with the experts of another bank, as they are now or as they were in a snapshot."""
        return (await self._engine().changes.fork_bank(request.source, request.name, request.snapshot_id)).to_proto()


class ExpertService(expert_pb2_grpc.ExpertServiceServicer):
    """Fetches, pushes, prefetches and lists experts. Contract: expert.proto.

    `writers` holds the open push streams; the daemon ends them when it drains.
    """

    def __init__(self, engine: Callable[[], Engine], plane: Callable[[], LocalPlane | None]) -> None:
        self._engine, self._plane = engine, plane
        self._pacer = MessagePacer()
        self.writers: set[Writer] = set()

    async def FetchExperts(self, request: expert_pb2.FetchExpertsRequest, context: Context) -> None:  # type: ignore[override]
        """Sends the records of the requested experts, in the order that is fastest."""
        bank, fetch = fetch_of(self._engine(), request, trainer_of(context))
        whole = request.sections == expert_pb2.SECTIONS_ALL
        await replies.send_experts(fetch, bank.layout, context.write, whole=whole, pacer=self._pacer)

    async def PushExperts(self, requests: object, context: Context) -> None:  # type: ignore[override]
        """Receives the records of changed experts from one writer, and sends an outcome (a version or an error) for each record."""
        first = await context.read()
        if first is grpc.aio.EOF or isinstance(first, ChunkView) or first.WhichOneof("message") != "open":
            raise InvalidRequest("push stream: it must begin with PushOpen")
        engine, bank, scopes = self._bank(first.open.bank, context)
        writer = engine.open_writer(bank.name, first.open.writer_id, scopes, session=self._session(first.open.local_session))
        self.writers.add(writer)
        try:
            await context.write(expert_pb2.PushExpertsResponse(opened=expert_pb2.PushOpened(took_over=writer.took_over)))
            await _serve_writer(writer, context)
        finally:
            self.writers.discard(writer)
            writer.close()

    async def PrefetchExperts(self, request: expert_pb2.PrefetchExpertsRequest, context: Context) -> expert_pb2.PrefetchExpertsResponse:
        """Queues experts to be loaded into DRAM, and returns at once whether each is resident, queued or rejected."""
        engine, bank, scopes = self._bank(request.bank, context)
        deadline_s = request.deadline_ms / 1000 if request.deadline_ms else None
        states = engine.prefetch(bank, request.experts, deadline_s=deadline_s, priority=request.priority, scopes=scopes)
        return expert_pb2.PrefetchExpertsResponse(states=states)

    async def CancelPrefetch(self, request: expert_pb2.CancelPrefetchRequest, context: Context) -> expert_pb2.CancelPrefetchResponse:
        """Cancels queued prefetches of these experts, or of the whole bank when no expert is named."""
        engine, bank, _ = self._bank(request.bank, context)
        return expert_pb2.CancelPrefetchResponse(num_cancelled=engine.promotions.cancel(bank, set(request.experts)))

    async def ListExperts(self, request: expert_pb2.ListExpertsRequest, context: Context) -> expert_pb2.ListExpertsResponse:
        """Returns one page of the experts of a bank: their versions, tiers, sizes and checksums."""
        engine, bank, _ = self._bank(request.bank, context)
        return engine.list_experts(bank, request.start, request.page_size)

    def _session(self, number: int) -> Session | None:
        """Returns the local session that a push stream names (a caller on this host); None for number 0. Raises LeaseExpired."""
        if number == 0:
            return None
        plane = self._plane()
        if plane is None:
            raise LeaseExpired(f"local_session: {number:#x}: this daemon has no local plane")
        return plane.session(number)

    def _bank(self, name: str, context: Context) -> tuple[Engine, Bank, Scopes]:
        engine = self._engine()
        trainer = trainer_of(context)
        bank = engine.catalog.bank(name)
        return engine, bank, engine.stats.scopes(trainer, bank.access)


class SnapshotService(snapshot_pb2_grpc.SnapshotServiceServicer):
    """Takes, lists, restores and deletes snapshots of banks. Contract: snapshot.proto."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    async def CreateSnapshot(self, request: snapshot_pb2.CreateSnapshotRequest, context: Context) -> snapshot_pb2.Snapshot:
        """Takes a snapshot of the named banks as they are at one moment."""
        engine = self._engine()
        return engine.catalog.snapshot_to_proto(await engine.changes.create_snapshot(request.banks, request.name))

    async def ListSnapshots(self, request: snapshot_pb2.ListSnapshotsRequest, context: Context) -> snapshot_pb2.ListSnapshotsResponse:
        """Returns the snapshots, newest first: all, or those that contain the named bank."""
        catalog = self._engine().catalog
        newest_first = sorted(catalog.snapshots.values(), key=lambda snapshot: -snapshot.id)
        shown = [catalog.snapshot_to_proto(snapshot) for snapshot in newest_first]
        return snapshot_pb2.ListSnapshotsResponse(snapshots=[each for each in shown if not request.bank or request.bank in each.banks])

    async def RestoreSnapshot(self, request: snapshot_pb2.RestoreSnapshotRequest, context: Context) -> snapshot_pb2.Snapshot:
        """Sets every expert of a snapshot's banks back to the record that it had in the snapshot, under a new version."""
        engine = self._engine()
        return engine.catalog.snapshot_to_proto(await engine.changes.restore_snapshot(request.id, request.writer_id))

    async def DeleteSnapshot(self, request: snapshot_pb2.DeleteSnapshotRequest, context: Context) -> snapshot_pb2.DeleteSnapshotResponse:
        """Removes a snapshot. Disk space that nothing else refers to becomes free."""
        await self._engine().changes.delete_snapshot(request.id)
        return snapshot_pb2.DeleteSnapshotResponse()


class LocalService(local_pb2_grpc.LocalServiceServicer):
    """Tells callers on this host how to reach the local plane, through which they read DRAM in place. Contract: local.proto."""

    def __init__(self, plane: Callable[[], LocalPlane | None]) -> None:
        self._plane = plane

    async def GetLocalPlane(self, request: local_pb2.GetLocalPlaneRequest, context: Context) -> local_pb2.LocalPlane:
        """Returns the name of the local plane's Unix socket; empty when this daemon has no local plane."""
        plane = self._plane()
        return local_pb2.LocalPlane(socket=plane.socket_name if plane else "")


class StatsService(stats_pb2_grpc.StatsServiceServicer):
    """Serves the daemon's counters, and stores the counters that trainers report. Contract: stats.proto.

    The daemon sets `draining` to end the WatchStats streams.
    """

    def __init__(self, engine: Callable[[], Engine], complete: Callable[[stats_pb2.Stats], None]) -> None:
        """`engine`: returns the open engine. `complete`: adds what the engine does not know, such as version and data directory."""
        self._engine, self._complete = engine, complete
        self.draining = asyncio.Event()

    async def GetStats(self, request: stats_pb2.GetStatsRequest, context: Context) -> stats_pb2.Stats:
        """Returns all counters, as of now."""
        return self._stats()

    async def WatchStats(self, request: stats_pb2.WatchStatsRequest, context: Context) -> None:  # type: ignore[override]
        """Sends all counters again and again, at the interval that the request names, until the caller hangs up or the daemon drains."""
        interval_ms = request.interval_ms or WATCH_INTERVAL_MS
        require_at_least(WATCH_INTERVAL_MS_MIN, interval_ms=interval_ms)
        while not self.draining.is_set():
            await context.write(self._stats())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_ms / 1000):
                    await self.draining.wait()
        raise Unavailable("the daemon drains")

    async def ReportTrainer(self, request: stats_pb2.ReportTrainerRequest, context: Context) -> stats_pb2.ReportTrainerResponse:
        """Stores the counters that a trainer reports about itself (its HBM cache, for example), to be shown with the daemon's own."""
        self._engine().stats.report(trainer_of(context), request)
        return stats_pb2.ReportTrainerResponse()

    def _stats(self) -> stats_pb2.Stats:
        stats = self._engine().snapshot_stats()
        self._complete(stats)
        return stats


_REGISTRATION: dict[type[Any], tuple[Any, Callable[[Any, grpc.aio.Server], None]]] = {
    BankService: (bank_pb2, bank_pb2_grpc.add_BankServiceServicer_to_server),
    ExpertService: (expert_pb2, expert_pb2_grpc.add_ExpertServiceServicer_to_server),
    SnapshotService: (snapshot_pb2, snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server),
    StatsService: (stats_pb2, stats_pb2_grpc.add_StatsServiceServicer_to_server),
    LocalService: (local_pb2, local_pb2_grpc.add_LocalServiceServicer_to_server),
}
SERVICE_NAMES: tuple[str, ...] = tuple(
    module.DESCRIPTOR.services_by_name[service.__name__].full_name for service, (module, _) in _REGISTRATION.items()
)


def add_to_server(server: grpc.aio.Server, *services: BankService | ExpertService | SnapshotService | StatsService | LocalService) -> None:
    """Registers services with a gRPC server, so that it answers their calls."""
    for service in services:
        _, add = _REGISTRATION[type(service)]
        add(service, server)


def trainer_of(context: Context) -> str:
    """Returns the trainer's name from the metadata of a call; empty when the metadata name none.

    Raises InvalidRequest when the name is too long.
    """
    return checked_trainer(str(dict(context.invocation_metadata() or ()).get(TRAINER_KEY, "")))


def checked_trainer(trainer: str) -> str:
    """Returns a trainer's name unchanged. Raises InvalidRequest when it is too long."""
    if len(trainer.encode()) > TRAINER_BYTES_MAX:
        raise InvalidRequest(f"{TRAINER_KEY}: {len(trainer.encode())} bytes are more than {TRAINER_BYTES_MAX}")
    return trainer


def fetch_of(engine: Engine, request: expert_pb2.FetchExpertsRequest, trainer: str) -> tuple[Bank, Fetch]:
    """Checks a fetch request. Returns the bank that it names, and a `Fetch` that is ready to run.

    Raises UnknownBank, UnknownExpert, InvalidRequest.
    """
    bank = engine.catalog.bank(request.bank)
    whole = request.sections == expert_pb2.SECTIONS_ALL
    fetch = engine.fetch(
        bank,
        request.experts,
        known_versions=request.known_versions,
        demand=request.priority == expert_pb2.PRIORITY_DEMAND,
        section_bytes=bank.layout.body_bytes if whole else bank.layout.parameter_bytes,
        scopes=engine.stats.scopes(trainer, bank.access),
    )
    return bank, fetch


async def _serve_writer(writer: Writer, context: Context) -> None:
    """Serves a push stream: receives records and sends outcomes until the stream ends or its writer must close.

    Records that arrived in full still get their outcome before this returns.

    Raises:
        OocMoeError: the error that ended the stream.
    """
    receiver = asyncio.create_task(_receive(writer, context))
    sender = asyncio.create_task(_send_outcomes(writer, context))
    try:
        enders: list[asyncio.Future[Any]] = [receiver, writer.closing]
        await asyncio.wait(enders, return_when=asyncio.FIRST_COMPLETED)
        if not receiver.done():
            receiver.cancel()
        await writer.wait_outcomes()
        all_sent = asyncio.create_task(writer.outcomes.join())
        await asyncio.wait([all_sent, sender], return_when=asyncio.FIRST_COMPLETED)
        all_sent.cancel()
        if receiver.done() and not receiver.cancelled():
            receiver.result()
        if writer.closing.done():
            raise writer.closing.result()
    finally:
        receiver.cancel()
        sender.cancel()


async def _receive(writer: Writer, context: Context) -> None:
    """Passes the messages of a push stream to its writer, until the caller has no more to send."""
    while (message := await context.read()) is not grpc.aio.EOF:
        match "view" if isinstance(message, ChunkView) else message.WhichOneof("message"):
            case "view":
                writer.add(message)
            case "header":
                await writer.begin(message.header)
            case "chunk":
                writer.add(message.chunk)
            case other:
                raise InvalidRequest(f"push stream: {other or 'an empty message'} where a header or a chunk belongs")
    writer.end()


async def _send_outcomes(writer: Writer, context: Context) -> None:
    """Sends the outcomes of a writer's pushes to the caller as they come, until this task is cancelled."""
    while True:
        outcome = await writer.outcomes.get()
        await context.write(expert_pb2.PushExpertsResponse(outcome=outcome))
        writer.outcomes.task_done()

"""Sends the replies to a fetch: headers and chunks that carry the bytes, or leases that tell where the bytes are in shared memory."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from ooc_moe_server.dram.arena import Arena
from ooc_moe_server.engine.fetch import Fetch, Served
from ooc_moe_server.engine.writer import error_info
from ooc_moe_server.local.plane import Session
from ooc_moe_server.rpc.pacing import MessagePacer
from ooc_moe_wire.codec import CHUNK_BYTES, CHUNK_BYTES_MAX, encoded_chunks
from ooc_moe_wire.layout import BLOCK_BYTES, Layout
from ooc_moe_wire.v1 import expert_pb2, local_pb2

# Sends one message, which may be serialized already.
Send = Callable[[expert_pb2.FetchExpertsResponse | bytes], Awaitable[None]]
# The leases of one message. The first messages carry few, so that the caller copies while the next leases are made.
FIRST_LEASES_BYTES = 1 << 20
LEASES_BYTES_MAX = 64 << 20
LEASES_MAX = 256
_GROWTH = 4


async def send_experts(fetch: Fetch, layout: Layout, send: Send, *, whole: bool, pacer: MessagePacer) -> None:
    """Sends each fetched expert through `send`: first its header, then its bytes in chunks.

    `whole`: send the optimizer section after the parameters too. `pacer`: shared by all streams, so that small calls are not delayed.
    """
    async with contextlib.aclosing(fetch.experts()) as experts:
        with pacer.counted_stream():
            async for served in experts:
                await send(expert_pb2.FetchExpertsResponse(header=_header(served, layout, whole=whole)))
                if served.entry:
                    body = served.entry.body if whole else served.entry.body[: layout.parameter_bytes]
                    # Larger chunks cost both sides an eighth less. With several streams, smaller ones halve the time that others wait.
                    chunk_bytes = CHUNK_BYTES_MAX if pacer.num_streams == 1 else CHUNK_BYTES
                    encoded = encoded_chunks(body, field=expert_pb2.FetchExpertsResponse.CHUNK_FIELD_NUMBER, chunk_bytes=chunk_bytes)
                    for _ in range(0, len(body), chunk_bytes):
                        await pacer.wait_turn()
                        await send(next(encoded))


async def send_leases(fetch: Fetch, layout: Layout, session: Session, *, arena: Arena, pinned: bool) -> None:
    """Answers a fetch through the local plane with leases: the places of the records in the shared arena, in batches.

    An expert whose version the caller has already gets a row without a lease. For an expert that cannot be served, a header with the error
    is sent.
    `pinned`: the leases do not expire.

    Raises:
        TierFull: too few of the session's earlier leases ended in time.
        LeaseExpired: the session was closed.
    """
    ramp = _Ramp(session, layout.record_bytes)
    async with contextlib.aclosing(fetch.batches(ramp.room)) as batches:
        async for batch in batches:
            leased = [served for served in batch if served.entry]
            if leased:
                ids = session.lease([served.entry for served in leased if served.entry], pinned=pinned)
                await session.send(local_pb2.LocalAnswer(leases=_leases(ids, leased, arena)))
                fetch.sent(leased, leased=True)
            if unchanged := [served for served in batch if not served.entry and not served.error]:
                await session.send(local_pb2.LocalAnswer(leases=_unchanged(unchanged)))
            for served in batch:
                if served.error:
                    await session.send(local_pb2.LocalAnswer(header=_header(served, layout, whole=True)))


class _Ramp:
    """Chooses how many leases go into each message: few at first, then more, and never more than the session may still get."""

    def __init__(self, session: Session, record_bytes: int) -> None:
        self._session, self._record_bytes = session, record_bytes
        self._most = max(1, min(LEASES_MAX, LEASES_BYTES_MAX // record_bytes))
        self._next = max(1, min(self._most, FIRST_LEASES_BYTES // record_bytes))

    async def room(self) -> int:
        """Returns the size of the next batch. Waits until the session may hold at least one more lease. Implements `engine.fetch.Room`."""
        number = min(self._next, await self._session.room(self._record_bytes))
        self._next = min(self._next * _GROWTH, self._most)
        return number


def _leases(ids: range, leased: Sequence[Served], arena: Arena) -> local_pb2.Leases:
    entries = [served.entry for served in leased if served.entry]
    checksums = [entry.checksums for entry in entries if entry.checksums]
    starts = [entry.extent.start for entry in entries]
    return local_pb2.Leases(
        ids=ids,
        experts=[served.expert for served in leased],
        versions=[served.version for served in leased],
        served_from=[served.tier for served in leased],
        offsets=[start + BLOCK_BYTES for start in starts],
        generations=[arena.generation(start) for start in starts],
        parameter_xxh3=[sums.parameters for sums in checksums],
        optimizer_xxh3=[sums.optimizer for sums in checksums],
    )


def _unchanged(unchanged: Sequence[Served]) -> local_pb2.Leases:
    """Makes one message with a row for each expert whose version the caller has already. A message for each would take too long."""
    zeros = [0] * len(unchanged)
    return local_pb2.Leases(
        ids=zeros,
        experts=[served.expert for served in unchanged],
        versions=[served.version for served in unchanged],
        served_from=[served.tier for served in unchanged],
        offsets=zeros,
        generations=zeros,
        parameter_xxh3=zeros,
        optimizer_xxh3=zeros,
    )


def _header(served: Served, layout: Layout, *, whole: bool) -> expert_pb2.ExpertHeader:
    header = expert_pb2.ExpertHeader(expert=served.expert, version=served.version, served_from=served.tier)
    header.unchanged = served.entry is None and served.error is None
    if served.error:
        header.error.CopyFrom(error_info(served.error))
    if served.entry:
        assert served.entry.checksums is not None
        header.parameter_bytes = layout.parameter_bytes
        header.parameter_xxh3 = served.entry.checksums.parameters
        if whole:
            header.optimizer_bytes = layout.optimizer_bytes
            header.optimizer_xxh3 = served.entry.checksums.optimizer
    return header

"""Serves one writer that pushes records to one bank: what the gRPC stream PushExperts does, without gRPC.

    open -> (begin -> add ... add)* -> wait_outcomes -> close

The bytes of a record are received straight into the arena (the memory of the DRAM tier), or are staged in memory that the caller shares. A
complete record is handed to the committer, which carries it to its end even if the writer disconnects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

from ooc_moe_server.catalog.catalog import Bank, PushUnderWay
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.committer import Committer
from ooc_moe_server.engine.push import Push
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.codec import CHUNK_BYTES_MAX, Assembler, Checksums
from ooc_moe_wire.errors import InvalidRequest, NotTheWriter, OocMoeError, StaleVersion
from ooc_moe_wire.rules import check_writer, is_repeat
from ooc_moe_wire.v1 import expert_pb2

log = logging.getLogger(__name__)

WRITER_ID_BYTES_MAX = 128
# Pushes of one stream without an outcome. A writer that sends more waits.
PUSHES_IN_FLIGHT_MAX = 64


class Staging(Protocol):
    """Gives a writer access to staging memory: shared memory in which a caller on this host puts the records that it pushes.

    This is the one method that a writer uses of a local `Session` (a caller on this host that shares memory with the daemon).
    """

    def staging(self, offset: int, size: int) -> memoryview:
        """Returns `size` bytes at `offset` of the caller's staging memory. Raises InvalidRequest, LeaseExpired."""
        ...


class Writer:
    """Receives the records that one writer pushes to a bank, has them committed, and puts the outcome of each in `outcomes`.

    The stream must end when the future `closing` has a result, the reason: a newer stream of this writer took over, or the daemon drains.
    """

    def __init__(
        self,
        bank: Bank,
        writer_id: str,
        scopes: Scopes,
        *,
        session: Staging | None,
        committer: Committer,
        dram: DramTier,
        stats: Stats,
        patience_s: float,
    ) -> None:
        """Acquires the bank's lease: the right to push to it, which one writer has at a time. Raises NotTheWriter, InvalidRequest.

        An older stream of the same writer loses the lease.

        Args:
            bank: The bank.
            writer_id: The writer's name; the bank stays open for this writer alone.
            scopes: The counters that the pushes are added to.
            session: The local session in whose memory records may be staged; None: all records come in chunks.
            committer: Gets the complete records.
            dram: The tier in which memory for records is reserved.
            stats: The daemon's counters.
            patience_s: How long a record waits for room in DRAM before it is refused with TierFull.
        """
        if not 1 <= len(writer_id.encode()) <= WRITER_ID_BYTES_MAX or "\0" in writer_id:  # Record headers pad the id with zeros.
            raise InvalidRequest(f"writer_id: {writer_id!r} is not 1 to {WRITER_ID_BYTES_MAX} bytes without zeros")
        check_writer(bank.name, bank.writer_id, writer_id)
        older = bank.writer
        self.bank, self.writer_id = bank, writer_id
        self.took_over = older is not None
        self.closing: asyncio.Future[OocMoeError] = asyncio.get_running_loop().create_future()
        self.outcomes: asyncio.Queue[expert_pb2.PushOutcome] = asyncio.Queue()
        self._scopes, self._committer, self._dram, self._stats, self._patience_s = scopes, committer, dram, stats, patience_s
        self._session = session
        self._incoming: _Incoming | None = None
        self._end_after_incoming: OocMoeError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = asyncio.Semaphore(PUSHES_IN_FLIGHT_MAX)
        if isinstance(older, Writer):
            older._be_taken_over()
        bank.writer = self
        log.info("writer %r opened bank %r%s", writer_id, bank.name, ", taking over from its older stream" if self.took_over else "")

    async def begin(self, header: expert_pb2.PushHeader) -> None:
        """Begins to receive the record that a header announces. A record that the caller staged in shared memory needs no chunks.

        If the record is refused, the error becomes the record's outcome, and the record's chunks are skipped.

        Raises:
            InvalidRequest: the previous record is not complete.
        """
        if self._incoming:
            raise InvalidRequest(f"expert {header.expert}: a header before the last chunk of expert {self._incoming.header.expert}")
        await self._in_flight.acquire()
        incoming = _Incoming(header, self._stats.clock())
        self._incoming = incoming
        try:
            await self._admit(incoming)
        except OocMoeError as error:
            self._send_outcome(incoming, error)
        self._finish_if_complete()

    def add(self, chunk: expert_pb2.Chunk) -> None:
        """Receives the next chunk of a record's bytes. Raises InvalidRequest when the chunk is out of order, too long, or belongs to no
        record.
        """
        if self._incoming is None:
            raise InvalidRequest(f"chunk at offset {chunk.offset}: no header came before it")
        if len(chunk.payload) > CHUNK_BYTES_MAX:
            raise InvalidRequest(f"chunk of {len(chunk.payload)} bytes: at most {CHUNK_BYTES_MAX}")
        self._incoming.add(chunk)
        self._finish_if_complete()

    def end(self) -> None:
        """Raises InvalidRequest if the last record is incomplete. Call this when the caller sends no more."""
        if self._incoming:
            header = self._incoming.header
            raise InvalidRequest(
                f"expert {header.expert}: the stream ended after {self._incoming.received} of "
                f"{header.parameter_bytes + header.optimizer_bytes} bytes"
            )

    async def wait_outcomes(self) -> None:
        """Waits until every record that was received in full has its outcome."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        """Releases the bank's lease, and drops a record that was received only in part. Complete records are still written to the disk."""
        self._drop_incoming()
        if self.bank.writer is self:
            self.bank.writer = None
            log.info("writer %r closed bank %r", self.writer_id, self.bank.name)

    def ask_to_end(self, reason: OocMoeError) -> None:
        """Asks the stream to end, by giving `closing` the result `reason`: now, or when the record that is being received is complete."""
        if self._incoming:
            self._end_after_incoming = reason
        elif not self.closing.done():
            self.closing.set_result(reason)

    def _be_taken_over(self) -> None:
        """Ends this stream because a newer stream of the same writer takes over. That stream will repeat a record received in part."""
        self._drop_incoming()
        self.ask_to_end(NotTheWriter(f"bank {self.bank.name!r}: writer {self.writer_id!r} opened a newer stream"))

    async def _admit(self, incoming: _Incoming) -> None:
        """Admits a new record: reserves memory for it. A repeat of an earlier push needs none, and gets that push's outcome.

        Raises:
            OocMoeError: the record is refused.
        """
        header, bank = incoming.header, self.bank
        self._check(header)
        record = bank.record(header.expert)
        if (under_way := bank.pushing.get(header.expert)) is not None:
            if not is_repeat(under_way, self.writer_id, header.push_number):
                raise StaleVersion(f"expert {header.expert} of bank {bank.name!r}: push {under_way.push_number} is still being written")
            self._spawn(self._follow(incoming, under_way))
        elif is_repeat(record, self.writer_id, header.push_number):
            self._scopes.count("push_repeats")
            self._send_outcome(incoming, record.version, durable=not record.unsaved)
        else:
            bank.check_base(header.expert, header.base_version)
            self._committer.check_quota(bank, header.expert)
            staged = self._staged(header)
            entry = await self._dram.reserve_soon(bank.layout.record_bytes, self._patience_s)
            if self._incoming is not incoming:  # A newer stream took over meanwhile.
                self._dram.unpin(entry)
                return
            incoming.receive(
                Push(
                    bank=bank,
                    expert=header.expert,
                    base_version=header.base_version,
                    writer_id=self.writer_id,
                    push_number=header.push_number,
                    checksums=Checksums(header.parameter_xxh3, header.optimizer_xxh3),
                    entry=entry,
                    staged=staged,
                    in_memory=header.durability == expert_pb2.MEMORY,
                )
            )

    def _staged(self, header: expert_pb2.PushHeader) -> memoryview | None:
        """Returns the staged bytes of a record, or None when its bytes come in chunks. Raises InvalidRequest, LeaseExpired."""
        if not header.HasField("staged_at"):
            return None
        if self._session is None:
            raise InvalidRequest(f"staged_at: expert {header.expert} is staged, but the stream was opened without a local_session")
        return self._session.staging(header.staged_at, self.bank.layout.body_bytes)

    def _check(self, header: expert_pb2.PushHeader) -> None:
        layout = self.bank.layout
        self.bank.check((header.expert,))
        if header.push_number < 1:
            raise InvalidRequest(f"push_number: {header.push_number} of expert {header.expert} is not at least 1")
        if (header.parameter_bytes, header.optimizer_bytes) != (layout.parameter_bytes, layout.optimizer_bytes):
            raise InvalidRequest(
                f"expert {header.expert}: sections of {header.parameter_bytes} and {header.optimizer_bytes} bytes, "
                f"bank {self.bank.name!r} has {layout.parameter_bytes} and {layout.optimizer_bytes}"
            )

    def _finish_if_complete(self) -> None:
        incoming = self._incoming
        if incoming is None or not incoming.complete:
            return
        self._incoming = None
        if incoming.push:
            self._committer.submit(incoming.push)
            self._spawn(self._follow(incoming, incoming.push))
        if self._end_after_incoming:
            self.ask_to_end(self._end_after_incoming)

    async def _follow(self, incoming: _Incoming, push: PushUnderWay) -> None:
        """Waits for the outcome of `push` and sends it as the outcome of the record `incoming`.

        `push` is the record's own push, or the earlier one that it repeats.
        """
        outcome = await asyncio.shield(push.outcome)
        if incoming.push is not push:
            self._scopes.count("push_repeats")
        elif isinstance(outcome, int):
            self._scopes.count("pushed_experts")
            self._scopes.count("pushed_bytes", self.bank.layout.body_bytes)
            self._stats.add_latency("push", incoming.began)
        self._send_outcome(incoming, outcome, durable=push.is_durable)

    def _send_outcome(self, incoming: _Incoming, outcome: int | OocMoeError, *, durable: bool = False) -> None:
        header = incoming.header
        message = expert_pb2.PushOutcome(expert=header.expert, push_number=header.push_number)
        if isinstance(outcome, int):
            message.version, message.durable = outcome, durable
        else:
            message.error.CopyFrom(error_info(outcome))
            self._scopes.count("push_refused")
        self.outcomes.put_nowait(message)
        self._in_flight.release()

    def _drop_incoming(self) -> None:
        if self._incoming and self._incoming.push:
            self._dram.unpin(self._incoming.push.entry)
        self._incoming = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Incoming:
    """A record that is being received. If it has no push, because it was refused or is a repeat, its bytes are skipped."""

    def __init__(self, header: expert_pb2.PushHeader, began: float) -> None:
        self.header, self.began = header, began
        self.push: Push | None = None
        self._num_bytes = header.parameter_bytes + header.optimizer_bytes
        self.received = self._num_bytes if header.HasField("staged_at") else 0
        self._assembler: Assembler | None = None

    def receive(self, push: Push) -> None:
        """Gives the record its push. From now on, its bytes are stored in the push's place in the arena."""
        self.push = push
        self._assembler = Assembler(push.entry.body, what=f"expert {push.expert} of bank {push.bank.name!r}")

    @property
    def complete(self) -> bool:
        return self.received == self._num_bytes

    def add(self, chunk: expert_pb2.Chunk) -> None:
        end = self.received + len(chunk.payload)
        if self._assembler:
            self._assembler.add(chunk)
        elif chunk.offset != self.received or not chunk.payload or end > self._num_bytes:
            raise InvalidRequest(
                f"expert {self.header.expert}: chunk at offset {chunk.offset}, expected {self.received} of {self._num_bytes}"
            )
        self.received = end


def error_info(error: OocMoeError) -> expert_pb2.ErrorInfo:
    """Makes the message that reports the error of one expert to the caller, while the stream goes on with the others."""
    return expert_pb2.ErrorInfo(kind=type(error).__name__, message=str(error))

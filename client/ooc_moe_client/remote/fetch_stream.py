"""One fetch: a stream of headers and chunks, or of leases on the local plane, opened again for the rest when it breaks.

Knows nothing of retries: `next` fails once, and may be called again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import grpc

from ooc_moe_client.local.plane import LocalCall
from ooc_moe_client.remote.connection import Connection, Responses
from ooc_moe_client.remote.plane_choice import Planes
from ooc_moe_client.remote.read_floor import Acknowledged
from ooc_moe_client.store import Fetched, Priority, Sections, Tier
from ooc_moe_client.validation import check_memory
from ooc_moe_wire.codec import HOLDS_NONE, Assembler, Checksums, ChunkView, HashingAssembler, compare, decode_fetch_response
from ooc_moe_wire.errors import CorruptRecord, DeadlineExceeded, Internal, InvalidRequest, OocMoeError, Unavailable, error_named
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.local import FETCHED_MAX
from ooc_moe_wire.v1 import expert_pb2, local_pb2

# A stream's deadline allows for the slowest disk and network worth using.
SLOWEST_BYTES_PER_S = 10 << 20
# Leases go back by packets of so many copied bytes.
RELEASED_BYTES = 16 << 20
# What was overwritten before it was copied (a caller that stood still for longer than a lease lasts) is leased again so many times; the
# rest then comes in chunks.
OVERWRITTEN_ROUNDS_MAX = 3

_TIERS = {tier.value: tier for tier in Tier}
_Message = expert_pb2.FetchExpertsResponse | ChunkView
# id, expert, version, tier, offset, generation, checksums
_Lease = tuple[int, int, int, int, int, int, int, int]


class FetchStream:
    """The experts of one call that have not come yet."""

    def __init__(
        self,
        connection: Connection,
        planes: Planes,
        acknowledged: Acknowledged,
        bank: str,
        layout: Layout,
        experts: Sequence[int],
        *,
        into: Callable[[int], memoryview],
        sections: Sections,
        priority: Priority,
        known_versions: Sequence[int | None] | None,
        verify: bool,
    ) -> None:
        self._connection = connection
        # As the generated stub's, but chunks come as views.
        self._fetch_experts: grpc.UnaryStreamMultiCallable[expert_pb2.FetchExpertsRequest, _Message] = connection.channel.unary_stream(
            "/ooc_moe_wire.v1.ExpertService/FetchExperts",
            request_serializer=expert_pb2.FetchExpertsRequest.SerializeToString,
            response_deserializer=decode_fetch_response,
        )
        self._planes = planes
        self._acknowledged = acknowledged
        self._bank = bank
        self._layout = layout
        self._into = into
        self._sections = sections
        self._num_bytes = layout.body_bytes if sections is Sections.ALL else layout.parameter_bytes
        self._priority = priority
        self._verify = verify
        self._left = dict(zip(experts, known_versions or [None] * len(experts), strict=True))
        self._has_known = known_versions is not None
        self._least: dict[int, int] = {}  # by expert: what had been acknowledged when the stream was opened
        self._call: Responses[_Message] | LocalCall | None = None
        self._used: list[int] = []  # leases to be given back
        self._num_after = 0  # experts to be asked for after the present call
        self._num_overwritten = 0  # experts of the present call that were overwritten before they were copied
        self._rounds_overwritten = 0  # calls that ended with some
        self.error: OocMoeError | None = None  # the first expert's that could not be served

    def next(self) -> Iterable[Fetched] | None:
        """The next experts, each there as it is drawn; draw them all. None when all have come or failed (see `error`)."""
        try:
            while self._left or isinstance(self._call, LocalCall):  # Whose end is read, so that its session can be used again.
                with self._connection.errors():
                    message = self._message()
                if message is None:
                    self._end()
                elif isinstance(message, local_pb2.Leases):
                    return self._copied(message)
                elif (fetched := self._received(message)) is not None:
                    return (fetched,)
        except BaseException:
            self.cancel()
            raise
        return None

    def cancel(self) -> None:
        """Ends the stream; `next` would open another."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._used = []

    def _open(self) -> Responses[_Message] | LocalCall:
        plane = self._planes.local() if self._rounds_overwritten < OVERWRITTEN_ROUNDS_MAX else None
        asked = dict(itertools.islice(self._left.items(), len(self._left) if plane is None else FETCHED_MAX))
        self._least = self._acknowledged.of(self._bank, asked)
        self._num_overwritten, self._num_after = 0, len(self._left) - len(asked)
        request = expert_pb2.FetchExpertsRequest(
            bank=self._bank,
            experts=list(asked),
            sections=cast(expert_pb2.Sections.ValueType, self._sections.value),
            known_versions=[HOLDS_NONE if version is None else version for version in asked.values()] if self._has_known else [],
            priority=cast(expert_pb2.Priority.ValueType, self._priority.value),
        )
        timeout_s = self._connection.timeout_s + len(asked) * self._layout.body_bytes / SLOWEST_BYTES_PER_S
        if plane is None:
            return self._fetch_experts(request, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            return plane.fetch(local_pb2.LocalFetch(trainer=self._connection.trainer, request=request), timeout_s=timeout_s)
        except Unavailable as error:  # It has no session to spare, or went away.
            self._planes.drop(plane)
            raise self._connection.named(error) from error

    def _message(self) -> local_pb2.Leases | expert_pb2.ExpertHeader | None:
        """The next message that is no chunk; None at the end of the call."""
        if self._call is None:
            self._call = self._open()
        if isinstance(self._call, LocalCall):
            try:
                answer = self._call.next()
            except (Unavailable, DeadlineExceeded) as error:
                raise self._connection.named(error) from error
            self._connection.answered()
            return answer and (answer.leases if answer.HasField("leases") else answer.header)
        message = next(self._call, None)
        self._connection.answered()
        if isinstance(message, ChunkView):
            raise Internal(f"bank {self._bank!r}: a chunk without a header")
        return message and message.header

    def _end(self) -> None:
        """The call ended before all had come: right when these were overwritten before they were copied, or are asked for afterwards."""
        self._call = None
        num_missing = len(self._left) - self._num_after
        if self._num_overwritten < num_missing:
            raise Internal(f"bank {self._bank!r}: the call ended without {num_missing} of the experts")
        self._rounds_overwritten += num_missing > 0

    # The stream plane

    def _received(self, header: expert_pb2.ExpertHeader) -> Fetched | None:
        """One expert, with its chunks; None when it could not be served."""
        what = f"bank {self._bank!r}, expert {header.expert}"
        self._check_wanted(header.expert)
        if header.HasField("error"):
            self._fail(header.expert, error_named(header.error.kind, header.error.message))
            return None
        if not header.unchanged:
            with self._connection.errors():
                received = self._receive_body(header, what)
            try:
                if received is not None:
                    expected = Checksums(header.parameter_xxh3, header.optimizer_xxh3)
                    compare(received, expected, whole=self._sections is Sections.ALL, what=what)
            except CorruptRecord as error:
                self._fail(header.expert, error)
                return None
        return self._arrived(header.expert, header.version, header.served_from, unchanged=header.unchanged)

    def _receive_body(self, header: expert_pb2.ExpertHeader, what: str) -> Checksums | None:
        """Receives the chunks; returns what their bytes hash to, if that is to be verified."""
        optimizer_bytes = self._layout.optimizer_bytes if self._sections is Sections.ALL else 0
        if (header.parameter_bytes, header.optimizer_bytes) != (self._layout.parameter_bytes, optimizer_bytes):
            raise InvalidRequest(
                f"{what}: sections of {header.parameter_bytes} and {header.optimizer_bytes} bytes, "
                f"the layout has {self._layout.parameter_bytes} and {optimizer_bytes}"
            )
        body = self._landing(header.expert)
        hashing = HashingAssembler(body, parameter_bytes=self._layout.parameter_bytes, what=what) if self._verify else None
        assembler = hashing or Assembler(body, what=what)
        call = self._call
        assert call is not None
        assert not isinstance(call, LocalCall)
        while not assembler.complete:
            message = next(call, None)
            if message is None:
                raise Internal(f"{what}: the stream ended in the middle")
            assembler.add(message if isinstance(message, ChunkView) else message.chunk)
        return hashing.checksums if hashing else None

    # The local plane

    def _copied(self, leases: local_pb2.Leases) -> Iterator[Fetched]:
        """Copies one record after the other, as they are drawn, and gives the leases back."""
        # Slices: lists, which are walked faster than messages.
        ids, sums = leases.ids[:], (leases.parameter_xxh3[:], leases.optimizer_xxh3[:])
        columns = leases.experts[:], leases.versions[:], leases.served_from[:], leases.offsets[:], leases.generations[:], *sums
        if any(len(column) != len(ids) for column in columns):
            raise Internal(f"bank {self._bank!r}: leases with columns of different lengths")
        # In parts: where the session's share of the arena is small, the next batch needs the room of this one.
        used_max = max(1, min(RELEASED_BYTES // self._num_bytes, len(ids) // 4))
        for lease in zip(ids, *columns, strict=True):
            if not lease[0]:
                self._check_wanted(lease[1])
                if (unchanged := self._arrived(*lease[1:4], unchanged=True)) is not None:
                    yield unchanged
                continue
            self._used.append(lease[0])
            fetched = self._copy(lease)
            if len(self._used) >= used_max:
                self._give_back()
            if fetched is not None:
                yield fetched
        self._give_back()

    def _copy(self, lease: _Lease) -> Fetched | None:
        """One record; None when it was overwritten, and is to come again, or is damaged."""
        _, expert, version, tier, offset, generation, parameters, optimizer = lease
        self._check_wanted(expert)
        assert isinstance(self._call, LocalCall)
        memory, body = self._call.plane.memory, self._landing(expert)
        if not self._verify:
            if memory.copy(offset, generation, body):
                return self._arrived(expert, version, tier)
            self._num_overwritten += 1
            return None
        checksums = memory.copy_hashed(offset, generation, body, self._layout.parameter_bytes)
        if checksums is None:
            self._num_overwritten += 1
            return None
        try:
            expected = Checksums(parameters, optimizer)
            compare(checksums, expected, whole=self._sections is Sections.ALL, what=f"bank {self._bank!r}, expert {expert}")
        except CorruptRecord as error:
            self._fail(expert, error)
            return None
        return self._arrived(expert, version, tier)

    def _give_back(self) -> None:
        if isinstance(self._call, LocalCall) and self._used:
            self._call.release(self._used)
        self._used = []

    # Both

    def _landing(self, expert: int) -> memoryview:
        body = self._into(expert)
        check_memory(self._bank, expert, body, self._num_bytes)
        return body

    def _check_wanted(self, expert: int) -> None:
        if expert not in self._left:
            raise Internal(f"bank {self._bank!r}, expert {expert}: it was not asked for, or came twice")

    def _arrived(self, expert: int, version: int, tier: int, *, unchanged: bool = False) -> Fetched | None:
        least = self._least.get(expert)
        if least is not None and (lost := self._acknowledged.lost(self._bank, expert, version, least)) is not None:
            self._fail(expert, lost)
            return None
        del self._left[expert]
        return Fetched(expert=expert, version=version, served_from=_TIERS[tier], unchanged=unchanged)

    def _fail(self, expert: int, error: OocMoeError) -> None:
        self.error = self.error or error
        del self._left[expert]

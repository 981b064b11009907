"""`StreamedCall`: one call of a fetch on the stream plane, that is, in gRPC messages.

Each expert comes as one header message, followed by chunks of its bytes unless the caller has its version already.
"""

from __future__ import annotations

import grpc

from ooc_moe_client.remote.connection import Connection, Responses
from ooc_moe_client.remote.pending_experts import PendingExperts
from ooc_moe_client.store import Fetched, Sections
from ooc_moe_wire.codec import Assembler, Checksums, ChunkView, HashingAssembler, decode_fetch_response
from ooc_moe_wire.errors import Internal, InvalidRequest, error_named
from ooc_moe_wire.v1 import expert_pb2

_Message = expert_pb2.FetchExpertsResponse | ChunkView


class StreamedCall:
    """One call on the stream plane that fetches experts: FetchExperts of gRPC. `PlaneCall` documents the methods."""

    def __init__(
        self,
        connection: Connection,
        pending: PendingExperts,
        request: expert_pb2.FetchExpertsRequest,
        *,
        timeout_s: float,
        verify: bool,
    ) -> None:
        self._connection = connection
        self._pending = pending
        self._verify = verify
        # As the generated stub's method, but chunks come as views.
        fetch_experts: grpc.UnaryStreamMultiCallable[expert_pb2.FetchExpertsRequest, _Message] = connection.channel.unary_stream(
            "/ooc_moe_wire.v1.ExpertService/FetchExperts",
            request_serializer=expert_pb2.FetchExpertsRequest.SerializeToString,
            response_deserializer=decode_fetch_response,
        )
        self._responses: Responses[_Message] = fetch_experts(request, timeout=timeout_s, metadata=connection.metadata)

    def next(self) -> tuple[Fetched] | None:
        """Waits for the next expert, and returns it. None: all experts have come. Contract: `PlaneCall.next`.

        Raises Internal when the daemon ends the call while experts are missing.
        """
        with self._connection.translated_errors():
            while self._pending.experts:
                message = next(self._responses, None)
                self._connection.note_alive()
                if message is None:
                    raise Internal(f"bank {self._pending.bank!r}: the call ended without {len(self._pending.experts)} of the experts")
                if isinstance(message, ChunkView):
                    raise Internal(f"bank {self._pending.bank!r}: a chunk without a header")
                if (fetched := self._receive(message.header)) is not None:
                    return (fetched,)
        self.cancel()  # All have come: the end of the call is not waited for.
        return None

    def cancel(self) -> None:
        """Ends the call. Contract: `PlaneCall.cancel`."""
        self._responses.cancel()

    def _receive(self, header: expert_pb2.ExpertHeader) -> Fetched | None:
        """Receives the bytes of the expert that a header announces, and checks them. None: the expert failed."""
        self._pending.check_wanted(header.expert)
        if header.HasField("error"):
            self._pending.fail(header.expert, error_named(header.error.kind, header.error.message))
            return None
        if not header.unchanged:
            received = self._receive_body(header)
            expected = Checksums(header.parameter_xxh3, header.optimizer_xxh3)
            if received is not None and not self._pending.is_sound(header.expert, received, expected):
                return None
        return self._pending.arrive(header.expert, header.version, header.served_from, unchanged=header.unchanged)

    def _receive_body(self, header: expert_pb2.ExpertHeader) -> Checksums | None:
        """Receives the chunks of an expert into the caller's memory. Returns their checksums, or None when the call does not verify."""
        layout, what = self._pending.layout, self._pending.what(header.expert)
        optimizer_bytes = layout.optimizer_bytes if self._pending.sections is Sections.ALL else 0
        if (header.parameter_bytes, header.optimizer_bytes) != (layout.parameter_bytes, optimizer_bytes):
            raise InvalidRequest(
                f"{what}: sections of {header.parameter_bytes} and {header.optimizer_bytes} bytes, "
                f"the layout has {layout.parameter_bytes} and {optimizer_bytes}"
            )
        memory = self._pending.memory_for(header.expert)
        hashing = HashingAssembler(memory, parameter_bytes=layout.parameter_bytes, what=what) if self._verify else None
        assembler = hashing or Assembler(memory, what=what)
        while not assembler.complete:
            message = next(self._responses, None)
            if message is None:
                raise Internal(f"{what}: the stream ended in the middle")
            assembler.add(message if isinstance(message, ChunkView) else message.chunk)
        return hashing.checksums if hashing else None

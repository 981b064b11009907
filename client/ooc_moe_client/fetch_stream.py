"""One fetch over gRPC: a stream of headers and chunks, verified expert by expert, and opened again for the rest when it breaks.

Knows nothing of retries: `next` fails once, and may be called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from ooc_moe_client.checks import check_memory
from ooc_moe_client.connection import Connection, Responses
from ooc_moe_client.store import Fetched, Priority, Sections, Tier
from ooc_moe_wire.codec import HOLDS_NONE, Assembler, Checksums, verify
from ooc_moe_wire.errors import CorruptRecord, Internal, InvalidRequest, OocMoeError, error_named
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.v1 import expert_pb2, expert_pb2_grpc

# A stream's deadline allows for the slowest disk and network worth using.
SLOWEST_BYTES_PER_S = 10 << 20


class FetchStream:
    """The experts of one call that have not come yet."""

    def __init__(
        self,
        connection: Connection,
        stub: expert_pb2_grpc.ExpertServiceStub,
        bank: str,
        layout: Layout,
        experts: Sequence[int],
        *,
        into: Callable[[int], memoryview],
        sections: Sections,
        priority: Priority,
        known_versions: Sequence[int | None] | None,
    ) -> None:
        self._connection = connection
        self._stub = stub
        self._bank = bank
        self._layout = layout
        self._into = into
        self._sections = sections
        self._priority = priority
        self._left = dict(zip(experts, known_versions or [None] * len(experts), strict=True))
        self._has_known = known_versions is not None
        self._call: Responses[expert_pb2.FetchExpertsResponse] | None = None
        self.error: OocMoeError | None = None  # the first expert's that could not be served

    def next(self) -> Fetched | None:
        """The next sound expert, or None when all have come or failed (see `error`)."""
        try:
            while self._left:
                with self._connection.errors():
                    fetched = self._receive()
                if fetched is not None:
                    return fetched
        except BaseException:
            self.cancel()
            raise
        return None

    def cancel(self) -> None:
        """Ends the stream; `next` would open another."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _open(self) -> Responses[expert_pb2.FetchExpertsResponse]:
        num_bytes = len(self._left) * self._layout.body_bytes
        known = [HOLDS_NONE if version is None else version for version in self._left.values()] if self._has_known else []
        return self._stub.FetchExperts(
            expert_pb2.FetchExpertsRequest(
                bank=self._bank,
                experts=list(self._left),
                sections=cast(expert_pb2.Sections.ValueType, self._sections.value),
                known_versions=known,
                priority=cast(expert_pb2.Priority.ValueType, self._priority.value),
            ),
            timeout=self._connection.timeout_s + num_bytes / SLOWEST_BYTES_PER_S,
            metadata=self._connection.metadata,
        )

    def _receive(self) -> Fetched | None:
        """One expert; None when it could not be served."""
        if self._call is None:
            self._call = self._open()
        header = self._message(self._call).header
        self._connection.answered()
        what = f"bank {self._bank!r}, expert {header.expert}"
        if header.expert not in self._left:
            raise Internal(f"{what}: it was not asked for, or came twice")
        if header.HasField("error"):
            self._fail(header.expert, error_named(header.error.kind, header.error.message))
            return None
        if not header.unchanged:
            body = self._receive_body(header, self._call, what)
            try:
                verify(self._layout, body, Checksums(header.parameter_xxh3, header.optimizer_xxh3), what=what)
            except CorruptRecord as error:
                self._fail(header.expert, error)
                return None
        del self._left[header.expert]
        return Fetched(expert=header.expert, version=header.version, served_from=Tier(header.served_from), unchanged=header.unchanged)

    def _receive_body(self, header: expert_pb2.ExpertHeader, call: Iterator[expert_pb2.FetchExpertsResponse], what: str) -> memoryview:
        optimizer_bytes = self._layout.optimizer_bytes if self._sections is Sections.ALL else 0
        if (header.parameter_bytes, header.optimizer_bytes) != (self._layout.parameter_bytes, optimizer_bytes):
            raise InvalidRequest(
                f"{what}: sections of {header.parameter_bytes} and {header.optimizer_bytes} bytes, "
                f"the layout has {self._layout.parameter_bytes} and {optimizer_bytes}"
            )
        body = self._into(header.expert)
        check_memory(self._bank, header.expert, body, header.parameter_bytes + header.optimizer_bytes)
        assembler = Assembler(body, what=what)
        while not assembler.complete:
            assembler.add(self._message(call).chunk)
        return body

    def _message(self, call: Iterator[expert_pb2.FetchExpertsResponse]) -> expert_pb2.FetchExpertsResponse:
        message = next(call, None)
        if message is None:
            raise Internal(f"bank {self._bank!r}: the stream ended without {len(self._left)} of the experts")
        return message

    def _fail(self, expert: int, error: OocMoeError) -> None:
        self.error = self.error or error
        del self._left[expert]

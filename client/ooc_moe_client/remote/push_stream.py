"""`BankWriter`: holds the right to write one bank, by an open gRPC stream to the daemon, and sends pushes on that stream.

Three kinds of threads work on a `BankWriter`:

    callers' threads       push(): queue items, wait for their outcomes
    the writer's thread    opens the stream, reads outcomes; when the stream breaks, opens another
    gRPC's thread          takes requests from `_requests`, as fast as flow control allows

When a stream breaks, pushes that the daemon has not acknowledged are sent again on the next stream, under their old numbers, so that the
daemon recognises repeats. Bodies (the bytes of experts) stay in the callers' memory. On the local plane (shared memory) the bodies are
copied to staging memory, from which the daemon reads them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import grpc
import numpy as np
from tenacity import RetryCallState

from ooc_moe_client.local.plane import LocalPlane
from ooc_moe_client.local.staging import Staging
from ooc_moe_client.remote.connection import Connection
from ooc_moe_client.remote.plane_choice import PlaneChoice
from ooc_moe_client.store import Durability
from ooc_moe_wire.codec import Checksums, copy_hashed, encoded_chunks
from ooc_moe_wire.errors import LeaseExpired, OocMoeError, Unavailable, error_named
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.v1 import expert_pb2

# A message, or the bytes of a serialized one.
_Request = expert_pb2.PushExpertsRequest | bytes


def _serialize(request: _Request) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


@dataclass(slots=True, kw_only=True, eq=False)
class PendingPush:
    """One expert to push, and, when the daemon has answered, the outcome: the new version or an error."""

    expert: int
    base_version: int
    body: memoryview
    layout: Layout
    durability: Durability = Durability.DURABLE
    checksums: Checksums | None = None  # computed when it is first sent
    number: int = 0
    outcome: int | OocMoeError | None = None
    staged: tuple[Staging, int] | None = None  # its place in staging memory, until the outcome

    def header(self) -> expert_pb2.PushHeader:
        """Makes the message that announces this push to the daemon, before the chunks of its body. Computes the checksums if necessary."""
        if self.checksums is None:
            self.checksums = Checksums.of(self.layout, self.body)
        return expert_pb2.PushHeader(
            expert=self.expert,
            push_number=self.number,
            base_version=self.base_version,
            parameter_bytes=self.layout.parameter_bytes,
            optimizer_bytes=self.layout.optimizer_bytes,
            parameter_xxh3=self.checksums.parameters,
            optimizer_xxh3=self.checksums.optimizer,
            durability=cast(expert_pb2.Durability.ValueType, self.durability.value),
            staged_at=self.staged[1] if self.staged is not None else None,
        )

    def unstage(self) -> None:
        """Frees the place of this push's body in staging memory, if it has one."""
        if self.staged is not None:
            staging, start = self.staged
            self.staged = None
            staging.free(start)


class BankWriter:
    """Holds the right to write one bank, and pushes experts to it, in a background thread that starts at once.

    When that thread fails to open the bank or loses the right for good, `push` and `wait_until_open` raise its error. The threads share one
    queue under one lock (`_changed`), which is why this is one class.

    Args:
        connection: the connection to the daemon.
        planes: chooses how bodies (the bytes of experts) travel.
        bank: the bank's name.
        writer_id: the store's identity, the same for all its banks and streams.
        numbers: gives the number of each push; all banks of a store share one count.
    """

    def __init__(self, connection: Connection, planes: PlaneChoice, bank: str, writer_id: str, numbers: Iterator[int]) -> None:
        self._connection = connection
        self._planes = planes
        # As the generated stub's method, but chunks are serialized already.
        self._push_experts: grpc.StreamStreamMultiCallable[_Request, expert_pb2.PushExpertsResponse] = connection.channel.stream_stream(
            "/ooc_moe_wire.v1.ExpertService/PushExperts",
            request_serializer=_serialize,
            response_deserializer=expert_pb2.PushExpertsResponse.FromString,
        )
        self._bank = bank
        self._writer_id = writer_id
        self._numbers = numbers
        self._changed = threading.Condition()
        self._unacknowledged: dict[int, PendingPush] = {}  # by number
        self._unsent: deque[PendingPush] = deque()  # of these, those that the present stream has not begun to send
        self._stream = 0  # the number of the present stream; request generators of older ones end
        self._call: grpc.Call | None = None
        self._plane: LocalPlane | None = None  # that the present stream uses
        self._is_open = False
        self._releasing = False
        self._error: OocMoeError | None = None  # why the writer ended
        self._progress_at = time.monotonic()
        self._broken_at: float | None = None  # when the first stream since the last outcome broke
        self._thread = threading.Thread(target=self._run, name=f"push {bank}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether this writer has given up or released the bank. To write again, make a new writer."""
        return self._error is not None or self._releasing

    def wait_until_open(self) -> None:
        """Waits until the daemon has granted the right to write the bank. Raises NotTheWriter, UnknownBank, Unavailable."""
        with self._changed:
            while not self._is_open:
                if self._error is not None:
                    raise self._error
                self._wait()

    def push(self, items: Sequence[PendingPush]) -> None:
        """Sends pushes, and returns when each has its `outcome`. Also waits while an earlier push of the same expert is running.

        Raises:
            The error that ended the writer. Pushes without an outcome may or may not have been written.
        """
        with self._changed:
            for item in items:
                while self._error is None and any(item.expert == other.expert for other in self._unacknowledged.values()):
                    self._wait()  # At most one push per expert is in flight.
                if self._error is not None:
                    break
                item.number = next(self._numbers)
                self._unacknowledged[item.number] = item
                self._unsent.append(item)
                self._changed.notify_all()
            self._progress_at = time.monotonic()
            while any(item.outcome is None for item in items):
                if self._error is not None:
                    raise self._error
                self._wait()

    def release(self) -> None:
        """Gives up the right to write the bank, after all queued pushes.

        Returns when the daemon has confirmed that, or the deadline is over.
        """
        with self._changed:
            self._releasing = True
            self._changed.notify_all()
        self._thread.join(self._connection.timeout_s)
        if self._thread.is_alive() and self._call is not None:
            self._call.cancel()
            self._thread.join()

    def _wait(self) -> None:
        """Waits for a change of the shared state. If the daemon was silent for `timeout_s`, ends the stream; another will be opened."""
        self._changed.wait(self._connection.timeout_s)
        if time.monotonic() - self._progress_at >= self._connection.timeout_s and self._call is not None:
            self._call.cancel()

    # The writer's thread

    def _run(self) -> None:
        try:
            self._connection.retrying(self._gives_up)(self._hold_stream)
            error: OocMoeError = Unavailable(f"bank {self._bank!r}: the writer was released")
        except OocMoeError as raised:
            error = raised
        except Exception as raised:  # The channel was closed meanwhile.
            error = Unavailable(f"bank {self._bank!r}: {raised}")
        with self._changed:
            self._error = error
            for item in self._unacknowledged.values():
                item.unstage()
            self._changed.notify_all()

    def _gives_up(self, state: RetryCallState) -> bool:
        assert self._broken_at is not None
        if self._releasing or self._connection.closed:
            return True
        if time.monotonic() - self._broken_at < self._connection.patience_s:
            return False
        self._connection.note_give_up()
        return True

    def _hold_stream(self) -> None:
        """Opens one stream, and reads its responses to the end.

        Returns when the writer was released. Raises Unavailable when the stream broke.
        """
        with self._changed:
            self._unsent = deque(self._unacknowledged.values())
        try:
            self._plane = self._planes.local()
            with self._connection.translated_errors():
                self._call = call = self._push_experts(self._requests(self._stream, self._plane), metadata=self._connection.metadata)
                for response in call:
                    self._receive(response)
            if not self._releasing:
                raise Unavailable(f"daemon at {self._connection.target}: the push stream of bank {self._bank!r} ended")
        except LeaseExpired as error:
            if self._plane is not None:
                self._planes.drop(self._plane)
            raise Unavailable(f"daemon at {self._connection.target}: {error}") from error
        finally:
            if self._call is not None:
                self._call.cancel()
            with self._changed:
                self._stream += 1
                self._is_open = False
                self._broken_at = self._broken_at or time.monotonic()
                self._changed.notify_all()
            if self._plane is not None:
                self._plane.wake()

    def _receive(self, response: expert_pb2.PushExpertsResponse) -> None:
        with self._changed:
            self._progress_at = time.monotonic()
            if response.HasField("opened"):
                self._is_open = True
                self._connection.note_alive()
            else:
                outcome = response.outcome
                error = error_named(outcome.error.kind, outcome.error.message) if outcome.HasField("error") else None
                if isinstance(error, LeaseExpired):  # The session is gone: the push is to be sent again on another stream.
                    raise error
                item = self._unacknowledged.pop(outcome.push_number, None)
                if item is not None:
                    item.unstage()
                    item.outcome = error or outcome.version
                self._broken_at = None
            if not self._unacknowledged:
                self._broken_at = None
            self._changed.notify_all()

    # gRPC's thread

    def _requests(self, stream: int, plane: LocalPlane | None) -> Iterator[_Request]:
        session = 0 if plane is None else plane.session
        yield expert_pb2.PushExpertsRequest(open=expert_pb2.PushOpen(bank=self._bank, writer_id=self._writer_id, local_session=session))
        while (item := self._next_unsent(stream)) is not None:
            is_staged = self._stage(item, stream, plane)
            yield expert_pb2.PushExpertsRequest(header=item.header())
            if is_staged:  # `item.staged` may be None again: the outcome may be here.
                continue
            for chunk in encoded_chunks(item.body, field=expert_pb2.PushExpertsRequest.CHUNK_FIELD_NUMBER):
                if stream != self._stream:
                    return
                yield chunk
                self._progress_at = time.monotonic()

    def _stage(self, item: PendingPush, stream: int, plane: LocalPlane | None) -> bool:
        """Copies the body of a push to the staging memory of the plane, unless it is there already.

        Returns False when the body must be sent in chunks instead: there is no staging memory, it is too small, or the stream has ended.
        """
        staging = None if plane is None else plane.staging_for(len(item.body))
        with self._changed:
            if stream == self._stream and item.staged is not None and item.staged[0] is not staging:
                item.unstage()  # It is staged in the memory of an older session.
            if staging is None or item.staged is not None:
                return staging is not None
        start = staging.allocate(len(item.body), wanted=lambda: stream == self._stream and plane is not None and plane.is_alive)
        if start is None:
            return False
        checksums = copy_hashed(np.frombuffer(item.body, np.uint8), staging.bytes_at(start), item.layout.parameter_bytes)
        with self._changed:
            self._progress_at = time.monotonic()
            if stream != self._stream:
                staging.free(start)
                return False
            item.checksums, item.staged = checksums, (staging, start)
            return True

    def _next_unsent(self, stream: int) -> PendingPush | None:
        """Waits for a push to send on the stream of this number, and returns it. None: the stream is to end."""
        with self._changed:
            while stream == self._stream and not (self._is_open and self._unsent):
                if self._releasing and not self._unacknowledged:
                    return None
                self._changed.wait()
            return self._unsent.popleft() if stream == self._stream else None

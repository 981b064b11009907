"""`Fetch`: the work behind `RemoteStore.fetch`. When a call to the daemon breaks, `Fetch` opens another call for the missing experts.

A call runs on one of two planes (ways for bytes to travel), the stream plane or the local plane:

    Fetch            opens calls, one after the other, until every expert came or failed
      StreamedCall   one call on the stream plane: headers and chunks in gRPC messages
      LeasedCall     one call on the local plane: leases on the daemon's DRAM tier, copied from shared memory
      PendingExperts which experts have not come yet, where their bytes go, and the checks of an expert that has come

`Fetch` does not retry by itself: when a call breaks, `next` raises the error. To continue, call `next` again, which opens the next call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ooc_moe_client.local.plane import LocalPlane
from ooc_moe_client.remote.connection import Connection
from ooc_moe_client.remote.leased_call import LeasedCall
from ooc_moe_client.remote.pending_experts import PendingExperts
from ooc_moe_client.remote.plane_choice import PlaneChoice
from ooc_moe_client.remote.streamed_call import StreamedCall
from ooc_moe_client.store import Fetched
from ooc_moe_wire.errors import Unavailable
from ooc_moe_wire.local import FETCHED_MAX
from ooc_moe_wire.v1 import local_pb2

# A call's deadline allows for the slowest disk and network worth using.
SLOWEST_BYTES_PER_S = 10 << 20
# After this many leased calls with experts that were overwritten before they were copied (by a caller that stood still for longer than a
# lease lasts), the rest is fetched on the stream plane.
OVERWRITTEN_CALLS_MAX = 3


class PlaneCall(Protocol):
    """The interface of one call to the daemon that fetches experts: by gRPC messages (`StreamedCall`) or shared memory (`LeasedCall`)."""

    def next(self) -> Iterable[Fetched] | None:
        """Waits for the next experts of the call, and returns them as an iterable. None: the call has ended.

        The bytes of an expert are complete when the iterable yields it. The caller must iterate to the end before it calls this again.
        """

    def cancel(self) -> None:
        """Ends the call. Does nothing if it has ended."""


class Fetch:
    """Receives the experts of one `RemoteStore.fetch`, by one or more calls to the daemon, one after the other.

    Args:
        connection: the connection to the daemon.
        planes: chooses for each call how bytes travel: in gRPC messages or through shared memory.
        pending: the experts to fetch.
        verify: whether to check the checksums of what arrives.
    """

    def __init__(self, connection: Connection, planes: PlaneChoice, pending: PendingExperts, *, verify: bool) -> None:
        self._connection = connection
        self._planes = planes
        self._pending = pending
        self._verify = verify
        self._call: PlaneCall | None = None
        self._num_overwritten_calls = 0

    def next(self) -> Iterable[Fetched] | None:
        """Waits for the next experts, and returns them as `PlaneCall.next` does. None: every expert has come or failed.

        The error of a failed expert is in `PendingExperts.error`.
        """
        try:
            while self._pending.experts or self._call is not None:
                if self._call is None:
                    self._call = self._open()
                fetched = self._call.next()
                if fetched is not None:
                    return fetched
                self._num_overwritten_calls += isinstance(self._call, LeasedCall) and self._call.num_overwritten > 0
                self._call = None
        except BaseException:
            self.cancel()
            raise
        return None

    def cancel(self) -> None:
        """Ends the running call. `next` would open another call for the experts that are missing."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _open(self) -> PlaneCall:
        plane = self._planes.local() if self._num_overwritten_calls < OVERWRITTEN_CALLS_MAX else None
        if plane is not None:
            return self._open_leased(plane)
        request = self._pending.request()
        return StreamedCall(self._connection, self._pending, request, timeout_s=self._timeout_s(len(request.experts)), verify=self._verify)

    def _open_leased(self, plane: LocalPlane) -> LeasedCall:
        request = self._pending.request(FETCHED_MAX)
        fetch = local_pb2.LocalFetch(trainer=self._connection.trainer, request=request)
        try:
            call = plane.fetch(fetch, timeout_s=self._timeout_s(len(request.experts)))
        except Unavailable as error:  # The plane has no session to spare, or is gone.
            self._planes.drop(plane)
            raise self._connection.with_address(error) from error
        return LeasedCall(self._connection, call, self._pending, list(request.experts), verify=self._verify)

    def _timeout_s(self, num_experts: int) -> float:
        return self._connection.timeout_s + num_experts * self._pending.layout.body_bytes / SLOWEST_BYTES_PER_S

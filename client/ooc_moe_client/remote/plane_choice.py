"""`PlaneChoice`: chooses for each call how bytes travel, in gRPC messages (stream plane) or through shared memory (local plane).

It opens the local plane where that is possible, and opens the plane again after it broke.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import grpc

from ooc_moe_client.local.plane import LocalPlane
from ooc_moe_client.remote.connection import Connection
from ooc_moe_client.store import Plane
from ooc_moe_wire.errors import Internal, InvalidRequest, Unavailable
from ooc_moe_wire.v1 import local_pb2, local_pb2_grpc

log = logging.getLogger(__name__)

# After a refusal, streams are used for this long before the daemon, which may be another one by then, is asked again.
REFUSED_S = 30.0


class PlaneChoice:
    """Chooses between the local plane (shared memory) and the stream plane (gRPC) for the calls of one connection. Thread-safe.

    Args:
        connection: the connection to the daemon.
        wanted: the plane that the user asked for. AUTO: the local plane where possible, else the stream plane.
        clock: returns the time in seconds; it never goes back.
    """

    def __init__(self, connection: Connection, wanted: Plane, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._wanted = wanted
        self._clock = clock
        self._stub = local_pb2_grpc.LocalServiceStub(connection.channel)
        self._lock = threading.Lock()
        self._local: LocalPlane | None = None
        self._asks_again_at = 0.0
        self._refusal = ""  # the last one, which is logged once

    def local(self) -> LocalPlane | None:
        """Returns the local plane (shared memory), after opening it if necessary. None: use the stream plane (gRPC messages).

        Raises:
            InvalidRequest: the user asked for the local plane, and it is impossible.
            Unavailable: the daemon does not answer.
        """
        if self._wanted is Plane.STREAM:
            return None
        with self._lock:
            if self._local is not None and not self._local.is_alive:
                self._drop()
            if self._local is None and not self._connection.closed and self._clock() >= self._asks_again_at:
                self._open()
            return self._local

    def drop(self, plane: LocalPlane) -> None:
        """Closes this local plane, because the daemon no longer knows its session. The next call of `local` opens another."""
        with self._lock:
            if self._local is plane:
                self._drop()

    def close(self) -> None:
        """Closes the local plane, if it is open."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._local is not None:
            self._local.close()
            self._local = None

    def _open(self) -> None:
        try:
            self._local = self._connect()
        except InvalidRequest as refusal:
            if self._wanted is Plane.LOCAL:
                raise
            self._asks_again_at = self._clock() + REFUSED_S
            if str(refusal) != self._refusal:
                self._refusal = str(refusal)
                log.info("%s; streams are used", refusal)

    def _connect(self) -> LocalPlane:
        """Opens the local plane. Raises InvalidRequest, with the daemon's address and the reason, when that is impossible."""
        failed_name, reason = "", ""
        while True:
            name = self._socket_name()
            if name == failed_name:  # The daemon is alive and names the same socket: it is on another host, or refuses this user.
                raise InvalidRequest(f"plane: no local plane with the daemon at {self._connection.target}: {reason}")
            try:
                return LocalPlane.connect(name)
            except Unavailable as error:
                failed_name, reason = name, str(error)
            except InvalidRequest as error:
                raise InvalidRequest(f"plane: no local plane with the daemon at {self._connection.target}: {error}") from error

    def _socket_name(self) -> str:
        try:
            name = self._connection.call_once(self._stub.GetLocalPlane, local_pb2.GetLocalPlaneRequest()).socket
        except Internal as error:
            call = error.__cause__
            if not isinstance(call, grpc.Call) or call.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            name = ""  # The daemon is older than the local plane.
        if not name:
            raise InvalidRequest(f"plane: the daemon at {self._connection.target} has no local plane")
        return name

"""`LocalSession`: one connection, a Unix socket, to a daemon's local plane (shared memory). Fetches request leases through this connection.

A lease is the right to read a record in the daemon's memory; it expires. The session lasts as long as the socket: when either side closes
it, or dies, the daemon drops the session's leases.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from ooc_moe_client.local.arena_view import ArenaView
from ooc_moe_wire.errors import DeadlineExceeded, Internal, InvalidRequest, TierFull, Unavailable, error_named
from ooc_moe_wire.local import ACK, PACKET_BYTES_MAX, RELEASES_MAX, Welcome, pack_fetch, pack_release, pack_stage
from ooc_moe_wire.v1 import local_pb2

# A daemon that does not answer on the socket for this long counts as gone.
PATIENCE_S = 2.0

_PEER = struct.Struct("3i")  # pid, uid, gid
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds


class LocalSession:
    """One connection to the local plane (shared memory) of a daemon: sends one fetch at a time, and gives leases back.

    `release` and `is_alive` may be called from any thread.
    """

    def __init__(self, connected: socket.socket, number: int) -> None:
        """Wraps a connected socket. `number` is the daemon's number for the session. Use `connect` instead."""
        self.number = number
        self._socket = connected
        self._broken = False

    @staticmethod
    def connect(name: str) -> tuple[LocalSession, ArenaView]:
        """Opens a session through the Unix socket of that abstract name. Returns the session and the daemon's memory, mapped for reading.

        Raises:
            Unavailable: nobody listens on the socket (the daemon is on another host, or just ended), or the daemon refuses this user.
            InvalidRequest: the listener belongs to another user, speaks another protocol, or sends memory that could shrink.
        """
        fds: list[int] = []
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _limit(connected, PATIENCE_S)
            connected.connect(f"\0{name}")
            _check_peer(connected)
            packet, fds, _, _ = socket.recv_fds(connected, PACKET_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
            if not packet:
                raise Unavailable("local plane: the daemon refuses this user")
            welcome = Welcome.unpack(packet)
            if len(fds) != 2:
                raise InvalidRequest(f"local plane: the welcome came with {len(fds)} descriptors, not 2")
            return LocalSession(connected, welcome.session), ArenaView(fds[0], fds[1], welcome.arena_bytes)
        except OSError as error:
            connected.close()
            raise Unavailable(f"local plane: {error.strerror or error}") from error
        except BaseException:
            connected.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def is_alive(self) -> bool:
        """Whether the session is still open: neither side has ended it."""
        if self._broken:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True  # Nothing to read: all is well.
        except OSError:
            return False

    def send_fetch(self, fetch: local_pb2.LocalFetch) -> None:
        """Sends a fetch to the daemon. Then call `receive` for the answers, until it returns None. Raises Unavailable."""
        try:
            self._socket.send(pack_fetch(fetch), socket.MSG_NOSIGNAL)
        except OSError as error:
            self._broken = True
            raise Unavailable(f"local plane: {error.strerror or error}") from error

    def receive(self, deadline: float) -> local_pb2.LocalAnswer | None:
        """Waits for the next answer to the fetch, and returns it; None at the end. `deadline` is a time of `time.monotonic()`.

        Raises:
            Unavailable, DeadlineExceeded: the session is over, and so are its leases.
            Any other error: the daemon refused or ended the fetch. The session stays open.
        """
        try:
            _limit(self._socket, deadline - time.monotonic())
            packet = self._socket.recv(PACKET_BYTES_MAX)
            if not packet:
                raise Unavailable("local plane: the daemon ended the session")
            answer = local_pb2.LocalAnswer.FromString(packet)
        except BlockingIOError as error:
            raise DeadlineExceeded("local plane: no answer in time") from error
        except OSError as error:
            raise Unavailable(f"local plane: {error.strerror or error}") from error
        except DecodeError as error:
            raise Internal(f"local plane: an answer that cannot be decoded: {error}") from error
        if answer.WhichOneof("answer") != "end":
            return answer
        if not answer.end.HasField("error"):
            return None
        refusal = error_named(answer.end.error.kind, answer.end.error.message)
        if isinstance(refusal, TierFull):
            refusal.retry_after_ms = answer.end.retry_after_ms
        raise refusal

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back to the daemon. Never raises: when the daemon is gone, the leases are gone too. `leases`: the ids."""
        for start in range(0, len(leases), RELEASES_MAX):
            packet = pack_release(leases[start : start + RELEASES_MAX])
            try:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
            except OSError:
                self._broken = True

    def stage(self, fd: int, num_bytes: int) -> bool:
        """Sends the file descriptor of staging memory (for pushes) to the daemon, which maps it. Returns whether the daemon accepts it.

        If the daemon refuses the memory, the session is over.
        """
        try:
            _limit(self._socket, PATIENCE_S)
            socket.send_fds(self._socket, [pack_stage(num_bytes)], [fd], socket.MSG_NOSIGNAL)
            if self._socket.recv(PACKET_BYTES_MAX) == ACK:
                return True
        except OSError:
            pass
        self._broken = True  # Without the expected answer the daemon's view of the session is unknown.
        return False

    def close(self) -> None:
        """Closes the socket, which ends the session and all its leases."""
        self._broken = True
        self._socket.close()


def _limit(connected: socket.socket, seconds: float) -> None:
    """Limits how long sends and receives on the socket may wait, to `seconds`.

    It sets socket options, and not `settimeout`, which would add a system call (poll) to each packet, even under MSG_DONTWAIT.
    """
    limit = _TIMEVAL.pack(*divmod(max(1, round(seconds * 1e6)), 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, limit)


def _check_peer(connected: socket.socket) -> None:
    """Raises InvalidRequest unless the process that listens on the socket belongs to this user or to root.

    The name alone proves nothing: any process may listen on an abstract socket of any name.
    """
    _, uid, _ = _PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if os.getuid() != 0 and uid not in (0, os.getuid()):
        raise InvalidRequest(f"local plane: the socket belongs to user {uid}, not {os.getuid()}")

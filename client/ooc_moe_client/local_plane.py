"""The local plane of one daemon: its DRAM tier mapped here for reading, the socket whose life is the session's, and the staging of pushes.

What is copied from the arena is known to be whole only when its generation, looked at before and after, is the lease's: `copy` and
`copy_hashed` say so. The mappings live on when the daemon dies, or the plane is closed under a copy: nothing is unmapped under a reader.
Knows nothing of calls, banks or versions.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ooc_moe_client.staging import Staging
from ooc_moe_wire.codec import Checksums, copy_hashed
from ooc_moe_wire.errors import InvalidRequest, Unavailable
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.local import ACK, PACKET_BYTES_MAX, RELEASES_MAX, Welcome, pack_release, pack_stage

# A daemon whose loop does not get to the socket for so long is as good as gone.
PATIENCE_S = 2
# The size of the staging memory: for so many records, within these bounds (daemons take no more).
STAGED_RECORDS = 4
STAGING_BYTES_MIN, STAGING_BYTES_MAX = 64 << 20, 1 << 30

Bytes = NDArray[np.uint8]
_PEER = struct.Struct("3i")  # pid, uid, gid


class LocalPlane:
    """One session. Safe to use from several threads; after `close`, or when the daemon ended it, `is_alive` is False."""

    def __init__(self, connected: socket.socket, session: int, arena: mmap.mmap, generations: mmap.mmap) -> None:
        """As `connect` makes it."""
        self.session = session
        self._socket = connected
        self._arena: Bytes = np.frombuffer(arena, np.uint8)
        self._generations = memoryview(generations).cast("Q")
        self._broken = False
        self._staging_lock = threading.Lock()
        self._staging: Staging | None = None

    @staticmethod
    def connect(name: str) -> LocalPlane:
        """Begins a session through the socket of that abstract name.

        Raises:
            Unavailable: nobody listens there (another host, or a daemon that just ended), or it refuses this user.
            InvalidRequest: who listens is another user, speaks another protocol, or sends memory that could shrink.
        """
        fds: list[int] = []
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Not settimeout: it would make every packet wait in poll first, and flags could not forbid it.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", PATIENCE_S, 0))
            connected.connect(f"\0{name}")
            _check_peer(connected)
            packet, fds, _, _ = socket.recv_fds(connected, PACKET_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
            if not packet:
                raise Unavailable("local plane: the daemon refuses this user")
            welcome = Welcome.unpack(packet)
            if len(fds) != 2:
                raise InvalidRequest(f"local plane: the welcome came with {len(fds)} descriptors, not 2")
            arena = _map(fds[0], welcome.arena_bytes)
            generations = _map(fds[1], welcome.arena_bytes // BLOCK_BYTES * 8)
            return LocalPlane(connected, welcome.session, arena, generations)
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
        """The daemon has not ended the session."""
        if self._broken:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True  # Nothing to read: all is well.
        except OSError:
            return False

    # Reading. Processors other than x86 may reorder the loads of the copy and of the generation; the checksum then catches a torn copy.

    def copy(self, offset: int, generation: int, into: memoryview) -> bool:
        """Copies a record's bytes from its body's `offset` on, as many as fit; False when they may have been overwritten meanwhile."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return False
        np.copyto(np.frombuffer(into, np.uint8), self._arena[offset : offset + len(into)])
        return generations[block] == generation

    def copy_hashed(self, offset: int, generation: int, into: memoryview, parameter_bytes: int) -> Checksums | None:
        """As `copy`, with the checksums of the copy; None where it says False."""
        generations, block = self._generations, offset // BLOCK_BYTES - 1
        if generation % 2 or generations[block] != generation:
            return None
        checksums = copy_hashed(self._arena[offset : offset + len(into)], np.frombuffer(into, np.uint8), parameter_bytes)
        return checksums if generations[block] == generation else None

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back. Never raises: where the daemon is gone, so are the leases."""
        for start in range(0, len(leases), RELEASES_MAX):
            packet = pack_release(leases[start : start + RELEASES_MAX])
            try:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
            except OSError:
                self._broken = True

    # Writing

    def staging_for(self, num_bytes: int) -> Staging | None:
        """The memory that bodies of so many bytes are pushed from; None when they do not fit, or the daemon wants none."""
        with self._staging_lock:
            if self._staging is None:
                wanted = max(STAGING_BYTES_MIN, STAGED_RECORDS * num_bytes)
                self._staging = self._make_staging(min(wanted, STAGING_BYTES_MAX))
            return self._staging if self._staging is not None and num_bytes <= self._staging.num_bytes else None

    def _make_staging(self, num_bytes: int) -> Staging | None:
        if self._broken:
            return None
        try:
            staging = Staging(num_bytes)
            socket.send_fds(self._socket, [pack_stage(num_bytes)], [staging.fd], socket.MSG_NOSIGNAL)
            if self._socket.recv(PACKET_BYTES_MAX) == ACK:
                return staging
        except OSError:
            pass
        self._broken = True  # It did not answer, or something else: what it thinks of the session is unknown.
        return None

    def wake(self) -> None:
        """Lets those that wait for staging memory ask whether they still want it."""
        with self._staging_lock:
            if self._staging is not None:
                self._staging.wake()

    def close(self) -> None:
        """Ends the session. The memory goes when its last reader is done."""
        self._broken = True
        self._socket.close()
        self.wake()


def _check_peer(connected: socket.socket) -> None:
    """Names of abstract sockets are anyone's to take: bytes are taken from our own user's daemon, or root's, only."""
    _, uid, _ = _PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if os.getuid() != 0 and uid not in (0, os.getuid()):
        raise InvalidRequest(f"local plane: the socket belongs to user {uid}, not {os.getuid()}")


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    """The daemon's memory, for reading. Raises InvalidRequest when it is too short, or could become so under a reader (SIGBUS)."""
    seals = 0
    with suppress(OSError):
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < num_bytes:
        raise InvalidRequest(f"local plane: the daemon's memory is not {num_bytes} bytes, sealed against shrinking")
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

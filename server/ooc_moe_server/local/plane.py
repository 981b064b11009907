"""The daemon's side of the local plane: callers on this host read and push experts through shared memory (contract: v1/local.proto).

A caller reads records in the arena, the shared memory of the DRAM tier. To push a record, a caller stages it: puts its bytes into other
memory that the caller shares with the daemon.

    connect -> check the peer's user -> welcome, with descriptors -> fetches, releases, staging memory -> close

A lease lets a caller read a record in the arena: until it expires or is released, the record is not evicted. When the socket closes, the
session's leases and staging memory are dropped. To be used on the event loop only; no call blocks.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import NamedTuple

from ooc_moe_server.dram.arena import Arena
from ooc_moe_server.dram.tier import DramTier, Entry
from ooc_moe_wire import local as packets
from ooc_moe_wire.errors import InvalidRequest, LeaseExpired, OocMoeError, TierFull
from ooc_moe_wire.local import ACK, LEASE_S, PACKET_BYTES_MAX, Welcome
from ooc_moe_wire.v1 import local_pb2

log = logging.getLogger(__name__)

SESSIONS_MAX = 512
STAGING_BYTES_MAX = 1 << 30
# The parts of the arena that leases may pin: those of one session, and all together. One record is always allowed.
SESSION_SHARE, TOTAL_SHARE = 1 / 2, 3 / 4
_SWEEP_S = 1.0
_ACCEPT_AGAIN_S = 1.0  # The delay after the process had no descriptor left for a new connection.
_DESCRIPTORS_MAX = 4  # The most that are received with a packet. More than one is an error; receiving them allows to close them.
# Serves a fetch of a session: sends LocalAnswer messages, the last one with `end`. Never raises.
Serve = Callable[["Session", local_pb2.LocalFetch], Awaitable[None]]
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def peer_uid(connection: socket.socket) -> int:
    """Returns the user id of the process at the other end of a Unix socket, as the kernel reports it."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


class LocalPlane:
    """Lets callers on this host read the DRAM tier's shared memory: listens on a Unix socket, and keeps a `Session` for each connection.

    `socket_name` is the socket's name in the abstract namespace, without the leading zero byte.
    """

    def __init__(
        self,
        arena: Arena,
        dram: DramTier,
        serve: Serve,
        *,
        patience_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        uid_of: Callable[[socket.socket], int] = peer_uid,
    ) -> None:
        """Listens on the running event loop until `close`.

        Args:
            arena: The shared memory of the DRAM tier, whose descriptors every caller gets.
            dram: The DRAM tier, in which leases pin records.
            serve: Answers one fetch of a session; called for each fetch.
            patience_s: How long a fetch waits for leases to end before it gets TierFull.
            clock: The time in seconds, by which leases expire.
            uid_of: Returns the user id of a connected caller.
        """
        self.socket_name = f"ooc-moe-{secrets.token_hex(16)}"
        self.dram, self.serve, self.clock, self.patience_s = dram, serve, clock, patience_s
        self.session_bytes_max, self.total_bytes_max = int(arena.num_bytes * SESSION_SHARE), int(arena.num_bytes * TOTAL_SHARE)
        self.leased_bytes = 0
        self.freed = asyncio.Event()  # Set whenever a lease or a session ends.
        self._arena_bytes, self._uid_of = arena.num_bytes, uid_of
        self._sessions: dict[int, Session] = {}
        self._loop = asyncio.get_running_loop()
        self._descriptors = (_reopened(arena.fd), _reopened(arena.generations_fd))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(f"\0{self.socket_name}")
        self._listener.listen(128)
        self._listen()
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)

    @property
    def num_sessions(self) -> int:
        """The number of sessions (connections) that are open. A caller may have several."""
        return len(self._sessions)

    def session(self, number: int) -> Session:
        """Returns the open session with this number. Raises LeaseExpired when there is no such session."""
        if number not in self._sessions:
            raise LeaseExpired(f"local_session: {number:#x} is not, or no longer, a session of this daemon")
        return self._sessions[number]

    def expire(self) -> None:
        """Ends the leases that have expired, in all sessions, so that their records may be evicted."""
        now = self.clock()
        for session in self._sessions.values():
            session.expire(now)

    def close(self) -> None:
        """Stops listening, and closes every session, which ends the leases of the session."""
        self._sweeping.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for session in list(self._sessions.values()):
            self._end(session)
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _sweep(self) -> None:
        self.expire()
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # Out of descriptors. The connection stays in the queue, and would wake the loop again at once.
            log.warning("local plane: cannot accept: %s", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_AGAIN_S, self._listen)
            return
        connection.setblocking(False)
        try:
            self._welcome(connection)
        except (OSError, OocMoeError) as error:
            log.warning("local plane: a caller is refused: %s", error)
            connection.close()

    def _welcome(self, connection: socket.socket) -> None:
        """Opens a session for a new connection, and sends it the descriptors of the arena.

        Raises OocMoeError when the caller is refused, and OSError when the connection is closed already.
        """
        if (uid := self._uid_of(connection)) != os.geteuid():
            raise InvalidRequest(f"its user is {uid}, the daemon's user is {os.geteuid()}")
        if len(self._sessions) >= SESSIONS_MAX:
            raise TierFull(f"{SESSIONS_MAX} sessions are open")
        number = secrets.randbelow((1 << 64) - 1) + 1
        socket.send_fds(connection, [Welcome(session=number, arena_bytes=self._arena_bytes).pack()], self._descriptors)
        session = self._sessions[number] = Session(self, number, connection)
        self._loop.add_reader(connection, self._receive, session)

    def _receive(self, session: Session) -> None:
        try:
            is_open = session.receive()
        except BlockingIOError:
            return
        except (OSError, OocMoeError) as error:
            log.warning("local plane: session %#x is closed: %s", session.number, error)
            is_open = False
        if not is_open:
            self._end(session)

    def _end(self, session: Session) -> None:
        del self._sessions[session.number]
        self._loop.remove_reader(session.connection)
        session.close()
        self.freed.set()


class _Lease(NamedTuple):
    entry: Entry
    expires_at: float | None  # By the plane's clock; None: pinned until it is released.


class Session:
    """One connection of a caller on this host, with its leases and its staging memory. Only `LocalPlane` makes sessions.

    A lease is the right to read a record in the arena. Staging memory is the caller's shared memory, in which it puts records to push.
    """

    def __init__(self, plane: LocalPlane, number: int, connection: socket.socket) -> None:
        self.number, self.connection = number, connection
        self.leased_bytes = 0
        self.closed = False
        self._plane = plane
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 1
        self._staging: mmap.mmap | None = None
        self._fetching: asyncio.Future[None] | None = None

    async def room(self, record_bytes: int) -> int:
        """Waits until the session may lease at least one record of `record_bytes`, and returns how many it may lease now.

        Raises:
            TierFull: not enough earlier leases ended in time.
            LeaseExpired: the session was closed.
        """
        plane = self._plane
        deadline = asyncio.get_running_loop().time() + plane.patience_s
        while (number := self._room(record_bytes)) < 1:
            plane.freed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await plane.freed.wait()
            except TimeoutError:
                raise TierFull(
                    f"leases: this session holds {self.leased_bytes} of at most {plane.session_bytes_max} bytes, "
                    f"all sessions {plane.leased_bytes} of at most {plane.total_bytes_max}"
                ) from None
        return number

    def lease(self, entries: Sequence[Entry], *, pinned: bool) -> range:
        """Makes a lease of each record in `entries`, and returns the leases' ids.

        The caller must have pinned each entry (so that it cannot be evicted). The lease takes over this pin, and undoes it when the lease
        ends. `pinned`: the leases last until they are released, instead of expiring.
        """
        assert not self.closed
        ids = range(self._next_lease, self._next_lease + len(entries))
        expires_at = None if pinned else self._plane.clock() + LEASE_S
        self._leases.update(zip(ids, [_Lease(entry, expires_at) for entry in entries], strict=True))
        self._next_lease = ids.stop
        self._account(sum(entry.extent.size for entry in entries))
        return ids

    def expire(self, now: float) -> None:
        """Ends the leases of this session that expire at the time `now` or before."""
        self._release([each for each, lease in self._leases.items() if lease.expires_at is not None and lease.expires_at <= now])

    def staging(self, offset: int, size: int) -> memoryview:
        """Returns a readable view of `size` bytes at `offset` of the memory in which the caller stages records.

        The memory stays mapped as long as the view exists, even if the session is closed. Raises InvalidRequest, LeaseExpired.
        """
        if self.closed:
            raise LeaseExpired(f"local_session: {self.number:#x} is closed")
        num_bytes = 0 if self._staging is None else len(self._staging)
        if self._staging is None or offset + size > num_bytes:
            raise InvalidRequest(f"staged_at: {size} bytes at {offset} are beyond the session's {num_bytes} bytes of staging memory")
        return memoryview(self._staging)[offset : offset + size]

    def receive(self) -> bool:
        """Receives one packet from the caller and acts on it. Returns False when the caller has closed the socket.

        A packet announces staging memory, releases leases, or asks for a fetch.

        Raises:
            InvalidRequest: the packet is malformed, or asks for a fetch while another is under way.
            OSError: the socket failed.
        """
        packet, descriptors, flags, _ = socket.recv_fds(self.connection, PACKET_BYTES_MAX, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC)
        try:
            if not packet:
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise InvalidRequest(f"a packet of more than {PACKET_BYTES_MAX} bytes or {_DESCRIPTORS_MAX} descriptors")
            message = packets.unpack(packet)
            if len(descriptors) != (1 if isinstance(message, int) else 0):
                raise InvalidRequest(f"{len(descriptors)} descriptors came with a packet of {len(packet)} bytes")
            if isinstance(message, int):
                self._staging = _mapped(descriptors[0], message)
                self.connection.send(ACK)
            elif isinstance(message, tuple):
                self._release(message)
            elif self._fetching is None:
                self._fetching = asyncio.ensure_future(self._plane.serve(self, message))
                self._fetching.add_done_callback(self._fetched)
            else:
                raise InvalidRequest("a fetch was sent before the end of the last one")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    async def send(self, answer: local_pb2.LocalAnswer) -> None:
        """Sends one answer to the caller. Waits while the socket's buffer is full. Raises LeaseExpired when the session was closed."""
        if not self.closed:
            try:
                await asyncio.get_running_loop().sock_sendall(self.connection, answer.SerializeToString())
            except OSError as error:
                raise LeaseExpired(f"local_session: {self.number:#x}: {error.strerror}") from error
        if self.closed:
            raise LeaseExpired(f"local_session: {self.number:#x} was closed")

    def close(self) -> None:
        """Closes the connection: cancels its fetch, ends its leases, and drops its staging memory.

        The staging memory stays mapped while a view of it exists, so that a copy from it under way can be finished.
        """
        self.closed = True
        if self._fetching:
            self._fetching.cancel()
        asyncio.get_running_loop().remove_writer(self.connection)
        self.connection.close()
        self._release(list(self._leases))
        self._staging = None

    def _fetched(self, _: asyncio.Future[None]) -> None:
        self._fetching = None

    def _room(self, record_bytes: int) -> int:
        """Returns how many records of `record_bytes` may be leased now; may be 0 or less.

        Raises LeaseExpired when the session was closed.
        """
        if self.closed:
            raise LeaseExpired(f"local_session: {self.number:#x} was closed")
        of_session = max((self._plane.session_bytes_max - self.leased_bytes) // record_bytes, not self._leases)
        return min(of_session, max((self._plane.total_bytes_max - self._plane.leased_bytes) // record_bytes, not self._plane.leased_bytes))

    def _release(self, ids: Collection[int]) -> None:
        """Ends the leases with these ids, so that their records may be evicted.

        Ids of leases that ended before or never existed are ignored.
        """
        ended = [lease.entry for each in ids if (lease := self._leases.pop(each, None)) is not None]
        if not ended:
            return
        for entry in ended:
            self._plane.dram.unpin(entry)
        self._account(-sum(entry.extent.size for entry in ended))
        self._plane.freed.set()

    def _account(self, num_bytes: int) -> None:
        self.leased_bytes += num_bytes
        self._plane.leased_bytes += num_bytes


def _reopened(descriptor: int) -> int:
    """Returns a new, read-only descriptor of the memory behind `descriptor`, to be sent to callers."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # No /proc here.
        return os.dup(descriptor)


def _mapped(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Maps the memory in which a caller stages records, for reading.

    Raises:
        InvalidRequest: the caller could shrink the memory, or it has huge pages, which can run out. To read a missing page would kill the
            daemon.
    """
    if not 1 <= num_bytes <= STAGING_BYTES_MAX:
        raise InvalidRequest(f"staging memory of {num_bytes} bytes; 1 to {STAGING_BYTES_MAX} are allowed")
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        size, page_bytes = os.fstat(descriptor).st_size, os.fstatvfs(descriptor).f_bsize
        if seals & _SEALS != _SEALS or size != num_bytes or page_bytes != mmap.PAGESIZE:
            raise InvalidRequest(f"staging memory of {size} bytes (announced: {num_bytes}), seals {seals:#x}, pages of {page_bytes} bytes")
        return mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise InvalidRequest(f"staging memory cannot be mapped: {error.strerror}") from error

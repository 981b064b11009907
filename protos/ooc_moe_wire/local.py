"""Builds and parses the packets of the local plane: the exchange of experts through shared memory, between client and daemon on one host.

The packets travel through a Unix socket, and only say where in the shared memory an expert's bytes are. v1/local.proto is the
specification, and says how the shared memory is read safely.

    daemon -> caller   Welcome, with the descriptors of the arena and of the generation table     on connecting
    caller -> daemon   stage(num_bytes), with the descriptor of a staging memfd                   answered by ACK
    caller -> daemon   fetch(LocalFetch)                                                          answered by LocalAnswers
    caller -> daemon   release(lease ids)                                                         not answered

The socket is of type SOCK_SEQPACKET: each send is one packet.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.v1 import local_pb2

PROTOCOL = 2
ACK = b"\x06"
PACKET_BYTES_MAX = 64 << 10
RELEASES_MAX = 4096  # Lease ids in one packet.
FETCHED_MAX = 2048  # Experts in one fetch; with their known versions they fit into a packet.
LEASE_S = 10.0  # How long a lease without a pin lasts.
# fcntl.F_SEAL_FUTURE_WRITE, which Python 3.11 does not name. It forbids new writable mappings and write(); earlier mappings stay writable.
F_SEAL_FUTURE_WRITE = 0x10

_MAGIC = b"OOCLOCAL"
_WELCOME = struct.Struct("<8sIQQ")
_STAGE, _RELEASE, _FETCH = b"S", b"R", b"F"
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The daemon's first packet on a new connection: the number of the session, and the size of the shared memory that comes with it."""

    session: int  # For FetchExpertsRequest and PushOpen; never zero.
    arena_bytes: int

    def pack(self) -> bytes:
        """Converts the welcome to the bytes of a packet."""
        return _WELCOME.pack(_MAGIC, PROTOCOL, self.session, self.arena_bytes)

    @staticmethod
    def unpack(packet: bytes) -> Welcome:
        """Parses a welcome packet. Raises InvalidRequest when the packet is no welcome, or has another protocol version."""
        if len(packet) != _WELCOME.size or packet[:8] != _MAGIC:
            raise InvalidRequest(f"local plane: a first packet of {len(packet)} bytes is no welcome")
        _, protocol, session, arena_bytes = _WELCOME.unpack(packet)
        if protocol != PROTOCOL:
            raise InvalidRequest(f"local plane: the daemon speaks protocol {protocol}, not {PROTOCOL}")
        return Welcome(session=session, arena_bytes=arena_bytes)


def pack_release(leases: Sequence[int]) -> bytes:
    """Makes the packet that gives leases (rights to read experts in shared memory) back to the daemon: at most RELEASES_MAX lease ids."""
    return _RELEASE + struct.pack(f"<{len(leases)}Q", *leases)


def pack_stage(num_bytes: int) -> bytes:
    """Makes the packet that announces staging memory of `num_bytes`, through which the client will push experts.

    Send it together with the memory's file descriptor.
    """
    return _STAGE + _SIZE.pack(num_bytes)


def pack_fetch(fetch: local_pb2.LocalFetch) -> bytes:
    """Makes the packet that asks the daemon for leases (rights to read in shared memory) on the experts of a fetch."""
    return _FETCH + fetch.SerializeToString()


def unpack(packet: bytes) -> tuple[int, ...] | int | local_pb2.LocalFetch:
    """Parses a packet from a client. The type of the result tells which packet it is.

    A tuple: the ids of leases that are given back. An int: the size of new staging memory. A LocalFetch: a fetch.

    Raises:
        InvalidRequest: the packet is none of these.
    """
    kind, rest = packet[:1], packet[1:]
    if kind == _RELEASE and len(rest) % 8 == 0 and len(rest) <= 8 * RELEASES_MAX:
        return struct.unpack(f"<{len(rest) // 8}Q", rest)
    if kind == _STAGE and len(rest) == _SIZE.size:
        return int(_SIZE.unpack(rest)[0])
    if kind == _FETCH:
        try:
            return local_pb2.LocalFetch.FromString(rest)
        except DecodeError as error:
            raise InvalidRequest(f"local plane: a fetch that cannot be decoded: {error}") from error
    raise InvalidRequest(f"local plane: a packet of {len(packet)} bytes that begins with {kind!r}")

"""As stranger.py, through the daemon's shared memory: a client of the local plane that knows nothing but the comments of local.proto.

Run: python tests/wire/stranger_on_the_host.py 127.0.0.1:50051     (on the daemon's host; makes and deletes a bank called "stranger")
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import sys
from typing import Any

import grpc
import numpy as np
from stranger import BANK, TIMEOUT_S, Daemon, checksum, initial_body, place, tensor_of


class Session:
    """A connection to the socket of the local plane, with the memory that the daemon sent."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        name = daemon.call("LocalService", "GetLocalPlane").socket
        assert name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(f"\0{name}")
        welcome, (arena, table), _, _ = socket.recv_fds(self.socket, 65536, 2)
        magic, protocol, self.number, arena_bytes = struct.unpack("<8sIQQ", welcome)
        assert (magic, protocol) == (b"OOCLOCAL", 2)
        self.arena = mmap.mmap(arena, arena_bytes, prot=mmap.PROT_READ)
        self.table = np.frombuffer(mmap.mmap(table, arena_bytes // 4096 * 8, prot=mmap.PROT_READ), "<u8")

    def fetch(self, **request: Any) -> dict[int, tuple[int, bytes]]:
        """The version and the body of each expert, checked. The leases are released."""
        body_bytes = len(initial_body(BANK, 0))
        split = place(BANK["parameters"])[1]
        experts, used = {}, []
        asked = self.daemon.message("LocalFetch", trainer="stranger", request=request)
        self.socket.send(b"F" + asked.SerializeToString())
        while True:
            answer = self.daemon.message("LocalAnswer")
            answer.ParseFromString(self.socket.recv(65536))
            if answer.WhichOneof("answer") == "end":
                assert not answer.end.HasField("error"), answer
                break
            for lease, expert, version, offset, generation, parameters, optimizer in zip(
                *(getattr(answer.leases, column) for column in ("ids", "experts", "versions", "offsets", "generations")),
                answer.leases.parameter_xxh3,
                answer.leases.optimizer_xxh3,
                strict=True,
            ):
                before = self.table[offset // 4096 - 1]
                body = self.arena[offset : offset + body_bytes]
                assert before == self.table[offset // 4096 - 1] == generation
                assert generation % 2 == 0
                assert (checksum(body[:split]), checksum(body[split:])) == (parameters, optimizer)
                experts[expert] = version, body
                used.append(lease)
        self.socket.send(b"R" + struct.pack(f"<{len(used)}Q", *used))
        return experts

    def stage(self, num_bytes: int) -> mmap.mmap:
        """Memory that pushes are staged in."""
        memory = os.memfd_create("staging", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, num_bytes)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        socket.send_fds(self.socket, [b"S" + struct.pack("<Q", num_bytes)], [memory])
        assert self.socket.recv(65536) == b"\x06"
        return mmap.mmap(memory, num_bytes)

    def push(self, expert: int, base_version: int, body: bytes, offset: int) -> Any:
        """Pushes a body that is staged at an offset. Returns the outcome."""
        split = place(BANK["parameters"])[1]
        header = {
            "expert": expert,
            "push_number": 1,
            "base_version": base_version,
            "parameter_bytes": split,
            "optimizer_bytes": len(body) - split,
            "parameter_xxh3": checksum(body[:split]),
            "optimizer_xxh3": checksum(body[split:]),
            "staged_at": offset,
        }
        opening = {"bank": BANK["name"], "writer_id": "stranger on the host", "local_session": self.number}
        requests = [self.daemon.message("PushExpertsRequest", open=opening), self.daemon.message("PushExpertsRequest", header=header)]
        _, response = self.daemon.method("ExpertService", "PushExperts")(iter(requests), timeout=TIMEOUT_S)
        return response.outcome


def main(target: str) -> None:
    """Reads experts that nobody wrote from shared memory, pushes one from staging memory, and reads it back."""
    with grpc.insecure_channel(target) as channel:
        daemon = Daemon(channel)
        daemon.call("BankService", "CreateBank", spec=BANK)
        session = Session(daemon)
        fetched = session.fetch(bank=BANK["name"], experts=[0, 3])
        assert fetched == {expert: (0, bytes(initial_body(BANK, expert))) for expert in (0, 3)}

        trained = initial_body(BANK, 3)
        tensor_of(trained, BANK, "w")[0, 0] = 1.5
        offset = 4096
        session.stage(1 << 22)[offset : offset + len(trained)] = bytes(trained)
        outcome = session.push(3, 0, bytes(trained), offset)
        assert session.fetch(bank=BANK["name"], experts=[3]) == {3: (outcome.version, bytes(trained))}
        daemon.call("BankService", "DeleteBank", bank=BANK["name"])
    print("all as specified")


if __name__ == "__main__":
    main(sys.argv[1])

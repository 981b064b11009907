"""Daemons that answer as a test's script says: over gRPC, or over the local plane (shared memory) with an arena that the test fills."""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np

from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_wire.codec import Checksums, chunks
from ooc_moe_wire.errors import STATUS, InvalidRequest, OocMoeError, trailing_metadata
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.local import ACK, PACKET_BYTES_MAX, Welcome, unpack
from ooc_moe_wire.v1 import bank_pb2, bank_pb2_grpc, expert_pb2, expert_pb2_grpc, local_pb2, local_pb2_grpc
from tests.client.conftest import LAYOUT, body, spec


class ScriptedDaemon(bank_pb2_grpc.BankServiceServicer, expert_pb2_grpc.ExpertServiceServicer, local_pb2_grpc.LocalServiceServicer):
    """A gRPC daemon of one bank that answers fetches and pushes as a test's scripts say.

    `fetch_scripts` and `push_scripts` have one script for each call; the last one also answers all later calls. `socket_name` is the name
    of its local plane's socket: "" if it has none, None if it does not know the call that asks for it.
    """

    def __init__(self, socket_name: str | None = None) -> None:
        self.socket_name = socket_name
        self.num_asked = 0  # for the local plane
        self.sessions: list[int] = []  # by stream of either kind
        self.headers: list[expert_pb2.PushHeader] = []
        self.num_chunks = 0
        self.fetches: list[list[int]] = []
        self.pushes: list[list[tuple[int, int]]] = []  # by stream: (expert, push number)
        self.fetch_scripts: list[Callable[[list[int], grpc.ServicerContext], Iterator[expert_pb2.FetchExpertsResponse]]] = []
        self.push_scripts: list[Callable[[Iterator[expert_pb2.PushExpertsRequest]], Iterator[expert_pb2.PushExpertsResponse]]] = []
        self.listed = expert_pb2.ExpertInfo()
        self.list_errors = 0  # answers of ListExperts to come that are errors
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        bank_pb2_grpc.add_BankServiceServicer_to_server(self, self._server)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self, self._server)
        if socket_name is not None:
            local_pb2_grpc.add_LocalServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def GetBank(self, request, context):
        return bank_pb2.Bank(spec=spec(request.bank).to_proto())

    def GetLocalPlane(self, request, context):
        self.num_asked += 1
        return local_pb2.LocalPlane(socket=self.socket_name)

    def FetchExperts(self, request, context):
        yield from self.fetch(request, context, session=0)

    def fetch(self, request, context, *, session: int):
        """Answers a fetch with the next script, over gRPC (`session` 0) or over the local plane (`session`: its number)."""
        self.fetches.append(list(request.experts))
        self.sessions.append(session)
        script = self.fetch_scripts.pop(0) if len(self.fetch_scripts) > 1 else self.fetch_scripts[0]
        yield from script(list(request.experts), context)

    def PushExperts(self, requests, context):
        self.pushes.append([])
        yield expert_pb2.PushExpertsResponse(opened=expert_pb2.PushOpened())
        requests = iter(requests)
        self.sessions.append(next(requests).open.local_session)
        script = self.push_scripts.pop(0) if len(self.push_scripts) > 1 else self.push_scripts[0]
        yield from script(self._headers(requests), context)

    def _headers(self, requests):
        for request in requests:
            self.num_chunks += request.HasField("chunk")
            if request.HasField("header"):
                self.headers.append(request.header)
                self.pushes[-1].append((request.header.expert, request.header.push_number))
                yield request.header

    def ListExperts(self, request, context):
        if self.list_errors:
            self.list_errors -= 1
            abort(context, InvalidRequest("as the test wants"))
        return expert_pb2.ListExpertsResponse(experts=[self.listed])

    def stop(self) -> None:
        self._server.stop(None).wait()


def served(expert: int, *, damaged: bool = False) -> Iterator[expert_pb2.FetchExpertsResponse]:
    """Yields the messages that answer a fetch of one expert. If `damaged`, its bytes do not match its checksums."""
    checksums = Checksums.of(LAYOUT, memoryview(body(float(expert))))
    header = expert_pb2.ExpertHeader(
        expert=expert,
        version=expert + 1,
        served_from=expert_pb2.TIER_NVME,
        parameter_bytes=LAYOUT.parameter_bytes,
        optimizer_bytes=LAYOUT.optimizer_bytes,
        parameter_xxh3=checksums.parameters,
        optimizer_xxh3=checksums.optimizer,
    )
    yield expert_pb2.FetchExpertsResponse(header=header)
    sent = body(float(expert))
    sent[-1] ^= damaged
    for chunk in chunks(memoryview(sent)):
        yield expert_pb2.FetchExpertsResponse(chunk=chunk)


def abort(context: grpc.ServicerContext | None, error: OocMoeError) -> None:
    """Ends a script with an error. `context` is None in a fetch over the local plane, and then the error is raised."""
    if context is None:
        raise error
    context.set_trailing_metadata(trailing_metadata(error))
    context.abort(STATUS[type(error)], str(error))


def fetch_into(bodies: dict[int, bytearray], store: RemoteStore, experts: list[int]):
    return store.fetch("b", experts, into=lambda expert: memoryview(bodies.setdefault(expert, bytearray(LAYOUT.body_bytes))))


def acknowledge(headers, context):
    for header in headers:
        outcome = expert_pb2.PushOutcome(expert=header.expert, push_number=header.push_number, version=100 + header.push_number)
        yield expert_pb2.PushExpertsResponse(outcome=outcome)


def sealed(num_bytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class ScriptedArena:
    """The daemon's end of the local plane: an arena with room for `num_records`, and a socket that remembers what clients sent.

    Expert `e` lies in the arena's `e`th place once `put` was called. Fetches are answered by the scripts of `daemon`.
    """

    daemon: ScriptedDaemon

    def __init__(self, num_records: int = 8, *, seals: int = fcntl.F_SEAL_SHRINK, welcome: bytes | None = None) -> None:
        self.released: list[int] = []
        self.staged: list[mmap.mmap] = []  # by session that sent some
        self.sessions: list[int] = []
        self.num_ended = 0  # of these
        self._num_bytes = num_records * LAYOUT.record_bytes
        self._fds = [sealed(self._num_bytes, seals), sealed(self._num_bytes // BLOCK_BYTES * 8, seals)]
        self.bytes = np.frombuffer(mmap.mmap(self._fds[0], self._num_bytes), np.uint8)
        self.generations = np.frombuffer(mmap.mmap(self._fds[1], self._num_bytes // BLOCK_BYTES * 8), np.uint64)
        self.generations[:] = 1
        self._welcome = welcome
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self.name = f"ooc-moe-test-{os.urandom(8).hex()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def put(self, expert: int, value: float) -> None:
        """Overwrites an expert's place with a body of `value`, and changes the place's generation as the daemon does."""
        start = expert * LAYOUT.record_bytes
        self.generations[start // BLOCK_BYTES] |= np.uint64(1)
        self.bytes[start + BLOCK_BYTES : start + LAYOUT.record_bytes] = np.frombuffer(body(value), np.uint8)
        self.generations[start // BLOCK_BYTES] += np.uint64(1)

    def leases(self, experts: list[int], *, older: int = 0) -> local_pb2.LocalAnswer:
        """Returns the answer that lends the experts to the client. `older`: how far the leases' generations lag behind the present ones."""
        leases = local_pb2.Leases()
        for expert in experts:
            start = expert * LAYOUT.record_bytes
            checksums = Checksums.of(LAYOUT, memoryview(self.bytes)[start + BLOCK_BYTES : start + LAYOUT.record_bytes])
            leases.ids.append(next(self._ids))
            leases.experts.append(expert)
            leases.versions.append(expert + 1)
            leases.served_from.append(expert_pb2.TIER_DRAM)
            leases.offsets.append(start + BLOCK_BYTES)
            leases.generations.append(int(self.generations[start // BLOCK_BYTES]) - older)
            leases.parameter_xxh3.append(checksums.parameters)
            leases.optimizer_xxh3.append(checksums.optimizer)
        return local_pb2.LocalAnswer(leases=leases)

    def wait_released(self, leases: int) -> None:
        """Waits until clients have released at least `leases` leases."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.released) >= leases, timeout=30), f"only {self.released} came back"

    def wait_ended(self, sessions: int) -> None:
        """Waits until at least `sessions` sessions have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_ended >= sessions, timeout=30), f"only {self.num_ended} have ended"

    def hang_up(self) -> None:
        """Closes all connections, as when the daemon dies. Clients may connect again."""
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket, so that no client can connect any more, and all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for fd in self._fds:
            os.close(fd)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        session = 1000 + len(self.sessions)
        self.sessions.append(session)
        welcome = Welcome(session=session, arena_bytes=self._num_bytes).pack() if self._welcome is None else self._welcome
        with contextlib.suppress(OSError):
            connection.sendmsg([welcome], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))])
            while self._receive(connection, session):
                pass
        with self._changed:
            self.num_ended += 1
            self._changed.notify_all()

    def _receive(self, connection: socket.socket, session: int) -> bool:
        packet, fds, _, _ = socket.recv_fds(connection, PACKET_BYTES_MAX, 1)
        if not packet:
            return False
        told = unpack(packet)
        if isinstance(told, local_pb2.LocalFetch):
            end = local_pb2.LocalEnd()
            try:
                for answer in self.daemon.fetch(told.request, None, session=session):
                    connection.send(answer.SerializeToString())
            except OocMoeError as error:
                end.error.CopyFrom(expert_pb2.ErrorInfo(kind=type(error).__name__, message=str(error)))
            connection.send(local_pb2.LocalAnswer(end=end).SerializeToString())
            return True
        with self._changed:
            if isinstance(told, int):
                self.staged.append(mmap.mmap(fds[0], told, prot=mmap.PROT_READ))
                os.close(fds[0])
                connection.send(ACK)
            else:
                self.released += told
            self._changed.notify_all()
        return True

"""Clients made of plain gRPC stubs, without the code of `ooc_moe_client`, to talk to a real daemon."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from ooc_moe_wire.codec import Checksums, chunks
from ooc_moe_wire.errors import ERROR_KEY, STATUS, OocMoeError
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import (
    bank_pb2,
    bank_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
)

TIMEOUT_S = 30


def layout_of(floats: int = 32) -> Layout:
    """Returns a layout of one parameter tensor and one optimizer tensor, with `floats` numbers each."""
    parameters = (TensorSpec(name="w", shape=(floats,), initializer=Initializer("uniform_v1", 0.5)),)
    return Layout(parameters=parameters, optimizer=(TensorSpec(name="m", shape=(floats,)),))


@dataclass
class Got:
    """One expert as it was fetched: its header, and its bytes so far."""

    header: expert_pb2.ExpertHeader
    body: bytearray = field(default_factory=bytearray)


class PushStream:
    """A PushExperts stream on which a test sends every message itself."""

    def __init__(self, client: Client, bank: str, writer_id: str, *, open_it: bool = True) -> None:
        self._requests: queue.SimpleQueue[expert_pb2.PushExpertsRequest | None] = queue.SimpleQueue()
        self.call: Any = client.experts.PushExperts(iter(self._requests.get, None), metadata=client.metadata, timeout=TIMEOUT_S)
        self._client = client
        if open_it:
            self.send(open=expert_pb2.PushOpen(bank=bank, writer_id=writer_id))
            self.opened = next(self.call).opened

    def send(self, **message: Any) -> None:
        self._requests.put(expert_pb2.PushExpertsRequest(**message))

    def body(self, body: bytes) -> None:
        for chunk in chunks(memoryview(body)):
            self.send(chunk=chunk)

    def push(self, expert: int, body: bytes, *, base_version: int, push_number: int) -> expert_pb2.PushOutcome:
        self.send(header=self._client.push_header(expert, body, base_version=base_version, push_number=push_number))
        self.body(body)
        return self.outcome()

    def outcome(self) -> expert_pb2.PushOutcome:
        return next(self.call).outcome

    def close(self) -> None:
        """Ends the requests, and waits until the daemon ends the stream. Asserts that no answer is left unread."""
        self._requests.put(None)
        assert list(self.call) == []

    def hang_up(self) -> None:
        self.call.cancel()
        self._requests.put(None)


class Client:
    """A client of the daemon with the plain stubs of all four services on one channel, and short methods for the usual calls."""

    def __init__(self, target: str, *, trainer: str = "tester", layout: Layout | None = None) -> None:
        self.channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self.banks = bank_pb2_grpc.BankServiceStub(self.channel)
        self.experts = expert_pb2_grpc.ExpertServiceStub(self.channel)
        self.snapshots = snapshot_pb2_grpc.SnapshotServiceStub(self.channel)
        self.statistics = stats_pb2_grpc.StatsServiceStub(self.channel)
        self.metadata = (("ooc-moe-trainer", trainer),)
        self.layout = layout or layout_of()

    def call(self, method: Any, request: Any) -> Any:
        return method(request, timeout=TIMEOUT_S, metadata=self.metadata, wait_for_ready=True)

    def spec(self, name: str, num_experts: int = 8, seed: int = 1) -> BankSpec:
        return BankSpec(name=name, num_experts=num_experts, layout=self.layout, seed=seed)

    def create(self, name: str, num_experts: int = 8) -> bank_pb2.Bank:
        spec = self.spec(name, num_experts).to_proto()
        return self.call(self.banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec))

    def fetch(self, bank: str, experts: Sequence[int], **options: Any) -> dict[int, Got]:
        got: dict[int, Got] = {}
        for message in self.call(self.experts.FetchExperts, expert_pb2.FetchExpertsRequest(bank=bank, experts=experts, **options)):
            if message.HasField("header"):
                got[message.header.expert] = latest = Got(message.header)
            else:
                assert message.chunk.offset == len(latest.body)
                latest.body += message.chunk.payload
        return got

    def body(self, bank: str, expert: int) -> bytes:
        return bytes(self.fetch(bank, [expert])[expert].body)

    def seeded(self, expert: int, seed: int = 1) -> bytes:
        body = bytearray(self.layout.body_bytes)
        self.layout.initialize(body, seed=seed, expert=expert)
        return bytes(body)

    def stream(self, bank: str, writer_id: str = "writer", *, open_it: bool = True) -> PushStream:
        return PushStream(self, bank, writer_id, open_it=open_it)

    def put(self, bank: str, experts: dict[int, bytes], *, push_number: int = 1, writer_id: str = "writer") -> dict[int, int]:
        """Pushes new bodies (id -> body) over the experts' present versions; returns the new versions by id."""
        versions = {expert: got.header.version for expert, got in self.fetch(bank, list(experts)).items()}
        stream = self.stream(bank, writer_id)
        for expert, body in experts.items():
            outcome = stream.push(expert, body, base_version=versions[expert], push_number=push_number)
            assert not outcome.HasField("error"), outcome
            versions[expert] = outcome.version
        stream.close()
        return versions

    def random_body(self, number: int) -> bytes:
        """Returns random bytes as long as a body. The same `number` gives the same bytes."""
        return np.random.default_rng(number).bytes(self.layout.body_bytes)

    def push_header(self, expert: int, body: bytes, *, base_version: int = 0, push_number: int = 1) -> expert_pb2.PushHeader:
        sums = Checksums.of(self.layout, memoryview(body))
        return expert_pb2.PushHeader(
            expert=expert,
            push_number=push_number,
            base_version=base_version,
            parameter_bytes=self.layout.parameter_bytes,
            optimizer_bytes=self.layout.optimizer_bytes,
            parameter_xxh3=sums.parameters,
            optimizer_xxh3=sums.optimizer,
        )

    @contextmanager
    def refused(self, kind: type[OocMoeError], *words: str) -> Iterator[None]:
        """Asserts that the call inside the block fails with the status and name of the error `kind`, and with `words` in its message."""
        with pytest.raises(grpc.RpcError) as caught:
            yield
        call: Any = caught.value
        assert call.code() == STATUS[kind], call
        assert dict(call.trailing_metadata())[ERROR_KEY] == kind.__name__
        assert all(word in call.details() for word in words), call.details()

    def stats(self) -> stats_pb2.Stats:
        return self.call(self.statistics.GetStats, stats_pb2.GetStatsRequest())

    def snapshot(self, banks: Sequence[str], name: str = "") -> snapshot_pb2.Snapshot:
        return self.call(self.snapshots.CreateSnapshot, snapshot_pb2.CreateSnapshotRequest(banks=banks, name=name))


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """A function that makes clients of a daemon: `connect(target, ...)`. Their channels are closed at the end of the test."""
    clients: list[Client] = []

    def make(target: str, **options: Any) -> Client:
        clients.append(Client(target, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.channel.close()


@pytest.fixture
def client(shared_daemon: Any, connect: Callable[..., Client]) -> Client:
    """A new client of `shared_daemon`, the daemon that all tests of the module share."""
    return connect(shared_daemon.target)


@pytest.fixture
def bank(client: Client, request: pytest.FixtureRequest) -> str:
    """The name of a new bank of eight experts in the module's daemon; it is called after the test."""
    name = request.node.name[:100].translate(str.maketrans("[]", "..", " "))
    client.create(name)
    return name

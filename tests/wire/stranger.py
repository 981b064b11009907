"""A client that knows nothing but the comments of the .proto files: no generated code, no module of this project.

It gets the message types from the daemon by server reflection. For everything else it follows the rules of bank.proto and expert.proto.
Read it as the shortest complete client. Each check is an assert: the program ends with "all as specified", or with a traceback.

Run: python tests/wire/stranger.py 127.0.0.1:50051     (makes and deletes a bank called "stranger")
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import xxhash
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4", "uint8": "|u1"}
HOLDS_NONE = 2**64 - 1
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30

BANK = {
    "name": "stranger",
    "num_experts": 4,
    "seed": 2**63 + 7,
    "parameters": [
        {"name": "w", "shape": [2, 3], "dtype": "float32", "initializer": {"algorithm": "uniform_v1", "value": 0.1}},
        {"name": "b", "shape": [7], "dtype": "float16", "initializer": {"algorithm": "constant_v1", "value": 0.25}},
        {"name": "table", "shape": [2_500_000], "dtype": "uint8"},  # More than one chunk.
    ],
    "optimizer": [
        {"name": "w_m", "shape": [2, 3], "dtype": "float32", "initializer": {"algorithm": "uniform_v1", "value": 2.0}},
        {"name": "steps", "shape": [1], "dtype": "int64", "initializer": {"algorithm": "constant_v1", "value": 3}},
    ],
}


# The layout of a record (bank.proto, BankSpec).


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def place(tensors: list[dict[str, Any]]) -> tuple[list[int], int]:
    """The offset of each tensor in its section, and the bytes of the section."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(round_up(end, 64))
        end = offsets[-1] + math.prod(tensor["shape"]) * np.dtype(DTYPES[tensor["dtype"]]).itemsize
    return offsets, round_up(end, 4096)


def tensor_of(body: bytearray, spec: dict[str, Any], name: str) -> np.ndarray:
    """A writable view of one tensor of a body."""
    start = 0
    for section in ("parameters", "optimizer"):
        offsets, num_bytes = place(spec[section])
        for tensor, offset in zip(spec[section], offsets, strict=True):
            if tensor["name"] == name:
                count = math.prod(tensor["shape"])
                return np.frombuffer(body, DTYPES[tensor["dtype"]], count, start + offset).reshape(tensor["shape"])
        start += num_bytes
    raise KeyError(name)


def checksum(section: bytes | bytearray) -> int:
    return xxhash.xxh3_64_intdigest(bytes(section)) if section else 0


# Initial values (bank.proto, Initializer).


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x64-10."""
    word = 2**64
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2E7470EE14C6C93 * c0, word)
        hi1, lo1 = divmod(0xCA5A826395121157 * c2, word)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return c0, c1, c2, c3


def uniform_v1(count: int, value: float, *, seed: int, expert: int, tensor: int) -> np.ndarray:
    """The first `count` elements."""
    halves: list[int] = []
    for block in range(1, -(-count // 8) + 1):
        for word in philox((block, 0, 0, tensor), (seed, expert)):
            halves += [word % 2**32, word >> 32]
    unit = np.array([half >> 8 for half in halves[:count]], np.float32) * np.float32(2**-23) - np.float32(1)
    return unit * np.float32(value)


def initial_body(spec: dict[str, Any], expert: int) -> bytearray:
    """The body of an expert that was never written."""
    body = bytearray(place(spec["parameters"])[1] + place(spec["optimizer"])[1])
    for index, tensor in enumerate(spec["parameters"] + spec["optimizer"]):
        initializer = tensor.get("initializer", {"algorithm": "zeros_v1"})
        array = tensor_of(body, spec, tensor["name"])
        if initializer["algorithm"] == "uniform_v1":
            array.flat = uniform_v1(array.size, initializer["value"], seed=spec["seed"], expert=expert, tensor=index)
        elif initializer["algorithm"] == "constant_v1":
            array[...] = initializer["value"]
    return body


# Calls.


class Daemon:
    """The services of a daemon, described by the daemon itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def message(self, kind: str, /, **fields: Any) -> Any:
        """A message of the package."""
        described = self.pool.FindMessageTypeByName(f"ooc_moe_wire.v1.{kind}")
        return message_factory.GetMessageClass(described)(**fields)

    def method(self, service: str, name: str) -> Any:
        """A method, as gRPC calls it: unary or streaming as its descriptor says."""
        found = self.pool.FindServiceByName(f"ooc_moe_wire.v1.{service}").FindMethodByName(name)
        shape = f"{'stream' if found.client_streaming else 'unary'}_{'stream' if found.server_streaming else 'unary'}"
        return getattr(self.channel, shape)(
            f"/{found.containing_service.full_name}/{found.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )

    def call(self, service: str, name: str, /, **fields: Any) -> Any:
        """A call with one request."""
        request = self.message(f"{name}Request", **fields)
        return self.method(service, name)(request, timeout=TIMEOUT_S, metadata=[("ooc-moe-trainer", "stranger")])

    def refusal(self, service: str, name: str, /, **fields: Any) -> tuple[grpc.StatusCode, str] | None:
        """The status and the kind of error with which a call fails. None if it succeeds."""
        try:
            self.call(service, name, **fields)
        except grpc.RpcError as error:
            return error.code(), dict(error.trailing_metadata())["ooc-moe-error"]
        return None

    def fetch(self, **fields: Any) -> dict[int, tuple[Any, bytes]]:
        """The header and the body of each expert, checked."""
        experts: dict[int, tuple[Any, bytearray]] = {}
        for response in self.call("ExpertService", "FetchExperts", **fields):
            if response.WhichOneof("message") == "header":
                header, body = response.header, bytearray()
                experts[header.expert] = header, body
            else:
                assert response.chunk.offset == len(body)
                assert 1 <= len(response.chunk.payload) <= 2 << 20
                body += response.chunk.payload
        for header, body in experts.values():
            assert len(body) == header.parameter_bytes + header.optimizer_bytes
            assert checksum(body[: header.parameter_bytes]) == header.parameter_xxh3
            assert checksum(body[header.parameter_bytes :]) == header.optimizer_xxh3
        return {expert: (header, bytes(body)) for expert, (header, body) in experts.items()}

    def push(self, spec: dict[str, Any], writer_id: str, pushes: Iterable[tuple[int, int, int, bytes]]) -> dict[int, Any]:
        """Sends pushes, each (push number, expert, base version, body). Returns their outcomes by push number: they come in any order."""

        def requests() -> Iterator[Any]:
            yield self.message("PushExpertsRequest", open={"bank": spec["name"], "writer_id": writer_id})
            for push_number, expert, base_version, body in pushes:
                split = place(spec["parameters"])[1]
                header = {
                    "expert": expert,
                    "push_number": push_number,
                    "base_version": base_version,
                    "parameter_bytes": split,
                    "optimizer_bytes": len(body) - split,
                    "parameter_xxh3": checksum(body[:split]),
                    "optimizer_xxh3": checksum(body[split:]),
                }
                yield self.message("PushExpertsRequest", header=header)
                for offset in range(0, len(body), CHUNK_BYTES):
                    chunk = {"offset": offset, "payload": body[offset : offset + CHUNK_BYTES]}
                    yield self.message("PushExpertsRequest", chunk=chunk)

        opened, *responses = self.method("ExpertService", "PushExperts")(requests(), timeout=TIMEOUT_S)
        assert opened.WhichOneof("message") == "opened"
        return {response.outcome.push_number: response.outcome for response in responses}


def main(target: str) -> None:
    """Creates a bank, reads an expert that nobody wrote, changes it, reads it back, and is refused what must be refused."""
    with grpc.insecure_channel(target) as channel:
        daemon = Daemon(channel)
        bank = daemon.call("BankService", "CreateBank", spec=BANK)
        assert bank.record_bytes == 4096 + len(initial_body(BANK, 2))
        assert daemon.call("BankService", "CreateBank", spec=BANK) == bank  # Retry: yes.

        # An expert that was never written has its initial value, and version 0.
        header, body = daemon.fetch(bank=BANK["name"], experts=[2])[2]
        assert (header.version, header.served_from) == (0, 3)  # TIER_SEED
        assert body == initial_body(BANK, 2)
        header, parameters = daemon.fetch(bank=BANK["name"], experts=[2], sections=1)[2]  # SECTIONS_PARAMETERS
        assert parameters == body[: header.parameter_bytes]

        # A push makes a new version.
        writer_id = uuid.uuid4().hex
        trained = bytearray(body)
        tensor_of(trained, BANK, "w")[1, 2] += 1
        tensor_of(trained, BANK, "steps")[0] += 1
        outcome = daemon.push(BANK, writer_id, [(1, 2, 0, bytes(trained))])[1]
        assert outcome.durable
        assert outcome.version > 0
        header, read_back = daemon.fetch(bank=BANK["name"], experts=[2])[2]
        assert (header.version, read_back) == (outcome.version, bytes(trained))

        # What the caller holds already need not travel.
        known = [outcome.version, HOLDS_NONE]
        fetched = daemon.fetch(bank=BANK["name"], experts=[2, 0], known_versions=known)
        assert fetched[2][0].unchanged
        assert fetched[0][1] == initial_body(BANK, 0)

        # The same push again has the same outcome. A push from an older version is refused: the daemon
        # skips its chunks, and the stream goes on.
        repeated, stale, fresh = (1, 2, 0, bytes(trained)), (2, 2, 0, body), (3, 1, 0, bytes(initial_body(BANK, 1)))
        outcomes = daemon.push(BANK, writer_id, [repeated, stale, fresh])
        assert outcomes[1].version == outcome.version
        assert outcomes[2].error.kind == "StaleVersion"
        assert outcomes[3].version > outcome.version

        # A call that fails names its error.
        daemon.call("BankService", "DeleteBank", bank=BANK["name"])
        assert daemon.refusal("BankService", "GetBank", bank=BANK["name"]) == (grpc.StatusCode.NOT_FOUND, "UnknownBank")
    print("all as specified")


if __name__ == "__main__":
    main(sys.argv[1])

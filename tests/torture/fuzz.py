"""Malformed requests for every call of the daemon: random bytes, valid messages with wild values, and damaged messages.

`methods` reads every method of every service from the descriptors, so that a new call is tested too. A `Fuzzer` makes requests for a method
from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from ooc_moe_wire.v1 import bank_pb2, expert_pb2, local_pb2, snapshot_pb2, stats_pb2

FILES: tuple[FileDescriptor, ...] = tuple(each.DESCRIPTOR for each in (bank_pb2, expert_pb2, local_pb2, snapshot_pb2, stats_pb2))

_EDGES = (
    0,
    1,
    2,
    7,
    8,
    100,
    127,
    128,
    255,
    1000,
    1001,
    4096,
    65535,
    1 << 20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_NAMES = ("", "b", "c", "no such bank", "x" * 127, "x" * 129, "y" * 100_000, "ä/ö", "\0", "../../etc", "a/b", "snapshot-1", "\n", "b" * 128)
_DTYPES = ("float32", "float16", "int64", "int32", "uint8", "bfloat16", "float64", "object", "", ">f4", "float32,float32", "U8")
_ALGORITHMS = ("", "zeros_v1", "constant_v1", "uniform_v1", "uniform_v2")
_FLOATS = (0.0, -0.0, 0.5, -1.0, 1e38, float("nan"), float("inf"), float("-inf"), 1e-45)


@dataclass(frozen=True)
class Method:
    """One call of a gRPC service: its path, the type of its requests, and whether the client sends a stream of them."""

    path: str
    request: type[Message]
    client_streams: bool


def methods(files: Iterable[FileDescriptor] = FILES) -> list[Method]:
    """Returns every method of every service in `files`, sorted by path."""
    found = [
        Method(f"/{service.full_name}/{each.name}", GetMessageClass(each.input_type), each.client_streaming)
        for file in files
        for service in file.services_by_name.values()
        for each in service.methods
    ]
    return sorted(found, key=lambda method: method.path)


class Fuzzer:
    """Makes malformed and valid requests from random numbers. `banks`: the names of banks that exist, used in valid requests."""

    def __init__(self, random: random.Random, banks: Sequence[str] = ("b", "c")) -> None:
        self._random, self._banks = random, list(banks)
        self._wildness = 0.5  # The probability of an extreme value.

    def requests(self, method: Method) -> Iterator[bytes]:
        """Yields the serialized messages of one call: one message, or a few where the client sends a stream."""
        if not method.client_streams:
            yield self.request(method.request)
        elif self._random.random() < 0.3:
            for _ in range(self._random.randint(0, 5)):
                yield self.request(method.request)
        else:
            yield from self._pushes()

    def request(self, kind: type[Message]) -> bytes:
        """Returns one serialized message: random bytes, a well-formed message with wild values, or a damaged one."""
        match self._random.randrange(6):
            case 0:
                return self._random.randbytes(self._random.choice((0, 1, 2, 7, 40, 300, 5000)))
            case 1 | 2:
                return self._damaged(self.wild(kind).SerializeToString())
            case _:
                return self.wild(kind).SerializeToString()

    def wild(self, kind: type[Message]) -> Message:
        """Returns a message whose fields are plausible, extreme, or absent. In some messages every field is wild, in some none is."""
        self._wildness = self._random.choice((0.0, 0.1, 0.5, 1.0))
        message = kind()
        self._fill(message, message.DESCRIPTOR)
        return message

    def _is_wild(self) -> bool:
        return self._random.random() < self._wildness

    def _fill(self, message: Message, descriptor: Descriptor) -> None:
        for oneof in descriptor.oneofs:
            self._fill_field(message, self._random.choice(oneof.fields))
        for field in descriptor.fields:
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            if not is_map and not field.containing_oneof and not (self._is_wild() and self._random.random() < 0.3):
                self._fill_field(message, field)

    def _fill_field(self, message: Message, field: FieldDescriptor) -> None:
        if field.label == FieldDescriptor.LABEL_REPEATED:
            self._extend(getattr(message, field.name), field)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            self._fill(getattr(message, field.name), field.message_type)
        else:
            setattr(message, field.name, self._scalar(field))

    def _extend(self, values: Any, field: FieldDescriptor) -> None:
        if field.message_type is not None:
            for _ in range(self._random.choice((0, 1, 2, 8)) if self._is_wild() else 1):
                self._fill(values.add(), field.message_type)
        elif self._is_wild():
            values.extend(self._scalar(field) for _ in range(self._random.choice((0, 1, 2, 3, 8))))
            if self._random.random() < 0.03 and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:  # Long names would be gigabytes.
                values.extend([self._scalar(field)] * 20_000)
        elif field.name == "banks":
            values.extend(self._random.sample(self._banks, self._random.randint(1, len(self._banks))))
        elif field.name == "experts":
            values.extend(self._random.sample(range(8), self._random.randint(1, 8)))
        elif field.name != "known_versions":
            values.append(self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self._random.randbytes(self._random.choice((0, 1, 100, 4096, 70_000)))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._string(field.name)
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._random.choice(_FLOATS) if self._is_wild() else 0.5
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return self._random.choice((0, 1, 2, 3, 77, -1, 2**31 - 1)) if self._is_wild() else self._random.randrange(2)
            case FieldDescriptor.CPPTYPE_UINT32:
                return self._number(field.name) % 2**32
            case FieldDescriptor.CPPTYPE_INT64:
                return self._number(field.name) - 2**63
            case _:
                return self._number(field.name)

    def _number(self, name: str = "") -> int:
        if self._is_wild():
            return self._random.choice(_EDGES)
        if name in ("local_session", "staged_at"):
            return 0
        if name == "interval_ms":
            return 100
        return self._random.randrange(1, 9)

    def _string(self, name: str) -> str:
        if self._is_wild():
            return self._random.choice({"dtype": _DTYPES, "algorithm": _ALGORITHMS}.get(name, _NAMES))
        if name in ("bank", "source"):
            return self._random.choice(self._banks)
        return {"dtype": "float32", "algorithm": "uniform_v1"}.get(name, f"n{self._random.randrange(30)}")

    def _damaged(self, message: bytes) -> bytes:
        damaged = bytearray(message)
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(damaged) + 1)
            match self._random.randrange(5):
                case 0 | 1 if damaged:
                    damaged[at % len(damaged)] ^= 1 << self._random.randrange(8)
                case 2:
                    del damaged[at:]
                case 3:
                    damaged[at:at] = self._random.randbytes(self._random.randint(1, 9))
                case _:
                    damaged[at:at] = damaged[: self._random.randint(0, len(damaged))]
        return bytes(damaged)

    def _pushes(self) -> Iterator[bytes]:
        """Yields the messages of a push stream that begins correctly and continues with errors."""
        self._wildness = 0.5
        make = expert_pb2.PushExpertsRequest
        yield make(
            open=expert_pb2.PushOpen(bank=self._random.choice(self._banks), writer_id=f"w{self._random.randrange(3)}")
        ).SerializeToString()
        for _ in range(self._random.randint(1, 4)):
            header = expert_pb2.PushHeader(expert=self._random.randrange(10), push_number=self._number() or 1)
            header.parameter_bytes, header.optimizer_bytes = self._random.choice(
                ((4096, 4096), (4096, 4096), (8192, 0), (0, 0), (2**63, 2**63))
            )
            if self._random.random() < 0.7:
                header.parameter_xxh3 = header.optimizer_xxh3 = xxhash.xxh3_64_intdigest(bytes(4096))
                header.push_number = self._random.randrange(1, 1 << 30)
                header.base_version = self._random.choice((0, 0, self._number()))
            header.durability = self._random.choice((0, 0, 1, 9))  # type: ignore[assignment]
            if self._random.random() < 0.2:
                header.staged_at = self._number()
            yield make(header=header).SerializeToString()
            offset = 0
            while offset < 8192 and self._random.random() < 0.95:
                size = self._random.choice((4096, 4096, 8192 - offset, 8192 - offset, 0, 1, 10_000))
                at = offset if self._random.random() < 0.9 else self._number()
                message = make(chunk=expert_pb2.Chunk(offset=at, payload=bytes(size))).SerializeToString()
                yield self._damaged(message) if self._random.random() < 0.1 else message
                offset += max(size, 1)


def message_of(kind: type[Message], request: bytes) -> str:
    """Describes a request in the text of a failure: its fields if it can be parsed, otherwise its first bytes."""
    try:
        return str(kind.FromString(request))[:300]
    except Exception:
        return request[:60].hex()

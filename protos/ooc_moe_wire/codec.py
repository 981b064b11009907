"""How records (the stored form of an expert) look as bytes: the header block on disk, the sections' checksums, and the chunks on the wire.

    on disk      | header block | parameter section | optimizer section |
    on the wire  ExpertHeader or PushHeader with the checksums, then chunks of the two sections: | 1 MiB | 1 MiB | ...

The two sections together are called the body.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ooc_moe_wire.errors import CorruptRecord, InvalidRequest
from ooc_moe_wire.layout import BLOCK_BYTES, Layout
from ooc_moe_wire.v1 import expert_pb2

CHUNK_BYTES = 1 << 20  # Messages of 1 to 2 MiB are the fastest for Python gRPC.
CHUNK_BYTES_MAX = 2 << 20
# Bytes are copied and hashed in pieces, so that a copy is still in the processor's cache when it is hashed. Of sizes from 64 KiB to 2 MiB
# this one was the fastest: 8 % faster than one piece of 8 MiB.
PIECE_BYTES = 256 << 10
MESSAGE_BYTES_MAX = 4 << 20
HOLDS_NONE = (1 << 64) - 1  # In `known_versions`: the caller has no version of this expert.

# The metadata key under which a caller names itself.
TRAINER_KEY = "ooc-moe-trainer"
TRAINER_BYTES_MAX = 128

MAGIC = b"OOCMOE\r\n"
FORMAT = 2
# magic, format, bank id, expert, version, parameter bytes, optimizer bytes, parameter xxh3, optimizer xxh3, push number, base version,
# writer id
_HEADER = struct.Struct("<8sI16sQQQQQQQQ128s")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Checksums:
    """The checksums of an expert's parameter section and optimizer section: the xxh3_64 hash (seed 0) of each section, padding included.

    `optimizer` is 0 when there is no optimizer section.
    """

    parameters: int
    optimizer: int

    @staticmethod
    def of(layout: Layout, body: memoryview) -> Checksums:
        """Computes the checksums of a body (an expert's parameter section and optimizer section).

        A body that is only `parameter_bytes` long has no optimizer section."""
        head, tail = body[: layout.parameter_bytes], body[layout.parameter_bytes :]
        return Checksums(xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(tail) if len(tail) else 0)


def copy_hashed(source: NDArray[np.uint8], into: NDArray[np.uint8], parameter_bytes: int) -> Checksums:
    """Copies a body (an expert's parameter and optimizer section, or the former alone) to `into`, and returns its checksums.

    `parameter_bytes` says where the parameter section ends.
    """
    parameters = _copy_section(source[:parameter_bytes], into[:parameter_bytes])
    has_optimizer = len(source) > parameter_bytes
    return Checksums(parameters, _copy_section(source[parameter_bytes:], into[parameter_bytes:]) if has_optimizer else 0)


def _copy_section(source: NDArray[np.uint8], into: NDArray[np.uint8]) -> int:
    if len(source) <= PIECE_BYTES:
        np.copyto(into, source)
        return xxhash.xxh3_64_intdigest(into.data)
    hasher = xxhash.xxh3_64()
    for start in range(0, len(source), PIECE_BYTES):
        piece = into[start : start + PIECE_BYTES]
        np.copyto(piece, source[start : start + PIECE_BYTES])
        hasher.update(piece.data)
    return hasher.intdigest()


def verify(layout: Layout, body: memoryview, expected: Checksums, *, what: str) -> None:
    """Checks that a body (an expert's parameter and optimizer section, or the parameter section alone) has the expected checksums.

    Raises:
        CorruptRecord: a checksum differs; the message begins with `what` and names the section.
    """
    compare(Checksums.of(layout, body), expected, whole=len(body) > layout.parameter_bytes, what=what)


def compare(actual: Checksums, expected: Checksums, *, whole: bool, what: str) -> None:
    """Checks that the checksums `actual` of a body are the expected ones. Raises CorruptRecord, as `verify` does.

    `whole`: compare the checksums of the parameter and of the optimizer section; otherwise only those of the parameter section.
    """
    if actual.parameters != expected.parameters:
        raise CorruptRecord(f"{what}: the parameter section's checksum is {actual.parameters:#x}, expected {expected.parameters:#x}")
    if whole and actual.optimizer != expected.optimizer:
        raise CorruptRecord(f"{what}: the optimizer section's checksum is {actual.optimizer:#x}, expected {expected.optimizer:#x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """The content of a record's header block: which expert it is, the push that wrote it, the sections' lengths and their checksums.

    Forks and restores reuse records without writing them anew. So the bank and the version in a header are those that the record was first
    written for.
    """

    bank_id: bytes  # 16 bytes
    expert: int
    version: int
    parameter_bytes: int
    optimizer_bytes: int
    checksums: Checksums
    writer_id: str = ""  # The writer that pushed it; at most 128 bytes.
    push_number: int = 0
    base_version: int = 0  # The version that the push started from; it tells a scan whether a restore came in between.

    def pack_into(self, block: memoryview) -> None:
        """Writes the header as a block of 4 KiB into `block`: the fields, a checksum of the fields, and zeros."""
        fields = _HEADER.pack(
            MAGIC,
            FORMAT,
            self.bank_id,
            self.expert,
            self.version,
            self.parameter_bytes,
            self.optimizer_bytes,
            self.checksums.parameters,
            self.checksums.optimizer,
            self.push_number,
            self.base_version,
            self.writer_id.encode(),
        )
        check = _CHECK.pack(xxhash.xxh3_64_intdigest(fields))
        block[:BLOCK_BYTES] = (fields + check).ljust(BLOCK_BYTES, b"\0")

    @staticmethod
    def unpack(block: memoryview, *, what: str) -> RecordHeader:
        """Reads a header from its block.

        Raises:
            CorruptRecord: the block is no header block, is damaged, or has another format. The message begins with `what`.
        """
        fields = bytes(block[: _HEADER.size])
        magic, version_of_format, bank_id, expert, version, *rest = _HEADER.unpack(fields)
        (check,) = _CHECK.unpack(block[_HEADER.size : _HEADER.size + _CHECK.size])
        if magic != MAGIC or check != xxhash.xxh3_64_intdigest(fields):
            raise CorruptRecord(f"{what}: the header block is damaged")
        if version_of_format != FORMAT:
            raise CorruptRecord(f"{what}: record format {version_of_format} is not {FORMAT}")
        parameter_bytes, optimizer_bytes, parameters, optimizer, push_number, base_version, writer_id = rest
        return RecordHeader(
            bank_id=bank_id,
            expert=expert,
            version=version,
            parameter_bytes=parameter_bytes,
            optimizer_bytes=optimizer_bytes,
            checksums=Checksums(parameters, optimizer),
            writer_id=writer_id.rstrip(b"\0").decode(),
            push_number=push_number,
            base_version=base_version,
        )


def chunks(body: memoryview) -> Iterator[expert_pb2.Chunk]:
    """Splits a body (an expert's bytes) into Chunk messages. Each message holds a copy, because a protobuf message owns what it sends."""
    for offset in range(0, len(body), CHUNK_BYTES):
        yield expert_pb2.Chunk(offset=offset, payload=bytes(body[offset : offset + CHUNK_BYTES]))


def encoded_chunks(body: memoryview, *, field: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Splits a body (an expert's bytes) into chunks, and yields each chunk as a serialized message, ready to send.

    The messages are written by hand, which takes one copy of the bytes instead of protobuf's three. Copies are not the main cost: fresh
    memory costs more, in page faults. On a virtual machine with 2 cores, a daemon spent 6 ms of CPU on each chunk of 1 MiB that protobuf
    made, and 0.6 ms on a chunk made by this function, in memory that the daemon's allocator had kept.

    Args:
        body: the bytes.
        field: the number of the message's field for the chunk: `FetchExpertsResponse.CHUNK_FIELD_NUMBER` or
            `PushExpertsRequest.CHUNK_FIELD_NUMBER`.
        chunk_bytes: the bytes of each chunk but the last; at most CHUNK_BYTES_MAX.
    """
    for offset in range(0, len(body), chunk_bytes):
        payload = body[offset : offset + chunk_bytes]
        start = (b"\x08" + _varint(offset) if offset else b"") + b"\x12" + _varint(len(payload))
        yield b"".join((_varint(field << 3 | 2), _varint(len(start) + len(payload)), start, payload))


class ChunkView(NamedTuple):
    """A received chunk of a body (an expert's bytes): `payload` is the chunk's bytes, and `offset` is where they begin in the body.

    Unlike the payload of a Chunk message, this one is a view of the received message and not a copy.
    """

    offset: int
    payload: memoryview


def decode_fetch_response(data: bytes) -> expert_pb2.FetchExpertsResponse | ChunkView:
    """Parses a serialized FetchExpertsResponse. If the message carries a chunk of an expert, returns a `ChunkView`, without a copy. Raises
    DecodeError.

    A chunk in an encoding that is valid but unusual (no known serializer writes it) is returned as a FetchExpertsResponse instead.
    """
    return _decode_chunk(data, _FETCH_CHUNK_TAG) or expert_pb2.FetchExpertsResponse.FromString(data)


def decode_push_request(data: bytes) -> expert_pb2.PushExpertsRequest | ChunkView:
    """Parses a serialized PushExpertsRequest. If the message carries a chunk of an expert, returns a `ChunkView`, as
    `decode_fetch_response` does."""
    return _decode_chunk(data, _PUSH_CHUNK_TAG) or expert_pb2.PushExpertsRequest.FromString(data)


_FETCH_CHUNK_TAG = expert_pb2.FetchExpertsResponse.CHUNK_FIELD_NUMBER << 3 | 2
_PUSH_CHUNK_TAG = expert_pb2.PushExpertsRequest.CHUNK_FIELD_NUMBER << 3 | 2
_OFFSET_TAG = expert_pb2.Chunk.OFFSET_FIELD_NUMBER << 3
_PAYLOAD_TAG = expert_pb2.Chunk.PAYLOAD_FIELD_NUMBER << 3 | 2


def _decode_chunk(data: bytes, tag: int) -> ChunkView | None:
    """Reads the chunk of a message that has nothing else, with the offset (if any) before the payload.

    None: the message is of another form, and protobuf must parse it.
    """
    try:
        if data[0] != tag:
            return None
        length, at = _read_varint(data, 1)
        if at + length != len(data):
            return None
        offset = 0
        if data[at] == _OFFSET_TAG:
            offset, at = _read_varint(data, at + 1)
        if data[at] != _PAYLOAD_TAG:
            return None
        length, at = _read_varint(data, at + 1)
    except IndexError:
        return None
    return ChunkView(offset, memoryview(data)[at:]) if at + length == len(data) else None


_VARINT_BYTES_MAX = 4  # Longer numbers do not occur in a chunk, or overflow by protobuf's own rules: they are left to protobuf.


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads the protobuf varint at position `at`. Returns it and the position after it. Raises IndexError when it is too long."""
    number = 0
    for position in range(_VARINT_BYTES_MAX):
        byte = data[at + position]
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return number, at + position + 1
    raise IndexError


def _varint(number: int) -> bytes:
    """Encodes a number as a protobuf varint: seven bits in each byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class Assembler:
    """Copies the chunks of one body (an expert's bytes) into the receiver's memory. The chunks must come in order and without gaps.

    Args:
        body: the memory to fill; its length says how many bytes must come.
        what: what the body is, for error messages.
    """

    def __init__(self, body: memoryview, *, what: str) -> None:
        self.body = body
        self._received = 0
        self._what = what

    @property
    def complete(self) -> bool:
        """Whether all chunks of the body (an expert's bytes) have come."""
        return self._received == len(self.body)

    def add(self, chunk: expert_pb2.Chunk | ChunkView) -> None:
        """Copies the next chunk to its place in the body.

        Raises:
            InvalidRequest: the chunk is empty, out of order, or longer than the rest of the body.
        """
        offset, payload = chunk.offset, chunk.payload  # Read once: a message copies its payload at each access.
        end = offset + len(payload)
        if offset != self._received or not payload or end > len(self.body):
            raise InvalidRequest(
                f"{self._what}: chunk of {len(payload)} bytes at offset {offset}, expected offset {self._received} of {len(self.body)}"
            )
        self.body[offset:end] = payload
        self._received = end


class HashingAssembler(Assembler):
    """An assembler that also computes the body's checksums. A chunk is hashed right after it was copied, while its bytes are in the CPU
    cache."""

    def __init__(self, body: memoryview, *, parameter_bytes: int, what: str) -> None:
        super().__init__(body, what=what)
        self._parameter_bytes = parameter_bytes
        self._parameters, self._optimizer = xxhash.xxh3_64(), xxhash.xxh3_64()

    def add(self, chunk: expert_pb2.Chunk | ChunkView) -> None:
        """Copies the next chunk as `Assembler.add` does, and adds it to the checksums."""
        start, split = self._received, self._parameter_bytes
        super().add(chunk)
        self._parameters.update(self.body[start : min(self._received, split)])
        self._optimizer.update(self.body[max(start, split) : self._received])

    @property
    def checksums(self) -> Checksums:
        """The checksums of the bytes that have come so far, as `Checksums.of` computes them."""
        has_optimizer = len(self.body) > self._parameter_bytes
        return Checksums(self._parameters.intdigest(), self._optimizer.intdigest() if has_optimizer else 0)

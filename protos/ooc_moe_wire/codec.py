"""Records as bytes: the header block, the checksum of a section, and chunks.

A header block makes a record self-describing on disk; `Checksums` travel beside the bytes; chunks cut a body for the wire. Knows nothing of
files or calls.
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

CHUNK_BYTES = 1 << 20  # 1-2 MiB messages are the fastest for Python gRPC.
CHUNK_BYTES_MAX = 2 << 20
# A piece is hashed while its copy is in the processor's cache: of 64 KiB to 2 MiB the fastest, 8 % faster than one piece of 8 MiB.
PIECE_BYTES = 256 << 10
MESSAGE_BYTES_MAX = 4 << 20
HOLDS_NONE = (1 << 64) - 1  # In `known_versions`: no version is held.

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
    """xxh3_64 of each section, padding included; the optimizer's is 0 where there is none."""

    parameters: int
    optimizer: int

    @staticmethod
    def of(layout: Layout, body: memoryview) -> Checksums:
        """Reads `body` once. A body of `parameter_bytes` only has an optimizer checksum of 0."""
        head, tail = body[: layout.parameter_bytes], body[layout.parameter_bytes :]
        return Checksums(xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(tail) if len(tail) else 0)


def copy_hashed(source: NDArray[np.uint8], into: NDArray[np.uint8], parameter_bytes: int) -> Checksums:
    """Copies a body (both sections, or the parameters only) and hashes the copy on the way."""
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
    """Compares the sections of `body` (both, or parameters only) with their checksums.

    Raises:
        CorruptRecord: they differ; the message starts with `what` and names the section.
    """
    compare(Checksums.of(layout, body), expected, whole=len(body) > layout.parameter_bytes, what=what)


def compare(actual: Checksums, expected: Checksums, *, whole: bool, what: str) -> None:
    """As `verify`, for checksums that were made on the way; `whole`: of both sections."""
    if actual.parameters != expected.parameters:
        raise CorruptRecord(f"{what}: the parameter section's checksum is {actual.parameters:#x}, expected {expected.parameters:#x}")
    if whole and actual.optimizer != expected.optimizer:
        raise CorruptRecord(f"{what}: the optimizer section's checksum is {actual.optimizer:#x}, expected {expected.optimizer:#x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """What a record says of itself: whose it is (at its origin: forks and restores share it), and its checksums."""

    bank_id: bytes  # 16 bytes
    expert: int
    version: int
    parameter_bytes: int
    optimizer_bytes: int
    checksums: Checksums
    writer_id: str = ""  # Who pushed it: at most 128 bytes.
    push_number: int = 0
    base_version: int = 0  # What the push started from: tells a scan whether a restore came in between.

    def pack_into(self, block: memoryview) -> None:
        """Writes the header block (4 KiB, zero padded, checksummed) into `block`."""
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
        """Reads a header block.

        Raises:
            CorruptRecord: it is not one, or is damaged; the message starts with `what`.
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
    """Cuts a body into messages. Each holds a copy of its bytes (protobuf owns what it sends)."""
    for offset in range(0, len(body), CHUNK_BYTES):
        yield expert_pb2.Chunk(offset=offset, payload=bytes(body[offset : offset + CHUNK_BYTES]))


def encoded_chunks(body: memoryview, *, field: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """As `chunks`, but serialized inside a message that carries them as field number `field`, with one copy instead of three.

    A fresh megabyte costs more in page faults than in copying: on a 2-core virtual machine a daemon spent 6 ms of CPU on each chunk made
    by protobuf, and 0.6 ms on one of these in memory that its allocator kept.

    Args:
        body: the bytes.
        field: `FetchExpertsResponse.CHUNK_FIELD_NUMBER` or `PushExpertsRequest.CHUNK_FIELD_NUMBER`.
        chunk_bytes: of each chunk but the last; at most CHUNK_BYTES_MAX.
    """
    for offset in range(0, len(body), chunk_bytes):
        payload = body[offset : offset + chunk_bytes]
        start = (b"\x08" + _varint(offset) if offset else b"") + b"\x12" + _varint(len(payload))
        yield b"".join((_varint(field << 3 | 2), _varint(len(start) + len(payload)), start, payload))


class ChunkView(NamedTuple):
    """A Chunk as it lies in the message that carried it: the payload is a view, not a copy."""

    offset: int
    payload: memoryview


def decode_fetch_response(data: bytes) -> expert_pb2.FetchExpertsResponse | ChunkView:
    """Parses a FetchExpertsResponse; a chunk in the form that serializers write comes as a view. Raises DecodeError, as protobuf does."""
    return _decode_chunk(data, _FETCH_CHUNK_TAG) or expert_pb2.FetchExpertsResponse.FromString(data)


def decode_push_request(data: bytes) -> expert_pb2.PushExpertsRequest | ChunkView:
    """Parses a PushExpertsRequest, as `decode_fetch_response` does."""
    return _decode_chunk(data, _PUSH_CHUNK_TAG) or expert_pb2.PushExpertsRequest.FromString(data)


_FETCH_CHUNK_TAG = expert_pb2.FetchExpertsResponse.CHUNK_FIELD_NUMBER << 3 | 2
_PUSH_CHUNK_TAG = expert_pb2.PushExpertsRequest.CHUNK_FIELD_NUMBER << 3 | 2
_OFFSET_TAG = expert_pb2.Chunk.OFFSET_FIELD_NUMBER << 3
_PAYLOAD_TAG = expert_pb2.Chunk.PAYLOAD_FIELD_NUMBER << 3 | 2


def _decode_chunk(data: bytes, tag: int) -> ChunkView | None:
    """The chunk that is all of the message, its offset (if any) before its payload; None for every other form, which protobuf parses."""
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


_VARINT_BYTES_MAX = 4  # Of those that are read by hand: longer ones are no chunk's, or overflow by rules of protobuf's own.


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends. Raises IndexError when it ends too late."""
    number = 0
    for position in range(_VARINT_BYTES_MAX):
        byte = data[at + position]
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return number, at + position + 1
    raise IndexError


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first (protobuf's encoding of lengths, tags and unsigned numbers)."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class Assembler:
    """Puts chunks back together, straight into the receiver's memory.

    `add` must see the chunks of one body in order and without gaps; `complete` says when all have come.
    """

    def __init__(self, body: memoryview, *, what: str) -> None:
        self.body = body
        self._received = 0
        self._what = what

    @property
    def complete(self) -> bool:
        """All bytes are there."""
        return self._received == len(self.body)

    def add(self, chunk: expert_pb2.Chunk | ChunkView) -> None:
        """Takes the next chunk.

        Raises:
            InvalidRequest: it is empty, out of order, or runs past the end.
        """
        offset, payload = chunk.offset, chunk.payload  # Once: a message's payload is copied by each look at it.
        end = offset + len(payload)
        if offset != self._received or not payload or end > len(self.body):
            raise InvalidRequest(
                f"{self._what}: chunk of {len(payload)} bytes at offset {offset}, expected offset {self._received} of {len(self.body)}"
            )
        self.body[offset:end] = payload
        self._received = end


class HashingAssembler(Assembler):
    """Hashes each chunk as it lands, while it is in the processor's cache."""

    def __init__(self, body: memoryview, *, parameter_bytes: int, what: str) -> None:
        super().__init__(body, what=what)
        self._parameter_bytes = parameter_bytes
        self._parameters, self._optimizer = xxhash.xxh3_64(), xxhash.xxh3_64()

    def add(self, chunk: expert_pb2.Chunk | ChunkView) -> None:
        """See Assembler."""
        start, split = self._received, self._parameter_bytes
        super().add(chunk)
        self._parameters.update(self.body[start : min(self._received, split)])
        self._optimizer.update(self.body[max(start, split) : self._received])

    @property
    def checksums(self) -> Checksums:
        """Of what came, as `Checksums.of`."""
        has_optimizer = len(self.body) > self._parameter_bytes
        return Checksums(self._parameters.intdigest(), self._optimizer.intdigest() if has_optimizer else 0)

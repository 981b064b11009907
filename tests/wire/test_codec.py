import numpy as np
import pytest
import xxhash
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_wire.codec import (
    CHUNK_BYTES,
    FORMAT,
    PIECE_BYTES,
    Assembler,
    Checksums,
    ChunkView,
    HashingAssembler,
    RecordHeader,
    chunks,
    copy_hashed,
    decode_fetch_response,
    decode_push_request,
    encoded_chunks,
    verify,
)
from ooc_moe_wire.errors import CorruptRecord, InvalidRequest
from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec
from ooc_moe_wire.v1 import expert_pb2

LAYOUT = Layout(
    parameters=(TensorSpec(name="w", shape=(900,)),),
    optimizer=(TensorSpec(name="w.exp_avg", shape=(1500,)), TensorSpec(name="step", shape=(1,), dtype="int64")),
)
HEADER_BYTES_USED = 228  # 220 of fields, 8 of checksum.

words = st.integers(0, 2**64 - 1)
headers = st.builds(
    RecordHeader,
    bank_id=st.binary(min_size=16, max_size=16),
    expert=words,
    version=words,
    parameter_bytes=words,
    optimizer_bytes=words,
    checksums=st.builds(Checksums, words, words),
    writer_id=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=32),
    push_number=words,
    base_version=words,
)


def filled_body() -> memoryview:
    return memoryview(bytearray((index * 37 + index // 256) % 256 for index in range(LAYOUT.body_bytes)))


def some_header(**changes) -> RecordHeader:
    fields = {"bank_id": bytes(range(16)), "expert": 7, "version": 11, "parameter_bytes": 4096, "optimizer_bytes": 8192}
    fields |= {"writer_id": "wr\u00eft\u00ebr", "push_number": 5, "base_version": 9}
    return RecordHeader(**(fields | changes), checksums=Checksums(0x0123456789ABCDEF, 2**64 - 1))


def packed(header: RecordHeader) -> memoryview:
    block = memoryview(bytearray(b"\xff" * BLOCK_BYTES))
    header.pack_into(block)
    return block


@given(headers)
def test_a_header_survives_its_block(header):
    assert RecordHeader.unpack(packed(header), what="slot 3") == header


def test_a_header_block_keeps_its_golden_bytes():
    """What lies on disks: a change here is a new FORMAT."""
    block = bytes(packed(some_header()))
    assert block[:HEADER_BYTES_USED].hex() == (
        "4f4f434d4f450d0a"  # magic
        "02000000"  # format
        "000102030405060708090a0b0c0d0e0f"  # bank id
        "0700000000000000"  # expert
        "0b00000000000000"  # version
        "0010000000000000"  # parameter bytes
        "0020000000000000"  # optimizer bytes
        "efcdab8967452301"  # parameter xxh3
        "ffffffffffffffff"  # optimizer xxh3
        "0500000000000000"  # push number
        "0900000000000000"  # base version
        + "7772c3af74c3ab72".ljust(256, "0")  # writer id
        + "6e204b1b87d67d69"  # xxh3 of the above
    )
    assert not any(block[HEADER_BYTES_USED:])


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_damaged_byte_of_a_header_is_noticed(mask):
    block = packed(some_header())
    for position in range(HEADER_BYTES_USED):
        block[position] ^= mask
        with pytest.raises(CorruptRecord, match="slot 3: the header block is damaged"):
            RecordHeader.unpack(block, what="slot 3")
        block[position] ^= mask
    assert RecordHeader.unpack(block, what="slot 3") == some_header()


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_a_block_that_never_held_a_header_is_corrupt(fill):
    with pytest.raises(CorruptRecord, match="slot 9"):
        RecordHeader.unpack(memoryview(bytes([fill]) * BLOCK_BYTES), what="slot 9")


def test_a_sound_header_of_another_format_is_refused_by_its_number():
    block = packed(some_header())
    block[8] = FORMAT + 1
    fields = HEADER_BYTES_USED - 8
    block[fields:HEADER_BYTES_USED] = xxhash.xxh3_64_intdigest(block[:fields]).to_bytes(8, "little")
    with pytest.raises(CorruptRecord, match=f"slot 3: record format {FORMAT + 1} is not {FORMAT}"):
        RecordHeader.unpack(block, what="slot 3")


def test_each_section_has_its_own_checksum():
    body = filled_body()
    whole, parameters_only = Checksums.of(LAYOUT, body), Checksums.of(LAYOUT, body[: LAYOUT.parameter_bytes])
    assert parameters_only == Checksums(whole.parameters, 0)
    assert whole.optimizer == xxhash.xxh3_64_intdigest(bytes(body[LAYOUT.parameter_bytes :]))


@given(st.integers(0, LAYOUT.body_bytes - 1), st.integers(1, 255))
def test_a_damaged_byte_is_noticed_and_its_section_named(position, mask):
    body = filled_body()
    expected = Checksums.of(LAYOUT, body)
    body[position] ^= mask
    section = "parameter" if position < LAYOUT.parameter_bytes else "optimizer"
    with pytest.raises(CorruptRecord, match=f"expert 5: the {section} section's checksum"):
        verify(LAYOUT, body, expected, what="expert 5")


def test_parameters_alone_are_verified_without_the_optimizers_checksum():
    body = filled_body()
    expected = Checksums.of(LAYOUT, body)
    verify(LAYOUT, body, expected, what="expert 5")
    verify(LAYOUT, body[: LAYOUT.parameter_bytes], expected, what="expert 5")


@pytest.mark.parametrize("size", [1, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 4096])
def test_chunks_put_together_are_the_body_again(size):
    body = memoryview((b"0123456789abcdef" * (size // 16 + 1))[:size])
    received = bytearray(size)
    assembler = Assembler(memoryview(received), what="expert 5")
    sizes = []
    for chunk in chunks(body):
        assert not assembler.complete
        assembler.add(expert_pb2.Chunk.FromString(chunk.SerializeToString()))
        sizes.append(len(chunk.payload))
    assert assembler.complete
    assert received == body
    assert max(sizes) <= CHUNK_BYTES
    assert len(sizes) == -(-size // CHUNK_BYTES)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_an_assembler_takes_pieces_of_any_size(body, data):
    received = bytearray(len(body))
    assembler = Assembler(memoryview(received), what="expert 5")
    offset = 0
    while not assembler.complete:
        end = data.draw(st.integers(offset + 1, len(body)))
        assembler.add(expert_pb2.Chunk(offset=offset, payload=body[offset:end]))
        offset = end
    assert received == body


@given(st.sets(st.integers(1, LAYOUT.body_bytes), max_size=8), st.booleans())
def test_a_hashing_assembler_makes_the_checksums_of_the_body(cuts, whole):
    size = LAYOUT.body_bytes if whole else LAYOUT.parameter_bytes
    body, received = memoryview(bytes(index % 251 for index in range(size))), bytearray(size)
    assembler = HashingAssembler(memoryview(received), parameter_bytes=LAYOUT.parameter_bytes, what="expert 5")
    ends = [*sorted(cut for cut in cuts if cut < size), size]
    for start, end in zip([0, *ends], ends, strict=False):
        assembler.add(expert_pb2.Chunk(offset=start, payload=bytes(body[start:end])))
    assert received == body
    assert assembler.checksums == Checksums.of(LAYOUT, body)


@pytest.mark.parametrize(
    ("offset", "payload"),
    [
        (4, b""),  # nothing in it
        (0, b"again"),
        (5, b"gap"),
        (3, b"overlap"),
        (4, b"past end"),
        (2**64 - 1, b"far"),
    ],
)
def test_a_chunk_that_does_not_follow_is_refused_and_writes_nothing(offset, payload):
    received = bytearray(10)
    assembler = Assembler(memoryview(received), what="expert 5")
    assembler.add(expert_pb2.Chunk(offset=0, payload=b"good"))
    with pytest.raises(InvalidRequest, match=f"expert 5: chunk of {len(payload)} bytes at offset {offset}, expected offset 4 of 10"):
        assembler.add(expert_pb2.Chunk(offset=offset, payload=payload))
    assert received == b"good" + bytes(6)
    assembler.add(expert_pb2.Chunk(offset=4, payload=b"follow"))
    assert assembler.complete


@pytest.mark.parametrize("size", [0, 1, 127, 128, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 5])
@pytest.mark.parametrize("message", [expert_pb2.FetchExpertsResponse, expert_pb2.PushExpertsRequest])
def test_chunks_serialized_by_hand_are_the_bytes_that_protobuf_makes(size, message):
    body = memoryview(bytes(index % 251 for index in range(size)))
    made_by_protobuf = [message(chunk=chunk).SerializeToString() for chunk in chunks(body)]
    assert list(encoded_chunks(body, field=message.CHUNK_FIELD_NUMBER)) == made_by_protobuf


def test_a_complete_body_takes_no_more_chunks():
    assembler = Assembler(memoryview(bytearray(4)), what="expert 5")
    assembler.add(expert_pb2.Chunk(offset=0, payload=b"full"))
    with pytest.raises(InvalidRequest, match="expected offset 4 of 4"):
        assembler.add(expert_pb2.Chunk(offset=4, payload=b"!"))


DECODERS = [(expert_pb2.FetchExpertsResponse, decode_fetch_response), (expert_pb2.PushExpertsRequest, decode_push_request)]


def varint(number: int, padding: int = 0) -> bytes:
    """Protobuf's encoding, with so many needless bytes."""
    encoded = bytearray()
    while number > 0x7F or padding > 0:
        padding -= number <= 0x7F
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def delimited(tag: int, content: bytes, length: bytes | None = None) -> bytes:
    return bytes([tag]) + (varint(len(content)) if length is None else length) + content


# The parts of a chunk in any order, repeated, missing, unknown, of another wire type, with needless or overlong bytes.
paddings = st.integers(0, 9)
parts = st.one_of(
    st.builds(lambda offset, padding: b"\x08" + varint(offset, padding), words, paddings),
    st.builds(lambda payload, padding: delimited(0x12, payload, varint(len(payload), padding)), st.binary(max_size=300), paddings),
    st.builds(lambda number: b"\x78" + varint(number), words),
    st.builds(lambda payload: delimited(0x7A, payload), st.binary(max_size=5)),
    st.just(b"\x0d1234"),
    st.binary(max_size=6),
)
chunk_messages = st.builds(
    lambda tag, pieces, wrong, padding, after: (
        delimited(tag, content := b"".join(pieces), varint(max(0, len(content) + wrong), padding)) + b"".join(after)
    ),
    st.sampled_from([0x0A, 0x12, 0x1A, 0x22, 0x92]),
    st.lists(parts, max_size=4),
    st.sampled_from([0, 0, 0, 0, 1, -1]),
    paddings,
    st.lists(parts, max_size=1),
)
plain_chunks = st.builds(expert_pb2.Chunk, offset=words, payload=st.binary(max_size=300))


def agree(message, decode, data: bytes) -> bool:
    """Both parse to the same, or both refuse; returns whether the chunk came as a view."""
    try:
        expected = message.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode(data)
        return False
    actual = decode(data)
    if not isinstance(actual, ChunkView):
        assert actual == expected
        return False
    assert expected == message(chunk=expert_pb2.Chunk(offset=actual.offset, payload=bytes(actual.payload)))
    assert not actual.payload.nbytes or actual.payload.obj is data  # No copy.
    return True


@pytest.mark.parametrize(("message", "decode"), DECODERS)
@given(data=st.data())
def test_parsing_by_hand_gives_what_protobuf_gives(message, decode, data):
    agree(message, decode, data.draw(chunk_messages))


@pytest.mark.parametrize(("message", "decode"), DECODERS)
@given(chunk=plain_chunks, data=st.data())
def test_a_cut_or_changed_chunk_is_parsed_as_protobuf_does(message, decode, chunk, data):
    whole = message(chunk=chunk).SerializeToString()
    agree(message, decode, whole[: data.draw(st.integers(0, len(whole)))])
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    agree(message, decode, bytes(changed))


@pytest.mark.parametrize(("message", "decode"), DECODERS)
@pytest.mark.parametrize("size", [1, 127, 128, CHUNK_BYTES, 3 * CHUNK_BYTES - 5])
def test_every_chunk_that_is_sent_is_parsed_without_a_copy(message, decode, size):
    body = memoryview(bytes(index % 251 for index in range(size)))
    by_hand = list(encoded_chunks(body, field=message.CHUNK_FIELD_NUMBER))
    by_protobuf = [message(chunk=chunk).SerializeToString() for chunk in chunks(body)]
    assert all(agree(message, decode, data) for data in by_hand + by_protobuf)


@pytest.mark.parametrize(("message", "decode"), DECODERS)
def test_messages_that_are_no_chunks_are_protobufs(message, decode):
    sent = message(header={"expert": 7})
    assert decode(sent.SerializeToString()) == sent
    assert decode(b"") == message()


def test_an_assembler_takes_chunks_as_views_too():
    received = bytearray(6)
    assembler = Assembler(memoryview(received), what="expert 5")
    assembler.add(ChunkView(0, memoryview(b"view")))
    with pytest.raises(InvalidRequest, match="chunk of 0 bytes at offset 4"):
        assembler.add(ChunkView(4, memoryview(b"")))
    assembler.add(expert_pb2.Chunk(offset=4, payload=b"!!"))
    assert received == b"view!!"


@pytest.mark.parametrize("floats", [1, PIECE_BYTES // 4, PIECE_BYTES * 3 // 4 + 5])
@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_that_is_hashed_on_the_way_has_the_bytes_and_the_checksums(floats, whole):
    layout = Layout(parameters=(TensorSpec(name="w", shape=(floats,)),), optimizer=(TensorSpec(name="m", shape=(floats * 2,)),))
    source = np.random.default_rng(floats).integers(0, 256, layout.body_bytes if whole else layout.parameter_bytes, dtype=np.uint8)
    into = np.zeros_like(source)
    assert copy_hashed(source, into, layout.parameter_bytes) == Checksums.of(layout, source.data)
    assert bytes(into) == bytes(source)

import pytest

from ooc_moe_server import frames
from ooc_moe_wire.codec import chunks
from ooc_moe_wire.v1 import expert_pb2


@pytest.mark.parametrize(
    ("chunk_bytes", "body_bytes"),
    [
        (1, 3),
        (100, 0),
        (100, 300),
        (127, 300),
        (128, 300),
        (128, 40_000),
        (1 << 14, 1 << 20),
        (1 << 20, (1 << 20) - 1),
        (1 << 20, (1 << 21) + 5),
    ],
)
def test_chunks_encoded_by_hand_are_the_bytes_that_protobuf_makes(monkeypatch, chunk_bytes, body_bytes):
    monkeypatch.setattr(frames, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("ooc_moe_wire.codec.CHUNK_BYTES", chunk_bytes)
    body = memoryview(bytes(range(256)) * (body_bytes // 256 + 1))[:body_bytes]
    by_protobuf = [expert_pb2.FetchExpertsResponse(chunk=chunk).SerializeToString() for chunk in chunks(body)]
    assert list(frames.chunk_messages(body)) == by_protobuf

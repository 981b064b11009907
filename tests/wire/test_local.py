"""The packets of the local plane, there and back, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_wire import local
from ooc_moe_wire.codec import TRAINER_BYTES_MAX
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.local import FETCHED_MAX, PACKET_BYTES_MAX, RELEASES_MAX, Welcome, pack_fetch, pack_release, pack_stage, unpack
from ooc_moe_wire.v1 import expert_pb2, local_pb2

words = st.integers(0, 2**64 - 1)


@given(words, words)
def test_a_welcome_survives_its_packet(session, arena_bytes):
    welcome = Welcome(session=session, arena_bytes=arena_bytes)
    assert Welcome.unpack(welcome.pack()) == welcome


def test_a_welcome_of_another_protocol_or_of_something_else_is_refused(monkeypatch):
    packet = Welcome(session=1, arena_bytes=2).pack()
    for other in (b"", packet[:-1], packet + b"\0", b"X" + packet[1:]):
        with pytest.raises(InvalidRequest, match="no welcome"):
            Welcome.unpack(other)
    monkeypatch.setattr(local, "PROTOCOL", 3)
    with pytest.raises(InvalidRequest, match="protocol 2, not 3"):
        Welcome.unpack(packet)


@given(st.lists(words, max_size=50))
def test_released_leases_survive_their_packet(leases):
    assert unpack(pack_release(leases)) == tuple(leases)


def test_the_most_releases_fit_into_a_packet_and_more_are_refused():
    packet = pack_release(range(RELEASES_MAX))
    assert len(packet) <= PACKET_BYTES_MAX
    assert len(unpack(packet)) == RELEASES_MAX
    with pytest.raises(InvalidRequest):
        unpack(pack_release(range(RELEASES_MAX + 1)))


@given(words)
def test_a_staging_size_survives_its_packet(num_bytes):
    assert unpack(pack_stage(num_bytes)) == num_bytes


@given(st.binary(max_size=64))
def test_any_packet_is_read_as_what_it_says_or_refused(packet):
    try:
        told = unpack(packet)
    except InvalidRequest:
        return
    if isinstance(told, local_pb2.LocalFetch):
        assert unpack(pack_fetch(told)) == told
    else:
        assert (pack_stage(told) if isinstance(told, int) else pack_release(told)) == packet


def test_the_largest_fetch_fits_into_a_packet_and_survives_it():
    ids = range(2**64 - FETCHED_MAX, 2**64)
    request = expert_pb2.FetchExpertsRequest(bank="b" * 128, experts=ids, known_versions=ids)
    fetch = local_pb2.LocalFetch(trainer="t" * TRAINER_BYTES_MAX, request=request, pin=True)
    assert len(pack_fetch(fetch)) <= PACKET_BYTES_MAX
    assert unpack(pack_fetch(fetch)) == fetch

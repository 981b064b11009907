"""The DRAM tier by itself: four places of one block each, unless a test says otherwise."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_moe_server import arena as arena_module
from ooc_moe_server.arena import Arena, check_dram_bytes
from ooc_moe_server.catalog import Seed, Slot
from ooc_moe_server.dram import DramTier
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import InvalidRequest, TierFull

BLOCK = 4096
NO_SUMS = Checksums(0, 0)


@pytest.fixture
def dram():
    return DramTier(Arena(4 * BLOCK))


def put(dram, expert, blocks=1):
    """A resident, unpinned."""
    entry = dram.reserve(blocks * BLOCK)
    dram.publish(entry, Seed(1, expert), NO_SUMS, 1)
    dram.unpin(entry)
    return entry


def residents(dram, experts=range(20)):
    return [expert for expert in experts if dram.holds(Seed(1, expert))]


def test_the_least_recently_used_leaves_first_one_for_one(dram):
    for expert in range(4):
        put(dram, expert)
    dram.touch(Seed(1, 0))
    put(dram, 4)
    assert residents(dram) == [0, 2, 3, 4]
    assert dram.snapshot_stats().evictions == 1


def test_a_pinned_record_is_never_evicted(dram):
    for expert in range(4):
        put(dram, expert)
    pinned = dram.take(Seed(1, 0))
    put(dram, 4)
    assert residents(dram) == [0, 2, 3, 4]
    dram.unpin(pinned)
    put(dram, 5)
    put(dram, 6)
    assert 0 in residents(dram)  # It was used after 2 and 3.


def test_when_everything_is_pinned_the_tier_is_full_and_says_so(dram):
    for expert in range(4):
        put(dram, expert)
        dram.take(Seed(1, expert))
    with pytest.raises(TierFull, match="16384 of 16384 bytes are pinned"):
        dram.reserve(BLOCK)


def test_a_larger_record_evicts_about_the_bytes_it_needs(dram):
    for expert in range(4):
        put(dram, expert)
    put(dram, 9, blocks=2)
    assert len(residents(dram)) == 3
    assert dram.snapshot_stats().evictions == 2


def test_a_discarded_record_keeps_its_bytes_until_its_last_pin_goes(dram):
    put(dram, 0, blocks=4)
    entry = dram.take(Seed(1, 0))
    entry.body[:4] = b"kept"
    dram.discard(Seed(1, 0))
    assert not dram.holds(Seed(1, 0))
    with pytest.raises(TierFull):
        dram.reserve(BLOCK)
    assert bytes(entry.body[:4]) == b"kept"
    dram.unpin(entry)
    assert dram.snapshot_stats().free_bytes == 4 * BLOCK


def test_a_slot_and_a_seed_of_equal_numbers_are_different_records(dram):
    entry = dram.reserve(BLOCK)
    dram.publish(entry, Seed(BLOCK, 1), NO_SUMS, 1)
    assert not dram.holds(Slot(BLOCK, 1))


def test_a_waiting_reservation_gets_its_room_when_a_pin_goes(dram):
    async def scenario():
        held = dram.reserve(4 * BLOCK)
        waiting = asyncio.create_task(dram.reserve_soon(BLOCK, patience_s=30))
        await asyncio.sleep(0)
        assert not waiting.done()
        dram.unpin(held)
        return await waiting

    assert asyncio.run(scenario()).pins == 1


def test_a_record_larger_than_the_arena_is_refused_without_waiting(dram):
    with pytest.raises(TierFull, match="20480"):
        asyncio.run(dram.reserve_soon(5 * BLOCK, patience_s=30))


def test_the_bytes_of_a_bank_that_is_gone_are_free(dram):
    put(dram, 1)
    put(dram, 2)
    dram.discard_seeds(1)
    assert dram.snapshot_stats().used_bytes == 0
    assert dram.records_by_bank[1] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "take", "unpin", "discard"]), st.integers(0, 9), st.integers(1, 3)), max_size=60))
def test_random_use_keeps_the_accounts_and_never_overlaps_records(steps):
    dram = DramTier(Arena(8 * BLOCK))
    pinned: list[tuple[int, object]] = []
    for step, expert, blocks in steps:
        source = Seed(1, expert)
        if step == "put" and not dram.holds(source):
            try:
                entry = dram.reserve(blocks * BLOCK)
            except TierFull:
                assert sum(entry.extent.size for entry in {entry for _, entry in pinned}) > 0
                continue
            entry.record[:] = bytes([expert]) * (blocks * BLOCK)
            dram.publish(entry, source, NO_SUMS, 1)
            dram.unpin(entry)
        elif step == "take" and (entry := dram.take(source)):
            pinned.append((expert, entry))
        elif step == "unpin" and pinned:
            dram.unpin(pinned.pop(expert % len(pinned))[1])
        elif step == "discard":
            dram.discard(source)
        for number, entry in pinned:
            assert bytes(entry.record) == bytes([number]) * entry.extent.size
        stats = dram.snapshot_stats()
        assert stats.pinned_bytes == sum(entry.extent.size for entry in {entry for _, entry in pinned})
        assert stats.num_records == dram.records_by_bank[1] == len(residents(dram))
        assert stats.used_bytes + stats.free_bytes == 8 * BLOCK


def test_an_arena_larger_than_the_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(arena_module, "available_bytes", lambda: 1 << 30)
    check_dram_bytes(512 << 20)
    with pytest.raises(InvalidRequest, match=f"dram_bytes: {1 << 30} bytes do not fit; {1 << 30} bytes"):
        check_dram_bytes(1 << 30)


@pytest.mark.parametrize("num_bytes", [0, 4095, 4097])
def test_an_arena_of_uneven_size_is_refused(num_bytes):
    with pytest.raises(InvalidRequest, match=f"dram_bytes: {num_bytes} is not a positive multiple"):
        check_dram_bytes(num_bytes)

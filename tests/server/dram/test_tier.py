"""The DRAM tier alone: an arena of four blocks, unless a test says otherwise."""

import asyncio
import contextlib
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_moe_server.catalog.catalog import Seed, Slot
from ooc_moe_server.daemon.config import DramPolicy
from ooc_moe_server.dram import arena as arena_module
from ooc_moe_server.dram.arena import Arena, check_dram_bytes
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.engine import Engine
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import InvalidRequest, TierFull
from ooc_moe_wire.policy import make_policy

BLOCK = 4096
NO_SUMS = Checksums(0, 0)


@pytest.fixture
def dram():
    return DramTier(Arena(4 * BLOCK))


def put(dram, expert, blocks=1, **options):
    """Makes a resident without a pin."""
    entry = dram.reserve(blocks * BLOCK)
    dram.publish(entry, Seed(1, expert), NO_SUMS, 1, **options)
    dram.unpin(entry)
    return entry


def prefetch(dram, expert, blocks=1, wasted=lambda: None):
    """Makes a resident that a prefetch brought."""
    entry = dram.reserve(blocks * BLOCK, speculative=True)
    dram.publish(entry, Seed(1, expert), NO_SUMS, 1, wasted=wasted)
    dram.unpin(entry)


def demand(dram, *experts):
    """Demands each of these experts and unpins it."""
    for expert in experts:
        dram.unpin(dram.pin_resident(Seed(1, expert)))


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
    pinned = dram.pin_resident(Seed(1, 0))
    put(dram, 4)
    assert residents(dram) == [0, 2, 3, 4]
    dram.unpin(pinned)
    put(dram, 5)
    put(dram, 6)
    assert 0 in residents(dram)  # It was used after 2 and 3.


def test_when_everything_is_pinned_the_tier_is_full_and_says_so(dram):
    for expert in range(4):
        put(dram, expert)
        dram.pin_resident(Seed(1, expert))
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
    entry = dram.pin_resident(Seed(1, 0))
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


def test_speculation_evicts_the_longest_undemanded_half_and_no_more(dram):
    for expert in range(4):
        put(dram, expert)
    demand(dram, 0, 2, 1)  # 1 and 2 are half of the arena.
    assert dram.speculative_bytes == 2 * BLOCK
    prefetch(dram, 10)
    prefetch(dram, 11)
    assert residents(dram) == [1, 2, 10, 11]
    prefetch(dram, 12)
    assert residents(dram) == [1, 2, 11, 12]


def test_when_only_pinned_and_lately_demanded_records_are_left_speculation_is_refused_and_a_demand_is_not(dram):
    for expert in range(4):
        put(dram, expert)
    demand(dram, 0, 1)
    pinned = [dram.pin_resident(Seed(1, expert), demand=False) for expert in (2, 3)]
    assert dram.speculative_bytes == 0
    with pytest.raises(TierFull, match="8192 of 16384 bytes are pinned, 8192 others were demanded lately"):
        dram.reserve(BLOCK, speculative=True)
    assert residents(dram) == [0, 1, 2, 3]
    put(dram, 4)
    assert residents(dram) == [1, 2, 3, 4]
    dram.unpin(pinned[0])
    prefetch(dram, 5)
    assert residents(dram) == [1, 3, 4, 5]


def test_a_demand_may_evict_what_prefetches_brought(dram):
    wasted = []
    for expert in range(4):
        prefetch(dram, expert, wasted=lambda expert=expert: wasted.append(expert))
    demand(dram, 0)
    for expert in range(10, 13):
        put(dram, expert)
    assert residents(dram) == [0, 10, 11, 12]
    assert wasted == [1, 2, 3]


def test_prefetches_that_nobody_asked_for_leave_first_for_others_beyond_half_of_the_arena(dram):
    prefetch(dram, 0)
    prefetch(dram, 1)
    put(dram, 2)
    put(dram, 3)
    dram.touch(Seed(1, 0))
    dram.touch(Seed(1, 1))  # 2 and 3 would leave first by the policy.
    prefetch(dram, 4)
    assert residents(dram) == [1, 2, 3, 4]
    demand(dram, 1)  # Now only 4 is unasked for, so the policy decides again.
    prefetch(dram, 5)
    assert residents(dram) == [1, 3, 4, 5]


def test_asking_for_a_record_for_a_prefetch_protects_nothing(dram):
    for expert in range(4):
        put(dram, expert)
    for expert in range(4):
        dram.unpin(dram.pin_resident(Seed(1, expert), demand=False))
    assert dram.speculative_bytes == 4 * BLOCK


def test_a_window_for_speculation_spares_protected_neighbours():
    dram = DramTier(Arena(6 * BLOCK))
    for expert in range(6):
        put(dram, expert)
    demand(dram, 1, 4)
    prefetch(dram, 10, blocks=2)
    assert residents(dram) == [0, 1, 4, 5, 10]
    with pytest.raises(TierFull):
        dram.reserve(3 * BLOCK, speculative=True)
    put(dram, 11, blocks=3)
    assert dram.holds(Seed(1, 11))


def test_a_newer_version_takes_the_place_of_the_older_one(dram):
    for expert in range(4):
        put(dram, expert)
    demand(dram, 0)
    dram.discard(Seed(1, 3))
    put(dram, 10, replaces=Seed(1, 0))
    assert residents(dram) == [1, 2, 10]
    assert dram.records_by_bank[1] == 3
    assert dram.speculative_bytes == 3 * BLOCK  # It is protected as the older one was.
    put(dram, 11, replaces=Seed(1, 0))  # The older one is not resident, so the new one is an ordinary newcomer.
    assert residents(dram) == [1, 2, 10, 11]
    put(dram, 12)
    assert residents(dram) == [2, 10, 11, 12]


def test_with_s3_fifo_a_record_that_is_pushed_again_and_again_keeps_its_standing():
    dram = DramTier(Arena(4 * BLOCK), make_policy("s3fifo"))
    assert dram.snapshot_stats().policy == "s3fifo"
    for expert in range(4):
        put(dram, expert)
    for version in range(3):
        entry = dram.pin_resident(Seed(1, 0) if version == 0 else Slot(BLOCK, version))
        dram.unpin(entry)
        entry = dram.reserve(BLOCK)
        dram.publish(entry, Slot(BLOCK, version + 1), NO_SUMS, 1, replaces=Seed(1, 0) if version == 0 else Slot(BLOCK, version))
        dram.unpin(entry)
    for expert in range(10, 20):
        put(dram, expert)
    assert dram.holds(Slot(BLOCK, 3))


def test_touching_and_then_taking_is_one_use():
    """A fetch first touches and then pins each of its records; S3-FIFO counts uses."""
    dram = DramTier(Arena(4 * BLOCK), make_policy("s3fifo"))
    for expert in range(4):
        put(dram, expert)
    dram.touch(Seed(1, 0))
    demand(dram, 0)  # It was used once: it is evicted in its turn.
    dram.touch(Seed(1, 1))
    demand(dram, 1, 1)  # It was used twice: it moves to the main queue.
    put(dram, 4)
    put(dram, 5)
    assert residents(dram) == [1, 3, 4, 5]


def test_an_unsaved_record_keeps_its_bytes_and_its_place_when_it_gets_its_slot(dram):
    for expert in range(4):
        put(dram, expert)
    pinned = dram.pin_resident(Seed(1, 0))
    dram.rename(Seed(1, 0), Slot(BLOCK, 7))
    assert not dram.holds(Seed(1, 0))
    dram.unpin(pinned)
    assert dram.pin_resident(Slot(BLOCK, 7)) is pinned
    dram.unpin(pinned)
    dram.rename(Seed(1, 0), Slot(BLOCK, 8))  # Not resident: nothing to do.
    assert not dram.holds(Slot(BLOCK, 8))
    dram.discard(Slot(BLOCK, 7))
    assert dram.snapshot_stats().free_bytes == BLOCK


def test_speculation_takes_no_room_that_a_demand_waits_for(dram):
    async def scenario():
        held = [dram.reserve(BLOCK), dram.reserve(2 * BLOCK)]
        waiting = asyncio.create_task(dram.reserve_soon(3 * BLOCK, patience_s=30))
        await asyncio.sleep(0)
        with pytest.raises(TierFull, match="1 demands and pushes wait"):
            dram.reserve(BLOCK, speculative=True)  # A block is free.
        dram.unpin(held[1])
        with pytest.raises(TierFull, match="wait for room"):
            dram.reserve(BLOCK, speculative=True)
        await waiting
        with pytest.raises(TierFull, match="pinned"):
            dram.reserve(BLOCK, speculative=True)

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.booleans()), max_size=40),
    st.integers(1, 16),
    st.sampled_from(["lru", "s3fifo"]),
)
def test_any_record_that_the_arena_could_hold_finds_room_once_nothing_is_pinned(records, blocks, policy):
    """This holds however much records of many sizes have fragmented the arena."""
    dram = DramTier(Arena(16 * BLOCK), make_policy(policy))
    pinned = []
    for expert, size, keep in records:
        if not dram.holds(Seed(1, expert)):
            with contextlib.suppress(TierFull):
                put(dram, expert, blocks=size)
        if keep and (entry := dram.pin_resident(Seed(1, expert))):
            pinned.append(entry)
    for entry in pinned:
        dram.unpin(entry)
    assert dram.reserve(blocks * BLOCK).extent.size == blocks * BLOCK


SPECULATIVE_STEPS = st.tuples(
    st.sampled_from(["put", "prefetch", "demand", "pin", "unpin", "discard"]), st.integers(0, 9), st.integers(1, 3)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(SPECULATIVE_STEPS, min_size=10, max_size=60), st.sampled_from(["lru", "s3fifo"]))
def test_speculation_never_evicts_what_is_pinned_or_among_the_last_demanded_half(steps, policy):
    dram = DramTier(Arena(8 * BLOCK), make_policy(policy))
    sizes: dict[int, int] = {}
    demanded: list[int] = []  # The twin of what is protected, the newest last.
    pinned = []
    for step, expert, blocks in steps:
        before = set(residents(dram))
        if step in ("demand", "pin", "discard") and before:
            expert = sorted(before)[expert % len(before)]
        if step == "put" and expert not in before:
            with contextlib.suppress(TierFull):
                put(dram, expert, blocks)
                sizes[expert] = blocks
        elif step == "prefetch" and expert not in before:
            kept = set(demanded) | {number for number, entry in pinned if entry.source == Seed(1, number)}
            with contextlib.suppress(TierFull):
                prefetch(dram, expert, blocks)
                sizes[expert] = blocks
            assert kept & before <= set(residents(dram))
        elif step == "demand" and expert in before:
            demand(dram, expert)
            demanded = [number for number in demanded if number != expert] + [expert]
            while sum(sizes[number] for number in demanded) > 4:
                demanded.pop(0)
        elif step == "pin" and expert in before:
            pinned.append((expert, dram.pin_resident(Seed(1, expert), demand=False)))
        elif step == "unpin" and pinned:
            dram.unpin(pinned.pop(expert % len(pinned))[1])
        elif step == "discard":
            dram.discard(Seed(1, expert))
        demanded = [number for number in demanded if dram.holds(Seed(1, number))]
        idle = set(demanded) - {number for number, entry in pinned if entry.source == Seed(1, number)}
        protected_bytes = BLOCK * sum(sizes[number] for number in idle)
        assert dram.speculative_bytes == 8 * BLOCK - dram.snapshot_stats().pinned_bytes - protected_bytes


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
        elif step == "take" and (entry := dram.pin_resident(source)):
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


@pytest.mark.parametrize("policy", get_args(DramPolicy))
def test_the_daemons_tier_runs_by_the_policy_it_was_told(tmp_path, policy):
    async def scenario():
        engine = await Engine.open(tmp_path, 4 * BLOCK, dram_policy=policy)
        shown = engine.snapshot_stats().dram.policy
        await engine.close()
        return shown

    assert asyncio.run(scenario()) == policy


def test_an_arena_larger_than_the_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(arena_module, "available_bytes", lambda: 1 << 30)
    check_dram_bytes(512 << 20)
    with pytest.raises(InvalidRequest, match=f"dram_bytes: {1 << 30} bytes do not fit; {1 << 30} bytes"):
        check_dram_bytes(1 << 30)


@pytest.mark.parametrize("num_bytes", [0, 4095, 4097])
def test_an_arena_of_uneven_size_is_refused(num_bytes):
    with pytest.raises(InvalidRequest, match=f"dram_bytes: {num_bytes} is not a positive multiple"):
        check_dram_bytes(num_bytes)

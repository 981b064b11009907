"""Quotas of a store and of a bank, and the disk space of deleted records."""

import asyncio

import pytest

from ooc_moe_server.nvme import slab as slab_module
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.layout import BankSpec
from tests.server.engine_store import LAYOUT, RECORD, body_of, opened


def kinds(outcomes) -> list[str]:
    return [outcome.error.kind for outcome in outcomes.values()]


def test_a_full_store_refuses_new_records_and_says_the_way_out(tmp_path):
    async def scenario():
        async with opened(tmp_path, nvme_bytes=3 * RECORD) as store:
            await store.push({expert: body_of(expert) for expert in range(3)})
            refused = await store.push_one(3, 3)
            assert refused.error.kind == "TierFull"
            assert all(word in refused.error.message for word in ("nvme_bytes", str(3 * RECORD), "--nvme-bytes", "delete"))
            # If it were acknowledged, it could never be written.
            assert (await store.push_one(3, 3, in_memory=True)).error.kind == "TierFull"
            assert store.stats.dram.pinned_bytes == 0

    asyncio.run(scenario())


def test_the_refusal_says_when_to_try_again(tmp_path):
    async def scenario():
        async with opened(tmp_path, nvme_bytes=RECORD) as store:
            await store.push_one(0, 0)
            with pytest.raises(TierFull) as caught:
                await store.engine.nvme.allocate(RECORD)
            assert caught.value.retry_after_ms > 0

    asyncio.run(scenario())


@pytest.mark.parametrize("growth_bytes", [slab_module.GROWTH_BYTES, 1])
def test_a_full_store_still_overwrites_what_it_holds_many_at_once(tmp_path, monkeypatch, growth_bytes):
    monkeypatch.setattr(slab_module, "GROWTH_BYTES", growth_bytes)  # 1: the slab grows for each record, and the others wait.

    async def scenario():
        async with opened(tmp_path, nvme_bytes=3 * RECORD) as store:
            for number in range(5):
                outcomes = await store.push({expert: body_of(10 * number + expert) for expert in range(3)})
                assert kinds(outcomes) == [""] * 3
            assert store.stats.nvme.used_bytes == 3 * RECORD
            assert await store.bodies(0, 1, 2) == {expert: body_of(40 + expert) for expert in range(3)}
            assert (await store.push_one(3, 3)).error.kind == "TierFull"

    asyncio.run(scenario())


def test_snapshots_count_and_to_delete_them_makes_room(tmp_path):
    async def scenario():
        async with opened(tmp_path, nvme_bytes=3 * RECORD) as store:
            await store.push({0: body_of(0), 1: body_of(1)})
            snapshot = await store.engine.changes.create_snapshot(["b"], "")
            assert (await store.push_one(0, 2)).version
            assert (await store.push_one(1, 2)).error.kind == "TierFull"  # The snapshot keeps the old one.
            await store.engine.changes.delete_snapshot(snapshot.id)
            assert (await store.push_one(1, 2)).version

    asyncio.run(scenario())


def test_the_quota_holds_after_a_restart_and_shows_as_the_tiers_capacity(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push({0: body_of(0), 1: body_of(1)})
            assert store.stats.nvme.capacity_bytes > 100 * RECORD
        async with opened(tmp_path, nvme_bytes=2 * RECORD) as store:
            assert (await store.push_one(2, 2)).error.kind == "TierFull"
            nvme = store.stats.nvme
            assert (nvme.capacity_bytes, nvme.used_bytes, nvme.free_bytes) == (2 * RECORD, 2 * RECORD, 0)

    asyncio.run(scenario())


def test_a_bank_may_hold_so_many_records_and_another_as_many(tmp_path):
    async def scenario():
        async with opened(tmp_path, bank_bytes=2 * RECORD) as store:
            outcomes = await store.push({expert: body_of(expert) for expert in range(4)})  # All at once.
            assert sorted(kinds(outcomes)) == ["", "", "TierFull", "TierFull"]
            message = next(outcome.error.message for outcome in outcomes.values() if outcome.error.kind)
            assert all(word in message for word in ("bank_bytes", str(2 * RECORD), "'b'", "--bank-bytes"))
            assert kinds(await store.push({0: body_of(7), 1: body_of(8)})) == ["", ""]  # No new records.
            assert (await store.push_one(2, 2, in_memory=True)).error.kind == "TierFull"
            store.bank = await store.engine.changes.create_bank(BankSpec(name="other", num_experts=4, layout=LAYOUT))
            assert (await store.push_one(2, 2)).version

    asyncio.run(scenario())


def test_a_deleted_banks_disk_goes_back_to_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_module, "RESERVE_BYTES", 2 * RECORD)
    path = tmp_path / "slabs" / f"{RECORD}.slab"

    async def scenario():
        async with opened(tmp_path) as store:
            await store.push({expert: body_of(expert) for expert in range(8)})
            kept = await store.engine.changes.create_bank(BankSpec(name="kept", num_experts=4, layout=LAYOUT))
            store.bank, deleted = kept, store.bank
            await store.push({0: body_of(20)})
            before = path.stat().st_blocks
            await store.engine.changes.delete_bank(deleted.name)
            await store.engine.nvme.drain()
            assert path.stat().st_blocks * 512 == 3 * RECORD < before * 512
            # Some of these slots had their disk blocks punched out.
            await store.push({expert: body_of(20 + expert) for expert in range(4)})
            store.drop_from_dram(*range(4))
            assert await store.bodies(*range(4)) == {expert: body_of(20 + expert) for expert in range(4)}

    asyncio.run(scenario())

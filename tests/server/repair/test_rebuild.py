"""`ooc-moe-server rebuild`: the index that it makes from records and manifests equals the lost one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace

import pytest

from ooc_moe_server.daemon import cli, data_dir
from ooc_moe_server.index import commit_witness
from ooc_moe_server.index.database import VERSION_RESERVE, Index
from ooc_moe_server.repair.rebuild import rebuild
from ooc_moe_wire.codec import Checksums, RecordHeader
from ooc_moe_wire.errors import CorruptRecord
from ooc_moe_wire.layout import BankSpec
from tests.server.engine_store import LAYOUT, RECORD, SEEDED, Store, body_of, flip, opened


def run(directory, scenario):
    """Opens an engine on the directory, as a daemon would, runs a scenario against it, and closes it."""

    async def with_engine():
        async with opened(directory) as store:
            return await scenario(store)

    with data_dir.held(directory):
        return asyncio.run(with_engine())


def lose_index(directory):
    for path in directory.glob("index.sqlite*"):
        path.unlink()


def committed_state(directory):
    """The whole content of the index as comparable values, with banks by uuid."""
    index = Index(directory / "index.sqlite")
    catalog = index.read()
    index.close()
    uuids = {bank.id: bank.uuid for bank in catalog.banks.values()}
    banks = {
        bank.uuid: (bank.spec, bank.num_experts, bank.created_unix_ms, bank.forked_from, bank.records) for bank in catalog.banks.values()
    }
    snapshots = {
        each.id: (each.name, each.created_unix_ms, {uuids[bank]: (state.num_experts, state.records) for bank, state in each.banks.items()})
        for each in catalog.snapshots.values()
    }
    return banks, snapshots


def slot_offset(record):
    return record.slot.index * RECORD


def slab(directory):
    return directory / "slabs" / f"{RECORD}.slab"


def call(monkeypatch, capsys, *arguments):
    """Runs the command in this process; returns the exit code and the output."""
    monkeypatch.setattr(sys, "argv", ["ooc-moe-server", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code, captured.out + captured.err


def other(store, name):
    """A Store for another bank of the same engine."""
    return Store(store.engine, store.engine.catalog.banks[name])


async def a_long_life(store):
    """Growth, forks, snapshots, restores and deletions, with pushes in between and after; returns the bodies of "b"."""
    changes = store.engine.changes
    await store.push({expert: body_of(expert) for expert in range(6)})
    await changes.grow_bank("b", 20)
    await store.push_one(18, 18)
    first = await changes.create_snapshot(["b"], "first")
    await store.push({1: body_of(101), 2: body_of(102)})
    await changes.fork_bank("b", "fork", 0)
    await changes.fork_bank("b", "fork-of-first", first.id)
    await other(store, "fork").push_one(1, 201)
    both = await changes.create_snapshot(["b", "fork"], "both")
    await changes.restore_snapshot(first.id, "")
    await store.push({3: body_of(303), 7: body_of(307)})
    await changes.create_bank(BankSpec(name="gone", num_experts=4, layout=LAYOUT))
    await other(store, "gone").push_one(0, 900)
    await changes.create_snapshot(["gone", "fork"], "half gone")
    await changes.delete_bank("gone")
    await changes.delete_snapshot(both.id)
    await other(store, "fork").push_one(2, 202)
    await store.push_one(3, 304)
    return await store.bodies(*range(20))


def test_a_rebuilt_index_is_the_one_that_was_lost(tmp_path):
    bodies = run(tmp_path, a_long_life)
    before = committed_state(tmp_path)
    lose_index(tmp_path)
    result = rebuild(tmp_path)
    assert result.is_whole, result.damage
    assert (result.num_banks, result.num_snapshots) == (3, 2)
    assert committed_state(tmp_path) == before

    async def reread(store):
        return await store.bodies(*range(20))

    assert run(tmp_path, reread) == bodies
    assert bodies[3] == body_of(304)
    assert bodies[19] == SEEDED


def test_a_sound_index_is_rebuilt_to_the_same_and_moved_aside_each_time(tmp_path):
    run(tmp_path, a_long_life)
    before = committed_state(tmp_path)
    for number in (1, 2):
        old = (tmp_path / "index.sqlite").read_bytes()
        assert rebuild(tmp_path).is_whole
        assert (tmp_path / f"index.sqlite.damaged-{number}").read_bytes() == old
    assert committed_state(tmp_path) == before


def test_a_repeated_push_is_recognised_after_a_rebuild_and_versions_and_ids_go_on(tmp_path):
    async def before(store):
        snapshot = await store.engine.changes.create_snapshot(["b"], "")
        outcome = await store.push_one(1, 1)
        await store.engine.changes.delete_snapshot(snapshot.id)
        return store.writer_id, outcome, snapshot.id

    writer_id, first, snapshot_id = run(tmp_path, before)
    lose_index(tmp_path)
    rebuild(tmp_path)

    async def after(store):
        store.writer_id = writer_id
        again = await store.push_one(1, 1, base_version=0, push_number=1)
        newer = await store.push_one(2, 2)
        return again, newer.version, (await store.engine.changes.create_snapshot(["b"], "")).id

    again, newer, next_snapshot_id = run(tmp_path, after)
    assert again == first
    assert newer >= first.version + VERSION_RESERVE  # Versions that were acknowledged in memory only are not used again.
    assert next_snapshot_id == snapshot_id + 1


def test_what_was_deleted_or_restored_away_stays_so(tmp_path):
    async def scenario(store):
        empty = await store.engine.changes.create_snapshot(["b"], "empty")
        await store.push({1: body_of(1), 2: body_of(2)})
        await store.engine.changes.restore_snapshot(empty.id, "")
        await store.engine.changes.create_bank(BankSpec(name="c", num_experts=4, layout=LAYOUT))
        await other(store, "c").push_one(0, 3)
        await store.engine.changes.delete_bank("c")
        await store.engine.changes.create_bank(BankSpec(name="c", num_experts=4, layout=LAYOUT))

    run(tmp_path, scenario)
    assert slab(tmp_path).read_bytes().count(body_of(2)) == 1  # The record is still on the disk.
    lose_index(tmp_path)
    assert rebuild(tmp_path).is_whole

    async def look(store):
        return await store.bodies(1, 2), store.bank.record(1).version, await other(store, "c").bodies(0)

    bodies, version, of_namesake = run(tmp_path, look)
    assert (bodies, of_namesake) == ({1: SEEDED, 2: SEEDED}, {0: SEEDED})
    assert version > 0


async def restored_once(store):
    """A store after a restore: expert 1 has a row from it, expert 2 has none."""
    snapshot = await store.engine.changes.create_snapshot(["b"], "s")
    await store.push_one(1, 1)
    await store.engine.changes.restore_snapshot(snapshot.id, "")
    return store.bank.uuid, store.bank.record(1).version


@pytest.mark.parametrize(
    ("expert", "change", "is_taken"),
    [
        (1, lambda header, row: header, True),
        (1, lambda header, row: replace(header, base_version=row - 1), False),  # Refused by the restore: it began before.
        (2, lambda header, row: replace(header, base_version=0), True),
        (2, lambda header, row: replace(header, base_version=0, version=row - 1), False),  # Never committed before the restore.
        (1, lambda header, row: replace(header, bank_id=b"d" * 16), False),  # A record of a deleted bank.
        (1, lambda header, row: replace(header, version=row + 1000), False),  # Beyond the last commit: cut off by the crash.
    ],
)
def test_a_record_is_current_again_only_if_it_can_have_been_committed(tmp_path, expert, change, is_taken):
    uuid, row = run(tmp_path, restored_once)
    body = bytearray(RECORD)
    body[4096:] = body_of(5)
    last, _ = commit_witness.read(tmp_path / "COMMITTED")
    commit_witness.renew(tmp_path / "COMMITTED", replace(last, next_version=row + 2))
    header = RecordHeader(
        bank_id=uuid,
        expert=expert,
        version=row + 1,
        parameter_bytes=LAYOUT.parameter_bytes,
        optimizer_bytes=0,
        checksums=Checksums.of(LAYOUT, memoryview(body)[4096:]),
        base_version=row,
    )
    change(header, row).pack_into(memoryview(body))
    with slab(tmp_path).open("r+b") as file:
        file.seek(7 * RECORD)
        file.write(body)
    lose_index(tmp_path)
    assert rebuild(tmp_path).is_whole

    async def look(store):
        return await store.bodies(expert)

    assert run(tmp_path, look) == {expert: body_of(5) if is_taken else SEEDED}


def test_a_damaged_record_falls_back_to_an_older_one_and_one_without_is_lost(tmp_path, monkeypatch, capsys):
    async def scenario(store):
        older = (await store.push_one(1, 1)).version
        await store.push({1: body_of(2), 3: body_of(3), 4: body_of(4)})
        return older, store.bank.record(1), store.bank.record(3)

    older, newer, only = run(tmp_path, scenario)
    for record in (newer, only):
        flip(slab(tmp_path), slot_offset(record) + 5000)
    lose_index(tmp_path)
    code, printed = call(monkeypatch, capsys, "rebuild", tmp_path)
    assert code == 1
    assert f"bank 'b', expert 1: version {newer.version} is damaged" in printed
    assert f"bank 'b', expert 1: version {older} is current again" in printed
    assert "bank 'b', expert 3: lost" in printed
    assert "expert 4" not in printed

    async def look(store):
        served = [each async for each in store.fetch(1, 3, 4)]
        return {each.expert: type(each.error) for each in served}, store.bank.record(1).version

    kinds, version = run(tmp_path, look)
    assert kinds == {1: type(None), 3: CorruptRecord, 4: type(None)}
    assert version == older


def test_a_damaged_header_is_reported_for_a_newer_record_may_have_been_there(tmp_path):
    async def scenario(store):
        await store.push_one(1, 1)
        return store.bank.record(1)

    flip(slab(tmp_path), slot_offset(run(tmp_path, scenario)) + 20)
    lose_index(tmp_path)
    result = rebuild(tmp_path)
    assert not result.is_whole
    assert "header block is damaged" in result.damage[0]


def test_a_damaged_manifest_is_replaced_by_a_sound_index_and_else_named_and_kept(tmp_path):
    run(tmp_path, a_long_life)
    before = committed_state(tmp_path)
    manifest = next(path for path in (tmp_path / "banks").iterdir() if json.loads(path.read_bytes())["content"]["spec"]["name"] == "fork")
    flip(manifest, 200)
    result = rebuild(tmp_path)
    assert len(result.damage) == 1
    assert "taken from the old index" in result.damage[0]
    assert committed_state(tmp_path) == before
    flip(manifest, 200)
    lose_index(tmp_path)
    result = rebuild(tmp_path)
    assert f"manifest banks/{manifest.name}: its checksum does not match" in result.damage[0]
    assert manifest.with_name(manifest.name + ".damaged-2").exists()
    assert sorted(spec.name for spec, *_ in committed_state(tmp_path)[0].values()) == ["b", "fork-of-first"]


def test_without_committed_numbers_leap_so_that_none_is_used_twice(tmp_path):
    async def scenario(store):
        return (await store.push_one(1, 1)).version

    newest = run(tmp_path, scenario)
    lose_index(tmp_path)
    (tmp_path / "COMMITTED").unlink()
    assert rebuild(tmp_path).is_whole

    async def push(store):
        return (await store.push_one(1, 2)).version

    assert run(tmp_path, push) > newest + (1 << 32)


@pytest.mark.parametrize("step", ["index.sqlite", "COMMITTED"])
def test_a_rebuild_that_was_cut_off_can_be_repeated(tmp_path, monkeypatch, step):
    bodies = run(tmp_path, a_long_life)
    before = committed_state(tmp_path)
    (tmp_path / "COMMITTED").unlink()
    replaced = os.replace

    def cut_off(source, target):
        if target == tmp_path / step:
            raise OSError("cut off")
        replaced(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut_off)
        with pytest.raises(OSError, match="cut off"):
            rebuild(tmp_path)
    with pytest.raises(CorruptRecord, match="rebuild"):  # The start must create neither an empty store nor half of one.
        Index(tmp_path / "index.sqlite")
    assert rebuild(tmp_path).is_whole
    assert committed_state(tmp_path) == before

    async def reread(store):
        return await store.bodies(*range(20))

    assert run(tmp_path, reread) == bodies


def test_a_start_brings_manifests_in_line_with_the_index(tmp_path):
    async def scenario(store):
        await store.push_one(1, 1)
        await store.engine.changes.create_snapshot(["b"], "s")

    run(tmp_path, scenario)
    before = committed_state(tmp_path)
    (bank,), (snapshot,) = (tmp_path / "banks").iterdir(), (tmp_path / "snapshots").iterdir()
    stray = bank.with_name(f"{b'd'.hex() * 16}.json")
    stray.write_bytes(bank.read_bytes())
    bank.unlink()
    flip(snapshot, 100)

    async def nothing(store):
        pass

    run(tmp_path, nothing)
    assert not stray.exists()
    lose_index(tmp_path)
    assert rebuild(tmp_path).is_whole
    assert committed_state(tmp_path) == before


def test_the_command_says_what_came_back_and_refuses_what_is_no_store_or_in_use(tmp_path, monkeypatch, capsys):
    async def scenario(store):
        await store.push_one(1, 1)

    run(tmp_path / "store", scenario)
    lose_index(tmp_path / "store")
    code, printed = call(monkeypatch, capsys, "rebuild", tmp_path / "store")
    assert (code, printed) == (0, "rebuilt, whole: 1 banks, 1 written experts, 0 snapshots, 8.0 KiB verified\n")
    code, printed = call(monkeypatch, capsys, "rebuild", tmp_path)
    assert (code, printed.startswith("error: ")) == (2, True)
    with data_dir.held(tmp_path / "store"):
        code, printed = call(monkeypatch, capsys, "rebuild", tmp_path / "store")
    assert code == 2
    assert "held" in printed

"""A full disk, simulated by writes that fail until the reserve is emptied: it stops pushes, but no deletion and no start."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3

import pytest

from ooc_moe_server.atomic_files import write_durably
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.tables import Tables
from ooc_moe_server.nvme import reserve
from ooc_moe_server.nvme.reserve import RESERVE_BYTES_MIN, Reserve
from ooc_moe_wire.errors import TierFull
from ooc_moe_wire.layout import BankSpec
from tests.server.engine_store import LAYOUT, body_of, opened

FULL = OSError(errno.ENOSPC, "no room")


class FullDisk:
    """While `is_full`: writes to index and manifests fail as long as RESERVE occupies space, and RESERVE cannot be filled again."""

    def __init__(self, directory, monkeypatch) -> None:
        self.is_full = False
        self.reserve = Reserve(directory)
        monkeypatch.setattr(Tables, "insert", self._unless_full(Tables.insert))
        monkeypatch.setattr(Tables, "remove", self._unless_full(Tables.remove))
        monkeypatch.setattr(Index, "_check_against_witness", self._unless_full(Index._check_against_witness))
        monkeypatch.setattr("ooc_moe_server.index.manifests.write_durably", self._unless_full(write_durably))
        grow = reserve._grow
        monkeypatch.setattr(reserve, "_grow", lambda fd, held, wanted: held if self.is_full else grow(fd, held, wanted))

    def _unless_full(self, work):
        def attempt(*arguments, **options):
            if self.is_full and self.reserve.held_bytes:
                raise FULL
            return work(*arguments, **options)

        return attempt


@pytest.fixture
def disk(tmp_path, monkeypatch):
    return FullDisk(tmp_path, monkeypatch)


def test_on_a_full_disk_pushes_and_new_banks_are_refused_and_leave_the_reserve_alone(tmp_path, disk):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push_one(1, 1)
            disk.is_full = True
            assert (await store.push_one(2, 2)).error.kind == TierFull.__name__
            with pytest.raises(TierFull):
                await store.engine.changes.create_bank(BankSpec(name="c", num_experts=4, layout=LAYOUT))
            assert disk.reserve.held_bytes >= RESERVE_BYTES_MIN
            assert await store.bodies(1) == {1: body_of(1)}
            disk.is_full = False
            assert (await store.push_one(2, 2)).version > 0

    asyncio.run(scenario())


def test_on_a_full_disk_banks_and_snapshots_can_be_deleted_and_a_daemon_can_start(tmp_path, disk):
    async def fill():
        async with opened(tmp_path) as store:
            await store.push_one(1, 1)
            await store.engine.changes.create_bank(BankSpec(name="c", num_experts=4, layout=LAYOUT))
            return [(await store.engine.changes.create_snapshot(["b", "c"], name)).id for name in ("one", "two")]

    async def delete(snapshot_id):
        async with opened(tmp_path) as store:
            disk.is_full = True
            await store.engine.changes.delete_snapshot(snapshot_id)
            await store.engine.changes.delete_bank("c")
            with pytest.raises(TierFull, match="full"):  # The reserve is in use.
                await store.engine.changes.create_snapshot(["b"], "three")
            disk.is_full = False
            await store.engine.changes.create_snapshot(["b"], "three")
            assert disk.reserve.held_bytes >= RESERVE_BYTES_MIN

    one, _ = asyncio.run(fill())
    disk.is_full = True

    async def start():
        async with opened(tmp_path) as store:
            return sorted(store.engine.catalog.banks)

    assert asyncio.run(start()) == ["b", "c"]
    disk.is_full = False
    asyncio.run(delete(one))

    async def look():
        async with opened(tmp_path) as store:
            return sorted(store.engine.catalog.banks), sorted(each.name for each in store.engine.catalog.snapshots.values())

    assert asyncio.run(look()) == (["b"], ["three", "two"])


def test_work_is_tried_once_more_without_the_reserve_which_is_then_taken_again(tmp_path):
    kept = Reserve(tmp_path)
    kept.fill()
    assert kept.held_bytes == RESERVE_BYTES_MIN
    sqlite_full = sqlite3.OperationalError("full")
    sqlite_full.sqlite_errorcode = sqlite3.SQLITE_FULL
    for error in (FULL, sqlite_full):
        seen = []

        def work(seen=seen, error=error):
            seen.append(kept.held_bytes)
            if kept.held_bytes:
                raise error
            return "done"

        assert kept.run(work) == "done"
        assert seen == [RESERVE_BYTES_MIN, 0]
        assert kept.held_bytes == RESERVE_BYTES_MIN


def test_other_errors_leave_the_reserve_alone(tmp_path):
    kept = Reserve(tmp_path)
    kept.fill()

    def broken():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        kept.run(broken)
    assert kept.held_bytes == RESERVE_BYTES_MIN


def test_a_disk_that_is_full_from_the_start_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise FULL

    monkeypatch.setattr(os, "posix_fallocate", full)
    kept = Reserve(tmp_path)
    kept.fill()
    assert kept.held_bytes == 0
    assert "the disk is full: 0 of" in caplog.text
    with pytest.raises(OSError, match="reserve"):
        kept.require()

"""Disks that are full, fail, move only some bytes, or cannot sync: the error is typed, the store goes on, and nothing is lost.

python -m pytest tests/torture/test_faults.py
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
import sqlite3
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest

from ooc_moe_server.catalog.catalog import Slot
from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.nvme import slab
from ooc_moe_wire.errors import CorruptRecord, Internal, NotFound, OocMoeError, TierFull, error_named
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import expert_pb2
from tests.torture.failing_disk import DISK_FULL, FailingDisk, Fault
from tests.torture.killed import Threads
from tests.torture.promises import LARGE, BankPromise, Ledger, SnapshotPromise, Value, fetch, push, random_body, write_back
from tests.torture.workload import Workload

DRAM_BYTES = 64 << 10  # Five records.
NUM_EXPERTS = 8
FULL, IOERR = sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR
OS_ERRORS, SQLITE_ERRORS = (errno.EIO, errno.ENOSPC), (FULL, IOERR)
PUSHES = ("push", "memory push")
CHANGES = ("create", "grow", "fork", "snapshot", "restore")
REMOVALS = ("drop", "delete")
# What breaks -> files, calls, errors, and the operations that use them.
PLACES: dict[str, tuple[str, list[str], tuple[int, ...], tuple[str, ...]]] = {
    "slab write": ("slabs/", ["pwritev"], (*OS_ERRORS, errno.EDQUOT), PUSHES),
    "slab growth": ("slabs/", ["posix_fallocate"], (*OS_ERRORS, errno.EDQUOT), PUSHES),
    "slab sync": ("slabs/", ["fdatasync"], OS_ERRORS, PUSHES),
    "begin": ("index.sqlite", ["BEGIN"], SQLITE_ERRORS, PUSHES + CHANGES + REMOVALS),
    "row": ("index.sqlite", ["INSERT"], SQLITE_ERRORS, PUSHES + CHANGES + REMOVALS),
    "commit": ("index.sqlite", ["COMMIT"], SQLITE_ERRORS, PUSHES + CHANGES + REMOVALS),
    "COMMITTED write": ("COMMITTED", ["pwrite"], OS_ERRORS, PUSHES + CHANGES + REMOVALS),
    "COMMITTED sync": ("COMMITTED", ["fdatasync"], OS_ERRORS, PUSHES + CHANGES + REMOVALS),
    "manifest creation": (".json", ["create"], OS_ERRORS, CHANGES),
    "manifest write": (".json", ["write"], OS_ERRORS, CHANGES),
    "manifest sync": (".json", ["fsync"], OS_ERRORS, CHANGES),
    "manifest rename": (".json", ["replace"], OS_ERRORS, CHANGES),
    "manifest removal": (".json", ["unlink"], OS_ERRORS, REMOVALS),
}


@pytest.fixture(autouse=True)
def growing_with_nearly_every_push(with_small_files):
    # Not with monkeypatch: it would be undone after small_files, and would restore the wrong value.
    with mock.patch.object(slab, "GROWTH_BYTES", 1):
        yield


@pytest.fixture
def disk() -> Iterator[FailingDisk]:
    with FailingDisk() as disk:
        yield disk


class Attempts:
    """Operations on a store with a history. Each may be repeated after a failure."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ledger = Ledger(itertools.count(1).__next__)
        self.workload = Workload(engine, self.ledger, random.Random(1))
        self.bank: BankPromise
        self.kept: SnapshotPromise
        self.closed = False
        self._created: BankPromise | None = None
        self._taken: SnapshotPromise | None = None

    async def prepare(self) -> None:
        """Makes two banks, a snapshot of one of them, and later changes."""
        for name in ("a", "b"):
            await self.workload.create(name, LARGE, NUM_EXPERTS)
        self.bank, other = self.ledger.banks
        for expert in range(6):
            await self.push(expert_pb2.DURABLE, expert)
        await self.workload.snapshot([self.bank])
        self.kept = self.ledger.snapshots[0]
        await self.push(expert_pb2.DURABLE, 0)
        await self.workload.snapshot([other])

    async def run(self, operation: str) -> None:
        """Runs an operation. Raises the store's error."""
        if operation in ("push", "memory push"):
            await self.push(expert_pb2.DURABLE if operation == "push" else expert_pb2.MEMORY, 1)
            await write_back(self.engine)
        elif operation == "create":
            await self._create()
        elif operation == "grow":
            await self.workload.grow(self.bank)
        elif operation == "fork":
            await self.workload.fork(self.bank)
        elif operation == "snapshot":
            await self._snapshot()
        elif operation == "restore":
            await self.workload.restore(self.kept)
        elif operation == "drop":
            await self.workload.drop(self.kept)
        elif operation == "delete":
            await self.workload.delete(self.ledger.banks[1])

    async def again(self, operation: str) -> None:
        """Repeats an operation after a failure. What it removes may be gone already, as after a lost answer."""
        try:
            await self.run(operation)
        except NotFound:
            assert operation in REMOVALS
            gone: Any = self.kept if operation == "drop" else self.ledger.banks[1]
            gone.deleted = self.ledger.clock()

    async def push(self, durability: int, expert: int) -> None:
        number = next(self.ledger.push_numbers)
        value = Value(body=random_body(LARGE, number), push_number=number, began=self.ledger.clock())
        self.bank.history(expert).append(value)
        base = self.bank.current(expert).version
        assert base is not None
        outcome = (await push(self.engine, self.bank.name, {expert: (base, value.body)}, [number], durability=durability))[expert]
        if outcome.HasField("error"):
            raise error_named(outcome.error.kind, outcome.error.message)
        value.version, value.acknowledged = outcome.version, self.ledger.clock()
        if outcome.durable or durability == expert_pb2.DURABLE:
            value.durable = value.acknowledged

    async def _create(self) -> None:
        if self._created is None:
            spec = BankSpec(name="new", num_experts=3, layout=LARGE, seed=77)
            began = self.ledger.clock()
            self._created = BankPromise(spec=spec, began=began, sizes=[(3, began, began)])
            self.ledger.banks.append(self._created)
        await self.engine.changes.create_bank(self._created.spec)
        self._created.acknowledged = self.ledger.clock()

    async def _snapshot(self) -> None:
        if self._taken is None:
            contents = {self.bank: {expert: self.bank.current(expert).body for expert in range(self.bank.num_experts)}}
            self._taken = SnapshotPromise(name="new", contents=contents, began=self.ledger.clock())
            self.ledger.snapshots.append(self._taken)
        self._taken.id = (await self.engine.changes.create_snapshot([self.bank.name], "new")).id
        self._taken.acknowledged = self.ledger.clock()


@asynccontextmanager
async def attempts(directory):
    directory.mkdir()
    engine = await Engine.open(directory, DRAM_BYTES)
    store = Attempts(engine)
    try:
        await store.prepare()
        yield store
    finally:
        if not store.closed:
            await engine.close()


async def reopened(directory, store: Attempts, moment: float) -> None:
    """Opens the store in a directory and compares it with the promises of a moment."""
    engine = await Engine.open(directory, DRAM_BYTES)
    try:
        await store.ledger.check(engine, moment)
    finally:
        await engine.close()


async def attempt(store: Attempts, operation: str, error: int) -> bool:
    """Tries an operation; returns False when it was refused. It may also succeed, where the store does not need what is broken."""
    try:
        await store.run(operation)
    except OocMoeError as refusal:
        assert isinstance(refusal, TierFull if error in DISK_FULL else Internal), refusal  # noqa: PT017
        return False
    return True


def cases() -> Iterator[Any]:
    """All cases; the default run takes two of each place."""
    for number, (place, (_, _, errors, operations)) in enumerate(PLACES.items()):
        for error, operation in itertools.product(errors, operations):
            chosen = (errors.index(error) + operations.index(operation) + number) % (len(operations) * len(errors) // 2) == 0
            yield pytest.param(place, error, operation, marks=[] if chosen else pytest.mark.slow)


def name_of(error: object) -> str:
    codes = {FULL: "SQLITE_FULL", IOERR: "SQLITE_IOERR"}
    return codes.get(error) or errno.errorcode[error] if isinstance(error, int) else str(error)


@pytest.mark.parametrize(("place", "error", "operation"), list(cases()), ids=name_of)
def test_a_fault_is_told_by_type_and_once_it_is_gone_everything_goes_on(ram_path, disk, place, error, operation):
    async def scenario():
        with Threads().watched() as threads:
            async with attempts(ram_path / "store") as store:
                clock = store.ledger.clock
                with disk.broken(Fault(*PLACES[place][:2], error)) as fault:
                    done = await attempt(store, operation, error)
                    got = await fetch(store.engine, "a", range(NUM_EXPERTS))
                    assert all(isinstance(body, bytes) for _, body in got.values())
                assert fault.num_hits
                threads.copy(ram_path / "store", ram_path / "killed at once")
                first = clock()
                await store.again("push" if done else operation)
                threads.copy(ram_path / "store", ram_path / "killed later")
                second = clock()
                await store.ledger.check(store.engine, second)
                third = clock()
        for state, moment in (("store", third), ("killed later", second), ("killed at once", first)):
            await reopened(ram_path / state, store, moment)

    asyncio.run(scenario())


@pytest.mark.parametrize(("calls", "error"), [(["pwritev"], "short"), (["preadv"], "short")], ids=name_of)
def test_calls_that_do_a_part_of_their_work_are_repeated_until_it_is_done(ram_path, disk, calls, error):
    async def scenario():
        with disk.broken(Fault("slabs/", calls, error)) as fault:
            async with attempts(ram_path / "store") as store:
                await store.run("push")
                await store.ledger.check(store.engine, store.ledger.clock())
            assert fault.num_hits > 10
        await reopened(ram_path / "store", store, store.ledger.clock())

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [errno.EIO, "none"], ids=name_of)
def test_what_cannot_be_read_is_an_error_of_that_expert_and_is_back_once_it_can(ram_path, disk, error):
    async def scenario():
        async with attempts(ram_path / "store") as store:
            for expert in range(6):
                store.engine.dram.discard(slot_of(store, expert))
            with disk.broken(Fault("slabs/", ["preadv"], error, times=1)):
                got = await fetch(store.engine, "a", range(NUM_EXPERTS))
            kinds = [type(body) for _, body in got.values()]
            assert (kinds.count(CorruptRecord), kinds.count(bytes)) == (1, NUM_EXPERTS - 1)
            await store.ledger.check(store.engine, store.ledger.clock())

    asyncio.run(scenario())


@pytest.mark.parametrize("operation", PUSHES)
def test_a_sync_that_fails_once_is_not_asked_again_but_the_records_are_written_to_other_slots(ram_path, disk, operation):
    """A second sync of the same pages would succeed, since they are marked clean, although the data may be lost."""

    async def scenario():
        async with attempts(ram_path / "store") as store:
            before = {record.slot for record in store.engine.catalog.bank("a").records.values()}
            written: list[int] = []
            noted = mock.patch.object(slab.Slab, "write", noting(slab.Slab.write, written))
            with noted, disk.broken(Fault("slabs/", ["fdatasync"], errno.EIO, times=1)) as fault:
                await store.run(operation)
            assert fault.num_hits == 1
            assert len(set(written)) == 2
            assert slot_of(store, 1).index == written[-1]
            assert slot_of(store, 1) not in before
            await store.ledger.check(store.engine, store.ledger.clock())
        await reopened(ram_path / "store", store, store.ledger.clock())

    asyncio.run(scenario())


@pytest.mark.parametrize("operation", ["push", "snapshot", "create"])
def test_a_commit_that_went_through_though_it_was_reported_as_failed_is_there_after_a_restart(ram_path, disk, operation):
    async def scenario():
        async with attempts(ram_path / "store") as store:
            with disk.broken(Fault("index.sqlite", ["after COMMIT"], IOERR, times=1)), pytest.raises(Internal):
                await store.run(operation)
            first = store.ledger.clock()
            await attempt(store, "push", errno.EIO)  # The operation is refused or done. The daemon runs on, and says which.
            got = await fetch(store.engine, "a", range(NUM_EXPERTS))
            assert all(isinstance(body, bytes) for _, body in got.values())
        await reopened(ram_path / "store", store, first)

    asyncio.run(scenario())


def test_a_store_whose_disk_is_broken_for_good_can_be_closed_and_loses_only_what_was_in_memory(ram_path, disk):
    async def scenario():
        async with attempts(ram_path / "store") as store:
            with disk.broken(Fault("slabs/", ["pwritev", "fdatasync"], errno.EIO)):
                await store.push(expert_pb2.MEMORY, 1)
                moment = store.ledger.clock()
                async with asyncio.timeout(60):
                    await store.engine.close()
                store.closed = True
        await reopened(ram_path / "store", store, moment)

    asyncio.run(scenario())


def noting(write: Any, slots: list[int]) -> Any:
    """A Slab.write that also notes the slots."""

    def noted(self: slab.Slab, slot: int, record: memoryview) -> None:
        slots.append(slot)
        write(self, slot, record)

    return noted


def slot_of(store: Attempts, expert: int) -> Slot:
    slot = store.engine.catalog.bank("a").record(expert).slot
    assert slot is not None
    return slot

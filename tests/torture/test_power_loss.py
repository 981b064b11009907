"""Power loss at any moment, with any part of the unsynced writes lost: all durable records survive whole, and nothing is invented.

python -m pytest tests/torture/test_power_loss.py -m slow --results tests/bench/results
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
from pathlib import Path

import pytest

from ooc_moe_server.daemon.data_dir import held
from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.repair.rebuild import rebuild
from ooc_moe_wire.errors import CorruptRecord, OocMoeError
from tests.torture.power_loss import Choice, Recorder, any_part, everything, materialise, nothing, prefix
from tests.torture.promises import LARGE, BrokenPromise, Forgive, Ledger, Value, push, random_body
from tests.torture.workload import Workload

pytestmark = pytest.mark.usefixtures("with_small_files")

DRAM_BYTES = 160 << 10  # A dozen records: fewer than the store holds.


async def record(root: Path, rng: random.Random, *, num_rounds: int, lying: tuple[str, ...] = ()) -> tuple[Recorder, Ledger]:
    """Records the life of a store over a number of rounds, from its first file to an orderly end."""
    root.mkdir()
    with Recorder(root, lying=lying) as recorder:
        ledger = Ledger(recorder.tick)
        with held(root):
            engine = await Engine.open(root, DRAM_BYTES)
            await Workload(engine, ledger, rng).run(num_rounds)
            await engine.close()
    recorder.check_complete()
    return recorder, ledger


async def check(directory: Path, ledger: Ledger, moment: float, damaged: Forgive | None = None) -> int:
    """Opens the surviving files and compares them with the ledger; returns how many experts were refused as damaged."""
    with held(directory):
        try:
            engine = await Engine.open(directory, DRAM_BYTES)
        except CorruptRecord as error:
            raise BrokenPromise(f"the store does not start: {error}") from error
        try:
            return await ledger.check(engine, moment, damaged=damaged)
        finally:
            await engine.close()


def moments(ledger: Ledger, recorder: Recorder, rng: random.Random, count: int) -> list[float]:
    """Random moments; half of them are moments just after an acknowledgement."""
    acknowledged = [value.acknowledged for bank in ledger.banks for history in bank.values.values() for value in history]
    acknowledged += [each for bank in ledger.banks for each in (bank.acknowledged, bank.deleted, *(size[2] for size in bank.sizes))]
    acknowledged += [each for snapshot in ledger.snapshots for each in (snapshot.acknowledged, snapshot.deleted)]
    sharp = sorted({each for each in acknowledged if 0 < each < float("inf")})
    return [rng.choice(sharp) if rng.random() < 0.5 else rng.uniform(sharp[0], recorder.clock) for _ in range(count)]


def draw(rng: random.Random) -> Choice:
    return rng.choice((nothing, everything, prefix(rng), any_part(rng), any_part(rng)))


async def crash(recorder: Recorder, ledger: Ledger, directory: Path, moment: float, rng: random.Random) -> int:
    """Simulates a power loss, sometimes another one during the next start. Returns how many experts a rebuild could not bring back."""
    survivors = recorder.survivors(moment, draw(rng))
    materialise(survivors, directory / "first")
    if rng.random() < 0.3:
        with Recorder(directory / "first") as again, held(directory / "first"):
            engine = await Engine.open(directory / "first", DRAM_BYTES)
            await engine.close()
        again.check_complete()
        survivors = again.survivors(rng.uniform(1, again.clock), draw(rng))
    materialise(survivors, directory / "last")
    materialise(survivors, directory / "rebuilt")
    await check(directory / "last", ledger, moment)
    return await check_rebuilt(directory / "rebuilt", ledger, moment)


async def check_rebuilt(directory: Path, ledger: Ledger, moment: float) -> int:
    """Loses the index as well, and rebuilds it. All promises hold except for experts that the rebuild reports as lost; returns how many."""
    for path in directory.glob("index.sqlite*"):
        path.unlink()
    with held(directory):
        rebuilt = await asyncio.to_thread(rebuild, directory)
    # Known, and counted: an expert's first write, cut off, makes it refused instead of giving its initial value back (see the test below).
    num_lost = sum("lost; fetches raise" in line for line in rebuilt.damage)
    num_refused = await check(directory, ledger, moment, damaged=is_first_write)
    assert num_refused <= num_lost, rebuilt.damage
    return num_refused


def is_first_write(error: OocMoeError, promised: Value | None) -> bool:
    return isinstance(error, CorruptRecord) and promised is not None and promised.version == 0


async def torture(ram_path: Path, seed: int, *, num_workloads: int, num_rounds: int, num_crashes: int) -> tuple[int, int]:
    """Returns how many events were recorded, and how many experts rebuilds could not bring back."""
    num_events = num_refused = 0
    for workload in range(num_workloads):
        rng = random.Random(seed * 1000 + workload)
        root = ram_path / f"store{workload}"
        recorder, ledger = await record(root, rng, num_rounds=num_rounds)
        num_events += recorder.clock
        for number, moment in enumerate(moments(ledger, recorder, rng, num_crashes)):
            directory = ram_path / f"crash{workload}.{number}"
            directory.mkdir()
            try:
                num_refused += await crash(recorder, ledger, directory, moment, rng)
            except Exception as error:
                error.add_note(f"seed {seed}, workload {workload}, crash {number} at event {moment} of {recorder.clock}")
                raise
            shutil.rmtree(directory)
    return num_events, num_refused


def test_what_was_acknowledged_survives_a_power_loss(ram_path, seed):
    asyncio.run(torture(ram_path, seed, num_workloads=3, num_rounds=40, num_crashes=20))


@pytest.mark.parametrize("liar", ["slabs/", "index.sqlite"])
def test_these_tests_notice_a_disk_that_does_not_sync(ram_path, liar):
    async def scenario():
        rng = random.Random(1)
        recorder, ledger = await record(ram_path / "store", rng, num_rounds=20, lying=(liar,))
        num_broken = 0
        for number, moment in enumerate(moments(ledger, recorder, rng, 10)):
            materialise(recorder.survivors(moment, nothing), ram_path / f"crash{number}")
            try:
                await check(ram_path / f"crash{number}", ledger, moment)
            except BrokenPromise:
                num_broken += 1
        assert num_broken >= 5

    asyncio.run(scenario())


def test_a_power_loss_during_the_first_start_leaves_a_directory_that_starts(ram_path):
    async def scenario():
        rng = random.Random(1)
        recorder, ledger = await record(ram_path / "store", rng, num_rounds=0)
        for moment in range(1, recorder.clock):
            materialise(recorder.survivors(moment, draw(rng)), ram_path / f"crash{moment}")
            await check(ram_path / f"crash{moment}", ledger, moment)

    asyncio.run(scenario())


def test_a_first_write_that_was_cut_off_is_refused_and_reported_when_the_index_is_lost_too(ram_path):
    """Such a write looks like an acknowledged record that was damaged later. To go back to the initial value could hide a loss."""

    async def scenario():
        (ram_path / "store").mkdir()
        ledger = Ledger(itertools.count(1).__next__)
        with held(ram_path / "store"):
            engine = await Engine.open(ram_path / "store", DRAM_BYTES)
        workload = Workload(engine, ledger, random.Random(1))
        await workload.create("b", LARGE, 2)
        moment = ledger.clock()
        await push(engine, "b", {0: (0, random_body(LARGE, 1)), 1: (0, random_body(LARGE, 2))}, ledger.push_numbers)
        slot = engine.catalog.bank("b").record(0).slot
        await engine.close()
        with (ram_path / "store" / "slabs" / f"{slot.record_bytes}.slab").open("r+b") as file:
            file.seek((slot.index + 1) * slot.record_bytes - 4096)
            file.write(bytes(4096))
        for expert in (0, 1):
            ledger.banks[0].history(expert).append(Value(body=random_body(LARGE, expert + 1), began=moment))
        (ram_path / "store" / "index.sqlite").unlink()
        with held(ram_path / "store"):
            rebuilt = rebuild(ram_path / "store")
        assert rebuilt.damage
        assert all("expert 0" in line for line in rebuilt.damage), rebuilt.damage
        assert await check(ram_path / "store", ledger, moment, damaged=is_first_write) == 1

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_what_was_acknowledged_survives_thousands_of_power_losses(ram_path, seed, report):
    num_workloads, num_crashes = 40, 50
    num_events, num_refused = asyncio.run(torture(ram_path, seed, num_workloads=num_workloads, num_rounds=60, num_crashes=num_crashes))
    command = f"python -m pytest tests/torture/test_power_loss.py -m slow --results tests/bench/results --torture-seed {seed}"
    counts = {
        "workloads": num_workloads,
        "power losses, each also with the index lost and rebuilt": num_workloads * num_crashes,
        "recorded events (writes, syncs, names; their begin and end)": num_events,
        "promises broken by a start on what survived": 0,  # The first one would have ended the test.
        "experts refused as damaged, and reported, after a rebuild without the index": num_refused,
    }
    report("power_loss", command, counts)

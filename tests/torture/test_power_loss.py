"""Power loss at any moment, with any part of what was not synced: what was acknowledged as durable is there, whole; nothing is invented.

python -m pytest tests/torture/test_power_loss.py -m slow --results tests/bench/results
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from ooc_moe_server import slab
from ooc_moe_server.data_dir import held
from ooc_moe_server.engine import Engine
from ooc_moe_wire.errors import CorruptRecord
from tests.torture.power_loss import Choice, Recorder, any_part, everything, materialise, nothing, prefix
from tests.torture.promises import BrokenPromise, Ledger
from tests.torture.workload import Workload

DRAM_BYTES = 160 << 10  # A dozen records: fewer than there are.


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Slabs that grow often, by little, and give back what is free."""
    monkeypatch.setattr(slab, "GROWTH_BYTES", 64 << 10)
    monkeypatch.setattr(slab, "RESERVE_BYTES", 32 << 10)
    monkeypatch.setattr(slab, "RESERVE_PART", 1 << 20)


async def record(root: Path, rng: random.Random, *, num_rounds: int, lying: tuple[str, ...] = ()) -> tuple[Recorder, Ledger]:
    """What a store goes through in so many rounds, from its first file to an orderly end."""
    root.mkdir()
    with Recorder(root, lying=lying) as recorder:
        ledger = Ledger(recorder.tick)
        with held(root):
            engine = await Engine.open(root, DRAM_BYTES)
            await Workload(engine, ledger, rng).run(num_rounds)
            await engine.close()
    recorder.check_complete()
    return recorder, ledger


async def check(directory: Path, ledger: Ledger, moment: float) -> None:
    """Starts on what survived, and compares."""
    with held(directory):
        try:
            engine = await Engine.open(directory, DRAM_BYTES)
        except CorruptRecord as error:
            raise BrokenPromise(f"the store does not start: {error}") from error
        try:
            await ledger.check(engine, moment)
        finally:
            await engine.close()


def moments(ledger: Ledger, recorder: Recorder, rng: random.Random, count: int) -> list[float]:
    """Any moment, and as often one at which something was just acknowledged."""
    acknowledged = [value.acknowledged for bank in ledger.banks for history in bank.values.values() for value in history]
    acknowledged += [each for bank in ledger.banks for each in (bank.acknowledged, bank.deleted, *(size[2] for size in bank.sizes))]
    acknowledged += [each for snapshot in ledger.snapshots for each in (snapshot.acknowledged, snapshot.deleted)]
    sharp = sorted({each for each in acknowledged if 0 < each < float("inf")})
    return [rng.choice(sharp) if rng.random() < 0.5 else rng.uniform(sharp[0], recorder.clock) for _ in range(count)]


def draw(rng: random.Random) -> Choice:
    return rng.choice((nothing, everything, prefix(rng), any_part(rng), any_part(rng)))


async def crash(recorder: Recorder, ledger: Ledger, directory: Path, moment: float, rng: random.Random) -> None:
    """Power is lost; sometimes again while the store starts anew."""
    survivors = recorder.survivors(moment, draw(rng))
    materialise(survivors, directory / "first")
    if rng.random() < 0.3:
        with Recorder(directory / "first") as again, held(directory / "first"):
            engine = await Engine.open(directory / "first", DRAM_BYTES)
            await engine.close()
        again.check_complete()
        survivors = again.survivors(rng.uniform(1, again.clock), draw(rng))
    materialise(survivors, directory / "last")
    await check(directory / "last", ledger, moment)


async def torture(tmp_path: Path, seed: int, *, num_workloads: int, num_rounds: int, num_crashes: int) -> int:
    """Returns how many changes were recorded."""
    num_changes = 0
    for workload in range(num_workloads):
        rng = random.Random(seed * 1000 + workload)
        root = tmp_path / f"store{workload}"
        recorder, ledger = await record(root, rng, num_rounds=num_rounds)
        num_changes += recorder.clock
        for number, moment in enumerate(moments(ledger, recorder, rng, num_crashes)):
            directory = tmp_path / f"crash{workload}.{number}"
            directory.mkdir()
            try:
                await crash(recorder, ledger, directory, moment, rng)
            except Exception as error:
                error.add_note(f"seed {seed}, workload {workload}, crash {number} at event {moment} of {recorder.clock}")
                raise
    return num_changes


def test_what_was_acknowledged_survives_a_power_loss(tmp_path, seed):
    asyncio.run(torture(tmp_path, seed, num_workloads=3, num_rounds=40, num_crashes=20))


@pytest.mark.parametrize("liar", ["slabs/", "index.sqlite"])
def test_these_tests_notice_a_disk_that_does_not_sync(tmp_path, liar):
    async def scenario():
        rng = random.Random(1)
        recorder, ledger = await record(tmp_path / "store", rng, num_rounds=20, lying=(liar,))
        num_broken = 0
        for number, moment in enumerate(moments(ledger, recorder, rng, 10)):
            materialise(recorder.survivors(moment, nothing), tmp_path / f"crash{number}")
            try:
                await check(tmp_path / f"crash{number}", ledger, moment)
            except BrokenPromise:
                num_broken += 1
        assert num_broken >= 5

    asyncio.run(scenario())

"""One changed byte anywhere in a stopped store: it never gives wrong bytes or a wrong version, and every loss is reported.

python -m pytest tests/torture/test_flips.py -m slow --results tests/bench/results
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from ooc_moe_server.daemon.data_dir import held
from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.repair.rebuild import rebuild
from ooc_moe_server.repair.verify import verify
from ooc_moe_wire.errors import CorruptRecord, OocMoeError
from tests.torture.killed import Threads
from tests.torture.promises import Ledger
from tests.torture.workload import Workload

pytestmark = pytest.mark.usefixtures("with_small_files")

DRAM_BYTES = 160 << 10
# How often each kind of file is hit.
KINDS = {"slabs/*": 8, "index.sqlite": 6, "index.sqlite-wal": 6, "COMMITTED": 2, "banks/*": 3, "snapshots/*": 3}


@dataclass
class Store:
    """The directory of a stopped store, and its promises."""

    directory: Path
    ledger: Ledger
    moment: float


async def make(root: Path, seed: int) -> list[Store]:
    """Makes the same store twice: killed, with its write-ahead log, and closed a little later."""
    root.mkdir()
    ledger = Ledger(itertools.count(1).__next__)
    with Threads().watched() as threads, held(root):
        engine = await Engine.open(root, DRAM_BYTES)
        workload = Workload(engine, ledger, random.Random(seed))
        while not (len(ledger.living_snapshots()) >= 2 and len(ledger.living()) >= 3):
            await workload.run(5)
        killed = root.with_name(root.name + "-killed")
        threads.copy(root, killed)
        stores = [Store(killed, ledger, ledger.clock())]
        await engine.close()
    for bank in ledger.banks:
        bank.settled(ledger.clock())
    return [*stores, Store(root, ledger, ledger.clock())]


def flip(directory: Path, rng: random.Random) -> str:
    """Changes one byte of a random file; returns the file's name."""
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        files = sorted(path for path in directory.glob(kind) if path.is_file() and path.stat().st_size)
        if files:
            break
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    used = [place for place, byte in enumerate(content) if byte]
    place = rng.choice(used) if used and rng.random() < 0.7 else rng.randrange(len(content))  # Most of a file is zeros that are never read.
    content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return str(path.relative_to(directory))


async def look(store: Store, directory: Path, name: str) -> str:
    """Opens a store with a changed byte in file `name`, after a `rebuild` if the start demands one; returns the outcome."""
    with held(directory):
        findings = (await asyncio.to_thread(verify, directory)).findings
        refused = ""
        try:
            engine = await Engine.open(directory, DRAM_BYTES)
        except CorruptRecord as error:
            refused = str(error)
            assert "rebuild" in refused
            assert not name.startswith("slabs/"), refused
            assert findings, f"verify did not see what a start refuses: {refused}"
            rebuilt = await asyncio.to_thread(rebuild, directory)
            assert rebuilt.is_whole, rebuilt.damage
            engine = await Engine.open(directory, DRAM_BYTES)
        try:
            num_damaged = await store.ledger.check(engine, store.moment, damaged=lambda error, _: is_of_slab(error, name))
        finally:
            await engine.close()
    assert findings or not num_damaged, "verify did not see what a fetch refuses"
    if refused:
        return "start refused, rebuilt whole"
    if num_damaged:
        return "one record refused, all others served"
    return "all served, reported by verify" if findings else "all served, nothing that counts was hit"


def is_of_slab(error: OocMoeError, name: str) -> bool:
    return name.startswith("slabs/") and isinstance(error, CorruptRecord)


async def torture(ram_path: Path, seed: int, *, num_flips: int, flips_per_store: int = 50) -> Counter[tuple[str, str]]:
    """Returns how often each outcome came, by kind of file."""
    rng = random.Random(seed)
    counts: Counter[tuple[str, str]] = Counter()
    for number in range(num_flips):
        if number % flips_per_store == 0:
            stores = await make(ram_path / f"store{number}", rng.randrange(1 << 32))
        store = stores[number % 2]
        damaged = ram_path / "damaged"
        shutil.copytree(store.directory, damaged)
        name = flip(damaged, rng)
        try:
            outcome = await look(store, damaged, name)
        except BaseException as error:
            error.add_note(f"seed {seed}, flip {number}, in {name} of {store.directory.name}")
            raise
        counts[name.partition("/")[0], outcome] += 1
        shutil.rmtree(damaged)
    return counts


def test_a_flipped_byte_is_never_served_and_hides_nothing(ram_path, seed):
    counts = asyncio.run(torture(ram_path, seed, num_flips=40))
    assert counts.total() == 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_500_flipped_bytes_are_never_served_and_hide_nothing(ram_path, seed, report):
    counts = asyncio.run(torture(ram_path, seed, num_flips=500))
    rows = {f"{name}: {outcome}": count for (name, outcome), count in sorted(counts.items())}
    command = f"python -m pytest tests/torture/test_flips.py -m slow --results tests/bench/results --torture-seed {seed}"
    report("flips", command, {"flipped bytes": counts.total(), **rows})
    assert counts.total() == 500

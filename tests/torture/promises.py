"""What a store has promised, and a check that it keeps its promises: each state with the times when it was begun, acknowledged, durable.

    ledger = Ledger(clock)        clock() returns the present moment, any growing number
    ...                           workload.py notes its actions in the ledger
    await ledger.check(engine, moment)     raises BrokenPromise if a store that was stopped at `moment` broke a promise

Deliberately slow and simple, and independent of the way in which the store keeps its data.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from ooc_moe_server.engine.engine import Engine
from ooc_moe_wire.codec import Checksums, chunks
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import expert_pb2

UNIFORM = Initializer("uniform_v1", 0.5)
SMALL = Layout(parameters=(TensorSpec(name="w", shape=(8,), initializer=UNIFORM),))
LARGE = Layout(parameters=SMALL.parameters, optimizer=(TensorSpec(name="m", shape=(8,)),))
WRITER = "writer"


class BrokenPromise(AssertionError):
    """The store lacks something that it acknowledged, or holds something that was never written."""


@dataclass(eq=False, kw_only=True)
class Value:
    """One state of one expert, with the moments when its write began, was acknowledged, and became durable (infinity: not yet).

    `version` is None until it is known.
    """

    body: bytes
    version: int | None = None
    push_number: int = 0
    began: float = 0
    acknowledged: float = inf
    durable: float = inf
    together: object = None  # The values of one restore: all of them survive, or none.


@dataclass(eq=False, kw_only=True)
class BankPromise:
    """What is known of one bank, from its creation to its deletion. After that another bank may take its name."""

    spec: BankSpec
    began: float
    acknowledged: float = inf
    delete_began: float = inf
    deleted: float = inf
    sizes: list[tuple[int, float, float]] = field(default_factory=list)  # experts, began, acknowledged
    values: dict[int, list[Value]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_experts(self) -> int:
        return self.sizes[-1][0]

    def history(self, expert: int) -> list[Value]:
        """Returns every state of an expert, oldest first, beginning with its initial value."""
        if expert not in self.values:
            self.values[expert] = [Value(body=seeded(self.spec, expert), version=0, acknowledged=0, durable=0)]
        return self.values[expert]

    def current(self, expert: int) -> Value:
        """Returns the newest acknowledged state of an expert."""
        return next(value for value in reversed(self.history(expert)) if value.acknowledged < inf)

    def settled(self, moment: float) -> None:
        """Notes that the acknowledged states of all experts are durable from `moment` on."""
        for expert in self.values:
            value = self.current(expert)
            value.durable = min(value.durable, moment)


@dataclass(eq=False, kw_only=True)
class SnapshotPromise:
    """What is known of one snapshot: the bodies that it holds of its banks' experts, and when it was made and deleted."""

    name: str
    contents: dict[BankPromise, dict[int, bytes]]
    began: float
    id: int = 0
    acknowledged: float = inf
    delete_began: float = inf
    deleted: float = inf


# Whether a refusal is forgiven: the error, and the value that had to be there (None: a snapshot's).
Forgive = Callable[[OocMoeError, Value | None], bool]


class Ledger:
    """All promises of one store: its banks and its snapshots, those that were deleted included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.banks: list[BankPromise] = []
        self.snapshots: list[SnapshotPromise] = []
        self.push_numbers = itertools.count(1)

    def living(self) -> list[BankPromise]:
        """Returns the banks that exist, according to the acknowledgements."""
        return [bank for bank in self.banks if bank.acknowledged < inf and bank.delete_began == inf]

    def living_snapshots(self) -> list[SnapshotPromise]:
        """Returns the snapshots that exist, according to the acknowledgements."""
        return [
            snapshot
            for snapshot in self.snapshots
            if snapshot.acknowledged < inf and snapshot.delete_began == inf and any(bank.delete_began == inf for bank in snapshot.contents)
        ]

    def newest_version(self, moment: float) -> int:
        """Returns the newest version that was acknowledged up to `moment`."""
        return max(
            (
                value.version
                for bank in self.banks
                for history in bank.values.values()
                for value in history
                if value.version is not None and value.acknowledged <= moment
            ),
            default=0,
        )

    async def check(self, engine: Engine, moment: float, *, damaged: Forgive | None = None) -> int:
        """Compares a store with what it had promised at `moment`. Returns how many experts it refused to serve as damaged.

        At the end it pushes to one expert, and notes that write, which is later than `moment`.

        Args:
            engine: the store, opened again after a stop at `moment`.
            moment: when it was stopped.
            damaged: decides whether a refusal is forgiven; None: none is.

        Raises:
            BrokenPromise: the store lost, mixed or invented something, or refused an expert without being forgiven.
        """
        forgiven = damaged or (lambda _error, _value: False)
        found = self._check_banks(engine, moment)
        num_damaged = 0
        for bank in found:
            num_damaged += await self._check_values(engine, bank, moment, forgiven)
        num_damaged += await self._check_snapshots(engine, found, moment, forgiven)
        await self._check_versions(engine, found, moment)
        _check_slots(engine)
        return num_damaged

    def _check_banks(self, engine: Engine, moment: float) -> list[BankPromise]:
        found: list[BankPromise] = []
        for name, present in engine.catalog.banks.items():
            asked = [bank for bank in self.banks if bank.name == name and bank.spec.seed == present.spec.seed]
            _require(len(asked) == 1, f"bank {name!r} (seed {present.spec.seed}) was never made")
            _require(asked[0].began <= moment, f"bank {name!r} is from the future")
            _require(asked[0].deleted > moment, f"bank {name!r} was deleted and is back")
            _require(present.layout == asked[0].spec.layout, f"bank {name!r} has another layout")
            sizes = [size for size, began, _ in asked[0].sizes if began <= moment]
            least = max((size for size, _, acknowledged in asked[0].sizes if acknowledged <= moment), default=0)
            _require(present.num_experts in sizes, f"bank {name!r} has {present.num_experts} experts, not one of {sizes}")
            _require(present.num_experts >= least, f"bank {name!r} has {present.num_experts} experts, {least} were acknowledged")
            found.append(asked[0])
        for bank in self.banks:
            kept = bank.acknowledged <= moment and bank.delete_began > moment
            _require(bank in found or not kept, f"bank {bank.name!r} is gone")
        return found

    async def _check_values(self, engine: Engine, bank: BankPromise, moment: float, forgiven: Forgive) -> int:
        present = engine.catalog.bank(bank.name)
        seen: dict[object, set[bool]] = {}
        num_damaged = 0
        for expert, (version, body) in (await fetch(engine, bank.name, range(present.num_experts))).items():
            where = f"expert {expert} of bank {bank.name!r}, version {version}"
            history = [value for value in bank.history(expert) if value.began <= moment]
            oldest = max(index for index, value in enumerate(history) if value.durable <= moment)
            if isinstance(body, OocMoeError):
                _require(forgiven(body, history[oldest]), f"{where}: {body}")
                _require(any(value.version in (version, None) for value in history[oldest:]), f"{where} is damaged, and a wrong version")
                num_damaged += 1
                continue
            matching = [value for value in history[oldest:] if value.body == body and value.version == version]
            matching = matching or [value for value in history[oldest:] if value.body == body and value.version is None]
            _require(bool(matching), f"{where} is none of {[(value.version, value.acknowledged) for value in history[oldest:]]}")
            _require(bool(version) or matching[0].version == 0, f"{where} has lost its version")
            for value in history:
                if value.together is not None and value.durable > moment:
                    seen.setdefault(value.together, set()).add(history.index(value) <= history.index(matching[-1]))
        _require(all(len(answers) == 1 for answers in seen.values()), f"bank {bank.name!r}: half of a restore is there")
        return num_damaged

    async def _check_snapshots(self, engine: Engine, banks: list[BankPromise], moment: float, forgiven: Forgive) -> int:
        names = {snapshot.name: snapshot for snapshot in self.snapshots}
        present = {snapshot.name: snapshot for snapshot in engine.catalog.snapshots.values()}
        for promise in self.snapshots:
            kept = promise.acknowledged <= moment < promise.delete_began and any(bank.delete_began > moment for bank in promise.contents)
            _require(promise.name in present or not kept, f"snapshot {promise.name!r} is gone")
        num_damaged = 0
        for name, snapshot in present.items():
            _require(name in names and names[name].began <= moment, f"snapshot {name!r} was never taken")
            promise = names[name]
            _require(promise.deleted > moment, f"snapshot {name!r} was deleted and is back")
            _require(promise.id in (0, snapshot.id), f"snapshot {name!r} has id {snapshot.id}, not {promise.id}")
            held = {engine.catalog.bank_by_id(bank_id).name for bank_id in snapshot.banks}
            for bank, bodies in promise.contents.items():
                _require(bank.name in held or bank.delete_began <= moment, f"snapshot {name!r} lost its part of bank {bank.name!r}")
                if bank.name in held and bank in banks:
                    num_damaged += await _check_fork(engine, bank, snapshot.id, bodies, forgiven)
        return num_damaged

    async def _check_versions(self, engine: Engine, banks: Iterable[BankPromise], moment: float) -> None:
        newest = self.newest_version(moment)
        for bank in banks:
            current = engine.catalog.bank(bank.name).record(0).version
            number = next(self.push_numbers)
            value = Value(body=random_body(bank.spec.layout, number), push_number=number, began=self.clock())
            outcome = (await push(engine, bank.name, {0: (current, value.body)}, [number]))[0]
            _require(not outcome.HasField("error"), f"bank {bank.name!r} takes no pushes: {outcome.error.message}")
            _require(outcome.version > newest, f"version {outcome.version} was used before: {newest} was acknowledged")
            value.version, value.acknowledged = outcome.version, self.clock()
            value.durable = value.acknowledged
            bank.history(0).append(value)
            return


def _require(kept: bool, message: str) -> None:
    if not kept:
        raise BrokenPromise(message)


def _check_slots(engine: Engine) -> None:
    """Checks that exactly the slots that banks and snapshots refer to are counted as used bytes, and that nothing is pinned."""
    catalog = engine.catalog
    slots = {record.slot for bank in catalog.banks.values() for record in bank.records.values() if record.slot}
    slots |= {slot for snapshot in catalog.snapshots.values() for slot in snapshot.slots()}
    used = engine.snapshot_stats().nvme.used_bytes
    wanted = sum(slot.record_bytes for slot in slots)
    _require(used == wanted, f"{used} bytes of NVMe are counted as used, {wanted} are referred to")
    pinned = engine.snapshot_stats().dram.pinned_bytes
    _require(pinned == 0, f"{pinned} bytes of DRAM stay pinned")


async def _check_fork(engine: Engine, bank: BankPromise, snapshot_id: int, bodies: dict[int, bytes], forgiven: Forgive) -> int:
    """Checks the content of a snapshot through a fork of it; returns how many experts were refused as damaged."""
    num_damaged = 0
    fork = await engine.changes.fork_bank(bank.name, f"check-{bank.name}-{snapshot_id}", snapshot_id)
    for expert, (_, body) in (await fetch(engine, fork.name, range(fork.num_experts))).items():
        if isinstance(body, OocMoeError):
            _require(forgiven(body, None), f"snapshot {snapshot_id}, bank {bank.name!r}, expert {expert}: {body}")
            num_damaged += 1
        else:
            wanted = bodies.get(expert) or seeded(bank.spec, expert)
            _require(body == wanted, f"snapshot {snapshot_id}: expert {expert} of bank {bank.name!r} is another one")
    await engine.changes.delete_bank(fork.name)
    return num_damaged


def seeded(spec: BankSpec, expert: int) -> bytes:
    """Returns the body that an expert has before its first push."""
    body = bytearray(spec.layout.body_bytes)
    spec.layout.initialize(body, seed=spec.seed, expert=expert)
    return bytes(body)


def random_body(layout: Layout, number: int) -> bytes:
    """Returns random bytes as long as a body of `layout`. The same `number` gives the same bytes."""
    return np.random.default_rng(number).bytes(layout.body_bytes)


async def fetch(engine: Engine, bank: str, experts: Iterable[int]) -> dict[int, tuple[int, bytes | OocMoeError]]:
    """Fetches experts; returns, by expert, its version and its body. An expert that is refused has the error in place of the body."""
    present = engine.catalog.bank(bank)
    wanted = engine.fetch(
        present,
        list(experts),
        known_versions=(),
        demand=True,
        section_bytes=present.layout.body_bytes,
        scopes=engine.stats.scopes("t", present.access),
    )
    got: dict[int, tuple[int, bytes | OocMoeError]] = {}
    async with aclosing(wanted.experts()) as served:
        async for each in served:
            got[each.expert] = (each.version, bytes(each.entry.body) if each.entry else each.error)  # type: ignore[assignment]
    return got


@contextlib.asynccontextmanager
async def writing(engine: Engine, bank: str, writer_id: str = WRITER) -> AsyncIterator[Any]:
    """Opens a writer of a bank, yields it, waits for its outcomes, and closes it."""
    present = engine.catalog.bank(bank)
    writer = engine.open_writer(bank, writer_id, engine.stats.scopes("t", present.access))
    try:
        yield writer
        await writer.wait_outcomes()
    finally:
        writer.close()


async def send(writer: Any, layout: Layout, expert: int, body: bytes, **header: Any) -> None:
    """Sends a whole record to a writer. `header`: base_version, push_number, and durability if it is not DURABLE."""
    sums = Checksums.of(layout, memoryview(body))
    sizes = {"parameter_bytes": layout.parameter_bytes, "optimizer_bytes": layout.optimizer_bytes}
    checks = {"parameter_xxh3": sums.parameters, "optimizer_xxh3": sums.optimizer}
    await writer.begin(expert_pb2.PushHeader(expert=expert, **sizes, **checks, **header))
    for chunk in chunks(memoryview(body)):
        writer.add(chunk)


async def push(
    engine: Engine, bank: str, experts: dict[int, tuple[int, bytes]], push_numbers: Iterable[int], **header: Any
) -> dict[int, expert_pb2.PushOutcome]:
    """Pushes `experts` (id -> base version and body), all before it waits for an outcome. Returns the outcomes by id.

    `header`: durability if it is not DURABLE.
    """
    layout = engine.catalog.bank(bank).layout
    numbers = iter(push_numbers)
    async with writing(engine, bank) as writer:
        for expert, (base, body) in experts.items():
            await send(writer, layout, expert, body, base_version=base, push_number=next(numbers), **header)
        outcomes = [await writer.outcomes.get() for _ in experts]
    return {outcome.expert: outcome for outcome in outcomes}


async def write_back(engine: Engine) -> None:
    """Writes to disk what was acknowledged in memory. Raises TierFull, Internal."""
    async with engine.committer.exclusive():
        await engine.committer.write_back()

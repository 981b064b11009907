"""Random trainers on a real engine. Everything that they begin, and every acknowledgement, is noted in a ledger (promises.py)."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from typing import Any
from unittest import mock

from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.nvme import reserve, slab
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.v1 import expert_pb2
from tests.torture.promises import LARGE, SMALL, BankPromise, Ledger, SnapshotPromise, Value, fetch, random_body, seeded, send, writing

# Slabs that grow often and give back what is free, so that a short workload meets all of it; and no megabytes to copy.
SMALL_FILES = {
    (slab, "GROWTH_BYTES"): 32 << 10,
    (slab, "RESERVE_BYTES"): 32 << 10,
    (slab, "RESERVE_PART"): 1 << 20,
    (reserve, "RESERVE_BYTES_MIN"): 64 << 10,
}
BANKS_MAX = 4
SNAPSHOTS_MAX = 3


@contextmanager
def small_files() -> Iterator[None]:
    """Makes the engine's files grow and shrink in small steps inside the block (SMALL_FILES)."""
    with ExitStack() as stack:
        for (module, name), value in SMALL_FILES.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def ram_directory() -> Iterator[Path]:
    """Makes a temporary directory in memory, if the machine has such a file system, and yields its path.

    The torture tests sync thousands of files, and simulate power loss themselves, so they need no disk.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="ooc-moe-", dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


class Workload:
    """Does random actions on an engine, drawn from `rng`, and notes them in the ledger.

    Actions are drawn in rounds; those of one round run concurrently, on different banks.
    """

    def __init__(self, engine: Engine, ledger: Ledger, rng: random.Random) -> None:
        self.engine, self.ledger, self.rng = engine, ledger, rng
        self._free: set[BankPromise] = set()  # Banks that no action of this round uses.
        self._taken: set[str] = set()  # Names of deleted banks that a new bank has taken.
        self._number = 0

    async def run(self, num_rounds: int) -> None:
        """Does `num_rounds` rounds of random actions."""
        for _ in range(num_rounds):
            self._free, self._taken = set(self.ledger.living()), set()
            actions = [self._draw() for _ in range(self.rng.choice((1, 1, 2, 3)))]
            await asyncio.gather(*(action for action in actions if action))

    def _draw(self) -> Coroutine[Any, Any, None] | None:
        living = self.ledger.living()
        if len(living) < 2 or (len(living) < BANKS_MAX and self.rng.random() < 0.1):
            return self.create(self._name_of_the_dead() or self._name(), self.rng.choice((SMALL, LARGE)), self.rng.randint(2, 6))
        if not self._free:
            return None
        bank = self.rng.choice(sorted(self._free, key=lambda bank: bank.name))
        snapshots = [each for each in self.ledger.living_snapshots() if self._living(each) <= self._free]
        kinds = ["push"] * 9 + ["fetch"] * 2 + ["grow", "snapshot", "fork", "restore", "restore", "drop", "delete"]
        kind = self.rng.choice(kinds)
        if kind in ("restore", "drop"):
            if not snapshots:
                return None
            snapshot = self.rng.choice(snapshots)
            self._free -= self._living(snapshot)
            return self.restore(snapshot) if kind == "restore" else self.drop(snapshot)
        if kind == "snapshot":
            if len(self.ledger.living_snapshots()) >= SNAPSHOTS_MAX:
                return None
            several = self.rng.sample(sorted(self._free, key=lambda bank: bank.name), self.rng.randint(1, len(self._free)))
            self._free -= set(several)
            return self.snapshot(several)
        if kind == "delete":
            holding = [each for each in self.ledger.living_snapshots() if bank in each.contents]
            if len(living) <= 2 or not all(self._living(each) <= self._free for each in holding):
                return None
            for each in holding:
                self._free -= self._living(each)
            self._free.discard(bank)
            return self.delete(bank)
        self._free.discard(bank)
        if kind == "fork":
            return self.fork(bank) if len(living) < BANKS_MAX else None
        if kind == "fetch":
            return self.fetch(bank)
        return self.grow(bank) if kind == "grow" else self.push(bank)

    async def create(self, name: str, layout: Any, num_experts: int) -> None:
        spec = BankSpec(name=name, num_experts=num_experts, layout=layout, seed=self._next())
        began = self.ledger.clock()
        promise = BankPromise(spec=spec, began=began, sizes=[(num_experts, began, began)])
        self.ledger.banks.append(promise)
        await self.engine.changes.create_bank(spec)
        promise.acknowledged = self.ledger.clock()

    async def grow(self, bank: BankPromise) -> None:
        size, began = bank.num_experts + self.rng.randint(1, 3), self.ledger.clock()
        bank.sizes.append((size, began, inf))
        await self.engine.changes.grow_bank(bank.name, size)
        bank.sizes[-1] = (size, began, self.ledger.clock())

    async def delete(self, bank: BankPromise) -> None:
        bank.delete_began = min(bank.delete_began, self.ledger.clock())
        await self.engine.changes.delete_bank(bank.name)
        bank.deleted = self.ledger.clock()
        for snapshot in self.ledger.snapshots:
            if all(part.deleted < inf for part in snapshot.contents):
                snapshot.delete_began = min(snapshot.delete_began, bank.delete_began)
                snapshot.deleted = min(snapshot.deleted, bank.deleted)

    async def push(self, bank: BankPromise) -> None:
        """Pushes random bodies to several experts of one bank, each durable or in memory."""
        experts = self.rng.sample(range(bank.num_experts), self.rng.randint(1, min(4, bank.num_experts)))
        sent: dict[int, tuple[Value, bool]] = {}
        async with writing(self.engine, bank.name) as writer:
            for expert in experts:
                await self._send(writer, bank, expert, sent)
            for _ in experts:
                outcome = await writer.outcomes.get()
                assert not outcome.HasField("error"), outcome
                value, is_durable = sent[outcome.expert]
                value.version, value.acknowledged = outcome.version, self.ledger.clock()
                if is_durable:
                    value.durable = value.acknowledged

    async def _send(self, writer: Any, bank: BankPromise, expert: int, sent: dict[int, tuple[Value, bool]]) -> None:
        durability = self.rng.choice((expert_pb2.DURABLE, expert_pb2.DURABLE, expert_pb2.MEMORY))
        base = bank.current(expert).version
        value = Value(
            body=random_body(bank.spec.layout, self._next()), push_number=next(self.ledger.push_numbers), began=self.ledger.clock()
        )
        bank.history(expert).append(value)
        sent[expert] = (value, durability == expert_pb2.DURABLE)
        await send(
            writer,
            bank.spec.layout,
            expert,
            value.body,
            base_version=base,
            push_number=value.push_number,
            durability=durability,
        )

    async def fetch(self, bank: BankPromise) -> None:
        for expert, (version, body) in (await fetch(self.engine, bank.name, range(bank.num_experts))).items():
            current = bank.current(expert)
            assert (version, body) == (current.version, current.body), f"expert {expert} of bank {bank.name!r}"

    async def snapshot(self, banks: list[BankPromise]) -> None:
        contents = {bank: {expert: bank.current(expert).body for expert in range(bank.num_experts)} for bank in banks}
        promise = SnapshotPromise(name=f"snapshot {self._next()}", contents=contents, began=self.ledger.clock())
        self.ledger.snapshots.append(promise)
        promise.id = (await self.engine.changes.create_snapshot([bank.name for bank in banks], promise.name)).id
        promise.acknowledged = self.ledger.clock()
        for bank in banks:
            bank.settled(promise.acknowledged)

    async def restore(self, snapshot: SnapshotPromise) -> None:
        began = self.ledger.clock()
        group = object()
        values: dict[tuple[BankPromise, int], Value] = {}
        for bank in self._living(snapshot):
            for expert in range(bank.num_experts):
                body = snapshot.contents[bank].get(expert) or seeded(bank.spec, expert)
                if bank.current(expert).version != 0:
                    values[bank, expert] = Value(body=body, began=began, together=group)
                    bank.history(expert).append(values[bank, expert])
        await self.engine.changes.restore_snapshot(snapshot.id, "")
        now = self.ledger.clock()
        for (bank, expert), value in values.items():
            value.version = self.engine.catalog.bank(bank.name).record(expert).version
            value.acknowledged = value.durable = now

    async def drop(self, snapshot: SnapshotPromise) -> None:
        snapshot.delete_began = min(snapshot.delete_began, self.ledger.clock())
        await self.engine.changes.delete_snapshot(snapshot.id)
        snapshot.deleted = self.ledger.clock()

    async def fork(self, bank: BankPromise) -> None:
        began = self.ledger.clock()
        spec = BankSpec(name=self._name(), num_experts=bank.num_experts, layout=bank.spec.layout, seed=bank.spec.seed)
        promise = BankPromise(spec=spec, began=began, sizes=[(spec.num_experts, began, began)])
        for expert in range(bank.num_experts):
            if (body := bank.current(expert).body) != promise.history(expert)[0].body:
                promise.values[expert] = [Value(body=body, began=began, durable=began)]
        self.ledger.banks.append(promise)
        await self.engine.changes.fork_bank(bank.name, spec.name, 0)
        promise.acknowledged = self.ledger.clock()
        present = self.engine.catalog.bank(spec.name)
        for expert in range(bank.num_experts):
            value = promise.history(expert)[0]
            value.version = present.record(expert).version
            value.acknowledged = min(value.acknowledged, promise.acknowledged)
        bank.settled(promise.acknowledged)

    def _living(self, snapshot: SnapshotPromise) -> set[BankPromise]:
        return {bank for bank in snapshot.contents if bank.delete_began == inf}

    def _name_of_the_dead(self) -> str:
        """Returns the name of a deleted bank that no other bank has taken, to use it again; sometimes, or if there is none, ""."""
        taken = {bank.name for bank in self.ledger.banks if bank.deleted == inf}
        name = self.rng.choice(["", *sorted({bank.name for bank in self.ledger.banks} - taken - self._taken)])
        self._taken.add(name)
        return name

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _name(self) -> str:
        return f"bank{self._next()}"

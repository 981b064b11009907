"""The daemon's storage engine in the test's own process, and one-line versions of the calls that a trainer makes."""

from __future__ import annotations

import asyncio
import itertools
import mmap
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ooc_moe_server.engine.engine import Engine
from ooc_moe_wire.codec import Checksums, chunks
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from ooc_moe_wire.v1 import expert_pb2

LAYOUT = Layout(parameters=(TensorSpec(name="w", shape=(8,)),))
RECORD = LAYOUT.record_bytes  # Two blocks.
SEEDED = bytes(LAYOUT.body_bytes)

WRITER_NUMBERS = itertools.count()


def body_of(number: int) -> bytes:
    """Returns random bytes as long as a body of LAYOUT. The same `number` gives the same bytes."""
    return np.random.default_rng(number).bytes(LAYOUT.body_bytes)


class Session:
    """Stands for a client that pushes through shared memory: has the staging memory that its pushes are copied from."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes)

    def staging(self, offset: int, size: int) -> memoryview:
        if offset + size > len(self.memory):
            raise InvalidRequest(f"staged_at: {offset} is beyond the memory")
        return memoryview(self.memory)[offset : offset + size]


class Store:
    """An open engine with one bank, and short methods to fetch, push and prefetch its experts."""

    def __init__(self, engine: Engine, bank: Any) -> None:
        self.engine, self.bank = engine, bank
        self.scopes = engine.stats.scopes("t", bank.access)
        self.push_number = 0
        self.writer_id = f"writer {next(WRITER_NUMBERS)}"

    def fetch(self, *experts: int, demand: bool = True):
        return self.engine.fetch(
            self.bank, experts, known_versions=(), demand=demand, section_bytes=LAYOUT.body_bytes, scopes=self.scopes
        ).experts()

    async def bodies(self, *experts: int) -> dict[int, bytes]:
        async with aclosing(self.fetch(*experts)) as served:
            return {each.expert: bytes(each.entry.body) async for each in served}

    async def push(self, experts: dict[int, bytes], **options: Any) -> dict[int, expert_pb2.PushOutcome]:
        """Pushes `experts` (id -> body) and returns the outcomes by id. Sends all bodies before it waits for any outcome.

        `options` are those of `begin`.
        """
        writer = self.writer()
        for expert, body in experts.items():
            await self.begin(writer, expert, body, **options)
            for chunk in chunks(memoryview(body)):
                writer.add(chunk)
        await writer.wait_outcomes()
        writer.close()
        outcomes = [writer.outcomes.get_nowait() for _ in experts]
        return {outcome.expert: outcome for outcome in outcomes}

    async def push_one(self, expert: int, number: int, **options: Any) -> expert_pb2.PushOutcome:
        return (await self.push({expert: body_of(number)}, **options))[expert]

    def writer(self, session: Session | None = None):
        return self.engine.open_writer(self.bank.name, self.writer_id, self.scopes, session=session)

    async def begin(
        self,
        writer: Any,
        expert: int,
        body: bytes,
        *,
        in_memory: bool = False,
        base_version: int | None = None,
        push_number: int | None = None,
        staged_at: int | None = None,
    ) -> None:
        if push_number is None:
            self.push_number += 1
        await writer.begin(
            expert_pb2.PushHeader(
                expert=expert,
                push_number=push_number or self.push_number,
                base_version=self.bank.record(expert).version if base_version is None else base_version,
                parameter_bytes=LAYOUT.parameter_bytes,
                parameter_xxh3=Checksums.of(LAYOUT, memoryview(body)).parameters,
                durability=expert_pb2.MEMORY if in_memory else expert_pb2.DURABLE,
                staged_at=staged_at,
            )
        )

    def prefetch(self, *experts: int, deadline_s: float | None = None) -> list[int]:
        return self.engine.prefetch(self.bank, experts, deadline_s=deadline_s, scopes=self.scopes)

    def drop_from_dram(self, *experts: int) -> None:
        for expert in experts:
            self.engine.dram.discard(self.bank.source(expert, self.bank.record(expert)))

    @property
    def waiting(self):
        """The pushes that wait for the next commit round."""
        return self.engine.committer._rounds._waiting

    @property
    def stats(self):
        return self.engine.snapshot_stats()


@asynccontextmanager
async def opened(directory: Path, *, records: int = 8, patience_s: float = 0.0, **options: Any):
    """Opens an engine whose DRAM tier holds `records` records, with one bank of 16 experts; yields it as a `Store`."""
    directory.mkdir(exist_ok=True)
    engine = await Engine.open(directory, records * RECORD, patience_s=patience_s, **options)
    bank = await engine.changes.create_bank(BankSpec(name="b", num_experts=16, layout=LAYOUT))
    try:
        yield Store(engine, bank)
    finally:
        await engine.close()


async def until(condition) -> None:
    """Lets other tasks of the event loop run until the condition holds."""
    while not condition():
        await asyncio.sleep(0)


def failing(error: Exception):
    """Returns a function that raises `error`, whatever its arguments are."""

    def fail(*arguments):
        raise error

    return fail


def flip(path: Path, position: int) -> None:
    """Flips one bit of the byte at `position` of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))

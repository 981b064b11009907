"""`CudaSlots` on simulated streams: right bytes under every schedule, and wrong bytes as soon as one wait is taken out."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from ooc_moe_client.hbm import cache as cache_module
from ooc_moe_client.hbm import cuda_slots, write_back
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.cuda_slots import CudaSlots
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Push, Sections
from ooc_moe_wire.errors import InvalidRequest, Unavailable
from ooc_moe_wire.layout import Layout, TensorSpec
from tests.client.conftest import GatedStore, spec
from tests.client.hbm.simulated_streams import SimulatedCuda, SimulatedStream, Site, sites

SCHEDULES = 2000
STEPS = 80
CACHE_SCHEDULES = 200
CACHE_STEPS = 30
SCHEDULES_MAX = 2000  # within which a missing wait must be found

CPU = torch.device("cpu")
SLOTS_SITES = sites(cuda_slots)
CACHE_SITES = sites(write_back)

# The sections fill their blocks, so that a torn or missing copy changes a tensor wherever it is.
LAYOUT = Layout(
    parameters=(TensorSpec(name="parameters", shape=(512,), dtype="int64"),),
    optimizer=(TensorSpec(name="moments", shape=(512,), dtype="int64"),),
)
NUM_EXPERTS = 6


def values(cell: torch.Tensor) -> tuple[int, int]:
    """The two ends of a tensor, and -1 for both unless all between equals one of them."""
    low, high = int(cell.min()), int(cell.max())
    return (low, high) if low == high else (-1, -1)


class Model:
    """What every expert's tensors must be, and where the bytes were wrong."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda = cuda
        self.wrong: list[str] = []
        self.value = [100 * (expert + 1) for expert in range(NUM_EXPERTS)]

    def expect(self, found: torch.Tensor, expected: int, what: str) -> None:
        if values(found) != (expected, expected):
            self.wrong.append(f"{what}: {values(found)}, not {expected}")

    def read(self, views: dict[str, torch.Tensor], slot: int, expert: int, names: tuple[str, ...]) -> None:
        """Queues a kernel that reads an expert."""
        expected = self.value[expert]

        def kernel() -> None:
            for name in names:
                self.expect(views[name][slot], expected, f"{name} of {expert} in slot {slot}")

        self.cuda.launch(kernel)

    def update(self, views: dict[str, torch.Tensor], slot: int, expert: int) -> None:
        """Queues a kernel that adds one to an expert, in two parts."""
        self.read(views, slot, expert, ("parameters", "moments"))
        self.cuda.launch(lambda: views["parameters"][slot].add_(1))
        self.cuda.launch(lambda: views["moments"][slot].add_(1))
        self.value[expert] += 1


class SlotsUser:
    """Uses `CudaSlots` by random moves as the cache does, in one thread: with a table, a store and buffers of its own."""

    def __init__(self, seed: int, removed: Site | None = None) -> None:
        self.random = random.Random(-seed - 1)
        self.cuda = SimulatedCuda(seed)
        if removed is not None:
            self.cuda.remove(removed)
        self.model = Model(self.cuda)
        self.num_slots = 3
        self.slots = CudaSlots(LAYOUT, self.num_slots, CPU, self.cuda)  # type: ignore[arg-type]
        self.slots._lock = threading.RLock()
        self.cuda.locks = [self.slots._lock]
        self.store = list(self.model.value)  # the values that were pushed
        self.free = list(range(self.num_slots))
        self.residents: dict[int, tuple[int, bool]] = {}  # expert -> (slot, whole)
        self.dirty: set[int] = set()
        self.loading: dict[int, tuple[int, memoryview]] = {}  # expert -> (slot, its landing memory)
        self.pending: dict[int, tuple[torch.Tensor, object, int]] = {}  # expert -> (buffer, copy, value)
        self.spare: list[torch.Tensor] = []

    def run(self, steps: int) -> list[str]:
        """Makes that many moves, and ends. Returns what was wrong."""
        moves: list[Callable[[], None]] = [self.fetch, self.land, self.abandon, self.read, self.update, self.copy_out, self.evict]
        moves += [self.push, self.bring_back]
        for _ in range(steps):
            self.random.choice(moves)()
        self.close()
        return self.model.wrong

    def pick(self, items) -> int | None:
        items = sorted(items)
        return self.random.choice(items) if items else None

    def take_slot(self) -> int | None:
        slot = self.pick(self.free)
        if slot is not None:
            self.free.remove(slot)
        return slot

    def fetch(self) -> None:
        absent = set(range(NUM_EXPERTS)) - self.residents.keys() - self.loading.keys() - self.pending.keys()
        expert = self.pick(absent)
        if expert is not None and (slot := self.take_slot()) is not None:
            whole = self.random.random() < 0.7
            memory = self.slots.landing(slot, (Sections.ALL if whole else Sections.PARAMETERS).num_bytes(LAYOUT))
            np.frombuffer(memory, np.int64)[:] = self.store[expert]
            self.loading[expert] = slot, memory
            if self.random.random() < 0.7:
                self.land()

    def land(self) -> None:
        if (expert := self.pick(self.loading)) is not None:
            slot, memory = self.loading.pop(expert)
            self.slots.landed(slot, len(memory))
            self.residents[expert] = slot, len(memory) == LAYOUT.body_bytes

    def abandon(self) -> None:
        if (expert := self.pick(self.loading)) is not None and self.random.random() < 0.3:
            slot, memory = self.loading.pop(expert)
            if self.random.random() < 0.5:  # A broken fetch is started anew.
                assert self.slots.landing(slot, len(memory)).nbytes == len(memory)
            np.frombuffer(memory, np.int64)[:] = -7
            self.slots.abandon(slot)
            self.free.append(slot)

    def read(self) -> None:
        if (expert := self.pick(self.residents)) is not None:
            slot, whole = self.residents[expert]
            self.slots.acquire([slot], writing=False)
            self.model.read(self.slots.views, slot, expert, ("parameters", "moments") if whole else ("parameters",))
            self.slots.release([slot])

    def update(self) -> None:
        if (expert := self.pick(expert for expert, (_, whole) in self.residents.items() if whole)) is not None:
            slot, _ = self.residents[expert]
            self.slots.acquire([slot], writing=True)
            self.model.update(self.slots.views, slot, expert)
            self.slots.release([slot])
            self.dirty.add(expert)

    def copy_out(self) -> None:
        if (expert := self.pick(self.dirty & self.residents.keys())) is not None:
            older = self.pending.get(expert)
            buffer = older[0] if older else self.spare.pop() if self.spare else self.slots.host_buffer()
            copied = self.slots.copy_out(self.residents[expert][0], buffer)
            self.pending[expert] = buffer, copied, self.model.value[expert]
            self.dirty.discard(expert)

    def evict(self) -> None:
        if (expert := self.pick(self.residents.keys() - self.dirty)) is not None:
            slot, _ = self.residents.pop(expert)
            self.free.append(slot)

    def push(self) -> None:
        if (expert := self.pick(self.pending)) is not None:
            buffer, copied, value = self.pending.pop(expert)
            copied.synchronize()  # type: ignore[attr-defined]
            self.model.expect(buffer.view(torch.int64), value, f"pushed {expert}")
            if self.random.random() < 0.8:
                self.store[expert] = value
            elif expert in self.residents:  # The push failed: the expert is still dirty.
                self.dirty.add(expert)
            else:
                self.pending[expert] = buffer, copied, value
                return
            self.spare.append(buffer)

    def bring_back(self) -> None:
        expert = self.pick(self.pending.keys() - self.residents.keys())
        if expert is not None and (slot := self.take_slot()) is not None:
            self.slots.copy_back(slot, self.pending[expert][0])
            self.residents[expert] = slot, True

    def close(self) -> None:
        """Closes the slots. Their memory is somebody else's then: no copy may read or write it."""
        self.cuda.reach(self.cuda.current_stream().mark())  # The memory is freed after the compute stream's work on it.
        self.slots.close()
        rows = self.slots._rows
        rows.fill_(0xEE)
        self.cuda.finish()
        if not bool((rows == 0xEE).all()):
            self.model.wrong.append("a copy wrote to a slot after close")
        for expert, (buffer, _, value) in self.pending.items():
            self.model.expect(buffer.view(torch.int64), value, f"kept {expert}")


def test_every_schedule_of_copies_gives_the_right_bytes():
    for seed in range(SCHEDULES):
        assert SlotsUser(seed).run(STEPS) == [], f"seed {seed}"


@pytest.mark.parametrize("site", SLOTS_SITES, ids=str)
def test_each_wait_that_is_taken_out_is_found(site: Site):
    num_calls = 0
    for seed in range(SCHEDULES_MAX):
        user = SlotsUser(seed, site)
        if user.run(STEPS):
            return
        num_calls += user.cuda.num_reached_removed
    pytest.fail(f"{site}: {SCHEDULES_MAX} schedules with {num_calls} such calls give right bytes without it")


# The whole cache, with its threads


class FlakyStore(GatedStore):
    """A store in memory in which some fetches break when they have filled the landing memory, and some pushes fail."""

    def __init__(self, seed: int) -> None:
        super().__init__(InMemoryStore())
        self.random = random.Random(seed)
        self.is_flaky = False
        self.create_bank(spec("b", layout=LAYOUT, num_experts=NUM_EXPERTS))

    def fetch(self, bank: str, experts: Sequence[int], **options: Any) -> Iterator[Any]:
        for fetched in super().fetch(bank, experts, **options):
            if self.is_flaky and self.random.random() < 0.1:
                raise Unavailable("fetch: broken")
            yield fetched

    def push(self, bank: str, pushes: Sequence[Push]) -> list[int | Exception]:
        if self.is_flaky and self.random.random() < 0.1:
            raise Unavailable("push: broken")
        return super().push(bank, pushes)


class CacheUser:
    """Uses a cache on simulated streams by random moves, and keeps a model of its experts."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, removed: Site | None = None) -> None:
        self.random = random.Random(-seed - 1)
        self.cuda = SimulatedCuda(seed)
        if removed is not None:
            self.cuda.remove(removed)
        self.model = Model(self.cuda)
        self.store = FlakyStore(seed)
        bodies = [np.full(LAYOUT.body_bytes // 8, value, np.int64).view(np.uint8) for value in self.model.value]
        self.store.push("b", [Push(expert=expert, base_version=0, body=body) for expert, body in enumerate(bodies)])
        monkeypatch.setattr(cache_module, "CudaSlots", lambda layout, num_slots, _: CudaSlots(layout, num_slots, CPU, self.cuda))
        self.cache = ExpertCache(self.store, "b", capacity_experts=self.random.choice((2, 3, 4)), device="cuda")
        self.cache._slots._lock = threading.RLock()  # type: ignore[attr-defined]
        self.cuda.locks = [self.cache._shared.changed, self.cache._slots._lock]  # type: ignore[attr-defined]

    def run(self, steps: int) -> list[str]:
        """Makes that many moves, and ends. Returns what was wrong."""
        self.store.is_flaky = self.random.random() < 0.5
        moves = [self.read, self.read, self.update, self.update, self.prefetch, self.follow_schedule, self.write_back, self.leave]
        for _ in range(steps):
            with suppress(Unavailable):
                self.random.choice(moves)()
        self.store.is_flaky = False
        while not self.flushed():
            pass
        self.cache.close()
        self.cuda.finish()
        stored = {expert: bytearray(LAYOUT.body_bytes) for expert in range(NUM_EXPERTS)}
        list(self.store.fetch("b", list(stored), into=lambda expert: memoryview(stored[expert])))
        for expert, body in stored.items():
            self.model.expect(torch.frombuffer(body, dtype=torch.int64), self.model.value[expert], f"stored {expert}")
        return self.model.wrong

    def flushed(self) -> bool:
        """Whether a flush succeeds. It raises errors of earlier pushes, each once."""
        try:
            self.cache.flush()
        except Unavailable:
            return False
        return True

    def experts(self) -> list[int]:
        return self.random.sample(range(NUM_EXPERTS), self.random.randint(1, 3))

    def read(self, experts: Sequence[int] | None = None) -> None:
        sections = self.random.choice(list(Sections))
        names = ("parameters", "moments") if sections is Sections.ALL else ("parameters",)
        for wave in self.cache.waves(experts or self.experts()):
            with self.cache.reading(wave, sections=sections) as slots:
                for expert, slot in zip(wave, slots, strict=True):
                    self.model.read(self.cache.views, slot, expert, names)

    def update(self, experts: Sequence[int] | None = None) -> None:
        for wave in self.cache.waves(experts or self.experts()):
            with self.cache.updating(wave) as slots:
                for expert, slot in zip(wave, slots, strict=True):
                    self.model.update(self.cache.views, slot, expert)

    def prefetch(self) -> None:
        self.cache.prefetch(self.experts(), sections=self.random.choice(list(Sections)))

    def follow_schedule(self) -> None:
        uses = [Use(tuple(self.experts()), Sections.ALL) for _ in range(2)]
        self.cache.schedule(uses)
        for use in uses:
            self.random.choice((self.read, self.update))(use.experts)

    def write_back(self) -> None:
        self.cache.write_back()

    def leave(self) -> None:
        self.cache.write_back()
        self.cache.new_working_set()


def test_the_cache_gives_the_right_bytes_under_every_schedule_and_never_waits_under_its_lock(monkeypatch: pytest.MonkeyPatch):
    for seed in range(CACHE_SCHEDULES):
        assert CacheUser(seed, monkeypatch).run(CACHE_STEPS) == [], f"seed {seed}"


@pytest.mark.parametrize("site", CACHE_SITES, ids=str)
def test_each_wait_that_is_taken_out_of_the_write_back_is_found(site: Site, monkeypatch: pytest.MonkeyPatch):
    assert any(CacheUser(seed, monkeypatch, site).run(CACHE_STEPS) for seed in range(CACHE_SCHEDULES))


def test_waiting_or_allocating_under_a_lock_is_found(monkeypatch: pytest.MonkeyPatch):
    user = CacheUser(0, monkeypatch)
    buffer = user.cache._slots.host_buffer()
    copied = user.cache._slots.copy_out(0, buffer)
    for lock in user.cuda.locks:
        with lock:
            for forbidden in (user.cache._slots.host_buffer, copied.synchronize, user.cache._slots.close):
                with pytest.raises(AssertionError, match=r"while .* is held"):
                    forbidden()
    user.cache.close()


# One compute stream


def test_a_reading_on_another_stream_is_refused_before_anything_is_pinned(monkeypatch: pytest.MonkeyPatch):
    user = CacheUser(0, monkeypatch)
    for enter in (user.cache.reading, user.cache.updating):
        with user.cuda.on(user.cuda.new_stream()), pytest.raises(InvalidRequest, match=r"current stream: .* is not the compute stream"):
            enter([1]).__enter__()
    assert user.cache._table.residents == {}
    assert user.run(CACHE_STEPS) == []


def test_a_block_that_ends_on_another_stream_is_an_error_and_unpins_all_the_same(monkeypatch: pytest.MonkeyPatch):
    user = CacheUser(0, monkeypatch)
    pinned = user.cache.updating([1])
    pinned.__enter__()
    with user.cuda.on(user.cuda.new_stream()), pytest.raises(InvalidRequest, match="a cache is read and updated on one stream"):
        pinned.__exit__(None, None, None)
    assert [(resident.pins, resident.updating) for resident in user.cache._table.residents.values()] == [(0, 0)]
    assert user.run(CACHE_STEPS) == []


# The simulation


def test_the_host_forces_exactly_what_must_have_run():
    cuda = SimulatedCuda(0, eagerness=0.0)
    first, second = cuda.new_stream(), cuda.new_stream()
    ran: list[str] = []

    def queue(stream: SimulatedStream, *names: str) -> None:
        with cuda.on(stream):
            for name in names:
                cuda.launch(lambda name=name: ran.append(name))

    queue(first, "a")
    event = first.record_event()
    queue(first, "b")
    queue(second, "c")
    second.wait_event(event)
    queue(second, "d")
    late = second.record_event()
    queue(second, "e")
    assert (event.query(), late.query(), ran) == (False, False, [])
    late.synchronize()
    assert (event.query(), late.query(), ran) == (True, True, ["c", "a", "d"])
    first.synchronize()
    cuda.finish()
    assert ran == ["c", "a", "d", "b", "e"]


def test_the_simulation_refuses_pageable_memory():
    cuda = SimulatedCuda(0)
    with pytest.raises(AssertionError, match="pageable"):
        cuda.copy(torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), cuda.new_stream())

"""Agents over an in-memory store, and a slow reference for their experts: plain torch parameters with the same initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from torch import Tensor, nn

from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Sections

torch.set_num_threads(1)


def initial_parameters(config: AgentConfig, expert: int, *, bank: int = 0, seed: int = 0) -> dict[str, nn.Parameter]:
    """Returns an expert's initial parameters, computed from the bank's spec and not fetched through a cache."""
    spec = config.bank_specs("test", seed)[bank]
    body = bytearray(spec.layout.body_bytes)
    spec.layout.initialize(body, seed=spec.seed, expert=expert)
    arrays = spec.layout.arrays(body)
    return {name: nn.Parameter(torch.from_numpy(arrays[name].copy())) for name in ("w1", "b1", "w2", "b2")}


class DenseTwin(nn.Module):
    """A slow reference for a tiered MoE layer: computes the same output token by token, with plain torch parameters.

    It does not route: which experts a token uses, and with which gates, are arguments.
    """

    def __init__(self, config: AgentConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.experts = [initial_parameters(config, expert, seed=seed) for expert in range(config.num_experts)]

    def forward(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
        tokens = []
        for x_D, experts_K, gates_K in zip(x_ND, experts_NK.tolist(), gates_NK, strict=True):
            outputs = []
            for expert in experts_K:
                p = self.experts[expert]
                outputs.append(torch.nn.functional.gelu(x_D @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])
            tokens.append(sum(gate * output for gate, output in zip(gates_K, outputs, strict=True)))
        return torch.stack(tokens)


class RecordingStore(InMemoryStore):
    """An in-memory store that remembers in `fetched` which experts were fetched: (bank, id)."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: set[tuple[str, int]] = set()

    def fetch(self, bank, experts, **options):
        self.fetched |= {(bank, expert) for expert in experts}
        return super().fetch(bank, experts, **options)


class World:
    """Makes caches and agents for a test, on in-memory stores of their own, and closes them at the end."""

    def __init__(self) -> None:
        self._caches: list[ExpertCache] = []

    def store(self, config: AgentConfig, *, seed: int = 0) -> RecordingStore:
        store = RecordingStore()
        for spec in config.bank_specs("test", seed):
            store.create_bank(spec)
        return store

    def caches(self, config: AgentConfig, *, capacity: int | None = None, store: InMemoryStore | None = None, seed: int = 0):
        """Makes a cache for each bank, with `capacity` slots each; by default with an equal share of `hbm_experts`."""
        store = store or self.store(config, seed=seed)
        slots = capacity or config.hbm_experts // config.num_banks
        made = [ExpertCache(store, name, capacity_experts=slots) for name in config.bank_names("test")]
        self._caches += made
        return made

    def agent(self, *, capacity: int | None = None, seed: int = 0, store: InMemoryStore | None = None, games=("a",), **changes) -> Agent:
        """Makes a tiny agent that knows `games`. `changes` are fields that differ from the configuration "tiny"."""
        config = replace(PRESETS["tiny"], **changes)
        agent = Agent(config, self.caches(config, capacity=capacity, store=store, seed=seed), seed=seed)
        for game in games:
            agent.add_game(game)
        return agent

    def close(self) -> None:
        for cache in self._caches:
            cache.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def twin() -> Callable[..., DenseTwin]:
    return DenseTwin


@pytest.fixture
def frames() -> Callable[..., Tensor]:
    """A function `frames(agent, batch, time)` that returns random frames (batch, time, stack, height, width)."""

    def make(agent: Agent, batch: int, time: int, *, seed: int = 0) -> Tensor:
        config = agent.config
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, time, config.frame_stack, config.frame_size, config.frame_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return make


@pytest.fixture
def stored() -> Callable[[ExpertCache], dict[int, str]]:
    """A function that flushes a cache and returns, by expert, a hash of the bytes that the store then holds."""

    def read(cache: ExpertCache) -> dict[int, str]:
        cache.flush()
        store = cache._shared.store
        bodies = {expert: bytearray(cache.layout.body_bytes) for expert in range(cache.num_experts)}
        for _ in store.fetch(cache.bank, list(bodies), into=lambda expert: memoryview(bodies[expert]), sections=Sections.ALL):
            pass
        return {expert: sha256(body).hexdigest() for expert, body in bodies.items()}

    return read

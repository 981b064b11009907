"""Helpers for the tests of protection: agents of all kinds, their experts as tensors, and a run that stops in its second game."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import AgentConfig
from ooc_moe.envs import make
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.rollout import Collector, Rollout
from ooc_moe.moe.layer import PARAMETERS
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from tests.ooc_moe.runs import PIXEL_AGENT, PPO, assert_same_end, bodies, pixel_run, play, resume_in, without_clock

CATCH, AVOID = "pixel/catch", "pixel/avoid"
# The dense network: one expert a layer, and one attention for all games.
DENSE = replace(PIXEL_AGENT, routing="token", num_experts=1, top_k=1, attention="shared", banks="per-layer", hbm_experts=2)
TOKEN = replace(PIXEL_AGENT, routing="token", num_experts=8, hbm_experts=4)


@contextmanager
def open_agent(config: AgentConfig) -> Iterator[Agent]:
    """Makes an agent that knows two pixel games, with its caches on an in-memory store, for the time of the block."""
    store = InMemoryStore()
    with ExitStack() as stack:
        caches = []
        for spec in config.bank_specs("run", 0):
            store.create_bank(spec)
            caches.append(stack.enter_context(ExpertCache(store, spec.name, capacity_experts=config.hbm_experts // config.num_banks)))
        agent = Agent(config, caches, seed=0)
        agent.add_game(CATCH)
        agent.add_game(AVOID)
        yield agent


def rollout_of(agent: Agent, game: str, generator: torch.Generator) -> Rollout:
    envs = make(game, PPO.num_envs, frame_size=10)
    collector = Collector(agent, envs, PPO, generator=generator, on_segment=lambda frames: None)
    collector.reset(0)
    return collector.collect()


def parameters_of(agent: Agent) -> dict[tuple[int, int], torch.Tensor]:
    """Returns, by (bank, expert), the parameters of all experts of the agent, each as one flat tensor."""
    found = {}
    for bank, cache in enumerate(agent.caches):
        for wave in cache.waves(range(cache.num_experts)):
            with cache.reading(wave) as slots:
                for expert, slot in zip(wave, slots, strict=True):
                    found[bank, expert] = torch.cat([cache.views[name][slot].flatten() for name in PARAMETERS])
    return found


@torch.no_grad()
def restore(agent: Agent, dense: dict[str, torch.Tensor], experts: dict[tuple[int, int], torch.Tensor]) -> None:
    """Sets all parameters of the agent: dense ones by name, and those of experts as `parameters_of` returned them."""
    for name, parameter in agent.named_parameters():
        parameter.copy_(dense[name])
    for (bank, expert), flat in experts.items():
        cache = agent.caches[bank]
        with cache.updating([expert]) as (slot,):
            shapes = [cache.views[name][slot].shape for name in PARAMETERS]
            pieces = flat.split([shape.numel() for shape in shapes])
            for name, shape, piece in zip(PARAMETERS, shapes, pieces, strict=True):
                cache.views[name][slot] = piece.view(shape)


def assert_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: AgentConfig, protection: str) -> None:
    """Asserts that a run that fails in its second game, and is resumed from the end of the first, ends like an undisturbed run."""
    undisturbed, stopped = (pixel_run(tmp_path / x / "run", updates=1, agent=agent, protection=protection) for x in "ab")
    stores = InMemoryStore(), InMemoryStore()
    play(undisturbed, stores[0])
    update = Learner.update
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", lambda self, *a, **k: update(self, *a, **k) if self.game == CATCH else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play(stopped, stores[1])
    resume_in(stopped, stores[1])
    assert without_clock(undisturbed.run_dir) == without_clock(stopped.run_dir)
    assert_same_end(undisturbed.run_dir, stopped.run_dir)
    for bank in agent.bank_names("run"):
        assert bodies(stores[0], bank) == bodies(stores[1], bank)
    last = [event for event in without_clock(stopped.run_dir) if event["event"] == "update"][-1]
    assert last["losses"]["protection"] > 0

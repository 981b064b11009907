"""Feature replay and the learner's choice of what to protect."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ooc_moe.agent import Agent
from ooc_moe.config import PRESETS
from ooc_moe.envs import make
from ooc_moe.learner import Learner
from ooc_moe.protection import make_protection
from ooc_moe.rollout import Collector
from ooc_moe.run_config import PPOConfig, RunConfig
from ooc_moe.stem_replay import StemReplay
from ooc_moe_client.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore

PPO = PPOConfig(num_envs=2, rollout_steps=4, epochs=1, minibatch_segments=2)
GAMES = ("pixel/catch", "pixel/avoid")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def frames(generator) -> torch.Tensor:
    return torch.randint(256, (300, 1, 4, 4), generator=generator).to(torch.uint8)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, frames_MSHW: torch.Tensor) -> torch.Tensor:
        return self.linear(frames_MSHW.flatten(1) / 255)


def test_nothing_stored_costs_nothing(generator):
    assert StemReplay(Stem()).loss(GAMES[0], generator) == 0


def test_an_unchanged_stem_costs_nothing_and_a_changed_one_is_pulled_back(frames, generator):
    stem = Stem()
    replay = StemReplay(stem)
    replay.store(frames)
    assert replay.loss(GAMES[0], generator) < 1e-10
    with torch.no_grad():
        stem.linear.weight += 0.1 * torch.randn(stem.linear.weight.shape, generator=generator)
    optimizer = torch.optim.Adam(stem.parameters(), lr=1e-2)
    before = replay.loss(GAMES[0], generator).item()
    for _ in range(50):
        optimizer.zero_grad()
        replay.loss(GAMES[0], generator).backward()
        optimizer.step()
    assert replay.loss(GAMES[0], generator).item() < 0.2 * before


def test_its_state_goes_on_where_it_was(frames):
    stem = Stem()
    replay, loaded = StemReplay(stem), StemReplay(stem)
    replay.store(frames[:200])
    replay.store(frames[200:])
    loaded.load_state_dict(replay.state_dict())
    loaded.load_state_dict(StemReplay(stem).state_dict())  # Of a run without a finished game.
    stem.linear.reset_parameters()
    losses = [each.loss(GAMES[0], torch.Generator().manual_seed(3)) for each in (replay, loaded)]
    assert torch.equal(*losses)
    assert losses[0] > 0


@pytest.mark.parametrize(("protection", "learns"), [("replay", [True] * 3), ("none", [True] * 3), ("freeze", [True, False, False])])
def test_a_frozen_stem_learns_until_there_is_a_second_game(protection, learns, generator):
    config = RunConfig(run_dir=Path("unused"), games=GAMES, agent=PRESETS["tiny"], ppo=PPO, protection=protection)
    store = InMemoryStore()
    (spec,) = config.agent.bank_specs("run", config.seed)
    store.create_bank(spec)
    with ExpertCache(store, spec.name, capacity_experts=8) as cache:
        agent = Agent(config.agent, [cache], seed=0)
        protection = make_protection(config, agent)
        for game, expected in zip((*GAMES, GAMES[0]), learns, strict=True):
            agent.add_game(game)
            before = {name: value.clone() for name, value in agent.stem.state_dict().items()}
            learner = Learner(agent, game, config, protection=protection, generator=generator)
            played = Collector(agent, make(game, 2, frame_size=42), PPO, generator=generator, on_segment=lambda frames: None)
            played.reset(0)
            rollout = played.collect()
            losses = learner.update(rollout, remaining=1.0)
            protection.leave(game, rollout, generator)
            assert losses["grad_norm"] > 0
            changed = [not torch.equal(value, before[name]) for name, value in agent.stem.state_dict().items()]
            assert any(changed) == expected

"""Feature replay and the learner's choice of what to protect."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.envs import make
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import make_protection
from ooc_moe.learning.rollout import Collector
from ooc_moe.learning.stem_replay import StemReplay
from ooc_moe.session import checkpoint
from ooc_moe.session.checkpoint import Checkpoint, Progress
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore
from tests.ooc_moe.runs import assert_same_state

PPO = PPOConfig(num_envs=2, rollout_steps=4, epochs=1, minibatch_segments=2)
GAMES = CATCH, AVOID = "pixel/catch", "pixel/avoid"


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
    assert StemReplay(Stem()).loss(CATCH, generator) == 0


def test_an_unchanged_stem_costs_nothing_and_a_changed_one_is_pulled_back(frames, generator):
    stem = Stem()
    replay = StemReplay(stem)
    replay.store(AVOID, frames)
    assert replay.loss(CATCH, generator) < 1e-10
    with torch.no_grad():
        stem.linear.weight += 0.1 * torch.randn(stem.linear.weight.shape, generator=generator)
    optimizer = torch.optim.Adam(stem.parameters(), lr=1e-2)
    before = replay.loss(CATCH, generator).item()
    for _ in range(50):
        optimizer.zero_grad()
        replay.loss(CATCH, generator).backward()
        optimizer.step()
    assert replay.loss(CATCH, generator).item() < 0.2 * before


def test_a_game_that_comes_back_is_held_to_the_others_only(frames, generator):
    stem = Stem()
    replay = StemReplay(stem)
    replay.store(CATCH, frames[:200])
    stem.linear.reset_parameters()
    before = generator.get_state()
    assert replay.loss(CATCH, generator) == 0
    assert torch.equal(generator.get_state(), before)
    replay.store(AVOID, frames[200:])
    assert replay.loss(CATCH, generator) < 1e-10
    assert replay.loss(AVOID, generator) > 1e-3


def test_a_game_left_again_is_replayed_as_it_is_now(frames, generator):
    stem = Stem()
    replay = StemReplay(stem)
    replay.store(CATCH, frames[:200])
    stem.linear.reset_parameters()
    replay.store(CATCH, frames[100:])
    assert replay.loss(AVOID, generator) < 1e-10


def test_games_that_never_come_back_are_drawn_as_the_rows_of_one_table(frames):
    """The slow twin joins what the games left, in order; equal bit for bit."""
    stem = Stem()
    replay = StemReplay(stem, weight=0.3)
    replay.store(CATCH, frames[:100])
    features_MD = [stem(frames[:100])]
    stem.linear.reset_parameters()
    replay.store(AVOID, frames[100:])
    features_MD = torch.cat([*features_MD, stem(frames[100:])]).detach()
    stem.linear.reset_parameters()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(3):
        loss = replay.loss("pixel/cross", generators[0])
        rows = torch.randint(300, (64,), generator=generators[1])
        wanted = 0.3 * ((stem(frames[rows]) - features_MD[rows]).square() / features_MD.var(dim=0).mean()).mean()
        gradients = [torch.autograd.grad(each, stem.linear.weight)[0] for each in (loss, wanted)]
        assert torch.equal(loss, wanted)
        assert torch.equal(*gradients)


def test_its_state_goes_on_where_it_was(frames, tmp_path):
    stem = Stem()
    replay, loaded = StemReplay(stem), StemReplay(stem)
    loaded.load_state_dict(replay.state_dict())  # Of a run without a finished game.
    replay.store(CATCH, frames[:200])
    replay.store(AVOID, frames[200:])
    checkpoint.save(tmp_path / "latest.pt", Checkpoint(progress=Progress(), snapshot_id=0, state=replay.state_dict()))
    loaded.load_state_dict(checkpoint.load(tmp_path / "latest.pt").state)
    stem.linear.reset_parameters()
    for game in (*GAMES, "pixel/cross"):
        losses = [each.loss(game, torch.Generator().manual_seed(3)) for each in (replay, loaded)]
        assert torch.equal(*losses)
        assert losses[0] > 0
    for each in (replay, loaded):
        each.store(CATCH, frames[:50])
    assert_same_state(loaded.state_dict(), replay.state_dict())


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

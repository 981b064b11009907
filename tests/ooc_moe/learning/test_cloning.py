"""Output cloning: what it stores, what it pulls at and what it leaves alone, whole runs bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import RunConfig
from ooc_moe.learning.cloning import OutputCloning
from ooc_moe.learning.learner import Learner
from tests.ooc_moe.learning.protected import (
    AVOID,
    CATCH,
    DENSE,
    TOKEN,
    assert_resumes_bit_for_bit,
    open_agent,
    parameters_of,
    restore,
    rollout_of,
)
from tests.ooc_moe.runs import PIXEL_AGENT, PPO, assert_same_state


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[DENSE, TOKEN, PIXEL_AGENT], ids=["dense", "token", "pools"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    with open_agent(request.param) as agent:
        yield agent


def _say(agent: Agent, rollout) -> torch.Tensor:
    agent.eval()
    with torch.no_grad():
        output = agent(rollout.frames_BTSHW, game=CATCH, starts_BT=rollout.starts_BT)
    agent.train()
    return torch.cat([output.logits_BTA.log_softmax(-1), output.value_BT.unsqueeze(-1)], dim=-1)


def test_an_unchanged_agent_pays_nothing_and_a_changed_one_does(agent, generator):
    cloning = OutputCloning(agent, weight=2.0)
    assert cloning.loss(AVOID, generator) == 0
    cloning.leave(CATCH, rollout_of(agent, CATCH, generator), generator)
    assert float(cloning.loss(AVOID, generator).detach()) < 1e-5
    assert cloning.loss(CATCH, generator) == 0  # A game that came back may change its mind.
    with torch.no_grad():
        for parameter in agent.shared_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert float(cloning.loss(AVOID, generator).detach()) > 1e-3


def test_the_loss_is_the_divergence_from_the_old_policy_and_the_error_of_the_value(agent, generator, monkeypatch):
    cloning = OutputCloning(agent, weight=3.0)
    cloning.leave(CATCH, rollout_of(agent, CATCH, generator), generator)
    stored = cloning.state_dict()[CATCH]
    old = torch.distributions.Categorical(logits=stored["logits"])
    stored["logits"] = stored["logits"] + torch.randn(stored["logits"].shape, generator=generator)
    stored["values"] = stored["values"] + torch.randn(stored["values"].shape, generator=generator)
    monkeypatch.setattr(torch, "randint", lambda high, shape, generator: torch.arange(shape[0]) % high if shape else torch.zeros(()))
    monkeypatch.setattr("ooc_moe.learning.cloning.FRAMES_PER_STEP", stored["starts"].numel())
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=stored["logits"]), old).mean()
    with torch.no_grad():
        value = _say(agent, type("R", (), {"frames_BTSHW": stored["frames"], "starts_BT": stored["starts"]}))[..., -1]
    wanted = 3.0 * (kl + (value - stored["values"]).square().mean() / stored["values"].var())
    assert float(cloning.loss(AVOID, generator).detach()) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    "agent", [DENSE, pytest.param(TOKEN, marks=pytest.mark.slow), PIXEL_AGENT], ids=["dense", "token", "pools"], indirect=True
)
def test_the_next_game_moves_the_outputs_less_and_nothing_that_the_old_game_owns(agent, generator):
    """With pools the old game's experts are read for it, and stay what they were, as do its heads and norms."""
    rollout, next_one = rollout_of(agent, CATCH, generator), rollout_of(agent, AVOID, generator)
    config = RunConfig(run_dir=Path("run"), games=(CATCH,), agent=agent.config, ppo=replace(PPO, learning_rate=3e-3))
    start, experts, said = {name: p.clone() for name, p in agent.named_parameters()}, parameters_of(agent), _say(agent, rollout)
    owned = {id(parameter): parameter.clone() for parameter in agent.game_parameters(CATCH)}
    errors = {}
    for name, cloning in (("free", OutputCloning(agent)), ("held", OutputCloning(agent, weight=10.0))):
        restore(agent, start, experts)
        if name == "held":
            cloning.leave(CATCH, rollout, generator)
        learner = Learner(agent, AVOID, config, protection=cloning, generator=torch.Generator().manual_seed(1))
        for _ in range(12):
            losses = learner.update(next_one, remaining=1.0)
        errors[name] = float((_say(agent, rollout) - said).abs().mean())
    assert losses["protection"] > 0
    assert errors["held"] < 0.6 * errors["free"]
    assert all(torch.equal(parameter, owned[id(parameter)]) for parameter in agent.game_parameters(CATCH))
    assert all(parameter.grad is None for parameter in agent.game_parameters(CATCH))
    if agent.config.routing == "pool":
        now = parameters_of(agent)
        (cold,) = agent.pools(CATCH).by_bank(1)
        assert_same_state({e: now[0, e] for e in cold}, {e: experts[0, e] for e in cold})


@pytest.mark.parametrize("config", [pytest.param(DENSE, marks=pytest.mark.slow), PIXEL_AGENT], ids=["dense", "pools"])
def test_a_run_is_taken_up_bit_for_bit(tmp_path, monkeypatch, config):
    assert_resumes_bit_for_bit(tmp_path, monkeypatch, config, "clone")

"""Elastic weight consolidation: its Fisher against a slow twin, its pull on the stem and on experts, whole runs bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import RunConfig
from ooc_moe.learning import ewc
from ooc_moe.learning.ewc import ElasticWeights
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


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Fisher is not the point."""
    monkeypatch.setattr(ewc, "FISHER_SAMPLES", 16)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=[DENSE, TOKEN, PIXEL_AGENT], ids=["dense", "token", "pools"])
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    with open_agent(request.param) as agent:
        yield agent


def test_no_game_left_costs_nothing(agent, generator):
    assert ElasticWeights(agent).loss(CATCH, generator) == 0


@pytest.mark.parametrize("part", ["policy", "value"])
def test_the_fisher_is_that_of_the_policy_and_the_value(generator, monkeypatch, part):
    """Of one frame, drawn often. The slow twin draws nothing: all actions' scores squared, by probability, or the value's gradient."""
    with open_agent(DENSE) as agent:
        rollout = rollout_of(agent, CATCH, generator)
        row, time = rollout.played_BT.nonzero()[5].tolist()
        monkeypatch.setattr(ElasticWeights, "_frames", lambda *_: [(row, time)] * 100)
        with torch.no_grad():  # One of the two says much, the other nothing.
            agent.networks["game:pixel%2Fcatch"].policy.weight.mul_(100.0 if part == "policy" else 0.0)
            agent.networks["game:pixel%2Fcatch"].value.weight.mul_(0.0 if part == "policy" else 1.0)
        held = ElasticWeights(agent)
        held.leave(CATCH, rollout, generator)
        parameters = list(agent.shared_parameters())
        seen = slice(row, row + 1), slice(time + 1)
        output = agent(rollout.frames_BTSHW[seen], game=CATCH, starts_BT=rollout.starts_BT[seen], routing=rollout.experts_BTLK[seen])
        log_probs_A = output.logits_BTA[0, -1].log_softmax(-1)

        def squares(said: torch.Tensor) -> torch.Tensor:
            gradients = torch.autograd.grad(said, parameters, retain_graph=True, allow_unused=True)
            return torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(gradients, parameters, strict=True)]).square().detach()

        wanted = squares(output.value_BT[0, -1]) + sum(float(log_prob.detach().exp()) * squares(log_prob) for log_prob in log_probs_A)
        found = torch.cat([spring.fisher.flatten() for spring in held._dense])
    found, wanted = found / found.sum(), wanted / wanted.sum()
    assert float((found - wanted).abs().sum()) < 0.4


def test_the_fishers_mean_is_1_and_experts_are_held_where_all_games_use_them(agent, generator):
    held = ElasticWeights(agent)
    held.leave(CATCH, rollout_of(agent, CATCH, generator), generator)
    every = torch.cat([spring.fisher.flatten() for spring in (*held._dense, *held._experts.values())])
    assert float(every.mean()) == pytest.approx(1.0, rel=1e-4)
    assert bool(held._experts) == (agent.config.routing == "token")
    stored = parameters_of(agent)
    assert all(torch.equal(spring.anchor, stored[key]) for key, spring in held._experts.items())
    assert all(torch.equal(spring.anchor, p) for spring, p in zip(held._dense, agent.shared_parameters(), strict=True))
    first = {key: spring.fisher for key, spring in held._experts.items()}
    held.leave(AVOID, rollout_of(agent, AVOID, generator), generator)
    every = torch.cat([held._experts[key].fisher - ewc.DECAY * first.get(key, 0) for key in held._experts] + [torch.zeros(1)])
    assert float(every.min()) >= -1e-4  # The older game's is still in it.


def test_every_shared_parameter_is_pulled_back_to_where_it_was(agent, generator):
    """After a heavy penalty, a step's gradient is fisher * (parameter - anchor) for the stem and for the experts of the step."""
    held = ElasticWeights(agent, weight=10.0)
    rollout = rollout_of(agent, CATCH, generator)
    held.leave(CATCH, rollout, generator)
    for spring in (*held._dense, *held._experts.values()):
        spring.anchor.sub_(0.5)  # As if all had moved up by a half.
    loss = held.loss(AVOID, generator)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(5.0 * sum(float(spring.fisher.sum()) for spring in held._dense) / 4, rel=1e-4)
    for parameter, spring in zip(agent.shared_parameters(), held._dense, strict=True):
        torch.testing.assert_close(parameter.grad, 5.0 * spring.fisher)
    for gradients, experts in zip(agent.gradients, [range(cache.num_experts) for cache in agent.caches], strict=True):
        for expert in [*experts][::2]:
            gradients.of(expert)
    held.correct_gradients(AVOID)
    for bank, gradients in enumerate(agent.gradients):
        for expert in gradients.experts:
            spring = held._experts.get((bank, expert))
            pulled = torch.zeros_like(gradients.flat(expert)) if spring is None else 5.0 * spring.fisher
            torch.testing.assert_close(gradients.flat(expert), pulled, rtol=1e-4, atol=1e-4)


def test_leaving_a_game_changes_nothing_that_is_trained(agent, generator):
    rollout, before, experts = rollout_of(agent, CATCH, generator), agent.state_dict(), parameters_of(agent)
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in before.items()}
    ElasticWeights(agent).leave(CATCH, rollout, generator)
    assert_same_state(agent.state_dict(), before)
    assert_same_state(parameters_of(agent), experts)
    assert all(parameter.grad is None for parameter in agent.parameters())
    assert all(gradients.experts == [] for gradients in agent.gradients)
    assert agent.training


def test_a_heavy_penalty_keeps_the_next_game_from_moving_what_they_share(agent, generator):
    moved = {}
    start, experts = {name: p.clone() for name, p in agent.named_parameters()}, parameters_of(agent)
    rollout, config = rollout_of(agent, CATCH, generator), RunConfig(run_dir=Path("run"), games=(CATCH,), agent=agent.config, ppo=PPO)
    next_one = rollout_of(agent, AVOID, generator)
    held = ElasticWeights(agent, weight=1e6)
    held.leave(CATCH, rollout, generator)
    important = [spring.fisher > spring.fisher.mean() for spring in held._dense]
    for name, protection in (("free", ElasticWeights(agent)), ("held", held)):
        restore(agent, start, experts)
        learner = Learner(agent, AVOID, config, protection=protection, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            learner.update(next_one, remaining=1.0)
        pairs = zip(agent.shared_parameters(), held._dense, important, strict=True)
        moved[name] = sum(float((p.detach() - spring.anchor)[which].abs().sum()) for p, spring, which in pairs)
        now = parameters_of(agent)
        moved[f"{name} experts"] = sum(float((now[k] - s.anchor)[s.fisher > s.fisher.mean()].abs().sum()) for k, s in held._experts.items())
    assert moved["held"] < 0.3 * moved["free"]
    assert moved["held experts"] <= 0.5 * moved["free experts"]


@pytest.mark.parametrize("config", [pytest.param(DENSE, marks=pytest.mark.slow), TOKEN], ids=["dense", "token"])
def test_a_run_is_taken_up_bit_for_bit(tmp_path, monkeypatch, config):
    assert_resumes_bit_for_bit(tmp_path, monkeypatch, config, "ewc")

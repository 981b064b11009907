"""A learner's updates against a slow plain twin: PPO's loss over the steps that were played, and torch's own Adam for everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import Unprotected
from ooc_moe.learning.rollout import Rollout
from tests.ooc_moe.learning.protected import DENSE, TOKEN, open_agent, parameters_of, restore, rollout_of
from tests.ooc_moe.runs import PIXEL_AGENT

CROSS = "pixel/cross"  # Its games are short: some end within a segment.
PPO = PPOConfig(epochs=2, minibatch_segments=3, learning_rate=3e-3, max_grad_norm=0.4, entropy_coef=0.02, value_coef=0.4)
ANEW = replace(PPO, replay_routing=False)
REMAINING = (1.0, 0.25)


class Twin:
    """One Adam, in which each expert is a vector beside the dense parameters."""

    def __init__(self, agent: Agent, *, replay_routing: bool) -> None:
        self.agent, self.replay_routing = agent, replay_routing
        self.moved = 0  # Choices of experts that are not the rollout's.
        self.dense = [*agent.game_parameters(CROSS), *agent.shared_parameters()]
        self.experts = {key: nn.Parameter(flat) for key, flat in parameters_of(agent).items()}
        self.adam = torch.optim.Adam([*self.dense, *self.experts.values()], eps=1e-5)

    def update(self, rollout: Rollout, learning_rate: float, generator: torch.Generator) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate
        orders = [torch.randperm(len(rollout.frames_BTSHW), generator=generator) for _ in range(PPO.epochs)]
        for rows in [rows for order in orders for rows in order.split(PPO.minibatch_segments)]:
            self.adam.zero_grad()
            for gradients in self.agent.gradients:
                gradients.zero()
            self._loss(rollout, rows, generator).backward()
            for (bank, expert), parameter in self.experts.items():
                if expert in self.agent.gradients[bank].experts:
                    parameter.grad = self.agent.gradients[bank].flat(expert).clone()
            norm = nn.utils.clip_grad_norm_([*self.dense, *self.experts.values()], PPO.max_grad_norm)
            assert norm > PPO.max_grad_norm
            self.adam.step()
            restore(self.agent, dict(self.agent.named_parameters()), self.experts)

    def _loss(self, rollout: Rollout, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        starts_BT, routing = rollout.starts_BT[rows], rollout.experts_BTLK[rows]
        replayed = {"routing": routing} if self.replay_routing else {"generator": generator}
        output = self.agent(rollout.frames_BTSHW[rows], game=CROSS, starts_BT=starts_BT, **replayed)
        self.moved += int((output.routing_BTLK.sort(-1).values != routing.sort(-1).values).sum())
        played = rollout.played_BT[rows]
        policy = torch.distributions.Categorical(logits=output.logits_BTA[played])
        ratio = (policy.log_prob(rollout.actions_BT[rows][played]) - rollout.log_probs_BT[rows][played]).exp()
        advantage = rollout.advantages_BT[rows][played]
        advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
        clipped = ratio.clamp(1 - PPO.clip, 1 + PPO.clip)
        error = (output.value_BT - rollout.values_BT[rows] - rollout.advantages_BT[rows])[played]
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        loss = loss + PPO.value_coef * error.square().mean() / 2 - PPO.entropy_coef * policy.entropy().mean()
        return loss + self.agent.config.balance_weight * output.aux_loss


@pytest.mark.parametrize(
    ("config", "ppo", "learning_rates"),
    [
        pytest.param(DENSE, PPO, (3e-3, 0.75e-3), id="dense"),
        pytest.param(TOKEN, PPO, (3e-3, 0.75e-3), id="token"),
        pytest.param(PIXEL_AGENT, PPO, (3e-3, 0.75e-3), id="pools"),
        pytest.param(PIXEL_AGENT, replace(PPO, anneal=False), (3e-3, 3e-3), id="not annealed"),
        pytest.param(PIXEL_AGENT, ANEW, (3e-3, 0.75e-3), id="routed anew"),
        pytest.param(replace(PIXEL_AGENT, router_noise=0.0), ANEW, (3e-3, 0.75e-3), id="routed anew without noise"),
    ],
)
def test_two_updates_equal_plain_ones(config, ppo, learning_rates):
    run = RunConfig(run_dir=Path("run"), games=(CROSS,), agent=config, ppo=ppo)
    with open_agent(config) as agent, open_agent(config) as other:
        for each in (agent, other):
            each.add_game(CROSS)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        learner = Learner(agent, CROSS, run, protection=Unprotected(), generator=generators[0])
        twin, before = Twin(other, replay_routing=ppo.replay_routing), parameters_of(agent)
        for remaining, learning_rate in zip(REMAINING, learning_rates, strict=True):
            rollout = rollout_of(agent, CROSS, torch.Generator().manual_seed(2))
            assert rollout.starts_BT[:, 1:].any()
            assert not rollout.played_BT.all()
            assert learner.update(rollout, remaining=remaining)["lr"] == learning_rate
            twin.update(rollout, learning_rate, generators[1])
        assert (twin.moved > 0) is not ppo.replay_routing
        for (name, parameter), expected in zip(agent.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        now, expected = parameters_of(agent), parameters_of(other)
        for key in now:
            torch.testing.assert_close(now[key], expected[key], rtol=0, atol=1e-5)
        moved = max(float((now[key] - before[key]).abs().max()) for key in now)
        assert moved > 3 * PPO.learning_rate

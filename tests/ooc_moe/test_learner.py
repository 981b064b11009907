"""A learner's updates against a slow plain twin: PPO's loss over the steps that were played, and torch's own Adam for everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ooc_moe.agent import Agent
from ooc_moe.learner import Learner
from ooc_moe.protection import Unprotected
from ooc_moe.rollout import Rollout
from ooc_moe.run_config import PPOConfig, RunConfig
from tests.ooc_moe.protected import DENSE, TOKEN, open_agent, parameters_of, restore, rollout_of
from tests.ooc_moe.runs import PIXEL_AGENT

CROSS = "pixel/cross"  # Its games are short: some end within a segment.
PPO = PPOConfig(epochs=2, minibatch_segments=3, learning_rate=3e-3, max_grad_norm=0.4, entropy_coef=0.02, value_coef=0.4)
REMAINING = (1.0, 0.25)


class Twin:
    """One Adam, in which each expert is a vector beside the dense parameters."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
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
            self._loss(rollout, rows).backward()
            for (bank, expert), parameter in self.experts.items():
                if expert in self.agent.gradients[bank].experts:
                    parameter.grad = self.agent.gradients[bank].flat(expert).clone()
            norm = nn.utils.clip_grad_norm_([*self.dense, *self.experts.values()], PPO.max_grad_norm)
            assert norm > PPO.max_grad_norm
            self.adam.step()
            restore(self.agent, dict(self.agent.named_parameters()), self.experts)

    def _loss(self, rollout: Rollout, rows: torch.Tensor) -> torch.Tensor:
        output = self.agent(rollout.frames_BTSHW[rows], game=CROSS, starts_BT=rollout.starts_BT[rows], routing=rollout.experts_BTLK[rows])
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


@pytest.mark.parametrize("config", [DENSE, TOKEN, PIXEL_AGENT], ids=["dense", "token", "pools"])
def test_two_updates_equal_plain_ones(config):
    run = RunConfig(run_dir=Path("run"), games=(CROSS,), agent=config, ppo=PPO)
    with open_agent(config) as agent, open_agent(config) as other:
        for each in (agent, other):
            each.add_game(CROSS)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        learner = Learner(agent, CROSS, run, protection=Unprotected(), generator=generators[0])
        twin, before = Twin(other), parameters_of(agent)
        for remaining in REMAINING:
            rollout = rollout_of(agent, CROSS, torch.Generator().manual_seed(2))
            assert rollout.starts_BT[:, 1:].any()
            assert not rollout.played_BT.all()
            learner.update(rollout, remaining=remaining)
            twin.update(rollout, remaining * PPO.learning_rate, generators[1])
        for (name, parameter), expected in zip(agent.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        now, expected = parameters_of(agent), parameters_of(other)
        for key in now:
            torch.testing.assert_close(now[key], expected[key], rtol=0, atol=1e-5)
        moved = max(float((now[key] - before[key]).abs().max()) for key in now)
        assert moved > 3 * PPO.learning_rate

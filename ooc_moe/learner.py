"""One PPO update: epochs of minibatches over a rollout, for the dense parameters of one game and the experts it used.

The learner lives as long as its game is in training: dense Adam is rebuilt for every game, so that no momentum of one game moves another's
parameters; the experts' moments travel in their records. Knows nothing of environments, phases or files.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from ooc_moe.agent import Agent
from ooc_moe.expert_adam import ExpertAdam
from ooc_moe.lookahead import uses_of_update
from ooc_moe.ppo import clipped_loss
from ooc_moe.rollout import Rollout
from ooc_moe.run_config import RunConfig
from ooc_moe.stem_replay import StemReplay
from ooc_moe_wire.errors import InvalidRequest

ADAM_EPS = 1e-5
STEM_REPLAY_WEIGHT = 0.05


class Learner:
    """Updates the agent from rollouts of `game`."""

    def __init__(self, agent: Agent, game: str, config: RunConfig, *, stem_replay: StemReplay, generator: torch.Generator) -> None:
        self.agent, self.game, self.config = agent, game, config
        self._stem_replay, self._generator = stem_replay, generator
        self.dense_parameters = [*agent.game_parameters(game)]
        # Frozen for good once there is a second game: also when the first one comes back.
        if config.protection != "freeze" or agent.games == [game]:
            self.dense_parameters += agent.stem_parameters()
        self.dense = torch.optim.Adam(self.dense_parameters, lr=config.ppo.learning_rate, eps=ADAM_EPS)
        self.experts = ExpertAdam(agent.caches, agent.gradients, lr=config.ppo.learning_rate, eps=ADAM_EPS)

    def update(self, rollout: Rollout, *, remaining: float) -> dict[str, float]:
        """Learns from one rollout; returns the means of what was measured.

        Args:
            rollout: what was played with the present parameters.
            remaining: the share of this game's updates still to come, this one included; scales the learning rate.
        """
        learning_rate = self.config.ppo.learning_rate * remaining
        self.dense.param_groups[0]["lr"] = self.experts.lr = learning_rate
        self.agent.train()
        minibatches = self._minibatches(len(rollout.frames_BTSHW))
        uses = uses_of_update(rollout.experts_BTLK, minibatches, num_banks=len(self.agent.caches))
        for cache, to_come in zip(self.agent.caches, uses, strict=True):
            cache.schedule(to_come, ahead=self.config.prefetch != "off")
        measured: defaultdict[str, list[float]] = defaultdict(list)
        for rows in minibatches:
            for name, value in self._minibatch(rollout, rows).items():
                measured[name].append(value)
        return {name: sum(values) / len(values) for name, values in measured.items()} | {"lr": learning_rate}

    def _minibatches(self, num_segments: int) -> list[Tensor]:
        """The segments of each optimizer step, all epochs'."""
        orders = [torch.randperm(num_segments, generator=self._generator) for _ in range(self.config.ppo.epochs)]
        return [rows for order in orders for rows in torch.split(order, self.config.ppo.minibatch_segments)]

    def _minibatch(self, rollout: Rollout, rows: Tensor) -> dict[str, float]:
        """One optimizer step on these segments."""
        device = self.config.device
        output = self.agent(
            rollout.frames_BTSHW[rows].to(device),
            game=self.game,
            starts_BT=rollout.starts_BT[rows].to(device),
            routing=rollout.experts_BTLK[rows].to(device),
        )
        loss = clipped_loss(
            self.config.ppo,
            logits_BTA=output.logits_BTA,
            value_BT=output.value_BT,
            actions_BT=rollout.actions_BT[rows].to(device),
            old_log_probs_BT=rollout.log_probs_BT[rows].to(device),
            advantages_BT=rollout.advantages_BT[rows].to(device),
            returns_BT=rollout.returns_BT[rows].to(device),
            played_BT=rollout.played_BT[rows].to(device),
        )
        balance = self.agent.config.balance_weight * output.aux_loss
        replay = STEM_REPLAY_WEIGHT * self._replay_loss()
        total = loss.total + balance + replay
        self._check_finite("loss", float(total.detach()))
        self.dense.zero_grad()
        self.experts.zero_grad()
        total.backward()
        grad_norm = self.experts.clip_grad_norm(self.dense_parameters, self.config.ppo.max_grad_norm)
        self._check_finite("gradient norm", grad_norm)
        self.dense.step()
        self.experts.step()
        return {
            "policy": float(loss.policy),
            "value": float(loss.value),
            "entropy": float(loss.entropy),
            "balance": float(output.aux_loss.detach()),
            "stem_replay": float(replay.detach()),
            "total": float(total.detach()),
            "approx_kl": float(loss.approx_kl),
            "clip_fraction": float(loss.clip_fraction),
            "grad_norm": grad_norm,
        }

    def _check_finite(self, name: str, value: float) -> None:
        """Stops a run that diverges before a step makes parameters of it."""
        if not math.isfinite(value):
            raise InvalidRequest(f"learning_rate: with {self.config.ppo.learning_rate:g} the {name} became {value}; begin again with less")

    def _replay_loss(self) -> Tensor:
        if self.config.protection != "replay":
            return torch.zeros((), device=self.config.device)
        return self._stem_replay.loss(self.agent.stem, self._generator)

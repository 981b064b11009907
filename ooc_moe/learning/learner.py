"""PPO updates: epochs of minibatches over a rollout, for the dense parameters of one game and the experts that it used.

There is one learner for each game in training. Every game begins with new Adam optimizers, for its experts too, so that no momentum of one
game moves another game's parameters. There is one exception: games that take turns use the same optimizers for the parameters that they
share.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import RunConfig
from ooc_moe.learning.lookahead import uses_of_update
from ooc_moe.learning.ppo import clipped_loss
from ooc_moe.learning.protection import Protection
from ooc_moe.learning.rollout import Rollout
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_wire.errors import InvalidRequest

ADAM_EPS = 1e-5


class Learner:
    """Updates the agent by PPO from rollouts of `game`.

    Args:
        agent: the agent in training.
        game: the game whose own parameters are trained together with the shared ones.
        config: the run's configuration.
        protection: the method against forgetting. It keeps this game from damaging shared parameters that earlier games need.
        generator: draws minibatches, and the router's noise where updates do not reuse the rollout's routing.
        sharing_with: the learner of a game that takes turns with this one. Both learners then use the same optimizers for shared parameters
            and experts. None: the learner makes its own.
    """

    def __init__(
        self,
        agent: Agent,
        game: str,
        config: RunConfig,
        *,
        protection: Protection,
        generator: torch.Generator,
        sharing_with: Learner | None = None,
    ) -> None:
        self.agent, self.game, self.config = agent, game, config
        self._protection, self._generator = protection, generator
        lr = config.ppo.learning_rate
        self.own = torch.optim.Adam(agent.game_parameters(game), lr=lr, eps=ADAM_EPS, fused=True)
        self.shared: torch.optim.Adam
        self.experts: ExpertAdam
        if sharing_with is not None:
            self.shared, self.experts = sharing_with.shared, sharing_with.experts
        else:
            self.shared = torch.optim.Adam(agent.shared_parameters(), lr=lr, eps=ADAM_EPS, fused=True)
            self.experts = ExpertAdam(agent.caches, agent.gradients, lr=lr, eps=ADAM_EPS)
        self.dense_parameters = [parameter for dense in (self.own, self.shared) for parameter in dense.param_groups[0]["params"]]

    def update(self, rollout: Rollout, *, remaining: float) -> dict[str, float]:
        """Trains the agent on one rollout: several epochs of minibatches, with one optimizer step for each minibatch.

        Args:
            rollout: played with the present parameters.
            remaining: the share of this game's updates that are still to come, including this one. An annealed learning rate is scaled by
                it.

        Returns:
            The mean over all minibatches of each loss and measure, and the learning rate as "lr".
        """
        learning_rate = self.config.ppo.learning_rate * (remaining if self.config.ppo.anneal else 1)
        self.own.param_groups[0]["lr"] = self.shared.param_groups[0]["lr"] = self.experts.lr = learning_rate
        self.agent.train()
        minibatches = self._minibatches(len(rollout.frames_BTSHW))
        for cache, uses in zip(self.agent.caches, self._uses(rollout, minibatches), strict=True):
            cache.schedule(uses, ahead=self.config.prefetch != "off")
        # In the memory format that the stem uses, converted once and not in every epoch.
        frames_BTHWS = rollout.frames_BTSHW.movedim(2, -1).contiguous()
        measured: defaultdict[str, list[float]] = defaultdict(list)
        for rows in minibatches:
            for name, value in self._minibatch(rollout, frames_BTHWS, rows).items():
                measured[name].append(value)
        return {name: sum(values) / len(values) for name, values in measured.items()} | {"lr": learning_rate}

    def _minibatches(self, num_segments: int) -> list[Tensor]:
        """Draws which segments of the rollout each optimizer step uses, for all epochs."""
        orders = [torch.randperm(num_segments, generator=self._generator) for _ in range(self.config.ppo.epochs)]
        return [rows for order in orders for rows in torch.split(order, self.config.ppo.minibatch_segments)]

    def _uses(self, rollout: Rollout, minibatches: list[Tensor]) -> list[list[Use]]:
        """Lists the coming uses of each bank's experts, in order. Empty where the router chooses anew: no use is known in advance then."""
        num_banks = len(self.agent.caches)
        if not self.config.ppo.replay_routing:
            return [[] for _ in range(num_banks)]
        borrowed = self.agent.pools(self.game).borrowed_by_bank(num_banks)
        return uses_of_update(rollout.experts_BTLK, minibatches, num_banks=num_banks, read_only=borrowed)

    def _minibatch(self, rollout: Rollout, frames_BTHWS: Tensor, rows: Tensor) -> dict[str, float]:
        """Takes one optimizer step on the segments in `rows`; returns its losses and measures. `frames_BTHWS` are the rollout's frames."""

        def select(x_BT: Tensor) -> Tensor:
            return x_BT.index_select(0, rows).to(self.config.device)

        output = self.agent(
            select(frames_BTHWS).movedim(-1, 2),
            game=self.game,
            starts_BT=select(rollout.starts_BT),
            routing=select(rollout.experts_BTLK) if self.config.ppo.replay_routing else None,
            generator=self._generator,
        )
        loss = clipped_loss(
            self.config.ppo,
            logits_BTA=output.logits_BTA,
            value_BT=output.value_BT,
            actions_BT=select(rollout.actions_BT),
            old_log_probs_BT=select(rollout.log_probs_BT),
            advantages_BT=select(rollout.advantages_BT),
            returns_BT=select(rollout.returns_BT),
            played_BT=select(rollout.played_BT),
        )
        balance = self.agent.config.balance_weight * output.aux_loss
        protection = self._protection.loss(self.game, self._generator)
        total = loss.total + balance + protection
        self._check_finite("loss", float(total.detach()))
        self.own.zero_grad()
        self.shared.zero_grad()
        self.experts.zero_grad()
        total.backward()
        self._protection.correct_gradients(self.game)
        grad_norm = self.experts.clip_grad_norm(self.dense_parameters, self.config.ppo.max_grad_norm)
        self._check_finite("gradient norm", grad_norm)
        self.own.step()
        self.shared.step()
        self.experts.step()
        measured = {
            "policy": loss.policy,
            "value": loss.value,
            "entropy": loss.entropy,
            "balance": output.aux_loss,
            "protection": protection,
            "total": total,
            "approx_kl": loss.approx_kl,
            "clip_fraction": loss.clip_fraction,
        }
        values = torch.stack([value.detach().to(total.device) for value in measured.values()]).tolist()
        return dict(zip(measured, values, strict=True)) | {"grad_norm": grad_norm}

    def _check_finite(self, name: str, value: float) -> None:
        """Raises InvalidRequest for a loss or norm that is not finite, before an optimizer step can damage the parameters."""
        if not math.isfinite(value):
            raise InvalidRequest(
                f"learning_rate: with {self.config.ppo.learning_rate:g} the {name} became {value}; begin again with a lower one"
            )

"""A trainer on one cache for `ooc-moe bench cache`: it trains layers through the cache, as the learner does, but plays no game.

Before an update, the experts of each token (the routing) are drawn at random; the update's steps then use them, as a PPO update uses the
routing recorded while playing. So the cache can be told beforehand which experts each step will use (the schedule). Each step is forward,
backward, clipping to a common norm, Adam on the dense parameters, and Adam on the experts. A step has as many tokens as a minibatch of the
preset, and uses all experts of each layer's pool (the experts that one game may use in the layer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ooc_moe.bench.cache.testbed import LAYERS, Setting
from ooc_moe.bench.harness import WrongBytes
from ooc_moe.config.run import PPOConfig
from ooc_moe.config.seeds import seeded
from ooc_moe.learning.lookahead import uses_of_update
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router

PPO = PPOConfig()


class Trainer:
    """Trains the experts of one game on random tokens. `losses` has the loss of every step so far."""

    def __init__(self, setting: Setting, experts: TieredExperts, *, game: int = 0) -> None:
        config = setting.config
        self.cache, self.losses = experts.cache, list[float]()
        self._setting, self._config = setting, config
        self._pools = torch.tensor(setting.experts_of(game)).view(LAYERS, config.pool_size)
        self._generator = torch.Generator().manual_seed(game)
        with seeded(game):
            routers = [Router(config.dim, pool, top_k=config.top_k, noise=config.router_noise) for pool in self._pools.tolist()]
        layers = nn.ModuleList(TieredMoE(experts, router) for router in routers)
        self._layers = layers.to(setting.device)
        self._dense = torch.optim.Adam(self._layers.parameters(), lr=PPO.learning_rate)
        self._experts = ExpertAdam([experts.cache], [experts.gradients], lr=PPO.learning_rate)
        self._x_BTD, self._target_BTD = (
            torch.randn(PPO.minibatch_segments, config.context, config.dim, generator=self._generator).to(setting.device) for _ in range(2)
        )
        self._routing_of_steps: Iterator[Tensor] = iter(())

    def begin_update(self, num_steps: int, *, schedule: bool = True, ahead: bool = True) -> None:
        """Starts an update: draws the routing of its `num_steps` steps, and may announce to the cache which experts these steps use.

        Args:
            num_steps: optimizer steps of the update.
            schedule: whether to tell the cache which experts each step will use, as the learner does.
            ahead: whether the cache may use this knowledge to fetch experts before the step that uses them.
        """
        experts_BTLK = self._draw_routing(num_steps * PPO.minibatch_segments, self._config.context)
        minibatches = torch.split(torch.arange(len(experts_BTLK)), PPO.minibatch_segments)
        if schedule:
            (uses,) = uses_of_update(experts_BTLK, minibatches, num_banks=1)
            self.cache.schedule(uses, ahead=ahead)
        self._routing_of_steps = iter([experts_BTLK[rows].to(self._setting.device) for rows in minibatches])

    def step(self) -> None:
        """Does the next optimizer step of the update, and waits until the device has finished it."""
        loss = mse_loss(self._forward(self._x_BTD, next(self._routing_of_steps)), self._target_BTD)
        self._dense.zero_grad()
        self._experts.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._experts.clip_grad_norm(self._layers.parameters(), PPO.max_grad_norm)
        self._dense.step()
        self._experts.step()
        self.losses.append(float(loss.detach()))
        self._setting.synchronize()

    @torch.no_grad()
    def act(self) -> None:
        """Does a forward pass as when playing: one token for each environment, without gradients, so that only parameters are fetched."""
        x_BTD = self._x_BTD[: PPO.num_envs, :1]
        self._forward(x_BTD, self._draw_routing(len(x_BTD), 1).to(self._setting.device))
        self._setting.synchronize()

    def _forward(self, x_BTD: Tensor, experts_BTLK: Tensor) -> Tensor:
        for layer, experts_BTK in zip(self._layers, experts_BTLK.unbind(2), strict=True):
            x_BTD = layer(x_BTD, experts_NK=experts_BTK.flatten(0, 1)).y
        return x_BTD

    def _draw_routing(self, num_segments: int, num_steps: int) -> Tensor:
        """Draws the `top_k` experts of each token at random from its layer's pool: (segments, time, layers, top_k)."""
        order_BTLE = torch.rand(num_segments, num_steps, LAYERS, self._config.pool_size, generator=self._generator).argsort(-1)
        return self._pools.expand_as(order_BTLE).gather(-1, order_BTLE)[..., : self._config.top_k]


def check_equal(trainers: Sequence[Trainer]) -> None:
    """Checks that all trainers had the same losses, bit for bit, in the steps that they have in common.

    Equal losses show that the size of a cache changes how long training takes, but not what it computes.

    Raises:
        WrongBytes: two losses of the same step differ.
    """
    first, *others = trainers
    for other in others:
        for step, (loss, expected) in enumerate(zip(other.losses, first.losses, strict=False)):
            if loss != expected:
                raise WrongBytes(
                    f"bank {other.cache.bank!r}: the loss of step {step} is {loss!r}, that of bank {first.cache.bank!r} {expected!r}"
                )

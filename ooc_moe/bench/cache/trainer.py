"""A trainer on one cache for `ooc-moe bench cache`: tiered layers stepped as the learner does, without a game to play.

Routing is replayed as in a PPO update, which tells the cache its schedule; each step is forward, backward, clipping to a common norm, dense
Adam, experts' Adam. A step has as many tokens as a minibatch of the preset, and each layer a pool of its own, of which a step asks for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ooc_moe.bench.harness import WrongBytes
from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.config.run import PPOConfig
from ooc_moe.config.seeds import seeded
from ooc_moe.learning.lookahead import uses_of_update
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.remote.store import RemoteStore

LAYERS = 2
GAMES = 8
PPO = PPOConfig()
# In the daemon's DRAM beyond the experts: what pushes and reads have under way.
SPARE_RECORDS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how often a part of the benchmark measures with experts of one preset's size."""

    size: str
    device: torch.device
    rounds: int
    directory: Path  # on the disk to measure

    @property
    def config(self) -> AgentConfig:
        """The preset with two layers, a pool for each, and experts for eight games in one bank."""
        preset = PRESETS[self.size]
        return replace(
            preset, num_layers=LAYERS, num_experts=GAMES * LAYERS * preset.pool_size, routing="pool", pools="per-layer", banks="shared"
        )

    @property
    def working_set(self) -> int:
        """Experts of one game."""
        return LAYERS * self.config.pool_size

    def synchronize(self) -> None:
        """Waits for what the device was told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Bench:
    """A daemon's store, and caches on banks of equal experts in it: trainers on different banks must compute the same."""

    def __init__(self, setting: Setting, store: RemoteStore, stack: ExitStack) -> None:
        self.setting, self._store, self._stack = setting, store, stack

    def cache(self, name: str, *, capacity_experts: int) -> ExpertCache:
        """A cache on a new bank, closed with the daemon."""
        (spec,) = self.setting.config.bank_specs(name, seed=0)
        self._store.create_bank(spec)
        cache = ExpertCache(
            self._store, spec.name, capacity_experts=capacity_experts, device=self.setting.device, admission=AdmissionMode.ENFORCE
        )
        return self._stack.enter_context(cache)


@contextmanager
def opened(setting: Setting, *, dram_experts: int) -> Iterator[Bench]:
    """A real daemon with room for so many experts in DRAM."""
    dram_bytes = (dram_experts + SPARE_RECORDS) * setting.config.expert_layout().record_bytes
    with ExitStack() as stack:
        target = stack.enter_context(embedded_daemon(setting.directory / "store", dram_bytes=dram_bytes))
        store = RemoteStore(target, trainer="bench")
        stack.callback(store.close)
        yield Bench(setting, store, stack)


def experts_of(setting: Setting, game: int) -> list[int]:
    """The experts of a game, all layers'."""
    return list(range(game * setting.working_set, (game + 1) * setting.working_set))


class Trainer:
    """Steps on the experts of one game. `losses` has every step's."""

    def __init__(self, setting: Setting, experts: TieredExperts, *, game: int = 0) -> None:
        config = setting.config
        self.cache, self.losses = experts.cache, list[float]()
        self._setting, self._config = setting, config
        self._pools = torch.tensor(experts_of(setting, game)).view(LAYERS, config.pool_size)
        self._generator = torch.Generator().manual_seed(game)
        with seeded(game):
            routers = [Router(config.dim, pool, top_k=config.top_k, noise=config.router_noise) for pool in self._pools.tolist()]
        layers = nn.ModuleList(TieredMoE(experts, router, dim=config.dim, dropout=0.0) for router in routers)
        self._layers = layers.to(setting.device)
        self._dense = torch.optim.Adam(self._layers.parameters(), lr=PPO.learning_rate)
        self._experts = ExpertAdam([experts.cache], [experts.gradients], lr=PPO.learning_rate)
        self._x_BTD, self._target_BTD = (
            torch.randn(PPO.minibatch_segments, config.context, config.dim, generator=self._generator).to(setting.device) for _ in range(2)
        )
        self._to_come: Iterator[Tensor] = iter(())

    def begin_update(self, num_steps: int, *, schedule: bool = True, ahead: bool = True) -> None:
        """Draws the routing of so many steps and, with `schedule`, tells the cache as the learner does."""
        experts_BTLK = self._routing(num_steps * PPO.minibatch_segments, self._config.context)
        minibatches = torch.split(torch.arange(len(experts_BTLK)), PPO.minibatch_segments)
        if schedule:
            (uses,) = uses_of_update(experts_BTLK, minibatches, num_banks=1)
            self.cache.schedule(uses, ahead=ahead)
        self._to_come = iter([experts_BTLK[rows].to(self._setting.device) for rows in minibatches])

    def step(self) -> None:
        """The next step of the update, to its end on the device."""
        loss = mse_loss(self._forward(self._x_BTD, next(self._to_come)), self._target_BTD)
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
        """A step of all environments: parameters only, one token for each."""
        x_BTD = self._x_BTD[: PPO.num_envs, :1]
        self._forward(x_BTD, self._routing(len(x_BTD), 1).to(self._setting.device))
        self._setting.synchronize()

    def _forward(self, x_BTD: Tensor, experts_BTLK: Tensor) -> Tensor:
        for layer, experts_BTK in zip(self._layers, experts_BTLK.unbind(2), strict=True):
            x_BTD = layer(x_BTD, experts_NK=experts_BTK.flatten(0, 1)).y
        return x_BTD

    def _routing(self, num_segments: int, num_steps: int) -> Tensor:
        """Random experts of each layer's pool, (segments, time, layers, top_k)."""
        order_BTLE = torch.rand(num_segments, num_steps, LAYERS, self._config.pool_size, generator=self._generator).argsort(-1)
        return self._pools.expand_as(order_BTLE).gather(-1, order_BTLE)[..., : self._config.top_k]


def check_equal(trainers: Sequence[Trainer]) -> None:
    """Raises WrongBytes unless all had the same losses, bit for bit, as far as they got: a cache changes nothing but time."""
    first, *others = trainers
    for other in others:
        for step, (loss, expected) in enumerate(zip(other.losses, first.losses, strict=False)):
            if loss != expected:
                raise WrongBytes(
                    f"bank {other.cache.bank!r}: the loss of step {step} is {loss!r}, that of bank {first.cache.bank!r} {expected!r}"
                )

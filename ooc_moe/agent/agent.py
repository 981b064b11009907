"""The agent: a network that turns frames into action logits and values, and reads its experts through a cache.

    frames -> stem (shared) -> + embedding -> [causal attention -> tiered MoE] x layers -> norm -> logits, value

All games share the stem and, where the configuration says so, attention or (with token routing) the routers. All other dense parameters
(those that are not experts') belong to one game each. `Agent.forward` computes whole segments, for training; `Agent.act` computes one frame
at a time, for playing. outputs.py defines the results of `forward` and `act`, segment.py what `act` remembers of earlier frames, checks.py
the checks of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ooc_moe.agent.checks import check_caches, check_segments, check_step
from ooc_moe.agent.outputs import ActOutput, AgentOutput
from ooc_moe.agent.pools import GamePools, Layers, PoolBook
from ooc_moe.agent.segment import Segment
from ooc_moe.agent.stem import Stem
from ooc_moe.agent.transformer import CausalAttention, GameNetwork, build_game_network, episode_mask, new_router
from ooc_moe.config.agent import AgentConfig, Compute
from ooc_moe.config.seeds import derived_seed, seeded
from ooc_moe.moe.layer import ExpertGradients, TieredExperts
from ooc_moe.moe.router import Router, balance_loss
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_wire.errors import InvalidRequest


class Agent(nn.Module):
    """A network that can play every game that was added to it. Each game has its own experts and its own dense parameters.

    Args:
        config: all sizes of the network.
        caches: the caches through which experts are read: one if all layers share a bank of experts, otherwise one per layer. They must be
            on the agent's device. The banks must exist in the store; `config.bank_specs` describes them.
        seed: seed of all initial values. A game's initial values depend on the seed, on the game's name, and on how many experts of older
            games it borrows. They do not depend on the order in which games are added.
        compute: the arithmetic of the networks. With "bfloat16" every call enters autocast, in training, acting and evaluation alike; the
            logits and values that it returns are float32 in any case. With "float32" a caller's own autocast holds.

    Raises:
        InvalidRequest: the number of caches, or a bank's layout, does not fit `config`.
    """

    def __init__(self, config: AgentConfig, caches: Sequence[ExpertCache], *, seed: int, compute: Compute = "float32") -> None:
        super().__init__()
        check_caches(config, caches)
        self.config, self.compute = config, compute
        self.caches = list(caches)
        self.predictor: Callable[[Tensor], Any] | None = None
        """Recognises games from frames (N, S, H, W); usually `detector.predict`. It is called when `prediction` of an output is read, with
        the frames on the device where the caller had them. It is no submodule, because it is trained apart."""
        self._experts = [TieredExperts(cache) for cache in caches]
        self._seed = seed
        self._book = PoolBook(config)
        self.networks = cast("dict[str, GameNetwork]", nn.ModuleDict())
        with seeded(derived_seed(seed, "stem")):
            self.stem = Stem(config)
        with seeded(derived_seed(seed, "attention")):
            layers = config.num_layers if config.attention == "shared" else 0
            attentions = [CausalAttention(config.dim, config.num_heads) for _ in range(layers)]
        self.attentions = cast("Sequence[CausalAttention]", nn.ModuleList(attentions))
        # With token routing the routers choose from whole banks and belong to all games.
        with seeded(derived_seed(seed, "routers")):
            layers = config.num_layers if config.routing == "token" else 0
            routers = [new_router(config, range(config.num_experts)) for _ in range(layers)]
        self.routers = cast("Sequence[Router]", nn.ModuleList(routers))

    # Games

    @property
    def games(self) -> list[str]:
        """The names of the games that were added, in the order in which they were added."""
        return list(self._book.games)

    @property
    def gradients(self) -> list[ExpertGradients]:
        """The gradients of the experts, one entry for each cache. Backward adds to them; `ExpertAdam` reads and drops them."""
        return [experts.gradients for experts in self._experts]

    @property
    def num_experts(self) -> int:
        """The number of experts that this agent uses, in all banks together.

        A bank may hold more: a bank that has grown keeps its size when a run returns to an older checkpoint.
        """
        return self.config.num_banks * self._book.num_experts

    def add_game(self, game: str, *, borrowed: Sequence[Sequence[int]] | None = None) -> GamePools:
        """Gives a new game its own network and its pools, and returns the pools. A game that was added before stays as it is.

        A pool is the set of experts that the game may route to in a layer. Pools are filled with experts that no game owns yet. The banks
        grow when there are too few of these.

        Args:
            game: the game's name.
            borrowed: for each bank, experts of older games that would be useful to this one, the most useful first. Each pool borrows up
                to `shared_experts` of them: the new game reads them and never changes them. None: the game borrows none.

        Raises:
            InvalidRequest: `borrowed` does not have one list for each bank, or names an expert that no game owns; or a bank is too small
                and may not grow.
        """
        if game in self._book.games:
            return self._book.games[game]
        return self._build(self._book.propose(game, borrowed))

    def pools(self, game: str) -> GamePools:
        """The pools of a game: the experts that it may route to, layer by layer. Raises InvalidRequest for an unknown game."""
        self._network(game)
        return self._book.games[game]

    def prefetch_set(self, game: str) -> list[int]:
        """All experts of a game's pools: what to prefetch for this game.

        Each expert is given as its number across banks, expert * num_banks + bank, which the detector uses too.
        """
        return self.pools(game).numbered(self.config.num_banks)

    def read_only_set(self, game: str) -> list[int]:
        """The experts in `prefetch_set` that the game borrows and only reads. These can be fetched without their optimizer moments."""
        return self.pools(game).borrowed_numbered(self.config.num_banks)

    def game_parameters(self, game: str) -> Iterator[nn.Parameter]:
        """The dense parameters (those that are not experts') that belong to this game alone."""
        shared = set(self.shared_parameters())
        return (parameter for parameter in self._network(game).parameters() if parameter not in shared)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The dense parameters that all games share and train: the stem, and if they are shared, attention and the routers."""
        modules = cast("tuple[nn.Module, ...]", (self.stem, self.attentions, self.routers))
        return (parameter for module in modules for parameter in module.parameters())

    # Whole segments

    def forward(
        self,
        frames_BTSHW: Tensor,
        *,
        game: str,
        starts_BT: Tensor | None = None,
        routing: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AgentOutput:
        """Computes action logits and values for B whole segments of T frames each.

        Args:
            frames_BTSHW: uint8; T is at most `context + 1`. These frames, `starts_BT` and `routing` may be on any device.
            game: the game of all these frames.
            starts_BT: True where a frame begins a new episode. Attention never crosses such a start. None: no frame does.
            routing: expert ids (B, T, layers, top_k) of an earlier call, to which the tokens are sent again. The weights of these experts
                are computed anew, from the logits without noise. None: the routers choose the experts.
            generator: draws the router's noise, in training mode.

        Raises:
            InvalidRequest: the game is unknown, or an argument has another shape or dtype.
        """
        network = self._network(game)
        batch, time = check_segments(self.config, frames_BTSHW, starts_BT, routing)
        mask = None if starts_BT is None else episode_mask(starts_BT.to(self._device))
        routing = None if routing is None else routing.to(self._device)
        with self._computing():
            tokens_BTD = self.stem(frames_BTSHW.to(self._device).flatten(0, 1)).view(batch, time, -1)
            logits_BTA, value_BT, layers = network(tokens_BTD, mask=mask, routing=routing, generator=generator)
        experts_NLK = torch.stack([layer.routed.experts_NK for layer in layers], dim=1)
        return AgentOutput(
            logits_BTA=logits_BTA.float(),
            value_BT=value_BT.float(),
            aux_loss=torch.stack([balance_loss(layer.routed) for layer in layers]).mean(),
            experts_used=[layer.tokens_by_expert for layer in layers],
            routing_BTLK=experts_NLK.to(torch.int32).view(batch, time, len(layers), -1),
            caches=self.caches,
            predict=lambda: self._predict(frames_BTSHW[:, -1]),
        )

    def encode(self, frames_NSHW: Tensor) -> Tensor:
        """The stem's tokens (N, dim), float32, of uint8 frames (N, S, H, W)."""
        with self._computing():
            tokens_ND: Tensor = self.stem(frames_NSHW.to(self._device))
        return tokens_ND.float()

    # Frame by frame

    def segment(self, game: str, num_envs: int) -> Segment:
        """Makes an empty segment for `act`, which remembers in it the frames that `num_envs` environments of a game show from now on."""
        self._network(game)
        return Segment.empty(self.config, game, num_envs, device=self._device)

    @torch.no_grad()
    def act(
        self,
        frames_NSHW: Tensor,
        segment: Segment,
        *,
        starts_N: Tensor | None = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> ActOutput:
        """Adds one frame of each environment to the segment and chooses an action for each environment.

        Logits and values equal, up to rounding, those of `forward` for the same frames.

        Args:
            frames_NSHW: uint8, one stack of frames for each environment of the segment.
            segment: remembers the frames so far; this call adds the new ones. It is full after `context + 1` frames.
            starts_N: True where the frame begins a new episode. None: no frame does.
            deterministic: take the most probable action and use no router noise. Otherwise actions are drawn, and the router's noise is on
                in training mode.
            generator: draws actions and noise; may be on another device.

        Raises:
            InvalidRequest: a frame or `starts_N` has another shape or dtype, the segment is full, or the logits are not finite.
        """
        check_step(self.config, frames_NSHW, segment, starts_N)
        tokens_ND = self.encode(frames_NSHW)
        logits_NA, values_N, experts_NLK = self._step(tokens_ND, segment, starts_N, noisy=not deterministic, generator=generator)
        log_probs_NA = torch.log_softmax(logits_NA, dim=-1)
        if math.isnan(log_probs_NA.sum()):
            raise InvalidRequest(
                f"parameters: the action logits of {segment.game!r} are NaN or infinite because the training diverged; "
                "begin again with a lower learning rate"
            )
        draw_N1 = log_probs_NA.argmax(-1, keepdim=True) if deterministic else _draw(log_probs_NA, generator)
        return ActOutput(
            actions_N=draw_N1.squeeze(-1),
            log_probs_N=log_probs_NA.gather(-1, draw_N1).squeeze(-1),
            values_N=values_N,
            experts_NLK=experts_NLK,
            tokens_ND=tokens_ND,
            predict=lambda: self._predict(frames_NSHW),
        )

    @torch.no_grad()
    def values(self, tokens_ND: Tensor, segment: Segment, *, starts_N: Tensor) -> Tensor:
        """Computes the value (N,) of one more frame of each environment, without choosing actions. Adds the frames to the segment.

        Args:
            tokens_ND: the frames as the stem's outputs, for example `ActOutput.tokens_ND`.
            segment: remembers the frames so far.
            starts_N: True where the frame begins a new episode.
        """
        _, values_N, _ = self._step(tokens_ND, segment, starts_N, noisy=False, generator=None)
        return values_N

    def _step(
        self, tokens_ND: Tensor, segment: Segment, starts_N: Tensor | None, *, noisy: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes one frame of each environment and adds it to the segment.

        Returns:
            Action logits (N, A), values (N,), and the ids of the chosen experts (N, layers, top_k).
        """
        network, mask = self._network(segment.game), segment.begin_episodes(starts_N)
        with self._computing():
            logits_NA, values_N, experts_NLK = network.step(
                tokens_ND, segment.memories, segment.length, mask=mask, noisy=noisy, generator=generator
            )
        segment.length += 1
        return logits_NA.float(), values_N.float(), experts_NLK

    # Checkpoints

    def get_extra_state(self) -> dict[str, dict[str, Layers]]:
        """Returns the pools of all games (by layer, the experts that a game may route to), in the order in which the games were added.

        torch calls this when it makes the agent's state dict, and stores the pools there beside the parameters.
        """
        return {game: {"owned": pools.owned, "borrowed": pools.borrowed} for game, pools in self._book.games.items()}

    def set_extra_state(self, state: dict[str, dict[str, Layers]]) -> None:
        """Adds the games of a saved state, with the pools (experts to route to) that each had. torch calls this before it loads parameters.

        Args:
            state: what `get_extra_state` returned.

        Raises:
            InvalidRequest: this agent knows one of the games already, with other pools.
        """
        for game, layers in state.items():
            pools = GamePools(game, **layers)
            if game not in self._book.games:
                self._build(pools)
            elif self._book.games[game] != pools:
                raise InvalidRequest(f"state: game {game!r} has pools {layers}, but this agent gave it others")

    # Parts

    @property
    def _device(self) -> torch.device:
        return self.caches[0].device

    def _computing(self) -> AbstractContextManager[object]:
        is_bfloat16 = self.compute == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16) if is_bfloat16 else nullcontext()

    def _build(self, pools: GamePools) -> GamePools:
        """Makes the network of the pools' game and adds the game to the agent. Grows the banks if a pool names experts beyond their end."""
        for cache, experts in zip(self.caches, pools.by_bank(len(self.caches)), strict=True):
            if experts[-1] >= cache.num_experts:
                cache.grow(experts[-1] + 1)
        with seeded(derived_seed(self._seed, "game", pools.game)):
            network = build_game_network(self.config, pools, self._experts, attentions=self.attentions, routers=self.routers)
        self.networks[_key(pools.game)] = network.to(self._device).train(self.training)
        self._book.record(pools)
        return pools

    def _network(self, game: str) -> GameNetwork:
        if game not in self._book.games:
            raise InvalidRequest(f"game: {game!r} is unknown to the agent, which knows {', '.join(self.games) or 'none'}")
        return self.networks[_key(game)]

    def _predict(self, frames_NSHW: Tensor) -> Any:
        if self.predictor is None:
            raise InvalidRequest("prediction: the agent has no predictor; set agent.predictor, for example to detector.predict")
        return self.predictor(frames_NSHW)


def routed_tokens(experts_LK: Tensor) -> dict[str, dict[str, int]]:
    """Counts the tokens that a routing sends to each expert of each layer.

    Args:
        experts_LK: the routing: expert ids of shape (..., layers, top_k).

    Returns:
        Counts by layer and then by expert id. Both keys are text, because JSON has no other keys.
    """
    layers = [torch.unique(experts, return_counts=True) for experts in experts_LK.unbind(-2)]
    return {
        str(layer): {str(expert): count for expert, count in zip(ids.tolist(), counts.tolist(), strict=True)}
        for layer, (ids, counts) in enumerate(layers)
    }


def _draw(log_probs_NA: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one action for each row of log-probabilities. Returns their positions, (N, 1)."""
    device = log_probs_NA.device if generator is None else generator.device
    # As `torch.multinomial` draws one sample, without its checks.
    races_NA = torch.empty(log_probs_NA.shape, device=device).exponential_(generator=generator)
    return (log_probs_NA.exp() / races_NA.to(log_probs_NA.device)).argmax(-1, keepdim=True)


def _key(game: str) -> str:
    """The key of a game's network in the agent's ModuleDict. It has no dots, and cannot clash with ModuleDict's own attributes."""
    return "game:" + quote(game, safe="").replace(".", "%2E")

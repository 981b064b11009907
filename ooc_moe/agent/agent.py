"""The agent: frames in, action logits and values out, with its experts behind a cache.

    frames -> stem (shared) -> + embedding -> [causal attention -> tiered MoE] x layers -> norm -> logits, value

Everything dense but the stem belongs to one game, unless the configuration shares it. Knows nothing of environments, losses or
checkpoints' files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ooc_moe.agent.pools import GamePools, Layers, PoolBook
from ooc_moe.agent.stem import Stem
from ooc_moe.agent.transformer import Block, CausalAttention, GameNetwork, KeysValues, episode_mask
from ooc_moe.config.agent import AgentConfig
from ooc_moe.config.seeds import derived_seed, seeded
from ooc_moe.moe.layer import ExpertGradients, TieredExperts, TieredMoE
from ooc_moe.moe.router import Router, balance_loss
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutput:
    """What the agent says of B segments of T frames."""

    logits_BTA: Tensor
    value_BT: Tensor
    aux_loss: Tensor
    """The load-balancing loss, mean over layers, to be weighted by `balance_weight`; 1 when the load is even."""
    experts_used: list[dict[int, int]]
    """Per layer: tokens by expert id, of those that got any."""
    routing_BTLK: Tensor
    """The experts chosen, int32: what `forward(routing=...)` repeats."""
    cache_stats: list[CacheStats]
    """The counters of each cache after this call."""
    prediction: Any = None
    """What `predictor` says of each segment's last frames, when asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActOutput:
    """What the agent does with one frame of each of N environments."""

    actions_N: Tensor
    log_probs_N: Tensor
    values_N: Tensor
    experts_NLK: Tensor
    """The experts chosen, int32."""
    tokens_ND: Tensor
    """What the stem made of the frames."""
    prediction: Any = None


@dataclass(slots=True)
class Segment:
    """The past that acting remembers: keys and values of the frames of one segment of one game."""

    game: str
    num_envs: int
    memories: list[KeysValues] = field(repr=False)
    length: int = 0
    """Frames seen."""
    episode_from_N: Tensor | None = None
    """Where the present episode began in this segment; None while no episode began inside it."""

    @staticmethod
    def joined(segments: Sequence[Segment]) -> Segment:
        """The environments of several equally long segments of one game, one after another, as those of one segment."""
        memories = [
            KeysValues(torch.cat([memory.keys for memory in layer]), torch.cat([memory.values for memory in layer]))
            for layer in zip(*(segment.memories for segment in segments), strict=True)
        ]
        begun = [segment.episode_from_N for segment in segments]
        known = [torch.zeros(segment.num_envs, dtype=torch.long) if N is None else N for N, segment in zip(begun, segments, strict=True)]
        return Segment(
            game=segments[0].game,
            num_envs=sum(segment.num_envs for segment in segments),
            memories=memories,
            length=segments[0].length,
            episode_from_N=None if all(N is None for N in begun) else torch.cat(known),
        )


class Agent(nn.Module):
    """Plays any of the games it was told of, each with experts and dense parameters of its own.

    Args:
        config: all sizes.
        caches: one for a shared bank, or one per layer, on the agent's device. The caller made the banks (`config.bank_specs`).
        seed: of all initial values; each game's depend on the seed, the game's name and how many experts it borrows, not on the order of
            games.

    Raises:
        InvalidRequest: the number of caches, or a bank's layout, is not what `config` needs.
    """

    def __init__(self, config: AgentConfig, caches: Sequence[ExpertCache], *, seed: int) -> None:
        super().__init__()
        if len(caches) != config.num_banks:
            raise InvalidRequest(f"caches: {len(caches)} given, banks {config.banks!r} needs {config.num_banks}")
        for cache in caches:
            if cache.layout != config.expert_layout():
                raise InvalidRequest(f"bank {cache.bank!r}: its layout is not that of dim {config.dim}, hidden {config.hidden}")
        self.config = config
        self.caches = list(caches)
        self.predictor: Callable[[Tensor], Any] | None = None
        """Asked with frames (N, S, H, W) when `predict=True`; usually `detector.predict`. No submodule: it is trained apart."""
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
            token = config.routing == "token"
            routers = [self._router(range(config.num_experts)) for _ in range(config.num_layers if token else 0)]
        self.routers = cast("Sequence[Router]", nn.ModuleList(routers))

    # Games

    @property
    def games(self) -> list[str]:
        """The games known, in the order in which they came."""
        return list(self._book.games)

    @property
    def gradients(self) -> list[ExpertGradients]:
        """What backward leaves for the experts, one per cache."""
        return [experts.gradients for experts in self._experts]

    @property
    def num_experts(self) -> int:
        """Experts of all banks together. A bank may hold more: it never shrinks, also when a run goes back to before it grew."""
        return self.config.num_banks * self._book.num_experts

    def add_game(self, game: str, *, borrowed: Sequence[Sequence[int]] | None = None) -> GamePools:
        """Makes a game known: its network, and pools of unowned experts; banks grow when there are too few. A known one is answered.

        Args:
            game: its name.
            borrowed: older games' experts of each bank that would be of use to it, the most useful first: it reads up to
                `shared_experts` of them in each pool, and never changes them. None: none.

        Raises:
            InvalidRequest: `borrowed` has not one list for each bank, or names an expert that no game owns.
        """
        if game in self._book.games:
            return self._book.games[game]
        return self._build(self._book.propose(game, borrowed))

    def pools(self, game: str) -> GamePools:
        """The experts a game routes to. Raises InvalidRequest for an unknown game."""
        self._network(game)
        return self._book.games[game]

    def prefetch_set(self, game: str) -> list[int]:
        """The experts of a game's pools in all banks, numbered as the detector does: expert * banks + bank."""
        return self._numbered(self.pools(game).by_bank(self.config.num_banks))

    def read_only_set(self, game: str) -> list[int]:
        """Those of them that the game borrows, numbered likewise: they are needed without their moments."""
        return self._numbered(self.pools(game).borrowed_by_bank(self.config.num_banks))

    def _numbered(self, by_bank: list[list[int]]) -> list[int]:
        num_banks = self.config.num_banks
        return sorted(expert * num_banks + bank for bank, experts in enumerate(by_bank) for expert in experts)

    def usage(self, experts_LK: Tensor) -> dict[str, dict[str, int]]:
        """Tokens by expert in each layer, of routings (..., layers, top_k); keys are text, as JSON has them."""
        layers = [torch.unique(experts, return_counts=True) for experts in experts_LK.unbind(-2)]
        return {
            str(layer): {str(expert): count for expert, count in zip(ids.tolist(), counts.tolist(), strict=True)}
            for layer, (ids, counts) in enumerate(layers)
        }

    def game_parameters(self, game: str) -> Iterator[nn.Parameter]:
        """A game's own dense parameters."""
        shared = set(self.shared_parameters())
        return (parameter for parameter in self._network(game).parameters() if parameter not in shared)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The dense parameters that every game trains: the stem, attention where it is shared, the routers with token routing."""
        modules = cast("tuple[nn.Module, ...]", (self.stem, self.attentions, self.routers))
        return (parameter for module in modules for parameter in module.parameters())

    # Seeing whole segments

    def forward(
        self,
        frames_BTSHW: Tensor,
        *,
        game: str,
        starts_BT: Tensor | None = None,
        routing: Tensor | None = None,
        generator: torch.Generator | None = None,
        predict: bool = False,
    ) -> AgentOutput:
        """Sees B segments of T frames at once.

        Args:
            frames_BTSHW: uint8, T at most `context + 1`.
            game: whose they are.
            starts_BT: True where a frame begins a new episode; attention never crosses it. None: nowhere.
            routing: experts (B, T, layers, top_k) to repeat; their weights are computed anew from clean logits. None: routes now.
            generator: draws the router's noise, in training mode.
            predict: also ask `predictor`.

        Raises:
            InvalidRequest: an unknown game, or an argument of another shape or dtype.
        """
        network = self._network(game)
        batch, time = self._check_segments(frames_BTSHW, starts_BT, routing)
        frames_BTSHW = frames_BTSHW.to(self._device)
        x_BTD = self.stem(frames_BTSHW.flatten(0, 1)).view(batch, time, -1) + network.embedding_TD[:time]
        mask = None if starts_BT is None else episode_mask(starts_BT.to(self._device))
        chosen, losses, used = [], [], []
        for layer, block in enumerate(network.blocks):
            replay_NK = None if routing is None else routing[:, :, layer].flatten(0, 1).long()
            output = block(x_BTD, mask=mask, experts_NK=replay_NK, noisy=True, generator=generator)
            x_BTD = output.y
            chosen.append(output.routed.experts_NK)
            losses.append(balance_loss(output.routed))
            used.append(output.tokens_by_expert)
        logits_BTA, value_BT = network.heads(x_BTD)
        return AgentOutput(
            logits_BTA=logits_BTA,
            value_BT=value_BT,
            aux_loss=torch.stack(losses).mean(),
            experts_used=used,
            routing_BTLK=torch.stack(chosen, dim=1).to(torch.int32).view(batch, time, len(chosen), -1),
            cache_stats=[cache.stats() for cache in self.caches],
            prediction=self._predict(frames_BTSHW[:, -1]) if predict else None,
        )

    # Acting frame by frame

    def segment(self, game: str, num_envs: int) -> Segment:
        """An empty past for `num_envs` environments of a game."""
        self._network(game)
        config, device = self.config, self._device
        shape = (num_envs, config.num_heads, config.context + 1, config.dim // config.num_heads)
        memories = [KeysValues(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(config.num_layers)]
        return Segment(game, num_envs, memories)

    @torch.no_grad()
    def act(
        self,
        frames_NSHW: Tensor,
        segment: Segment,
        *,
        starts_N: Tensor | None = None,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        predict: bool = False,
    ) -> ActOutput:
        """Sees one more frame of each environment and chooses actions; says what `forward` would say of the same frames.

        Args:
            frames_NSHW: uint8, one stack per environment of the segment.
            segment: the past, extended by these frames; full after `context + 1` of them.
            starts_N: True where the frame begins a new episode.
            deterministic: the likeliest action, and no router noise; otherwise actions are drawn, with router noise in training mode.
            generator: draws actions and noise; may be on another device.
            predict: also ask `predictor`.

        Raises:
            InvalidRequest: a frame or `starts_N` of another shape or dtype, or a full segment.
        """
        self._check_step(frames_NSHW, segment, starts_N)
        frames_NSHW = frames_NSHW.to(self._device)
        tokens_ND = self.stem(frames_NSHW)
        logits_NA, values_N, experts_NLK = self._step(tokens_ND, segment, starts_N, noisy=not deterministic, generator=generator)
        log_probs_NA = torch.log_softmax(logits_NA, dim=-1)
        if math.isnan(log_probs_NA.sum()):
            raise InvalidRequest(
                f"parameters: the action logits of {segment.game!r} are NaN or infinite; the training diverged (learning rate?)"
            )
        draw_N1 = log_probs_NA.argmax(-1, keepdim=True) if deterministic else _draw(log_probs_NA, generator)
        return ActOutput(
            actions_N=draw_N1.squeeze(-1),
            log_probs_N=log_probs_NA.gather(-1, draw_N1).squeeze(-1),
            values_N=values_N,
            experts_NLK=experts_NLK,
            tokens_ND=tokens_ND,
            prediction=self._predict(frames_NSHW) if predict else None,
        )

    @torch.no_grad()
    def values(self, tokens_ND: Tensor, segment: Segment, *, starts_N: Tensor) -> Tensor:
        """The values (N,) of one more frame of each environment, whose stem's tokens are known; the segment is extended by it."""
        _, values_N, _ = self._step(tokens_ND, segment, starts_N, noisy=False, generator=None)
        return values_N

    def _step(
        self, tokens_ND: Tensor, segment: Segment, starts_N: Tensor | None, *, noisy: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, A), values (N,) and the experts chosen (N, L, K) of one more frame; the segment is extended by it."""
        network, position = self._network(segment.game), segment.length
        mask = self._extend(segment, starts_N)
        x_BTD = (tokens_ND + network.embedding_TD[position]).unsqueeze(1)
        chosen = []
        for block, memory in zip(network.blocks, segment.memories, strict=True):
            output = block.step(x_BTD, memory, position, mask=mask, noisy=noisy, generator=generator)
            x_BTD = output.y
            chosen.append(output.routed.experts_NK)
        segment.length += 1
        return *network.heads(x_BTD.squeeze(1)), torch.stack(chosen, dim=1).to(torch.int32)

    @staticmethod
    def _extend(segment: Segment, starts_N: Tensor | None) -> Tensor | None:
        """Notes episodes that begin now; returns the mask (envs, 1, 1, frames), or None where all frames may be seen."""
        if starts_N is not None and segment.length > 0 and starts_N.any():
            before_N = torch.zeros_like(starts_N, dtype=torch.long) if segment.episode_from_N is None else segment.episode_from_N
            segment.episode_from_N = before_N.masked_fill(starts_N, segment.length)
        if segment.episode_from_N is None:
            return None
        frames_T = torch.arange(segment.length + 1, device=segment.episode_from_N.device)
        return (frames_T >= segment.episode_from_N.unsqueeze(1))[:, None, None].to(segment.memories[0].keys.device)

    # Checkpoints

    def get_extra_state(self) -> dict[str, dict[str, Layers]]:
        """Games and pools, in order: what `load_state_dict` needs to build the networks before it fills them."""
        return {game: {"owned": pools.owned, "borrowed": pools.borrowed} for game, pools in self._book.games.items()}

    def set_extra_state(self, state: dict[str, dict[str, Layers]]) -> None:
        """Builds the games of a state; torch calls it before it loads the children."""
        for game, layers in state.items():
            pools = GamePools(game, **layers)
            if game not in self._book.games:
                self._build(pools)
            elif self._book.games[game] != pools:
                raise InvalidRequest(f"state: game {game!r} has pools {layers}, this agent gave it others")

    # Parts

    @property
    def _device(self) -> torch.device:
        return self.caches[0].device

    def _build(self, pools: GamePools) -> GamePools:
        for cache, experts in zip(self.caches, pools.by_bank(len(self.caches)), strict=True):
            if experts[-1] >= cache.num_experts:
                cache.grow(experts[-1] + 1)
        with seeded(derived_seed(self._seed, "game", pools.game)):
            blocks = [self._block(layer, pools) for layer in range(self.config.num_layers)]
            network = GameNetwork(self.config, blocks).to(self._device)
        self.networks[_key(pools.game)] = network.train(self.training)
        self._book.record(pools)
        return pools

    def _block(self, layer: int, pools: GamePools) -> Block:
        config = self.config
        attention = CausalAttention(config.dim, config.num_heads)
        if config.attention == "shared":
            attention = self.attentions[layer]
        router = self.routers[layer] if config.routing == "token" else self._router(pools.layers[layer])
        experts = self._experts[layer % len(self._experts)]
        moe = TieredMoE(experts, router, dim=config.dim, dropout=config.dropout, read_only=pools.borrowed[layer])
        return Block(attention, moe, dim=config.dim, dropout=config.dropout)

    def _router(self, experts: Sequence[int]) -> Router:
        return Router(self.config.dim, experts, top_k=self.config.top_k, noise=self.config.router_noise)

    def _network(self, game: str) -> GameNetwork:
        if game not in self._book.games:
            raise InvalidRequest(f"game: {game!r} is unknown to the agent, which knows {', '.join(self.games) or 'none'}")
        return self.networks[_key(game)]

    def _predict(self, frames_NSHW: Tensor) -> Any:
        if self.predictor is None:
            raise InvalidRequest("predict: True, but the agent has no predictor")
        return self.predictor(frames_NSHW)

    def _check_segments(self, frames_BTSHW: Tensor, starts_BT: Tensor | None, routing: Tensor | None) -> tuple[int, int]:
        config = self.config
        self._check_frames(frames_BTSHW, "(batch, time, stack, height, width)", 5)
        batch, time = frames_BTSHW.shape[:2]
        if not 1 <= time <= config.context + 1:
            raise InvalidRequest(f"frames: {time} of time, a segment has 1 to {config.context + 1} (context + 1)")
        _check("starts", starts_BT, (batch, time), torch.bool)
        _check("routing", routing, (batch, time, config.num_layers, config.top_k))
        return batch, time

    def _check_step(self, frames_NSHW: Tensor, segment: Segment, starts_N: Tensor | None) -> None:
        self._check_frames(frames_NSHW, "(envs, stack, height, width)", 4)
        if len(frames_NSHW) != segment.num_envs:
            raise InvalidRequest(f"frames: of {len(frames_NSHW)} environments, the segment has {segment.num_envs}")
        if segment.length > self.config.context:
            raise InvalidRequest(f"segment: full after {segment.length} frames (context + 1); begin another")
        _check("starts", starts_N, (segment.num_envs,), torch.bool)

    def _check_frames(self, frames: Tensor, names: str, num_axes: int) -> None:
        config = self.config
        want = (config.frame_stack, config.frame_size, config.frame_size)
        if frames.dtype != torch.uint8 or frames.ndim != num_axes or frames.shape[-3:] != want:
            raise InvalidRequest(f"frames: got {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 {names} ending in {want}")


def _draw(log_probs_NA: Tensor, generator: torch.Generator | None) -> Tensor:
    """One action of each row, (N, 1)."""
    device = log_probs_NA.device if generator is None else generator.device
    # As `torch.multinomial` draws one sample, without its checks.
    races_NA = torch.empty(log_probs_NA.shape, device=device).exponential_(generator=generator)
    return (log_probs_NA.exp() / races_NA.to(log_probs_NA.device)).argmax(-1, keepdim=True)


def _check(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if value is not None and (value.shape != shape or value.dtype != (dtype or value.dtype)):
        raise InvalidRequest(f"{name}: got {value.dtype} {tuple(value.shape)}, expected {dtype or 'whole numbers'} {shape}")


def _key(game: str) -> str:
    """A game's name as a module's: no dots, and no clash with ModuleDict's own attributes."""
    return "game:" + quote(game, safe="").replace(".", "%2E")

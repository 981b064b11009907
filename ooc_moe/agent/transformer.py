"""The network of one game: embedding, transformer blocks (causal attention and mixture of experts), and the heads for policy and value.

Time is divided into segments of at most `context + 1` frames. `forward` computes a whole segment at once. `step` computes one more frame
from the keys and values of the frames before it. The two methods give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ooc_moe.agent.pools import GamePools
from ooc_moe.agent.stem import orthogonal
from ooc_moe.config.agent import AgentConfig
from ooc_moe.moe.layer import MoEOutput, TieredExperts, TieredMoE
from ooc_moe.moe.router import Router


@dataclass(frozen=True, slots=True)
class KeysValues:
    """The attention keys and values that one layer computed for a segment, each `(batch, heads, context + 1, dim / heads)`."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over the frames of a segment. No frame attends to later frames or other episodes."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = orthogonal(nn.Linear(dim, 3 * dim), gain=1.0)
        # Small initial weights, so that an untrained block passes the present frame through.
        self.out = orthogonal(nn.Linear(dim, dim), gain=0.1)

    def forward(self, x_BTD: Tensor, *, mask: Tensor | None) -> Tensor:
        """Computes attention from every frame of a segment to the frames that it may see.

        Args:
            x_BTD: one token per frame.
            mask: `(batch, 1, T, T)`, True where a frame may attend to another. None: each frame may attend to itself and all earlier ones.
        """
        q, k, v = self._project(x_BTD)
        # A frame that attends only to itself gets its own value, whatever the scores are.
        y = v if v.shape[2] == 1 else scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._merge(y)

    def step(self, x_BTD: Tensor, memory: KeysValues, position: int, *, mask: Tensor | None) -> Tensor:
        """Computes attention from one new frame `(batch, 1, dim)` to itself and the frames before it.

        Args:
            x_BTD: the frame's token.
            memory: the keys and values of the frames before. This call adds those of the new frame.
            position: the number of frames before.
            mask: `(batch, 1, 1, position + 1)`, True for the frames that may be attended to. None: all of them.
        """
        q, k, v = self._project(x_BTD)
        memory.keys[:, :, position], memory.values[:, :, position] = k[:, :, 0], v[:, :, 0]
        if position == 0:
            return self._merge(v)
        upto = slice(0, position + 1)
        return self._merge(scaled_dot_product_attention(q, memory.keys[:, :, upto], memory.values[:, :, upto], attn_mask=mask))

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries, keys and values, each (batch, heads, T, dim / heads)."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """A transformer block: attention, then a mixture of experts. The two parts each normalise their input and add their output to it."""

    def __init__(self, attention: CausalAttention, moe: TieredMoE, *, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = attention
        self.moe = moe
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        mask: Tensor | None,
        experts_NK: Tensor | None,
        noisy: bool,
        generator: torch.Generator | None,
    ) -> MoEOutput:
        """Computes the block for all frames of B segments.

        Args:
            x_BTD: one token per frame.
            mask: which frames may attend to which, as `episode_mask` makes it.
            experts_NK: expert ids for the N = B * T tokens, from an earlier call. None: the router chooses.
            noisy: whether the router's noise is on, in training mode.
            generator: draws the noise.
        """
        x_BTD = x_BTD + self.dropout(self.attention(self.norm(x_BTD), mask=mask))
        output: MoEOutput = self.moe(x_BTD, experts_NK=experts_NK, noisy=noisy, generator=generator)
        return output

    def step(
        self, x_BTD: Tensor, memory: KeysValues, position: int, *, mask: Tensor | None, noisy: bool, generator: torch.Generator | None
    ) -> MoEOutput:
        """Computes the block for one more frame `(batch, 1, dim)` of each segment. The arguments are those of `GameNetwork.step`."""
        x_BTD = x_BTD + self.dropout(self.attention.step(self.norm(x_BTD), memory, position, mask=mask))
        output: MoEOutput = self.moe(x_BTD, noisy=noisy, generator=generator)
        return output


class GameNetwork(nn.Module):
    """The network of one game: turns the stem's tokens into action logits and values.

    It holds the game's dense parameters. Attention and routers may be modules that it shares with the networks of other games.
    """

    def __init__(self, config: AgentConfig, blocks: Sequence[Block]) -> None:
        super().__init__()
        # The game's embedding and the learned positions in one table. The last row is for the frame after the segment.
        self.embedding_TD = nn.Parameter(torch.randn(config.context + 1, config.dim) * 0.02)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.policy = orthogonal(nn.Linear(config.dim, config.num_actions), gain=0.01)
        self.value = orthogonal(nn.Linear(config.dim, 1), gain=1.0)

    def forward(
        self, tokens_BTD: Tensor, *, mask: Tensor | None, routing: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, list[MoEOutput]]:
        """Computes logits (B, T, actions) and values (B, T) for whole segments. Also returns what each layer's mixture of experts computed.

        Args:
            tokens_BTD: the stem's outputs.
            mask: which frames may attend to which, as `episode_mask` makes it.
            routing: expert ids (B, T, layers, top_k) of an earlier call, to which the tokens are sent again. None: the routers choose.
            generator: draws the router's noise, in training mode.
        """
        x_BTD = tokens_BTD + self.embedding_TD[: tokens_BTD.shape[1]]
        outputs = []
        for layer, block in enumerate(self.blocks):
            replay_NK = None if routing is None else routing[:, :, layer].flatten(0, 1).long()
            outputs.append(block(x_BTD, mask=mask, experts_NK=replay_NK, noisy=True, generator=generator))
            x_BTD = outputs[-1].y
        return *self.heads(x_BTD), outputs

    def step(
        self,
        tokens_ND: Tensor,
        memories: Sequence[KeysValues],
        position: int,
        *,
        mask: Tensor | None,
        noisy: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes one more frame of each of N segments; returns logits (N, actions), values (N,) and the chosen experts (N, L, K), int32.

        Args:
            tokens_ND: the stem's outputs.
            memories: each layer's keys and values of the frames before. This call adds those of the new frame.
            position: the number of frames before.
            mask: (N, 1, 1, position + 1), True for the frames that may be attended to. None: all of them.
            noisy: whether the router's noise is on, in training mode.
            generator: draws the noise.
        """
        x_BTD = (tokens_ND + self.embedding_TD[position]).unsqueeze(1)
        chosen = []
        for block, memory in zip(self.blocks, memories, strict=True):
            output = block.step(x_BTD, memory, position, mask=mask, noisy=noisy, generator=generator)
            x_BTD = output.y
            chosen.append(output.routed.experts_NK)
        return *self.heads(x_BTD.squeeze(1)), torch.stack(chosen, dim=1).to(torch.int32)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes action logits `(..., actions)` and values `(...)` from the last block's outputs `(..., dim)`."""
        normal = self.norm(x)
        return self.policy(normal), self.value(normal).squeeze(-1)


def build_game_network(
    config: AgentConfig,
    pools: GamePools,
    experts: Sequence[TieredExperts],
    *,
    attentions: Sequence[CausalAttention],
    routers: Sequence[Router],
) -> GameNetwork:
    """Makes the network of a new game. Its initial values are drawn from torch's global generator.

    Args:
        config: all sizes.
        pools: for each layer, the experts that the game may route to.
        experts: the experts of each bank; layer `l` uses bank `l % len(experts)`.
        attentions: the attention modules that all games share, one per layer. Empty: the game gets its own.
        routers: the routers that all games share, one per layer. Empty: the game gets its own.
    """
    blocks = []
    for layer in range(config.num_layers):
        # Made even where attention is shared: it draws the same numbers, so the game's other initial values do not depend on that choice.
        own_attention = CausalAttention(config.dim, config.num_heads)
        attention = attentions[layer] if attentions else own_attention
        router = routers[layer] if routers else new_router(config, pools.layers[layer])
        bank = experts[layer % len(experts)]
        moe = TieredMoE(bank, router, dropout=config.dropout, read_only=pools.borrowed[layer])
        blocks.append(Block(attention, moe, dim=config.dim, dropout=config.dropout))
    return GameNetwork(config, blocks)


def new_router(config: AgentConfig, experts: Sequence[int]) -> Router:
    """Makes a router, of the configured sizes, that chooses among the experts with these ids."""
    return Router(config.dim, experts, top_k=config.top_k, noise=config.router_noise)


def episode_mask(starts_BT: Tensor) -> Tensor | None:
    """Makes the attention mask `(batch, 1, T, T)` that lets a frame attend to itself and to earlier frames of the same episode.

    Args:
        starts_BT: True where a frame begins an episode. The first frame's value makes no difference.

    Returns:
        The mask, True where attention is allowed. None if no episode starts after the first frame of a segment: plain causal attention
        is right then.
    """
    if not starts_BT[:, 1:].any():
        return None
    episode_BT = starts_BT.cumsum(1)
    same_BTT = episode_BT.unsqueeze(2) == episode_BT.unsqueeze(1)
    return same_BTT.tril_().unsqueeze(1)

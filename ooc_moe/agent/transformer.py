"""A game's own network: embedding, blocks of causal attention and tiered MoE, and heads.

Time runs in segments of at most `context + 1` frames. A whole segment can be seen at once (`forward`), or frame by frame with the keys and
values of the frames before (`step`); both give the same numbers up to rounding. Knows one game, and nothing of frames or actions' meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ooc_moe.agent.stem import orthogonal
from ooc_moe.config.agent import AgentConfig
from ooc_moe.moe.layer import MoEOutput, TieredMoE


@dataclass(frozen=True, slots=True)
class KeysValues:
    """What one layer remembers of a segment: keys and values, each `(batch, heads, context + 1, dim / heads)`."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over the frames of a segment, never across the start of an episode."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = orthogonal(nn.Linear(dim, 3 * dim), gain=1.0)
        # Small at first: an untrained block passes the present frame through.
        self.out = orthogonal(nn.Linear(dim, dim), gain=0.1)

    def forward(self, x_BTD: Tensor, *, mask: Tensor | None) -> Tensor:
        """Attends causally; `mask` `(batch, 1, T, T)` says which pairs may meet, and None means all earlier frames."""
        q, k, v = self._project(x_BTD)
        # A frame that sees itself alone takes its own value.
        y = v if v.shape[2] == 1 else scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._merge(y)

    def step(self, x_BTD: Tensor, memory: KeysValues, position: int, *, mask: Tensor | None) -> Tensor:
        """Attends from one frame `(batch, 1, dim)` to itself and the `position` frames before, and remembers it."""
        q, k, v = self._project(x_BTD)
        memory.keys[:, :, position], memory.values[:, :, position] = k[:, :, 0], v[:, :, 0]
        if position == 0:
            return self._merge(v)
        upto = slice(0, position + 1)
        return self._merge(scaled_dot_product_attention(q, memory.keys[:, :, upto], memory.values[:, :, upto], attn_mask=mask))

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, heads, T, dim / heads)."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged


class Block(nn.Module):
    """Causal attention, then tiered MoE; both pre-norm with a residual."""

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
        """Sees a whole segment."""
        x_BTD = x_BTD + self.dropout(self.attention(self.norm(x_BTD), mask=mask))
        output: MoEOutput = self.moe(x_BTD, experts_NK=experts_NK, noisy=noisy, generator=generator)
        return output

    def step(
        self, x_BTD: Tensor, memory: KeysValues, position: int, *, mask: Tensor | None, noisy: bool, generator: torch.Generator | None
    ) -> MoEOutput:
        """Sees one more frame."""
        x_BTD = x_BTD + self.dropout(self.attention.step(self.norm(x_BTD), memory, position, mask=mask))
        output: MoEOutput = self.moe(x_BTD, noisy=noisy, generator=generator)
        return output


class GameNetwork(nn.Module):
    """Everything dense that belongs to one game."""

    def __init__(self, config: AgentConfig, blocks: Sequence[Block]) -> None:
        super().__init__()
        # The game's embedding and the learned positions, in one table; the last row is for the frame after the segment.
        self.embedding_TD = nn.Parameter(torch.randn(config.context + 1, config.dim) * 0.02)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.policy = orthogonal(nn.Linear(config.dim, config.num_actions), gain=0.01)
        self.value = orthogonal(nn.Linear(config.dim, 1), gain=1.0)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(..., dim)` -> action logits `(..., actions)` and values `(...)`."""
        normal = self.norm(x)
        return self.policy(normal), self.value(normal).squeeze(-1)


def episode_mask(starts_BT: Tensor) -> Tensor | None:
    """Which frame may attend to which: earlier ones of the same episode, `(batch, 1, T, T)`; None where no episode starts inside.

    Args:
        starts_BT: True where a frame begins an episode. What the first frame says makes no difference.
    """
    if not starts_BT[:, 1:].any():
        return None
    episode_BT = starts_BT.cumsum(1)
    same_BTT = episode_BT.unsqueeze(2) == episode_BT.unsqueeze(1)
    return same_BTT.tril_().unsqueeze(1)

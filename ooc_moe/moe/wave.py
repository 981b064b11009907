"""The arithmetic of one wave of experts: the interface that looped.py and grouped.py implement, each in its own way.

A wave is a group of experts that fits the cache at once. An expert is the feed-forward network `gelu(x @ w1 + b1) @ w2 + b2`.

Letters: M rows (tokens) of a wave, sorted by expert; D width of a token; H width inside an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Parameters = list[dict[str, Tensor]]
"""For each expert of a wave: w1 (D, H), b1 (H,), w2 (H, D) and b2 (D,)."""


@dataclass(frozen=True, slots=True)
class WaveRows:
    """The rows (tokens) of one wave, sorted by expert, and the hidden units that forward stores for backward."""

    counts: list[int]
    """The number of rows of each expert, at least one."""
    x_MD: Tensor
    """The tokens."""
    before_MH: Tensor
    """The hidden units before the GELU. Forward fills them."""
    after_MH: Tensor
    """The hidden units after the GELU. Forward fills them."""

    def part(self, experts: slice, rows: slice) -> WaveRows:
        """Returns the part of the wave that consists of these experts and their rows, as views of the same memory."""
        return WaveRows(self.counts[experts], self.x_MD[rows], self.before_MH[rows], self.after_MH[rows])


class WaveArithmetic(Protocol):
    """Computes the outputs and the gradients of all experts of one wave. The modules looped.py and grouped.py implement it."""

    def forward(self, parameters: Parameters, rows: WaveRows, out_MD: Tensor) -> None:
        """Fills `out_MD` with the outputs of the experts for their rows, and stores their hidden units in `rows`."""

    def backward(
        self, parameters: Parameters, gradients: Iterable[dict[str, Tensor] | None], rows: WaveRows, grad_out_MD: Tensor, grad_x_MD: Tensor
    ) -> None:
        """Fills `grad_x_MD` with the gradients of the tokens, and adds to the gradients of each expert's parameters.

        Args:
            parameters: the experts' parameters, as in forward.
            gradients: one entry per expert, named like its parameters. None for an expert that is only read: it gets no gradients.
            rows: the rows, as forward left them.
            grad_out_MD: the gradients of the experts' outputs.
            grad_x_MD: the result.
        """

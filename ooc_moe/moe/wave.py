"""The arithmetic of one wave of experts: what looped.py and grouped.py both compute, each in its own way.

A wave is a group of experts that fits the cache at once. An expert is the FFN `gelu(x @ w1 + b1) @ w2 + b2`.

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
    """The rows of one wave, and what forward keeps of them for backward."""

    counts: list[int]
    """The number of rows of each expert, at least one."""
    x_MD: Tensor
    """The tokens."""
    before_MH: Tensor
    """The hidden units before the GELU. Forward fills them."""
    after_MH: Tensor
    """The hidden units after the GELU. Forward fills them."""

    def part(self, experts: slice, rows: slice) -> WaveRows:
        """The part of a wave that consists of these experts and their rows."""
        return WaveRows(self.counts[experts], self.x_MD[rows], self.before_MH[rows], self.after_MH[rows])


class WaveArithmetic(Protocol):
    """Computes the experts of a wave, forward and backward."""

    def forward(self, parameters: Parameters, rows: WaveRows, out_MD: Tensor) -> None:
        """Fills `out_MD` with the experts' outputs, and the hidden units in `rows`."""

    def backward(
        self, parameters: Parameters, gradients: Iterable[dict[str, Tensor] | None], rows: WaveRows, grad_out_MD: Tensor, grad_x_MD: Tensor
    ) -> None:
        """Fills `grad_x_MD`, and adds to the gradients of each expert's parameters.

        `gradients` has one entry per expert, named like its parameters; None for an expert that is only read.
        """

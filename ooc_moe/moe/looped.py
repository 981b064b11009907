"""Experts of a wave one after another, in float32 on the cache's slots: for every device. No grouped matrix multiplication beats it there.

Bit for bit the same for an expert whichever others are in its wave: also the elementwise work is done expert by expert, which meets the
hidden units in the CPU's caches, too. Rows (M, D) and (M, H) are those of the wave, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def forward(
    parameters: list[dict[str, Tensor]], counts: list[int], x_MD: Tensor, before_MH: Tensor, after_MH: Tensor, out_MD: Tensor
) -> None:
    """Fills `out_MD`, and the hidden units before and after the GELU.

    Args:
        parameters: w1 (D, H), b1 (H,), w2 (H, D) and b2 (D,) of each expert.
        counts: the rows of each expert, at least one.
    """
    pieces = (torch.split(tensor, counts) for tensor in (x_MD, before_MH, after_MH, out_MD))
    for p, x, before, after, out in zip(parameters, *pieces, strict=True):
        torch.addmm(p["b1"], x, p["w1"], out=before)
        torch.ops.aten.gelu.out(before, out=after)
        torch.addmm(p["b2"], after, p["w2"], out=out)


def backward(
    parameters: list[dict[str, Tensor]],
    gradients: Iterable[dict[str, Tensor] | None],
    counts: list[int],
    x_MD: Tensor,
    before_MH: Tensor,
    after_MH: Tensor,
    grad_out_MD: Tensor,
    grad_x_MD: Tensor,
) -> None:
    """Fills `grad_x_MD`, and adds to the gradients of each expert, named as its parameters; None for one that is only read."""
    scratch_RH = before_MH.new_empty(max(counts), before_MH.shape[1])
    pieces = (torch.split(tensor, counts) for tensor in (x_MD, before_MH, after_MH, grad_out_MD, grad_x_MD))
    for p, gradient, x, before, after, grad_out, grad_x in zip(parameters, gradients, *pieces, strict=True):
        grad_before = scratch_RH[: len(x)]
        torch.mm(grad_out, p["w2"].t(), out=grad_before)
        torch.ops.aten.gelu_backward.grad_input(grad_before, before, grad_input=grad_before)
        torch.mm(grad_before, p["w1"].t(), out=grad_x)
        if gradient is None:
            continue
        gradient["w1"].addmm_(x.t(), grad_before)
        gradient["b1"].add_(grad_before.sum(0))
        gradient["w2"].addmm_(after.t(), grad_out)
        gradient["b2"].add_(grad_out.sum(0))

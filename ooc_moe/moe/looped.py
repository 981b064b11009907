"""Computes the experts of a wave (a group that fits the cache) one after another, in float32, on their parameters in the cache.

It works on every device.

No grouped matrix multiplication is faster in float32. An expert's results are the same bit for bit whichever other experts are in its wave,
because the elementwise work, too, is done expert by expert. That is also faster: the hidden units are still in the CPU's caches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ooc_moe.moe.wave import Parameters, WaveRows


def forward(parameters: Parameters, rows: WaveRows, out_MD: Tensor) -> None:
    """Fills `out_MD` with the outputs of all experts of the wave, and `rows` with their hidden units.

    Contract: `WaveArithmetic.forward`.
    """
    pieces = (torch.split(tensor, rows.counts) for tensor in (rows.x_MD, rows.before_MH, rows.after_MH, out_MD))
    for p, x, before, after, out in zip(parameters, *pieces, strict=True):
        torch.addmm(p["b1"], x, p["w1"], out=before)
        torch.ops.aten.gelu.out(before, out=after)
        torch.addmm(p["b2"], after, p["w2"], out=out)


def backward(
    parameters: Parameters, gradients: Iterable[dict[str, Tensor] | None], rows: WaveRows, grad_out_MD: Tensor, grad_x_MD: Tensor
) -> None:
    """Fills `grad_x_MD` with the gradients of the tokens, and adds to the gradients of the experts' parameters.

    Contract: `WaveArithmetic.backward`.
    """
    scratch_RH = rows.before_MH.new_empty(max(rows.counts), rows.before_MH.shape[1])
    pieces = (torch.split(tensor, rows.counts) for tensor in (rows.x_MD, rows.before_MH, rows.after_MH, grad_out_MD, grad_x_MD))
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

"""Computes all experts of a wave (a group that fits the cache) at once, in bfloat16, by grouped matrix multiplications.

The layer uses this module under autocast to bfloat16.

Parameters are cast wave by wave, as autocast casts those of a dense layer. Their gradients add up in float32.

`torch.nn.functional.grouped_mm` exists since torch 2.10. It has one kernel for all experts on GPUs of compute capability 9.0 and 10.0.
There nothing here waits for the device. On other GPUs, from 8.0 on, and on the CPU torch multiplies expert after expert; on a GPU each
product then waits for the device once. Widths must be multiples of 8 (`check_bfloat16_widths`), which is asked for on every device alike.

Letters: G experts of the wave; M rows (tokens) of the wave, sorted by expert; D width of a token; H width inside an expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ooc_moe.moe.wave import Parameters, WaveRows


def forward(parameters: Parameters, rows: WaveRows, out_MD: Tensor) -> None:
    """Fills `out_MD` with the outputs of all experts of the wave, and `rows` with their hidden units. All rows are in bfloat16.

    Contract: `WaveArithmetic.forward`.
    """
    group_M, ends_G = _groups(rows.counts, rows.x_MD.device)
    products_MH = functional.grouped_mm(rows.x_MD, _cast(parameters, "w1"), offs=ends_G)
    torch.add(products_MH, _cast(parameters, "b1").index_select(0, group_M), out=rows.before_MH)
    torch.ops.aten.gelu.out(rows.before_MH, out=rows.after_MH)
    products_MD = functional.grouped_mm(rows.after_MH, _cast(parameters, "w2"), offs=ends_G)
    torch.add(products_MD, _cast(parameters, "b2").index_select(0, group_M), out=out_MD)


def backward(
    parameters: Parameters, gradients: Iterable[dict[str, Tensor] | None], rows: WaveRows, grad_out_MD: Tensor, grad_x_MD: Tensor
) -> None:
    """Fills `grad_x_MD` with the gradients of the tokens, and adds to the gradients of the experts' parameters.

    All rows are in bfloat16, the gradients of parameters in float32. Contract: `WaveArithmetic.backward`.
    """
    counts, x_MD, after_MH = rows.counts, rows.x_MD, rows.after_MH
    group_M, ends_G = _groups(counts, x_MD.device)
    grad_after_MH = functional.grouped_mm(grad_out_MD, _cast(parameters, "w2").transpose(1, 2), offs=ends_G)
    grad_before_MH = torch.ops.aten.gelu_backward(grad_after_MH, rows.before_MH)
    grad_x_MD.copy_(functional.grouped_mm(grad_before_MH, _cast(parameters, "w1").transpose(1, 2), offs=ends_G))
    trained = {number: gradient for number, gradient in enumerate(gradients) if gradient is not None}
    if not trained:
        return
    if len(trained) < len(counts):
        pieces = [torch.split(tensor, counts) for tensor in (x_MD, grad_before_MH, after_MH, grad_out_MD)]
        x_MD, grad_before_MH, after_MH, grad_out_MD = (torch.cat([piece[number] for number in trained]) for piece in pieces)
        group_M, ends_G = _groups([counts[number] for number in trained], x_MD.device)
    member_GM = (torch.arange(len(trained), device=x_MD.device).unsqueeze(1) == group_M).to(x_MD.dtype)
    new = {
        "w1": functional.grouped_mm(x_MD.t(), grad_before_MH, offs=ends_G),
        "b1": member_GM @ grad_before_MH,
        "w2": functional.grouped_mm(after_MH.t(), grad_out_MD, offs=ends_G),
        "b2": member_GM @ grad_out_MD,
    }
    for gradient, *added in zip(trained.values(), *(new_G.unbind() for new_G in new.values()), strict=True):
        torch._foreach_add_([gradient[name] for name in new], added)


def _groups(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns, for each row, the position of its expert in the wave (M,); and for each expert, where its rows end (G,), int32."""
    counts_G = torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)
    return torch.repeat_interleave(counts_G, output_size=sum(counts)), counts_G.cumsum(0, dtype=torch.int32)


def _cast(parameters: Parameters, name: str) -> Tensor:
    """Returns the tensor `name` of all experts as one tensor (G, *shape) in bfloat16, cast and gathered in one operation."""
    sources = [p[name] for p in parameters]
    cast_G = sources[0].new_empty(len(sources), *sources[0].shape, dtype=torch.bfloat16)
    torch._foreach_copy_(list(cast_G.unbind()), sources)
    return cast_G

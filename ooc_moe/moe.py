"""The tiered mixture-of-experts layer: tokens meet experts that live in a store and visit a cache.

Experts are read through `ExpertCache` in waves that fit it, in forward and again in backward, so that nothing stays pinned in between and
any capacity of at least one expert gives the same bits: each expert is one GEMM pair per call, its results land at
(token, k), and sums over k and over calls run in an order that residency cannot change. Knows nothing of games.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ooc_moe.routing import Routed, Router
from ooc_moe_client.cache import ExpertCache
from ooc_moe_client.store import Sections

PARAMETERS = ("w1", "b1", "w2", "b2")


class ExpertGradients:
    """Gradients of the experts that got tokens since `zero`; nothing is held for the others.

    An expert's gradients lie in one flat tensor, so that its norm and its scaling are one operation each.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in cache.layout.parameters}
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._device = cache.device
        self._flat: dict[int, Tensor] = {}
        self._spare: list[Tensor] = []

    @property
    def experts(self) -> list[int]:
        """Ids of the experts with gradients, ascending."""
        return sorted(self._flat)

    def of(self, expert: int) -> dict[str, Tensor]:
        """The expert's gradients by tensor name, as views to add to; zeros at first."""
        if expert not in self._flat:
            self._flat[expert] = self._spare.pop().zero_() if self._spare else torch.zeros(sum(self._sizes), device=self._device)
        return self._views(self._flat[expert])

    def flat(self, expert: int) -> Tensor:
        """The expert's gradients as one vector. Raises KeyError when it has none."""
        return self._flat[expert]

    def zero(self) -> None:
        """Forgets all gradients; their memory is kept for the next ones."""
        self._spare.extend(self._flat.values())
        self._flat.clear()

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, self._sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


def _sorted_by_expert(experts_NK: Tensor) -> tuple[Tensor, dict[int, slice]]:
    """The permutation that sorts the flat assignments (token, k) by expert, and the rows that each expert then has."""
    flat_M = experts_NK.flatten()
    order_M = torch.argsort(flat_M, stable=True)
    ids, counts = torch.unique_consecutive(flat_M[order_M], return_counts=True)
    spans, start = {}, 0
    for expert, rows in zip(ids.tolist(), counts.tolist(), strict=True):
        spans[expert] = slice(start, start + rows)
        start += rows
    return order_M, spans


class TieredExperts:
    """The experts of one bank as a function of tokens, and the gradients it leaves behind.

    Not a module: its parameters live in the store, and are none of torch's business.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.gradients = ExpertGradients(cache)
        self._parameters = [{name: cache.views[name][slot] for name in PARAMETERS} for slot in range(cache.capacity_experts)]
        # Makes autograd call backward even where no dense parameter before this layer is trained.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x_ND: Tensor, experts_NK: Tensor) -> tuple[Tensor, dict[int, int]]:
        """What each chosen expert makes of each token `(tokens, k, dim)`, and the number of tokens of each expert that got any."""
        order_M, spans = _sorted_by_expert(experts_NK)
        y_NKD: Tensor = _ExpertGemms.apply(x_ND, self._anchor, self, order_M, spans)  # type: ignore[no-untyped-call]
        return y_NKD, {expert: span.stop - span.start for expert, span in spans.items()}

    def visit(self, spans: dict[int, slice], work: Callable[[int, slice, dict[str, Tensor]], None], *, counted: bool) -> None:
        """Calls `work(expert, rows, parameters)` for each expert in order of ids, wave by wave, with the parameters in place."""
        for wave in self.cache.waves(list(spans)):
            with self.cache.reading(wave, sections=Sections.PARAMETERS, counted=counted) as slots:
                for expert, slot in zip(wave, slots, strict=True):
                    work(expert, spans[expert], self._parameters[slot])


class _ExpertGemms(torch.autograd.Function):
    """Tokens (N, D) and assignments sorted by expert -> what each token's experts make of it (N, K, D).

    Elementwise work is done expert by expert too, never over a wave. Sorting back and summing over k are done here, because autograd's own
    backward of an indexing adds up in an order that depends on threads.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, anchor: Tensor, experts: TieredExperts, order_M: Tensor, spans: dict[int, slice]) -> Tensor:
        top_k = len(order_M) // len(x_ND)
        rows_MD = x_ND[order_M // top_k]
        before_MH, after_MH = rows_MD.new_empty(2, len(rows_MD), experts.cache.views["b1"].shape[1])
        out_MD = torch.empty_like(rows_MD)

        def work(_: int, span: slice, p: dict[str, Tensor]) -> None:
            torch.addmm(p["b1"], rows_MD[span], p["w1"], out=before_MH[span])
            torch.ops.aten.gelu.out(before_MH[span], out=after_MH[span])
            torch.addmm(p["b2"], after_MH[span], p["w2"], out=out_MD[span])

        experts.visit(spans, work, counted=True)
        ctx.save_for_backward(rows_MD, before_MH, after_MH, order_M)
        ctx.experts, ctx.spans = experts, spans
        return torch.empty_like(out_MD).index_copy_(0, order_M, out_MD).view(len(x_ND), top_k, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NKD: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, before_MH, after_MH, order_M = ctx.saved_tensors
        grad_MD = grad_NKD.flatten(0, 1)[order_M]
        grad_rows_MD = torch.empty_like(rows_MD)

        def work(expert: int, span: slice, p: dict[str, Tensor]) -> None:
            x, y = rows_MD[span], grad_MD[span]
            hidden = torch.ops.aten.gelu_backward(y @ p["w2"].t(), before_MH[span])
            torch.mm(hidden, p["w1"].t(), out=grad_rows_MD[span])
            gradients = ctx.experts.gradients.of(expert)
            gradients["w1"].addmm_(x.t(), hidden)
            gradients["b1"].add_(hidden.sum(0))
            gradients["w2"].addmm_(after_MH[span].t(), y)
            gradients["b2"].add_(y.sum(0))

        ctx.experts.visit(ctx.spans, work, counted=False)
        grad_x_ND = torch.empty_like(grad_rows_MD).index_copy_(0, order_M, grad_rows_MD).view_as(grad_NKD).sum(1)
        return grad_x_ND, None, None, None, None


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """A layer's output, shaped as its input; how its tokens were routed; the number of tokens of each expert that got any."""

    y: Tensor
    routed: Routed
    tokens_by_expert: dict[int, int]


class TieredMoE(nn.Module):
    """Pre-norm mixture of experts with a residual: `x + dropout(sum_k gate_k * expert_k(norm(x)))`."""

    def __init__(self, experts: TieredExperts, router: Router, *, dim: int, dropout: float) -> None:
        super().__init__()
        self._experts = experts
        self.norm = nn.LayerNorm(dim)
        self.router = router
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, experts_NK: Tensor | None = None, noisy: bool = False, generator: torch.Generator | None = None
    ) -> MoEOutput:
        """Routes and transforms tokens.

        Args:
            x: `(batch, dim)` or `(batch, seq, dim)`.
            experts_NK: a routing to repeat, `(tokens, k)`, tokens in the order of `x`; None routes now.
            noisy: whether the router's noise is on, in training mode.
            generator: draws the noise.
        """
        normal_ND = self.norm(x).flatten(0, -2)
        routed = self.router(normal_ND, experts_NK=experts_NK, noisy=noisy, generator=generator)
        each_NKD, tokens_by_expert = self._experts(normal_ND, routed.experts_NK)
        mixed_ND = torch.bmm(routed.gates_NK.unsqueeze(1), each_NKD).squeeze(1)
        return MoEOutput(x + self.dropout(mixed_ND.view_as(x)), routed, tokens_by_expert)

"""The tiered mixture-of-experts layer: tokens meet experts that live in a store and visit a cache.

Experts are read through `ExpertCache` in waves that fit it, in forward and again in backward, so that nothing stays pinned in between and
any capacity of at least one expert gives the same bits: each expert is one GEMM pair per call, its results land at
(token, k), and sums over k and over calls run in an order that residency cannot change. Knows nothing of games.
"""

from __future__ import annotations

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
            sizes = [torch.Size(shape).numel() for shape in self._shapes.values()]
            self._flat[expert] = self._spare.pop().zero_() if self._spare else torch.zeros(sum(sizes), device=self._device)
        return self._views(self._flat[expert])

    def flat(self, expert: int) -> Tensor:
        """The expert's gradients as one vector. Raises KeyError when it has none."""
        return self._flat[expert]

    def zero(self) -> None:
        """Forgets all gradients; their memory is kept for the next ones."""
        self._spare.extend(self._flat.values())
        self._flat.clear()

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, [torch.Size(shape).numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


@dataclass(frozen=True, slots=True)
class _Groups:
    """Assignments (token, k) sorted by expert. `order_M` sorts the flat assignments; expert e has rows `spans[e]`."""

    order_M: Tensor
    spans: dict[int, slice]


def _group(experts_NK: Tensor) -> _Groups:
    flat_M = experts_NK.flatten()
    order_M = torch.argsort(flat_M, stable=True)
    ids, counts = torch.unique_consecutive(flat_M[order_M], return_counts=True)
    spans, start = {}, 0
    for expert, rows in zip(ids.tolist(), counts.tolist(), strict=True):
        spans[expert] = slice(start, start + rows)
        start += rows
    return _Groups(order_M, spans)


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
        groups = _group(experts_NK)
        rows_MD = x_ND[groups.order_M // experts_NK.shape[1]]
        sorted_MD: Tensor = _ExpertGemms.apply(rows_MD, self._anchor, self, groups.spans)  # type: ignore[no-untyped-call]
        y_MD = torch.empty_like(sorted_MD).index_copy(0, groups.order_M, sorted_MD)
        return y_MD.view(*experts_NK.shape, -1), {expert: span.stop - span.start for expert, span in groups.spans.items()}

    def visit(self, spans: dict[int, slice], work: Callable[[int, slice, dict[str, Tensor]], None], *, counted: bool) -> None:
        """Calls `work(expert, rows, parameters)` for each expert in order of ids, wave by wave, with the parameters in place."""
        for wave in self.cache.waves(list(spans)):
            with self.cache.reading(wave, sections=Sections.PARAMETERS, counted=counted) as slots:
                for expert, slot in zip(wave, slots, strict=True):
                    work(expert, spans[expert], self._parameters[slot])


class _ExpertGemms(torch.autograd.Function):
    """Rows sorted by expert -> what each row's expert makes of it. Elementwise work too is done expert by expert, never over a wave."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, anchor: Tensor, experts: TieredExperts, spans: dict[int, slice]) -> Tensor:
        hidden = experts.cache.views["b1"].shape[1]
        before_MH, after_MH = rows_MD.new_empty(2, len(rows_MD), hidden)
        out_MD = torch.empty_like(rows_MD)

        def work(_: int, span: slice, p: dict[str, Tensor]) -> None:
            torch.addmm(p["b1"], rows_MD[span], p["w1"], out=before_MH[span])
            torch.ops.aten.gelu.out(before_MH[span], out=after_MH[span])
            torch.addmm(p["b2"], after_MH[span], p["w2"], out=out_MD[span])

        experts.visit(spans, work, counted=True)
        ctx.save_for_backward(rows_MD, before_MH, after_MH)
        ctx.experts, ctx.spans = experts, spans
        return out_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        rows_MD, before_MH, after_MH = ctx.saved_tensors
        grad_MD = grad_MD.contiguous()
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
        return grad_rows_MD, None, None, None


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

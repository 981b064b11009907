"""The tiered mixture-of-experts layer: tokens meet experts that live in a store and visit a cache.

Experts are read through `ExpertCache` in waves that fit it, in forward and again in backward, so that nothing stays pinned in between and
any capacity of at least one expert gives the same bits: each expert is one GEMM pair per call, its results land at
(token, k), and sums over k and over calls run in an order that residency cannot change. The arithmetic of a wave is in looped_ffn.py and
grouped_ffn.py. Knows nothing of games.

Shapes: N tokens, K experts a token, M = N * K assignments sorted by expert, D wide, H inside an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from ooc_moe.moe import grouped as grouped_ffn
from ooc_moe.moe import looped as looped_ffn
from ooc_moe.moe.router import Routed, Router
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.store import Sections

PARAMETERS = ("w1", "b1", "w2", "b2")


class ExpertGradients:
    """Gradients of the experts that got tokens since `zero`; nothing is held for the others.

    An expert's gradients lie in one flat tensor, so that its norm and its scaling are one operation each. What was made once is used
    again: after the first step with that many experts nothing is allocated.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in cache.layout.parameters}
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._device = cache.device
        self._rows: dict[int, _Row] = {}
        self._spare: list[_Row] = []

    @property
    def experts(self) -> list[int]:
        """Ids of the experts with gradients, ascending."""
        return sorted(self._rows)

    def of(self, expert: int) -> dict[str, Tensor]:
        """The expert's gradients by tensor name, as views to add to; zeros at first."""
        if expert not in self._rows:
            self._rows[expert] = self._spare.pop() if self._spare else self._new_row()
            self._rows[expert].flat.zero_()
        return self._rows[expert].views

    def flat(self, expert: int) -> Tensor:
        """The expert's gradients as one vector. Raises KeyError when it has none."""
        return self._rows[expert].flat

    def keep(self, experts: Collection[int]) -> None:
        """Forgets the gradients of all others."""
        for expert in [expert for expert in self._rows if expert not in experts]:
            self._spare.append(self._rows.pop(expert))

    def zero(self) -> None:
        """Forgets all gradients; their memory is kept for the next ones."""
        self._spare.extend(self._rows.values())
        self._rows.clear()

    def _new_row(self) -> _Row:
        flat = torch.empty(sum(self._sizes), device=self._device)
        pieces = zip(self._shapes.items(), torch.split(flat, self._sizes), strict=True)
        return _Row(flat, {name: piece.view(shape) for (name, shape), piece in pieces})


@dataclass(frozen=True, slots=True)
class _Row:
    """One expert's gradients, and the views of it by tensor name."""

    flat: Tensor
    views: dict[str, Tensor]


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

    def __call__(self, x_ND: Tensor, routed: Routed, *, read_only: Collection[int] = ()) -> Tensor:
        """Each token's sum over its experts, weighted by the gates `(tokens, dim)`.

        In float32; under autocast to bfloat16 in that, by grouped matrix multiplications, with gradients that add up in float32. Those of
        the experts in `read_only` are not computed: to the loss these are constants that gradients flow through.
        """
        y_ND: Tensor = _MixedExperts.apply(x_ND, routed.gates_NK, self._anchor, self, routed, read_only)  # type: ignore[no-untyped-call]
        return y_ND

    def visit(self, experts: Sequence[int], work: Callable[[slice, list[dict[str, Tensor]]], None], *, counted: bool) -> None:
        """Calls `work(places, parameters)` wave by wave in order of ids, with the wave's parameters in the cache.

        Args:
            experts: ascending ids; `places` says which of them the wave has.
            work: does the part of these experts.
            counted: as for `ExpertCache.reading`.
        """
        start = 0
        for wave in self.cache.waves(experts):
            with self.cache.reading(wave, sections=Sections.PARAMETERS, counted=counted) as slots:
                work(slice(start, start + len(wave)), [self._parameters[slot] for slot in slots])
            start += len(wave)


class _MixedExperts(torch.autograd.Function):
    """Tokens (N, D), gates (N, K) and their routing -> the weighted sum of what each token's experts make of it (N, D).

    Sorting back and summing over k are done here, because autograd's own backward of an indexing adds up in an order that depends on
    threads.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, anchor: Tensor, experts: TieredExperts, routed: Routed, read_only: Collection[int]
    ) -> Tensor:
        order_M, counts = routed.order_M, list(routed.tokens_by_expert.values())
        grouped = torch.is_autocast_enabled(x_ND.device.type) and torch.get_autocast_dtype(x_ND.device.type) is torch.bfloat16
        forward_wave = grouped_ffn.forward if grouped else looped_ffn.forward
        rows_MD = routed.rows_of(x_ND.to(torch.bfloat16 if grouped else x_ND.dtype))
        before_MH, after_MH = rows_MD.new_empty(2, len(rows_MD), experts.cache.views["b1"].shape[1])
        out_MD = torch.empty_like(rows_MD)
        pieces = _pieces(counts, rows_MD, before_MH, after_MH, out_MD)
        experts.visit(
            list(routed.tokens_by_expert),
            lambda places, parameters: forward_wave(parameters, counts[places], *pieces(places)),
            counted=True,
        )
        back_M = None if order_M is None else _inverse(order_M)
        each_NKD = _picked(out_MD, back_M).view(*gates_NK.shape, -1)
        ctx.save_for_backward(rows_MD, before_MH, after_MH, each_NKD, gates_NK, back_M)
        ctx.experts, ctx.routed, ctx.read_only, ctx.grouped, ctx.dtype = experts, routed, read_only, grouped, x_ND.dtype
        return _sum_over_k(each_NKD * gates_NK.unsqueeze(2)).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, before_MH, after_MH, each_NKD, gates_NK, back_M = ctx.saved_tensors
        experts, counts = list(ctx.routed.tokens_by_expert), list(ctx.routed.tokens_by_expert.values())
        backward_wave = grouped_ffn.backward if ctx.grouped else looped_ffn.backward
        grad_gates_NK = (each_NKD * grad_ND.unsqueeze(1)).sum(2).to(gates_NK.dtype) if ctx.needs_input_grad[1] else None
        grad_each_NKD = (grad_ND.unsqueeze(1) * gates_NK.unsqueeze(2)).to(rows_MD.dtype)
        grad_out_MD = _picked(grad_each_NKD.flatten(0, 1), ctx.routed.order_M)
        grad_rows_MD = torch.empty_like(rows_MD)
        gradients_of = ctx.experts.gradients.of
        pieces = _pieces(counts, rows_MD, before_MH, after_MH, grad_out_MD, grad_rows_MD)

        def work(places: slice, parameters: list[dict[str, Tensor]]) -> None:
            # One by one: zeros are still in the CPU's caches when the first product is added to them.
            gradients = (None if expert in ctx.read_only else gradients_of(expert) for expert in experts[places])
            backward_wave(parameters, gradients, counts[places], *pieces(places))

        ctx.experts.visit(experts, work, counted=False)
        grad_x_ND = _sum_over_k(_picked(grad_rows_MD, back_M).view_as(each_NKD))
        return grad_x_ND.to(ctx.dtype), grad_gates_NK, None, None, None, None


def _inverse(order_M: Tensor) -> Tensor:
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


def _picked(rows_MD: Tensor, order_M: Tensor | None) -> Tensor:
    """The rows in this order; None: as they are."""
    return rows_MD if order_M is None else rows_MD.index_select(0, order_M)


def _pieces(counts: list[int], *tensors: Tensor) -> Callable[[slice], list[Tensor]]:
    """Gives the rows of each tensor that belong to the experts at the given places."""
    ends = [0, *accumulate(counts)]
    return lambda places: [tensor[ends[places.start] : ends[places.stop]] for tensor in tensors]


def _sum_over_k(each_NKD: Tensor) -> Tensor:
    """One after another: a few times faster than `sum(1)` for the few that K is."""
    return reduce(torch.add, each_NKD.unbind(1))


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """A layer's output, shaped as its input; how its tokens were routed; the number of tokens of each expert that got any."""

    y: Tensor
    routed: Routed
    tokens_by_expert: dict[int, int]


class TieredMoE(nn.Module):
    """Pre-norm mixture of experts with a residual: `x + dropout(sum_k gate_k * expert_k(norm(x)))`. It trains none in `read_only`."""

    def __init__(self, experts: TieredExperts, router: Router, *, dim: int, dropout: float, read_only: Collection[int] = ()) -> None:
        super().__init__()
        self._experts = experts
        self._read_only = frozenset(read_only)
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
        mixed_ND = self._experts(normal_ND, routed, read_only=self._read_only)
        return MoEOutput(x + self.dropout(mixed_ND.view_as(x)), routed, routed.tokens_by_expert)

    @torch.no_grad()
    def activity(self, x: Tensor, routed: Routed) -> dict[int, Tensor]:
        """Mean absolute activation `(hidden,)` of each expert's hidden units over the tokens of `x` that were routed to it, by id."""
        rows_MD = routed.rows_of(self.norm(x).flatten(0, -2))
        experts, pieces = list(routed.tokens_by_expert), torch.split(rows_MD, list(routed.tokens_by_expert.values()))
        found: dict[int, Tensor] = {}

        def work(places: slice, parameters: list[dict[str, Tensor]]) -> None:
            for expert, rows_RD, p in zip(experts[places], pieces[places], parameters, strict=True):
                found[expert] = gelu(torch.addmm(p["b1"], rows_RD, p["w1"])).abs().mean(0)

        self._experts.visit(experts, work, counted=False)
        return found

"""The tiered mixture-of-experts layer: tokens pass through experts that live in a store and are read through a cache.

Experts are read through `ExpertCache` in waves (groups that fit the cache), once in forward and again in backward, so that none must stay
in the cache in between. The results do not depend on the cache's capacity, not in a single bit: each expert is one pair of matrix products
per call, its outputs are stored by (token, k), and sums over k and over calls run in an order that does not depend on which experts are in
the cache. looped.py and grouped.py compute the experts of a wave.

Letters: N tokens, K experts of a token, M = N * K assignments sorted by expert, D width of a token, H width inside an expert.
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

from ooc_moe.moe import grouped, looped
from ooc_moe.moe.expert_layout import check_bfloat16_widths
from ooc_moe.moe.router import Routed, Router
from ooc_moe.moe.wave import Parameters, WaveArithmetic, WaveRows
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.store import Sections

PARAMETERS = ("w1", "b1", "w2", "b2")


class ExpertGradients:
    """The gradients of one bank's experts. Only experts that got tokens since the last call of `zero` have gradients.

    All gradients of one expert lie in one flat tensor, so that its norm and its scaling are one operation each. The memory of dropped
    gradients is used again: a step allocates memory only if it has more experts than any step before.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in cache.layout.parameters}
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._device = cache.device
        self._rows: dict[int, _Row] = {}
        self._spare: list[_Row] = []

    @property
    def experts(self) -> list[int]:
        """The ids of the experts that have gradients, ascending."""
        return sorted(self._rows)

    def of(self, expert: int) -> dict[str, Tensor]:
        """Returns one expert's gradients by tensor name, for backward to add to. An expert that has none yet gets zeros."""
        if expert not in self._rows:
            self._rows[expert] = self._spare.pop() if self._spare else self._new_row()
            self._rows[expert].flat.zero_()
        return self._rows[expert].views

    def flat(self, expert: int) -> Tensor:
        """The expert's gradients as one vector. Raises KeyError if the expert has none."""
        return self._rows[expert].flat

    def keep(self, experts: Collection[int]) -> None:
        """Drops the gradients of all experts except these."""
        for expert in [expert for expert in self._rows if expert not in experts]:
            self._spare.append(self._rows.pop(expert))

    def zero(self) -> None:
        """Drops all gradients. Their memory is kept for the gradients of the next step."""
        self._spare.extend(self._rows.values())
        self._rows.clear()

    def _new_row(self) -> _Row:
        flat = torch.empty(sum(self._sizes), device=self._device)
        pieces = zip(self._shapes.items(), torch.split(flat, self._sizes), strict=True)
        return _Row(flat, {name: piece.view(shape) for (name, shape), piece in pieces})


@dataclass(frozen=True, slots=True)
class _Row:
    """The gradients of one expert as one vector, and views of it by tensor name."""

    flat: Tensor
    views: dict[str, Tensor]


class TieredExperts:
    """The experts of one bank as a function of tokens that autograd can differentiate.

    Backward adds the gradients of the experts to `gradients`. This is no torch module, because the experts' parameters live in the store
    and are not torch parameters.
    """

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.gradients = ExpertGradients(cache)
        self._parameters = [{name: cache.views[name][slot] for name in PARAMETERS} for slot in range(cache.capacity_experts)]
        # Requires a gradient, so that autograd calls backward even where no dense parameter before this layer is trained.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x_ND: Tensor, routed: Routed, *, read_only: Collection[int] = ()) -> Tensor:
        """Computes for each token the weighted sum of its experts' outputs. Returns (tokens, dim).

        The arithmetic is float32. Under autocast to bfloat16 it is bfloat16, by grouped matrix multiplications, with gradients that add up
        in float32.

        Args:
            x_ND: the tokens.
            routed: the experts of each token, and their weights in the sum (the gates).
            read_only: experts that get no gradients. Gradients still flow through them to the tokens.

        Raises:
            InvalidRequest: under autocast to bfloat16, a width of the experts is not a multiple of 8.
        """
        y_ND: Tensor = _MixedExperts.apply(x_ND, routed.gates_NK, self._anchor, self, routed, read_only)  # type: ignore[no-untyped-call]
        return y_ND

    def visit(self, experts: Sequence[int], work: Callable[[slice, Parameters], None], *, counted: bool) -> None:
        """Brings experts into the cache in waves (groups that fit it), in order of ids, and calls `work(places, parameters)` for each wave.

        Args:
            experts: ascending ids.
            work: computes one wave. It gets the slice of `experts` that the wave consists of, and the parameters of these experts.
            counted: whether the cache adds this visit to its counts of accesses, hits and misses. False for a visit that only
                repeats a counted one, for example backward's after forward's.
        """
        start = 0
        for wave in self.cache.waves(experts):
            with self.cache.reading(wave, sections=Sections.PARAMETERS, counted=counted) as slots:
                work(slice(start, start + len(wave)), [self._parameters[slot] for slot in slots])
            start += len(wave)


class _MixedExperts(torch.autograd.Function):
    """Computes, from tokens (N, D), gates (N, K) and a routing, the weighted sums of the experts' outputs (N, D).

    Undoing the sort by expert and summing over k happen in this class and not in autograd, whose backward of an indexing adds up in an
    order that depends on the number of threads.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, anchor: Tensor, experts: TieredExperts, routed: Routed, read_only: Collection[int]
    ) -> Tensor:
        is_grouped = torch.is_autocast_enabled(x_ND.device.type) and torch.get_autocast_dtype(x_ND.device.type) is torch.bfloat16
        hidden = experts.cache.views["b1"].shape[1]
        if is_grouped:
            check_bfloat16_widths(x_ND.shape[1], hidden)
        rows_MD = routed.rows_of(x_ND.to(torch.bfloat16 if is_grouped else x_ND.dtype))
        before_MH, after_MH = rows_MD.new_empty(2, len(rows_MD), hidden)
        out_MD = torch.empty_like(rows_MD)
        ids, rows = list(routed.tokens_by_expert), WaveRows(list(routed.tokens_by_expert.values()), rows_MD, before_MH, after_MH)
        arithmetic, ends = _arithmetic(is_grouped), _ends(rows.counts)

        def work(places: slice, parameters: Parameters) -> None:
            span = slice(ends[places.start], ends[places.stop])
            arithmetic.forward(parameters, rows.part(places, span), out_MD[span])

        experts.visit(ids, work, counted=True)
        back_M = None if routed.order_M is None else _inverse(routed.order_M)
        each_NKD = _picked(out_MD, back_M).view(*gates_NK.shape, -1)
        ctx.save_for_backward(rows_MD, before_MH, after_MH, each_NKD, gates_NK, back_M)
        ctx.experts, ctx.routed, ctx.read_only, ctx.is_grouped, ctx.dtype = experts, routed, read_only, is_grouped, x_ND.dtype
        return _sum_over_k(each_NKD * gates_NK.unsqueeze(2)).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, before_MH, after_MH, each_NKD, gates_NK, back_M = ctx.saved_tensors
        grad_gates_NK = (each_NKD * grad_ND.unsqueeze(1)).sum(2).to(gates_NK.dtype) if ctx.needs_input_grad[1] else None
        grad_each_NKD = (grad_ND.unsqueeze(1) * gates_NK.unsqueeze(2)).to(rows_MD.dtype)
        grad_out_MD = _picked(grad_each_NKD.flatten(0, 1), ctx.routed.order_M)
        grad_rows_MD = torch.empty_like(rows_MD)
        ids, rows = list(ctx.routed.tokens_by_expert), WaveRows(list(ctx.routed.tokens_by_expert.values()), rows_MD, before_MH, after_MH)
        arithmetic, ends, gradients_of = _arithmetic(ctx.is_grouped), _ends(rows.counts), ctx.experts.gradients.of

        def work(places: slice, parameters: Parameters) -> None:
            span = slice(ends[places.start], ends[places.stop])
            # Lazily, expert by expert: new gradients are zeroed just before the first product is added, while they are in the CPU's caches.
            gradients = (None if expert in ctx.read_only else gradients_of(expert) for expert in ids[places])
            arithmetic.backward(parameters, gradients, rows.part(places, span), grad_out_MD[span], grad_rows_MD[span])

        ctx.experts.visit(ids, work, counted=False)
        grad_x_ND = _sum_over_k(_picked(grad_rows_MD, back_M).view_as(each_NKD))
        return grad_x_ND.to(ctx.dtype), grad_gates_NK, None, None, None, None


def _arithmetic(is_grouped: bool) -> WaveArithmetic:
    return grouped if is_grouped else looped


def _ends(counts: list[int]) -> list[int]:
    """The position of each expert's first row, followed by the number of all rows."""
    return [0, *accumulate(counts)]


def _inverse(order_M: Tensor) -> Tensor:
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


def _picked(rows_MD: Tensor, order_M: Tensor | None) -> Tensor:
    """The rows in the order that `order_M` gives. None: in their present order."""
    return rows_MD if order_M is None else rows_MD.index_select(0, order_M)


def _sum_over_k(each_NKD: Tensor) -> Tensor:
    """Adds the K terms one after another, which is a few times faster than `sum(1)` for a small K."""
    return reduce(torch.add, each_NKD.unbind(1))


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """The result of `TieredMoE`.

    Attributes:
        y: the output, in the shape of the layer's input.
        routed: the experts that the router chose for each token.
        tokens_by_expert: the number of tokens that each expert got, by expert id. Experts without tokens are left out.
    """

    y: Tensor
    routed: Routed
    tokens_by_expert: dict[int, int]


class TieredMoE(nn.Module):
    """A mixture-of-experts layer with normalisation before and a residual around it: `x + dropout(sum_k gate_k * expert_k(norm(x)))`.

    Args:
        experts: the experts of a bank with the layout of `ffn_layout`.
        router: chooses the experts of each token.
        dropout: the probability, in training, that an element of the experts' weighted sum is dropped.
        read_only: ids of experts that are used and never trained.
    """

    def __init__(self, experts: TieredExperts, router: Router, *, dropout: float = 0.0, read_only: Collection[int] = ()) -> None:
        super().__init__()
        self._experts = experts
        self._read_only = frozenset(read_only)
        self.norm = nn.LayerNorm(router.dim)
        self.router = router
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, *, experts_NK: Tensor | None = None, noisy: bool = False, generator: torch.Generator | None = None
    ) -> MoEOutput:
        """Routes each token to its experts, and adds the weighted sum of their outputs to the token.

        Args:
            x: tokens, `(batch, dim)` or `(batch, seq, dim)`.
            experts_NK: expert ids `(tokens, k)` of an earlier call, with the tokens in the order of `x`. None: the router chooses.
            noisy: whether the router's noise is on. It needs training mode, too.
            generator: draws the noise.
        """
        normal_ND = self.norm(x).flatten(0, -2)
        routed = self.router(normal_ND, experts_NK=experts_NK, noisy=noisy, generator=generator)
        mixed_ND = self._experts(normal_ND, routed, read_only=self._read_only)
        return MoEOutput(x + self.dropout(mixed_ND.view_as(x)), routed, routed.tokens_by_expert)

    @torch.no_grad()
    def activity(self, x: Tensor, routed: Routed) -> dict[int, Tensor]:
        """Measures how active the hidden units of each expert are: their mean absolute activation `(hidden,)`, by expert id.

        Args:
            x: the layer's input.
            routed: the routing of its tokens. The mean of an expert is over the tokens that it got.
        """
        rows_MD = routed.rows_of(self.norm(x).flatten(0, -2))
        experts, pieces = list(routed.tokens_by_expert), torch.split(rows_MD, list(routed.tokens_by_expert.values()))
        found: dict[int, Tensor] = {}

        def work(places: slice, parameters: Parameters) -> None:
            for expert, rows_RD, p in zip(experts[places], pieces[places], parameters, strict=True):
                found[expert] = gelu(torch.addmm(p["b1"], rows_RD, p["w1"])).abs().mean(0)

        self._experts.visit(experts, work, counted=False)
        return found

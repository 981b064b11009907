"""Routing: chooses the experts of each token by noisy top-k, weighs them, and computes the loss that keeps the experts' load even.

A router chooses among a fixed set of experts: a game's pool (its experts in one layer), or a whole bank (a set of experts in the store).

Letters: N tokens, E experts to choose from, K chosen experts of a token, M = N * K assignments, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ooc_moe_wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts that a router chose for N tokens. An assignment is one token together with one of its K experts.

    Attributes:
        logits_NE: for each token, the logits, without noise, of the E experts that the router chooses from.
        chosen_NK: the chosen experts, as positions among these E experts.
        experts_NK: the chosen experts, as ids in the bank.
        gates_NK: the weights of the chosen experts, which sum to 1 for each token.
        order_M: the permutation that sorts the M flat assignments (token, k) by expert, stably. None: they are sorted already, because
            there is only one expert.
        counts_E: the number of assignments of each of the E experts.
        tokens_by_expert: the numbers of `counts_E` by expert id, ascending, on the host, without experts that got no token.
    """

    logits_NE: Tensor
    chosen_NK: Tensor
    experts_NK: Tensor
    gates_NK: Tensor
    order_M: Tensor | None
    counts_E: Tensor
    tokens_by_expert: dict[int, int]

    def rows_of(self, x_ND: Tensor) -> Tensor:
        """Copies each token once for each of its experts, sorted by expert: the rows (M, D) on which the experts are computed."""
        return x_ND if self.order_M is None else x_ND.index_select(0, self.order_M // self.experts_NK.shape[1])


class Router(nn.Module):
    """Chooses `top_k` of the given experts for each token, and weighs them.

    Noise changes the choice in training only (Shazeer et al. 2017, eq. 4, but with a fixed standard deviation). The weights are a softmax
    over the logits, without noise, of the chosen experts. So the weights of a choice can be computed again without the noise, and PPO's
    ratios are exactly those of the policy that acted.

    All arithmetic here is float32, under autocast too: bfloat16 has 8 bits of precision, which is too little to tell close logits apart.

    Args:
        dim: width of a token.
        experts: ascending ids of the experts to choose from.
        top_k: the number of experts of a token.
        noise: standard deviation of the noise on the logits; 0: none.
    """

    experts: Tensor
    _places: Tensor

    def __init__(self, dim: int, experts: Sequence[int], *, top_k: int, noise: float = 0.0) -> None:
        super().__init__()
        self.dim, self.top_k, self.noise = dim, top_k, noise
        self.weight = nn.Parameter(torch.randn(len(experts), dim) * (0.1 * dim**-0.5))
        # Not in the state dict: the owner of the router keeps the ids (for an agent, its pools).
        self.register_buffer("experts", torch.tensor(experts), persistent=False)
        self.register_buffer("_places", torch.arange(len(experts)), persistent=False)
        self._ids = list(experts)

    def forward(
        self, x_ND: Tensor, *, experts_NK: Tensor | None = None, noisy: bool = False, generator: torch.Generator | None = None
    ) -> Routed:
        """Chooses experts for tokens and weighs them, or weighs the experts of an earlier choice.

        Args:
            x_ND: normalised tokens.
            experts_NK: expert ids of an earlier choice. None: the router chooses.
            noisy: whether the noise is on. It needs training mode, too.
            generator: draws the noise.

        Raises:
            InvalidRequest: `experts_NK` has another shape, or names an expert that this router cannot choose.
        """
        if len(self._ids) == 1:
            return self._no_choice(x_ND, experts_NK)
        with _no_autocast(x_ND.device.type):
            logits_NE = x_ND.float() @ self.weight.float().t()
        if experts_NK is None:
            chosen_NK = self._choose(logits_NE.detach(), noisy, generator)
            experts_NK = self.experts[chosen_NK]
        else:
            chosen_NK = self._places_of(experts_NK, len(x_ND))
        sorted_M, order_M = chosen_NK.flatten().sort(stable=True)
        counts_E = torch.searchsorted(sorted_M, self._places, right=True).diff(prepend=self._places.new_zeros(1))
        tokens_by_expert = self._on_host(counts_E, order_M, experts_NK)
        gates_NK = torch.softmax(logits_NE.gather(1, chosen_NK), dim=1)
        return Routed(logits_NE, chosen_NK, experts_NK, gates_NK, order_M, counts_E, tokens_by_expert)

    def _no_choice(self, x_ND: Tensor, experts_NK: Tensor | None) -> Routed:
        """Sends all tokens, in their order, to the router's only expert with a weight of 1. A router of one expert learns nothing."""
        num_tokens, ones_N1 = len(x_ND), x_ND.new_ones(len(x_ND), 1, dtype=torch.float32)
        only_N1 = self.experts.expand(num_tokens, 1)
        if experts_NK is not None:
            self._check_shape(experts_NK, num_tokens)
            unknown_M = experts_NK[experts_NK != only_N1]
            if len(unknown_M):
                raise self._unknown_expert(int(unknown_M[0]))
        return Routed(
            logits_NE=ones_N1.detach(),
            chosen_NK=self._places.expand(num_tokens, 1),
            experts_NK=only_N1,
            gates_NK=ones_N1,
            order_M=None,
            counts_E=self._places.new_full((1,), num_tokens),
            tokens_by_expert={self._ids[0]: num_tokens},
        )

    def _choose(self, logits_NE: Tensor, noisy: bool, generator: torch.Generator | None) -> Tensor:
        if noisy and self.training and self.noise > 0:
            device = logits_NE.device if generator is None else generator.device
            noise_NE = torch.randn(logits_NE.shape, generator=generator, device=device)
            logits_NE = logits_NE + self.noise * noise_NE.to(logits_NE.device)
        return logits_NE.topk(self.top_k, dim=1).indices

    def _places_of(self, experts_NK: Tensor, num_tokens: int) -> Tensor:
        """The positions of these expert ids among the router's experts. An id that is not among them gets the position after the last."""
        self._check_shape(experts_NK, num_tokens)
        places_NK = torch.searchsorted(self.experts, experts_NK.to(self.experts.dtype).contiguous()).clamp_(max=len(self._ids) - 1)
        return places_NK.masked_fill_(self.experts[places_NK] != experts_NK, len(self._ids))

    def _on_host(self, counts_E: Tensor, order_M: Tensor, experts_NK: Tensor) -> dict[int, int]:
        """Copies the counts to the host, by expert id. Here the host waits for the GPU: the cache must know which experts to fetch."""
        counts = counts_E.tolist()
        if sum(counts) < len(order_M):
            raise self._unknown_expert(int(experts_NK.flatten()[order_M[sum(counts)]]))
        return {expert: count for expert, count in zip(self._ids, counts, strict=True) if count}

    def _check_shape(self, experts_NK: Tensor, num_tokens: int) -> None:
        if experts_NK.shape != (num_tokens, self.top_k):
            raise InvalidRequest(f"routing: shape {tuple(experts_NK.shape)} is not ({num_tokens}, {self.top_k}) (tokens, top_k)")

    def _unknown_expert(self, expert: int) -> InvalidRequest:
        return InvalidRequest(f"routing: expert {expert} is not one of this router's {self._ids}")


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off where it is on. Devices like "meta" have no autocast that could be on."""
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def balance_loss(routed: Routed) -> Tensor:
    """The load-balancing loss of Fedus et al. 2021 (Switch), eq. 4: a scalar, 1 when the load is even.

    It is E * sum_i f_i P_i over the E experts to choose from, where f_i is the share of the assignments that expert i got and P_i its mean
    probability. Only P_i carries a gradient.
    """
    num_experts = routed.logits_NE.shape[1]
    shares_E = routed.counts_E / routed.chosen_NK.numel()
    probabilities_E = torch.softmax(routed.logits_NE, dim=1).mean(dim=0)
    return num_experts * (shares_E * probabilities_E).sum()

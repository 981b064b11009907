"""What will be asked of the caches, as far as it can be told before.

An update's needs are known when it begins, where rollout routing is replayed: each minibatch names its experts. Acting's are guessed: the
layers' order is certain, and the next step will choose much the same experts as the last one. Knows nothing of losses or optimizers, only
of their order: forward through the layers, backward through them, then the experts' Adam steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.store import Sections

# So many tell of every expert when it is used next, wherever in a step one stands.
STEPS_EXPECTED = 2


def uses_of_update(
    experts_BTLK: Tensor, minibatches: Iterable[Tensor], *, num_banks: int, read_only: Sequence[Collection[int]] | None = None
) -> list[list[Use]]:
    """The uses of each bank's experts, in order.

    Args:
        experts_BTLK: the routing that is replayed: segments, time, layers, top_k.
        minibatches: the segments of each optimizer step.
        num_banks: layer `l` uses bank `l % num_banks`.
        read_only: the experts of each bank that are not updated; None: all are.
    """
    read_only = [()] * num_banks if read_only is None else read_only
    uses: list[list[Use]] = [[] for _ in range(num_banks)]
    for rows in minibatches:
        layers = _experts_of_layers(experts_BTLK[rows])
        for bank, order in enumerate(uses):
            forward = [Use(experts, Sections.PARAMETERS) for experts in layers[bank::num_banks]]
            order += [*forward, *reversed(forward)]
            updated = {expert for use in forward for expert in use.experts}.difference(read_only[bank])
            if updated:
                order.append(Use(tuple(sorted(updated)), Sections.ALL))
    return uses


def schedule_acting(caches: Sequence[ExpertCache], experts_NLK: Sequence[Tensor], *, ahead: bool) -> None:
    """Tells each cache to expect in the next steps what this one used. Where that fits there is nothing to tell.

    Args:
        caches: layer `l` uses cache `l % len(caches)`.
        experts_NLK: the step's routing on the CPU, of each group of environments that acted together, in turn.
        ahead: whether what is expected is fetched before it is asked for.
    """
    step = [_experts_of_layers(group) for group in experts_NLK]
    for number, cache in enumerate(caches):
        uses = [Use(experts, Sections.PARAMETERS) for layers in step for experts in layers[number :: len(caches)]]
        fits = len({expert for use in uses for expert in use.experts}) <= cache.capacity_experts
        cache.schedule([] if fits else uses * STEPS_EXPECTED, ahead=ahead)


def _experts_of_layers(experts_xLK: Tensor) -> list[tuple[int, ...]]:
    """The different experts of each layer, ascending."""
    return [tuple(torch.unique(experts).tolist()) for experts in experts_xLK.unbind(-2)]

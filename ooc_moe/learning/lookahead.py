"""Tells the caches which experts will be used next, as far as that is known in advance.

Where an update reuses the rollout's routing, its uses of experts are known exactly when it begins: the routing of each minibatch names its
experts. One optimizer step uses them in this order:

    forward through the layers -> backward through the layers in reverse -> the experts' Adam step

While the agent plays, the uses are guessed: the order of the layers is certain, and the next step will choose mostly the same experts as
the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.store import Sections

STEPS_EXPECTED = 2
"""The number of acting steps that are scheduled ahead.

With two, the schedule contains the next use of every expert at every moment of a step.
"""


def uses_of_update(
    experts_BTLK: Tensor, minibatches: Iterable[Tensor], *, num_banks: int, read_only: Sequence[Collection[int]] | None = None
) -> list[list[Use]]:
    """Lists in order, for each bank, the uses of its experts in one update. A use is a set of experts that are needed at the same time.

    The cache of each bank takes its list as the schedule of what will be needed next.

    Args:
        experts_BTLK: the routing that the update reuses (segments, time, layers, top_k).
        minibatches: the segments of each optimizer step.
        num_banks: layer `l` uses bank `l % num_banks`.
        read_only: for each bank, the experts that are not updated. None: all experts are updated.
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
    """Tells each cache to expect that the next steps of acting use the same experts as this step.

    A cache that has room for all these experts needs no schedule (an announced order of coming uses) and gets an empty one.

    Args:
        caches: layer `l` uses cache `l % len(caches)`.
        experts_NLK: the routing of this step on the CPU, one entry for each group of environments that acted together, in order.
        ahead: whether the caches fetch the expected experts before they are used.
    """
    step = [_experts_of_layers(group) for group in experts_NLK]
    for number, cache in enumerate(caches):
        uses = [Use(experts, Sections.PARAMETERS) for layers in step for experts in layers[number :: len(caches)]]
        fits = len({expert for use in uses for expert in use.experts}) <= cache.capacity_experts
        cache.schedule([] if fits else uses * STEPS_EXPECTED, ahead=ahead)


def _experts_of_layers(experts_xLK: Tensor) -> list[tuple[int, ...]]:
    """Lists the distinct experts that each layer uses in a routing (..., layers, top_k), ascending."""
    return [tuple(torch.unique(experts).tolist()) for experts in experts_xLK.unbind(-2)]

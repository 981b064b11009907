"""What an update will ask of the caches, known before it begins: rollout routing is replayed, so that each minibatch names its experts.

Knows nothing of losses or optimizers, only of their order: forward through the layers, backward through them, then the experts' Adam steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ooc_moe_client.schedule import Use
from ooc_moe_client.store import Sections


def uses_of_update(experts_BTLK: Tensor, minibatches: Iterable[Tensor], *, num_banks: int) -> list[list[Use]]:
    """The uses of each bank's experts, in order.

    Args:
        experts_BTLK: the routing that is replayed: segments, time, layers, top_k.
        minibatches: the segments of each optimizer step.
        num_banks: layer `l` uses bank `l % num_banks`.
    """
    uses: list[list[Use]] = [[] for _ in range(num_banks)]
    for rows in minibatches:
        layers = [tuple(torch.unique(experts).tolist()) for experts in experts_BTLK[rows].unbind(2)]
        for bank, order in enumerate(uses):
            forward = [Use(experts, Sections.PARAMETERS) for experts in layers[bank::num_banks]]
            updated = {expert for use in forward for expert in use.experts}
            order += [*forward, *reversed(forward), Use(tuple(sorted(updated)), Sections.ALL)]
    return uses

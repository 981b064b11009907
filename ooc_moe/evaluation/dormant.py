"""Dormant units (Sokar et al. 2023, definition 3.1): hidden units of experts that hardly respond to a game's frames any more.

A unit's score is its mean absolute activation over the tokens that its expert got, divided by the mean of that over the expert's units.
Every evaluation logs it; it is one of the measures of a run's report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ooc_moe.agent.agent import Agent
from ooc_moe.moe.layer import MoEOutput, TieredMoE

DORMANT = 0.025


@torch.no_grad()
def dormant_share(agent: Agent, frames_NSHW: Tensor, game: str) -> float:
    """The share of dormant units, 0 to 1, among the hidden units of all experts that these frames are routed to, in all layers.

    An expert that serves two layers counts in both. Each frame is seen as a segment of its own, without router noise. Some hundred frames
    are enough; with a few, a unit that would have met its input in the next ones is called dormant, too.

    Args:
        agent: whose experts; its training mode is as before afterwards.
        frames_NSHW: uint8.
        game: whose pools they are routed in.

    Raises:
        InvalidRequest: an unknown game, or frames of another shape or dtype.
    """
    activity_EH: list[Tensor] = []

    def look(layer: TieredMoE, inputs: tuple[Any, ...], output: MoEOutput) -> None:
        activity_EH.extend(layer.activity(inputs[0], output.routed).values())

    hooks = [module.register_forward_hook(look) for module in agent.modules() if isinstance(module, TieredMoE)]
    training = agent.training
    try:
        agent.eval()(frames_NSHW.unsqueeze(1), game=game)
    finally:
        agent.train(training)
        for hook in hooks:
            hook.remove()
    scores_EH = torch.stack([activity_H / activity_H.mean() for activity_H in activity_EH])
    # A layer that is silent as a whole scores 0 / 0.
    return float((scores_EH.nan_to_num(0.0) <= DORMANT).float().mean())

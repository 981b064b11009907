"""Measures dormant units (Sokar et al. 2023, definition 3.1): hidden units of experts that hardly respond to a game's frames any more.

A unit's score is its mean absolute activation over the expert's tokens, divided by the mean of these activations over all units of the
expert. A unit is dormant if its score is at most `DORMANT`. Every evaluation logs the share of dormant units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ooc_moe.agent.agent import Agent
from ooc_moe.moe.layer import MoEOutput, TieredMoE

DORMANT = 0.025
"""The highest score, as the module's docstring defines it, at which a unit counts as dormant."""


@torch.no_grad()
def dormant_share(agent: Agent, frames_NSHW: Tensor, game: str) -> float:
    """Computes the share of dormant units, 0 to 1, among the hidden units of all experts to which these frames are routed.

    A dormant unit hardly responds to any of the frames (module docstring). An expert that serves two layers counts in both. Each frame is
    given to the agent alone, without the frames before it, and without router noise. A few hundred frames are enough. With only a few
    frames, units whose inputs happen not to occur in them are counted as dormant, too.

    Args:
        agent: the agent with the experts. It runs in evaluation mode, and goes back to the mode that it was in.
        frames_NSHW: uint8 frames of the game.
        game: the game to whose pools (its experts, layer by layer) the frames are routed.

    Raises:
        InvalidRequest: the game is unknown, or the frames have another shape or dtype.
    """
    activity_EH: list[Tensor] = []

    def record_activity(layer: TieredMoE, inputs: tuple[Any, ...], output: MoEOutput) -> None:
        activity_EH.extend(layer.activity(inputs[0], output.routed).values())

    hooks = [module.register_forward_hook(record_activity) for module in agent.modules() if isinstance(module, TieredMoE)]
    training = agent.training
    try:
        agent.eval()(frames_NSHW.unsqueeze(1), game=game)
    finally:
        agent.train(training)
        for hook in hooks:
            hook.remove()
    scores_EH = torch.stack([activity_H / activity_H.mean() for activity_H in activity_EH])
    # An expert without any activation scores 0 / 0, which counts as dormant.
    return float((scores_EH.nan_to_num(0.0) <= DORMANT).float().mean())

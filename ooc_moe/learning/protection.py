"""The methods against forgetting, which keep later games from damaging the parameters that all games share.

This module has their interface (`Protection`) and the two simplest methods: none at all, and a frozen stem. The other methods are in
stem_replay.py, ewc.py and cloning.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ooc_moe.agent.agent import Agent
from ooc_moe.config.run import RunConfig
from ooc_moe.learning.cloning import OutputCloning
from ooc_moe.learning.ewc import ElasticWeights
from ooc_moe.learning.rollout import Rollout
from ooc_moe.learning.stem_replay import StemReplay


class Protection(Protocol):
    """A method against forgetting: keeps training in one game from damaging the shared parameters that earlier games need.

    The learner calls `loss` and `correct_gradients` in every optimizer step; the trainer calls `leave` when the training in a game ends.
    """

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Computes the weighted penalty that an optimizer step in `game` adds to its loss; zero until the training in a game has ended.

        `generator` draws the stored samples that the penalty uses.
        """

    def correct_gradients(self, game: str) -> None:
        """Corrects the gradients after backward, before the optimizer step in `game`.

        A method may add its penalty's gradients to those of experts, which autograd ignores, or drop those of other games' parameters.
        """

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores what the method needs so that `game` is not forgotten. Call this when the training in `game` ends.

        `rollout` is the game's last rollout. `generator` draws the samples that this needs.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that `leave` has stored so far, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back everything that `leave` had stored, from what `state_dict` returned."""


class Unprotected:
    """No method against forgetting: later games may change all shared parameters."""

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Returns zero: there is no penalty."""
        return torch.zeros(())

    def correct_gradients(self, game: str) -> None:
        """Does nothing: there is nothing to correct."""

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing."""


class Freeze(Unprotected):
    """The method against forgetting that freezes the stem when the training in the first game ends. Later games do not change the stem.

    Other shared parameters (attention, and the routers and experts of token routing) go on learning.
    """

    def __init__(self, stem: nn.Module) -> None:
        self._stem = stem
        self._frozen = False

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Freezes the stem for the rest of the run."""
        self._frozen = True
        self._stem.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the stem is frozen."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Freezes the stem if it was frozen in the saved state, and unfreezes it otherwise."""
        self._frozen = state["frozen"]
        self._stem.requires_grad_(not self._frozen)


def make_protection(config: RunConfig, agent: Agent) -> Protection:
    """Makes the method against forgetting that `config.protection` names, with the weight that the configuration gives.

    The names are replay, freeze, ewc, clone and none.
    """
    weight = {} if config.protection_weight is None else {"weight": config.protection_weight}
    match config.protection:
        case "replay":
            return StemReplay(agent.encode, device=config.device, **weight)
        case "freeze":
            return Freeze(agent.stem)
        case "none":
            return Unprotected()
        case "ewc":
            return ElasticWeights(agent, **weight)
        case "clone":
            return OutputCloning(agent, **weight)

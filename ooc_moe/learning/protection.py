"""Protection keeps later games from changing the parameters that all games share: the interface, and its two simplest kinds.

The other kinds are stem_replay.py, ewc.py and cloning.py.
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
    """The part of learning that looks after the games that have ended."""

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """The weighted penalty that an optimizer step in `game` adds to its loss; zero before a game has ended.

        `generator` draws the stored samples.
        """

    def correct_gradients(self, game: str) -> None:
        """Corrects the gradients after backward: autograd does not know the experts, nor which game owns a parameter."""

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores what is needed to protect a game that has had all its updates. `rollout` is its last one."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the result of `state_dict`."""


class Unprotected:
    """No protection: later games may change all shared parameters."""

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
    """Trains the stem in the first game only.

    Other shared parameters (attention, and the routers and experts of token routing) go on learning.
    """

    def __init__(self, stem: nn.Module) -> None:
        self._stem = stem
        self._frozen = False

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Freezes the stem for good."""
        self._frozen = True
        self._stem.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the stem is frozen."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Freezes the stem if it was frozen in the saved state."""
        self._frozen = state["frozen"]
        self._stem.requires_grad_(not self._frozen)


def make_protection(config: RunConfig, agent: Agent) -> Protection:
    """Makes the protection that the configuration names."""
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

"""How later games are kept from changing what all games share: the interface, and its two simplest kinds.

The others are stem_replay.py, ewc.py and cloning.py. Knows nothing of how a game is learned.
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
    """What the learner adds to its loss for the games that were left."""

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """The penalty of an optimizer step in `game`, weight included; zero before a game was left. `generator` draws its minibatch."""

    def correct_gradients(self, game: str) -> None:
        """Puts the gradients of the step right where autograd, which knows neither experts nor whose they are, cannot; after backward."""

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Remembers a game that had all its updates; `rollout` is its last."""

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads `state_dict` back."""


class Unprotected:
    """Later games change what they like."""

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Zero."""
        return torch.zeros(())

    def correct_gradients(self, game: str) -> None:
        """Nothing to correct."""

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Remembers nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads nothing."""


class Freeze(Unprotected):
    """The stem learns until a game is left; what else games share (attention, token routing and its experts) goes on learning."""

    def __init__(self, stem: nn.Module) -> None:
        self._stem = stem
        self._frozen = False

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Freezes the stem for good."""
        self._frozen = True
        self._stem.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Whether it is frozen."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Freezes the stem if it was."""
        self._frozen = state["frozen"]
        self._stem.requires_grad_(not self._frozen)


def make_protection(config: RunConfig, agent: Agent) -> Protection:
    """The protection that a run asks for."""
    weight = {} if config.protection_weight is None else {"weight": config.protection_weight}
    match config.protection:
        case "replay":
            return StemReplay(agent.stem, device=config.device, **weight)
        case "freeze":
            return Freeze(agent.stem)
        case "none":
            return Unprotected()
        case "ewc":
            return ElasticWeights(agent, **weight)
        case "clone":
            return OutputCloning(agent, **weight)

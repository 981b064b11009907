"""Keeps the learner and the environments of each game in training, from the game's first turn (a stretch of updates) to its last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import Protection
from ooc_moe.learning.rollout import Collector
from ooc_moe.session.session import Session


class GamesInTraining:
    """Makes a game's learner and collector (with the environments) when they are first needed, and keeps them between the game's turns.

    Args:
        session: the agent and the configuration.
        protection: the method against forgetting, for the learners.
        generator: draws minibatches, actions and router noise.
        on_segment: called with the game and its observations (N, S, H, W) at the start of each segment.
    """

    def __init__(
        self, session: Session, *, protection: Protection, generator: torch.Generator, on_segment: Callable[[str, Tensor], None]
    ) -> None:
        self._session, self._protection, self._generator, self._on_segment = session, protection, generator, on_segment
        self._learners: dict[str, Learner] = {}
        self._collectors: dict[str, Collector] = {}
        self._playing: set[str] = set()
        """The games whose environments were reset since the last checkpoint."""

    def learner(self, game: str) -> Learner:
        """Returns the game's learner, and makes it first if the game has none.

        If games take turns, their learners use the same optimizers for the parameters that the games share.
        """
        if game not in self._learners:
            other = next(iter(self._learners.values()), None)
            self._learners[game] = Learner(
                self._session.agent,
                game,
                self._session.config,
                protection=self._protection,
                generator=self._generator,
                sharing_with=other,
            )
        return self._learners[game]

    def collector(self, game: str, *, seed: int) -> Collector:
        """Returns the game's collector, and makes it and its environments first if the game has none.

        The environments are reset from `seed` if they were not reset since the last checkpoint.
        """
        config = self._session.config
        if game not in self._collectors:
            self._collectors[game] = Collector(
                self._session.agent,
                self._session.make_envs(game, config.ppo.num_envs),
                config.ppo,
                generator=self._generator,
                on_segment=partial(self._on_segment, game),
                ahead=config.prefetch != "off",
            )
        if game not in self._playing:
            self._collectors[game].reset(seed)
            self._playing.add(game)
        return self._collectors[game]

    def end_episodes(self) -> None:
        """Makes all environments begin new episodes when they are next used.

        Call this at every checkpoint, because a checkpoint cannot store the state of environments.
        """
        self._playing.clear()

    def end(self, game: str) -> None:
        """Closes the environments of a game that has had all its updates, and drops its collector and its learner.

        If games take turns, the learner is kept: the other games' learners use the same optimizers.
        """
        self._playing.discard(game)
        self._collectors.pop(game).envs.close()
        if not self._session.config.switch_every:
            del self._learners[game]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of all optimizers, for a checkpoint."""
        learner = next(iter(self._learners.values()), None)  # Any of them: all have the same shared optimizers.
        return {
            "optimizers": {game: learner.own.state_dict() for game, learner in self._learners.items()},
            "shared_optimizers": learner and {"dense": learner.shared.state_dict(), "experts": learner.experts.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the learners that a saved state contains, and loads their optimizers. The agent must know the games already."""
        for game, optimizer in state["optimizers"].items():
            learner = self.learner(game)
            learner.own.load_state_dict(optimizer)
            learner.shared.load_state_dict(state["shared_optimizers"]["dense"])
            learner.experts.load_state_dict(state["shared_optimizers"]["experts"])

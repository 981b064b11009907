"""The games that are in training: the learner and the environments of each, from its first turn to its last."""

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
    """Makes learners and collectors when a game needs them and keeps them between the game's turns.

    Args:
        session: the agent and the configuration.
        protection: protects what earlier games share with the one in training.
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
        """The game's learner, made if there is none. Games that take turns share the optimizers of what they share."""
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
        """The collector with the game's environments, made if there is none.

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
        """Makes all environments begin anew when they are next used. A checkpoint does so, because it cannot store their state."""
        self._playing.clear()

    def end(self, game: str) -> None:
        """Closes the environments of a game that had all its updates.

        Its learner goes too, unless games take turns: then the other games' learners share optimizers with it.
        """
        self._playing.discard(game)
        self._collectors.pop(game).envs.close()
        if not self._session.config.switch_every:
            del self._learners[game]

    def state_dict(self) -> dict[str, Any]:
        """The state of all optimizers, for the checkpoint."""
        learner = next(iter(self._learners.values()), None)  # Any of them: all have the same shared optimizers.
        return {
            "optimizers": {game: learner.own.state_dict() for game, learner in self._learners.items()},
            "shared_optimizers": learner and {"dense": learner.shared.state_dict(), "experts": learner.experts.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the learners of a state and loads their optimizers. The agent must know the games already."""
        for game, optimizer in state["optimizers"].items():
            learner = self.learner(game)
            learner.own.load_state_dict(optimizer)
            learner.shared.load_state_dict(state["shared_optimizers"]["dense"])
            learner.experts.load_state_dict(state["shared_optimizers"]["experts"])

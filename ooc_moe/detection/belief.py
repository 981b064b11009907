"""A detector's prediction for frames (`Prediction`), and the game that each environment is believed to show over time (`Belief`).

A frame is weak evidence, and a wrong switch to another game costs a fetch of experts. So a belief is smoothed over frames, and changes only
when another game has become clearly more probable. Prefetching starts earlier, as soon as an environment is in doubt: when its newest frame
looks like another game than the believed one, or like no known game.

Letters: N frames or environments, G games, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ooc_moe_wire.errors import InvalidRequest

PREFETCH_PROBABILITY_MIN = 0.1
"""The lowest predicted probability of use at which an expert is worth a prefetch."""
UNKNOWN_WEIGHT = 0.25
"""The weight in a belief of a frame that looks like no known game. It is not 0, because known games also show screens never stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a detector predicts for N frames: the game that each shows, and the experts that will be used for it."""

    games: tuple[str, ...]
    """The known games: the columns of `probabilities_NG`."""
    probabilities_NG: Tensor
    """The probability of each game. Rows sum to 1, even for a frame that shows no known game."""
    unknown_N: Tensor
    """bool: True where the frame looks like none of the known games."""
    expert_probabilities_NE: Tensor
    """The probability that each expert is used for the frame. Rows do not sum to 1."""
    experts: list[int]
    """The experts to prefetch for the N frames, the most probable first: those that are probable enough for a frame of a known game."""

    @staticmethod
    def of(
        games: Sequence[str], probabilities_NG: Tensor, unknown_N: Tensor, expert_probabilities_NE: Tensor, *, prefetch_experts: int
    ) -> Prediction:
        """Makes a prediction from these probabilities, and chooses its `experts`: at most `prefetch_experts` of them.

        Args:
            games: the known games, one for each column of `probabilities_NG`.
            probabilities_NG: the probability that frame n shows game g.
            unknown_N: True where frame n looks like no known game. Such frames have no part in the choice of experts.
            expert_probabilities_NE: the probability that expert e is used for frame n.
            prefetch_experts: the most experts to choose.
        """
        return Prediction(
            games=tuple(games),
            probabilities_NG=probabilities_NG,
            unknown_N=unknown_N,
            expert_probabilities_NE=expert_probabilities_NE,
            experts=prefetch_set(expert_probabilities_NE[~unknown_N], prefetch_experts),
        )

    @property
    def expert_probabilities(self) -> dict[int, float]:
        """For each expert in `experts`, the highest probability that it has for any frame of a known game: expert -> probability."""
        if not self.experts:
            return {}
        best_E = self.expert_probabilities_NE[~self.unknown_N].amax(0)
        return dict(zip(self.experts, best_E[self.experts].tolist(), strict=True))

    @property
    def names(self) -> list[str]:
        """The name of each frame's most probable game, even where the frame looks like no known game."""
        return [self.games[game] for game in self.probabilities_NG.argmax(1).tolist()]

    @property
    def confidence_N(self) -> Tensor:
        """How sure the detector is of each frame: the probability of the frame's most probable game."""
        return self.probabilities_NG.amax(1)


def prefetch_set(expert_probabilities_NE: Tensor, prefetch_experts: int) -> list[int]:
    """Chooses the experts to prefetch: those that are probable enough for at least one of the N frames, the most probable first.

    Args:
        expert_probabilities_NE: the probability that expert e is used for frame n.
        prefetch_experts: the most experts to return.
    """
    if not len(expert_probabilities_NE):
        return []
    best_E, experts_E = expert_probabilities_NE.amax(0).sort(descending=True, stable=True)
    return experts_E[best_E >= PREFETCH_PROBABILITY_MIN][:prefetch_experts].tolist()


class Belief:
    """Follows, over time, which game each environment is believed to show. Each environment is judged by its own frames only.

    The belief about an environment is a smoothed probability of each game. After each prediction, it is
    smoothing * belief + (1 - smoothing) * prediction. Another game is believed once its smoothed probability is the highest and at
    least `switch_at`. With 0.7 for both arguments, that takes four frames in a row that certainly show the other game.

    Args:
        num_envs: the number of environments. Every prediction has one row for each.
        smoothing: the weight of the old belief when a prediction is added. It is higher for a frame of an unknown game (`UNKNOWN_WEIGHT`).
        switch_at: the smoothed probability at which another game is believed. 0: being the most probable is enough.
    """

    def __init__(self, num_envs: int, *, smoothing: float, switch_at: float) -> None:
        self._num_envs, self._smoothing, self._switch_at = num_envs, smoothing, switch_at
        self._belief_NG = torch.zeros(num_envs, 0)
        self._believed_N = torch.full((num_envs,), -1)

    @property
    def steps_to_switch(self) -> int:
        """How many further predictions it takes, after the first one of another game, until that game is believed.

        All these predictions are assumed to be certain of the other game.
        """
        switch_at = max(self._switch_at, 0.5)  # The more probable of two games has at least 0.5.
        return math.ceil(math.log(1 - switch_at) / math.log(self._smoothing)) - 1 if self._smoothing else 0

    def update(self, prediction: Prediction) -> tuple[list[str], list[bool]]:
        """Updates the beliefs with a prediction for one frame of each environment.

        An environment is in doubt when its frame's most probable game is not its believed game, or when the frame looks like no known
        game. The first prediction is believed at once, and leaves every environment in doubt.

        Returns:
            Two lists with a value for each environment: its believed game, and whether it is in doubt.

        Raises:
            InvalidRequest: the prediction does not have one row for each environment.
        """
        rows, num_games = prediction.probabilities_NG.shape
        if rows != self._num_envs:
            raise InvalidRequest(f"prediction: {rows} rows for {self._num_envs} environments")
        seen_NG = prediction.probabilities_NG
        first_N = self._believed_N < 0
        if first_N.any():
            self._belief_NG, self._believed_N = seen_NG.clone(), seen_NG.argmax(1)
        self._belief_NG = F.pad(self._belief_NG, (0, num_games - self._belief_NG.shape[1]))
        weight_N = (1 - self._smoothing) * torch.where(prediction.unknown_N, UNKNOWN_WEIGHT, 1.0)
        self._belief_NG = self._belief_NG.lerp(seen_NG, weight_N.unsqueeze(1))
        best = self._belief_NG.max(1)
        self._believed_N = torch.where(best.values >= self._switch_at, best.indices, self._believed_N)
        doubts_N = first_N | prediction.unknown_N | (seen_NG.argmax(1) != self._believed_N)
        return [prediction.games[game] for game in self._believed_N.tolist()], doubts_N.tolist()

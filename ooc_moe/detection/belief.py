"""What a detector says about frames (`Prediction`), and which game each environment is believed to show over time (`Belief`).

A frame is weak evidence and a wrong switch costs a fetch of experts, so a belief is smoothed and has hysteresis; prefetching starts
earlier, at the first doubt. Knows nothing of how predictions are made.

Letters: N frames or environments, G games, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ooc_moe_wire.errors import InvalidRequest

PREFETCH_PROBABILITY_MIN = 0.1
"""An expert less probable than this is not worth a fetch."""
UNKNOWN_WEIGHT = 0.25
"""What a frame that looks like no known game counts for. Not nothing: a known game shows screens that no one stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a detector says about N frames."""

    games: tuple[str, ...]
    """The games known: the columns of `probabilities_NG`."""
    probabilities_NG: Tensor
    """Of each game; rows sum to 1, also where the frame shows none of them."""
    unknown_N: Tensor
    """bool: the frame looks like none of the games."""
    expert_probabilities_NE: Tensor
    """Of each expert being used for the frame; not a distribution."""
    experts: list[int]
    """What to prefetch for the batch: the experts that any of its frames of a known game makes probable, the most probable first."""

    @property
    def expert_probabilities(self) -> dict[int, float]:
        """Of each of `experts`: its probability in the frame that makes it most probable."""
        if not self.experts:
            return {}
        best_E = self.expert_probabilities_NE[~self.unknown_N].amax(0)
        return dict(zip(self.experts, best_E[self.experts].tolist(), strict=True))

    @property
    def names(self) -> list[str]:
        """The most probable game of each frame, known or not."""
        return [self.games[game] for game in self.probabilities_NG.argmax(1).tolist()]

    @property
    def confidence_N(self) -> Tensor:
        """The probability of the most probable game."""
        return self.probabilities_NG.amax(1)


def prefetch_set(expert_probabilities_NE: Tensor, prefetch_experts: int) -> list[int]:
    """The experts, at most `prefetch_experts`, that some frame makes probable enough to be worth a fetch; the most probable first."""
    if not len(expert_probabilities_NE):
        return []
    best_E, experts_E = expert_probabilities_NE.amax(0).sort(descending=True, stable=True)
    return experts_E[best_E >= PREFETCH_PROBABILITY_MIN][:prefetch_experts].tolist()


class Belief:
    """The game that each environment is believed to show; each by its own frames, never by its neighbours'.

    Args:
        num_envs: environments; every prediction has a row for each.
        smoothing: how much of the belief a prediction leaves; 0: nothing. An unknown game's leaves more (`UNKNOWN_WEIGHT`).
        switch_at: the smoothed probability that another game needs to be believed instead; 0: being the most probable is enough. 0.7 of
            both are four certain frames in a row.
    """

    def __init__(self, num_envs: int, *, smoothing: float, switch_at: float) -> None:
        self._num_envs, self._smoothing, self._switch_at = num_envs, smoothing, switch_at
        self._belief_NG = torch.zeros(num_envs, 0)
        self._believed_N = torch.full((num_envs,), -1)

    @property
    def steps_to_switch(self) -> int:
        """Predictions, each certain of another game, from the first doubt to the one that turns the belief."""
        switch_at = max(self._switch_at, 0.5)  # The most probable of two has as much.
        return math.ceil(math.log(1 - switch_at) / math.log(self._smoothing)) - 1 if self._smoothing else 0

    def update(self, prediction: Prediction) -> tuple[list[str], list[bool]]:
        """Takes in one prediction; gives the game believed and whether it is in doubt, for each environment.

        In doubt is who looks unlike the game believed until now, or unlike any; at first, everyone. The first prediction is believed at
        once, for want of a better.

        Raises:
            InvalidRequest: the prediction has another number of rows.
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

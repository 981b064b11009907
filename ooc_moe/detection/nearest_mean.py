"""`NearestClassMean`, the detector's baseline: it recognises a game by the mean of random features of its frames.

It has the same methods and results as `Detector`. The mean of one game is not changed by learning others, so this baseline cannot forget,
and a comparison shows what the detector forgets.

Letters: N frames, S stacked frames, H height, W width, G games, E experts, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ooc_moe.config.seeds import derived_seed, seeded
from ooc_moe.detection.belief import Prediction
from ooc_moe.detection.checks import check_knows_a_game, check_usage, index_of_game
from ooc_moe.detection.screens import UNKNOWN_RADIUS, ScreenFeatures, screens_of


class NearestClassMean:
    """Recognises the game of a frame: the one whose mean features are nearest to the frame's. It is the detector's baseline.

    The features are those of a convolutional network with random weights, which are never trained. The predicted probability of an expert
    is the share of the recognised game's frames for which it was used.

    Args:
        frame_stack: frames in an observation. Only the newest of them is used.
        frame_size: height and width of a frame.
        num_experts: number of experts of all banks together; `grow_experts` adds more.
        prefetch_experts: the most experts that a prediction names.
        detect_unknown: whether a prediction may mark a frame as showing no known game, because it is far from every game's mean.
        seed: decides the random weights of the features.
    """

    def __init__(
        self, *, frame_stack: int, frame_size: int, num_experts: int, prefetch_experts: int, detect_unknown: bool, seed: int
    ) -> None:
        self._frame_shape = (frame_stack, frame_size, frame_size)
        self._prefetch_experts, self._detect_unknown = prefetch_experts, detect_unknown
        with seeded(derived_seed(seed, "random features")):
            self._features = ScreenFeatures().requires_grad_(False)
        self._games: list[str] = []
        self._counts_G = torch.zeros(0)
        self._sums_GD = torch.zeros(0, ScreenFeatures.DIM)
        self._squares_GD = torch.zeros(0, ScreenFeatures.DIM)
        self._uses_GE = torch.zeros(0, num_experts)

    @property
    def games(self) -> tuple[str, ...]:
        """The known games, in the order in which they were added."""
        return tuple(self._games)

    @property
    def num_experts(self) -> int:
        """The number of experts for which a prediction has a probability."""
        return self._uses_GE.shape[1]

    def add_game(self, name: str) -> None:
        """Adds a game to those that can be recognised. Adding a known game changes nothing."""
        if name not in self._games:
            self._games.append(name)
            self._counts_G = F.pad(self._counts_G, (0, 1))
            self._sums_GD, self._squares_GD, self._uses_GE = (
                F.pad(x, (0, 0, 0, 1)) for x in (self._sums_GD, self._squares_GD, self._uses_GE)
            )

    def grow_experts(self, num_experts: int) -> None:
        """Adds new experts until predictions cover `num_experts`. If they cover as many already, nothing changes."""
        self._uses_GE = F.pad(self._uses_GE, (0, max(0, num_experts - self.num_experts)))

    def learn(self, frames_NSHW: Tensor, game: str, expert_usage_E: Tensor) -> dict[str, float]:
        """Adds the features of these uint8 frames (N, S, H, W) to the mean of `game`, and the uses of experts to the game's counts.

        Args:
            frames_NSHW: frames of one game.
            game: the name of a game that was added before.
            expert_usage_E: how often each expert was used for these frames, summed over the layers.

        Returns:
            `accuracy` (share of right games) and `confidence` (mean probability of the most probable game) on these frames before they
            were added.

        Raises:
            InvalidRequest: the game is unknown, or frames or usage have another shape.
        """
        index = index_of_game(game, self._games)
        check_usage(expert_usage_E, self.num_experts)
        before = self.predict(frames_NSHW)
        features_ND = self._features(screens_of(frames_NSHW, self._frame_shape))
        self._counts_G[index] += len(features_ND)
        self._sums_GD[index] += features_ND.sum(0)
        self._squares_GD[index] += features_ND.square().sum(0)
        self._uses_GE[index] += expert_usage_E
        right_N = before.probabilities_NG.argmax(1) == index
        return {"accuracy": float(right_N.float().mean()), "confidence": float(before.confidence_N.mean())}

    def predict(self, frames_NSHW: Tensor) -> Prediction:
        """Predicts the game and the experts of each of these uint8 frames (N, S, H, W).

        The probabilities assume that the features of each game are normally distributed around the game's mean, with the same variance for
        all games. A game of which no frame was learned is never predicted, unless no frame of any game was learned yet.

        Raises:
            InvalidRequest: the frames have another shape or dtype, or no game was added yet.
        """
        check_knows_a_game(self._games)
        features_ND = self._features(screens_of(frames_NSHW, self._frame_shape))
        counts_G1 = self._counts_G.clamp(min=1).unsqueeze(1)
        means_GD = self._sums_GD / counts_G1
        spread_G = (self._squares_GD / counts_G1 - means_GD.square()).sum(1).clamp(min=1e-8)
        squared_NG = torch.cdist(features_ND, means_GD).square()
        seen_G = self._counts_G > 0
        logits_NG = torch.where(seen_G, -squared_NG / (2 * spread_G[seen_G].mean()), -1e4)
        probabilities_NG = logits_NG.softmax(1)
        uses_NE = probabilities_NG @ (self._uses_GE / counts_G1).clamp(max=1.0)
        limit_G = torch.where(seen_G, UNKNOWN_RADIUS**2 * spread_G, 0.0)
        unknown_N = (squared_NG > limit_G).all(1) & self._detect_unknown
        return Prediction.of(self._games, probabilities_NG, unknown_N, uses_NE, prefetch_experts=self._prefetch_experts)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: the games' names, and the counts and sums from which each game's mean is computed.

        The weights of the random features are left out, because the seed decides them. `torch.load` can read the state with
        weights_only=True.
        """
        return {
            "games": list(self._games),
            "counts": self._counts_G.clone(),
            "sums": self._sums_GD.clone(),
            "squares": self._squares_GD.clone(),
            "uses": self._uses_GE.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, in an object that was made with the same seed."""
        self._games = list(state["games"])
        self._counts_G, self._sums_GD = state["counts"].clone(), state["sums"].clone()
        self._squares_GD, self._uses_GE = state["squares"].clone(), state["uses"].clone()

"""Measures how well a game is recognised while it is played: by the detector, by its baseline, and by the belief that the agent acts on.

Letters: N environments, G games.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from ooc_moe.detection.belief import Prediction

AMBIGUOUS = 0.5
"""The confusion (see `ambiguous_pairs`) above which a pair of games is called ambiguous."""


class Recognition:
    """Counts, while one game is played in `num_envs` environments, in how many frames it is recognised.

    The predictions of the detector and of its baseline are counted on every frame, whichever of the two the agent acts on. Call `add` after
    each step, and `fields` at the end.
    """

    def __init__(self, game: str, num_envs: int) -> None:
        self._game = game
        self._believed_TN: list[list[str]] = []
        self._right: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._probability: dict[str, float] = {}
        self._num_envs = num_envs

    def add(self, by_detector: Prediction, by_mean: Prediction, believed: list[str]) -> None:
        """Counts the predictions for one frame of each environment.

        Args:
            by_detector: the detector's prediction.
            by_mean: the prediction of the nearest-mean baseline.
            believed: for each environment, the game that the agent believes it to show, and with whose experts it acts.
        """
        for name, prediction in (("detector", by_detector), ("nearest_mean", by_mean)):
            self._right[name] += prediction.names.count(self._game)
            self._unknown[name] += int(prediction.unknown_N.sum())
        for game, total in zip(by_detector.games, by_detector.probabilities_NG.sum(0).tolist(), strict=True):
            self._probability[game] = self._probability.get(game, 0.0) + total
        self._believed_TN.append(believed)

    def fields(self) -> dict[str, Any]:
        """The measures of recognition so far, as values for JSON. Measures that need a game that the agent knows may be None.

        - believed: for each game, the share of the frames in which the agent believed that the environment shows it.
        - detector_accuracy, nearest_mean_accuracy: the share of the frames whose most probable game is the right one.
        - unknown, nearest_mean_unknown: the share of the frames that look like no known game to the detector, and to the baseline.
        - probabilities: for each game, the mean probability that the detector gave it (see `ambiguous_pairs`).
        - steps_to_detect_by_env: for each environment, the steps before the agent first believed the right game; None where it never did.
        - steps_to_detect: the mean of these numbers, without those that are None. For the first game of an evaluation these two measures of
          steps mean little, because no other game was played before.
        - false_switches: how often a belief changed from the right game to another one, per 1000 frames.
        """
        frames = len(self._believed_TN) * self._num_envs
        known = self._game in self._probability
        believed = Counter(game for row in self._believed_TN for game in row)
        by_env = [list(env) for env in zip(*self._believed_TN, strict=True)]
        firsts = [env.index(self._game) if self._game in env else None for env in by_env]
        found = [first for first in firsts if first is not None]
        false_switches = sum(before == self._game != after for env in by_env for before, after in pairwise(env))
        return {
            "believed": {game: count / frames for game, count in believed.items()},
            "detector_accuracy": self._right["detector"] / frames if known else None,
            "nearest_mean_accuracy": self._right["nearest_mean"] / frames if known else None,
            "unknown": self._unknown["detector"] / frames,
            "nearest_mean_unknown": self._unknown["nearest_mean"] / frames,
            "probabilities": {game: total / frames for game, total in self._probability.items()},
            "steps_to_detect": float(np.mean(found)) if found else None,
            "steps_to_detect_by_env": firsts if known else None,
            "false_switches": 1000 * false_switches / frames if known else None,
        }


def ambiguous_pairs(probabilities: Mapping[str, Mapping[str, float]], *, above: float = AMBIGUOUS) -> list[tuple[str, str, float]]:
    """The pairs of games that the detector confuses: (one game, the other game, their confusion).

    The confusion of games A and B is the mean probability of B while A is played plus the mean probability of A while B is played. It is 0
    for games that are told apart with certainty. For two games that look the same it is 1, however the detector splits the probability
    between them, as long as no third game gets any.

    Args:
        probabilities: for each game played, the mean probability that the detector gave each game, as in `Recognition.fields`.
        above: only pairs with a higher confusion than this are returned.
    """
    pairs = []
    for one, other in combinations(probabilities, 2):
        confusion = probabilities[one].get(other, 0.0) + probabilities[other].get(one, 0.0)
        if confusion > above:
            pairs.append((one, other, confusion))
    return pairs

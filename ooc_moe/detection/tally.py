"""How well games are recognised while they are played: what evaluation logs of the detector, of its baseline and of the belief acted by.

Knows nothing of agents or caches.

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
"""A pair of games whose confusion is above is called ambiguous."""


class Recognition:
    """Counts over the frames of one game that is played in `num_envs` environments; whoever acts, all are asked about the same frames."""

    def __init__(self, game: str, num_envs: int) -> None:
        self._game = game
        self._believed_TN: list[list[str]] = []
        self._right: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._probability: dict[str, float] = {}
        self._num_envs = num_envs

    def add(self, by_detector: Prediction, by_mean: Prediction, believed: list[str]) -> None:
        """Takes in what was said of one frame of each environment, and which game each acts as."""
        for name, prediction in (("detector", by_detector), ("nearest_mean", by_mean)):
            self._right[name] += prediction.names.count(self._game)
            self._unknown[name] += int(prediction.unknown_N.sum())
        for game, total in zip(by_detector.games, by_detector.probabilities_NG.sum(0).tolist(), strict=True):
            self._probability[game] = self._probability.get(game, 0.0) + total
        self._believed_TN.append(believed)

    def fields(self) -> dict[str, Any]:
        """As JSON; measures that need a right answer are None where the game is not among those known.

        - believed: share of the frames that were acted on as each game.
        - detector_accuracy, nearest_mean_accuracy: share of the frames whose most probable game is the right one.
        - unknown, nearest_mean_unknown: share of the frames that look like no known game.
        - probabilities: mean probability of each game, by the detector (see `ambiguous_pairs`).
        - steps_to_detect_by_env: steps of each environment before it first acted as the right game, None where it never did;
          steps_to_detect: the mean of those that did. The first game of an evaluation takes no other's place: its steps say little.
        - false_switches: beliefs that turned away from the right game, per 1000 frames.
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
    """Pairs of games that are not told apart, with their confusion: the mean probability of each while the other is played, added up.

    It is 0 for games that are told apart with certainty. For two that look the same it is 1, whatever the detector says, as long as no
    third game comes into question: what it gives to one of them it takes from the other.

    Args:
        probabilities: game played -> game -> mean probability, as `Recognition.fields` has it.
        above: the least confusion that is reported.
    """
    pairs = []
    for one, other in combinations(probabilities, 2):
        confusion = probabilities[one].get(other, 0.0) + probabilities[other].get(one, 0.0)
        if confusion > above:
            pairs.append((one, other, confusion))
    return pairs

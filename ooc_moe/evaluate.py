"""Plays games without telling the agent which: each environment acts with the experts of the game that its own frames look like.

A score is the mean raw return of the first episode of each environment, or of its first `eval_steps` steps where it lasts longer
(`episodes_truncated` counts these); the random baseline plays the same protocol. Games follow one another as a stream: beliefs are carried
over, so that the first steps of a game are played with the pool of the one before, until the detector notices. Knows nothing of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_moe.detector import Belief
from ooc_moe.envs import GameEnvs
from ooc_moe.session import Session


@dataclass(slots=True)
class Score:
    """What one game's evaluation found; `fields` goes to metrics.jsonl."""

    evaluated: str
    returns: list[float]
    episodes_truncated: int
    believed: Counter[str] = field(default_factory=Counter)
    steps_to_detect: float | None = None
    usage: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def return_mean(self) -> float:
        """Mean raw return over the environments."""
        return float(np.mean(self.returns))

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        steps = sum(self.believed.values())
        return {
            "evaluated": self.evaluated,
            "returns": self.returns,
            "return_mean": self.return_mean,
            "episodes_truncated": self.episodes_truncated,
            "believed": {game: count / steps for game, count in self.believed.items()},
            "steps_to_detect": self.steps_to_detect,
            "usage": self.usage,
        }


class _Episodes:
    """The first episode of each environment: raw returns, and who still plays."""

    def __init__(self, num_envs: int) -> None:
        self.returns_N = np.zeros(num_envs)
        self.playing_N = np.ones(num_envs, dtype=bool)

    def add(self, rewards_N: np.ndarray[Any, Any], ended_N: np.ndarray[Any, Any]) -> None:
        self.returns_N += np.where(self.playing_N, rewards_N, 0.0)
        self.playing_N &= ~ended_N


def random_score(envs: GameEnvs, *, steps: int, seed: int) -> Score:
    """Plays uniformly random actions out of all 18."""
    rng = np.random.default_rng(seed)
    return _play(envs, lambda frames, starts: rng.integers(0, envs.num_actions, envs.num_envs), steps=steps, seed=seed)


class Evaluator:
    """A stream of games played task-agnostically, beliefs carried from one to the next."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._belief = Belief(session.config.eval_envs)

    @torch.no_grad()
    def play(self, envs: GameEnvs, *, steps: int, seed: int) -> Score:
        """Plays one game; the agent is told neither its name nor that it changed."""
        self._session.agent.eval()
        player = _BelievingPlayer(self._session, self._belief, torch.Generator().manual_seed(seed))
        score = _play(envs, player, steps=steps, seed=seed)
        score.believed = player.believed
        score.steps_to_detect = player.steps_to_detect(envs.game)
        score.usage = player.usage()
        self._session.agent.train()
        return score


class _BelievingPlayer:
    """Chooses actions; pools change only when a segment begins, prefetching starts at the first doubt."""

    def __init__(self, session: Session, belief: Belief, generator: torch.Generator) -> None:
        self._session, self._belief, self._generator = session, belief, generator
        self._step = 0
        self._history: list[list[str]] = []
        self._counts = torch.zeros(session.config.agent.num_layers, session.caches[0].num_experts, dtype=torch.long)
        self.believed: Counter[str] = Counter()

    def __call__(self, frames_NSHW: Tensor, starts_N: Tensor) -> np.ndarray[Any, Any]:
        session = self._session
        prediction = session.detector.predict(frames_NSHW)
        games, doubts = self._belief.update(prediction)
        if session.config.prefetch == "detector" and any(doubts):
            session.prefetch(prediction.experts)
        if self._step % session.config.agent.context == 0:
            self._begin_segment(games)
        actions_N = torch.zeros(len(frames_NSHW), dtype=torch.long)
        for segment, rows in self._segments:
            acted = session.agent.act(frames_NSHW[rows], segment, starts_N=starts_N[rows], generator=self._generator)
            actions_N[rows] = acted.actions_N.cpu()
            for layer, experts in enumerate(acted.experts_NLK.cpu().unbind(1)):
                self._counts[layer] += torch.bincount(experts.flatten().long(), minlength=self._counts.shape[1])
        self.believed.update(self._acting_as)
        self._history.append(self._acting_as)
        self._step += 1
        return actions_N.numpy()

    def _begin_segment(self, games: list[str]) -> None:
        """Groups the environments by what they are believed to be."""
        self._acting_as = games
        self._segments = []
        for game in sorted(set(games)):
            rows = torch.tensor([row for row, believed in enumerate(games) if believed == game])
            self._segments.append((self._session.agent.segment(game, len(rows)), rows))

    def steps_to_detect(self, game: str) -> float | None:
        """Mean over environments of the steps played before the right pool was in use; None where it never was."""
        firsts = [next((t for t, acting in enumerate(env) if acting == game), None) for env in zip(*self._history, strict=True)]
        found = [first for first in firsts if first is not None]
        return float(np.mean(found)) if found else None

    def usage(self) -> dict[str, dict[str, int]]:
        """Tokens of each expert in each layer, those without tokens left out."""
        return {
            str(layer): {str(expert): int(counts[expert]) for expert in counts.nonzero().flatten().tolist()}
            for layer, counts in enumerate(self._counts)
        }


def _play(envs: GameEnvs, choose: Callable[[Tensor, Tensor], np.ndarray[Any, Any]], *, steps: int, seed: int) -> Score:
    """Plays the first episode of each environment, at most `steps` steps."""
    frames_NSHW = torch.from_numpy(envs.reset(seed))
    starts_N = torch.ones(envs.num_envs, dtype=torch.bool)
    episodes = _Episodes(envs.num_envs)
    for _ in range(steps):
        step = envs.step(choose(frames_NSHW, starts_N))
        episodes.add(step.rewards, ~step.played)  # The step after an end resets.
        frames_NSHW, starts_N = torch.from_numpy(step.observations), torch.from_numpy(~step.played)
        if not episodes.playing_N.any():
            break
    return Score(evaluated=envs.game, returns=episodes.returns_N.tolist(), episodes_truncated=int(episodes.playing_N.sum()))

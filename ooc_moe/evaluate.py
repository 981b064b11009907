"""Plays games without telling the agent which: each environment acts with the experts of the game that its own frames look like.

A score is the mean raw return of the first episode of each environment, or of its first `eval_steps` steps where it lasts longer
(`episodes_truncated` counts these); the random baseline plays the same protocol. Games follow one another as a stream: beliefs are carried
over, so that the first steps of a game are played with the pool of the one before, until the detector notices. Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ooc_moe import checkpoint
from ooc_moe.detector import Belief
from ooc_moe.envs import GameEnvs
from ooc_moe.lookahead import foretell_acting
from ooc_moe.run_config import RunConfig
from ooc_moe.seeds import derived_seed
from ooc_moe.session import Session, check_device, open_session, open_store
from ooc_moe_client.store import ExpertStore


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


class Evaluator:
    """Evaluates a session, as often as asked. Environments and random scores are made once a game: both are slow to make."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._envs: dict[str, GameEnvs] = {}
        self._random: dict[str, Score] = {}

    def evaluate(self, games: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Plays `games` one after another; after each, yields what goes to metrics.jsonl: the score, random play's, the cache's counters.

        The agent is told neither the games' names nor when they change.
        """
        session, config = self._session, self._session.config
        belief = Belief(config.eval_envs)
        session.agent.eval()
        for game in games:
            game_envs, seed = self._envs_of(game), derived_seed(config.seed, "evaluation", game) % 2**31
            session.mark_game(game, evaluating=True)
            before = session.cache_stats()
            player = _BelievingPlayer(session, belief, torch.Generator().manual_seed(seed))
            score = _play(game_envs, player, steps=config.eval_steps, seed=seed)
            score.believed = player.believed
            score.steps_to_detect = player.steps_to_detect(game)
            score.usage = player.usage()
            cache = (session.cache_stats() - before).to_dict()
            yield score.fields() | {"random_mean": self._random_score(game, seed).return_mean, "cache": cache}
        session.agent.train()

    def _envs_of(self, game: str) -> GameEnvs:
        if game not in self._envs:
            self._envs[game] = self._session.make_envs(game, self._session.config.eval_envs)
        return self._envs[game]

    def _random_score(self, game: str, seed: int) -> Score:
        """Uniformly random actions out of all 18, under the same protocol."""
        if game not in self._random:
            game_envs, rng = self._envs_of(game), np.random.default_rng(seed)

            def choose(frames: Tensor, starts: Tensor) -> np.ndarray[Any, Any]:
                return rng.integers(0, game_envs.num_actions, game_envs.num_envs)

            self._random[game] = _play(game_envs, choose, steps=self._session.config.eval_steps, seed=seed)
        return self._random[game]


def evaluate_run(
    run_dir: Path,
    console: Console,
    *,
    store: str | None = None,
    plane: str | None = None,
    eval_envs: int | None = None,
    eval_steps: int | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a run as its last checkpoint has it, on a fork of its banks, which a trainer may be writing meanwhile.

    Raises:
        InvalidRequest: there is no run, or no checkpoint of it.
    """
    config = RunConfig.read(run_dir)
    config = dataclasses.replace(
        config,
        store=store or config.store,
        plane=plane or config.plane,
        eval_envs=eval_envs or config.eval_envs,
        eval_steps=eval_steps or config.eval_steps,
    )
    check_device(config.device)
    saved = checkpoint.load(run_dir / checkpoint.DIRECTORY / checkpoint.LATEST)
    found = []
    with (
        open_store(config) as opened,
        _forked_banks(config, opened, saved.snapshot_id) as banks,
        open_session(config, opened, banks) as session,
    ):
        session.agent.load_state_dict(saved.state["agent"])
        session.detector.load_state_dict(saved.state["detector"])
        for fields in Evaluator(session).evaluate(session.agent.games):
            found.append(fields)
            console.print(_in_words(fields), highlight=False)
    return found


@contextmanager
def _forked_banks(config: RunConfig, store: ExpertStore, snapshot_id: int) -> Iterator[list[str]]:
    """Forks the run's banks from the checkpoint's snapshot, without copying bytes, and deletes the forks afterwards."""
    forks: list[str] = []
    try:
        for bank in config.agent.bank_names(config.name):
            forks.append(store.fork_bank(bank, f"{bank}/eval-{uuid.uuid4().hex[:8]}", snapshot_id=snapshot_id).spec.name)
        yield forks
    finally:
        for fork in forks:
            store.delete_bank(fork)


def _in_words(fields: dict[str, Any]) -> str:
    believed = max(fields["believed"], key=fields["believed"].__getitem__)
    return (
        f"{fields['evaluated']}: mean return {fields['return_mean']:.1f} (random {fields['random_mean']:.1f}) over "
        f"{len(fields['returns'])} episodes, {fields['episodes_truncated']} of them cut at the step limit; "
        f"taken for {believed} in {fields['believed'][believed]:.0%} of the steps"
    )


class _BelievingPlayer:
    """Chooses actions; pools change only when a segment begins, prefetching starts at the first doubt."""

    def __init__(self, session: Session, belief: Belief, generator: torch.Generator) -> None:
        self._session, self._belief, self._generator = session, belief, generator
        self._step, self._began = 0, time.monotonic()
        self._history: list[list[str]] = []
        self._counts = torch.zeros(session.config.agent.num_layers, session.caches[0].num_experts, dtype=torch.long)
        self.believed: Counter[str] = Counter()

    def __call__(self, frames_NSHW: Tensor, starts_N: Tensor) -> np.ndarray[Any, Any]:
        session = self._session
        prediction = session.detector.predict(frames_NSHW)
        games, doubts = self._belief.update(prediction)
        if session.config.prefetch == "detector" and any(doubts):
            session.prefetch(prediction.experts, within_s=self._next_segment_s(), probabilities=prediction.expert_probabilities)
        if self._step % session.config.agent.context == 0:
            self._begin_segment(games)
        actions_N = torch.zeros(len(frames_NSHW), dtype=torch.long)
        routed: list[Tensor] = []
        for segment, rows in self._segments:
            acted = session.agent.act(frames_NSHW[rows], segment, starts_N=starts_N[rows], generator=self._generator)
            actions_N[rows] = acted.actions_N.cpu()
            routed.append(acted.experts_NLK.cpu())
            for layer, experts in enumerate(routed[-1].unbind(1)):
                self._counts[layer] += torch.bincount(experts.flatten().long(), minlength=self._counts.shape[1])
        foretell_acting(session.agent.caches, routed, ahead=session.config.prefetch != "off")
        self.believed.update(self._acting_as)
        self._history.append(self._acting_as)
        self._step += 1
        return actions_N.numpy()

    def _next_segment_s(self) -> float:
        """When the next segment begins, and with it perhaps another pool, at the pace so far."""
        context = self._session.config.agent.context
        steps_left = -self._step % context
        return steps_left * (time.monotonic() - self._began) / max(1, self._step)

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

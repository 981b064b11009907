"""Plays one game without being told which: each environment acts with the experts of the game that its own frames look like.

Pools change only where a segment begins. All environments begin one every `context` steps; an environment whose game is believed to have
changed begins one at once. Prefetching starts earlier, at the first doubt. Knows nothing of scores or of training.

Letters: N environments, M frames, S stacked frames, H height, W width, L layers, K top_k, E experts.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ooc_moe.agent.segment import Segment
from ooc_moe.detection.belief import Belief, Prediction
from ooc_moe.detection.tally import Recognition
from ooc_moe.envs.game import Array
from ooc_moe.learning.lookahead import foretell_acting
from ooc_moe.session.session import Session

SAMPLED_FRAMES = 512
"""At most about so many frames of a game are kept to look at afterwards."""
Usage = dict[str, dict[str, int]]
"""Layer -> expert -> tokens, those without tokens left out; keys are text, as JSON has them."""


class Player:
    """Chooses actions in the environments of `game`, and counts what that took.

    Args:
        session: its configuration's `recognise` says who is asked for the game: the detector, nearest class mean, or nobody (oracle).
        belief: carried over from the game before.
        game: the truth. It is counted against, and acted by only where `recognise` is "oracle" and the agent knows the game.
        generator: draws the actions.
    """

    def __init__(self, session: Session, belief: Belief, game: str, generator: torch.Generator) -> None:
        self._session, self._belief, self._game, self._generator = session, belief, game, generator
        num_envs, agent = session.config.eval_envs, session.config.agent
        self._step, self._began = 0, time.monotonic()
        self._groups: list[tuple[Segment, list[int]]] = []
        """Segments under way, and the environments that play each."""
        self._acting_as: list[str] = []
        self._frames: list[Tensor] = []
        self._frames_every = max(1, num_envs * session.config.eval_steps // SAMPLED_FRAMES)
        self._tokens_NLE = torch.zeros(num_envs, agent.num_layers, session.caches[0].num_experts, dtype=torch.long)
        self._named: set[int] = set()
        self._needed: dict[int, bool] = {}
        """Experts that acting as the true game used; whether a prefetch had named each before."""
        self.recognition = Recognition(game, num_envs)

    def __call__(self, frames_NSHW: Tensor, starts_N: Tensor) -> Array:
        """Actions (N,) for frames (N, S, H, W), of which those that `starts_N` marks begin an episode."""
        session = self._session
        if self._step % self._frames_every == 0:
            self._frames.append(frames_NSHW)
        games = self._recognise(frames_NSHW)
        self._begin_segments(games)
        actions_N = torch.zeros(len(frames_NSHW), dtype=torch.long)
        routed: list[Tensor] = []
        for segment, rows in self._groups:
            acted = session.agent.act(frames_NSHW[rows], segment, starts_N=starts_N[rows], generator=self._generator)
            actions_N[rows] = acted.actions_N.cpu()
            routed.append(acted.experts_NLK.cpu())
            self._count(routed[-1], segment.game, rows)
        foretell_acting(session.agent.caches, routed, ahead=session.config.prefetch != "off")
        self._step += 1
        return actions_N.numpy()

    def _recognise(self, frames_NSHW: Tensor) -> list[str]:
        """The game that each environment shall act as; prefetches for those in doubt."""
        session, recognise = self._session, self._session.config.recognise
        by_detector, by_mean = session.detector.predict(frames_NSHW), session.nearest_mean.predict(frames_NSHW)
        prediction = by_mean if recognise == "nearest-mean" else by_detector
        games, doubts = self._belief.update(prediction)
        if session.config.prefetch == "detector" and any(doubts):
            self._prefetch(prediction)
        if recognise == "oracle" and self._game in session.agent.games:
            games = [self._game] * len(games)
        self.recognition.add(by_detector, by_mean, games)
        return games

    def _prefetch(self, prediction: Prediction) -> None:
        """Brings what a switch would need; at the pace so far it may come as soon as the belief can turn."""
        step_s = (time.monotonic() - self._began) / self._step if self._step else None
        within_s = None if step_s is None else step_s * self._belief.steps_to_switch
        named = prediction.experts
        self._session.prefetch(named, within_s=within_s, probabilities=prediction.expert_probabilities, read_only=named)
        self._named.update(named)

    def _begin_segments(self, games: list[str]) -> None:
        """Regroups the environments whose segment begins, by what they are believed to be."""
        everyone = self._step % self._session.config.agent.context == 0
        begins = {row for row, game in enumerate(games) if everyone or game != self._acting_as[row]}
        if not begins:
            return
        staying = [(segment, [place for place, row in enumerate(rows) if row not in begins], rows) for segment, rows in self._groups]
        self._groups = [(segment.of_environments(places), [rows[place] for place in places]) for segment, places, rows in staying if places]
        for game in sorted({games[row] for row in begins}):
            rows = sorted(row for row in begins if games[row] == game)
            self._groups.append((self._session.agent.segment(game, len(rows)), rows))
        self._acting_as = games

    def _count(self, experts_NLK: Tensor, game: str, rows: list[int]) -> None:
        """Adds what these environments, acting as `game`, were routed to."""
        one_NLK = torch.ones_like(experts_NLK, dtype=torch.long)
        self._tokens_NLE[rows] += torch.zeros_like(self._tokens_NLE[rows]).scatter_add_(2, experts_NLK.long(), one_NLK)
        if game == self._game:
            for expert in self._session.usage_of(experts_NLK).nonzero().flatten().tolist():
                self._needed.setdefault(expert, expert in self._named)

    # What it took

    @property
    def prefetch_recall(self) -> float | None:
        """Of the experts that acting as the true game used, the share that prefetches had named before their first use.

        None where nothing is prefetched by what frames show, or the true game was never acted as.
        """
        if self._session.config.prefetch != "detector" or not self._needed:
            return None
        return sum(self._needed.values()) / len(self._needed)

    @property
    def frames_MSHW(self) -> Tensor:
        """A sample of what was on the screens, spread over the steps."""
        return torch.cat(self._frames)

    def usage(self) -> Usage:
        """Tokens of each expert in each layer."""
        return _as_usage(self._tokens_NLE.sum(0))

    def usage_by_env(self) -> list[Usage]:
        """The same for each environment."""
        return [_as_usage(tokens_LE) for tokens_LE in self._tokens_NLE]


def _as_usage(tokens_LE: Tensor) -> Usage:
    return {
        str(layer): {str(expert): int(tokens_E[expert]) for expert in tokens_E.nonzero().flatten().tolist()}
        for layer, tokens_E in enumerate(tokens_LE)
    }

"""Plays one game without being told which one: each environment acts with the experts of the game that it is believed to show.

An environment changes to another game's experts only where a segment begins. (A segment is a run of at most `context` steps, over which the
agent's attention looks back.) All environments begin a segment every `context` steps. An environment whose believed game changes begins a
segment at once. Prefetching starts earlier, as soon as an environment is in doubt.

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
from ooc_moe.learning.lookahead import schedule_acting
from ooc_moe.session.session import Session

SAMPLED_FRAMES = 512
"""About how many frames of a game the player keeps, at most, for measurements after the game."""
Usage = dict[str, dict[str, int]]
"""Layer -> expert -> number of tokens, without the experts that got none. The keys are text, as JSON has them."""


class Player:
    """Chooses the agent's actions in the environments of one game. It also counts what was recognised, routed and prefetched.

    Args:
        session: holds the agent and the detectors. `recognise` in its configuration says what decides the believed game: the detector,
            the nearest-mean baseline, or the true game (oracle).
        belief: the belief about each environment, carried over from the game that was played before.
        game: the name of the game that is played. It is used to count how often the belief is right. The agent is told it only where
            `recognise` is "oracle" and the agent knows the game.
        generator: draws the actions.
    """

    def __init__(self, session: Session, belief: Belief, game: str, generator: torch.Generator) -> None:
        self._session, self._belief, self._game, self._generator = session, belief, game, generator
        num_envs, agent = session.config.eval_envs, session.config.agent
        self._step, self._began = 0, time.monotonic()
        self._groups: list[tuple[Segment, list[int]]] = []
        """The segments that are being played, each with the numbers of the environments that play it."""
        self._acting_as: list[str] = []
        self._frames: list[Tensor] = []
        self._frames_every = max(1, num_envs * session.config.eval_steps // SAMPLED_FRAMES)
        self._tokens_NLE = torch.zeros(num_envs, agent.num_layers, session.caches[0].num_experts, dtype=torch.long)
        self._named: set[int] = set()
        self._needed: dict[int, bool] = {}
        """For each expert used while acting as the true game: whether a prefetch had named it before its first use."""
        self.recognition = Recognition(game, num_envs)

    def __call__(self, frames_NSHW: Tensor, starts_N: Tensor) -> Array:
        """Chooses an action for each environment, (N,), from the frames (N, S, H, W) of one step. Call it once for each step.

        `starts_N` is True where a frame begins an episode.
        """
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
        schedule_acting(session.agent.caches, routed, ahead=session.config.prefetch != "off")
        self._step += 1
        return actions_N.numpy()

    def _recognise(self, frames_NSHW: Tensor) -> list[str]:
        """Decides with which game's experts each environment acts, and prefetches the predicted experts if an environment is in doubt."""
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
        """Asks for the predicted experts ahead of their use.

        The prefetch's deadline is the earliest time at which the belief can change to another game, at the pace of the steps so far.
        """
        step_s = (time.monotonic() - self._began) / self._step if self._step else None
        within_s = None if step_s is None else step_s * self._belief.steps_to_switch
        named = prediction.experts
        self._session.prefetch(named, within_s=within_s, probabilities=prediction.expert_probabilities, read_only=named)
        self._named.update(named)

    def _begin_segments(self, games: list[str]) -> None:
        """Begins new segments: in all environments after every `context` steps, otherwise only where the believed game has changed.

        Environments that begin one with the same game share a segment. `games` names, for each environment, the game with whose experts it
        acts.
        """
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
        """Adds the tokens of one step to the counts of the experts that got them.

        The environments `rows` act with the experts of `game`.
        """
        one_NLK = torch.ones_like(experts_NLK, dtype=torch.long)
        self._tokens_NLE[rows] += torch.zeros_like(self._tokens_NLE[rows]).scatter_add_(2, experts_NLK.long(), one_NLK)
        if game == self._game:
            for expert in self._session.usage_of(experts_NLK).nonzero().flatten().tolist():
                self._needed.setdefault(expert, expert in self._named)

    # Measurements

    @property
    def prefetch_recall(self) -> float | None:
        """The share of the needed experts that a prefetch had named before their first use.

        Needed experts are those used by environments while they acted with the experts of the game that is really played. None where the
        detector does not prefetch, or where no environment ever acted with that game's experts.
        """
        if self._session.config.prefetch != "detector" or not self._needed:
            return None
        return sum(self._needed.values()) / len(self._needed)

    @property
    def frames_MSHW(self) -> Tensor:
        """A sample of the frames that were played, (M, S, H, W), spread evenly over the steps."""
        return torch.cat(self._frames)

    def usage(self) -> Usage:
        """How many tokens were routed to each expert in each layer, over all environments."""
        return _as_usage(self._tokens_NLE.sum(0))

    def usage_by_env(self) -> list[Usage]:
        """How many tokens were routed to each expert in each layer, for each environment apart."""
        return [_as_usage(tokens_LE) for tokens_LE in self._tokens_NLE]


def _as_usage(tokens_LE: Tensor) -> Usage:
    return {
        str(layer): {str(expert): int(tokens_E[expert]) for expert in tokens_E.nonzero().flatten().tolist()}
        for layer, tokens_E in enumerate(tokens_LE)
    }

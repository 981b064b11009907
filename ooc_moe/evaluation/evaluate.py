"""Plays games without telling the agent which: each environment acts with the experts of the game that its own frames look like.

A score is the mean raw return of whole games (episodes.py); random play is measured by the same protocol. Games follow one another as a
stream: beliefs are carried over, so that the first steps of a game are played with the pool of the one before, until the detector notices.
player.py acts, recognition.py says what is logged about it. Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ooc_moe.config.run import Recogniser, RunConfig
from ooc_moe.config.seeds import evaluation_seed
from ooc_moe.detection.belief import Belief
from ooc_moe.display.progress import passing_bar
from ooc_moe.display.table import print_table
from ooc_moe.envs import GameEnvs
from ooc_moe.evaluation import baselines
from ooc_moe.evaluation.dormant import dormant_share
from ooc_moe.evaluation.episodes import Choose, Played, play, uniformly_random
from ooc_moe.evaluation.player import Player
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report import summary
from ooc_moe.session import checkpoint
from ooc_moe.session.session import Session, check_device, open_session, open_store
from ooc_moe_client.store import ExpertStore
from ooc_moe_wire.errors import InvalidRequest


class Evaluator:
    """Evaluates a session, as often as asked. Environments and random scores are made once a game: both are slow to make."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._envs: dict[str, GameEnvs] = {}
        self._random: dict[str, Played] = {}

    def evaluate(self, games: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Plays `games` one after another; after each, yields what goes to metrics.jsonl: the score, random play's, the cache's counters.

        The agent is told neither the games' names nor when they change. A game that it does not know is played as the known one that it is
        taken for; before the first is learned, none can be.
        """
        session = self._session
        if not session.agent.games:
            return
        config = session.config
        belief = Belief(config.eval_envs, smoothing=config.belief_smoothing, switch_at=config.belief_switch_at)
        session.agent.eval()
        for game in games:
            yield self._evaluate(game, belief)
        session.agent.train()

    def _evaluate(self, game: str, belief: Belief) -> dict[str, Any]:
        session, seed = self._session, evaluation_seed(self._session.config.seed, game)
        session.mark_game(game, evaluating=True)
        before = session.cache_stats()
        player = Player(session, belief, game, torch.Generator().manual_seed(seed))
        played = self._play(game, player, seed)
        fields = {
            "evaluated": game,
            "known": game in session.agent.games,
            "returns": played.returns,
            "return_mean": played.return_mean,
            "episodes_truncated": played.num_unfinished,
            "random_mean": self._random_play(game, seed).return_mean,
            **player.recognition.fields(),
            "prefetch_recall": player.prefetch_recall,
            "usage": player.usage(),
            "cache": (session.cache_stats() - before).to_dict(),
        }
        if fields["known"]:
            fields["dormant"] = dormant_share(session.agent, player.frames_MSHW, game)
        if session.config.agent.routing == "token" and set(session.config.games) <= set(session.agent.games):
            fields["usage_by_env"] = player.usage_by_env()  # What tells whether games separate by themselves, once all were learned.
        return fields

    def _random_play(self, game: str, seed: int) -> Played:
        if game not in self._random:
            self._random[game] = self._play(game, uniformly_random(self._envs_of(game), seed), seed)
        return self._random[game]

    def _play(self, game: str, choose: Choose, seed: int) -> Played:
        config = self._session.config
        return play(self._envs_of(game), choose, episodes=config.eval_episodes, steps=config.eval_steps, seed=seed)

    def _envs_of(self, game: str) -> GameEnvs:
        if game not in self._envs:
            self._envs[game] = self._session.make_envs(game, self._session.config.eval_envs)
        return self._envs[game]


def evaluate_run(
    run_dir: Path,
    console: Console,
    *,
    store: str | None = None,
    plane: str | None = None,
    eval_envs: int | None = None,
    eval_episodes: int | None = None,
    eval_steps: int | None = None,
    eval_unseen: bool = False,
    recognise: Recogniser | None = None,
    constants: bool = False,
) -> list[dict[str, Any]]:
    """Evaluates a run as its last checkpoint has it, on a fork of its banks, which a trainer may be writing meanwhile.

    With `constants`, constant actions are played too, by the same protocol, and kept beside the run, for its report.

    Raises:
        InvalidRequest: there is no run, no checkpoint of it, or nothing to play.
    """
    config = RunConfig.read(run_dir)
    wanted: dict[str, Any] = {
        "store": store,
        "plane": plane,
        "eval_envs": eval_envs,
        "eval_episodes": eval_episodes,
        "eval_steps": eval_steps,
        "recognise": recognise,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    config = dataclasses.replace(config, **given, eval_unseen=eval_unseen or config.eval_unseen)
    if not config.eval_steps:
        raise InvalidRequest("eval_steps: 0 plays nothing; give --eval-steps")
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
        session.nearest_mean.load_state_dict(saved.state["nearest_mean"])
        unseen = [game for game in config.games if config.eval_unseen and game not in session.agent.games]
        for fields in Evaluator(session).evaluate([*session.agent.games, *dict.fromkeys(unseen)]):
            found.append(fields)
            console.print(_in_words(fields), highlight=False)
        # What the caches hold; what they counted, the evaluations say themselves, without what dormant units were looked for with.
        cache = {name: value for name, value in session.cache_stats().to_dict().items() if name in ("capacity", "resident", "expert_bytes")}
        counters = {"cache": cache, "store": session.store_stats()}
    if constants:
        _play_constants([fields["evaluated"] for fields in found], config, console)
    for table in summary.evaluation_tables(_record(config, found, counters)):
        console.print()
        print_table(table, console)
    return found


def _play_constants(games: Sequence[str], config: RunConfig, console: Console) -> None:
    with passing_bar(console) as progress:
        bars = {game: progress.add_task(f"constant actions in {game}", total=None) for game in games}

        def show(game: str, done: int, of: int) -> None:
            progress.update(bars[game], completed=done, total=of)

        baselines.play_constants(games, config, config.run_dir / baselines.DIRECTORY, show)


def _record(config: RunConfig, found: Sequence[dict[str, Any]], counters: dict[str, Any]) -> RunRecord:
    """An evaluation as a run that did nothing else."""
    events = [{"event": "evaluation", "phase": 0, **fields} for fields in found]
    return RunRecord(run_dir=config.run_dir, config=json.loads(config.to_json()), events=[*events, {"event": "done", **counters}])


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
        f"{'' if fields['known'] else 'unseen, '}taken for {believed} in {fields['believed'][believed]:.0%} of the steps"
    )

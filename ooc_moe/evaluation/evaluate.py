"""Evaluates games without telling the agent which one is on the screen.

Each environment acts with the experts of the game that the detector recognises in its frames. The agent is not told when one game ends and
the next begins: each environment's belief is carried over, so the first steps of a game are played with the experts of the game before,
until the detector notices the change. A score is the mean raw return of whole episodes (episodes.py). player.py chooses the actions;
detection/tally.py counts how well games are recognised.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ooc_moe.config.run import RunConfig
from ooc_moe.config.seeds import evaluation_seed
from ooc_moe.detection.belief import Belief
from ooc_moe.display.formats import format_share
from ooc_moe.display.progress import passing_bar
from ooc_moe.display.table import print_table
from ooc_moe.envs import GameEnvs
from ooc_moe.evaluation.baselines import play_constants
from ooc_moe.evaluation.dormant import dormant_share
from ooc_moe.evaluation.episodes import Choose, Played, play, uniformly_random
from ooc_moe.evaluation.player import Player
from ooc_moe.metrics.baselines import DIRECTORY
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report import summary
from ooc_moe.session.load import open_checkpoint
from ooc_moe.session.session import Session
from ooc_moe_wire.errors import InvalidRequest


class Evaluator:
    """Evaluates the agent of a session: lets it play games without telling it their names, and measures its scores.

    Environments and the scores of random play are kept from one call to the next, because both take long to make.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._envs: dict[str, GameEnvs] = {}
        self._random: dict[str, Played] = {}

    def evaluate(self, games: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Plays `games` one after another. After each, yields the game's results: the fields of its "evaluation" event in metrics.jsonl.

        The fields hold the score, the score of random play, how well the game was recognised, and the caches' counters. The agent is told
        neither the games' names nor when they change. A game that it has not learned is played with the experts of the known game that
        the detector takes it for. While the agent knows no game, nothing is played and nothing is yielded.
        """
        session = self._session
        if not session.agent.games:
            return
        config = session.config
        belief = session.new_belief(config.eval_envs)
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
            # Shows, once all games were learned, whether they use different experts without being told to.
            fields["usage_by_env"] = player.usage_by_env()
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
    constants: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Evaluates a run at its last checkpoint and prints the results. A trainer may continue the run meanwhile.

    Args:
        run_dir: the run's directory.
        console: where the results are printed.
        constants: also measure the constant actions in the same way. `ooc-moe report` then shows the best of them.
        options: values that replace the run's own fields of `RunConfig`, for example `eval_envs` or `store`. None keeps the run's value.

    Returns:
        The results of each game: the fields that `Evaluator.evaluate` yields.

    Raises:
        InvalidRequest: there is no run, it has no checkpoint, or `eval_steps` is 0.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    config = dataclasses.replace(RunConfig.read(run_dir), **changes)
    if not config.eval_steps:
        raise InvalidRequest("eval_steps: 0 plays nothing; give --eval-steps")
    with open_checkpoint(config) as session:
        found, counters = _evaluate_all(session, console)
    if constants:
        _play_constants([fields["evaluated"] for fields in found], config, console)
    for table in summary.evaluation_tables(_record(config, found, counters)):
        console.print()
        print_table(table, console)
    return found


def _evaluate_all(session: Session, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluates all games that the agent knows, and prints a sentence for each. With `eval_unseen`, the run's other games follow.

    Returns:
        The results of each game; and the sizes of the caches together with the store's counters.
    """
    config, known = session.config, session.agent.games
    unseen = [game for game in config.games if config.eval_unseen and game not in known]
    found = []
    for fields in Evaluator(session).evaluate([*known, *dict.fromkeys(unseen)]):
        found.append(fields)
        console.print(_sentence(fields), highlight=False)
    # Only what the caches hold. Their counters are in each game's fields, where the search for dormant units is left out.
    cache = {name: value for name, value in session.cache_stats().to_dict().items() if name in ("capacity", "resident", "expert_bytes")}
    return found, {"cache": cache, "store": session.store_stats()}


def _play_constants(games: Sequence[str], config: RunConfig, console: Console) -> None:
    with passing_bar(console) as progress:
        bars = {game: progress.add_task(f"constant actions in {game}", total=None) for game in games}

        def show(game: str, done: int, of: int) -> None:
            progress.update(bars[game], completed=done, total=of)

        play_constants(games, config, config.run_dir / DIRECTORY, show)


def _record(config: RunConfig, found: Sequence[dict[str, Any]], counters: dict[str, Any]) -> RunRecord:
    """Makes a record that holds this evaluation alone, so that the report's tables, which take a run's record, can show it."""
    events = [{"event": "evaluation", "phase": 0, **fields} for fields in found]
    return RunRecord(run_dir=config.run_dir, config=json.loads(config.to_json()), events=[*events, {"event": "done", **counters}])


def _sentence(fields: dict[str, Any]) -> str:
    """One game's result in one sentence, for the terminal."""
    believed = max(fields["believed"], key=fields["believed"].__getitem__)
    share = format_share(fields["believed"][believed], digits=0)
    return (
        f"{fields['evaluated']}: mean return {fields['return_mean']:.1f} (random {fields['random_mean']:.1f}) over "
        f"{len(fields['returns'])} episodes, {fields['episodes_truncated']} of them cut at the step limit; "
        f"{'' if fields['known'] else 'unseen, '}taken for {believed} in {share} of the steps"
    )

"""The training loop of a run: train in a game, store what keeps it from being forgotten, evaluate, save, go on with the next game.

Read `Trainer.run` first. learner.py has what one update computes, `RunConfig.turns` the order of the updates, checkpoint.py what a
checkpoint contains.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from ooc_moe.config.run import Turn
from ooc_moe.display.formats import format_share
from ooc_moe.display.progress import lasting_bars
from ooc_moe.evaluation.evaluate import Evaluator
from ooc_moe.learning.protection import make_protection
from ooc_moe.learning.rollout import Collector, Rollout
from ooc_moe.metrics.log import MetricsWriter
from ooc_moe.run.checkpointer import Checkpointer
from ooc_moe.run.events import RunEvents
from ooc_moe.run.games import GamesInTraining
from ooc_moe.session import checkpoint
from ooc_moe.session.interrupts import interruptible
from ooc_moe.session.session import Session

DETECTOR_FRAMES = 64
"""The number of frames of each rollout that the detector learns from."""


class Interrupted(Exception):
    """Raised when Ctrl-C has stopped a run, after a checkpoint was saved. `ooc-moe train --resume` continues the run."""


class Trainer:
    """Trains one run to its end, from its first update or from a checkpoint that `load` has loaded."""

    def __init__(self, session: Session, writer: MetricsWriter, console: Console) -> None:
        self.session, self.config, self.agent = session, session.config, session.agent
        self.writer, self.console = writer, console
        self.at = checkpoint.Progress()
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.protection = make_protection(self.config, self.agent)
        self.evaluator = Evaluator(session)
        self.events = RunEvents(session, writer)
        self.games = GamesInTraining(session, protection=self.protection, generator=self.generator, on_segment=self._on_segment)
        self._checkpointer = Checkpointer(session)
        self._bars: dict[int, TaskID] = {}

    def run(self) -> None:
        """Trains until every turn of the run's schedule (`RunConfig.turns`) is done.

        Raises:
            Interrupted: after Ctrl-C, once a checkpoint is saved.
        """
        if self.at == checkpoint.Progress():
            self.save()  # So that the run can be resumed from its beginning.
        turns = self.config.turns
        with interruptible() as interrupted, lasting_bars(self.console) as progress:
            for turn in turns[self.at.turn :]:
                self._learn(turn, progress, interrupted)
                if turn.evaluated:
                    self._evaluate(turn.phase, progress)
                self.at = dataclasses.replace(self.at, turn=self.at.turn + 1, update_in_turn=0)
                if turn.evaluated:
                    self.session.flush()
                    self.events.checksums(self.at, self.config.games[turn.phase])
                    self.save(keep_as=checkpoint.end_of_game_file(turn.phase, self.config.games[turn.phase]))
                elif interrupted() or self._checkpoint_due():
                    self.save()
                if interrupted() and self.at.turn < len(turns):
                    raise Interrupted(f"stopped after {self.config.games[turn.phase]}; saved in {self.config.run_dir}")
        self.events.done(self.at)

    def resume_hint(self) -> str:
        """Returns a sentence that says where the run stopped and how to continue it, for the message of the error that stopped it."""
        saved_at = self._checkpointer.saved_at
        if saved_at is None:
            return "the run has no checkpoint yet: begin it again under another --name"
        return (
            f"stopped at step {self.at.step}; when the cause is removed, continue from the checkpoint of step {saved_at.step} with "
            f"ooc-moe train --resume --run-dir {self.config.run_dir}"
        )

    # Learning

    def _learn(self, turn: Turn, progress: Progress, interrupted: Callable[[], bool]) -> None:
        """Plays one game and learns from it for a turn (a stretch of updates).

        After the game's last turn, the method against forgetting stores what it needs, and the game's environments are closed.
        """
        game, updates = self.config.games[turn.phase], self.config.updates_per_game
        self.session.mark_game(game)
        self.events.new_fetches()  # Drops what the evaluation before fetched.
        if self.at.update_in_turn == 0:
            self._enter(game, turn)
        learner, collector = self.games.learner(game), self._collector(game)
        bar = self._bar(progress, turn)
        for in_game in range(turn.first + self.at.update_in_turn, turn.end):
            self.session.reporter.activity = f"training {game}, step {self.at.step}"
            began = time.monotonic()
            rollout = collector.collect()
            losses = learner.update(rollout, remaining=1 - in_game / updates)
            detected = self._teach_detector(game, rollout)
            self._advance()
            duration_s = time.monotonic() - began
            self.events.update(self.at, game, rollout, losses=losses, detector=detected, duration_s=duration_s)
            self._show(progress, bar, in_game + 1, rollout)
            if in_game + 1 < turn.end and (self._checkpoint_due() or interrupted()):
                self.save()
                collector = self._collector(game)
                if interrupted():
                    raise Interrupted(f"stopped at step {self.at.step} of {game}; saved in {self.config.run_dir}")
        if turn.end == updates:
            self.protection.leave(game, rollout, self.generator)
            self.games.end(game)
        self._make_room()

    def _enter(self, game: str, turn: Turn) -> None:
        """Begins a game's turn: logs the switch, adds the game to the agent if it is new, and prefetches its experts.

        It prefetches only if the configuration says that the order of the games, and not the detector, decides what to prefetch.
        """
        turns = self.config.turns
        previous = self.config.games[turns[self.at.turn - 1].phase] if self.at.turn else None
        self.events.switch(self.at, phase=turn.phase, previous=previous, game=game)
        if game not in self.agent.games:
            useful = self.session.useful_experts(self._collector(game).frames_NSHW) if self.agent.config.shared_experts else None
            self.agent.add_game(game, borrowed=useful)
            for recogniser in (self.session.detector, self.session.nearest_mean):
                recogniser.add_game(game)
                recogniser.grow_experts(self.session.num_experts)
        if self.config.prefetch == "schedule":
            self.session.prefetch(self.agent.prefetch_set(game), read_only=self.agent.read_only_set(game))

    def _collector(self, game: str) -> Collector:
        # The seed depends only on run and update, so that a resumed run plays the same episodes as an undisturbed one.
        return self.games.collector(game, seed=self.config.seed * 1_000_003 + self.at.update)

    def _make_room(self) -> None:
        """Starts to write back the game's experts in the background, so that the next game's experts can replace them in the caches."""
        for cache in self.session.caches:
            cache.write_back()
            cache.new_working_set()

    def _on_segment(self, game: str, frames_NSHW: torch.Tensor) -> None:
        """Predicts from these frames which experts will be needed, and prefetches them, if prefetching follows the detector."""
        if self.config.prefetch == "detector":
            prediction = self.session.detector.predict(frames_NSHW)
            read_only = self.agent.read_only_set(game)
            self.session.prefetch(prediction.experts, probabilities=prediction.expert_probabilities, read_only=read_only)

    def _teach_detector(self, game: str, rollout: Rollout) -> dict[str, float]:
        """Trains the detector and its baseline (nearest mean) on some frames of the rollout and the experts to which these were routed.

        Returns what the detector measured.
        """
        frames_MSHW, experts_MLK = rollout.frames_BTSHW.flatten(0, 1), rollout.experts_BTLK.flatten(0, 1)
        chosen = torch.randperm(len(frames_MSHW), generator=self.generator)[:DETECTOR_FRAMES]
        used_E = self.session.usage_of(experts_MLK[chosen])
        self.session.nearest_mean.learn(frames_MSHW[chosen], game, used_E)
        return self.session.detector.learn(frames_MSHW[chosen], game, used_E)

    def _advance(self) -> None:
        self.at = dataclasses.replace(
            self.at,
            update=self.at.update + 1,
            update_in_turn=self.at.update_in_turn + 1,
            step=self.at.step + self.config.steps_per_update,
        )

    # Evaluating

    def _evaluate(self, phase: int, progress: Progress) -> None:
        """Evaluates the games trained so far, or all games with `eval_unseen`, and logs the results."""
        if not self.config.eval_steps:
            return
        games = self.config.games[: phase + 1] + (self.config.games if self.config.eval_unseen else ())
        games = tuple(dict.fromkeys(games))
        self.session.reporter.activity = f"evaluating at step {self.at.step}"
        bar = progress.add_task("evaluation", total=len(games), note="")
        for fields in self.evaluator.evaluate(games):
            self.events.evaluation(self.at, phase=phase, game=self.config.games[phase], fields=fields)
            progress.update(bar, advance=1, note=f"{fields['evaluated']} {fields['return_mean']:.0f} (random {fields['random_mean']:.0f})")

    # Checkpoints

    def save(self, *, keep_as: str | None = None) -> None:
        """Saves a checkpoint, after which all environments begin new episodes.

        Args:
            keep_as: a file name under which the checkpoint is kept for good. None: the next checkpoint replaces it.
        """
        self.games.end_episodes()
        self._checkpointer.save(self.at, self._state, keep_as=keep_as)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Puts the run into the state of a checkpoint. The banks must have been restored to the checkpoint's snapshot already."""
        self.at = saved.progress
        state = saved.state
        self.agent.load_state_dict(state["agent"])
        self.session.detector.load_state_dict(state["detector"])
        self.session.nearest_mean.load_state_dict(state["nearest_mean"])
        self.protection.load_state_dict(state["protection"])
        self.games.load_state_dict(state)
        self.generator.set_state(state["generator"])
        self.writer.truncate(state["metrics_position"])
        if self.session.trace is not None:
            self.session.trace.truncate(state["trace_position"])
        self._checkpointer.resume_from(saved)

    def _state(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "detector": self.session.detector.state_dict(),
            "nearest_mean": self.session.nearest_mean.state_dict(),
            "protection": self.protection.state_dict(),
            **self.games.state_dict(),
            "generator": self.generator.get_state(),
            "metrics_position": self.writer.position(),
            "trace_position": self.session.trace.position() if self.session.trace is not None else None,
        }

    def _checkpoint_due(self) -> bool:
        return self.config.checkpoint_every > 0 and self.at.update % self.config.checkpoint_every == 0

    # Progress

    def _bar(self, progress: Progress, turn: Turn) -> TaskID:
        """Returns the progress bar of the turn's game. All turns of a game share one bar."""
        if turn.phase not in self._bars:
            done = turn.first + self.at.update_in_turn
            self._bars[turn.phase] = progress.add_task(
                self.config.games[turn.phase], total=self.config.updates_per_game, completed=done, note=""
            )
        return self._bars[turn.phase]

    def _show(self, progress: Progress, bar: TaskID, done: int, rollout: Rollout) -> None:
        cache = self.session.cache_stats()
        episodes = rollout.episode_returns
        score = f"return {sum(episodes) / len(episodes):.0f}" if episodes else f"{1000 * rollout.reward_per_step:.0f} points per 1000 steps"
        progress.update(bar, completed=done, note=f"{score}, HBM hits {format_share(cache.hit_rate)}")

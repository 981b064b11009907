"""Learns games one after another with experts that live in the store: a run from its first step to its report.

Read `Trainer.run` first: learn a game, leave it, evaluate, checkpoint, next game. What an update computes is in learner.py, what a
checkpoint holds in checkpoint.py, which updates follow one another in `RunConfig.turns`. Knows nothing of flags.

Run: ooc-moe train --games krull,road_runner --preset demo
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ooc_moe import envs
from ooc_moe.config.run import PlaneName, RunConfig, Turn
from ooc_moe.evaluation.evaluate import Evaluator
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.protection import make_protection
from ooc_moe.learning.rollout import Collector, Rollout
from ooc_moe.metrics.log import CONFIG_FILE, MetricsWriter
from ooc_moe.metrics.provenance import commit
from ooc_moe.metrics.trace import TraceWriter, check_new
from ooc_moe.report.report import summary_tables, write_report
from ooc_moe.run.branch import go_back
from ooc_moe.session import checkpoint
from ooc_moe.session.interrupts import interruptible
from ooc_moe.session.session import Session, check_device, open_session, open_store
from ooc_moe_client.store import ExpertStore
from ooc_moe_wire.errors import InvalidRequest, OocMoeError

DETECTOR_FRAMES = 64


class Interrupted(Exception):
    """Ctrl-C: the run saved a checkpoint and stopped; `ooc-moe train --resume` goes on."""


def train(config: RunConfig, console: Console) -> Path:
    """Trains a new run; returns its directory.

    Raises:
        InvalidRequest: a game is unknown or needs ale-py, the device does not exist, the directory holds a run already or cannot be made,
            or its bank was already written.
        Interrupted: after Ctrl-C, when the checkpoint is saved.
    """
    for game in config.games:
        envs.check_playable(game)
    check_device(config.device)
    if config.trace is not None:
        check_new(Path(config.trace))
    config_file = config.run_dir / CONFIG_FILE
    if config_file.exists():
        raise InvalidRequest(f"run_dir: {config.run_dir} already holds a run; go on with --resume, or choose another --name")
    _make(config.run_dir)
    with open_store(config) as store:
        _create_banks(config, store)
        config_file.write_text(config.to_json())
        _run(config, store, console)
    return config.run_dir


def resume(run_dir: Path, console: Console, *, store: str | None = None, plane: PlaneName | None = None, name: str | None = None) -> Path:
    """Goes on from a checkpoint as if nothing had happened since.

    Args:
        run_dir: the run's directory.
        console: where progress is shown.
        store: the daemon's address, if it changed.
        plane: the way to it, if it changed.
        name: an earlier checkpoint than the last one, for example "0-krull"; what the run did after it is dropped.
    """
    config = RunConfig.read(run_dir)
    config = dataclasses.replace(config, store=store or config.store, plane=plane or config.plane)
    check_device(config.device)
    directory = run_dir / checkpoint.DIRECTORY
    saved = checkpoint.load(directory / checkpoint.LATEST) if name is None else checkpoint.load_named(directory, name)
    with open_store(config) as opened:
        opened.restore_snapshot(saved.snapshot_id)
        if name is not None:
            go_back(run_dir, name)
        _run(config, opened, console, saved)
    return run_dir


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"run_dir: {run_dir} cannot be made: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise InvalidRequest(f"run_dir: {run_dir} cannot be written")


def _create_banks(config: RunConfig, store: ExpertStore) -> None:
    """Makes the run's banks, or forks them; refuses banks that were written."""
    for spec in config.agent.bank_specs(config.name, config.seed):
        if config.from_bank is not None:
            if store.get_bank(config.from_bank).spec.layout != spec.layout:
                raise InvalidRequest(f"from_bank: the experts of {config.from_bank!r} have another layout than this agent's")
            store.fork_bank(config.from_bank, spec.name)
        elif store.create_bank(spec).num_written:
            raise InvalidRequest(
                f"bank: {spec.name!r} was already written; go on with --resume, begin from it with --from-bank, or choose another --name"
            )


def _run(config: RunConfig, store: ExpertStore, console: Console, saved: checkpoint.Checkpoint | None = None) -> None:
    with ExitStack() as stack:
        trace = None if config.trace is None else stack.enter_context(closing(TraceWriter(Path(config.trace), config.trace_info())))
        banks = config.agent.bank_names(config.name)
        for bank in banks:
            store.open_for_writing(bank)  # A second trainer is refused now, not after its first rollout.
        session = stack.enter_context(open_session(config, store, banks, trace=trace))
        writer = MetricsWriter(config.run_dir)
        stack.callback(writer.close)
        trainer = Trainer(session, writer, console)
        if saved is None:
            writer.log("begun", step=0, update=0, version=importlib.metadata.version("ooc-moe"), commit=commit())
        else:
            trainer.load(saved)
        try:
            trainer.run()
        except OocMoeError as error:
            if not isinstance(error, InvalidRequest):  # That would come again.
                error.add_note(trainer.how_to_go_on())
            raise
    report = write_report(config.run_dir)
    for table in summary_tables(config.run_dir):
        console.print(table)
        console.print()
    console.print(f"report: {report}", soft_wrap=True)


class Trainer:
    """One run in progress."""

    def __init__(self, session: Session, writer: MetricsWriter, console: Console) -> None:
        self.session, self.config, self.agent = session, session.config, session.agent
        self.writer, self.console = writer, console
        self.at = checkpoint.Progress()
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.protection = make_protection(self.config, self.agent)
        self.evaluator = Evaluator(session)
        self._checkpoints = self.config.run_dir / checkpoint.DIRECTORY
        self._snapshot_prefix = f"{self.config.name}/update-"
        self._snapshot_id: int | None = None
        self._saved_at: checkpoint.Progress | None = None
        # What lives between the turns of a game: its optimizer, its environments, and whether these were reset since the last checkpoint.
        self._learners: dict[str, Learner] = {}
        self._collectors: dict[str, Collector] = {}
        self._playing: set[str] = set()
        self._bars: dict[int, TaskID] = {}
        self._fetched = [cache.fetches() for cache in session.caches]

    def run(self) -> None:
        """Plays the schedule to its end."""
        if self.at == checkpoint.Progress():
            self.save()  # So that a run can be resumed from its first moment on.
        turns = self.config.turns
        with interruptible() as interrupted, _progress(self.console) as progress:
            for turn in turns[self.at.turn :]:
                self._learn(turn, progress, interrupted)
                if turn.evaluated:
                    self._evaluate(turn.phase, progress)
                self.at = dataclasses.replace(self.at, turn=self.at.turn + 1, update_in_turn=0)
                if turn.evaluated:
                    self.session.flush()
                    self._log_checksums(self.config.games[turn.phase])
                    self.save(also=checkpoint.end_of_game(turn.phase, self.config.games[turn.phase]))
                elif interrupted() or self._checkpoint_due():
                    self.save()
                if interrupted() and self.at.turn < len(turns):
                    raise Interrupted(f"stopped after {self.config.games[turn.phase]}; saved in {self.config.run_dir}")
        cache, store = self.session.cache_stats().to_dict(), self.session.store_stats()
        self.writer.log("done", step=self.at.step, update=self.at.update, cache=cache, store=store)

    def how_to_go_on(self) -> str:
        """For the message of what stopped the run: where it was, and the way back to its last checkpoint."""
        if self._saved_at is None:
            return "the run has no checkpoint yet: begin it again under another --name"
        return (
            f"stopped at step {self.at.step}; once that is mended, go on from the checkpoint of step {self._saved_at.step} with "
            f"ooc-moe train --resume --run-dir {self.config.run_dir}"
        )

    def _learn(self, turn: Turn, progress: Progress, interrupted: Callable[[], bool]) -> None:
        """Plays and learns one game for a turn, then leaves it."""
        game, updates = self.config.games[turn.phase], self.config.updates_per_game
        self.session.mark_game(game)
        self._new_fetches()  # What an evaluation fetched is not the game's.
        if self.at.update_in_turn == 0:
            self._enter(game, turn)
        learner, collector = self._learner(game), self._collector(game)
        bar = self._bar(progress, turn)
        for in_game in range(turn.first + self.at.update_in_turn, turn.end):
            self.session.reporter.activity = f"training {game}, step {self.at.step}"
            began = time.monotonic()
            rollout = collector.collect()
            losses = learner.update(rollout, remaining=1 - in_game / updates)
            detected = self._teach_detector(game, rollout)
            self._advance()
            self._log_update(game, rollout, losses, detected, time.monotonic() - began)
            self._show(progress, bar, in_game + 1, rollout)
            if in_game + 1 < turn.end and (self._checkpoint_due() or interrupted()):
                self.save()
                collector = self._collector(game)
                if interrupted():
                    raise Interrupted(f"stopped at step {self.at.step} of {game}; saved in {self.config.run_dir}")
        if turn.end == updates:
            self._leave(game, rollout)
        self._make_room()

    def _learner(self, game: str) -> Learner:
        """The game's, or a new one."""
        if game not in self._learners:
            beside = next(iter(self._learners.values()), None)
            self._learners[game] = Learner(
                self.agent, game, self.config, protection=self.protection, generator=self.generator, beside=beside
            )
        return self._learners[game]

    def _collector(self, game: str) -> Collector:
        """The game's environments, reset if they were not since the last checkpoint."""
        if game not in self._collectors:
            game_envs, ahead = self.session.make_envs(game, self.config.ppo.num_envs), self.config.prefetch != "off"
            self._collectors[game] = Collector(
                self.agent, game_envs, self.config.ppo, generator=self.generator, on_segment=partial(self._on_segment, game), ahead=ahead
            )
        if game not in self._playing:
            self._collectors[game].reset(self._env_seed())
            self._playing.add(game)
        return self._collectors[game]

    def _enter(self, game: str, turn: Turn) -> None:
        """Gives a new game its pools, and tells the record that the game on the screen changed."""
        turns = self.config.turns
        previous = self.config.games[turns[self.at.turn - 1].phase] if self.at.turn else None
        self.writer.log("switch", step=self.at.step, update=self.at.update, game=game, phase=turn.phase, **{"from": previous, "to": game})
        if game not in self.agent.games:
            useful = self.session.useful_experts(self._collector(game).frames_NSHW) if self.agent.config.shared_experts else None
            self.agent.add_game(game, borrowed=useful)
            for recogniser in (self.session.detector, self.session.nearest_mean):
                recogniser.add_game(game)
                recogniser.grow_experts(self.session.num_experts)
        if self.config.prefetch == "schedule":
            self.session.prefetch(self.agent.prefetch_set(game), read_only=self.agent.read_only_set(game))

    def _make_room(self) -> None:
        """Writes the game's experts back behind what follows, for the next game's to take their place."""
        for cache in self.session.caches:
            cache.write_back()
            cache.new_working_set()

    def _leave(self, game: str, rollout: Rollout) -> None:
        """Ends a game that had all its updates: the protection remembers it, and its momentum is forgotten."""
        self.protection.leave(game, rollout, self.generator)
        self._playing.discard(game)
        self._collectors.pop(game).envs.close()
        if not self.config.switch_every:
            del self._learners[game]

    def _on_segment(self, game: str, frames_NSHW: torch.Tensor) -> None:
        """Lets the detector look at what is on the screen, and bring what it expects to be needed."""
        if self.config.prefetch == "detector":
            prediction = self.session.detector.predict(frames_NSHW)
            read_only = self.agent.read_only_set(game)
            self.session.prefetch(prediction.experts, probabilities=prediction.expert_probabilities, read_only=read_only)

    def _teach_detector(self, game: str, rollout: Rollout) -> dict[str, float]:
        """One online step of the detector on frames of this rollout, each with the experts that it was routed to."""
        frames_MSHW, experts_MLK = rollout.frames_BTSHW.flatten(0, 1), rollout.experts_BTLK.flatten(0, 1)
        chosen = torch.randperm(len(frames_MSHW), generator=self.generator)[:DETECTOR_FRAMES]
        used_E = self.session.usage_of(experts_MLK[chosen])
        self.session.nearest_mean.learn(frames_MSHW[chosen], game, used_E)
        return self.session.detector.learn(frames_MSHW[chosen], game, used_E)

    def _evaluate(self, phase: int, progress: Progress) -> None:
        """Plays the games known so far (or all), without telling the agent which; each beside random play under the same protocol."""
        if not self.config.eval_steps:
            return
        games = self.config.games[: phase + 1] + (self.config.games if self.config.eval_unseen else ())
        games = tuple(dict.fromkeys(games))
        self.session.reporter.activity = f"evaluating at step {self.at.step}"
        bar = progress.add_task("evaluation", total=len(games), note="")
        for fields in self.evaluator.evaluate(games):
            self.writer.log("evaluation", step=self.at.step, update=self.at.update, game=self.config.games[phase], phase=phase, **fields)
            progress.update(bar, advance=1, note=f"{fields['evaluated']} {fields['return_mean']:.0f} (random {fields['random_mean']:.0f})")

    def save(self, *, also: str | None = None) -> None:
        """Makes a checkpoint, after which all environments begin anew. `also`: keep it, and its snapshot, under that name too."""
        self._playing.clear()
        self.session.flush()
        banks = self.config.agent.bank_names(self.config.name)
        # No name is used twice: a name left over from before a crash would answer with the experts of that time.
        name = f"{self._snapshot_prefix}{self.at.update}-{uuid.uuid4().hex[:8]}"
        snapshot = self.session.store.create_snapshot(banks, name=name)
        saved = checkpoint.Checkpoint(progress=self.at, snapshot_id=snapshot.id, state=self._state())
        if also is not None:
            checkpoint.save(self._checkpoints / also, saved)
        checkpoint.save(self._checkpoints / checkpoint.LATEST, saved)
        self._saved_at = self.at
        older, self._snapshot_id = self._snapshot_id, None if also else snapshot.id
        if older is not None:
            self.session.store.delete_snapshot(older)

    def _drop_nameless_snapshots(self) -> None:
        """Deletes those of the run's own snapshots that no checkpoint names: a crash came before the file, or after it."""
        store, named = self.session.store, checkpoint.named_snapshots(self._checkpoints)
        for snapshot in store.list_snapshots(self.session.caches[0].bank):
            if snapshot.name.startswith(self._snapshot_prefix) and snapshot.id not in named:
                store.delete_snapshot(snapshot.id)

    def _state(self) -> dict[str, Any]:
        learner = next(iter(self._learners.values()), None)  # Any of them: what is shared they have in common.
        return {
            "agent": self.agent.state_dict(),
            "detector": self.session.detector.state_dict(),
            "nearest_mean": self.session.nearest_mean.state_dict(),
            "protection": self.protection.state_dict(),
            "optimizers": {game: learner.own.state_dict() for game, learner in self._learners.items()},
            "shared_optimizers": learner and {"dense": learner.shared.state_dict(), "experts": learner.experts.state_dict()},
            "generator": self.generator.get_state(),
            "metrics_position": self.writer.position(),
            "trace_position": self.session.trace.position() if self.session.trace is not None else None,
        }

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Takes up a checkpoint; the banks are already restored to its snapshot."""
        self.at = self._saved_at = saved.progress
        state = saved.state
        self.agent.load_state_dict(state["agent"])
        self.session.detector.load_state_dict(state["detector"])
        self.session.nearest_mean.load_state_dict(state["nearest_mean"])
        self.protection.load_state_dict(state["protection"])
        for game, optimizer in state["optimizers"].items():
            learner = self._learner(game)
            learner.own.load_state_dict(optimizer)
            learner.shared.load_state_dict(state["shared_optimizers"]["dense"])
            learner.experts.load_state_dict(state["shared_optimizers"]["experts"])
        self.generator.set_state(state["generator"])
        self.writer.truncate(state["metrics_position"])
        if self.session.trace is not None:
            self.session.trace.truncate(state["trace_position"])
        # Checkpoints at the ends of games stay; any other is dropped after the next one.
        kept = [each.snapshot_id for each in checkpoint.kept(self._checkpoints).values()]
        self._snapshot_id = None if saved.snapshot_id in kept else saved.snapshot_id
        self._drop_nameless_snapshots()

    def _checkpoint_due(self) -> bool:
        return self.config.checkpoint_every > 0 and self.at.update % self.config.checkpoint_every == 0

    def _env_seed(self) -> int:
        """A function of run and update, so that a resumed run and an undisturbed one play the same episodes."""
        return self.config.seed * 1_000_003 + self.at.update

    def _advance(self) -> None:
        self.at = dataclasses.replace(
            self.at,
            update=self.at.update + 1,
            update_in_turn=self.at.update_in_turn + 1,
            step=self.at.step + self.config.steps_per_update,
        )

    def _new_fetches(self) -> dict[int, Counter[int]]:
        """How often each expert was fetched since the last call, by bank."""
        before, self._fetched = self._fetched, [cache.fetches() for cache in self.session.caches]
        return {bank: now - then for bank, (now, then) in enumerate(zip(self._fetched, before, strict=True))}

    def _log_update(self, game: str, rollout: Rollout, losses: dict[str, float], detected: dict[str, float], seconds: float) -> None:
        episodes = rollout.episode_returns
        self.writer.log(
            "update",
            step=self.at.step,
            update=self.at.update,
            game=game,
            losses=losses,
            episode_return_mean=sum(episodes) / len(episodes) if episodes else None,
            episodes=len(episodes),
            reward_per_step=rollout.reward_per_step,
            steps_per_s=self.config.steps_per_update / seconds,
            cache=self.session.cache_stats().to_dict(),
            store=self.session.store_stats(),
            usage=self.agent.usage(rollout.experts_BTLK),
            fetches=self._new_fetches(),
            detector=detected,
        )

    def _log_checksums(self, game: str) -> None:
        """What the store holds of every trained expert now: (parameters, optimizer), by bank. A reader sees which ones stayed equal."""
        written = {
            bank: {
                info.expert: (f"{info.parameter_xxh3:016x}", f"{info.optimizer_xxh3:016x}")
                for info in self.session.store.list_experts(cache.bank)
                if info.version
            }
            for bank, cache in enumerate(self.session.caches)
        }
        self.writer.log("checksums", step=self.at.step, update=self.at.update, game=game, experts=written)

    def _bar(self, progress: Progress, turn: Turn) -> TaskID:
        """The phase's bar: one for all its turns."""
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
        progress.update(bar, completed=done, note=f"{score}, HBM hits {cache.hit_rate:.1%}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>13}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )

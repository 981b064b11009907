"""Begins a training run, or resumes one: checks the request, makes the run's banks, trains, and writes the report.

trainer.py has the training loop.

Run: ooc-moe train --games krull,road_runner --preset demo
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

from ooc_moe import envs
from ooc_moe.config.run import PlaneName, RunConfig
from ooc_moe.metrics.log import CONFIG_FILE, MetricsWriter
from ooc_moe.metrics.provenance import commit
from ooc_moe.metrics.trace import TraceWriter, check_new
from ooc_moe.report.report import print_summary, write_report
from ooc_moe.run.branch import go_back
from ooc_moe.run.trainer import Interrupted, Trainer
from ooc_moe.session import checkpoint
from ooc_moe.session.session import check_device, open_session, open_store
from ooc_moe_client.store import ExpertStore
from ooc_moe_wire.errors import InvalidRequest, OocMoeError

__all__ = ["Interrupted", "resume", "train"]


def train(config: RunConfig, console: Console) -> Path:
    """Trains a new run from beginning to end, writes its report and returns the run's directory. `console` shows the progress.

    Raises:
        InvalidRequest: a game is unknown or needs ale-py, the device does not exist, the directory holds a run already or cannot be made,
            or the run's bank was already written.
        Interrupted: after Ctrl-C, once a checkpoint is saved.
    """
    for game in config.games:
        envs.check_playable(game)
    check_device(config.device)
    if config.trace is not None:
        check_new(Path(config.trace))
    config_file = config.run_dir / CONFIG_FILE
    if config_file.exists():
        raise InvalidRequest(f"run_dir: {config.run_dir} already holds a run; go on with --resume, or choose another --name")
    _make_directory(config.run_dir)
    with open_store(config) as store:
        _create_banks(config, store)
        config_file.write_text(config.to_json())
        _run(config, store, console)
    return config.run_dir


def resume(run_dir: Path, console: Console, *, store: str | None = None, plane: PlaneName | None = None, name: str | None = None) -> Path:
    """Continues a run from a checkpoint to its end and returns the run's directory. The result equals that of a run without a break.

    Args:
        run_dir: the run's directory.
        console: where progress is shown.
        store: the daemon's address, if it changed.
        plane: how experts travel between the daemon and this process ("auto", "local" or "stream"), if it changed.
        name: an earlier checkpoint than the last one, for example "0-krull". Everything that the run did after it is dropped.

    Raises:
        InvalidRequest: there is no such run or checkpoint, or the device does not exist.
        Interrupted: after Ctrl-C, once a checkpoint is saved.
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


def _make_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"run_dir: {run_dir} cannot be made: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise InvalidRequest(f"run_dir: {run_dir} cannot be written")


def _create_banks(config: RunConfig, store: ExpertStore) -> None:
    """Makes the run's banks, or forks them from another bank. Raises InvalidRequest for a bank that was written before."""
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
    """Trains to the end, from the beginning or from the checkpoint `saved`. Then writes the report and prints its tables."""
    with ExitStack() as stack:
        trace = None if config.trace is None else stack.enter_context(closing(TraceWriter(Path(config.trace), config.trace_info())))
        banks = config.agent.bank_names(config.name)
        for bank in banks:
            store.open_for_writing(bank)  # Refuses a second trainer now, not after its first rollout.
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
            if not isinstance(error, InvalidRequest):  # An invalid request would fail again.
                error.add_note(trainer.resume_hint())
            raise
    report = write_report(config.run_dir)
    print_summary(config.run_dir, console)
    console.print(f"report: {report}", soft_wrap=True)

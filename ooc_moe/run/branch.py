"""Returns a run to one of its checkpoints (`go_back`), or begins another run from a checkpoint (`branch`).

Experts and logged events follow the checkpoint, like all other parameters. These functions do not train. Each leaves a run directory from
which `train.resume` continues.

Run: ooc-moe branch runs/first runs/second --checkpoint 0-krull --games boxing
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from pathlib import Path

from ooc_moe import envs
from ooc_moe.config.run import RunConfig
from ooc_moe.metrics.log import CONFIG_FILE, METRICS_FILE
from ooc_moe.session import checkpoint
from ooc_moe.session.session import open_store
from ooc_moe_wire.errors import InvalidRequest


def go_back(run_dir: Path, name: str) -> None:
    """Makes the named checkpoint the run's latest one and deletes all later checkpoints.

    The snapshots of the deleted checkpoints stay in the store until the run is resumed.
    """
    directory = run_dir / checkpoint.DIRECTORY
    chosen = checkpoint.load_named(directory, name)
    for file, saved in checkpoint.ends_of_games(directory).items():
        if saved.progress.update > chosen.progress.update:
            (directory / file).unlink()
    checkpoint.save(directory / checkpoint.LATEST, chosen)


def branch(source: Path, run_dir: Path, name: str, *, games: Sequence[str] = (), store: str | None = None) -> None:
    """Makes a new run that begins in the state that `source` had at a checkpoint.

    The new run's banks are forks of the source's: in the store, experts that neither run has changed since are not stored twice.

    Args:
        source: the directory of the run to begin from. It may be in training.
        run_dir: the new run's directory.
        name: one of the source's checkpoints.
        games: the games to learn after the checkpoint, instead of the source's.
        store: the daemon's address, if it changed.

    Raises:
        InvalidRequest: there is no such run or checkpoint; a game is unknown; run_dir holds a run already; the run has its own daemon and
            `store` does not give its address; or `games` is given, but the checkpoint was saved before the training in a game had ended, or
            the source's games take turns.
        BankExists: the store has banks with the new run's name already.
    """
    old = RunConfig.read(source)
    saved = checkpoint.load_named(source / checkpoint.DIRECTORY, name)
    if games and old.switch_every:
        raise InvalidRequest(f"games: the games of {source} take turns, so no checkpoint is the end of a game")
    if games and saved.progress.update_in_turn:
        raise InvalidRequest(f"games: checkpoint {name!r} lies inside {old.games[saved.progress.turn]!r}; choose the end of a game")
    for game in games:
        envs.check_name(game)
    schedule = (*old.games[: saved.progress.turn], *games) if games else old.games
    config = dataclasses.replace(old, run_dir=run_dir, games=schedule, store=store or old.store, trace=None)
    if config.store is None:
        own = source / "store"
        raise InvalidRequest(f"store: {source} has a daemon of its own; run ooc-moe-server --data-dir {own} and give its address")
    if (run_dir / CONFIG_FILE).exists():
        raise InvalidRequest(f"run_dir: {run_dir} already holds a run; choose another name")
    with open_store(config) as opened:
        banks = config.agent.bank_names(config.name)
        for old_bank, bank in zip(old.agent.bank_names(old.name), banks, strict=True):
            opened.fork_bank(old_bank, bank, snapshot_id=saved.snapshot_id)
        snapshot = opened.create_snapshot(banks, name=f"{config.name}/update-{saved.progress.update}-{uuid.uuid4().hex[:8]}")
    moved = dataclasses.replace(saved, snapshot_id=snapshot.id)
    directory = run_dir / checkpoint.DIRECTORY
    for file, kept in checkpoint.ends_of_games(source / checkpoint.DIRECTORY).items():
        if kept.progress == saved.progress:
            checkpoint.save(directory / file, moved)
    checkpoint.save(directory / checkpoint.LATEST, moved)
    (run_dir / METRICS_FILE).write_bytes((source / METRICS_FILE).read_bytes()[: saved.state["metrics_position"]])
    (run_dir / CONFIG_FILE).write_text(config.to_json())

"""Opens a trained run for use in Python: its agent and detector as they were at a checkpoint. The run is not changed.

with load("runs/first") as run:
    envs = run.make_envs("krull", 4)
    frames = torch.from_numpy(envs.reset(seed=1))
    print(run.detector.predict(frames).names)
    actions = run.agent.act(frames, run.agent.segment("krull", 4)).actions_N
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ooc_moe.config.run import RunConfig
from ooc_moe.session.checkpoint import DIRECTORY, LATEST_NAME, load_named
from ooc_moe.session.session import Session, check_device, open_session, open_store
from ooc_moe_client.store import ExpertStore


@contextmanager
def load(run_dir: Path | str, *, checkpoint: str = LATEST_NAME, **overrides: Any) -> Iterator[Session]:
    """Opens a run as it was at one of its checkpoints, for as long as the `with` block runs. Yields the open session.

    The agent is in evaluation mode. Experts are read from a fork of the run's banks, which shares their bytes and is deleted at the end:
    the run stays as it is, even if the agent is trained in the block, and a trainer may continue the run meanwhile.

    Args:
        run_dir: the run's directory.
        checkpoint: "latest", or the name of a checkpoint that was kept at the end of a game, for example "0-krull".
        overrides: fields of `RunConfig` with other values than the run had, for example `store="host:50051"` or `device="cuda"`.

    Raises:
        InvalidRequest: the directory holds no run, the run has no such checkpoint, or a changed field is not valid.
        Unavailable: the run's daemon does not answer or cannot be started.
    """
    with open_checkpoint(dataclasses.replace(RunConfig.read(Path(run_dir)), **overrides), checkpoint) as session:
        yield session


@contextmanager
def open_checkpoint(config: RunConfig, name: str = LATEST_NAME) -> Iterator[Session]:
    """Opens the run of `config` as it was at its checkpoint `name`, for as long as the `with` block runs. Yields the open session.

    This is `load` for callers that have read the run's configuration already.
    """
    check_device(config.device)
    saved = load_named(config.run_dir / DIRECTORY, name)
    with (
        open_store(config) as store,
        _forked_banks(config, store, saved.snapshot_id) as banks,
        open_session(config, store, banks) as session,
    ):
        session.agent.load_state_dict(saved.state["agent"])
        session.detector.load_state_dict(saved.state["detector"])
        session.nearest_mean.load_state_dict(saved.state["nearest_mean"])
        session.agent.eval()
        yield session


@contextmanager
def _forked_banks(config: RunConfig, store: ExpertStore, snapshot_id: int) -> Iterator[list[str]]:
    """Forks the run's banks from a snapshot, without copying bytes. Yields the forks' names, and deletes the forks at the end."""
    forks: list[str] = []
    try:
        for bank in config.agent.bank_names(config.name):
            forks.append(store.fork_bank(bank, f"{bank}/eval-{uuid.uuid4().hex[:8]}", snapshot_id=snapshot_id).spec.name)
        yield forks
    finally:
        for fork in forks:
            store.release(fork)  # It is open for writing if the agent was trained.
            store.delete_bank(fork)

"""A checkpoint: a file and a snapshot of the banks, which together are the whole state of a run.

The file is called the dense file: it holds everything but the experts, which are in the snapshot. Saving goes in this order:

    flush the experts -> create the snapshot -> write the dense file to a new file -> rename it over the old one -> delete the old snapshot

So at every instant the dense file on disk names a snapshot that exists, whenever the process crashes. A crash can leave a snapshot that no
dense file names. The next resume deletes it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ooc_moe_wire.errors import InvalidRequest, TierFull

DIRECTORY = "checkpoints"
LATEST_NAME = "latest"
LATEST = f"{LATEST_NAME}.pt"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        turn: number of the present turn (see `RunConfig.turns`), from 0.
        update_in_turn: updates done in this turn.
        update: updates done since the run began.
        step: environment steps done since the run began, over all environments.
    """

    turn: int = 0
    update_in_turn: int = 0
    update: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The content of a dense file (everything but the experts), and the id of the snapshot that holds the experts.

    `state` contains only tensors and plain values, so that the file loads with torch's `weights_only`.
    """

    progress: Progress
    snapshot_id: int
    state: dict[str, Any]


def save(path: Path, saved: Checkpoint) -> None:
    """Writes a checkpoint's dense file to `path`, durably. After a crash either the old file or the new one is there, and it is complete.

    Raises:
        TierFull: the disk has no room. The old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new_file = path.with_suffix(".new")
    content = {"format": FORMAT, "progress": asdict(saved.progress), "snapshot_id": saved.snapshot_id, "state": saved.state}
    try:
        with new_file.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:  # torch hides the file's own error.
        free = shutil.disk_usage(path.parent).free
        new_file.unlink(missing_ok=True)
        raise TierFull(f"checkpoint: {path} cannot be written with {free} bytes free on its disk; an earlier one stays") from error
    new_file.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint from its dense file.

    Raises:
        InvalidRequest: the file does not exist, or has an unknown format.
    """
    if not path.exists():
        raise InvalidRequest(
            f"checkpoint: {path} does not exist; the run ended before its first checkpoint: begin it again under another --name"
        )
    content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if content.get("format") != FORMAT:
        raise InvalidRequest(f"checkpoint: {path} has format {content.get('format')}, this version reads {FORMAT}")
    return Checkpoint(progress=Progress(**content["progress"]), snapshot_id=content["snapshot_id"], state=content["state"])


def load_named(directory: Path, name: str) -> Checkpoint:
    """Reads the checkpoint with this name, from the file `name`.pt in `directory`.

    Raises:
        InvalidRequest: there is no such file; the message names those that exist. Or the file has an unknown format.
    """
    names = sorted(path.stem for path in directory.glob("*.pt"))
    if name not in names and names:
        raise InvalidRequest(f"checkpoint: {name!r} is not in {directory}, which holds {', '.join(names)}")
    return load(directory / f"{name}.pt")


def end_of_game_file(phase: int, game: str) -> str:
    """Returns the name of the checkpoint file that is kept when the training in a game has ended.

    `phase` is the game's place in the run's list of games, from 0.
    """
    return f"{phase}-{game.replace('/', '-')}.pt"


def ends_of_games(directory: Path) -> dict[str, Checkpoint]:
    """Reads the checkpoints in `directory` that were kept when the training in a game had ended. Returns them by file name."""
    return {path.name: load(path) for path in sorted(directory.glob("*.pt")) if path.name != LATEST}


def referenced_snapshots(directory: Path) -> set[int]:
    """The ids of all snapshots that are mentioned in the checkpoint files in `directory`."""
    return {load(path).snapshot_id for path in directory.glob("*.pt")}

"""A checkpoint: a dense file and a snapshot of the banks, which together are the whole state of a run.

Order on saving: the experts are flushed, the snapshot is taken, the dense file that names it is written beside and renamed over the old
one, and only then the older snapshot goes. So whatever the instant of a crash, the file on disk names a snapshot that exists; one that no
file names may be left over, and a resumed run drops it.
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
LATEST = "latest.pt"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands: the next thing to do is update `update_in_turn` of turn number `turn` (see `RunConfig.turns`)."""

    turn: int = 0
    update_in_turn: int = 0
    update: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The dense file's content: tensors and plain values only, so that it loads with `weights_only`."""

    progress: Progress
    snapshot_id: int
    state: dict[str, Any]


def save(path: Path, saved: Checkpoint) -> None:
    """Writes the dense file durably: either the old one or the new one is there, never half of one.

    Raises:
        TierFull: its disk has no room; the old one is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    content = {"format": FORMAT, "progress": asdict(saved.progress), "snapshot_id": saved.snapshot_id, "state": saved.state}
    try:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:  # torch hides what the file said.
        free = shutil.disk_usage(path.parent).free
        beside.unlink(missing_ok=True)
        raise TierFull(f"checkpoint: {path} cannot be written with {free} bytes free on its disk; an earlier one stays") from error
    beside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def load(path: Path) -> Checkpoint:
    """Reads a dense file.

    Raises:
        InvalidRequest: there is none, or it has an unknown format.
    """
    if not path.exists():
        raise InvalidRequest(
            f"resume: {path} does not exist; the run ended before its first checkpoint: begin it again under another --name"
        )
    content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if content.get("format") != FORMAT:
        raise InvalidRequest(f"resume: {path} has format {content.get('format')}, this version reads {FORMAT}")
    return Checkpoint(progress=Progress(**content["progress"]), snapshot_id=content["snapshot_id"], state=content["state"])


def load_named(directory: Path, name: str) -> Checkpoint:
    """Reads the dense file `name`.pt. Raises InvalidRequest, with the names that there are, when it is not among them."""
    names = sorted(path.stem for path in directory.glob("*.pt"))
    if name not in names:
        raise InvalidRequest(f"checkpoint: {name!r} is not in {directory}, which holds {', '.join(names) or 'none'}")
    return load(directory / f"{name}.pt")


def end_of_game(phase: int, game: str) -> str:
    """The file name of the checkpoint that a run keeps of the end of its game number `phase`."""
    return f"{phase}-{game.replace('/', '-')}.pt"


def kept(directory: Path) -> dict[str, Checkpoint]:
    """The checkpoints that a run keeps of the ends of its games, by file name."""
    return {path.name: load(path) for path in sorted(directory.glob("*.pt")) if path.name != LATEST}


def named_snapshots(directory: Path) -> set[int]:
    """The snapshots that the dense files of a directory need."""
    return {load(path).snapshot_id for path in directory.glob("*.pt")}

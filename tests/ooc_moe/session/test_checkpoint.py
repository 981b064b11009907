"""Dense files on a disk without room."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ooc_moe.session import checkpoint
from ooc_moe.session.checkpoint import Checkpoint, Progress
from ooc_moe_wire.errors import TierFull


@pytest.fixture
def little_room() -> Iterator[None]:
    """Files end at 64 KiB, as a full disk would end them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("little_room")
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    checkpoint.save(path, Checkpoint(progress=Progress(step=1), snapshot_id=7, state={}))
    with pytest.raises(TierFull, match="cannot be written"):
        checkpoint.save(path, Checkpoint(progress=Progress(step=2), snapshot_id=8, state={"large": torch.zeros(1 << 16)}))
    assert checkpoint.load(path).snapshot_id == 7
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]

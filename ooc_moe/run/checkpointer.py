"""Writes a run's checkpoints, and deletes the snapshots of checkpoints that no longer exist."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from ooc_moe.session import checkpoint
from ooc_moe.session.checkpoint import Checkpoint, Progress
from ooc_moe.session.session import Session


class Checkpointer:
    """Saves checkpoints: the run's state as a file in its directory, and its experts as a snapshot of its banks in the store.

    A checkpoint that is saved with `keep_as`, for example when the training in a game has ended, is kept for good. Of all other checkpoints
    only the latest exists: each save replaces it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._directory = session.config.run_dir / checkpoint.DIRECTORY
        self._snapshot_prefix = f"{session.config.name}/update-"
        self._replaceable_snapshot: int | None = None
        """The snapshot of the latest checkpoint, which the next save deletes. None: that snapshot is kept for good, or there is none."""
        self.saved_at: Progress | None = None
        """Where the run stood at its last checkpoint. None: there is no checkpoint yet."""

    def save(self, at: Progress, state: Callable[[], dict[str, Any]], *, keep_as: str | None = None) -> None:
        """Saves a checkpoint: writes back all changed experts, makes a snapshot of them, and writes the file that names the snapshot.

        Args:
            at: where the run stands.
            state: makes the content of the file: the state of everything but the experts. It is called after all experts are written back.
            keep_as: a file name under which the checkpoint and its snapshot are kept for good.
        """
        store, config = self._session.store, self._session.config
        self._session.flush()
        # No name is used twice: a name left over from before a crash would return the snapshot of that time.
        name = f"{self._snapshot_prefix}{at.update}-{uuid.uuid4().hex[:8]}"
        snapshot = store.create_snapshot(config.agent.bank_names(config.name), name=name)
        saved = Checkpoint(progress=at, snapshot_id=snapshot.id, state=state())
        if keep_as is not None:
            checkpoint.save(self._directory / keep_as, saved)
        checkpoint.save(self._directory / checkpoint.LATEST, saved)
        self.saved_at = at
        older, self._replaceable_snapshot = self._replaceable_snapshot, None if keep_as else snapshot.id
        if older is not None:
            store.delete_snapshot(older)

    def resume_from(self, saved: Checkpoint) -> None:
        """Prepares for further saves in a run that was resumed from `saved`, its latest checkpoint.

        Deletes the run's snapshots that no checkpoint names, for example because the process crashed between two steps of a save.
        """
        self.saved_at = saved.progress
        kept = [each.snapshot_id for each in checkpoint.ends_of_games(self._directory).values()]
        self._replaceable_snapshot = None if saved.snapshot_id in kept else saved.snapshot_id
        store, referenced = self._session.store, checkpoint.referenced_snapshots(self._directory)
        for snapshot in store.list_snapshots(self._session.caches[0].bank):
            if snapshot.name.startswith(self._snapshot_prefix) and snapshot.id not in referenced:
                store.delete_snapshot(snapshot.id)

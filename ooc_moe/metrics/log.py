"""Writes a run's events to `metrics.jsonl`, one JSON object a line, and their numbers to TensorBoard; and reads the file back.

    {"event": "update", "time": unix s, "step": environment steps so far, "update": n, "game": name or null, ...}

Reports and tables read only the JSONL file. TensorBoard is a second view of the same numbers:

    tensorboard --logdir runs/NAME/tensorboard
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ooc_moe_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"  # In a run's directory.
# Counts per expert are left out: as scalars they would be a curve for each of hundreds of experts.
_NOT_SCALARS = ("event", "time", "step", "update", "usage", "fetches")

Event = dict[str, Any]


class MetricsWriter:
    """Appends a run's events to `run_dir/metrics.jsonl` and, with `tensorboard`, their numbers to `run_dir/tensorboard`.

    Only one thread may use it.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = True) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._tensorboard = tensorboard
        self._scalars: SummaryWriter | None = None
        self._purge_step: int | None = None
        _end_torn_line(run_dir / METRICS_FILE)
        self._file = (run_dir / METRICS_FILE).open("ab")

    def log(self, event: str, *, step: int, update: int, game: str | None = None, **fields: Any) -> None:
        """Writes one event. Its line is in the file when this returns.

        NaN and infinity are written as null, and keys that are members of an enum as their names in lower case.

        Args:
            event: the kind of event, for example "update".
            step: environment steps of the whole run so far; the x axis of every curve.
            update: PPO updates so far.
            game: the game in training, or None.
            fields: what else the event says: dicts, lists, numbers and strings. Numpy scalars and arrays are allowed, too.
        """
        line: Event = {"event": event, "time": time.time(), "step": step, "update": update, "game": game, **fields}
        line = {key: _plain(value) for key, value in line.items()}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if self._tensorboard:
            self._log_scalars(line)

    def position(self) -> int:
        """The length of metrics.jsonl so far, in bytes. A checkpoint stores it, so that a resumed run can `truncate` the file to it."""
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Removes the events that were logged after a checkpoint, from metrics.jsonl and from TensorBoard, and logs a "resumed" event.

        Call it in a resumed run, before the first `log`. `position` is the length that `position()` returned for the checkpoint.

        Raises:
            InvalidRequest: the file is shorter than `position`.
        """
        if position > self.position():
            raise InvalidRequest(f"{METRICS_FILE}: {self.position()} bytes, but the checkpoint was made at {position}; the file was cut")
        self._file.truncate(position)
        self._file.seek(position)
        events = read_metrics(self._run_dir)
        last: Event = events[-1] if events else {"step": -1, "update": 0, "game": None}
        # TensorBoard hides scalars that an earlier process logged at this step or later.
        self._purge_step = int(last["step"]) + 1
        # Readers need this event, because the new process counts from zero again.
        self.log("resumed", step=max(last["step"], 0), update=last["update"], game=last["game"])

    def close(self) -> None:
        """Closes metrics.jsonl and TensorBoard's file. All events of metrics.jsonl are then durable on disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._scalars is not None:
            self._scalars.close()

    def _log_scalars(self, line: Event) -> None:
        if self._scalars is None:
            # Imported at the first scalar: it takes a second, and runs without TensorBoard do not need it.
            from torch.utils.tensorboard import SummaryWriter

            self._scalars = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
        prefix = "/".join(str(part) for part in (line["event"], line.get("evaluated")) if part)
        for tag, value in _numbers(prefix, {key: value for key, value in line.items() if key not in _NOT_SCALARS}):
            self._scalars.add_scalar(tag, value, line["step"])


def read_metrics(run_dir: Path) -> list[Event]:
    """Reads the events of a run from its metrics.jsonl, in order. The list is empty if the run has not begun.

    An incomplete last line, left by a writer that was killed, is skipped.

    Raises:
        InvalidRequest: another line is not a JSON event; the message names the line.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], start=1) if line]


def _parsed(line: bytes, where: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where}: not JSON ({error})") from error
    if not isinstance(event, dict) or "event" not in event:
        raise InvalidRequest(f"{where}: not an event: {line[:80].decode(errors='replace')}")
    return event


def _end_torn_line(path: Path) -> None:
    """Removes an incomplete last line, left by a writer that was killed, so that the next event starts on a line of its own."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """Converts a value, and all values in it, to types that JSON has. NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(key: Any) -> str:
    return key.name.lower() if isinstance(key, Enum) else str(key)


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yields every number in nested dicts as (TensorBoard tag, number). The tag is the path of keys after `prefix`. Lists are skipped."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "usage":
                yield from _numbers(f"{prefix}/{key}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)

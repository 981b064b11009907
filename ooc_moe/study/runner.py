"""Makes the runs of a study, several at a time, each in a process of its own with a daemon of its own.

A finished run is not made again. An unfinished run with a checkpoint is resumed from it. An unfinished run without a checkpoint is made
anew, and its old directory is renamed. On Ctrl-C every running process saves a checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ooc_moe.config.run import RunConfig
from ooc_moe.metrics.log import CONFIG_FILE, METRICS_FILE
from ooc_moe.session import checkpoint
from ooc_moe.session.interrupts import INTERRUPTED_EXIT, interruptible
from ooc_moe_wire.errors import InvalidRequest, require_at_least

RUN_PROCESS = ("-m", "ooc_moe.study.run_process")
LOG_FILE = "output.log"
POLL_S = 0.5
_TAIL_BYTES = 1 << 16


class State(Enum):
    """How far one run of a study has come: not started, unfinished with a checkpoint, unfinished without a checkpoint, or finished."""

    NEW = "new"
    """The run was not started: its directory has no configuration."""
    BEGUN = "begun"
    """The run is unfinished, and can be resumed from a checkpoint."""
    BROKEN = "broken"
    """The run stopped before its first checkpoint, and must be made anew."""
    DONE = "done"
    """The run is finished."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `run_all` returns at its end: which runs failed, and whether Ctrl-C interrupted the call."""

    failed: dict[Path, str]
    """By directory of a failed run: its exit code and the last line of its output."""
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of `run_all` at one moment, for a display. `steps_total`: environment steps of all runs when they are finished."""

    done: int
    """How many runs are finished."""
    total: int
    """How many runs there are, finished ones included."""
    steps_done: int
    """How many environment steps all runs together have done so far."""
    steps_total: int
    running: dict[Path, int]
    """By directory of each run that is being made: its environment steps so far."""
    failed: int
    """How many runs failed."""


def state_of(config: RunConfig) -> State:
    """Returns how far the run in `config.run_dir` has come: not started, resumable, to be made anew, or finished.

    Raises:
        InvalidRequest: the run there has another configuration; the message names the first field that differs.
    """
    run_dir = config.run_dir
    if not (run_dir / CONFIG_FILE).exists():
        return State.NEW
    _check_same(RunConfig.read(run_dir), config)
    if any(event == "done" for event, _ in _newest_events(run_dir)):
        return State.DONE
    return State.BEGUN if (run_dir / checkpoint.DIRECTORY / checkpoint.LATEST).exists() else State.BROKEN


def steps_of(config: RunConfig) -> int:
    """Returns how many environment steps the whole run has, over all its games."""
    return len(config.games) * config.updates_per_game * config.steps_per_update


def steps_done(run_dir: Path) -> int:
    """Returns how many environment steps the run has done so far, according to its metrics."""
    return max((step for _, step in _newest_events(run_dir)), default=0)


def run_all(configs: Sequence[RunConfig], *, jobs: int, watch: Callable[[Status], object] = lambda status: None) -> Outcome:
    """Makes all runs that are not finished, in the order of `configs`, `jobs` at a time. Returns when all processes have ended.

    Args:
        configs: the runs. Their directories may hold finished and unfinished runs of earlier calls.
        jobs: how many processes run at a time.
        watch: called with the progress twice a second.

    Raises:
        InvalidRequest: a directory holds a run of another configuration, or `jobs` is below 1. No run was started.
    """
    require_at_least(1, jobs=jobs)
    states = [state_of(config) for config in configs]
    waiting = [config for config, state in zip(configs, states, strict=True) if state is not State.DONE]
    done = len(configs) - len(waiting)
    steps_total, steps_finished = sum(map(steps_of, configs)), sum(map(steps_of, configs)) - sum(map(steps_of, waiting))
    running: dict[Path, tuple[RunConfig, subprocess.Popen[bytes]]] = {}
    failed: dict[Path, str] = {}
    stopping = False
    with interruptible() as interrupted:
        while (waiting and not interrupted()) or running:
            while waiting and len(running) < jobs and not interrupted():
                config = waiting.pop(0)
                running[config.run_dir] = (config, _start(config))
            for run_dir, (config, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run_dir]
                if process.returncode == 0:
                    done, steps_finished = done + 1, steps_finished + steps_of(config)
                elif not (interrupted() and process.returncode in (INTERRUPTED_EXIT, -signal.SIGTERM)):
                    failed[run_dir] = _failure(run_dir, process.returncode)
            now = {run_dir: steps_done(run_dir) for run_dir in running}
            watch(
                Status(
                    done=done,
                    total=len(configs),
                    steps_done=steps_finished + sum(now.values()),
                    steps_total=steps_total,
                    running=now,
                    failed=len(failed),
                )
            )
            if interrupted() and not stopping:
                stopping = True  # Only once: a second signal would keep the processes from saving.
                for _, process in running.values():
                    process.terminate()
            time.sleep(POLL_S)
        return Outcome(failed=failed, interrupted=bool(interrupted()))


def _start(config: RunConfig) -> subprocess.Popen[bytes]:
    """Starts the process that makes the run of `config`. The directory of a run without a checkpoint (broken) is renamed first.

    The process is in a session of its own, so that Ctrl-C reaches the runner alone.
    """
    run_dir = config.run_dir
    if state_of(config) is State.BROKEN:
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *RUN_PROCESS, str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads)}
    with (run_dir / LOG_FILE).open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # The process has ended already; its exit code tells why.
        process.stdin.write(config.to_json().encode())
        process.stdin.close()
    return process


def _failure(run_dir: Path, code: int) -> str:
    """Returns why a run's process failed: its exit code and the last line of its output."""
    lines = (run_dir / LOG_FILE).read_text(errors="replace").split("\n")
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"ended with {code}: {last_line}"


def _newest_events(run_dir: Path) -> Iterator[tuple[str, int]]:
    """Yields (event, step) for the last events in the run's metrics file: those in its last 64 KiB."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in lines[:-1]:
        with suppress(ValueError):  # The first line may lack its beginning.
            event = json.loads(line)
            yield event["event"], int(event["step"])


def _check_same(found: RunConfig, wanted: RunConfig) -> None:
    # The run's directory may have been moved since the run was made, and the trace in it with it: their paths are not compared.
    here, there = (_flat(asdict(config) | {"run_dir": "", "trace": config.trace and Path(config.trace).name}) for config in (found, wanted))
    for name, value in there.items():
        if here.get(name) != value:
            raise InvalidRequest(
                f"{wanted.run_dir}: the run there was made with {name} {here.get(name)}, not {value}; move it away, or give another --runs"
            )


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

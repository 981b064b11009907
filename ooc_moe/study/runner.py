"""Makes many runs, some at a time, each in a process of its own with a daemon of its own; goes on where an earlier call was stopped.

A run that is done is left alone, one that was begun goes on from its last checkpoint, one that has none is begun again, its directory
moved aside. Ctrl-C lets every running process save a checkpoint. Knows nothing of what the runs are for.
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
from ooc_moe_wire.errors import InvalidRequest

CHILD = ("-m", "ooc_moe.study.run_process")
LOG_FILE = "output.log"
POLL_S = 0.5
_TAIL_BYTES = 1 << 16


class State(Enum):
    """How far a run came."""

    NEW = "new"
    BEGUN = "begun"
    """It has a checkpoint to go on from."""
    BROKEN = "broken"
    """It was begun, and stopped before its first checkpoint."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work ended: what failed, with the last line that each said, and whether it was interrupted."""

    failed: dict[Path, str]
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Status:
    """What goes on, for a display."""

    done: int
    total: int
    steps_done: int
    steps_total: int
    running: dict[Path, int]
    """Directory -> its environment steps."""
    failed: int


def state_of(config: RunConfig) -> State:
    """How far the run in `config.run_dir` came.

    Raises:
        InvalidRequest: it has another configuration; names the first field that differs.
    """
    run_dir = config.run_dir
    if not (run_dir / CONFIG_FILE).exists():
        return State.NEW
    _check_same(RunConfig.read(run_dir), config)
    if any(event == "done" for event, _ in _newest_events(run_dir)):
        return State.DONE
    return State.BEGUN if (run_dir / checkpoint.DIRECTORY / checkpoint.LATEST).exists() else State.BROKEN


def steps_of(config: RunConfig) -> int:
    """Environment steps of the whole run."""
    return len(config.games) * config.updates_per_game * config.steps_per_update


def steps_done(run_dir: Path) -> int:
    """Environment steps that the run has behind it, as its metrics say."""
    return max((step for _, step in _newest_events(run_dir)), default=0)


def run_all(configs: Sequence[RunConfig], *, jobs: int, watch: Callable[[Status], object] = lambda status: None) -> Outcome:
    """Makes all runs that are not done, in order, `jobs` at a time.

    Args:
        configs: the runs; their directories may hold what an earlier call left.
        jobs: processes at a time.
        watch: told the status, twice a second.

    Raises:
        InvalidRequest: a directory holds a run of another configuration; nothing was begun.
    """
    if jobs < 1:
        raise InvalidRequest(f"jobs: {jobs} is not at least 1")
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
                    failed[run_dir] = _last_words(run_dir, process.returncode)
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
                stopping = True  # Once: a second signal would keep them from saving.
                for _, process in running.values():
                    process.terminate()
            time.sleep(POLL_S)
        return Outcome(failed=failed, interrupted=bool(interrupted()))


def _start(config: RunConfig) -> subprocess.Popen[bytes]:
    """A process of its own session, so that Ctrl-C reaches the runner alone."""
    run_dir = config.run_dir
    if state_of(config) is State.BROKEN:
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *CHILD, str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads)}
    with (run_dir / LOG_FILE).open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # It ended already; its exit code says so.
        process.stdin.write(config.to_json().encode())
        process.stdin.close()
    return process


def _last_words(run_dir: Path, code: int) -> str:
    lines = (run_dir / LOG_FILE).read_text(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"ended with {code}: {said}"


def _newest_events(run_dir: Path) -> Iterator[tuple[str, int]]:
    """(event, step) of the last events in the metrics."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in lines[:-1]:
        with suppress(ValueError):  # The first may begin in its middle.
            event = json.loads(line)
            yield event["event"], int(event["step"])


def _check_same(found: RunConfig, wanted: RunConfig) -> None:
    # A directory may be named from elsewhere than where the run was made, and with it the trace in it.
    here, there = (_flat(asdict(config) | {"run_dir": "", "trace": config.trace and Path(config.trace).name}) for config in (found, wanted))
    for name, value in there.items():
        if here.get(name) != value:
            raise InvalidRequest(
                f"{wanted.run_dir}: it was made with {name} {here.get(name)}, not {value}; move it away, or give another --runs"
            )


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

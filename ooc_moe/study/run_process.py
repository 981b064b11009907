"""The process that makes one run of a study: it starts the run, or resumes it from its last checkpoint.

runner.py starts this process, and writes the run's configuration as JSON to its standard input: python -m ooc_moe.study.run_process RUN_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from ooc_moe.config.run import RunConfig
from ooc_moe.session.daemon import stop_with_parent
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe.study.runner import State, state_of
from ooc_moe_wire.errors import OocMoeError

NICENESS = 10


def main(run_dir: Path) -> int:
    """Makes the run in `run_dir`, with the configuration on standard input: trains from the start, or resumes from the last checkpoint.

    Returns:
        The exit code: 0 when the run is done, 130 when it was interrupted and has saved a checkpoint, 2 when it failed. The last line of a
            failed run's output is the error.
    """
    stop_with_parent()
    os.nice(NICENESS)
    config = RunConfig.from_json(sys.stdin.read(), run_dir)
    from ooc_moe.run import train as training  # Imports torch, which reads the number of threads that the runner has set.

    console = Console(width=140)
    try:
        if state_of(config) is State.BEGUN:
            training.resume(run_dir, console)
        else:
            training.train(config, console)
    except training.Interrupted as stop:
        console.print(str(stop), markup=False)
        return INTERRUPTED_EXIT
    except OocMoeError as error:
        print(f"{type(error).__name__}: {'; '.join((str(error), *getattr(error, '__notes__', ())))}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

"""The process of one run: begins it, or goes on from its last checkpoint. Its configuration comes as JSON on stdin.

Run by runner.py: python -m ooc_moe.study.run_process RUN_DIR
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
    """Returns the exit code: 0 done, 130 stopped with a checkpoint, 2 failed; what failed is the last line of the output."""
    stop_with_parent()
    os.nice(NICENESS)
    config = RunConfig.from_json(sys.stdin.read(), run_dir)
    from ooc_moe.run import train as training  # torch only now, with the threads that the runner allows.

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

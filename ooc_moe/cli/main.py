"""Runs the program `ooc-moe`: lists all its commands, and prints errors.

torch and the packages that need it are imported inside the commands that use them, so that help and statistics start at once.

Run: ooc-moe --help
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from ooc_moe.cli import bench, games, runs, simulate, store, study, train
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe_wire.command_line import Program, command_of
from ooc_moe_wire.errors import OocMoeError

# Packages of the train extra. ale-py and the benchmarks' peers have error messages of their own where they are missing.
_TRAIN_EXTRA = {"torch", "gymnasium", "matplotlib", "jinja2", "tensorboard", "scipy"}

PROGRAM = Program(
    name="ooc-moe",
    description="""Out-of-core mixture of experts: learns games one after another with experts that live in a storage daemon.

    $ ooc-moe train --games krull,road_runner --preset demo --name first
    $ ooc-moe eval runs/first
    $ ooc-moe report runs/first --open
    $ ooc-moe stats --watch

    Completion for bash (also zsh, fish, tcsh):

    $ source <(ooc-moe --tyro-print-completion bash)

    ooc-moe --version prints the version.
    """,
    version=lambda: version("ooc-moe"),
    commands={
        "train": train.TRAIN,
        "config show": train.CONFIG_SHOW,
        "games": command_of(games.Games),
        "branch": command_of(runs.Branch),
        "eval": runs.EVAL,
        "report": command_of(runs.Report),
        "stats": command_of(store.Stats),
        "bank ls": command_of(store.BankList),
        "bank show": command_of(store.BankShow),
        "bank rm": command_of(store.BankRemove),
        "bank fork": command_of(store.BankFork),
        "snapshot ls": command_of(store.SnapshotList),
        "snapshot create": command_of(store.SnapshotCreate),
        "snapshot restore": command_of(store.SnapshotRestore),
        "snapshot rm": command_of(store.SnapshotRemove),
        "simulate": simulate.SIMULATE,
        "plan": simulate.PLAN,
        "study": command_of(study.StudyCommand),
        "bench store": bench.STORE,
        "bench cache": bench.CACHE,
        "bench learning": bench.LEARNING,
        "bench policies": command_of(bench.PoliciesCommand),
    },
    topics={
        "config": "Show the settings of a run before it starts.",
        "bank": "List, show, remove and fork banks of experts.",
        "snapshot": "List, create, restore and remove snapshots of banks.",
        "bench": "Measure the daemon, the cache, its layer, the learner and cache policies, each compared with its peers.",
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name (by default those of the process), and exits with its exit code.

    An error of the caller, a missing extra, or a failure of the daemon or the disk is printed as one line, with exit code 2. An error of
    this program keeps its traceback.
    """
    try:
        code = PROGRAM.run(sys.argv[1:] if arguments is None else list(arguments))
    except OocMoeError as error:
        _fail("; ".join((str(error), *getattr(error, "__notes__", ()))))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_EXTRA:
            raise
        _fail(f"{error.name} is not installed, which this command needs: pip install 'ooc-moe[train]'")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED_EXIT) from None
    except BrokenPipeError:  # The reader of our output, such as head, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    raise SystemExit(code)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

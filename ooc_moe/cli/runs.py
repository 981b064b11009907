"""The commands on a run that exists: `branch` begins another run from it, `eval` plays its games, and `report` writes its report."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ooc_moe.cli.options import OldRunOptions, options_of_run
from ooc_moe.cli.output import say
from ooc_moe_wire.command_line import Command, Flag, Group, Parsed, options_of

RunDir = Annotated[Path, Flag(positional=True, metavar="RUN_DIR")]
# The options of `train` that an evaluation may set anew.
EVALUATION = ("plane", "eval_envs", "eval_episodes", "eval_steps", "eval_unseen", "recognise")

EVAL_HELP = """Play the games of a run from its last checkpoint, without telling the agent which game it sees.

$ ooc-moe eval runs/first --eval-envs 16 --eval-steps 5000
$ ooc-moe eval runs/first --constants
"""


@dataclass(frozen=True, kw_only=True)
class Branch(OldRunOptions):
    """Make a new run that begins from a checkpoint of another run, with its dense parameters and experts. Experts' bytes are not copied.

    Another second game after the first one:

    $ ooc-moe branch runs/first runs/second --checkpoint 0-krull --games boxing
    $ ooc-moe train --resume --name second
    """

    run_dir: RunDir
    """Directory of the run to begin from."""
    new_dir: Annotated[Path, Flag(positional=True, metavar="NEW_DIR")]
    """Directory of the new run."""
    checkpoint: str = "latest"
    """Checkpoint of the old run that the new one begins from."""
    games: tuple[str, ...] = ()
    """Games to learn from there on; by default those of the old run."""

    def run(self) -> None:
        """Makes the new run, and prints how to continue it."""
        from ooc_moe.run.branch import branch

        branch(self.run_dir, self.new_dir, self.checkpoint, games=self.games, store=self.store)
        say(f"made {self.new_dir}; continue with ooc-moe train --resume --run-dir {self.new_dir}")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(OldRunOptions):
    """The options of `eval` that are not options of `train`."""

    run_dir: RunDir
    """Directory of the run."""
    constants: bool = False
    """Also play each of the 18 actions held for a whole episode, and keep the best result for ooc-moe report. It takes as long as 20
    evaluations of each game, once."""


def eval_groups() -> list[Group]:
    """Returns the options of `eval`: the options of `train` about evaluation, and the options that only `eval` has."""
    own = options_of(EvalOptions)
    return [Group(title="", options=(*own[:1], *options_of_run(*EVALUATION), *own[1:]))]


def evaluate(parsed: Parsed) -> None:
    """Carries out the command `eval`: plays the games of a run with the agent of a checkpoint, and prints its scores."""
    from ooc_moe.evaluation.evaluate import evaluate_run

    chosen = parsed.part(EvalOptions)
    given = {name: parsed.values[name] for name in EVALUATION if parsed.values[name] is not None}
    evaluate_run(chosen.run_dir, Console(), store=chosen.store, constants=chosen.constants, **given)


EVAL = Command(description=EVAL_HELP, groups=eval_groups, run=evaluate)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a run: one HTML file that needs no other file, and its charts as PNG files.

    $ ooc-moe report runs/first --open
    $ ooc-moe report runs/first --single-task runs/only-krull --single-task runs/only-boxing
    """

    run_dir: RunDir
    """Directory of the run, finished or not."""
    open_it: Annotated[bool, Flag(name="open")] = False
    """Open the report in the browser."""
    single_task: Annotated[tuple[Path, ...], Flag(metavar="RUN_DIR")] = ()
    """Runs that learned one of the games alone, by the same protocol. The scores are measured by theirs; without them, by the run's own
    best. May be repeated."""

    def run(self) -> None:
        """Writes the report, prints its path, and opens it in the browser with --open."""
        from ooc_moe.report.report import write_report

        path = write_report(self.run_dir, self.single_task)
        say(f"report: {path}")
        if self.open_it:
            webbrowser.open(path.resolve().as_uri())

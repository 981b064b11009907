"""The commands on a run that exists: `branch` begins another run from it, `eval` plays its games, and `report` writes its report."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from ooc_moe.cli.options import OldRunOptions, PlaneOption
from ooc_moe.cli.output import say
from ooc_moe.config.run import Recogniser
from ooc_moe_wire.command_line import Flag

RunDir = Annotated[Path, Flag(positional=True, metavar="RUN_DIR")]


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
class Evaluate(OldRunOptions, PlaneOption):
    """Play the games of a run from its last checkpoint, without telling the agent which game it sees.

    $ ooc-moe eval runs/first --eval-envs 16 --eval-steps 5000
    $ ooc-moe eval runs/first --constants
    """

    run_dir: RunDir
    """Directory of the run."""
    eval_envs: int | None = None
    """Environments to play in parallel; by default as in the run, like the two options below."""
    eval_episodes: int | None = None
    """Episodes to play one after another in each environment."""
    eval_steps: int | None = None
    """Most steps in each environment, over all its episodes of a game."""
    eval_unseen: bool = False
    """Also play those games of the run that it has not learned yet."""
    recognise: Recogniser | None = None
    """What tells which game is on the screen; by default as in the run."""
    constants: bool = False
    """Also play each of the 18 actions held for a whole episode, and keep the best result for ooc-moe report. It takes as long as 20
    evaluations of each game, once."""

    def run(self) -> None:
        """Plays the games of the run and prints the results."""
        from ooc_moe.evaluation.evaluate import evaluate_run

        optional: dict[str, Any] = {name: getattr(self, name) for name in ("eval_envs", "eval_episodes", "eval_steps", "recognise")}
        given = {name: value for name, value in optional.items() if value is not None}
        evaluate_run(
            self.run_dir, Console(), store=self.store, plane=self.plane, eval_unseen=self.eval_unseen, constants=self.constants, **given
        )


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

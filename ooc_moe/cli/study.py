"""The command `study`: makes the many runs of a study, and writes what they show. Listing studies and variants needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import Column, print_records
from ooc_moe.display.formats import format_count
from ooc_moe.display.progress import lasting_bars
from ooc_moe.display.table import print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import InvalidRequest, require_at_least

if TYPE_CHECKING:
    from ooc_moe.study.runner import Outcome, Status
    from ooc_moe.study.study import Study, StudyRun


STUDY_COLUMNS = (
    Column("study", "study"),
    Column("asks", "asks"),
    Column("runs", "runs", right=True),
    Column("steps", "steps", lambda steps: f"{steps / 1e6:.1f} M", right=True),
)
VARIANT_COLUMNS = (Column("variant", "variant"), Column("is", "is"))
RUN_COLUMNS = (
    Column("variant", "variant"),
    Column("order", "order"),
    Column("seed", "seed", right=True),
    Column("steps_done", "steps", format_count, right=True),
    Column("steps", "of", format_count, right=True),
    Column("state", "state"),
)


@dataclass(frozen=True, kw_only=True)
class StudyCommand(JsonOption):
    """Test what this project claims: games separate into experts of their own, which cache well and are not forgotten.

    A study is a list of runs that differ in the variant of the recipe, the order of the games, and the seed. ooc-moe report works on each
    of the runs.

    The results are written to NAME.md (tables, and verdicts whose rules are in the code), NAME_*.png and NAME.json, also while some runs
    are missing.

    Ctrl-C saves all runs. The same command continues them, and skips the runs that are done.

    $ ooc-moe study                              # all studies and variants
    $ ooc-moe study synthetic --dry-run          # its runs
    $ ooc-moe study synthetic --variants full,dense --seeds 1
    $ ooc-moe study synthetic --jobs 2           # the rest
    $ ooc-moe study synthetic --tables-only
    """

    name: Annotated[str | None, Flag(positional=True, metavar="NAME")] = None
    """Name of the study; without a name, all studies and variants are listed."""
    variants: tuple[str, ...] = ()
    """Make only the runs of these variants."""
    seeds: int | None = None
    """Make the runs of at most this many seeds of each variant."""
    jobs: int = 2
    """Runs at a time, each with one torch thread."""
    steps_per_game: int | None = None
    """Environment steps in each game; by default as many as the study says."""
    runs: Annotated[Path, Flag(metavar="DIR")] = Path("runs")
    """Directory of the runs, which are kept below it in studies/NAME."""
    results: Annotated[Path | None, Flag(metavar="DIR", default="RUNS/studies")] = None
    """Directory for tables, figures and numbers."""
    dry_run: bool = False
    """Only list the runs, and how far each has come."""
    tables_only: bool = False
    """Make no run; only write the results of the runs that exist."""

    def run(self) -> int:
        """Carries out the command: lists the studies, lists the runs of one, or makes its runs and writes their results.

        Returns the exit code.
        """
        from ooc_moe.study.studies import find_study

        if self.name is None:
            list_studies(as_json=self.as_json)
            return 0
        require_at_least(1, jobs=self.jobs, seeds=self.seeds, steps_per_game=self.steps_per_game)
        study = find_study(self.name)
        wanted = study.runs(self.runs / "studies", variants=self.variants, seeds=self.seeds, steps_per_game=self.steps_per_game)
        if self.dry_run:
            print_records(RUN_COLUMNS, [_run_record(run) for run in wanted], as_json=self.as_json)
            return 0
        return self._make_and_write(study, wanted)

    def _make_and_write(self, study: Study, wanted: list[StudyRun]) -> int:
        console = Console()
        outcome = None if self.tables_only else _make(study, wanted, self.jobs, console)
        if outcome is None or not outcome.interrupted:
            # The results are those of the whole study, not only of the runs of this call.
            everything = study.runs(self.runs / "studies", steps_per_game=self.steps_per_game)
            study_dir = self.runs / "studies" / study.name
            _write_results(study, everything, study_dir, self.results or self.runs / "studies", console)
        return 0 if outcome is None else _report(outcome, console)


def list_studies(*, as_json: bool) -> None:
    """Prints all studies, and all variants of the training recipe that they compare: as JSON or as two tables."""
    from ooc_moe.study.studies import STUDIES
    from ooc_moe.study.variants import VARIANTS

    studies = [_study_record(study) for study in STUDIES.values()]
    variants = [{"variant": variant.name, "is": variant.says} for variant in VARIANTS.values()]
    if as_json:
        print(json.dumps({"studies": studies, "variants": variants}, indent=2))
        return
    print_records(STUDY_COLUMNS, studies)
    print()
    print_records(VARIANT_COLUMNS, variants)


def _study_record(study: Study) -> dict[str, Any]:
    configs = [run.config for run in study.runs(Path())]
    steps = sum(len(config.games) * config.updates_per_game * config.steps_per_update for config in configs)
    return {"study": study.name, "asks": study.asks, "runs": len(configs), "steps": steps}


def _run_record(run: StudyRun) -> dict[str, Any]:
    from ooc_moe.study.runner import state_of, steps_done, steps_of

    try:
        state = state_of(run.config).value
    except InvalidRequest as error:
        state = str(error).partition(": ")[2]  # The record has the run's name already.
    return {
        "variant": run.variant,
        "order": run.order,
        "seed": run.config.seed,
        "steps_done": steps_done(run.config.run_dir),
        "steps": steps_of(run.config),
        "state": state,
    }


def _make(study: Study, wanted: list[StudyRun], jobs: int, console: Console) -> Outcome:
    from ooc_moe.study.runner import run_all

    if study.recipe.device != "cpu":
        from ooc_moe.session.session import check_device

        check_device(study.recipe.device)
    with lasting_bars(console) as progress:
        bars = _Bars(progress, study.name, wanted)
        return run_all([run.config for run in wanted], jobs=jobs, watch=bars.show)


class _Bars:
    """The progress bars of a study: one for the whole study, and one for each run in progress."""

    def __init__(self, progress: Progress, name: str, wanted: list[StudyRun]) -> None:
        self._progress = progress
        self._runs = {run.config.run_dir: run for run in wanted}
        self._overall = progress.add_task(name, total=None, note="", visible=False)  # Hidden until the runs have been checked.
        self._bars: dict[Path, TaskID] = {}

    def show(self, status: Status) -> None:
        """Brings the bars up to date with `status`, which says how far each run has come."""
        from ooc_moe.study.runner import steps_of

        failed = f", {status.failed} failed" if status.failed else ""
        note = f"{status.done} of {status.total} runs{failed}"
        self._progress.update(self._overall, completed=status.steps_done, total=status.steps_total, note=note, visible=True)
        for run_dir in [run_dir for run_dir in self._bars if run_dir not in status.running]:
            self._progress.remove_task(self._bars.pop(run_dir))
        for run_dir, steps in status.running.items():
            if run_dir not in self._bars:
                run = self._runs[run_dir]
                self._bars[run_dir] = self._progress.add_task(run.label, total=steps_of(run.config), note="")
            self._progress.update(self._bars[run_dir], completed=steps)


def _report(outcome: Outcome, console: Console) -> int:
    """Prints which runs of a study failed, and, if it was interrupted, how to continue. Returns the exit code."""
    from ooc_moe.study.runner import LOG_FILE

    for run_dir, message in outcome.failed.items():
        console.print(f"failed: {run_dir}: {message} (its whole output: {LOG_FILE} there)", style="red", markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print(f"stopped; every run saved a checkpoint. Continue with: {command_given()}", markup=False, soft_wrap=True)
        return INTERRUPTED_EXIT
    return 1 if outcome.failed else 0


def _write_results(study: Study, runs: list[StudyRun], study_dir: Path, results: Path, console: Console) -> None:
    """Writes the results of a study, from the runs that exist: its page, charts and numbers. Prints the first tables and the verdicts."""
    from ooc_moe.evaluation.baselines import play_constants
    from ooc_moe.metrics import baselines
    from ooc_moe.study.result_files import write
    from ooc_moe.study.results import results_of

    with console.status("") as status:

        def say(game: str, done: int, of: int) -> None:
            status.update(f"constant actions in {game}: {done} of {of}")

        constants = play_constants(study.games, study.recipe, study_dir / baselines.DIRECTORY, say)
    found = results_of(study, runs, constants)
    for table in found.tables[:2]:
        print_table(table, console)
        console.print()
    for verdict in found.verdicts:
        console.print(f"{verdict.part}: {verdict.word}. {verdict.says}", markup=False, soft_wrap=True)
    if found.found.missing:
        console.print(f"{len(found.found.missing)} of {len(runs)} runs are missing", style="yellow")
    # The page names the command that would make its runs.
    for path in write(found, results, command=command_given().replace(" --tables-only", "")):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)

"""`ooc-moe study`: many runs and what they show. Listing studies and variants needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import TaskID

from ooc_moe.cli.words import words
from ooc_moe.display.progress import lasting_bars
from ooc_moe.display.table import Table, print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from ooc_moe.study.runner import Outcome, Status
    from ooc_moe.study.study import Study, StudyRun
    from ooc_moe.study.variants import Variant


def study(
    name: Annotated[str | None, typer.Argument(help="Which study; without it, all are listed, and the variants.", metavar="NAME")] = None,
    variants: Annotated[str, typer.Option(help="Make only these variants' runs.", metavar="A,B,C")] = "",
    seeds: Annotated[int | None, typer.Option(help="Make the runs of at most so many seeds of each variant.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each with one torch thread.")] = 2,
    steps_per_game: Annotated[int | None, typer.Option(help="Environment steps in each game, instead of the study's own.")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept, below studies/NAME.", metavar="DIR")] = Path("runs"),
    results: Annotated[
        Path | None, typer.Option(help="Where tables, figures and numbers are written; below RUNS/studies if not said.", metavar="DIR")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs, and how far each came.")] = False,
    tables_only: Annotated[bool, typer.Option("--tables-only", help="Make no run; write what the present ones show.")] = False,
) -> None:
    """Test what this project claims: games separate into experts of their own, which cache well and are not forgotten.

    A study is a list of runs: variants of the recipe, orders of the games, seeds. ooc-moe report works on each of them.

    What they show is written to NAME.md (tables, and verdicts whose rules stand in code), NAME_*.png and NAME.json, as far as they are.

    Ctrl-C saves all runs; the same command goes on, and leaves alone what is done.

    \b
    $ ooc-moe study                              # all studies and variants
    $ ooc-moe study synthetic --dry-run          # its runs
    $ ooc-moe study synthetic --variants full,dense --seeds 1
    $ ooc-moe study synthetic --jobs 2           # the rest
    $ ooc-moe study synthetic --tables-only
    """
    from ooc_moe.study.studies import STUDIES, find_study
    from ooc_moe.study.variants import VARIANTS

    console = Console()
    if name is None:
        print_table(_list_of(list(STUDIES.values())), console)
        console.print()
        print_table(_table_of_variants(list(VARIANTS.values())), console)
        return
    _at_least_one("jobs", jobs)
    chosen = find_study(name)
    wanted = chosen.runs(
        runs / "studies",
        variants=words(variants),
        seeds=_at_least_one("seeds", seeds),
        steps_per_game=_at_least_one("steps_per_game", steps_per_game),
    )
    if dry_run:
        print_table(_table_of(wanted), console)
        return
    outcome = None if tables_only else _make(chosen, wanted, jobs, console)
    if outcome is not None and outcome.interrupted:
        _say(outcome, console)
    # Of all runs, not only those of this call: the results stand for the whole study.
    everything = chosen.runs(runs / "studies", steps_per_game=steps_per_game)
    _write_home(chosen, everything, runs / "studies" / chosen.name, results or runs / "studies", console)
    if outcome is not None:
        _say(outcome, console)


def _make(chosen: Study, wanted: list[StudyRun], jobs: int, console: Console) -> Outcome:
    from ooc_moe.study.runner import run_all

    if chosen.recipe.device != "cpu":
        from ooc_moe.session.session import check_device

        check_device(chosen.recipe.device)
    labels = {run.config.run_dir: run.label for run in wanted}
    with lasting_bars(console) as progress:
        overall = progress.add_task(chosen.name, total=None, note="", visible=False)  # Until no run was refused.
        bars: dict[Path, TaskID] = {}
        sizes = {run.config.run_dir: run.config for run in wanted}

        def watch(status: Status) -> None:
            from ooc_moe.study.runner import steps_of

            failed = f", {status.failed} failed" if status.failed else ""
            note = f"{status.done} of {status.total} runs{failed}"
            progress.update(overall, completed=status.steps_done, total=status.steps_total, note=note, visible=True)
            for run_dir in [run_dir for run_dir in bars if run_dir not in status.running]:
                progress.remove_task(bars.pop(run_dir))
            for run_dir, steps in status.running.items():
                if run_dir not in bars:
                    bars[run_dir] = progress.add_task(labels[run_dir], total=steps_of(sizes[run_dir]), note="")
                progress.update(bars[run_dir], completed=steps)

        return run_all([run.config for run in wanted], jobs=jobs, watch=watch)


def _say(outcome: Outcome, console: Console) -> None:
    from ooc_moe.study.runner import LOG_FILE

    for run_dir, said in outcome.failed.items():
        console.print(f"failed: {run_dir}: {said} (all that it said: {LOG_FILE} there)", style="red", markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print(f"stopped; every run saved a checkpoint. Go on with: {command_given()}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED_EXIT)
    if outcome.failed:
        raise typer.Exit(1)


def _write_home(chosen: Study, wanted: list[StudyRun], study_dir: Path, results: Path, console: Console) -> None:
    from ooc_moe.evaluation.baselines import play_constants
    from ooc_moe.metrics import baselines
    from ooc_moe.study.result_files import write
    from ooc_moe.study.results import results_of

    with console.status("") as status:

        def say(game: str, done: int, of: int) -> None:
            status.update(f"constant actions in {game}: {done} of {of}")

        constants = play_constants(chosen.games, chosen.recipe, study_dir / baselines.DIRECTORY, say)
    found = results_of(chosen, wanted, constants)
    for table in found.tables[:2]:
        print_table(table, console)
        console.print()
    for verdict in found.verdicts:
        console.print(f"{verdict.part}: {verdict.word}. {verdict.says}", markup=False, soft_wrap=True)
    if found.found.missing:
        console.print(f"{len(found.found.missing)} of {len(wanted)} runs are missing", style="yellow")
    for path in write(found, results, command=command_given().replace(" --tables-only", "")):  # What would make it anew.
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _list_of(studies: list[Study]) -> Table:
    rows = []
    for each in studies:
        configs = [run.config for run in each.runs(Path())]
        steps = sum(len(config.games) * config.updates_per_game * config.steps_per_update for config in configs)
        rows.append((each.name, each.asks, str(len(configs)), f"{steps / 1e6:.1f} M"))
    return Table("", ("study", "asks", "runs", "steps"), rows, alignment="llrr")


def _table_of_variants(variants: list[Variant]) -> Table:
    return Table("", ("variant", "is"), [(each.name, each.says) for each in variants], alignment="ll")


def _table_of(wanted: list[StudyRun]) -> Table:
    from ooc_moe.study.runner import state_of, steps_done, steps_of

    rows = []
    for run in wanted:
        try:
            state = state_of(run.config).value
        except InvalidRequest as error:
            state = str(error).partition(": ")[2]  # The row says where.
        steps = [f"{count:,}" for count in (steps_done(run.config.run_dir), steps_of(run.config))]
        rows.append((run.variant, run.order, str(run.config.seed), *steps, state))
    return Table("", ("variant", "order", "seed", "steps", "of", "state"), rows, alignment="llrrrl")


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InvalidRequest(f"{name}: {value} is not at least 1")
    return value

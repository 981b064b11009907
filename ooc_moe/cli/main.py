"""The command `ooc-moe`: flags become configurations, errors become one line and exit code 2.

The commands that speak to a daemon (stats, bank, snapshot) are in cli_store.py, those that measure (bench) in cli_bench.py, those that
predict (simulate, plan) in cli_simulate.py, and study in cli_study.py. torch and what needs it are imported inside the commands that use
them, so that help and statistics answer at once.

Run: ooc-moe --help
"""

from __future__ import annotations

import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ooc_moe.cli import bench as cli_bench
from ooc_moe.cli import simulate as cli_simulate
from ooc_moe.cli import store as cli_store
from ooc_moe.cli import study as cli_study
from ooc_moe.cli.words import words
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe_wire.errors import InvalidRequest, OocMoeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich")
app.command()(cli_store.stats)
app.add_typer(cli_store.bank_app, name="bank")
app.add_typer(cli_store.snapshot_app, name="snapshot")
app.add_typer(cli_bench.bench_app, name="bench")
app.command()(cli_simulate.simulate)
app.command()(cli_simulate.plan)
app.command()(cli_study.study)

# What the commands that train, evaluate, report and measure import; ale-py and the benchmarks' peers speak for themselves where they lack.
_TRAIN_EXTRA = {"torch", "gymnasium", "matplotlib", "jinja2", "scipy", "tensorboard"}
_RESUME_FLAGS = {"resume", "checkpoint", "run_dir", "name", "store", "plane", "quiet"}
_AGENT, _DETECTOR, _PPO = "The agent (what is not given is as in the preset; demo's is shown)", "Recognising the game", "Learning"
_DEMO = PRESETS["demo"]
_RUN = RunConfig(run_dir=Path("run"), games=("krull",), agent=_DEMO)
PLANE = typer.Option(
    help="How experts travel: over the connection, through memory that a daemon on this host shares, or so where possible (auto, unless "
    "the run says otherwise).",
    metavar="stream|local|auto",
)


def _option(help: str, default: object, *flags: str, metavar: str | None = None, panel: str | None = None) -> Any:
    """An option for a field of a configuration; `default` is the field's own, and only shown."""
    return typer.Option(*flags, help=f"{help} \\[default: {default}]", metavar=metavar, rich_help_panel=panel)


@app.callback()
def _program() -> None:
    """Out-of-core mixture of experts: learns games one after another with experts that live in a storage daemon.

    \b
    $ ooc-moe train --games krull,road_runner --preset demo --name first
    $ ooc-moe eval runs/first
    $ ooc-moe report runs/first --open
    $ ooc-moe stats --watch
    """


@app.command()
def train(
    context: typer.Context,
    games: Annotated[str, typer.Option(help="Learned one after another.", metavar="A,B,C")] = "",
    preset: Annotated[str, typer.Option(help="Sizes of the agent: tiny, demo or full.")] = "demo",
    name: Annotated[str | None, typer.Option(help="The run is runs/NAME; made of preset and time if not given.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's directory, instead of --name.", metavar="DIR")] = None,
    steps_per_game: Annotated[int | None, _option("Environment steps in each game.", _RUN.steps_per_game)] = None,
    seed: Annotated[int | None, _option("Of everything random.", _RUN.seed)] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="The storage daemon: HOST:PORT or unix:PATH. Without it, the run starts one of its own on its directory.",
            metavar="ADDRESS",
        ),
    ] = None,
    plane: Annotated[str | None, PLANE] = None,
    from_bank: Annotated[str | None, typer.Option(help="Begin with this bank's experts.", metavar="BANK")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --name or --run-dir.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="With --resume: go back to this one of the run's checkpoints, and drop what came after it.", metavar="NAME"),
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("Updates between checkpoints; 0: at the end of each game only.", _RUN.checkpoint_every)
    ] = None,
    eval_envs: Annotated[int | None, _option("Environments of an evaluation, played side by side.", _RUN.eval_envs)] = None,
    eval_episodes: Annotated[
        int | None, _option("Episodes that each of them plays of a game, one after another.", _RUN.eval_episodes)
    ] = None,
    eval_steps: Annotated[
        int | None, _option("The most steps of each of them, over all its episodes of a game; 0: no evaluation.", _RUN.eval_steps)
    ] = None,
    eval_unseen: Annotated[bool, typer.Option("--eval-unseen", help="Evaluate the games still to come, too (forward transfer).")] = False,
    switch_every: Annotated[
        int | None,
        _option("Updates in a game before the next one's turn; 0: all of a game's at once; 1: joint training.", _RUN.switch_every),
    ] = None,
    device: Annotated[str | None, _option("cpu or cuda.", _RUN.device)] = None,
    threads: Annotated[int | None, _option("Torch's threads.", _RUN.threads)] = None,
    trace: Annotated[Path | None, typer.Option(help="Record which experts are asked for, for ooc-moe simulate.", metavar="FILE")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    frame_size: Annotated[int | None, _option("Height and width of a frame in pixels.", _DEMO.frame_size, panel=_AGENT)] = None,
    num_experts: Annotated[int | None, _option("Experts of each bank at the start.", _DEMO.num_experts, "--experts", panel=_AGENT)] = None,
    grow: Annotated[bool | None, _option("Make a bank larger when a new game finds no pool free.", _DEMO.grow, panel=_AGENT)] = None,
    hbm_experts: Annotated[int | None, _option("Experts that fit into the HBM cache.", _DEMO.hbm_experts, panel=_AGENT)] = None,
    dram_experts: Annotated[
        int | None, _option("Experts that fit into the DRAM of the run's own daemon.", _DEMO.dram_experts, panel=_AGENT)
    ] = None,
    prefetch: Annotated[
        str | None, _option("Who names the experts to bring ahead.", _RUN.prefetch, metavar="off|detector|schedule", panel=_AGENT)
    ] = None,
    prefetch_admission: Annotated[
        str | None,
        _option(
            "Speculation that has no slot to spare, or cannot come in time: fetched, fetched and counted, or dropped.",
            _RUN.prefetch_admission,
            metavar="off|observe|enforce",
            panel=_AGENT,
        ),
    ] = None,
    protection: Annotated[
        str | None,
        _option("How later games leave alone what all share.", _RUN.protection, metavar="replay|freeze|ewc|clone|none", panel=_AGENT),
    ] = None,
    protection_weight: Annotated[
        float | None, typer.Option(help="Weight of the protection's loss, if not its own default.", rich_help_panel=_AGENT)
    ] = None,
    routing: Annotated[
        str | None, _option("Inside the game's pool, or among all experts.", _DEMO.routing, metavar="pool|token", panel=_AGENT)
    ] = None,
    pool_size: Annotated[int | None, _option("Experts that a game owns in each pool.", _DEMO.pool_size, panel=_AGENT)] = None,
    shared_experts: Annotated[
        int | None, _option("Older games' experts that a new pool borrows, to read.", _DEMO.shared_experts, panel=_AGENT)
    ] = None,
    pools: Annotated[
        str | None, _option("One pool of a game for all layers, or one each.", _DEMO.pools, metavar="shared|per-layer", panel=_AGENT)
    ] = None,
    attention: Annotated[
        str | None, _option("Whose attention a game uses.", _DEMO.attention, metavar="per-game|shared", panel=_AGENT)
    ] = None,
    banks: Annotated[
        str | None, _option("One bank for all layers, or one each.", _DEMO.banks, metavar="shared|per-layer", panel=_AGENT)
    ] = None,
    router_noise: Annotated[
        float | None, _option("Noise on the router's choice, in training; 0: none.", _DEMO.router_noise, panel=_AGENT)
    ] = None,
    balance_weight: Annotated[
        float | None, _option("Weight of the load-balancing loss; 0: none.", _DEMO.balance_weight, panel=_AGENT)
    ] = None,
    recognise: Annotated[
        str | None,
        _option(
            "Who tells evaluation which game is on the screen.", _RUN.recognise, metavar="detector|nearest-mean|oracle", panel=_DETECTOR
        ),
    ] = None,
    exemplars_per_game: Annotated[
        int | None,
        _option("Frames of each game that the detector stores and rehearses; 0: none.", _RUN.exemplars_per_game, panel=_DETECTOR),
    ] = None,
    detect_unknown: Annotated[bool | None, _option("Notice frames that show no known game.", _RUN.detect_unknown, panel=_DETECTOR)] = None,
    belief_smoothing: Annotated[
        float | None, _option("How much of a belief outlives a frame; 0: no smoothing.", _RUN.belief_smoothing, panel=_DETECTOR)
    ] = None,
    belief_switch_at: Annotated[
        float | None,
        _option("Probability that another game needs to be believed; 0: no hysteresis.", _RUN.belief_switch_at, panel=_DETECTOR),
    ] = None,
    envs: Annotated[int | None, _option("Environments played side by side.", _RUN.ppo.num_envs, panel=_PPO)] = None,
    rollout: Annotated[int | None, _option("Steps of each environment between updates.", _RUN.ppo.rollout_steps, panel=_PPO)] = None,
    epochs: Annotated[int | None, _option("Passes over a rollout.", _RUN.ppo.epochs, panel=_PPO)] = None,
    lr: Annotated[float | None, _option("Adam's learning rate.", _RUN.ppo.learning_rate, panel=_PPO)] = None,
    anneal: Annotated[bool | None, _option("Let the learning rate fall to zero in each game.", _RUN.ppo.anneal, panel=_PPO)] = None,
    replay_routing: Annotated[
        bool | None, _option("Send tokens, in an update, where they went in the rollout.", _RUN.ppo.replay_routing, panel=_PPO)
    ] = None,
) -> None:
    """Learn games one after another, evaluate after each, and write a report.

    Three Atari games, with a storage daemon that the run starts and stops itself:

    \b
    $ ooc-moe train --games krull,road_runner,crazy_climber --name first

    The same against a daemon elsewhere; Ctrl-C saves, --resume goes on:

    \b
    $ ooc-moe train --games krull,road_runner --store host:50051 --name second
    $ ooc-moe train --resume --name second

    Back to the end of the first game, and on from there (to keep what came after it, see ooc-moe branch):

    \b
    $ ooc-moe train --resume --name second --checkpoint 0-krull
    """
    from ooc_moe.run import train as training

    console = Console(quiet=quiet)
    directory = _run_dir(name, run_dir, preset, resume=resume)
    try:
        if resume:
            _refuse_flags_with_resume(context)
            training.resume(directory, console, store=store, plane=plane, name=checkpoint)
            return
        if checkpoint is not None:
            raise InvalidRequest(f"checkpoint: {checkpoint!r} needs --resume; ooc-moe branch begins another run from it")
        agent = {
            "frame_size": frame_size,
            "num_experts": num_experts,
            "grow": grow,
            "hbm_experts": hbm_experts,
            "dram_experts": dram_experts,
            "routing": routing,
            "banks": banks,
            "pool_size": pool_size,
            "shared_experts": shared_experts,
            "pools": pools,
            "attention": attention,
            "router_noise": router_noise,
            "balance_weight": balance_weight,
        }
        ppo = {
            "num_envs": envs,
            "rollout_steps": rollout,
            "epochs": epochs,
            "learning_rate": lr,
            "anneal": anneal,
            "replay_routing": replay_routing,
        }
        run = {
            "steps_per_game": steps_per_game,
            "seed": seed,
            "store": store,
            "plane": plane,
            "prefetch": prefetch,
            "prefetch_admission": prefetch_admission,
            "protection": protection,
            "protection_weight": protection_weight,
            "switch_every": switch_every,
            "recognise": recognise,
            "exemplars_per_game": exemplars_per_game,
            "detect_unknown": detect_unknown,
            "belief_smoothing": belief_smoothing,
            "belief_switch_at": belief_switch_at,
            "eval_unseen": True if eval_unseen else None,
            "eval_envs": eval_envs,
            "eval_episodes": eval_episodes,
            "eval_steps": eval_steps,
            "checkpoint_every": checkpoint_every,
            "from_bank": from_bank,
            "device": device,
            "threads": threads,
            "trace": None if trace is None else str(trace.absolute()),
        }
        training.train(_run_config(directory, _games(games), preset, agent=agent, ppo=ppo, run=run), console)
    except training.Interrupted as stop:
        console.print(str(stop), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(INTERRUPTED_EXIT) from None


@app.command()
def branch(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run to begin from.", metavar="RUN_DIR")],
    new_dir: Annotated[Path, typer.Argument(help="The directory of the new run.", metavar="NEW_DIR")],
    checkpoint: Annotated[str, typer.Option(help="Where it begins: one of the run's checkpoints.", metavar="NAME")] = "latest",
    games: Annotated[str, typer.Option(help="Learned from there on, instead of the run's own.", metavar="A,B,C")] = "",
    store: Annotated[str | None, typer.Option(help="The daemon's address, if it moved.", metavar="ADDRESS")] = None,
) -> None:
    """Make a new run of an old one's checkpoint, dense parameters and experts; the experts' bytes are shared, not copied.

    Another second game after the first one:

    \b
    $ ooc-moe branch runs/first runs/second --checkpoint 0-krull --games boxing
    $ ooc-moe train --resume --name second
    """
    from ooc_moe.run.branch import branch as branch_run

    branch_run(run_dir, new_dir, checkpoint, games=_games(games) if games else (), store=store)
    Console().print(f"made {new_dir}; go on with ooc-moe train --resume --run-dir {new_dir}", soft_wrap=True, markup=False, highlight=False)


@app.command(name="eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The run's directory.", metavar="RUN_DIR")],
    store: Annotated[str | None, typer.Option(help="The daemon's address, if it moved.", metavar="ADDRESS")] = None,
    plane: Annotated[str | None, PLANE] = None,
    eval_envs: Annotated[int | None, typer.Option(help="Environments, played side by side.")] = None,
    eval_episodes: Annotated[int | None, typer.Option(help="Episodes that each of them plays of a game, one after another.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="The most steps of each of them, over all its episodes of a game.")] = None,
    eval_unseen: Annotated[bool, typer.Option("--eval-unseen", help="Play the run's games that it has not learned yet, too.")] = False,
    recognise: Annotated[
        str | None, typer.Option(help="Who tells which game is on the screen.", metavar="detector|nearest-mean|oracle")
    ] = None,
    constants: Annotated[
        bool,
        typer.Option(
            "--constants",
            help="Play each of the 18 actions held for ever, too, and keep what the best is worth for ooc-moe report. It takes as long as "
            "20 evaluations of each game, once.",
        ),
    ] = False,
) -> None:
    """Play the games of a run from its last checkpoint, without telling the agent which is which.

    \b
    $ ooc-moe eval runs/first --eval-envs 16 --eval-steps 5000
    $ ooc-moe eval runs/first --constants
    """
    from ooc_moe.evaluation.evaluate import evaluate_run

    given = _given(eval_envs=eval_envs, eval_episodes=eval_episodes, eval_steps=eval_steps, recognise=recognise)
    evaluate_run(run_dir, Console(), store=store, plane=plane, eval_unseen=eval_unseen, constants=constants, **given)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="The run's directory, finished or not.", metavar="RUN_DIR")],
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    single_task: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run that learned one of the games alone, by the same protocol, which its scores are then measured by; may be repeated. "
            "Without it, the run's own best measures them.",
            metavar="RUN_DIR",
        ),
    ] = None,
) -> None:
    """Write the report of a run: one HTML file that needs nothing else, and its pictures.

    \b
    $ ooc-moe report runs/first --open
    $ ooc-moe report runs/first --single-task runs/only-krull --single-task runs/only-boxing
    """
    from ooc_moe.report.report import write_report

    path = write_report(run_dir, single_task or ())
    Console().print(f"report: {path}", soft_wrap=True, markup=False, highlight=False)
    if show:
        webbrowser.open(path.resolve().as_uri())


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script.

    A mistake of the caller's, an extra that is not installed, or trouble with the daemon or the disk, is one line and exit code 2; a fault
    of ours keeps its traceback.
    """
    try:
        code = app(args=arguments if arguments is None else list(arguments), standalone_mode=False)
    except OocMoeError as error:
        _fail("; ".join((str(error), *getattr(error, "__notes__", ()))))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _TRAIN_EXTRA:
            raise
        _fail(f"{error.name} is not installed, which this command needs: pip install 'ooc-moe[train]'")
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except typer.TyperException as error:
        # Typer's own: an unknown flag, a word where a number should be. Without a message, help was printed.
        _fail(getattr(error, "format_message", error.__str__)())
    except typer.Abort:
        print("aborted", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _run_dir(name: str | None, run_dir: Path | None, preset: str, *, resume: bool) -> Path:
    if name is not None and run_dir is not None:
        raise InvalidRequest(f"name: {name!r} and run_dir: {run_dir} say two different things; give one")
    if run_dir is not None:
        return run_dir
    if (name is not None and Path(name).parts != (name,)) or name == "..":
        raise InvalidRequest(f"name: {name!r} is not the name of one directory below runs; --run-dir takes a path")
    if name is None and resume:
        raise InvalidRequest("resume: which run? Give its --name or --run-dir")
    return Path("runs") / (name if name is not None else f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")


def _games(text: str) -> tuple[str, ...]:
    games = words(text)
    if not games:
        raise InvalidRequest("games: which? Write for example --games krull,road_runner")
    if not all(games):
        raise InvalidRequest(f"games: {text!r} leaves a name empty; write for example --games krull,road_runner")
    return games


def _run_config(
    run_dir: Path, games: tuple[str, ...], preset: str, *, agent: dict[str, Any], ppo: dict[str, Any], run: dict[str, Any]
) -> RunConfig:
    """The configuration of the preset, with what was given in its place."""
    if preset not in PRESETS:
        raise InvalidRequest(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    return RunConfig(
        run_dir=run_dir, games=games, agent=replace(PRESETS[preset], **_given(**agent)), ppo=PPOConfig(**_given(**ppo)), **_given(**run)
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_flags_with_resume(context: typer.Context) -> None:
    """A run goes on as it began: flags that would be ignored are refused."""
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if name not in _RESUME_FLAGS and source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(f"resume: a run goes on as it began; leave out {option.opts[0]}")


if __name__ == "__main__":
    main()

"""The commands `simulate`, which replays recorded accesses to experts through tiers of other sizes, and `plan`, which predicts a run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from rich.console import Console

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import say
from ooc_moe.cli.settings import RunOptions, run_config, settings_of
from ooc_moe.display.progress import passing_bar
from ooc_moe.display.table import print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe.metrics.trace import Trace, read_trace, write_trace
from ooc_moe.simulate.replay import Prefetch, Source
from ooc_moe.simulate.sweep import DramPolicy, HbmPolicy, Row, Sweep, latency, markdown, run, seconds, table
from ooc_moe.simulate.synthetic_traces import SyntheticTraceConfig, make_trace
from ooc_moe_wire.command_line import Command, Flag, Group, Parsed, Setting, options_of
from ooc_moe_wire.errors import InvalidRequest, require_at_least

if TYPE_CHECKING:
    from ooc_moe.config.run import RunConfig
    from ooc_moe.simulate.plan import Rates

LATENCY = "dram=20us+12GB/s,nvme=80us+3GB/s"
# Fields of SyntheticTraceConfig for which a replay has an option of the same name, which counts for the made trace too.
_OF_REPLAY = ("switch_every", "expert_bytes", "seed")


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(JsonOption):
    """The options of `simulate` about the trace, the capacities and eviction policies of the tiers, and where results go."""

    file: Annotated[Path | None, Flag(positional=True, metavar="FILE")] = None
    """A trace that ooc-moe train --trace recorded."""
    hbm: Annotated[tuple[str, ...], Flag(metavar="N,P%,...")] = ("25%", "50%")
    """HBM capacities: experts, or shares of the experts in the trace."""
    dram: Annotated[str | None, Flag(metavar="N|P%")] = None
    """DRAM capacity, likewise; by default room for all experts."""
    policy: tuple[HbmPolicy, ...] = get_args(HbmPolicy)
    """HBM policies to compare; belady is the optimum."""
    dram_policy: DramPolicy = "lru"
    """DRAM policy."""
    switch_every: tuple[int, ...] = ()
    """Reorder the training into turns of this many accesses, one replay for each number; evaluation is left out. With --make: the turns
    of the trace that is made."""
    seed: int = 0
    """Seed of a made trace, and of random policies and prefetches."""
    plot: Annotated[Path | None, Flag(metavar="FILE.png")] = None
    """Draw hit rates over capacity and switch interval to this file."""
    results: Annotated[Path | None, Flag(metavar="FILE.md")] = None
    """Save the table to this file, as Markdown."""


@dataclass(frozen=True, kw_only=True)
class PrefetchOptions:
    """The options of `simulate` about prefetching: which sources are tried, and how good the simulated detector is."""

    prefetch: tuple[Source, ...] = ("perfect", "detector", "random")
    """Prefetch sources to try with the first policy, in addition to no prefetch."""
    prefetch_experts: int | None = None
    """Experts to prefetch at a switch; by default as many as HBM holds."""
    detect_after: int = 100
    """Accesses until the detector notices a switch."""
    detect_accuracy: float = 0.95
    """Probability that the detector names the right game."""


@dataclass(frozen=True, kw_only=True)
class LatencyOption:
    """The option `--latency`, which says how long it takes to load an expert from each tier."""

    latency: Annotated[str, Flag(metavar="TIER=T[+B/s],...")] = LATENCY
    """Time of a load from each tier: latency and bandwidth. A bandwidth that is not given is the default's."""


@dataclass(frozen=True, kw_only=True)
class TimeOptions(LatencyOption):
    """The options of `simulate` about time: how long loads of experts and computation take."""

    compute: Annotated[str, Flag(metavar="T")] = "100us"
    """Compute time of one access."""
    expert_bytes: int | None = None
    """Size of an expert; by default as in the trace."""


@dataclass(frozen=True, kw_only=True)
class MakeOption:
    """The option that makes a synthetic trace instead of replaying a recorded one."""

    make: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Make a trace, write it to this new file, and replay it."""


SIMULATE_HELP = """Replay a trace through HBM, DRAM and NVMe of any size, policy and latency. Needs no GPU and no torch.

What would a smaller cache have cost that run, and how far is LRU from the best possible? A trainer also evicts experts by the next uses
that its updates announce, which is not replayed: where a game does not fit into HBM, a trainer has more hits than LRU has here.

$ ooc-moe train --games krull,boxing --trace krull.trace
$ ooc-moe simulate krull.trace --hbm 4,8,16 --policy lru,s3fifo,belady --latency nvme=10ms

The same games, had they changed more often, with a picture:

$ ooc-moe simulate krull.trace --hbm 25%,50% --switch-every 100,1000,10000 --plot hits.png

Before there is a run: 57 games, 10,000 experts, ten million accesses:

$ ooc-moe simulate --make all.trace --hbm 2%,5% --dram 25% --policy lru,belady
$ ooc-moe simulate --make short.trace --accesses 1000000 --eval-every 20

One access is one expert of one layer call. A hit is an expert that was in HBM when it was needed; a prefetch that arrives late is a miss.
Belady knows the future but does not prefetch, so a prefetch can beat it.
"""


def simulate_groups() -> list[Group]:
    """Returns all options of `simulate`, in the groups of its help text."""
    return [
        Group(title="", options=options_of(ReplayOptions)),
        Group(title="Prefetch", options=options_of(PrefetchOptions)),
        Group(title="Time", options=options_of(TimeOptions)),
        Group(title="Made trace", options=(*options_of(MakeOption), *options_of(SyntheticTraceConfig, skip=_OF_REPLAY))),
    ]


def simulate(parsed: Parsed) -> None:
    """Carries out the command `simulate`: replays a trace, prints a row for each replay, and saves table and chart if asked to."""
    chosen = parsed.part(ReplayOptions)
    made = _made_trace(parsed, chosen)
    if (chosen.file is None) == (made is None):
        raise InvalidRequest("file: give a trace to replay, or --make FILE to make one")
    sweep = _sweep(chosen, parsed.part(PrefetchOptions), parsed.part(TimeOptions), is_made=made is not None)
    trace = _trace(chosen, made)
    rows = _replay(trace, sweep)
    if chosen.as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(table(trace, rows), Console())
    if chosen.results is not None:
        chosen.results.parent.mkdir(parents=True, exist_ok=True)
        chosen.results.write_text(markdown(trace, rows, command=command_given()))
    if chosen.plot is not None:
        from ooc_moe.simulate.chart import save_chart

        save_chart(chosen.plot, rows)


def _sweep(chosen: ReplayOptions, ahead: PrefetchOptions, times: TimeOptions, *, is_made: bool) -> Sweep:
    prefetches = [
        Prefetch(source=source, delay=ahead.detect_after, accuracy=ahead.detect_accuracy, experts_max=ahead.prefetch_experts)
        for source in ahead.prefetch
        if source != "none"
    ]
    return Sweep(
        hbm=chosen.hbm,
        dram=chosen.dram,
        policies=chosen.policy,
        dram_policy=chosen.dram_policy,
        prefetches=tuple(prefetches),
        # A trace that was made in these turns needs no reordering.
        switch_every=() if is_made and len(chosen.switch_every) == 1 else chosen.switch_every,
        latency=replace(latency(times.latency), compute_s=seconds("compute", times.compute)),
        expert_bytes=times.expert_bytes,
        seed=chosen.seed,
    )


def _made_trace(parsed: Parsed, chosen: ReplayOptions) -> tuple[Path, SyntheticTraceConfig] | None:
    """Returns the file of the trace to make, and its configuration; None if no trace is to be made."""
    path = parsed.part(MakeOption).make
    if path is None:
        return None
    fields = {each.name: parsed.values[each.name] for each in dataclasses.fields(SyntheticTraceConfig) if each.name not in _OF_REPLAY}
    config = SyntheticTraceConfig(**fields, seed=chosen.seed)
    return path, replace(config, switch_every=chosen.switch_every[0]) if chosen.switch_every else config


def _trace(chosen: ReplayOptions, made: tuple[Path, SyntheticTraceConfig] | None) -> Trace:
    """Reads the trace of the file, or makes a new trace and writes it."""
    if made is None:
        assert chosen.file is not None
        return read_trace(chosen.file)
    path, config = made
    trace = make_trace(config)
    write_trace(path, trace)
    return trace


def _replay(trace: Trace, sweep: Sweep) -> list[Row]:
    with passing_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None)
        return run(
            trace,
            sweep,
            begin=lambda what, total: progress.reset(bar, description=what, total=total),
            advance=lambda done: progress.advance(bar, done),
        )


SIMULATE = Command(description=SIMULATE_HELP, groups=simulate_groups, run=simulate)


PLAN_HELP = """Predict a run's bytes in each tier, its loads and its stalls; and say when out-of-core will not work, or is not worth it.

$ ooc-moe plan --preset full --gpu-bytes 24GB --dram-bytes 16GiB --nvme-bytes 200GB --steps-per-s 2000
$ ooc-moe plan --preset demo --hbm-experts 6 --measure --steps-per-s 900
$ ooc-moe plan --config runs/first --measure

--preset and --config choose the run as they do for ooc-moe train.

Where do steps per second come from? From metrics.jsonl (steps_per_s) of a short run whose HBM holds everything.
"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(JsonOption, LatencyOption):
    """The options of `plan` in addition to --preset and --config."""

    num_games: int | None = None
    """Games that will be learned; by default as many as the file of --config lists, or else as many as the preset is for."""
    gpu_bytes: int | None = None
    """Memory of the trainer's device, to judge whether it is enough."""
    dram_bytes: int | None = None
    """DRAM of the daemon; by default as configured."""
    nvme_bytes: int | None = None
    """Size of the daemon's disk, to judge whether it is enough."""
    hbm_experts: int | None = None
    """Experts in HBM; by default as configured."""
    steps_per_s: float | None = None
    """Environment steps per second with all experts resident, as measured."""
    measure: bool = False
    """Measure loads on this machine instead, through a daemon that is started for it (some seconds)."""
    data_dir: Annotated[Path, Flag(metavar="DIR")] = Path()
    """With --measure: a directory on the daemon's disk."""
    device: str = "cpu"
    """With --measure: the device that holds HBM, cpu or cuda."""


def plan_groups() -> list[Group]:
    """Returns the options of `plan`: --preset and --config, which `train` has too, and the options that only `plan` has."""
    of_train = tuple(option for option in options_of(RunOptions) if option.name in ("preset", "config"))
    return [Group(title="", options=(*of_train, *options_of(PlanOptions)))]


def plan(parsed: Parsed) -> None:
    """Carries out the command `plan`: predicts what a run will demand of its memory tiers, and prints the prediction."""
    from ooc_moe.simulate import plan as planning

    chosen = parsed.part(PlanOptions)
    config = _planned_run(parsed, chosen)
    rates = _rates(chosen, config)
    predicted = planning.plan(
        config,
        rates,
        gpu_bytes=chosen.gpu_bytes,
        dram_bytes=chosen.dram_bytes,
        nvme_bytes=chosen.nvme_bytes,
        steps_per_s=chosen.steps_per_s,
    )
    if chosen.as_json:
        print(json.dumps(asdict(predicted) | {"rates": asdict(rates)}, indent=2))
        return
    print_table(planning.table(predicted, rates), Console())
    for finding in predicted.findings or ("worth trying: nothing speaks against it",):
        say(f"- {finding}")


def _rates(chosen: PlanOptions, config: RunConfig) -> Rates:
    from ooc_moe.simulate import plan as planning

    if chosen.measure:
        return planning.measure(config.agent, chosen.data_dir, device=chosen.device)
    given, body_bytes = latency(chosen.latency), config.agent.expert_layout().body_bytes
    dram_s = given.dram.seconds(body_bytes)
    nvme_s = dram_s + given.nvme.seconds(body_bytes)
    return planning.Rates(dram=dram_s, nvme=nvme_s, seed=nvme_s, push=nvme_s)


def _planned_run(parsed: Parsed, chosen: PlanOptions) -> RunConfig:
    """Makes the configuration that `train` would make of --preset and --config, with the games and the HBM that were asked for."""
    require_at_least(1, num_games=chosen.num_games)
    as_for_train = Parsed(values=parsed.values | {"name": "plan"}, given=tuple(name for name in parsed.given if name == "preset"))
    settings = settings_of(as_for_train, {})
    games = settings["games"].value
    if chosen.num_games is not None or not games:
        games = tuple(f"game{index}" for index in range(chosen.num_games or settings["num_games"].value))
    changed = {"games": games} | ({} if chosen.hbm_experts is None else {"hbm_experts": chosen.hbm_experts})
    return run_config(settings | {name: Setting(value=value, source="flag") for name, value in changed.items()})


PLAN = Command(description=PLAN_HELP, groups=plan_groups, run=plan)

"""The commands `simulate` and `plan`: predict what a run would ask of its tiers. Neither touches a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import say
from ooc_moe.display.progress import passing_bar
from ooc_moe.display.table import print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe.metrics.trace import Trace, read_trace, write_trace
from ooc_moe.simulate.replay import Prefetch
from ooc_moe.simulate.sweep import Row, Sweep, latency, markdown, run, seconds, table
from ooc_moe.simulate.synthetic_traces import SyntheticTraceConfig, make_trace
from ooc_moe_wire.command_line import Command, Flag, Group, Parsed, options_of
from ooc_moe_wire.errors import InvalidRequest, require_at_least

if TYPE_CHECKING:
    from ooc_moe.config.run import RunConfig
    from ooc_moe.simulate.plan import Rates

LATENCY = "dram=20us+12GB/s,nvme=80us+3GB/s"


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(JsonOption):
    """The trace, the capacities and the policies of a replay, and where its results go."""

    file: Annotated[Path | None, Flag(positional=True, metavar="FILE")] = None
    """A trace that ooc-moe train --trace recorded."""
    hbm: Annotated[tuple[str, ...], Flag(metavar="N,P%,...")] = ("25%", "50%")
    """HBM capacities: experts, or shares of the experts in the trace."""
    dram: Annotated[str | None, Flag(metavar="N|P%")] = None
    """DRAM capacity, likewise; by default room for all experts."""
    policy: tuple[str, ...] = ("lru", "s3fifo", "random", "belady")
    """HBM policies to compare; belady is the optimum."""
    dram_policy: str = "lru"
    """DRAM policy: lru, s3fifo or random."""
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
    """The prefetch sources that are tried, and how good the simulated detector is."""

    prefetch: tuple[str, ...] = ("perfect", "detector", "random")
    """Prefetch sources to try with the first policy, beside no prefetch."""
    prefetch_experts: int | None = None
    """Experts to prefetch at a switch; by default as many as HBM holds."""
    detect_after: int = 100
    """Accesses until the detector notices a switch."""
    detect_accuracy: float = 0.95
    """Probability that the detector names the right game."""


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """How long loads and computation take."""

    latency: Annotated[str, Flag(metavar="TIER=T[+B/s],...")] = LATENCY
    """Time of a load from each tier: latency and bandwidth. A bandwidth that is not given is the default's."""
    compute: Annotated[str, Flag(metavar="T")] = "100us"
    """Compute time of one access."""
    expert_bytes: int | None = None
    """Size of an expert; by default as in the trace."""


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """What a synthetic trace is like, if one is made instead of replaying a recorded one."""

    make: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Make a trace, write it to this new file, and replay it."""
    games: int = SyntheticTraceConfig().games
    """Games of the trace. They have turns, in rounds of random order."""
    experts: int = SyntheticTraceConfig().experts
    """Experts of all games together."""
    accesses: int = SyntheticTraceConfig().accesses
    """Length of the trace."""
    layers: int = SyntheticTraceConfig().layers
    """Layers: each uses its own part of a game's pool, one layer after another."""
    zipf: float = SyntheticTraceConfig().zipf
    """How uneven the use of experts is: the n-th most popular expert of a pool has weight n^-ZIPF."""
    eval_every: int | None = None
    """Turns between two evaluations of all games; by default there are none."""


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
    """Returns the options of `simulate`, grouped as in its help."""
    return [
        Group(title="", options=options_of(ReplayOptions)),
        Group(title="Prefetch", options=options_of(PrefetchOptions)),
        Group(title="Time", options=options_of(TimeOptions)),
        Group(title="Made trace", options=options_of(MakeOptions)),
    ]


def simulate(parsed: Parsed) -> None:
    """Replays a trace, prints a row for each replay, and saves what was asked for."""
    chosen = parsed.part(ReplayOptions)
    making = parsed.part(MakeOptions)
    if (chosen.file is None) == (making.make is None):
        raise InvalidRequest("file: give a trace to replay, or --make FILE to make one")
    sweep = _sweep(chosen, parsed.part(PrefetchOptions), parsed.part(TimeOptions), is_made=making.make is not None)
    trace = _trace(chosen, making)
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


def _trace(chosen: ReplayOptions, making: MakeOptions) -> Trace:
    """Reads the trace of the file, or makes a new trace and writes it."""
    if chosen.file is not None:
        return read_trace(chosen.file)
    assert making.make is not None
    trace = make_trace(
        SyntheticTraceConfig(
            games=making.games,
            experts=making.experts,
            accesses=making.accesses,
            switch_every=chosen.switch_every[0] if chosen.switch_every else SyntheticTraceConfig().switch_every,
            layers=making.layers,
            zipf=making.zipf,
            eval_every=making.eval_every,
            seed=chosen.seed,
        )
    )
    write_trace(making.make, trace)
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


@dataclass(frozen=True, kw_only=True)
class Plan(JsonOption):
    """Predict a run's bytes in each tier, its loads and its stalls; and say when out-of-core will not work, or is not worth it.

    $ ooc-moe plan --config full --gpu-bytes 24GB --dram-bytes 16GiB --nvme-bytes 200GB --steps-per-s 2000
    $ ooc-moe plan --config demo --hbm-experts 6 --measure --steps-per-s 900
    $ ooc-moe plan --config runs/first --measure

    Where do steps per second come from? From metrics.jsonl (steps_per_s) of a short run whose HBM holds everything.
    """

    config: Annotated[str, Flag(metavar="PRESET|RUN_DIR")] = "full"
    """The run to plan: a preset (tiny, demo, full), or a run's directory."""
    num_games: int | None = None
    """Games that will be learned; by default as many as the configuration says."""
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
    latency: Annotated[str, Flag(metavar="TIER=T[+B/s],...")] = LATENCY
    """Time of a load from each tier: latency and bandwidth. A bandwidth that is not given is the default's."""
    measure: bool = False
    """Measure loads on this machine instead, through a daemon that is started for it (some seconds)."""
    data_dir: Annotated[Path, Flag(metavar="DIR")] = Path()
    """With --measure: a directory on the daemon's disk."""
    device: str = "cpu"
    """With --measure: the device that holds HBM, cpu or cuda."""

    def run(self) -> None:
        """Prints the plan."""
        from ooc_moe.simulate import plan as planning

        config = planned_run(self.config, self.num_games, self.hbm_experts)
        rates = self._rates(config)
        plan = planning.plan(
            config, rates, gpu_bytes=self.gpu_bytes, dram_bytes=self.dram_bytes, nvme_bytes=self.nvme_bytes, steps_per_s=self.steps_per_s
        )
        if self.as_json:
            print(json.dumps(asdict(plan) | {"rates": asdict(rates)}, indent=2))
            return
        print_table(planning.table(plan, rates), Console())
        for finding in plan.findings or ("worth trying: nothing speaks against it",):
            say(f"- {finding}")

    def _rates(self, config: RunConfig) -> Rates:
        from ooc_moe.simulate import plan as planning

        if self.measure:
            return planning.measure(config.agent, self.data_dir, device=self.device)
        given, body_bytes = latency(self.latency), config.agent.expert_layout().body_bytes
        dram_s = given.dram.seconds(body_bytes)
        nvme_s = dram_s + given.nvme.seconds(body_bytes)
        return planning.Rates(dram=dram_s, nvme=nvme_s, seed=nvme_s, push=nvme_s)


def planned_run(config: str, num_games: int | None, hbm_experts: int | None) -> RunConfig:
    """Returns the configuration of a preset or of a run, with another number of games or of experts in HBM if one is given.

    Raises InvalidRequest if `config` is neither a preset nor the directory of a run.
    """
    from ooc_moe.config.agent import PRESETS
    from ooc_moe.config.run import RunConfig

    if config in PRESETS:
        planned = RunConfig(run_dir=Path("plan"), games=_game_names(PRESETS[config].num_games), agent=PRESETS[config])
    elif Path(config).is_dir():
        planned = RunConfig.read(Path(config))
    else:
        raise InvalidRequest(f"config: {config!r} is not one of {', '.join(PRESETS)}, or the directory of a run")
    require_at_least(1, num_games=num_games)
    if num_games is not None:
        planned = replace(planned, games=_game_names(num_games))
    return planned if hbm_experts is None else replace(planned, agent=replace(planned.agent, hbm_experts=hbm_experts))


def _game_names(number: int) -> tuple[str, ...]:
    return tuple(f"game{index}" for index in range(number))

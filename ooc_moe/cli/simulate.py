"""`ooc-moe simulate` and `ooc-moe plan`: what a run would ask of its tiers. Flags become a study, or a plan; neither touches a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ooc_moe.cli.words import size, whole_numbers, words
from ooc_moe.display.progress import passing_bar
from ooc_moe.display.table import print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe.metrics.trace import read_trace, write_trace
from ooc_moe.simulate.replay import Prefetch
from ooc_moe.simulate.sweep import Sweep, latency, markdown, run, seconds, table
from ooc_moe.simulate.synthetic_traces import SyntheticTraceConfig, make_trace
from ooc_moe_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from ooc_moe.config.run import RunConfig

_MAKE, _TIME, _AHEAD = "Making a trace", "Time", "Prefetch"
_MADE = SyntheticTraceConfig()


def simulate(
    file: Annotated[Path | None, typer.Argument(help="A trace, recorded by ooc-moe train --trace.", metavar="FILE")] = None,
    hbm: Annotated[str, typer.Option(help="HBM capacities: experts, or shares of those in the trace.", metavar="N,N,P%")] = "25%,50%",
    dram: Annotated[str | None, typer.Option(help="DRAM capacity, likewise; room for all if not given.", metavar="N|P%")] = None,
    policy: Annotated[
        str, typer.Option(help="HBM policies: lru, s3fifo, random, and belady, the optimum.", metavar="A,B,C")
    ] = "lru,s3fifo,random,belady",
    dram_policy: Annotated[str, typer.Option(help="lru, s3fifo or random.")] = "lru",
    prefetch: Annotated[
        str, typer.Option(help="Sources to try with the first policy, beside none at all.", metavar="A,B,C", rich_help_panel=_AHEAD)
    ] = "perfect,detector,random",
    prefetch_experts: Annotated[
        int | None, typer.Option(help="Experts named at a switch; as many as HBM holds if not given.", rich_help_panel=_AHEAD)
    ] = None,
    detect_after: Annotated[int, typer.Option(help="Accesses until the detector notices a switch.", rich_help_panel=_AHEAD)] = 100,
    detect_accuracy: Annotated[float, typer.Option(help="Its chance to name the right game.", rich_help_panel=_AHEAD)] = 0.95,
    switch_every: Annotated[
        str | None,
        typer.Option(
            help="Deal the training out anew in turns of so many accesses; leaves evaluation out. With --make: the turns made.",
            metavar="N,N,N",
        ),
    ] = None,
    latency_text: Annotated[
        str,
        typer.Option("--latency", help="Of a load, by tier: latency+bandwidth.", metavar="TIER=T+B/s,...", rich_help_panel=_TIME),
    ] = "dram=20us+12GB/s,nvme=80us+3GB/s",
    compute: Annotated[str, typer.Option(help="Compute time of one access.", metavar="T", rich_help_panel=_TIME)] = "100us",
    expert_bytes: Annotated[
        str | None, typer.Option(help="Bytes of an expert, if not the trace's own.", metavar="SIZE", rich_help_panel=_TIME)
    ] = None,
    make: Annotated[Path | None, typer.Option(help="Make a trace, in this new file, and replay it.", rich_help_panel=_MAKE)] = None,
    games: Annotated[int, typer.Option(rich_help_panel=_MAKE, help="Games in turns, in rounds of random order.")] = _MADE.games,
    experts: Annotated[int, typer.Option(rich_help_panel=_MAKE, help="Experts of all games together.")] = _MADE.experts,
    accesses: Annotated[int, typer.Option(rich_help_panel=_MAKE, help="Length.")] = _MADE.accesses,
    layers: Annotated[int, typer.Option(rich_help_panel=_MAKE, help="Parts of a game's pool, asked in turn.")] = _MADE.layers,
    zipf: Annotated[
        float, typer.Option(rich_help_panel=_MAKE, help="How uneven: the n-th expert of a pool has weight n^-ZIPF.")
    ] = _MADE.zipf,
    eval_every: Annotated[
        int | None, typer.Option(rich_help_panel=_MAKE, help="Turns between evaluations of all games; none if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is made, and of what guesses.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw hit rates over capacity and switch interval.", metavar="FILE.png")] = None,
    results: Annotated[Path | None, typer.Option(help="Save the table as Markdown.", metavar="FILE.md")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the table.")] = False,
) -> None:
    """Replay a trace through HBM, DRAM and NVMe of any size, policy and latency. Needs no GPU and no torch.

    What would a smaller cache have cost that run, and how far is LRU from the best possible? A trainer also evicts by what its updates
    announce, which is not replayed: where a game does not fit into HBM it hits more often than LRU here.

    \b
    $ ooc-moe train --games krull,boxing --trace krull.trace
    $ ooc-moe simulate krull.trace --hbm 4,8,16 --policy lru,s3fifo,belady --latency nvme=80us+3GB/s,dram=20us+12GB/s

    The same games, had they changed more often; with a picture:

    \b
    $ ooc-moe simulate krull.trace --hbm 25%,50% --switch-every 100,1000,10000 --plot hits.png

    Before there is a run: 57 games, 10,000 experts, ten million accesses:

    \b
    $ ooc-moe simulate --make all.trace --hbm 2%,5% --dram 25% --policy lru,belady
    $ ooc-moe simulate --make short.trace --accesses 1000000 --eval-every 20

    One access is one expert of one layer call. A hit was in HBM when asked for: what a prefetch brings late is a miss. Belady knows the
    future but does not prefetch, so a prefetch can beat it.
    """
    turns = whole_numbers("switch_every", switch_every) if switch_every else ()
    made_turns = turns[0] if turns else _MADE.switch_every
    if (file is None) == (make is None):
        raise InvalidRequest("file: give a trace to replay, or --make FILE to make one")
    sweep = Sweep(
        hbm=words(hbm),
        dram=dram,
        policies=words(policy),
        dram_policy=dram_policy,
        prefetches=tuple(
            Prefetch(source=word, delay=detect_after, accuracy=detect_accuracy, experts_max=prefetch_experts)
            for word in words(prefetch)
            if word != "none"
        ),
        # What was made in these turns needs no dealing out.
        switch_every=() if turns == (made_turns,) and make is not None else turns,
        latency=replace(latency(latency_text), compute_s=seconds("compute", compute)),
        expert_bytes=size("expert_bytes", expert_bytes) if expert_bytes else None,
        seed=seed,
    )
    trace = read_trace(file) if file is not None else None
    if make is not None:
        trace = make_trace(
            SyntheticTraceConfig(
                games=games,
                experts=experts,
                accesses=accesses,
                switch_every=made_turns,
                layers=layers,
                zipf=zipf,
                eval_every=eval_every,
                seed=seed,
            )
        )
        write_trace(make, trace)
    assert trace is not None
    with passing_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None)
        rows = run(
            trace,
            sweep,
            begin=lambda what, total: progress.reset(bar, description=what, total=total),
            advance=lambda done: progress.advance(bar, done),
        )
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(table(trace, rows), Console())
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(markdown(trace, rows, command=command_given()))
    if plot is not None:
        from ooc_moe.simulate.chart import save_chart

        save_chart(plot, rows)


def plan(
    config: Annotated[str, typer.Option(help="A preset (tiny, demo, full), or a run's directory.", metavar="PRESET|RUN_DIR")] = "full",
    games: Annotated[int | None, typer.Option(help="How many will be learned, if not as many as the configuration says.")] = None,
    gpu_bytes: Annotated[str | None, typer.Option(help="Of the trainer's device, to judge whether it is enough.", metavar="SIZE")] = None,
    dram_bytes: Annotated[str | None, typer.Option(help="Of the daemon; as configured if not given.", metavar="SIZE")] = None,
    nvme: Annotated[str | None, typer.Option(help="Of the daemon's disk, to judge whether it is enough.", metavar="SIZE")] = None,
    hbm_experts: Annotated[int | None, typer.Option(help="Experts in HBM, if not as configured.")] = None,
    steps_per_s: Annotated[float | None, typer.Option(help="Environment steps a second with all experts resident, as measured.")] = None,
    latency_text: Annotated[
        str, typer.Option("--latency", help="Of a load, by tier: latency+bandwidth.", metavar="TIER=T+B/s,...")
    ] = "dram=20us+12GB/s,nvme=80us+3GB/s",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure loads here instead, through a daemon started for it (some seconds).")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="With --measure: on the daemon's disk.", metavar="DIR")] = Path(),
    device: Annotated[str, typer.Option(help="With --measure: where HBM is, cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the table.")] = False,
) -> None:
    """Predict a run's bytes in each tier, its loads and its stalls; and say when out-of-core will not work, or is not worth it.

    \b
    $ ooc-moe plan --config full --gpu-bytes 24GB --dram-bytes 16GiB --nvme 200GB --steps-per-s 2000
    $ ooc-moe plan --config demo --hbm-experts 6 --measure --steps-per-s 900
    $ ooc-moe plan --config runs/first --measure

    Where do steps per second come from? From metrics.jsonl (steps_per_s) of a short run whose HBM holds everything.
    """
    from ooc_moe.simulate import plan as planning

    run_config = _planned(config, games, hbm_experts)
    layout = run_config.agent.expert_layout()
    if measure:
        rates = planning.measure(run_config.agent, data_dir, device=device)
    else:
        given = latency(latency_text)
        dram_s = given.dram.seconds(layout.body_bytes)
        nvme_s = dram_s + given.nvme.seconds(layout.body_bytes)
        rates = planning.Rates(dram=dram_s, nvme=nvme_s, seed=nvme_s, push=nvme_s)
    made = planning.plan(
        run_config,
        rates,
        gpu_bytes=size("gpu_bytes", gpu_bytes) if gpu_bytes else None,
        dram_bytes=size("dram_bytes", dram_bytes) if dram_bytes else None,
        nvme_bytes=size("nvme", nvme) if nvme else None,
        steps_per_s=steps_per_s,
    )
    if as_json:
        print(json.dumps(asdict(made) | {"rates": asdict(rates)}, indent=2))
        return
    console = Console()
    print_table(planning.table(made, rates), console)
    for finding in made.findings or ("worth trying: nothing speaks against it",):
        console.print(f"- {finding}", soft_wrap=True, markup=False, highlight=False)


def _planned(config: str, games: int | None, hbm_experts: int | None) -> RunConfig:
    from ooc_moe.config.agent import PRESETS
    from ooc_moe.config.run import RunConfig

    if config in PRESETS:
        made = RunConfig(run_dir=Path("plan"), games=_game_names(PRESETS[config].num_games), agent=PRESETS[config])
    elif Path(config).is_dir():
        made = RunConfig.read(Path(config))
    else:
        raise InvalidRequest(f"config: {config!r} is neither one of {', '.join(PRESETS)} nor a run's directory")
    if games is not None:
        made = replace(made, games=_game_names(games))
    return made if hbm_experts is None else replace(made, agent=replace(made.agent, hbm_experts=hbm_experts))


def _game_names(number: int) -> tuple[str, ...]:
    return tuple(f"game{index}" for index in range(number))

"""The commands `ooc-moe bench ...`. Nothing here needs torch; what each needs is imported when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ooc_moe.bench import policies
from ooc_moe.cli.words import size, whole_numbers, words
from ooc_moe.display.table import print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe_wire.errors import InvalidRequest

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure the daemon, the cache, its layer and the learner beside their peers, and cache policies beside the best possible.",
    rich_markup_mode="rich",
)
bench_app.command(name="policies")(policies.main)


@bench_app.command()
def store(
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds. \\[default: 15; 3 with --quick]")] = None,
    sizes: Annotated[str, typer.Option(help="Record sizes.", metavar="A,B,C")] = "256KiB,8MiB,24MiB",
    paths: Annotated[
        str | None, typer.Option(help="Only these: fetch, push, nvme, stats, or one such as fetch/memcpy or push/local.", metavar="A,B,C")
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(help="On the disk to measure. A directory is made in it, and removed in the end.", metavar="DIR")
    ] = Path(),
    results: Annotated[Path | None, typer.Option(help="Save the table here; its notes are kept.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the table.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: few records, 3 rounds. Not to be quoted.")] = False,
) -> None:
    """Measure both planes of the daemon beside memcpy, TCP, Arrow Flight, Ray, O_DIRECT, fio, LMDB and RocksDB.

    All in one run, interleaved; each path's bytes are checked first. What is not installed is named and left out
    (pip install 'ooc-moe\\[bench]', apt install fio). A daemon is started and stopped for it.

    \b
    $ ooc-moe bench store --data-dir /mnt/nvme --results store.md
    $ ooc-moe bench store --quick --sizes 8MiB --paths fetch/local,fetch/memcpy
    """
    from ooc_moe.bench.store import benchmark as bench
    from ooc_moe.bench.store.results import save, table

    chosen = bench.StoreBench(
        data_dir=data_dir, sizes=tuple(size("sizes", word) for word in sizes.split(",")), rounds=rounds, paths=words(paths), quick=quick
    )
    measured = bench.run(chosen, Console(stderr=True), command=command_given())
    if as_json:
        print(json.dumps(asdict(measured), indent=2))
    else:
        console = Console()
        print_table(table(measured, bench.TITLES), console)
        for missing in measured.missing:
            console.print(f"missing: {missing}", markup=False, highlight=False)
    if results is not None:
        save(measured, bench.TITLES, results)


PARTS = ("layer", "steady", "oversubscribed", "switch", "bandwidth")


@bench_app.command()
def cache(
    parts: Annotated[
        str,
        typer.Option(
            help="What to measure. layer: the MoE layer beside a dense one; steady: steps of one game; oversubscribed: of one twice the "
            "HBM; switch: to another game; bandwidth: of fetches.",
            metavar="A,B,C",
        ),
    ] = ",".join(PARTS),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved rounds. \\[default: 15 of the layer, 5 of the others; 3 and 1 with --quick]")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Presets whose sizes the experts have. \\[default: full,demo,tiny of the layer, else full,demo]", metavar="A,B,C"
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of a call of the layer.", metavar="A,B,C")] = "512,4096",
    pools: Annotated[str, typer.Option(help="Experts of the layer's pool.", metavar="A,B,C")] = "4,16",
    data_dir: Annotated[
        Path, typer.Option(help="On the disk to measure. A directory is made in it, and removed in the end.", metavar="DIR")
    ] = Path(),
    results: Annotated[
        Path | None, typer.Option(help="Save the tables here: layer.md, and cache.md for the others; notes are kept.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: few rounds. Not to be quoted.")] = False,
) -> None:
    """Measure what training with experts in a cache costs: the MoE layer beside a dense FFN, and steps beside everything resident.

    A daemon is started and stopped for each part but the layer. On a GPU the layer is measured in bfloat16.

    \b
    $ ooc-moe bench cache --results tests/bench/results
    $ ooc-moe bench cache --parts steady,switch --sizes demo --quick
    """
    from ooc_moe.bench.cache import benchmark as caches
    from ooc_moe.bench.cache import layer
    from ooc_moe.bench.cache import results as cache_results

    wanted = words(parts)
    for part in wanted:
        if part not in PARTS:
            raise InvalidRequest(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    shared: dict[str, Any] = {"device": device, "threads": threads}
    layer_bench = layer.LayerBench(
        sizes=words(sizes) or layer.SIZES,
        tokens=whole_numbers("tokens", tokens),
        pools=whole_numbers("pools", pools),
        rounds=rounds if rounds is not None else layer.QUICK_ROUNDS if quick else layer.ROUNDS,
        **shared,
    )
    cache_bench = caches.CacheBench(
        parts=tuple(part for part in wanted if part != "layer"),
        sizes=words(sizes) or caches.SIZES,
        rounds=rounds if rounds is not None else caches.QUICK_ROUNDS if quick else caches.ROUNDS,
        data_dir=data_dir,
        **shared,
    )
    progress = Console(stderr=True)
    layer_rows = layer.run(layer_bench, progress) if "layer" in wanted else []
    cache_rows = caches.run(cache_bench, progress)
    if as_json:
        print(json.dumps({"layer": [asdict(row) for row in layer_rows], "cache": [asdict(row) for row in cache_rows]}, indent=2))
    else:
        if layer_rows:
            print_table(layer.table(layer_rows), Console())
        if cache_rows:
            print_table(cache_results.table(cache_rows), Console())
    if results is not None:
        if layer_rows:
            layer.save(layer_rows, layer_bench, results / "layer.md", command=command_given())
        if cache_rows:
            cache_results.save(cache_rows, caches.facts(cache_bench, command=command_given()), results / "cache.md")


@bench_app.command()
def learning(
    games: Annotated[
        str | None, typer.Option(help="Games whose speed is measured. \\[default: krull,pixel/catch]", metavar="A,B,C")
    ] = None,
    returns: Annotated[
        str | None,
        typer.Option(
            help="Games whose returns are; none skips it. \\[default: pixel/catch,pixel/cross; krull,crazy_climber with --full]",
            metavar="A,B,C",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Environment steps before returns are read. \\[default: 61440; 204800 with --full]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each in each game.")] = 3,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of the speed.")] = 7,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
    env_threads: Annotated[int, typer.Option(help="Threads that emulate Atari in our environments.")] = 2,
    results: Annotated[Path | None, typer.Option(help="Save the tables here, as learning.md; notes are kept.", metavar="DIR")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the tables.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Returns of Atari games, which takes hours on a CPU.")] = False,
) -> None:
    """Measure our PPO with a dense network beside Stable-Baselines3's with the same network: steps per second, returns at equal steps.

    \b
    $ ooc-moe bench learning --results tests/bench/results
    $ ooc-moe bench learning --games pixel/catch --returns none --rounds 3
    """
    from ooc_moe.bench.learning import benchmark as bench
    from ooc_moe.bench.learning import results as learning_results

    chosen = bench.LearningBench(
        games=words(games) or bench.GAMES,
        returns_games=() if returns == "none" else words(returns) or (bench.FULL_GAMES if full else bench.RETURNS_GAMES),
        steps=steps if steps is not None else bench.FULL_STEPS if full else bench.STEPS,
        seeds=seeds,
        rounds=rounds,
        threads=threads,
        env_threads=env_threads,
    )
    speeds, reached = bench.run(chosen, Console(stderr=True))
    if as_json:
        print(json.dumps({"speed": [asdict(row) for row in speeds], "returns": [asdict(row) for row in reached]}, indent=2))
    else:
        for table in learning_results.tables(speeds, reached):
            print_table(table, Console())
    if results is not None:
        learning_results.save(speeds, reached, bench.facts(chosen, command=command_given()), results / "learning.md")

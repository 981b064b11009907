"""The commands `ooc-moe bench ...`, which run benchmarks. This module needs no torch: a benchmark's imports are made when it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from rich.console import Console

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import say
from ooc_moe.display.table import Table, print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe_wire.command_line import Command, Flag, Group, Option, Parsed, options_of

CachePart = Literal["layer", "steady", "oversubscribed", "switch", "bandwidth"]
Results = Annotated[Path | None, Flag(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class ResultsOption(JsonOption):
    """The options of every benchmark that measures this machine."""

    results: Results = None
    """Save the tables here, for a benchmark with one table to this file, else to this directory; notes in the files are kept."""


STORE_HELP = """Measure both planes of the daemon, compared with memcpy, TCP, Arrow Flight, Ray, O_DIRECT, fio, LMDB and RocksDB.

All are measured in one run, interleaved, and the bytes of each path are checked first. Peers that are not installed are named and left
out (pip install 'ooc-moe[bench]', apt install fio). The benchmark starts and stops a daemon of its own.

$ ooc-moe bench store --data-dir /mnt/nvme --results store.md
$ ooc-moe bench store --quick --sizes 8MiB --paths fetch/local,fetch/memcpy
"""

CACHE_HELP = """Measure what training with experts in a cache costs.

The MoE layer is compared with a dense FFN, and steps with steps whose experts are all in HBM. Each part except the layer starts and stops a
daemon of its own. On a GPU the layer is measured in bfloat16.

$ ooc-moe bench cache --results tests/bench/results
$ ooc-moe bench cache --parts steady,switch --sizes demo --quick
"""

LEARNING_HELP = """Measure our PPO with a dense network, compared with Stable-Baselines3's PPO with the same network.

Measured are steps per second, and returns after equally many steps.

$ ooc-moe bench learning --results tests/bench/results
$ ooc-moe bench learning --games pixel/catch --returns none --rounds 3
"""


def _store_groups() -> list[Group]:
    from ooc_moe.bench.store.benchmark import StoreBench

    return [Group(title="", options=(*options_of(StoreBench), *options_of(ResultsOption)))]


def _store(parsed: Parsed) -> None:
    from ooc_moe.bench.store import benchmark
    from ooc_moe.bench.store.results import save, table

    shown = parsed.part(ResultsOption)
    measured = benchmark.run(parsed.part(benchmark.StoreBench), Console(stderr=True), command=command_given())
    _show(asdict(measured), [table(measured, benchmark.TITLES)], as_json=shown.as_json)
    if not shown.as_json:
        for missing in measured.missing:
            say(f"missing: {missing}")
    if shown.results is not None:
        save(measured, benchmark.TITLES, shown.results)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of `bench cache` that choose what is measured."""

    parts: tuple[CachePart, ...] = get_args(CachePart)
    """What to measure. layer: the MoE layer, compared with a dense one; steady: steps of one game; oversubscribed: steps of a game that
    needs twice the HBM; switch: a switch to another game; bandwidth: fetches."""
    quick: bool = False
    """A first look: few rounds. Do not quote its figures."""


def _cache_groups() -> list[Group]:
    """Returns the options of `bench cache`. Sizes and rounds are unset, because its two parts, layer and cache, have different defaults."""
    from ooc_moe.bench.cache.options import CacheBench, LayerBench

    shared = options_of(LayerBench)
    others = options_of(CacheBench, skip=("parts", *(option.name for option in shared)))
    unset = _unset(
        shared, {"rounds": "15 of the layer, 5 of the others; 3 and 1 with --quick", "sizes": "full,demo,tiny of the layer, else full,demo"}
    )
    parts, quick = options_of(CacheOptions)
    return [Group(title="", options=(parts, *unset, *others, quick, *options_of(ResultsOption)))]


def _cache(parsed: Parsed) -> None:
    from ooc_moe.bench.cache import benchmark, layer, options
    from ooc_moe.bench.cache import results as tables

    chosen, shown = parsed.part(CacheOptions), parsed.part(ResultsOption)

    def bench(config: type[Any], sizes: Sequence[str], rounds: int) -> Any:
        values = {each.name: parsed.values[each.name] for each in fields(config)}
        usual = {"sizes": sizes, "rounds": rounds}
        return config(**values | {name: value for name, value in usual.items() if parsed.values[name] is None})

    parts = tuple(part for part in chosen.parts if part != "layer")
    layer_rounds = options.LAYER_QUICK_ROUNDS if chosen.quick else options.LAYER_ROUNDS
    layer_bench = bench(options.LayerBench, options.LAYER_SIZES, layer_rounds)
    cache_bench = replace(bench(options.CacheBench, options.SIZES, options.QUICK_ROUNDS if chosen.quick else options.ROUNDS), parts=parts)
    progress = Console(stderr=True)
    layer_rows = layer.run(layer_bench, progress) if "layer" in chosen.parts else []
    cache_rows = benchmark.run(cache_bench, progress)
    document = {"layer": [asdict(row) for row in layer_rows], "cache": [asdict(row) for row in cache_rows]}
    found = [layer.table(layer_rows)] if layer_rows else []
    found += [tables.table(cache_rows)] if cache_rows else []
    _show(document, found, as_json=shown.as_json)
    if shown.results is not None and layer_rows:
        layer.save(layer_rows, layer_bench, shown.results / "layer.md", command=command_given())
    if shown.results is not None and cache_rows:
        tables.save(cache_rows, benchmark.facts(cache_bench, command=command_given()), shown.results / "cache.md")


@dataclass(frozen=True, kw_only=True)
class FullOption:
    """The option `--full`, which makes the benchmark of the learner long: it then measures the returns of Atari games."""

    full: bool = False
    """Measure the returns of Atari games, which takes hours on a CPU."""


def _learning_groups() -> list[Group]:
    from ooc_moe.bench.learning.options import LearningBench

    defaults = {"returns_games": "pixel/catch,pixel/cross; krull,crazy_climber with --full", "steps": "61440; 204800 with --full"}
    options = [replace(each, optional=each.name == "returns_games") for each in _unset(options_of(LearningBench), defaults)]
    return [Group(title="", options=(*options, *options_of(FullOption), *options_of(ResultsOption)))]


def _learning(parsed: Parsed) -> None:
    from ooc_moe.bench.learning import benchmark, options
    from ooc_moe.bench.learning import results as tables

    full, shown = parsed.part(FullOption).full, parsed.part(ResultsOption)
    games, steps = (options.FULL_GAMES, options.FULL_STEPS) if full else (options.RETURNS_GAMES, options.STEPS)
    # The word none, which gives None, measures no returns.
    returns = (parsed.values["returns_games"] or ()) if "returns_games" in parsed.given else games
    usual = {"returns_games": returns, "steps": steps if parsed.values["steps"] is None else parsed.values["steps"]}
    chosen = options.LearningBench(**{each.name: parsed.values[each.name] for each in fields(options.LearningBench)} | usual)
    speeds, reached = benchmark.run(chosen, Console(stderr=True))
    document = {"speed": [asdict(row) for row in speeds], "returns": [asdict(row) for row in reached]}
    _show(document, tables.tables(speeds, reached), as_json=shown.as_json)
    if shown.results is not None:
        tables.save(speeds, reached, benchmark.facts(chosen, command=command_given()), shown.results / "learning.md")


def _unset(options: Sequence[Option], defaults: Mapping[str, str]) -> list[Option]:
    """Returns the options, with the default None and another default in the help for those that `defaults` names."""
    return [
        replace(each, default=None, shown=replace(each.shown, default=defaults[each.name])) if each.name in defaults else each
        for each in options
    ]


STORE = Command(description=STORE_HELP, groups=_store_groups, run=_store)
CACHE = Command(description=CACHE_HELP, groups=_cache_groups, run=_cache)
LEARNING = Command(description=LEARNING_HELP, groups=_learning_groups, run=_learning)


@dataclass(frozen=True, kw_only=True)
class PoliciesCommand:
    """Compare the hit rates of LRU, S3-FIFO and the offline optimum (Belady) on the same traces; takes less than a minute.

    $ ooc-moe bench policies --results policies.md
    """

    seed: int = 0
    """Seed of the traces."""
    results: Results = None
    """Save the table to this file."""

    def run(self) -> None:
        """Compares the policies, prints a table, and saves it if `results` is given."""
        from ooc_moe.bench import policies

        policies.main(self.seed, self.results)


def _show(document: object, tables: Sequence[Table], *, as_json: bool) -> None:
    """Prints the results of a benchmark: `document` as JSON if `as_json`, else the tables."""
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for table in tables:
        print_table(table, Console())

"""The commands `ooc-moe bench ...`. Nothing here needs torch; what each benchmark needs is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from rich.console import Console

from ooc_moe.cli.options import JsonOption
from ooc_moe.cli.output import say
from ooc_moe.config.agent import Preset
from ooc_moe.display.table import Table, print_table
from ooc_moe.metrics.provenance import command_given
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.sizes import parse_size

CachePart = Literal["layer", "steady", "oversubscribed", "switch", "bandwidth"]
DataDir = Annotated[Path, Flag(metavar="DIR")]
Results = Annotated[Path | None, Flag(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class StoreCommand(JsonOption):
    """Measure both planes of the daemon, compared with memcpy, TCP, Arrow Flight, Ray, O_DIRECT, fio, LMDB and RocksDB.

    All are measured in one run, interleaved, and the bytes of each path are checked first. Peers that are not installed are named and left
    out (pip install 'ooc-moe[bench]', apt install fio). The benchmark starts and stops a daemon of its own.

    $ ooc-moe bench store --data-dir /mnt/nvme --results store.md
    $ ooc-moe bench store --quick --sizes 8MiB --paths fetch/local,fetch/memcpy
    """

    rounds: Annotated[int | None, Flag(default="15; 3 with --quick")] = None
    """Interleaved rounds."""
    sizes: Annotated[tuple[str, ...], Flag(metavar="SIZE,...")] = ("256KiB", "8MiB", "24MiB")
    """Sizes of a record."""
    paths: tuple[str, ...] = ()
    """Measure only these: fetch, push, nvme, stats, or a path such as fetch/memcpy or push/local."""
    data_dir: DataDir = Path()
    """A directory on the disk to measure. A new directory is made in it, and removed at the end."""
    results: Results = None
    """Save the table to this file; notes in the file are kept."""
    quick: bool = False
    """A first look: few records, 3 rounds. Do not quote its figures."""

    def run(self) -> None:
        """Measures, prints and saves."""
        from ooc_moe.bench.store import benchmark
        from ooc_moe.bench.store.results import save, table

        sizes = tuple(_size("sizes", text) for text in self.sizes)
        chosen = benchmark.StoreBench(data_dir=self.data_dir, sizes=sizes, rounds=self.rounds, paths=self.paths, quick=self.quick)
        measured = benchmark.run(chosen, Console(stderr=True), command=command_given())
        _show(asdict(measured), [table(measured, benchmark.TITLES)], as_json=self.as_json)
        if not self.as_json:
            for missing in measured.missing:
                say(f"missing: {missing}")
        if self.results is not None:
            save(measured, benchmark.TITLES, self.results)


@dataclass(frozen=True, kw_only=True)
class CacheCommand(JsonOption):
    """Measure what training with experts in a cache costs: the MoE layer compared with a dense FFN, and steps compared with
    steps whose experts are all in HBM.

    Each part except the layer starts and stops a daemon of its own. On a GPU the layer is measured in bfloat16.

    $ ooc-moe bench cache --results tests/bench/results
    $ ooc-moe bench cache --parts steady,switch --sizes demo --quick
    """

    parts: tuple[CachePart, ...] = get_args(CachePart)
    """What to measure. layer: the MoE layer, compared with a dense one; steady: steps of one game; oversubscribed: steps of a game that
    needs twice the HBM; switch: a switch to another game; bandwidth: fetches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the experts; auto is cuda if there is one."""
    threads: int = 1
    """Threads of torch."""
    rounds: Annotated[int | None, Flag(default="15 of the layer, 5 of the others; 3 and 1 with --quick")] = None
    """Interleaved rounds."""
    sizes: Annotated[tuple[Preset, ...], Flag(default="full,demo,tiny of the layer, else full,demo")] = ()
    """Presets whose expert sizes are measured."""
    tokens: tuple[int, ...] = (512, 4096)
    """Tokens of one call of the layer."""
    pools: tuple[int, ...] = (4, 16)
    """Experts of the layer's pool."""
    data_dir: DataDir = Path()
    """A directory on the disk to measure. A new directory is made in it, and removed at the end."""
    results: Results = None
    """Save the tables to this directory, as layer.md and cache.md; notes in the files are kept."""
    quick: bool = False
    """A first look: few rounds. Do not quote its figures."""

    def run(self) -> None:
        """Measures, prints and saves."""
        from ooc_moe.bench.cache import benchmark, layer
        from ooc_moe.bench.cache import results as tables

        layer_bench, cache_bench = self._layer_bench(), self._cache_bench()
        progress = Console(stderr=True)
        layer_rows = layer.run(layer_bench, progress) if "layer" in self.parts else []
        cache_rows = benchmark.run(cache_bench, progress)
        document = {"layer": [asdict(row) for row in layer_rows], "cache": [asdict(row) for row in cache_rows]}
        shown = [layer.table(layer_rows)] if layer_rows else []
        shown += [tables.table(cache_rows)] if cache_rows else []
        _show(document, shown, as_json=self.as_json)
        if self.results is not None and layer_rows:
            layer.save(layer_rows, layer_bench, self.results / "layer.md", command=command_given())
        if self.results is not None and cache_rows:
            tables.save(cache_rows, benchmark.facts(cache_bench, command=command_given()), self.results / "cache.md")

    def _layer_bench(self) -> Any:
        from ooc_moe.bench.cache import layer

        return layer.LayerBench(
            sizes=self.sizes or layer.SIZES,
            tokens=self.tokens,
            pools=self.pools,
            rounds=self._rounds(layer.ROUNDS, layer.QUICK_ROUNDS),
            device=self.device,
            threads=self.threads,
        )

    def _cache_bench(self) -> Any:
        from ooc_moe.bench.cache import benchmark

        return benchmark.CacheBench(
            parts=tuple(part for part in self.parts if part != "layer"),
            sizes=self.sizes or benchmark.SIZES,
            rounds=self._rounds(benchmark.ROUNDS, benchmark.QUICK_ROUNDS),
            data_dir=self.data_dir,
            device=self.device,
            threads=self.threads,
        )

    def _rounds(self, usual: int, quick: int) -> int:
        if self.rounds is not None:
            return self.rounds
        return quick if self.quick else usual


@dataclass(frozen=True, kw_only=True)
class LearningCommand(JsonOption):
    """Measure our PPO with a dense network, compared with Stable-Baselines3's with the same network: speed, and returns after equal steps.

    $ ooc-moe bench learning --results tests/bench/results
    $ ooc-moe bench learning --games pixel/catch --returns none --rounds 3
    """

    games: Annotated[tuple[str, ...], Flag(default="krull,pixel/catch")] = ()
    """Games whose speed is measured."""
    returns: Annotated[
        tuple[str, ...] | None, Flag(default="pixel/catch,pixel/cross; krull,crazy_climber with --full", metavar="A,B,...|none")
    ] = ()
    """Games whose returns are measured; none measures no returns."""
    steps: Annotated[int | None, Flag(default="61440; 204800 with --full")] = None
    """Environment steps before returns are read."""
    seeds: int = 3
    """Trainings of each program in each game."""
    rounds: int = 7
    """Interleaved rounds of the speed."""
    threads: int = 1
    """Threads of torch."""
    env_threads: int = 2
    """Threads that emulate Atari in our environments."""
    results: Results = None
    """Save the tables to this directory, as learning.md; notes in the file are kept."""
    full: bool = False
    """Measure the returns of Atari games, which takes hours on a CPU."""

    def run(self) -> None:
        """Measures, prints and saves."""
        from ooc_moe.bench.learning import benchmark
        from ooc_moe.bench.learning import results as tables

        usual_games, usual_steps = (benchmark.FULL_GAMES, benchmark.FULL_STEPS) if self.full else (benchmark.RETURNS_GAMES, benchmark.STEPS)
        chosen = benchmark.LearningBench(
            games=self.games or benchmark.GAMES,
            returns_games=() if self.returns is None else self.returns or usual_games,
            steps=usual_steps if self.steps is None else self.steps,
            seeds=self.seeds,
            rounds=self.rounds,
            threads=self.threads,
            env_threads=self.env_threads,
        )
        speeds, reached = benchmark.run(chosen, Console(stderr=True))
        document = {"speed": [asdict(row) for row in speeds], "returns": [asdict(row) for row in reached]}
        _show(document, tables.tables(speeds, reached), as_json=self.as_json)
        if self.results is not None:
            tables.save(speeds, reached, benchmark.facts(chosen, command=command_given()), self.results / "learning.md")


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
        """Compares, prints and saves."""
        from ooc_moe.bench import policies

        policies.main(self.seed, self.results)


def _show(document: object, tables: Sequence[Table], *, as_json: bool) -> None:
    """Prints results as one JSON document or as tables."""
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for table in tables:
        print_table(table, Console())


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}") from error

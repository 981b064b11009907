"""`ooc-moe bench policies`: hit rates of LRU, S3-FIFO and the offline optimum (Belady) on the same traces.

    ooc-moe bench policies [--seed N] [--results FILE]

A trace is a sequence of accesses to experts, as expert ids; here it is made from a seed. To replay it is to do its accesses in a simulated
cache and to count the hits. The cache takes in every expert that it misses. The policies are those of the daemon and of the trainer's cache
(ooc_moe_wire.policy). The replay is that of `ooc-moe simulate`, which can also replay recorded traces through several tiers. No daemon
runs, and nothing is timed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ooc_moe.display.formats import format_share_short
from ooc_moe.display.table import Table, markdown_table, print_table
from ooc_moe.metrics import trace
from ooc_moe.metrics.provenance import facts
from ooc_moe.simulate.replay import Setup, replay

CACHE_SHARES = (0.05, 0.1, 0.25, 0.5)
NUM_GAMES = 57
NUM_LAYERS = 4
POOL_EXPERTS = 8  # Experts that one game uses in one layer.
TOP_K = 2
GAME_EXPERTS = NUM_LAYERS * POOL_EXPERTS
POLICIES = {"LRU": "lru", "S3-FIFO": "s3fifo", "Belady": "belady"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """An access trace to replay: the ids of the experts that were accessed, in order. `what` describes the trace in words."""

    name: str
    what: str
    experts: Sequence[int]

    @property
    def num_experts(self) -> int:
        """How many different experts occur in the trace."""
        return len(set(self.experts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The hit rates of one trace in a cache of one size; `hit_rates` has one for each policy, in the order of POLICIES.

    The size is given twice: `cache_experts` is a number of experts, `cache_share` the share of the trace's different experts.
    """

    pattern: Pattern
    cache_share: float
    cache_experts: int
    hit_rates: tuple[float, ...]


def hit_rate(policy: str, experts: Sequence[int], cache_experts: int) -> float:
    """Returns the hit rate of one eviction policy: the share of a trace's accesses whose expert is in the cache.

    The cache starts empty and takes in every expert that it misses.

    Args:
        policy: the policy's name, a value of POLICIES.
        experts: the trace, as expert ids.
        cache_experts: how many experts the cache holds.
    """
    info = trace.TraceInfo(source="made", num_banks=1, expert_bytes=1)
    played = trace.Trace(info=info, keys_A=np.asarray(experts, dtype=np.uint32), marks=())
    return replay(played, Setup(hbm_experts=cache_experts, policy=policy)).training.hit_rate


def patterns(seed: int, *, length: int = 60_000, num_games: int = NUM_GAMES) -> list[Pattern]:
    """Makes the four traces that policies are compared on, each of about `length` accesses.

    The traces are: independent random draws, in which some experts are much more frequent than others; games in turns; a scan through all
    experts again and again; and games in turns with evaluations in between. `seed` decides all random draws, `num_games` is the number of
    games.
    """
    rng = np.random.default_rng(seed)
    num_experts = num_games * GAME_EXPERTS
    return [
        Pattern(
            name="zipf",
            what="independent draws, the n-th most popular expert with weight 1 / n",
            experts=rng.choice(num_experts, length, p=_zipf(num_experts, 1.0)).tolist(),
        ),
        Pattern(
            name="games",
            what=f"{num_games} games in random turns of 40 steps, each for {TOP_K} of {POOL_EXPERTS} experts in {NUM_LAYERS} layers",
            experts=_cut(_turns(rng, num_games, steps=40), length),
        ),
        Pattern(
            name="cyclic scan",
            what=f"all {num_experts} experts in the same order again and again",
            experts=[access % num_experts for access in range(length)],
        ),
        Pattern(
            name="games + scans",
            what=f"turns of {max(1, num_games // 8)} games; after every 20 an evaluation: all {num_games} games' experts, once each",
            experts=_cut(_turns_with_evaluations(rng, num_games), length),
        ),
    ]


def compare(traces: Sequence[Pattern], shares: Sequence[float] = CACHE_SHARES) -> Iterator[Row]:
    """Yields the hit rates of all policies for each trace and cache size, as soon as they are computed.

    `shares`: the sizes of the cache, each as a share of the number of different experts in the trace.
    """
    for pattern in traces:
        for share in shares:
            cache_experts = max(1, round(share * pattern.num_experts))
            rates = tuple(hit_rate(policy, pattern.experts, cache_experts) for policy in POLICIES.values())
            yield Row(pattern=pattern, cache_share=share, cache_experts=cache_experts, hit_rates=rates)


def table(rows: Sequence[Row]) -> Table:
    """Makes the table of hit rates, with a section for each trace."""
    sections = [index for index in range(1, len(rows)) if rows[index].pattern is not rows[index - 1].pattern]
    return Table("", ("trace", "experts", "accesses", "cache", *POLICIES), [_cells(row) for row in rows], sections=sections)


def markdown(rows: Sequence[Row], *, command: str) -> str:
    """Makes the text of the result page: `command`, machine and versions, what each trace is, and the table of `rows`."""
    lines = ["# ooc-moe bench policies", "", "Hit rates; each trace by every policy.", ""]
    lines += [f"- {name}: {value}" for name, value in facts(Path(), command=command).items()]
    lines += [f'- trace "{name}": {what}' for name, what in dict.fromkeys((row.pattern.name, row.pattern.what) for row in rows)]
    return "\n".join([*lines, "", markdown_table(table(rows)), ""])


def _cells(row: Row) -> tuple[str, ...]:
    cache = f"{row.cache_experts} ({format_share_short(row.cache_share, digits=0)})"
    rates = (format_share_short(rate) for rate in row.hit_rates)
    return (row.pattern.name, str(row.pattern.num_experts), str(len(row.pattern.experts)), cache, *rates)


def _zipf(number: int, exponent: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    weights = np.arange(1, number + 1, dtype=np.float64) ** -exponent
    normal: np.ndarray[tuple[int], np.dtype[np.float64]] = weights / weights.sum()
    return normal


def _cut(experts: Iterator[int], length: int) -> list[int]:
    return [expert for expert, _ in zip(experts, range(length), strict=False)]


def _turns(rng: np.random.Generator, num_games: int, *, steps: int) -> Iterator[int]:
    """Yields, without end, the experts that are accessed when all games are played in turn, `steps` steps each.

    Every round of turns has the games in another order.
    """
    while True:
        for game in rng.permutation(num_games):
            yield from _turn(rng, int(game), steps)


def _turn(rng: np.random.Generator, game: int, steps: int) -> Iterator[int]:
    """Yields the experts that are accessed in `steps` steps of one game.

    A step draws TOP_K different experts of the pool in each layer; popular experts are drawn more often.
    """
    popularity = _zipf(POOL_EXPERTS, 0.8)
    for _ in range(steps):
        for layer in range(NUM_LAYERS):
            first = game * GAME_EXPERTS + layer * POOL_EXPERTS
            yield from (first + int(expert) for expert in rng.choice(POOL_EXPERTS, TOP_K, replace=False, p=popularity))


def _turns_with_evaluations(rng: np.random.Generator, num_games: int) -> Iterator[int]:
    turns = _turns(rng, max(1, num_games // 8), steps=10)
    accesses_between = 20 * 10 * NUM_LAYERS * TOP_K
    while True:
        yield from _cut(turns, accesses_between)
        yield from range(num_games * GAME_EXPERTS)


def run(console: Console, *, seed: int, show: Callable[[str], None]) -> list[Row]:
    """Compares the policies on all traces, calls `show` with a line of text for each finished row, and prints the table on `console`."""
    rows = []
    for row in compare(patterns(seed)):
        show(f"{row.pattern.name}, {format_share_short(row.cache_share, digits=0)}")
        rows.append(row)
    print_table(table(rows), console)
    return rows


def main(seed: int = 0, results: Path | None = None) -> None:
    """Compare the hit rates of LRU, S3-FIFO and the offline optimum (Belady) on the same traces; takes less than a minute."""
    console, progress = Console(), Console(stderr=True)
    with progress.status("") as status:
        rows = run(console, seed=seed, show=status.update)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(markdown(rows, command=shlex.join(["ooc-moe", "bench", "policies", "--seed", str(seed)])))

"""Makes traces (sequences of accesses to experts): synthetic ones from random draws, and recorded ones reordered so that games take turns.

In a synthetic trace each game has a pool of experts of its own, split over the layers. Each access draws an expert at random, from the part
of the pool that belongs to the layer whose turn it is; the n-th most popular expert has weight n^-zipf. In a real run, training asks for
nearly the whole pool in each call of a layer, and acting for a few experts: a small `zipf` is like training, a large one like acting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ooc_moe.metrics.trace import Mark, Trace, TraceInfo
from ooc_moe_wire.errors import InvalidRequest, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticTraceConfig:
    """What a synthetic trace is like: its length, its games and experts, and how games and layers take turns."""

    games: int = 57
    """Number of games. They take turns, in rounds of random order."""
    experts: int = 10_000
    """Experts of all games together, in equal pools."""
    accesses: int = 10_000_000
    """Length of the trace."""
    switch_every: int = 20_000
    """Accesses of one game before the next game's turn."""
    layers: int = 6
    """Number of layers of the agent. Each uses its own part of a game's pool, and they are called in turn."""
    per_call: int = 2
    """Accesses of one layer before the next layer's turn."""
    zipf: float = 1.0
    """How uneven the use of a pool is: its n-th most popular expert has weight n^-zipf. 0: all experts are used alike."""
    eval_every: int | None = None
    """Turns of training between two evaluations, in which every game is played for a tenth of a turn; None: no evaluations."""
    expert_bytes: int = 25 * 10**6
    """Bytes of one expert."""
    seed: int = 0
    """Seed of the random draws."""

    def __post_init__(self) -> None:
        names = ("games", "experts", "accesses", "switch_every", "layers", "per_call", "eval_every", "expert_bytes")
        require_at_least(1, **{name: getattr(self, name) for name in names})
        if not 0 <= self.zipf < 10:
            raise InvalidRequest(f"zipf: {self.zipf} is not between 0 and 10")
        if self.experts < self.games * self.layers:
            raise InvalidRequest(
                f"experts: {self.experts} is less than one for each of {self.games} games in each of {self.layers} layers; "
                f"give at least {self.games * self.layers}"
            )


def make_trace(config: SyntheticTraceConfig) -> Trace:
    """Makes a synthetic trace: random accesses to experts by games that take turns. Equal configurations give equal traces."""
    rng = np.random.default_rng(config.seed)
    pools = _pools(config, rng)
    pieces: list[NDArray[np.uint32]] = []
    marks: list[Mark] = []
    position = turn = 0
    while position < config.accesses:
        for game in rng.permutation(config.games).tolist():
            turns = [(game, False, config.switch_every)]
            turn += 1
            if config.eval_every is not None and turn % config.eval_every == 0:
                turns += [(each, True, max(1, config.switch_every // 10)) for each in range(config.games)]
            for played, evaluating, length in turns:
                length = min(length, config.accesses - position)
                if length:
                    marks.append(Mark(position, f"game{played:02d}", evaluating))
                    pieces.append(_draw(config, pools[played], length, rng))
                    position += length
    info = TraceInfo(source=f"synthetic: {config}", num_banks=1, expert_bytes=config.expert_bytes)
    return Trace(info=info, keys_A=np.concatenate(pieces), marks=tuple(marks))


def _pools(config: SyntheticTraceConfig, rng: np.random.Generator) -> list[list[NDArray[np.uint32]]]:
    """Splits the experts at random into pools: for each game, its experts in each layer, the most popular first. No two pools overlap."""
    games = np.array_split(rng.permutation(config.experts).astype(np.uint32), config.games)
    return [np.array_split(game, config.layers) for game in games]


def _draw(config: SyntheticTraceConfig, pool: list[NDArray[np.uint32]], length: int, rng: np.random.Generator) -> NDArray[np.uint32]:
    layers_A = np.arange(length) // config.per_call % config.layers
    keys_A = np.empty(length, np.uint32)
    for layer, experts in enumerate(pool):
        mine_A = layers_A == layer
        weights = np.arange(1, len(experts) + 1, dtype=np.float64) ** -config.zipf
        ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(int(mine_A.sum())), side="right")
        keys_A[mine_A] = experts[np.minimum(ranks, len(experts) - 1)]
    return keys_A


def with_turns(trace: Trace, switch_every: int) -> Trace:
    """Reorders a trace's training so that games take turns of `switch_every` accesses, round robin.

    Each game's own accesses keep their order. Evaluations are left out, because they belong between turns that no longer exist.

        trace:                a1 a2 a3 a4 b1 b2
        with_turns(trace, 2): a1 a2 b1 b2 a3 a4

    Raises:
        InvalidRequest: `switch_every` is below 1.
    """
    require_at_least(1, switch_every=switch_every)
    by_game: dict[str, list[NDArray[Any]]] = {}
    for span in trace.spans():
        if not span.evaluating:
            by_game.setdefault(span.game, []).append(trace.keys_A[span.start : span.stop])
    left = {game: np.concatenate(parts) for game, parts in by_game.items()}
    pieces: list[NDArray[np.uint32]] = []
    marks: list[Mark] = []
    position = 0
    while left:
        for game in list(left):
            turn, left[game] = left[game][:switch_every], left[game][switch_every:]
            marks.append(Mark(position, game, False))
            pieces.append(turn)
            position += len(turn)
            if not len(left[game]):
                del left[game]
    keys_A = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
    return replace(trace, keys_A=keys_A, marks=tuple(marks))

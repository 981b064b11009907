"""Which experts a game owns: the book that keeps pools apart.

Knows ids and sizes only; the agent grows the banks when this book says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from ooc_moe.config import AgentConfig


@dataclass(frozen=True, slots=True)
class GamePools:
    """The experts a game may route to: `layers[l]` are ascending ids in layer l's bank."""

    game: str
    layers: tuple[tuple[int, ...], ...]

    def by_bank(self, num_banks: int) -> list[list[int]]:
        """The distinct ids in each bank, ascending. Layer l uses bank l, or the only one."""
        return [sorted({expert for layer in self.layers[bank::num_banks] for expert in layer}) for bank in range(num_banks)]


class PoolBook:
    """Assigns experts to games. With pool routing no expert belongs to two games."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self.games: dict[str, GamePools] = {}

    def propose(self, game: str) -> GamePools:
        """Pools for a new game: the first unowned experts, in order of ids; they may lie beyond the bank's present size.

        Nothing is owned before `record`. With token routing nobody owns anything, and every game gets whole banks.
        """
        config = self._config
        if config.routing == "token":
            everything = tuple(range(config.num_experts))
            return GamePools(game, (everything,) * config.num_layers)
        unowned = [self._unowned(bank) for bank in range(config.num_banks)]
        pools = [tuple(islice(unowned[pool % config.num_banks], config.pool_size)) for pool in range(config.pools_per_game)]
        return GamePools(game, tuple(pools[layer % len(pools)] for layer in range(config.num_layers)))

    @property
    def num_experts(self) -> int:
        """The experts of each bank that there are for this book: those it began with, and those it assigned beyond."""
        assigned = (expert for pools in self.games.values() for layer in pools.layers for expert in layer)
        return max(self._config.num_experts, 1 + max(assigned, default=0))

    def record(self, pools: GamePools) -> None:
        """From now on the game owns these experts."""
        self.games[pools.game] = pools

    def _unowned(self, bank: int) -> Iterator[int]:
        num_banks = self._config.num_banks
        owned = {expert for pools in self.games.values() for expert in pools.by_bank(num_banks)[bank]}
        return (expert for expert in count() if expert not in owned)

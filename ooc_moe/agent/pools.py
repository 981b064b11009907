"""Which experts a game owns, and which of the older games' it borrows: the book that keeps pools apart.

Knows ids and sizes only; the agent grows the banks when this book says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ooc_moe.config.agent import AgentConfig
from ooc_moe_wire.errors import InvalidRequest

Layers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class GamePools:
    """The experts a game may route to, by layer: ids in the layer's bank."""

    game: str
    owned: Layers
    """Those it trains, ascending."""
    borrowed: Layers
    """Those it only reads, ascending: older games own them."""

    @property
    def layers(self) -> Layers:
        """Both together, ascending."""
        return tuple(tuple(sorted(owned + borrowed)) for owned, borrowed in zip(self.owned, self.borrowed, strict=True))

    def by_bank(self, num_banks: int) -> list[list[int]]:
        """The distinct ids in each bank, ascending. Layer l uses bank l, or the only one."""
        return _by_bank(self.layers, num_banks)

    def borrowed_by_bank(self, num_banks: int) -> list[list[int]]:
        """The distinct ids of the borrowed ones in each bank, ascending."""
        return _by_bank(self.borrowed, num_banks)


class PoolBook:
    """Assigns experts to games. With pool routing no expert belongs to two games."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self.games: dict[str, GamePools] = {}

    def propose(self, game: str, borrowed: Sequence[Sequence[int]] | None = None) -> GamePools:
        """Pools for a new game: the first unowned experts, in order of ids; they may lie beyond the bank's present size.

        Nothing is owned before `record`. With token routing nobody owns anything, and every game gets whole banks.

        Args:
            game: its name.
            borrowed: older games' experts of each bank that would be of use, the most useful first. Each pool takes the first
                `shared_experts` of those that learned in its own layers.

        Raises:
            InvalidRequest: `borrowed` has not one list for each bank, or names an expert that no game owns; or the experts lie beyond a
                bank that may not grow.
        """
        config = self._config
        if config.routing == "token":
            everything = tuple(range(config.num_experts))
            return GamePools(game, (everything,) * config.num_layers, ((),) * config.num_layers)
        borrowed = [()] * config.num_banks if borrowed is None else borrowed
        self._check_borrowed(borrowed)
        unowned = [self._unowned(bank) for bank in range(config.num_banks)]
        own = [tuple(islice(unowned[pool % config.num_banks], config.pool_size)) for pool in range(config.pools_per_game)]
        self._check_room(game, own)
        others = [self._borrow(pool, borrowed[pool % config.num_banks]) for pool in range(config.pools_per_game)]
        pool_of = [layer % config.pools_per_game for layer in range(config.num_layers)]
        return GamePools(game, tuple(own[pool] for pool in pool_of), tuple(others[pool] for pool in pool_of))

    @property
    def num_experts(self) -> int:
        """The experts of each bank that there are for this book: those it began with, and those it assigned beyond."""
        assigned = (expert for pools in self.games.values() for layer in pools.owned for expert in layer)
        return max(self._config.num_experts, 1 + max(assigned, default=0))

    def record(self, pools: GamePools) -> None:
        """From now on the game owns its own experts."""
        self.games[pools.game] = pools

    def _unowned(self, bank: int) -> Iterator[int]:
        owned = self._owned(bank)
        return (expert for expert in count() if expert not in owned)

    def _owned(self, bank: int) -> set[int]:
        return {expert for pools in self.games.values() for expert in _by_bank(pools.owned, self._config.num_banks)[bank]}

    def _borrow(self, pool: int, useful: Sequence[int]) -> tuple[int, ...]:
        candidates = {expert for pools in self.games.values() for expert in pools.owned[pool]}
        chosen = islice((expert for expert in dict.fromkeys(useful) if expert in candidates), self._config.shared_experts)
        return tuple(sorted(chosen))

    def _check_room(self, game: str, own: Sequence[Sequence[int]]) -> None:
        there, wanted = self._config.num_experts, 1 + max(expert for pool in own for expert in pool)
        if wanted > there and not self._config.grow:
            raise InvalidRequest(
                f"num_experts: {there} are too few for {game!r} beside {len(self.games)} other games, by pool_size "
                f"{self._config.pool_size}; it takes {wanted}, and grow is off"
            )

    def _check_borrowed(self, borrowed: Sequence[Sequence[int]]) -> None:
        if len(borrowed) != self._config.num_banks:
            raise InvalidRequest(f"borrowed: {len(borrowed)} lists given, there are {self._config.num_banks} banks")
        for bank, experts in enumerate(borrowed):
            for expert in sorted(set(experts) - self._owned(bank)):
                raise InvalidRequest(f"borrowed: expert {expert} of bank {bank} is owned by no game")


def _by_bank(layers: Layers, num_banks: int) -> list[list[int]]:
    return [sorted({expert for layer in layers[bank::num_banks] for expert in layer}) for bank in range(num_banks)]

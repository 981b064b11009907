"""Decides which experts each game owns, and which experts of older games it borrows (uses without changing them).

The owned and the borrowed experts form the game's pools: a pool is the set of experts that the game may route to in a layer. This module
only assigns ids. The agent grows the banks when an assigned id lies beyond a bank's end.
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
    """The pools of one game: for each layer, the experts that the game may route to, as ids in the layer's bank."""

    game: str
    owned: Layers
    """For each layer, the experts that the game trains, ascending."""
    borrowed: Layers
    """For each layer, the experts that the game only reads, ascending. Older games own them."""

    @property
    def layers(self) -> Layers:
        """For each layer, the owned and the borrowed experts together, ascending."""
        return tuple(tuple(sorted(owned + borrowed)) for owned, borrowed in zip(self.owned, self.borrowed, strict=True))

    def by_bank(self, num_banks: int) -> list[list[int]]:
        """For each bank, the distinct experts that the pools take from it, ascending. Layer `l` uses bank `l % num_banks`."""
        return _by_bank(self.layers, num_banks)

    def borrowed_by_bank(self, num_banks: int) -> list[list[int]]:
        """For each bank, the distinct experts of older games that this game borrows (reads, never changes), ascending."""
        return _by_bank(self.borrowed, num_banks)

    def numbered(self, num_banks: int) -> list[int]:
        """All experts of the pools in one list, each as its number across banks (expert * num_banks + bank), ascending."""
        return _numbered(self.by_bank(num_banks))

    def borrowed_numbered(self, num_banks: int) -> list[int]:
        """All borrowed experts in one list, each as its number across banks (expert * num_banks + bank), ascending."""
        return _numbered(self.borrowed_by_bank(num_banks))


class PoolBook:
    """Records which experts each game owns and borrows, and proposes pools (sets of experts to route to) for new games.

    With pool routing, where each game has experts of its own, no expert has two owners.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self.games: dict[str, GamePools] = {}

    def propose(self, game: str, borrowed: Sequence[Sequence[int]] | None = None) -> GamePools:
        """Chooses pools for a new game: the unowned experts with the lowest ids, which may lie beyond the bank's present size.

        The proposal has no effect before `record` is called with it. With token routing no game owns experts: every pool is a whole bank.

        Args:
            game: the game's name.
            borrowed: for each bank, experts of older games that would be useful, the most useful first. Each pool borrows the first
                `shared_experts` of those that older games own in the same layers. None: no pool borrows.

        Raises:
            InvalidRequest: `borrowed` does not have one list for each bank, or names an expert that no game owns; or a bank is too small
                and may not grow.
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
        """The number of experts of each bank that are in use: the configured number, or more if ids beyond it were assigned."""
        assigned = (expert for pools in self.games.values() for layer in pools.owned for expert in layer)
        return max(self._config.num_experts, 1 + max(assigned, default=0))

    def record(self, pools: GamePools) -> None:
        """Makes these pools final: from now on their game owns the experts in `pools.owned`, and no later proposal gives them away."""
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
                f"num_experts: {there} are too few for {game!r} after {len(self.games)} other games with pool_size "
                f"{self._config.pool_size}; {wanted} are needed, and grow is off"
            )

    def _check_borrowed(self, borrowed: Sequence[Sequence[int]]) -> None:
        if len(borrowed) != self._config.num_banks:
            raise InvalidRequest(f"borrowed: {len(borrowed)} lists given, but there are {self._config.num_banks} banks")
        for bank, experts in enumerate(borrowed):
            for expert in sorted(set(experts) - self._owned(bank)):
                raise InvalidRequest(f"borrowed: expert {expert} of bank {bank} is owned by no game")


def _numbered(by_bank: list[list[int]]) -> list[int]:
    return sorted(expert * len(by_bank) + bank for bank, experts in enumerate(by_bank) for expert in experts)


def _by_bank(layers: Layers, num_banks: int) -> list[list[int]]:
    return [sorted({expert for layer in layers[bank::num_banks] for expert in layer}) for bank in range(num_banks)]

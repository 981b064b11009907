from dataclasses import replace

import pytest

from ooc_moe.agent.pools import GamePools, PoolBook
from ooc_moe.config.agent import PRESETS
from ooc_moe_wire.errors import InvalidRequest

TINY = PRESETS["tiny"]


def assign(book: PoolBook, game: str) -> GamePools:
    pools = book.propose(game)
    book.record(pools)
    return pools


def owned(pools: GamePools, bank: int, num_banks: int) -> set[int]:
    return set(pools.by_bank(num_banks)[bank])


@pytest.mark.parametrize("changes", [{}, {"pools": "shared"}, {"banks": "per-layer"}, {"banks": "per-layer", "pools": "shared"}])
def test_pools_of_different_games_never_share_an_expert(changes: dict) -> None:
    config = replace(TINY, **changes)
    book = PoolBook(config)
    all_pools = [assign(book, f"game {index}") for index in range(6)]
    for bank in range(config.num_banks):
        experts = [owned(pools, bank, config.num_banks) for pools in all_pools]
        assert sum(map(len, experts)) == len(set.union(*experts))


def test_unowned_experts_are_taken_in_order_of_ids() -> None:
    book = PoolBook(TINY)
    assert assign(book, "a").layers == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert assign(book, "b").layers == ((8, 9, 10, 11), (12, 13, 14, 15))
    assert assign(book, "c").layers == ((16, 17, 18, 19), (20, 21, 22, 23)), "beyond the bank: the agent grows it"


def test_where_the_bank_may_not_grow_a_game_without_a_pool_is_refused_and_owns_nothing() -> None:
    book = PoolBook(replace(TINY, grow=False))
    for game in "ab":
        assign(book, game)
    with pytest.raises(InvalidRequest, match="num_experts: 16 are too few for 'c' after 2 other games with pool_size 4; 24 are needed"):
        book.propose("c")
    assert list(book.games) == ["a", "b"]
    everyone = PoolBook(replace(TINY, grow=False, routing="token"))
    assert len({assign(everyone, game).layers for game in "abc"}) == 1, "nobody owns anything"


def test_a_game_can_share_one_pool_among_its_layers() -> None:
    book = PoolBook(replace(TINY, pools="shared"))
    assert assign(book, "a").layers == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert assign(book, "b").by_bank(1) == [[4, 5, 6, 7]]


def test_each_layer_counts_its_own_ids_where_it_has_its_own_bank() -> None:
    book = PoolBook(replace(TINY, banks="per-layer"))
    assert assign(book, "a").layers == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert assign(book, "b").by_bank(2) == [[4, 5, 6, 7], [4, 5, 6, 7]]


def test_recorded_pools_stay_owned() -> None:
    book = PoolBook(TINY)
    book.record(GamePools("old", ((1, 2, 3, 5), (6, 7, 8, 9)), ((), ())))
    assert assign(book, "new").layers == ((0, 4, 10, 11), (12, 13, 14, 15))


def test_with_token_routing_every_game_gets_the_whole_bank() -> None:
    book = PoolBook(replace(TINY, routing="token"))
    assert assign(book, "a").layers == assign(book, "b").layers == (tuple(range(16)),) * 2

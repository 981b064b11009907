"""Older games' experts in a new game's pools: they are read, gradients flow through them, and no bit of them changes."""

import io
from dataclasses import replace

import pytest
import torch

from ooc_moe.agent.agent import Agent
from ooc_moe.agent.pools import GamePools, PoolBook
from ooc_moe.config.agent import PRESETS
from ooc_moe.learning.lookahead import uses_of_update
from ooc_moe.moe.layer import TieredExperts, TieredMoE
from ooc_moe.moe.router import Router
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.store import Sections
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.agent.test_agent import CONTEXT, play, train

TINY = replace(PRESETS["tiny"], shared_experts=2)
VARIANTS = [{}, {"banks": "per-layer"}, {"pools": "shared"}]


def useful(agent: Agent, game: str = "a") -> list[list[int]]:
    """All experts of a game, the last ones first."""
    return [experts[::-1] for experts in agent.pools(game).by_bank(len(agent.caches))]


@pytest.fixture
def borrower(world):
    """An agent whose game "a" was trained a little, and whose game "b" borrows two experts for each pool."""

    def make(frames, **options) -> Agent:
        agent = world.agent(shared_experts=2, **options)
        train(agent, frames(agent, 4, CONTEXT), steps=2)
        agent.add_game("b", borrowed=useful(agent))
        return agent

    return make


# The book


def book_with(config, *games: str) -> PoolBook:
    book = PoolBook(config)
    for game in games:
        book.record(book.propose(game))
    return book


def test_each_pool_borrows_the_most_useful_of_those_that_learned_in_its_own_layers() -> None:
    pools = book_with(TINY, "a", "b").propose("c", [[13, 0, 2, 2, 1, 12, 7]])
    assert pools.owned == ((16, 17, 18, 19), (20, 21, 22, 23))
    assert pools.borrowed == ((0, 2), (12, 13))
    assert pools.layers == ((0, 2, 16, 17, 18, 19), (12, 13, 20, 21, 22, 23))
    assert pools.borrowed_by_bank(1) == [[0, 2, 12, 13]]
    assert pools.by_bank(1) == [[0, 2, 12, 13, 16, 17, 18, 19, 20, 21, 22, 23]]


def test_borrowed_experts_stay_their_first_owners_and_are_not_lent_on_as_the_borrowers() -> None:
    book = book_with(TINY, "a")
    book.record(book.propose("b", [[0, 1, 4, 5]]))
    assert book.games["b"].borrowed == ((0, 1), (4, 5))
    third = book.propose("c", [[0, 8, 1, 4]])
    assert third.owned == ((16, 17, 18, 19), (20, 21, 22, 23)), "nobody else's, and none is skipped"
    assert third.borrowed == ((0, 8), (4,))
    owned = [expert for pools in (*book.games.values(), third) for layer in pools.owned for expert in layer]
    assert len(owned) == len(set(owned))


def test_few_useful_ones_are_few_borrowed_ones() -> None:
    book = book_with(TINY, "a")
    assert book.propose("b", [[]]).borrowed == book.propose("b").borrowed == ((), ())
    assert book.propose("b", [[6]]).borrowed == ((), (6,))
    none_allowed = book_with(replace(TINY, shared_experts=0), "a")
    assert none_allowed.propose("b", [[0, 6]]).borrowed == ((), ())


@pytest.mark.parametrize(
    ("borrowed", "message"),
    [([[0], [1]], "borrowed: 2 lists given, but there are 1 banks"), ([[0, 9]], "borrowed: expert 9 of bank 0 is owned by no game")],
)
def test_experts_that_nobody_owns_cannot_be_borrowed(borrowed, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        book_with(TINY, "a").propose("b", borrowed)


def test_layers_with_banks_of_their_own_borrow_from_these() -> None:
    pools = book_with(replace(TINY, banks="per-layer"), "a").propose("b", [[3, 1, 0], [2]])
    assert pools == GamePools("b", ((4, 5, 6, 7), (4, 5, 6, 7)), ((1, 3), (2,)))


# The layer


def test_borrowed_weights_are_constants_that_gradients_flow_through(world, twin) -> None:
    (cache,) = world.caches(TINY, capacity=2)
    pool, read_only = (1, 4, 6, 9), (4, 9)
    torch.manual_seed(0)
    router = Router(TINY.dim, pool, top_k=2, noise=0.0)
    torch.nn.init.normal_(router.weight)
    layer = TieredMoE(TieredExperts(cache), router, read_only=read_only)
    x_ND = torch.randn(20, TINY.dim, requires_grad=True)
    output = layer(x_ND)
    output.y.square().sum().backward()
    assert set(output.tokens_by_expert) == set(pool)

    dense, y_ND = twin(TINY), x_ND.detach().clone().requires_grad_()
    for expert in read_only:
        for parameter in dense.experts[expert].values():
            parameter.requires_grad_(False)
    weight = router.weight.detach().clone().requires_grad_()
    normal_ND = torch.nn.functional.layer_norm(y_ND, (TINY.dim,))
    places_NK = torch.searchsorted(torch.tensor(pool), output.routed.experts_NK)
    gates_NK = (normal_ND @ weight.T).gather(1, places_NK).softmax(1)
    (y_ND + dense(normal_ND, output.routed.experts_NK, gates_NK)).square().sum().backward()

    torch.testing.assert_close(x_ND.grad, y_ND.grad)
    torch.testing.assert_close(router.weight.grad, weight.grad)
    gradients = layer._experts.gradients
    assert gradients.experts == [1, 6], "nothing is held for the others"
    for expert in gradients.experts:
        for name, gradient in gradients.of(expert).items():
            torch.testing.assert_close(gradient, dense.experts[expert][name].grad)


@pytest.mark.parametrize("read_only", [(), (4,), (1, 4, 6, 9)])
def test_in_bfloat16_the_same_experts_get_gradients_and_near_the_same_ones(world, read_only: tuple[int, ...]) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        (cache,) = world.caches(TINY, capacity=3)
        layer = TieredMoE(TieredExperts(cache), Router(TINY.dim, (1, 4, 6, 9), top_k=4), read_only=read_only)
        x_ND = torch.randn(20, TINY.dim, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y_ND = layer(x_ND).y
        y_ND.square().sum().backward()
        gradients = layer._experts.gradients
        assert gradients.experts == sorted({1, 4, 6, 9} - set(read_only))
        results.append([x_ND.grad, *(gradients.flat(expert) for expert in gradients.experts)])
    for plain, cast in zip(*results, strict=True):
        assert float((cast - plain).norm() / plain.norm()) < 3e-2


# The agent


@pytest.mark.parametrize("changes", VARIANTS)
def test_training_the_borrower_leaves_what_it_borrowed_as_it_was_bit_for_bit(borrower, frames, stored, changes: dict) -> None:
    agent = borrower(frames, **changes)
    before = [stored(cache) for cache in agent.caches]
    train(agent, frames(agent, 16, CONTEXT, seed=1), game="b", steps=3)
    pools, num_banks = agent.pools("b"), len(agent.caches)
    routed = agent(frames(agent, 16, CONTEXT, seed=1), game="b").routing_BTLK
    for layer, borrowed in enumerate(pools.borrowed):
        assert len(borrowed) == 2
        assert set(routed[:, :, layer].flatten().tolist()) & set(borrowed), "they are in use"
    for bank, cache in enumerate(agent.caches):
        owned = set(pools.by_bank(num_banks)[bank]) - set(pools.borrowed_by_bank(num_banks)[bank])
        after = stored(cache)
        assert {expert for expert in after if after[expert] != before[bank][expert]} == owned


def test_borrowed_experts_are_fetched_without_their_moments_and_are_never_dirty(borrower, frames, monkeypatch) -> None:
    agent = borrower(frames)
    (cache,) = agent.caches
    cache.flush()
    written = {info.expert: info.version for info in cache._shared.store.list_experts(cache.bank)}
    updated: list[int] = []
    updating = cache.updating
    monkeypatch.setattr(cache, "updating", lambda experts: (updated.extend(experts), updating(experts))[1])
    train(agent, frames(agent, 16, CONTEXT, seed=1), game="b", steps=2)
    borrowed = set(agent.pools("b").borrowed_by_bank(1)[0])
    assert updated
    assert not borrowed & set(updated)
    cache.flush()
    after = {info.expert: info.version for info in cache._shared.store.list_experts(cache.bank)}
    assert {expert for expert in after if after[expert] != written.get(expert)} == set(updated)


@pytest.mark.parametrize("changes", VARIANTS)
def test_room_for_one_expert_trains_a_borrower_bit_for_bit_as_room_for_all(borrower, frames, stored, changes: dict) -> None:
    results = []
    for capacity in (1, 16):
        agent = borrower(frames, capacity=capacity, **changes)
        measured = train(agent, frames(agent, 3, CONTEXT), game="b")
        dense = {name: value for name, value in agent.state_dict().items() if isinstance(value, torch.Tensor)}
        results.append((measured, [stored(cache) for cache in agent.caches], dense))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(value, results[1][2][name]) for name, value in results[0][2].items())


def test_the_router_chooses_among_own_and_borrowed_in_order_of_ids(borrower, frames) -> None:
    agent = borrower(frames, router_noise=3.0)
    frames_BTSHW = frames(agent, 16, CONTEXT)
    output = agent(frames_BTSHW, game="b")
    for layer, pool in enumerate(agent.pools("b").layers):
        assert list(output.experts_used[layer]) == list(pool), "noise reaches all six"
        assert pool == tuple(sorted(pool))
    assert agent.pools("b").layers[0] == (2, 3, 8, 9, 10, 11)
    replayed = agent(frames_BTSHW, game="b", routing=output.routing_BTLK)
    torch.testing.assert_close(replayed.logits_BTA, output.logits_BTA)
    assert agent.prefetch_set("b") == [2, 3, 6, 7, *range(8, 16)]


def test_the_owner_comes_back_to_exactly_its_own_and_the_borrower_too(borrower, frames, stored) -> None:
    agent = borrower(frames)
    for game, own in (("b", range(8, 16)), ("a", range(8)), ("b", range(8, 16))):
        before = stored(agent.caches[0])
        train(agent, frames(agent, 16, CONTEXT, seed=2), game=game, steps=2)
        after = stored(agent.caches[0])
        assert {expert for expert in after if after[expert] != before[expert]} == set(own)


def test_a_bank_grows_for_a_borrower_as_for_any_game(borrower, frames) -> None:
    agent = borrower(frames)
    pools = agent.add_game("c", borrowed=useful(agent, "b"))
    assert agent.caches[0].num_experts == 24
    assert pools.owned == ((16, 17, 18, 19), (20, 21, 22, 23))
    assert pools.borrowed == ((10, 11), (14, 15)), "b's own, and not what b borrowed from a: least useful here"
    agent(frames(agent, 2, CONTEXT), game="c")


@pytest.mark.parametrize("shared_experts", [2, 5])
def test_the_estimate_counts_the_router_rows_of_what_is_borrowed(world, shared_experts: int) -> None:
    agent = world.agent(games=("a",), shared_experts=shared_experts, num_games=3)
    for game in "bc":
        agent.add_game(game, borrowed=[list(range(agent.num_experts if game == "c" else 8))])
    assert agent.config.estimate_params().dense == sum(parameter.numel() for parameter in agent.parameters())


def test_the_state_keeps_who_owns_and_who_borrows(world, borrower, frames) -> None:
    store = world.store(TINY)
    agent = borrower(frames, store=store)
    agent.caches[0].flush()
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    restored = world.agent(games=(), store=store, seed=99, shared_experts=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert [restored.pools(game) for game in "ab"] == [agent.pools(game) for game in "ab"]
    frames_BTSHW = frames(agent, 2, CONTEXT)
    for ours, theirs in zip(play(agent.eval(), frames_BTSHW, game="b"), play(restored.eval(), frames_BTSHW, game="b"), strict=True):
        assert torch.equal(ours, theirs)
    train(restored, frames(agent, 16, CONTEXT), game="b", steps=1)
    assert not set(restored.gradients[0].experts) & set(agent.pools("b").borrowed_by_bank(1)[0])


def test_the_schedule_of_an_update_names_what_is_only_read_for_reading() -> None:
    experts_BTLK = torch.tensor([[[[1, 2], [5, 6]]], [[[2, 3], [6, 5]]]])
    low, high = (Use(experts, Sections.PARAMETERS) for experts in ((1, 2, 3), (5, 6)))
    (one,) = uses_of_update(experts_BTLK, [torch.tensor([0, 1])], num_banks=1, read_only=[[2, 6, 9]])
    assert one == [low, high, high, low, Use((1, 3, 5), Sections.ALL)]
    first, second = uses_of_update(experts_BTLK, [torch.tensor([0, 1])], num_banks=2, read_only=[[3], [5, 6]])
    assert first == [low, low, Use((1, 2), Sections.ALL)]
    assert second == [high, high], "an update of nothing is no use"

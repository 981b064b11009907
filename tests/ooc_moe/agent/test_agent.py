import io

import pytest
import torch

from ooc_moe.agent.agent import Agent, routed_tokens
from ooc_moe.moe.expert_adam import ExpertAdam
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_wire.errors import InvalidRequest, Unavailable

CONTEXT = 4
VARIANTS = [{}, {"routing": "token"}, {"banks": "per-layer"}, {"pools": "shared"}, {"attention": "shared"}]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def play(agent: Agent, frames_BTSHW, *, game: str = "a", starts_BT=None, seed: int = 0, deterministic: bool = False):
    """Acts on the frames one by one; returns actions, log-probabilities, values (B, T) and experts (B, T, L, K)."""
    segment, noise = agent.segment(game, len(frames_BTSHW)), generator(seed)
    acted = [
        agent.act(
            frames_BTSHW[:, t],
            segment,
            starts_N=None if starts_BT is None else starts_BT[:, t],
            deterministic=deterministic,
            generator=noise,
        )
        for t in range(frames_BTSHW.shape[1])
    ]
    return [torch.stack([getattr(one, name) for one in acted], dim=1) for name in ("actions_N", "log_probs_N", "values_N", "experts_NLK")]


def train(agent: Agent, frames_BTSHW, *, game: str = "a", steps: int = 3, seed: int = 0, max_norm: float = 1.0) -> list[float]:
    """A few optimizer steps on a made-up loss; returns losses and gradient norms."""
    dense = [*agent.game_parameters(game), *agent.shared_parameters()]
    adam, expert_adam = torch.optim.Adam(dense, lr=0.01), ExpertAdam(agent.caches, agent.gradients, lr=0.01)
    noise, measured = generator(seed), []
    for _ in range(steps):
        output = agent(frames_BTSHW, game=game, generator=noise)
        loss = output.logits_BTA[..., 0].square().sum() + (output.value_BT - 1).square().sum() + output.aux_loss
        adam.zero_grad()
        expert_adam.zero_grad()
        loss.backward()
        measured += [float(loss.detach()), expert_adam.clip_grad_norm(dense, max_norm)]
        adam.step()
        expert_adam.step()
    return measured


@pytest.mark.parametrize("changes", VARIANTS)
def test_acting_frame_by_frame_says_what_forward_says_of_the_same_frames(world, frames, changes: dict) -> None:
    agent = world.agent(games=("a", "b"), **changes)
    frames_BTSHW = frames(agent, 3, CONTEXT + 1)
    starts_BT = torch.zeros(3, CONTEXT + 1, dtype=torch.bool)
    starts_BT[0, 0] = starts_BT[1, 2] = starts_BT[1, 3] = starts_BT[2, 4] = True
    agent.eval()
    for starts in (None, starts_BT):
        actions_BT, log_probs_BT, values_BT, experts_BTLK = play(agent, frames_BTSHW, game="b", starts_BT=starts)
        with torch.no_grad():
            output = agent(frames_BTSHW, game="b", starts_BT=starts)
        expected_BT = output.logits_BTA.log_softmax(-1).gather(-1, actions_BT.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(experts_BTLK, output.routing_BTLK)
        torch.testing.assert_close(log_probs_BT, expected_BT, atol=1e-5, rtol=0)
        torch.testing.assert_close(values_BT, output.value_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS)
def test_replayed_routing_gives_ratios_of_one_before_the_first_update(world, frames, changes: dict) -> None:
    agent = world.agent(**changes).train()
    frames_BTSHW = frames(agent, 4, CONTEXT)
    starts_BT = torch.zeros(4, CONTEXT, dtype=torch.bool)
    starts_BT[1, 2] = True
    actions_BT, log_probs_BT, _, experts_BTLK = play(agent, frames_BTSHW, starts_BT=starts_BT)
    output = agent(frames_BTSHW, game="a", starts_BT=starts_BT, routing=experts_BTLK)
    new_BT = output.logits_BTA.log_softmax(-1).gather(-1, actions_BT.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close((new_BT.detach() - log_probs_BT).exp(), torch.ones(4, CONTEXT), atol=1e-5, rtol=0)
    assert torch.equal(output.routing_BTLK, experts_BTLK)
    clean = agent.eval()(frames_BTSHW, game="a", starts_BT=starts_BT).routing_BTLK
    assert not torch.equal(clean, experts_BTLK), "the noise did move the choice"


@pytest.mark.parametrize("changes", VARIANTS)
def test_room_for_one_expert_trains_bit_for_bit_as_room_for_all(world, frames, stored, changes: dict) -> None:
    results = []
    for capacity in (1, 3, 16):
        agent = world.agent(capacity=capacity, **changes)
        measured = train(agent, frames(agent, 3, CONTEXT))
        results.append((measured, agent.state_dict(), [stored(cache) for cache in agent.caches]))
    for measured, state, experts in results[1:]:
        assert measured == results[0][0]
        assert experts == results[0][2]
        for name, value in results[0][1].items():
            assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value, name


def test_one_seed_twice_is_equal_bit_for_bit_and_another_is_not(world, frames, stored) -> None:
    def run(seed: int):
        agent = world.agent(seed=seed)
        frames_BTSHW = frames(agent, 3, CONTEXT)
        acted = play(agent, frames_BTSHW, seed=seed)
        measured = train(agent, frames_BTSHW, seed=seed)
        return measured, [x.tolist() for x in acted], stored(agent.caches[0])

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]


def test_two_threads_repeat_bit_for_bit_where_tensors_are_large_enough_to_be_split(world, frames) -> None:
    def run() -> list[float]:
        agent = world.agent(dim=64, hidden=64, top_k=4)
        return train(agent, frames(agent, 64, CONTEXT), steps=2)

    torch.set_num_threads(2)
    try:
        assert run() == run()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("changes", [{}, {"banks": "per-layer"}])
def test_experts_of_other_games_stay_cold_bit_for_bit_and_are_never_fetched(world, frames, stored, changes: dict) -> None:
    agent = world.agent(games=("a", "b"), **changes)
    train(agent, frames(agent, 4, CONTEXT), game="a")
    before = [stored(cache) for cache in agent.caches]
    dense_before = {name: value.clone() for name, value in agent.networks[_module(agent, "a")].state_dict().items()}
    agent.caches[0]._shared.store.fetched.clear()
    train(agent, frames(agent, 4, CONTEXT, seed=1), game="b")
    fetched = set(agent.caches[0]._shared.store.fetched)
    own = agent.pools("b").by_bank(len(agent.caches))
    for bank, cache in enumerate(agent.caches):
        after = stored(cache)
        changed = {expert for expert in after if after[expert] != before[bank][expert]}
        assert changed
        assert changed <= set(own[bank])
        assert {expert for name, expert in fetched if name == cache.bank} <= set(own[bank])
    for name, value in agent.networks[_module(agent, "a")].state_dict().items():
        assert torch.equal(value, dense_before[name]), name


def _module(agent: Agent, game: str) -> str:
    return dict(zip(agent.games, agent.networks, strict=True))[game]


def test_no_token_leaves_the_pool_of_its_game_and_layer(world, frames) -> None:
    agent = world.agent(games=("a", "b"))
    for game in "ab":
        output = agent(frames(agent, 8, CONTEXT), game=game)
        for layer, pool in enumerate(agent.pools(game).layers):
            assert set(output.routing_BTLK[:, :, layer].flatten().tolist()) <= set(pool)
            assert set(output.experts_used[layer]) <= set(pool)
            assert sum(output.experts_used[layer].values()) == 8 * CONTEXT * 2


def test_the_balancing_loss_reaches_the_games_own_router_rows_and_no_others(world, frames) -> None:
    agent = world.agent(games=("a", "b"))
    agent(frames(agent, 4, CONTEXT), game="b").aux_loss.backward()
    rows = {name: parameter.grad for name, parameter in agent.named_parameters() if name.endswith("router.weight")}
    assert len(rows) == 4
    for name, gradient in rows.items():
        if f".{_module(agent, 'b')}." in f".{name}":
            assert gradient.shape == (4, 16)
            assert gradient.any()
        else:
            assert gradient is None


def test_token_routing_reaches_experts_of_the_whole_bank_with_one_router_for_all_games(world, frames) -> None:
    agent = world.agent(routing="token", games=("a", "b"), router_noise=3.0)
    used = set(agent(frames(agent, 16, CONTEXT), game="a").routing_BTLK.flatten().tolist())
    assert len(used) > 12
    train(agent, frames(agent, 2, CONTEXT), game="a", steps=1)
    a, b = (list(agent.game_parameters(game)) for game in "ab")
    assert {*agent.routers.parameters()} < {*agent.shared_parameters()}
    assert all(parameter.grad.any() for parameter in agent.routers.parameters())
    assert not {*a} & {*b}
    assert agent.caches[0].num_experts == 16


@pytest.mark.parametrize("change", ["future", "earlier episode"])
def test_what_must_not_matter_does_not(world, frames, change: str) -> None:
    agent = world.agent().eval()
    frames_BTSHW = frames(agent, 2, CONTEXT)
    starts_BT = torch.zeros(2, CONTEXT, dtype=torch.bool)
    starts_BT[:, 2] = True
    other_BTSHW = frames_BTSHW.clone()
    touched, same = (slice(3, None), slice(0, 3)) if change == "future" else (slice(0, 2), slice(2, None))
    other_BTSHW[:, touched] = 255 - other_BTSHW[:, touched]
    with torch.no_grad():
        first, second = (agent(x, game="a", starts_BT=starts_BT) for x in (frames_BTSHW, other_BTSHW))
    torch.testing.assert_close(first.logits_BTA[:, same], second.logits_BTA[:, same], atol=1e-6, rtol=0)
    assert not torch.allclose(first.logits_BTA[:, touched], second.logits_BTA[:, touched], atol=1e-6, rtol=0)


def test_the_past_of_an_episode_does_matter(world, frames) -> None:
    agent = world.agent().eval()
    frames_BTSHW = frames(agent, 2, CONTEXT)
    other_BTSHW = frames_BTSHW.clone()
    other_BTSHW[:, 0] = 255 - other_BTSHW[:, 0]
    with torch.no_grad():
        assert not torch.equal(agent(frames_BTSHW, game="a").value_BT[:, -1], agent(other_BTSHW, game="a").value_BT[:, -1])


def test_games_begin_alike_whatever_order_they_come_in(world) -> None:
    first, second = world.agent(games=("a", "b", "c")), world.agent(games=("c", "b", "a"))
    for game in "abc":
        ours, theirs = (agent.networks[_module(agent, game)].state_dict() for agent in (first, second))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(*(first.networks[_module(first, game)].embedding_TD for game in "ab"))


def test_making_an_agent_leaves_the_global_generator_alone(world) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    world.agent(games=("a", "b"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_bank_grows_when_a_new_game_finds_no_unowned_experts(world, frames) -> None:
    agent = world.agent(games=("a", "b"))
    assert agent.caches[0].num_experts == 16
    agent.add_game("c")
    assert agent.caches[0].num_experts == 24
    assert agent.caches[0]._shared.store.get_bank("test/experts").spec.num_experts == 24
    assert set(agent(frames(agent, 4, CONTEXT), game="c").routing_BTLK.flatten().tolist()) <= set(range(16, 24))


def test_a_game_whose_bank_could_not_grow_is_not_known_and_can_be_added_later(world, frames, monkeypatch) -> None:
    agent = world.agent(games=("a", "b"))
    with monkeypatch.context() as patched:
        patched.setattr(agent.caches[0]._shared.store, "grow_bank", lambda *_: (_ for _ in ()).throw(Unavailable("away")))
        with pytest.raises(Unavailable):
            agent.add_game("c")
    assert agent.games == ["a", "b"]
    assert agent.add_game("c").by_bank(1) == [list(range(16, 24))]
    agent(frames(agent, 1, 1), game="c")


def test_adding_a_known_game_changes_nothing(world) -> None:
    agent = world.agent()
    before = agent.pools("a")
    network = agent.networks[_module(agent, "a")]
    assert agent.add_game("a") == before
    assert agent.networks[_module(agent, "a")] is network
    assert agent.games == ["a"]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_state_survives_a_file_and_an_agent_that_knew_no_game(world, frames, changes: dict) -> None:
    games = ("pixel/catch", "a.b", "keys", "")
    store = world.store(world.agent(games=(), **changes).config)
    agent = world.agent(games=games, store=store, **changes)
    frames_BTSHW = frames(agent, 2, CONTEXT)
    train(agent, frames_BTSHW, game="keys")
    for cache in agent.caches:
        cache.flush()
    snapshot = store.create_snapshot(agent.config.bank_names("test"))
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        expected = [agent.eval()(frames_BTSHW, game=game).logits_BTA for game in games]
    went_on = train(agent.train(), frames_BTSHW, game="keys")
    for cache in agent.caches:
        cache.close()
    store.restore_snapshot(snapshot.id)

    restored = world.agent(games=(), store=store, seed=99, **changes)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.games == list(games)
    for game, logits_BTA in zip(games, expected, strict=True):
        assert restored.pools(game) == agent.pools(game)
        with torch.no_grad():
            assert torch.equal(restored.eval()(frames_BTSHW, game=game).logits_BTA, logits_BTA)
    assert train(restored.train(), frames_BTSHW, game="keys") == went_on
    assert restored.add_game("new") == agent.add_game("new")


def test_loading_grows_a_bank_that_is_too_small(world) -> None:
    state = world.agent(games=("a", "b", "c")).state_dict()
    fresh = world.agent(games=())
    fresh.load_state_dict(state)
    assert fresh.caches[0].num_experts == 24


def test_loading_over_other_pools_is_refused(world) -> None:
    state = world.agent(games=("a", "b")).state_dict()
    with pytest.raises(InvalidRequest, match="game 'a' has pools"):
        world.agent(games=("b", "a")).load_state_dict(state)


def test_shared_attention_is_trained_by_every_game_and_by_none_alone(world, frames) -> None:
    agent = world.agent(games=("a", "b"), attention="shared")
    assert {*agent.attentions.parameters()} < {*agent.shared_parameters()}
    for game in "ab":
        before = [parameter.detach().clone() for parameter in agent.attentions.parameters()]
        train(agent, frames(agent, 2, CONTEXT), game=game, steps=1)
        assert not any(map(torch.equal, agent.attentions.parameters(), before))
    network = agent.networks[_module(agent, "a")]
    assert all(block.attention is attention for block, attention in zip(network.blocks, agent.attentions, strict=True))


def test_the_gradient_of_shared_attention_is_the_sum_over_games_of_that_of_their_own(world, frames) -> None:
    """The twin has an attention per game with the shared one's values."""
    agent, twin = (world.agent(games=("a", "b"), attention=attention) for attention in ("shared", "per-game"))
    for game in "ab":
        twin.networks[_module(twin, game)].load_state_dict(agent.networks[_module(agent, game)].state_dict())
    for one in (agent, twin):
        for game in "ab":
            one.eval()(frames(one, 2, CONTEXT), game=game).value_BT.sum().backward()
    for layer, attention in enumerate(agent.attentions):
        own = [twin.networks[_module(twin, game)].blocks[layer].attention for game in "ab"]
        for shared, first, second in zip(attention.parameters(), *(module.parameters() for module in own), strict=True):
            torch.testing.assert_close(shared.grad, first.grad + second.grad)


@pytest.mark.parametrize("changes", [{}, {"routing": "token"}, {"attention": "shared"}])
def test_parameters_divide_into_what_all_games_share_and_the_games(world, changes: dict) -> None:
    agent = world.agent(games=("a", "b"), **changes)
    parts = [*agent.shared_parameters(), *agent.game_parameters("a"), *agent.game_parameters("b")]
    assert len({id(parameter) for parameter in parts}) == len(parts)
    assert {id(parameter) for parameter in parts} == {id(parameter) for parameter in agent.parameters()}


def test_the_prefetch_set_is_numbered_as_the_detector_numbers_experts(world) -> None:
    assert world.agent(games=("a", "b")).prefetch_set("b") == list(range(8, 16))
    per_layer = world.agent(games=("a", "b"), banks="per-layer")
    assert per_layer.prefetch_set("b") == [expert * 2 + bank for expert in range(4, 8) for bank in (0, 1)]


def test_usage_counts_tokens_by_layer_and_expert() -> None:
    experts_NLK = torch.tensor([[[0, 1], [5, 6]], [[1, 2], [6, 7]]], dtype=torch.int32)
    assert routed_tokens(experts_NLK) == {"0": {"0": 1, "1": 2, "2": 1}, "1": {"5": 1, "6": 2, "7": 1}}


def test_deterministic_acting_takes_the_likeliest_action_without_noise(world, frames) -> None:
    agent = world.agent().train()
    frames_BTSHW = frames(agent, 3, CONTEXT)
    first = play(agent, frames_BTSHW, deterministic=True, seed=0)
    second = play(agent, frames_BTSHW, deterministic=True, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with torch.no_grad():
        output = agent.eval()(frames_BTSHW, game="a")
    assert torch.equal(first[0], output.logits_BTA.argmax(-1))


def test_drawn_actions_follow_the_generator_and_their_probabilities(world, frames) -> None:
    agent = world.agent().eval()
    frames_BTSHW = frames(agent, 2, 1).repeat(500, 1, 1, 1, 1)
    first, again = (play(agent, frames_BTSHW, seed=1) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], play(agent, frames_BTSHW, seed=2)[0])
    assert len(first[0].unique()) == 18, "an untrained policy tries everything"
    assert first[1].min() < first[1].max() < 0


def test_dropout_is_off_in_evaluation(world, frames) -> None:
    agent = world.agent(dropout=0.5, router_noise=0.0)
    frames_BTSHW = frames(agent, 2, CONTEXT)

    def value() -> torch.Tensor:
        return agent(frames_BTSHW, game="a").value_BT

    agent.train()
    assert not torch.equal(value(), value())
    agent.eval()
    assert torch.equal(value(), value())


def test_the_prediction_is_made_when_it_is_read_and_of_the_latest_frames(world, frames) -> None:
    agent = world.agent()
    frames_BTSHW = frames(agent, 2, CONTEXT)
    output, acted = agent(frames_BTSHW, game="a"), agent.act(frames_BTSHW[:, 0], agent.segment("a", 2))
    for either in (output, acted):
        with pytest.raises(InvalidRequest, match="no predictor"):
            _ = either.prediction
    asked: list[torch.Tensor] = []
    agent.predictor = lambda frames_NSHW: (asked.append(frames_NSHW), "a game")[1]
    agent(frames_BTSHW, game="a")
    agent.act(frames_BTSHW[:, 0], agent.segment("a", 2))
    assert asked == []
    assert output.prediction == acted.prediction == "a game"
    assert torch.equal(asked[0], frames_BTSHW[:, -1])
    assert torch.equal(asked[1], frames_BTSHW[:, 0])


def test_the_counters_of_every_cache_are_read_when_they_are_asked_for(world, frames) -> None:
    agent = world.agent(banks="per-layer")
    output = agent(frames(agent, 2, CONTEXT), game="a")
    assert [one.bank for one in output.cache_stats] == ["test/layer0", "test/layer1"]
    before = output.cache_stats[0].accesses
    assert before > 0
    agent(frames(agent, 2, CONTEXT), game="a")
    assert output.cache_stats[0].accesses > before


def test_neither_a_forward_pass_nor_acting_reads_a_caches_counters(world, frames, monkeypatch) -> None:
    agent = world.agent()
    monkeypatch.setattr(ExpertCache, "stats", lambda cache: pytest.fail("the counters were read"))
    output = agent(frames(agent, 2, CONTEXT), game="a")
    agent.act(frames(agent, 2, 1)[:, 0], agent.segment("a", 2))
    repr(output)


BAD_CALLS = [
    (lambda agent, x: agent(x, game="zelda"), "game: 'zelda' is unknown to the agent, which knows a"),
    (lambda agent, x: agent.segment("zelda", 2), "game: 'zelda'"),
    (lambda agent, x: agent.pools("zelda"), "game: 'zelda'"),
    (lambda agent, x: agent(x[..., :40], game="a"), r"frames: got torch.uint8 \(2, 4, 4, 42, 40\), expected .*\(4, 42, 42\)"),
    (lambda agent, x: agent(x[:, :, :3], game="a"), r"frames: got torch.uint8 \(2, 4, 3, 42, 42\)"),
    (lambda agent, x: agent(x[0], game="a"), r"frames: got torch.uint8 \(4, 4, 42, 42\)"),
    (lambda agent, x: agent(x.float(), game="a"), "frames: got torch.float32"),
    (lambda agent, x: agent(x.repeat(1, 2, 1, 1, 1), game="a"), "frames: 8 in each segment"),
    (lambda agent, x: agent(x, game="a", starts_BT=torch.zeros(2, 3, dtype=torch.bool)), r"starts: got torch.bool \(2, 3\)"),
    (lambda agent, x: agent(x, game="a", starts_BT=torch.zeros(2, 4)), r"starts: got torch.float32 \(2, 4\), expected torch.bool"),
    (lambda agent, x: agent(x, game="a", routing=torch.zeros(2, 4, 3, 2)), r"routing: .*\(2, 4, 3, 2\)"),
    (lambda agent, x: agent(x, game="a", routing=torch.full((2, 4, 2, 2), 9)), "expert 9 is not one of this router's"),
    (lambda agent, x: agent.act(x[:, 0].float(), agent.segment("a", 2)), "frames: got torch.float32"),
    (lambda agent, x: agent.act(x[:1, 0], agent.segment("a", 2)), "frames: of 1 environments, but the segment has 2"),
    (lambda agent, x: agent.act(x[:, 0], agent.segment("a", 2), starts_N=torch.zeros(3, dtype=torch.bool)), "starts: got"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_a_wrong_call_is_refused_with_what_came_and_what_was_expected(world, frames, call, message: str) -> None:
    agent = world.agent()
    with pytest.raises(InvalidRequest, match=message):
        call(agent, frames(agent, 2, CONTEXT))


def test_a_full_segment_takes_no_more_frames(world, frames) -> None:
    agent = world.agent()
    x_NSHW, segment = frames(agent, 2, 1)[:, 0], agent.segment("a", 2)
    for _ in range(CONTEXT + 1):
        agent.act(x_NSHW, segment)
    with pytest.raises(InvalidRequest, match="full after 5 frames"):
        agent.act(x_NSHW, segment)


def test_caches_that_do_not_fit_the_configuration_are_refused(world) -> None:
    agent = world.agent()
    with pytest.raises(InvalidRequest, match="caches: 2 given"):
        Agent(agent.config, agent.caches * 2, seed=0)
    with pytest.raises(InvalidRequest, match="layout is not that of dim 16, hidden 32"):
        Agent(agent.config, world.agent(dim=8).caches, seed=0)

"""What is told of an update and guessed of acting: schedules are what is then done, change no bit, and spare fetches."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ooc_moe import envs
from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.learning.learner import Learner
from ooc_moe.learning.lookahead import schedule_acting, uses_of_update
from ooc_moe.learning.protection import Unprotected
from ooc_moe.learning.rollout import Collector
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Sections
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import Belady

GAME = "pixel/toward"
PPO = PPOConfig(num_envs=4, rollout_steps=8, epochs=2, minibatch_segments=2)


class Run:
    """Updates of a tiny agent with so many slots in all; `hashes` are of the experts that the store holds at the end."""

    def __init__(
        self, *, slots: int, prefetch: str = "off", told: bool = True, updates: int = 3, banks: str = "shared", replay: bool = True
    ) -> None:
        agent_config, ppo = replace(PRESETS["tiny"], banks=banks), replace(PPO, replay_routing=replay)
        config = RunConfig(run_dir=Path("run"), games=(GAME,), agent=agent_config, ppo=ppo, prefetch=prefetch, protection="none")
        store = InMemoryStore()
        for spec in agent_config.bank_specs("run", 0):
            store.create_bank(spec)
        names = agent_config.bank_names("run")
        accesses: list[int] = []
        caches = [ExpertCache(store, name, capacity_experts=slots // len(names), on_access=accesses.extend) for name in names]
        if not told:
            for cache in caches:
                cache.schedule = lambda uses, ahead: None  # type: ignore[method-assign]
        agent = Agent(agent_config, caches, seed=0)
        agent.add_game(GAME)
        generator = torch.Generator().manual_seed(0)
        game_envs = envs.make(GAME, PPO.num_envs, frame_size=agent_config.frame_size, frame_stack=agent_config.frame_stack, num_threads=1)
        collector = Collector(agent, game_envs, PPO, generator=generator, on_segment=lambda frames: None, ahead=prefetch != "off")
        learner = Learner(agent, GAME, config, protection=Unprotected(), generator=generator)
        collector.reset(0)
        self.losses = []
        self.hits_of_acting, self.optimum_of_acting = 0, 0
        for _ in range(updates):
            hits = sum(cache.stats().hits for cache in caches)
            accesses.clear()
            rollout = collector.collect()
            self.hits_of_acting += sum(cache.stats().hits for cache in caches) - hits
            self.optimum_of_acting += hits_of_the_optimum(accesses, slots)
            before = [cache.stats() for cache in caches]
            self.losses.append(learner.update(rollout, remaining=1.0))
            self.last: list[CacheStats] = [cache.stats() - earlier for cache, earlier in zip(caches, before, strict=True)]
        self.uses_left = [cache._table.schedule.num_left for cache in caches]
        self.expert_bytes = caches[0].layout.body_bytes
        for cache in caches:
            cache.close()
        self.hashes = [self._hash(store, cache) for cache in caches]

    def _hash(self, store: InMemoryStore, cache: ExpertCache) -> str:
        bodies = [bytearray(cache.layout.body_bytes) for _ in range(cache.num_experts)]
        list(store.fetch(cache.bank, range(cache.num_experts), into=lambda expert: memoryview(bodies[expert])))
        return sha256(b"".join(bodies)).hexdigest()


def hits_of_the_optimum(accesses: list[int], slots: int) -> int:
    """Belady's, from empty slots on."""
    policy, residents, hits = Belady(accesses), set(), 0
    for expert in accesses:
        if expert in residents:
            policy.touch(expert)
            hits += 1
            continue
        if len(residents) == slots:
            victim = next(policy.victims())
            policy.evict(victim)
            residents.remove(victim)
        policy.insert(expert)
        residents.add(expert)
    return hits


@pytest.fixture(scope="module")
def untold() -> Run:
    """With room for everything, and no schedule."""
    return Run(slots=16, told=False)


def test_the_uses_are_each_minibatchs_layers_forward_backward_and_its_update():
    experts_BTLK = torch.tensor([[[[1, 2], [5, 6]]], [[[2, 3], [6, 5]]], [[[0, 1], [4, 7]]]])
    reads, all_of = Sections.PARAMETERS, Sections.ALL
    minibatches = [torch.tensor([1, 0]), torch.tensor([2])]
    low, high = Use((1, 2, 3), reads), Use((5, 6), reads)
    (shared,) = uses_of_update(experts_BTLK, minibatches, num_banks=1)
    assert shared[:5] == [low, high, high, low, Use((1, 2, 3, 5, 6), all_of)]
    assert shared[5:] == [Use(x, reads) for x in ((0, 1), (4, 7), (4, 7), (0, 1))] + [Use((0, 1, 4, 7), all_of)]
    first, second = uses_of_update(experts_BTLK, minibatches, num_banks=2)
    assert first[:3] == [low, low, Use((1, 2, 3), all_of)]
    assert second[:3] == [high, high, Use((5, 6), all_of)]


@pytest.mark.parametrize("banks", ["shared", "per-layer"])
@pytest.mark.parametrize("slots", [2, 6])
def test_an_update_does_what_its_schedule_says_to_the_last_use(slots: int, banks: str):
    assert set(Run(slots=slots, banks=banks, updates=1).uses_left) == {0}


@pytest.mark.parametrize("prefetch", ["off", "detector"])
@pytest.mark.parametrize("slots", [1, 2, 6])
def test_neither_room_nor_prefetch_nor_the_schedule_change_a_bit(untold: Run, slots: int, prefetch: str):
    run = Run(slots=slots, prefetch=prefetch)
    assert run.losses == untold.losses
    assert run.hashes == untold.hashes


@pytest.mark.parametrize("prefetch", ["off", "detector"])
def test_where_the_router_chooses_anew_nothing_is_scheduled_and_room_changes_no_bit(untold: Run, prefetch: str):
    whole, part = (Run(slots=slots, prefetch=prefetch, replay=False, updates=1) for slots in (16, 2))
    assert part.losses == whole.losses != untold.losses[:1]
    assert part.hashes == whole.hashes
    assert part.last[0].refetches > 0
    assert part.last[0].ahead.get("issued", 0) == 0
    assert part.uses_left == [0]


def test_with_room_for_the_working_set_an_update_fetches_no_expert_twice():
    run = Run(slots=8, updates=1)
    (cache,) = run.last
    assert cache.bytes_in <= 8 * run.expert_bytes + 8 * run.expert_bytes  # Acting brought parameters only; each comes whole once.
    assert cache.bytes_in == (cache.misses + cache.refetches) * run.expert_bytes


def test_with_less_room_the_schedule_spares_bytes_and_then_the_waiting():
    untold, told, ahead = (Run(slots=6, told=False), Run(slots=6), Run(slots=6, prefetch="detector"))
    assert told.last[0].bytes_in < 0.85 * untold.last[0].bytes_in
    waits = [run.last[0].misses + run.last[0].refetches for run in (told, ahead)]
    assert waits[1] < waits[0]
    assert ahead.last[0].ahead["useful"] > 0.5 * ahead.last[0].ahead["issued"]


def test_acting_with_room_for_a_part_of_a_game_keeps_what_is_asked_for_first():
    """Layer after layer is a loop that is larger than the cache, in which LRU keeps hardly anything until it is asked for again."""
    untold, told = Run(slots=4, told=False, updates=2), Run(slots=4, updates=2)
    assert untold.hits_of_acting < 0.3 * told.optimum_of_acting
    assert told.hits_of_acting > 0.6 * told.optimum_of_acting  # The guess is a guess: four environments often choose others than before.


def test_acting_is_told_what_each_group_used_layer_by_layer_where_that_does_not_fit():
    told: list[list[Use]] = []
    small, large = (SimpleNamespace(capacity_experts=size, schedule=lambda uses, ahead: told.append(list(uses))) for size in (3, 4))
    groups = [torch.tensor([[[1, 2], [5, 6]], [[2, 1], [6, 5]]]), torch.tensor([[[3, 0], [5, 4]]])]
    schedule_acting([small, large], groups, ahead=True)
    step = [Use((1, 2), Sections.PARAMETERS), Use((0, 3), Sections.PARAMETERS)]
    assert told == [step + step, []]


def test_an_unknown_admission_is_refused():
    with pytest.raises(InvalidRequest, match="prefetch_admission: 'maybe'"):
        RunConfig(run_dir=Path("run"), games=(GAME,), agent=PRESETS["tiny"], prefetch_admission="maybe")

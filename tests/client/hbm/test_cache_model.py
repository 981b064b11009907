"""The cache against a plain dict under random operations: whatever the capacity, what is read is what was last written."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore, Sections
from tests.client.conftest import LAYOUT, NUM_EXPERTS, spec, step_of
from tests.conftest import DaemonProcess

experts = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS, unique=True)
uses = st.lists(st.tuples(experts, st.sampled_from(Sections)), max_size=6)


class CacheAgainstDict(RuleBasedStateMachine):
    """`model` counts the updates of each expert; the `step` tensor and the first weight must say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dict.fromkeys(range(NUM_EXPERTS), 0)
        self.snapshot: tuple[int, dict[int, int]] | None = None
        self.store: ExpertStore = InMemoryStore()

    @initialize(capacity=st.integers(1, NUM_EXPERTS + 2), admission=st.sampled_from(AdmissionMode))
    def begin(self, capacity: int, admission: AdmissionMode) -> None:
        self.store.create_bank(spec("b"))
        self.cache = ExpertCache(self.store, "b", capacity_experts=capacity, admission=admission)
        self.first_weight = {}
        for expert in range(NUM_EXPERTS):
            body = bytearray(LAYOUT.body_bytes)
            LAYOUT.initialize(body, seed=7, expert=expert)
            self.first_weight[expert] = float(LAYOUT.arrays(body)["w1"].flat[0])

    def weight(self, expert: int) -> float:
        """The first weight after the updates so far."""
        return float(np.float32(self.first_weight[expert]) + np.float32(self.model[expert]))

    def check(self, wave: list[int], slots: list[int], sections: Sections) -> None:
        assert len(set(slots)) == len(wave)
        for expert, slot in zip(wave, slots, strict=True):
            assert self.cache.views["w1"][slot, 0, 0].item() == self.weight(expert)
            if sections is Sections.ALL:
                assert self.cache.views["step"][slot, 0].item() == self.model[expert]

    @rule(experts=experts, sections=st.sampled_from(Sections), counted=st.booleans())
    def read(self, experts: list[int], sections: Sections, counted: bool) -> None:
        for wave in self.cache.waves(experts):
            with self.cache.reading(wave, sections=sections, counted=counted) as slots:
                self.check(wave, slots, sections)

    @rule(experts=experts)
    def update(self, experts: list[int]) -> None:
        for wave in self.cache.waves(experts):
            with self.cache.updating(wave) as slots:
                self.check(wave, slots, Sections.ALL)
                for expert, slot in zip(wave, slots, strict=True):
                    self.model[expert] += 1
                    self.cache.views["step"][slot] += 1
                    self.cache.views["w1"][slot, 0, 0] = self.weight(expert)

    @rule(experts=experts, sections=st.sampled_from(Sections), within_s=st.none() | st.floats(0, 1e-3), probability=st.floats(0, 1))
    def prefetch(self, experts: list[int], sections: Sections, within_s: float | None, probability: float) -> None:
        self.cache.prefetch(experts, sections=sections, within_s=within_s, probabilities=dict.fromkeys(experts, probability))

    @rule(uses=uses, ahead=st.booleans())
    def tell_a_schedule_that_may_be_wrong(self, uses: list[tuple[list[int], Sections]], ahead: bool) -> None:
        self.cache.schedule([Use(tuple(experts), sections) for experts, sections in uses], ahead=ahead)

    @rule(uses=uses, ahead=st.booleans())
    def follow_a_schedule(self, uses: list[tuple[list[int], Sections]], ahead: bool) -> None:
        self.tell_a_schedule_that_may_be_wrong(uses, ahead)
        for experts, sections in uses:
            if sections is Sections.ALL:
                self.update(experts)
            else:
                self.read(experts, sections, counted=True)

    @rule()
    def cancel_prefetch(self) -> None:
        self.cache.cancel_prefetch()

    @rule()
    def leave_working_set(self) -> None:
        self.cache.write_back()
        self.cache.new_working_set()

    @rule(experts=experts)
    def write_back(self, experts: list[int]) -> None:
        self.cache.write_back(experts)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert self.cache.stats().dirty == 0
        assert {expert: step_of(self.store, "b", expert) for expert in self.model} == self.model

    @rule()
    def take_snapshot(self) -> None:
        self.cache.flush()
        self.snapshot = self.store.create_snapshot(["b"]).id, dict(self.model)

    @precondition(lambda self: self.snapshot)
    @rule()
    def restore_snapshot(self) -> None:
        assert self.snapshot is not None
        self.cache.flush()
        self.store.restore_snapshot(self.snapshot[0])
        self.cache.forget()
        self.model = dict(self.snapshot[1])

    @invariant()
    def counts_add_up(self) -> None:
        stats = self.cache.stats()
        assert stats.hits + stats.misses == stats.accesses
        assert stats.resident <= stats.capacity

    @invariant()
    def every_prefetch_ends_as_exactly_one(self) -> None:
        with self.cache._shared.changed:
            residents = self.cache._table.residents.values()
            unused = [(resident.scheduled, resident.num_bytes) for resident in residents if resident.prefetched]
            queued = [(False, sections.num_bytes(LAYOUT)) for sections in self.cache._prefetcher._queue.values()]
            stats = self.cache.stats()
            assert stats.dirty == sum(resident.dirty for resident in residents)
            assert stats.resident + self.cache._table.num_free == stats.capacity
        for scheduled in (False, True):
            counted = stats.ahead if scheduled else {name.removeprefix("prefetch_"): count for name, count in stats.to_dict().items()}
            sizes = [size for source, size in unused + queued if source is scheduled]
            for unit, open_ones in (("", len(sizes)), ("_bytes", sum(sizes))):
                ended = sum(counted.get(end + unit, 0) for end in ("useful", "late", "wasted", "cancelled"))
                assert counted.get(f"issued{unit}", 0) == ended + open_ones

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert {expert: step_of(self.store, "b", expert) for expert in self.model} == self.model
            self.store.close()


TestCacheAgainstDict = CacheAgainstDict.TestCase
TestCacheAgainstDict.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("capacity", [1, 4])
def test_training_in_random_waves_loses_nothing_through_kills_of_the_daemon(daemon: DaemonProcess, capacity: int):
    rng = np.random.default_rng(capacity)
    store = RemoteStore(daemon.unix_target)
    store.create_bank(spec("b"))
    model = dict.fromkeys(range(NUM_EXPERTS), 0)
    with ExpertCache(store, "b", capacity_experts=capacity) as cache:
        for step in range(60):
            if step == 30:
                daemon.restart()
            chosen = rng.choice(NUM_EXPERTS, size=rng.integers(1, NUM_EXPERTS + 1), replace=False).tolist()
            cache.prefetch(rng.choice(NUM_EXPERTS, size=2, replace=False).tolist())
            for wave in cache.waves(chosen):
                with cache.updating(wave) as slots:
                    for expert, slot in zip(wave, slots, strict=True):
                        assert cache.views["step"][slot].item() == model[expert]
                        cache.views["step"][slot] += 1
                        model[expert] += 1
    assert {expert: step_of(store, "b", expert) for expert in model} == model
    store.close()

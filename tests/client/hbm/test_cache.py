"""The cache one rule at a time: capacity, views, pins, eviction, prefetch, write-back, and the races between them.

Races are played with a gated store: a call waits at the gate until the test has done what races with it.
"""

import itertools
import sys
import threading
from concurrent import futures

import numpy as np
import pytest
import torch

from ooc_moe_client.hbm import write_back
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Sections
from ooc_moe_wire.errors import (
    CorruptRecord,
    InvalidRequest,
    LostUpdate,
    NotTheWriter,
    StaleVersion,
    TierFull,
    Unavailable,
    UnknownBank,
    UnknownExpert,
)
from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec
from tests.client.conftest import LAYOUT, NUM_EXPERTS, GatedStore, spec, step_of, write


def update(cache: ExpertCache, experts: list[int]) -> None:
    """One optimizer step on each: `step` grows by one."""
    for wave in cache.waves(experts):
        with cache.updating(wave) as slots:
            cache.views["step"][slots] += 1


def visit(cache: ExpertCache, experts: list[int], **options) -> list[int]:
    """Reads the experts and lets go of them; their steps."""
    with cache.reading(experts, **options) as slots:
        return cache.views["step"][slots, 0].tolist()


def settle(cache: ExpertCache) -> None:
    """Returns when no prefetch is queued or loading."""
    with cache._shared.changed:
        assert cache._shared.changed.wait_for(
            lambda: not cache._prefetcher.has_work and all(r.state.name == "READY" for r in cache._table.residents.values()), timeout=30
        )


def settle_loading(cache: ExpertCache) -> None:
    """Returns when nothing is loading."""
    with cache._shared.changed:
        assert cache._shared.changed.wait_for(
            lambda: all(resident.state.name == "READY" for resident in cache._table.residents.values()), timeout=30
        )


def hold_next_copy(cache: ExpertCache) -> tuple[threading.Event, threading.Event]:
    """The next expert that is copied out of its slot waits: (it does, it may go on)."""
    copy_out, copying, go_on = cache._slots.copy_out, threading.Event(), threading.Event()

    def held(slot: int, buffer: torch.Tensor):
        if not copying.is_set():
            copying.set()
            assert go_on.wait(30)
        return copy_out(slot, buffer)

    cache._slots.copy_out = held  # type: ignore[method-assign]
    return copying, go_on


def residents_after_speculation(cache: ExpertCache) -> list[int]:
    """The residents once the prefetcher has taken what it may: it is made to look for room here, whether its thread did or not."""
    with cache._shared.changed:
        assert cache._prefetcher._claim() == []
        return sorted(cache._table.residents)


# Capacity and views


def test_a_capacity_that_cannot_hold_one_expert_is_refused(gated: GatedStore, bank: str):
    with pytest.raises(InvalidRequest, match="capacity_experts: 0"):
        ExpertCache(gated, bank, capacity_experts=0)


def test_a_cache_of_an_unknown_bank_is_refused(gated: GatedStore):
    with pytest.raises(UnknownBank, match="nowhere"):
        ExpertCache(gated, "nowhere", capacity_experts=1)


def test_views_are_the_tensors_of_every_dtype_in_place(bank: str):
    layout = Layout(
        parameters=tuple(
            TensorSpec(name=dtype, shape=(2, 3), dtype=dtype) for dtype in ("float32", "float16", "bfloat16", "int64", "int32", "uint8")
        ),
        optimizer=(TensorSpec(name="scalar", shape=(1,)), TensorSpec(name="cube", shape=(2, 2, 3))),
    )
    store = InMemoryStore()
    store.create_bank(spec(bank, layout=layout))
    with ExpertCache(store, bank, capacity_experts=3) as cache:
        with cache.updating([4, 2]) as slots:
            for number, tensor in enumerate(layout.tensors):
                view = cache.views[tensor.name]
                assert view.shape == (3, *tensor.shape)
                assert view.dtype is getattr(torch, tensor.dtype)
                assert view.stride()[1:] == torch.empty(tensor.shape).stride()
                view[slots[0]] = number + 1
                view[slots[1]] = torch.arange(view[0].numel()).reshape(tensor.shape)
            assert cache.views["float32"].data_ptr() % BLOCK_BYTES == 0
        cache.flush()
        memory = {expert: bytearray(layout.body_bytes) for expert in (2, 4)}
        list(store.fetch(bank, [2, 4], into=lambda expert: memoryview(memory[expert])))
    for number, tensor in enumerate(layout.tensors):
        stored = torch.from_numpy(layout.arrays(memory[4])[tensor.name].copy()).view(getattr(torch, tensor.dtype))
        assert (stored == number + 1).all()
        stored = torch.from_numpy(layout.arrays(memory[2])[tensor.name].copy()).view(getattr(torch, tensor.dtype))
        assert (stored.flatten() == torch.arange(stored.numel())).all()


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        ([0, NUM_EXPERTS], UnknownExpert, f"expert {NUM_EXPERTS}"),
        ([-1], UnknownExpert, "expert -1"),
        ([1, 2, 1], InvalidRequest, "expert 1 is repeated"),
        ([0, 1, 2, 3], InvalidRequest, r"4 experts at once.* 3; use waves\(\)"),
    ],
)
def test_a_malformed_reading_is_refused_before_anything_is_fetched(gated: GatedStore, bank: str, experts: list, error: type, message: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        for enter in (cache.reading, cache.updating):
            with pytest.raises(error, match=message), enter(experts):
                pass
        with pytest.raises(UnknownExpert, match="99"):
            cache.prefetch([99])
        assert gated.fetches == []
        assert cache.stats().accesses == 0


def test_experts_of_a_grown_bank_can_be_read(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        cache.grow(NUM_EXPERTS + 3)
        assert cache.num_experts == NUM_EXPERTS + 3
        assert visit(cache, [NUM_EXPERTS + 2]) == [0]


def test_waves_ascend_and_fit(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [4, 5])
        assert list(cache.waves([5, 0, 4, 2, 1])) == [[0, 1], [2, 4], [5]]
        assert list(cache.waves([])) == []


# Reading


def test_the_misses_of_a_reading_come_in_one_fetch_and_only_once(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        visit(cache, [3, 1])
        with cache.reading([0, 3, 2, 1]) as slots:
            assert len(set(slots)) == 4
        visit(cache, [2, 0])
        assert gated.fetches == [[3, 1], [0, 2]]
        stats = cache.stats()
        assert (stats.accesses, stats.hits, stats.misses, stats.resident) == (8, 4, 4, 4)
        assert stats.bytes_in == 4 * LAYOUT.body_bytes
        assert stats.fetched_from == {"seed": 4}


def test_a_second_look_is_not_counted_as_an_access(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        visit(cache, [0])
        visit(cache, [1], counted=False)
        visit(cache, [1], counted=False)
        stats = cache.stats()
        assert (stats.accesses, stats.misses, stats.refetches) == (1, 1, 1)


def test_parameters_alone_are_upgraded_when_the_whole_is_read(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0], sections=Sections.PARAMETERS)
        visit(cache, [0], sections=Sections.PARAMETERS)
        assert cache.stats().bytes_in == LAYOUT.parameter_bytes
        assert visit(cache, [0]) == [0]
        visit(cache, [0], sections=Sections.PARAMETERS)
        assert gated.fetches == [[0], [0]]
        with (
            cache.reading([1], sections=Sections.PARAMETERS),
            pytest.raises(InvalidRequest, match="expert 1 is pinned with its parameters"),
        ):
            visit(cache, [1])


def test_the_least_recently_used_leaves_first(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        for expert in (0, 1, 2, 0, 3):
            visit(cache, [expert])
        gated.fetches.clear()
        visit(cache, [0, 2, 3])
        assert gated.fetches == []
        assert cache.stats().evictions == 1


def test_the_order_of_leaving_is_that_of_the_last_uses_of_groups_too(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        for experts in ([0, 1], [2, 3], [0, 1], [3, 0], [2, 3], [0, 1], [3, 0]):
            visit(cache, experts)
        visit(cache, [4])
        visit(cache, [5])
        with cache._shared.changed:
            assert sorted(cache._table.residents) == [0, 3, 4, 5]  # 2 was used before 1.


def test_reading_what_was_read_together_before_costs_the_same_for_two_experts_and_for_six(gated: GatedStore, bank: str):
    def calls_of(cache: ExpertCache, experts: list[int]) -> int:
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            with cache.reading(experts, sections=Sections.PARAMETERS, counted=True):
                pass
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    with ExpertCache(gated, bank, capacity_experts=6) as cache:
        for experts in ([0, 1], [0, 1, 2, 3, 4, 5]):
            visit(cache, experts)
        two, six = calls_of(cache, [0, 1]), calls_of(cache, [0, 1, 2, 3, 4, 5])
        assert two == six < 50
        visit(cache, [5, 4, 3, 2, 1, 0])
        assert cache.stats().misses == 6


def test_what_is_pinned_stays(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        with cache.reading([0]) as slots:
            for expert in (1, 2, 3):
                visit(cache, [expert])
            with cache.reading([0, 4]) as inner:
                assert inner[0] == slots[0]
            with pytest.raises(TierFull, match="2 slots are pinned"), cache.reading([4]), cache.reading([5]):
                pass
        visit(cache, [4, 5])


def test_an_expert_that_cannot_be_fetched_leaves_the_others_readable(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0])
        gated.fetch_errors[1] = CorruptRecord("expert 1 is damaged")
        with pytest.raises(CorruptRecord, match="expert 1"):
            visit(cache, [0, 1])
        assert cache.stats().resident == 1
        del gated.fetch_errors[1]
        visit(cache, [0, 1])
        visit(cache, [2, 3])  # Nothing stayed pinned.


# Writing back


def test_an_update_is_dirty_until_it_is_durable(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [0, 1])
        assert cache.stats().dirty == 2
        assert gated.pushes == []
        cache.flush()
        assert cache.stats().dirty == 0
        assert [step_of(gated, bank, expert) for expert in (0, 1, 2)] == [1, 1, 0]
        update(cache, [0])
        cache.flush()
        assert (cache.stats().write_backs, cache.stats().bytes_out) == (3, 3 * LAYOUT.body_bytes)
        assert step_of(gated, bank, 0) == 2


def test_an_update_that_raises_is_dirty_all_the_same(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:

        def fail_in_the_middle() -> None:
            with cache.updating([0]) as slots:
                cache.views["step"][slots] = 5
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_in_the_middle()
        assert cache.stats().dirty == 1
        cache.flush()
        assert step_of(gated, bank, 0) == 5


def test_reading_alone_writes_nothing(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        for expert in range(NUM_EXPERTS):
            visit(cache, [expert])
    assert gated.pushes == []


def test_several_experts_go_in_one_push(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        update(cache, [0, 1, 2, 3])
        cache.write_back([1, 3])
        cache.flush()
        assert sorted(itertools.chain(*gated.pushes)) == [0, 1, 2, 3]
        assert len(gated.pushes) <= 2


def test_an_evicted_expert_comes_back_as_it_left(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        update(cache, [0])
        visit(cache, [1])
        assert visit(cache, [0]) == [1]


def test_an_evicted_expert_whose_push_is_under_way_comes_back_from_its_buffer(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        gated.hold("push")
        update(cache, [0])
        visit(cache, [1])  # Evicts 0; its push waits at the gate.
        gated.wait_for("push", 1)
        assert visit(cache, [0]) == [1]
        assert gated.fetches == [[0], [1]]  # An older version would have come.
        assert (cache.stats().dirty, cache.stats().fetched_from) == (1, {"seed": 2, "write-back": 1})
        visit(cache, [1])  # Leaves once more, without another push.
        visit(cache, [0])
        update(cache, [0])
        gated.let("push")
        cache.flush()
        assert gated.pushes == [[0], [0]]
        assert step_of(gated, bank, 0) == 2


def test_a_change_replaces_an_older_one_whose_push_has_not_begun(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        gated.hold("push")
        update(cache, [0])
        update(cache, [1])
        gated.wait_for("push", 1)  # Of 0; that of 1 waits behind it.
        for step in (1, 2, 3):
            assert visit(cache, [0]) == [1]
            assert visit(cache, [1]) == [step]
            update(cache, [1])
        gated.let("push")
        cache.flush()
        assert sorted(itertools.chain(*gated.pushes)) == [0, 1, 1]  # The last is of the resident.
        assert (step_of(gated, bank, 0), step_of(gated, bank, 1)) == (1, 4)


def test_what_came_back_is_clean_when_its_push_is_acknowledged(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        gated.hold("push")
        update(cache, [0])
        visit(cache, [1])
        visit(cache, [0])
        gated.let("push")
        cache.flush()
        assert gated.pushes == [[0]]
        update(cache, [0])
        cache.flush()  # From the version that was acknowledged meanwhile; from the older one it would be stale.
        assert step_of(gated, bank, 0) == 2


def test_a_push_is_bounded_in_bytes(gated: GatedStore, bank: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write_back, "BATCH_BYTES_MAX", 2 * LAYOUT.body_bytes)
    with ExpertCache(gated, bank, capacity_experts=5) as cache:
        gated.hold("push")
        update(cache, [0, 1, 2, 3, 4])
        cache.write_back()
        gated.let("push")
        cache.flush()
        assert max(map(len, gated.pushes)) <= 2


def test_pushes_stand_back_while_demand_fetches(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache, futures.ThreadPoolExecutor() as pool:
        update(cache, [0, 1, 2])
        gated.hold("fetch")
        reading = pool.submit(visit, cache, [3])  # Evicts 0, and has 1 written ahead.
        gated.wait_for("fetch", 2)
        with cache._shared.changed:
            assert cache._write_back.busy
            assert cache._write_back.has_requests
            assert cache._write_back._try_next() is None
        gated.let("fetch")
        assert reading.result(timeout=30) == [0]
        cache.flush()
        assert sorted(itertools.chain(*gated.pushes)) == [0, 1, 2]


def test_pushes_go_on_while_demand_waits_for_their_buffers(gated: GatedStore, bank: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write_back, "BUFFERS_MAX", 1)
    with ExpertCache(gated, bank, capacity_experts=3) as cache, futures.ThreadPoolExecutor() as pool:
        update(cache, [0, 1, 2])
        assert pool.submit(visit, cache, [3, 4, 5]).result(timeout=30) == [0] * 3
        assert visit(cache, [0, 1, 2]) == [1] * 3


def test_an_update_during_its_push_stays_dirty_and_is_pushed_from_the_new_version(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        gated.hold("push")
        update(cache, [0])
        cache.write_back()
        gated.wait_for("push", 1)
        update(cache, [0])
        gated.let("push")
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: cache._counters.write_backs == 1, timeout=30)
        assert cache.stats().dirty == 1
        assert step_of(gated, bank, 0) == 1
        cache.flush()
        assert step_of(gated, bank, 0) == 2
        assert gated.pushes == [[0], [0]]


def test_an_expert_changed_during_its_push_is_evicted_only_after_it(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache, futures.ThreadPoolExecutor() as pool:
        gated.hold("push")
        update(cache, [0])
        cache.write_back()
        gated.wait_for("push", 1)
        update(cache, [0])
        reading = pool.submit(visit, cache, [1])
        with pytest.raises(futures.TimeoutError):
            reading.result(timeout=0.1)
        gated.let("push")
        assert reading.result(timeout=30) == [0]
        assert visit(cache, [0]) == [2]


def test_saving_an_expert_keeps_nobody_from_reading_but_from_updating_it(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache, futures.ThreadPoolExecutor() as pool:
        update(cache, [0, 1])
        copying, go_on = hold_next_copy(cache)
        cache.write_back([0])
        assert copying.wait(30)
        assert visit(cache, [0, 1]) == [1, 1]
        assert cache.stats().dirty == 2
        updating = pool.submit(update, cache, [0])
        with pytest.raises(futures.TimeoutError):
            updating.result(timeout=0.1)
        go_on.set()
        updating.result(timeout=30)
        cache.flush()
        assert step_of(gated, bank, 0) == 2


def test_a_slot_is_not_copied_out_while_it_is_updated(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0])
        with cache.updating([0]) as slots:
            cache.views["step"][slots] = 100
            cache.write_back()
            update(cache, [1])
            cache.write_back([1])
            gated.wait_for("push", 1)
            assert gated.pushes == [[1]]
            with pytest.raises(InvalidRequest, match="inside an updating block"):
                cache.flush()
            cache.views["step"][slots] = 2
        cache.flush()
        assert step_of(gated, bank, 0) == 2


def test_a_dirty_victim_has_the_next_ones_written_ahead(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        update(cache, [0, 1, 2, 3])
        visit(cache, [4])
        gated.wait_for("push", 1)
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: cache._write_back.idle and not cache._write_back.has_requests, timeout=30)
        assert sorted(itertools.chain(*gated.pushes)) == [0, 1]


def test_a_failed_push_surfaces_once_and_keeps_the_update(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=2)
    gated.push_errors[0] = Unavailable("daemon away")
    update(cache, [0])
    with pytest.raises(Unavailable, match="daemon away"):
        cache.flush()
    assert cache.stats().dirty == 1
    assert visit(cache, [0]) == [1]
    update(cache, [0])
    gated.push_errors.clear()
    cache.close()
    assert step_of(gated, bank, 0) == 2


def test_a_failed_push_of_an_evicted_expert_keeps_its_bytes(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=1)
    gated.push_errors[0] = Unavailable("daemon away")
    update(cache, [0])
    visit(cache, [1])
    with cache._shared.changed:
        assert cache._shared.changed.wait_for(lambda: cache._write_back.failed() is not None, timeout=30)
    with pytest.raises(Unavailable):
        visit(cache, [1])
    assert visit(cache, [1]) == [0]
    with pytest.raises(Unavailable):
        visit(cache, [0])  # An older version is never given instead.
    with pytest.raises(Unavailable):
        cache.flush()
    with pytest.raises(InvalidRequest, match="not written"):
        cache.forget()
    gated.push_errors.clear()
    cache.flush()
    assert visit(cache, [0]) == [1]
    cache.close()


def fail_once(cache: ExpertCache, name: str) -> None:
    """The next call of that method of the slab raises."""
    sound = getattr(cache._slots, name)

    def failing(*arguments):
        setattr(cache._slots, name, sound)
        raise RuntimeError(f"{name}: out of memory")

    setattr(cache._slots, name, failing)


@pytest.mark.parametrize("name", ["host_buffer", "copy_out"])
def test_a_copy_that_fails_behind_surfaces_once_and_keeps_the_update(gated: GatedStore, bank: str, name: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0, 1])
        fail_once(cache, name)
        with pytest.raises(RuntimeError, match=name):
            cache.flush()
        cache.flush()
        assert [step_of(gated, bank, expert) for expert in (0, 1)] == [1, 1]


@pytest.mark.parametrize("name", ["host_buffer", "copy_out"])
def test_a_victim_that_cannot_be_saved_stays(gated: GatedStore, bank: str, name: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0, 1])
        fail_once(cache, name)
        with pytest.raises(RuntimeError, match=name):
            visit(cache, [2])
        assert sorted(cache._table.residents) == [0, 1]
        assert visit(cache, [2, 3]) == [0, 0]
        assert visit(cache, [0, 1]) == [1, 1]


@pytest.mark.parametrize("name", ["host_buffer", "copy_out"])
def test_a_victim_that_cannot_be_saved_ahead_keeps_nothing_else_from_coming(gated: GatedStore, bank: str, name: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0])
        fail_once(cache, name)
        cache.schedule([Use((1, 2))])
        gated.wait_for("fetch", 2)
        assert gated.fetches[:2] == [[0], [1]]  # 2 would have taken the slot of 0.
        with pytest.raises(RuntimeError, match=name):
            visit(cache, [1])
        assert visit(cache, [1, 2]) == [0, 0]
        assert visit(cache, [0]) == [1]


def test_a_background_error_is_raised_by_the_next_call_and_only_by_it(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=2)
    gated.push_errors[0] = StaleVersion("somebody else wrote it")
    update(cache, [0])
    cache.write_back()
    with cache._shared.changed:
        assert cache._shared.changed.wait_for(lambda: cache._shared._error is not None, timeout=30)
    with pytest.raises(StaleVersion, match="somebody else"):
        cache.prefetch([1])
    cache.prefetch([1])
    gated.push_errors.clear()
    cache.close()


def test_nan_is_refused_with_the_tensors_name_and_spares_the_other_experts(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=3)
    update(cache, [0, 1, 2])
    with cache.updating([1]) as slots:
        cache.views["w1.exp_avg"][slots[0], 1, 1] = float("nan")
    with pytest.raises(InvalidRequest, match=r"expert 1: tensor 'w1\.exp_avg'"):
        cache.flush()
    assert [step_of(gated, bank, expert) for expert in (0, 2)] == [1, 1]
    assert cache.stats().dirty == 1
    with cache.updating([1]) as slots:
        cache.views["w1.exp_avg"][slots[0]] = 0.0
    cache.close()
    assert step_of(gated, bank, 1) == 1


def test_a_second_writers_update_surfaces_and_is_kept(gated: GatedStore, bank: str):
    gated.connect().open_for_writing(bank)
    cache = ExpertCache(gated, bank, capacity_experts=1)
    assert visit(cache, [0]) == [0]
    update(cache, [0])
    with pytest.raises(NotTheWriter, match=bank):
        cache.flush()
    with pytest.raises(NotTheWriter, match=bank):
        cache.close()
    with pytest.raises(InvalidRequest, match="closed"):
        cache.flush()


def test_an_acknowledged_update_that_the_store_lost_is_noticed(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=1)
    update(cache, [0])
    cache.flush()
    visit(cache, [1])
    del gated._state.banks[bank].records[0]
    with pytest.raises(LostUpdate, match="had acknowledged"):
        visit(cache, [0])
    cache.close()


# Forgetting


def test_after_forgetting_everything_is_fetched_anew(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [0, 1])
        cache.flush()
        taken = gated.create_snapshot([bank])
        update(cache, [0])
        with pytest.raises(InvalidRequest, match="expert 0 is dirty"):
            cache.forget()
        cache.flush()
        gated.restore_snapshot(taken.id)
        with cache.reading([1]), pytest.raises(InvalidRequest, match="expert 1 is pinned"):
            cache.forget()
        cache.forget()
        assert cache.stats().resident == 0
        assert visit(cache, [0, 1, 2]) == [1, 1, 0]


# Prefetching


def test_a_prefetched_expert_is_a_hit_and_useful_once(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        cache.prefetch([2, 1])
        cache.prefetch([1, 2])
        settle(cache)
        visit(cache, [1, 2])
        visit(cache, [1, 2])
        assert gated.promoted == [[2, 1]]
        assert gated.fetches == [[2, 1]]
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.prefetch_issued, stats.prefetch_useful, stats.prefetch_late) == (4, 0, 2, 2, 0)


def test_demand_takes_an_expert_out_of_the_prefetch_queue(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=6) as cache, futures.ThreadPoolExecutor() as pool:
        gated.hold("fetch")
        cache.prefetch([0, 1, 2, 3])
        gated.wait_for("fetch", 1)
        cache.prefetch([4, 5])  # Queued behind the four at the gate.
        reading = pool.submit(visit, cache, [5])
        gated.wait_for("fetch", 2)
        assert gated.fetches == [[0, 1, 2, 3], [5]]
        gated.let("fetch")
        assert reading.result(timeout=30) == [0]
        settle(cache)
        assert gated.fetches == [[0, 1, 2, 3], [5], [4]]
        stats = cache.stats()
        assert (stats.prefetch_issued, stats.prefetch_late, stats.misses) == (6, 1, 1)


def test_a_prefetch_under_way_is_waited_for_and_late(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=6) as cache, futures.ThreadPoolExecutor() as pool:
        gated.hold("fetch")
        cache.prefetch([0, 1])
        gated.wait_for("fetch", 1)
        reading = pool.submit(visit, cache, [1])
        with pytest.raises(futures.TimeoutError):
            reading.result(timeout=0.1)
        gated.let("fetch")
        assert reading.result(timeout=30) == [0]
        assert gated.fetches == [[0, 1]]
        stats = cache.stats()
        assert (stats.prefetch_late, stats.prefetch_useful, stats.misses, stats.hits) == (1, 0, 1, 0)
        assert stats.stall_s > 0


def test_a_prefetch_that_fails_is_fetched_by_demand(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=6) as cache, futures.ThreadPoolExecutor() as pool:
        gated.hold("fetch")
        gated.fetch_errors[1] = Unavailable("for a moment")
        cache.prefetch([0, 1])
        gated.wait_for("fetch", 1)
        reading = pool.submit(visit, cache, [0])
        with pytest.raises(futures.TimeoutError):
            reading.result(timeout=0.1)
        gated.let("fetch")
        assert reading.result(timeout=30) == [0]
        stats = cache.stats()
        assert (stats.prefetch_issued, stats.prefetch_late, stats.prefetch_cancelled) == (2, 1, 1)
        assert stats.resident == 1


def test_a_damaged_expert_found_by_a_prefetch_surfaces(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=6) as cache:
        gated.fetch_errors[1] = CorruptRecord("expert 1 is damaged")
        cache.prefetch([1])
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: cache._shared._error is not None, timeout=30)
        with pytest.raises(CorruptRecord, match="expert 1"):
            visit(cache, [0])
        assert visit(cache, [0]) == [0]


def test_closing_after_a_background_error_raises_it_when_every_update_is_durable(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=6)
    update(cache, [0])
    gated.fetch_errors[1] = CorruptRecord("expert 1 is damaged")
    cache.prefetch([1])
    with cache._shared.changed:
        assert cache._shared.changed.wait_for(lambda: cache._shared._error is not None, timeout=30)
    with pytest.raises(CorruptRecord, match="expert 1"):
        cache.close()
    assert step_of(gated, bank, 0) == 1
    with pytest.raises(InvalidRequest, match="closed"):
        cache.flush()


def test_speculation_evicts_nothing_of_the_working_set_until_it_is_left(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        visit(cache, [0, 1, 2])
        cache.prefetch([3, 4])
        assert residents_after_speculation(cache) == [0, 1, 2]
        visit(cache, [0, 1, 2])
        assert residents_after_speculation(cache) == [0, 1, 2]
        cache.new_working_set()
        settle(cache)
        assert visit(cache, [3, 4]) == [0, 0]
        stats = cache.stats()
        assert (stats.prefetch_useful, stats.evictions, stats.resident) == (2, 2, 3)


def test_what_was_not_demanded_for_long_makes_room_by_itself(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0, 1])
        for _ in range(4):
            visit(cache, [1])
        cache.prefetch([2])
        settle(cache)
        visit(cache, [1, 2])
        assert gated.fetches == [[0, 1], [2]]


def test_speculation_takes_no_pinned_slot_and_saves_a_dirty_expert_before_it_takes_its_slot(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0])
        gated.hold("push")
        with cache.reading([1]):
            cache.prefetch([2, 3])
            assert residents_after_speculation(cache) == [0, 1]  # 0 is of the working set still.
            cache.new_working_set()
            gated.wait_for("fetch", 3)
            assert gated.fetches[2] == [2]
            settle_loading(cache)
            with cache._shared.changed:
                assert sorted(cache._table.residents) == [1, 2]
        cache.cancel_prefetch()
        assert visit(cache, [0]) == [1]  # From its buffer: the store has not got it yet.
        gated.let("push")


def test_victims_are_saved_while_others_are_fetched(gated: GatedStore, bank: str, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.hbm.demand.PIECE_BYTES", 1)
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [0, 1, 2])
        gated.hold("push")
        gated.hold("fetch")
        with futures.ThreadPoolExecutor() as pool:
            visiting = pool.submit(visit, cache, [3, 4, 5])
            gated.wait_for("fetch", 2)
            with cache._shared.changed:  # While the first is held, the others' slots are freed.
                assert cache._shared.changed.wait_for(lambda: not {0, 1, 2} & cache._table.residents.keys(), timeout=30)
            gated.let("fetch")
            assert visiting.result(timeout=30) == [0] * 3
        assert sorted(expert for fetch in gated.fetches[1:] for expert in fetch) == [3, 4, 5]
        assert len(gated.fetches) > 2
        gated.let("push")


def test_the_training_thread_helps_with_the_pieces(gated: GatedStore, bank: str, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.hbm.demand.PIECE_BYTES", 1)
    fetch, others = gated.fetch, threading.Event()

    def fetch_the_first_last(bank: str, experts: list[int], **options):
        if experts == [3]:
            assert others.wait(timeout=30)
        yield from fetch(bank, experts, **options)
        if sorted(itertools.chain(*gated.fetches[1:])) == [4, 5]:
            others.set()

    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [0, 1, 2])
        monkeypatch.setattr(gated, "fetch", fetch_the_first_last)
        assert visit(cache, [3, 4, 5]) == [0] * 3


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_piece_that_fails_leaves_no_pin_and_loses_no_victim(gated: GatedStore, bank: str, monkeypatch, damaged: int):
    monkeypatch.setattr("ooc_moe_client.hbm.demand.PIECE_BYTES", 1)
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [3, 4, 5])
        gated.hold("push")
        gated.fetch_errors[damaged] = CorruptRecord("flipped")
        with pytest.raises(CorruptRecord):
            visit(cache, [0, 1, 2])
        with cache._shared.changed:
            assert not any(resident.pins or resident.state.name != "READY" for resident in cache._table.residents.values())
        gated.fetch_errors.clear()
        assert visit(cache, [0, 1, 2]) == [0] * 3
        gated.let("push")
        assert visit(cache, [3, 4, 5]) == [1] * 3


def test_a_later_prefetch_replaces_an_unused_one_which_is_wasted(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        cache.prefetch([0, 1])
        settle(cache)
        cache.prefetch([1, 2])
        settle(cache)
        assert gated.fetches == [[0, 1], [2]]
        visit(cache, [1, 2])
        stats = cache.stats()
        assert (stats.prefetch_issued, stats.prefetch_useful, stats.prefetch_wasted) == (3, 2, 1)


def test_what_is_still_queued_can_be_cancelled(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        visit(cache, [0])
        cache.prefetch([1, 2, 3])
        cache.cancel_prefetch()
        stats = cache.stats()
        assert (stats.prefetch_issued, stats.prefetch_cancelled) == (3, 3)


def test_a_prefetch_queue_of_negative_length_is_refused(gated: GatedStore, bank: str):
    with pytest.raises(InvalidRequest, match="prefetch_experts_max: -1 is not at least 0"):
        ExpertCache(gated, bank, capacity_experts=1, prefetch_experts_max=-1)


def test_the_prefetch_queue_is_bounded_and_the_oldest_gives_way(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1, prefetch_experts_max=2) as cache:
        visit(cache, [0])
        cache.prefetch([1, 2])
        cache.prefetch([3])
        assert cache.stats().prefetch_cancelled == 1
        cache.new_working_set()
        gated.wait_for("fetch", 2)
        assert gated.fetches == [[0], [2]]
        cache.cancel_prefetch()


def test_an_expert_whose_push_is_under_way_is_not_prefetched_before_it_ends(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=1) as cache:
        gated.hold("push")
        update(cache, [0])
        visit(cache, [1])
        gated.wait_for("push", 1)
        cache.new_working_set()
        cache.prefetch([0])
        assert gated.fetches == [[0], [1]]
        gated.let("push")
        settle(cache)
        assert visit(cache, [0]) == [1]
        assert gated.fetches == [[0], [1], [0]]


def test_closing_while_a_prefetch_is_queued_returns(gated: GatedStore, bank: str):
    cache = ExpertCache(gated, bank, capacity_experts=1)
    visit(cache, [0])
    cache.prefetch([1, 2])
    cache.close()
    cache.close()
    assert threading.active_count() < 50


# Statistics


def test_stats_add_over_caches_and_subtract_over_time(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0, 1])
        before = cache.stats()
        visit(cache, [1, 2])
        update(cache, [2])
        after = cache.stats()
    delta = after - before
    assert (delta.accesses, delta.hits, delta.misses, delta.fetched_from) == (2, 1, 1, {"seed": 1})
    assert (delta.capacity, delta.resident, delta.dirty, delta.bank) == (2, 2, 1, bank)
    total = before + after
    assert (total.capacity, total.misses, total.hit_rate) == (4, 5, 1 / 6)
    assert total.expert_bytes == LAYOUT.body_bytes
    proto = after.to_proto()
    assert (proto.bank, proto.hits, proto.misses, proto.dirty_experts, proto.expert_bytes) == (bank, 1, 3, 1, LAYOUT.body_bytes)
    assert after.to_dict()["fetched_from"] == {"seed": 3}


def test_training_elsewhere_is_seen_after_forgetting_only(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0])
        trainer = gated.connect()
        write(trainer, bank, {0: 3.0})
        assert visit(cache, [0]) == [0]
        cache.forget()
        assert visit(cache, [0]) == [3]
        trainer.release(bank)


@pytest.mark.gpu
def test_training_on_a_gpu_equals_training_on_the_cpu(bank: str):
    layout = Layout(parameters=LAYOUT.parameters, optimizer=(*LAYOUT.optimizer, TensorSpec(name="big", shape=(1 << 20,))))
    bodies = []
    for device in ("cpu", "cuda"):
        store = InMemoryStore()
        store.create_bank(spec(bank, layout=layout))
        rng = np.random.default_rng(0)
        with ExpertCache(store, bank, capacity_experts=2, device=device) as cache:
            for _ in range(200):
                chosen = rng.choice(NUM_EXPERTS, size=2, replace=False).tolist()
                cache.prefetch(rng.choice(NUM_EXPERTS, size=2, replace=False).tolist())
                visit(cache, chosen, sections=Sections.PARAMETERS)
                with cache.updating(chosen) as slots:
                    for expert, slot in zip(chosen, slots, strict=True):
                        cache.views["step"][slot] += 1
                        cache.views["big"][slot] += expert + 1
                        cache.views["w1"][slot] += cache.views["big"][slot, 7]
                if rng.random() < 0.2:
                    cache.write_back()
        bodies.append({expert: bytearray(layout.body_bytes) for expert in range(NUM_EXPERTS)})
        list(store.fetch(bank, range(NUM_EXPERTS), into=lambda expert: memoryview(bodies[-1][expert])))
    assert bodies[0] == bodies[1]
    assert len({bytes(body) for body in bodies[0].values()}) == NUM_EXPERTS

"""The schedule beside a slow twin, and what the cache makes of one: whom it evicts, what it fetches ahead, and with which sections."""

from collections.abc import Callable
from concurrent import futures
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Schedule, Use
from ooc_moe_client.hbm.table import LoadState
from ooc_moe_client.store import Priority, Sections
from ooc_moe_wire.errors import CorruptRecord, Internal, OocMoeError, Unavailable, UnknownExpert
from tests.client.conftest import LAYOUT, GatedStore, step_of
from tests.client.hbm.test_cache import hold_next_copy, update, visit

PARAMETERS, ALL = Sections.PARAMETERS, Sections.ALL
uses = st.lists(
    st.builds(Use, st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True).map(sorted).map(tuple), st.sampled_from(Sections)),
    max_size=12,
)


def sweep(*experts: int) -> list[Use]:
    return [Use((expert,), PARAMETERS) for expert in experts]


def wait_for_fetches(store: GatedStore, cache: ExpertCache, fetches: list[list[int]]) -> None:
    """Returns when so many came, and none of them is under way; they must be these."""
    store.wait_for("fetch", len(fetches))
    with cache._shared.changed:
        residents = cache._table.residents
        assert cache._shared.changed.wait_for(lambda: all(resident.state is LoadState.READY for resident in residents.values()), timeout=30)
    assert store.fetches == fetches


@given(uses, st.integers(0, 12), st.integers(1, 5))
def test_every_answer_is_that_of_a_walk_through_what_is_left(uses: list[Use], num_over: int, room: int):
    schedule = Schedule(uses)
    for use in uses[:num_over]:
        schedule.advance(use.experts)
    left = uses[num_over:]
    assert schedule.num_left == len(left)
    distances = {expert: next((at for at, use in enumerate(left) if expert in use.experts), None) for expert in range(5)}
    known = sorted((schedule.next_use(expert), expert) for expert in range(5) if schedule.next_use(expert) is not None)
    assert len({use for use, _ in known}) == len(known)
    assert all(distances[first] <= distances[second] for (_, first), (_, second) in pairwise(known))
    for expert, distance in distances.items():
        assert (schedule.next_use(expert) is None) == (distance is None)
        assert schedule.next_sections(expert) == (None if distance is None else left[distance].sections)
        updates = [at for at, use in enumerate(left) if expert in use.experts and use.sections is ALL]
        needed = {other for use in left[: updates[0] + 1] for other in use.experts} if updates else set()
        assert schedule.updated_within(expert, room) == (bool(updates) and len(needed) <= room)
    prefixes = [left[:length] for length in range(1, len(left) + 1)]
    soon = [prefix for prefix in prefixes if len({expert for use in prefix for expert in use.experts}) <= room] or prefixes[:1]
    for expert, distance in distances.items():
        assert (distance is not None and schedule.next_use(expert) < schedule.end_of_near_future(room)) == (
            distance is not None and distance < len(soon[-1])
        )


def test_a_use_out_of_turn_moves_the_schedule_on_and_an_unknown_one_does_not():
    schedule = Schedule(sweep(0, 1, 2, 3))
    assert schedule.advance([7])
    assert schedule.num_left == 4
    assert not schedule.advance([2])  # Others' next uses changed with it.
    assert schedule.num_left == 1
    assert schedule.next_use(1) is None


def test_a_use_that_shares_an_expert_with_the_next_one_is_taken_for_it():
    schedule = Schedule([Use((0, 1, 2)), Use((3, 4)), Use((0, 1, 2))])
    assert schedule.advance([0, 2])
    assert schedule.num_left == 2
    assert schedule.advance([1, 2]) is True  # Nothing of what is next: it stays.
    assert schedule.num_left == 2


def test_a_schedule_of_an_unknown_expert_is_refused(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache, pytest.raises(UnknownExpert, match="99"):
        cache.schedule(sweep(1, 99))


def test_the_furthest_next_use_leaves_first_where_the_least_recently_used_would_be_wrong(gated: GatedStore, bank: str):
    loop = [0, 1, 2] * 4
    misses = {}
    for told in (False, True):
        with ExpertCache(gated, bank, capacity_experts=2) as cache:
            if told:
                cache.schedule(sweep(*loop), ahead=False)
            for expert in loop:
                visit(cache, [expert], sections=PARAMETERS)
            misses[told] = cache.stats().misses
    assert misses == {False: 12, True: 7}  # Belady keeps one of the two others each time.


def test_who_is_not_in_the_schedule_leaves_before_who_is(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        visit(cache, [0, 1, 2])
        cache.schedule(sweep(0, 2, 3, 0, 2), ahead=False)
        visit(cache, [0])
        visit(cache, [1])
        visit(cache, [2])
        gated.fetches.clear()
        visit(cache, [3])
        for expert in (0, 2):
            visit(cache, [expert])
        assert gated.fetches == [[3]]


def test_a_schedule_that_was_skipped_or_ended_holds_nobody_back(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        cache.schedule(sweep(0, 1, 0, 1), ahead=False)
        for expert in (0, 1, 1):  # The second use of 0 never comes.
            visit(cache, [expert])
        visit(cache, [2])
        visit(cache, [3])
        gated.fetches.clear()
        visit(cache, [2])
        visit(cache, [3])
        assert gated.fetches == []


def test_what_the_schedule_names_is_fetched_in_its_order_before_it_is_asked_for(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        cache.schedule(sweep(3, 1, 4, 5))
        wait_for_fetches(gated, cache, [[3, 1]])
        visit(cache, [3], sections=PARAMETERS)
        wait_for_fetches(gated, cache, [[3, 1], [4]])
        visit(cache, [1], sections=PARAMETERS)
        wait_for_fetches(gated, cache, [[3, 1], [4], [5]])
        visit(cache, [4], sections=PARAMETERS)
        visit(cache, [5], sections=PARAMETERS)
        stats = cache.stats()
        size = 4 * LAYOUT.parameter_bytes
        assert (stats.hits, stats.misses, stats.bytes_in) == (4, 0, size)
        assert stats.ahead == {"issued": 4, "issued_bytes": size, "useful": 4, "useful_bytes": size}
        assert (stats.prefetch_issued, stats.prefetch_useful) == (0, 0)  # It was no speculation.


@pytest.mark.parametrize(
    "error", [Unavailable("away"), CorruptRecord("damaged"), Internal("a bug")], ids=lambda error: type(error).__name__
)
def test_what_a_fetch_ahead_did_not_bring_is_left_to_demand(gated: GatedStore, bank: str, error: OocMoeError):
    with futures.ThreadPoolExecutor() as pool, ExpertCache(gated, bank, capacity_experts=2) as cache:
        gated.hold("fetch")
        gated.fetch_errors[3] = error
        cache.schedule(sweep(3, 3))
        gated.wait_for("fetch", 1)
        reading = pool.submit(visit, cache, [3])
        with pytest.raises(futures.TimeoutError):
            reading.result(timeout=0.1)
        gated.let("fetch")
        with pytest.raises(type(error), match=str(error)):
            reading.result(timeout=30)
        assert gated.priorities == [Priority.PREFETCH, Priority.DEMAND]
        cache._shared.pop_error()
        gated.fetch_errors.clear()
        cache.schedule(sweep(3))
        wait_for_fetches(gated, cache, [[3], [3], [3]])
        assert gated.priorities[2] is Priority.PREFETCH


def test_a_fetch_ahead_that_fails_is_not_tried_again_where_nobody_asks(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        gated.fetch_errors[3] = CorruptRecord("expert 3 is damaged")
        cache.schedule(sweep(3, 1, 3))
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: cache._shared._error is not None, timeout=30)
        with pytest.raises(CorruptRecord, match="expert 3"):
            visit(cache, [0])
        assert cache._prefetcher._claim_scheduled() == []
        assert gated.fetches == [[3, 1]]


@pytest.mark.parametrize("errors", [{}, {3: Unavailable("the daemon stays away")}], ids=["sound", "failing"])
def test_forgetting_ends_the_schedule(gated: GatedStore, bank: str, errors: dict[int, Exception]):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        gated.fetch_errors |= errors
        cache.schedule([Use((3, 1, 2)), Use((3, 1, 2))])
        gated.wait_for("fetch", 1)
        cache.forget()
        assert cache.stats().resident == 0
        with cache._shared.changed:
            assert cache._prefetcher._claim_scheduled() == []
        assert list(cache.waves([1, 2])) == [[1, 2]]


def test_what_was_updated_while_room_was_made_ahead_is_not_fetched_again(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        update(cache, [0])
        visit(cache, [4, 5])
        copying, go_on = hold_next_copy(cache)
        cache.schedule([Use((1,)), Use((2, 3))])
        assert copying.wait(30)  # Of 0, which makes room for 1.
        update(cache, [2])
        go_on.set()
        gated.wait_for("fetch", 4)
        assert gated.fetches == [[0], [4, 5], [2], [1, 3]]
        assert visit(cache, [2]) == [1]
    assert step_of(gated, bank, 2) == 1


@pytest.mark.parametrize(
    "ask", [lambda cache: cache.schedule([Use((1,))]), lambda cache: cache.prefetch([1])], ids=["schedule", "speculation"]
)
def test_what_was_evicted_while_room_was_made_for_it_comes_back_from_its_buffer(
    gated: GatedStore, bank: str, ask: Callable[[ExpertCache], None]
):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0])
        visit(cache, [4])
        cache.new_working_set()
        copying, go_on = hold_next_copy(cache)
        ask(cache)
        assert copying.wait(30)  # Of 0, which makes room for 1.
        gated.hold("push")
        update(cache, [1])
        visit(cache, [5])
        ask(cache)
        assert sorted(cache._table.residents) == [0, 5]
        go_on.set()
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: 0 not in cache._table.residents, timeout=30)
        seen = visit(cache, [1])  # The store has not got its update yet.
        gated.let("push")
        assert seen == [1]
        assert gated.fetches == [[0], [4], [1], [5]]
    assert step_of(gated, bank, 1) == 1


def test_nothing_is_fetched_ahead_into_the_slot_of_what_is_needed_sooner(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        visit(cache, [0, 1])
        cache.schedule(sweep(0, 1, 2))
        assert cache._prefetcher._claim_scheduled() == []
        visit(cache, [0])
        wait_for_fetches(gated, cache, [[0, 1], [2]])
        assert sorted(cache._table.residents) == [1, 2]


def test_who_is_needed_later_leaves_only_for_who_is_needed_soon(gated: GatedStore, bank: str):
    loop = sweep(0, 1, 2, 3, 4)
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        visit(cache, [0, 1, 2, 3])
        cache.schedule(loop * 2)
        visit(cache, [0])
        visit(cache, [1])
        assert cache._prefetcher._claim_scheduled() == []  # 4 comes after 2 and 3, and half of the slots are two.
        visit(cache, [2])
        wait_for_fetches(gated, cache, [[0, 1, 2, 3], [4]])
        assert {0, 3, 4} < set(cache._table.residents)  # In the place of 2, which is needed last, or of 1 while 2 was still read.


def test_a_dirty_expert_that_is_needed_later_is_saved_for_what_is_needed_sooner(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        update(cache, [0, 1])
        cache.schedule([Use((2, 3), PARAMETERS), Use((0, 1), ALL)])
        visit(cache, [2], sections=PARAMETERS)
        visit(cache, [3], sections=PARAMETERS)
        update(cache, [0, 1])
        assert visit(cache, [0, 1]) == [2, 2]


def test_an_expert_that_stays_until_its_update_is_fetched_once_with_its_optimizer_section(gated: GatedStore, bank: str):
    step = [Use((0, 1), PARAMETERS), Use((0, 1), PARAMETERS), Use((0, 1), ALL)]
    for ahead in (False, True):
        gated.fetches.clear()
        with ExpertCache(gated, bank, capacity_experts=2) as cache:
            cache.schedule(step, ahead=ahead)
            visit(cache, [0, 1], sections=PARAMETERS)
            visit(cache, [0, 1], sections=PARAMETERS, counted=False)
            update(cache, [0, 1])
            assert gated.fetches == [[0, 1]]
            assert cache.stats().bytes_in == 2 * LAYOUT.body_bytes


def test_an_expert_that_leaves_before_its_update_comes_without_its_optimizer_section(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=2) as cache:
        cache.schedule([*sweep(0, 1, 2), Use((0,), ALL)], ahead=False)
        visit(cache, [0], sections=PARAMETERS)
        assert cache.stats().bytes_in == LAYOUT.parameter_bytes


def test_a_resident_without_its_optimizer_section_gets_it_before_its_update(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        visit(cache, [0], sections=PARAMETERS)
        cache.schedule([Use((0,), ALL)])
        wait_for_fetches(gated, cache, [[0], [0]])
        update(cache, [0])
        assert gated.fetches == [[0], [0]]
        assert cache.stats().ahead["useful"] == 1


def test_waves_take_half_of_the_slots_while_a_schedule_needs_more_than_there_are(gated: GatedStore, bank: str):
    with ExpertCache(gated, bank, capacity_experts=4) as cache:
        cache.schedule([Use((0, 1, 2, 3, 4), PARAMETERS)], ahead=False)
        assert list(cache.waves([4, 3, 2, 1, 0])) == [[0, 1], [2, 3], [4]]
        cache.schedule([Use((0, 1, 2, 3), PARAMETERS)], ahead=False)
        assert list(cache.waves([3, 2, 1, 0])) == [[0, 1, 2, 3]]

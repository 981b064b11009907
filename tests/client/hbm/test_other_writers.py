"""A cache that writes a bank takes no version that somebody else made."""

from __future__ import annotations

from concurrent import futures

import numpy as np
import pytest

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.schedule import Use
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Priority, Push
from ooc_moe_wire.errors import StaleVersion
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from tests.client.conftest import GatedStore

LAYOUT = Layout(parameters=(TensorSpec(name="w", shape=(8,)),), optimizer=(TensorSpec(name="m", shape=(8,)),))


@pytest.fixture
def store() -> InMemoryStore:
    store = InMemoryStore()
    store.create_bank(BankSpec(name="b", num_experts=4, layout=LAYOUT))
    return store


def write(store: InMemoryStore, expert: int) -> None:
    (version,) = (info.version for info in store.list_experts("b") if info.expert == expert)
    (outcome,) = store.push("b", [Push(expert=expert, base_version=version, body=np.ones(LAYOUT.body_bytes, np.uint8))])
    assert isinstance(outcome, int)


@pytest.mark.parametrize("expert", [0, 3], ids=["written here before", "never seen here"])
def test_an_expert_that_another_wrote_is_not_trained_on(store: InMemoryStore, expert: int) -> None:
    with ExpertCache(store, "b", capacity_experts=1) as cache:
        for own in (0, 1):
            with cache.updating([own]):
                pass
            cache.flush()
        write(store, expert)
        with pytest.raises(StaleVersion, match=f"expert {expert}: another writer"), cache.reading([expert]):
            pass


def test_what_a_fetch_ahead_did_not_take_is_refused_when_it_is_asked_for(store: InMemoryStore) -> None:
    gated = GatedStore(store)
    with futures.ThreadPoolExecutor() as pool, ExpertCache(gated, "b", capacity_experts=1) as cache:
        with cache.updating([0]):
            pass
        cache.flush()
        write(store, 3)
        gated.hold("fetch")
        cache.schedule([Use((3,)), Use((3,))])
        gated.wait_for("fetch", 2)
        reading = pool.submit(cache.reading([3]).__enter__)
        with pytest.raises(futures.TimeoutError):
            reading.result(timeout=0.1)
        gated.let("fetch")
        with pytest.raises(StaleVersion, match="expert 3: another writer"):
            reading.result(timeout=30)
        assert gated.priorities == [Priority.DEMAND, Priority.PREFETCH, Priority.DEMAND]


def test_what_was_written_before_the_cache_was_opened_is_taken(store: InMemoryStore) -> None:
    write(store, 3)
    with ExpertCache(store, "b", capacity_experts=1) as cache:
        with cache.updating([0]):
            pass
        cache.flush()
        with cache.reading([3]):
            pass


def test_a_cache_that_only_reads_sees_what_others_write(store: InMemoryStore) -> None:
    with ExpertCache(store, "b", capacity_experts=1) as cache:
        for expert in (3, 0, 3):
            write(store, 3)
            with cache.reading([expert]):
                pass


def test_the_first_error_is_the_one_that_is_told(store: InMemoryStore) -> None:
    def fail() -> None:
        with ExpertCache(store, "b", capacity_experts=1) as cache, cache.updating([0]):
            write(store, 0)  # So that the flush at the end is refused.
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

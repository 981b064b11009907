"""Both planes of a real daemon: the same bytes, under eviction, through restarts, and the plane that was asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np
import pytest

from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Durability, Plane, Push, Sections
from ooc_moe_wire.codec import PIECE_BYTES
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import Layout, TensorSpec
from tests.client.conftest import spec
from tests.conftest import DaemonProcess

PLANES = [Plane.LOCAL, Plane.STREAM]
# Sections of more than two pieces, the last of them not whole.
LARGE = Layout(
    parameters=(TensorSpec(name="w", shape=(PIECE_BYTES * 5 // 8 + 5,), initializer=Initializer("uniform_v1", 1.0)),),
    optimizer=(TensorSpec(name="m", shape=(PIECE_BYTES * 3 // 4,)),),
)
# 16 of these are twice the daemon's memory.
CROWDED = Layout(parameters=(TensorSpec(name="w", shape=(120 << 10,)),))
NUM_CROWDED = 16
NUM_ROUNDS = 4


@pytest.fixture
def open_store() -> Iterator[Callable[..., RemoteStore]]:
    """Stores that are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda target, **options: stack.enter_context(contextlib.closing(RemoteStore(target, **options)))


def fetch(store: RemoteStore, bank: str, experts, layout: Layout, sections: Sections = Sections.ALL) -> dict[int, tuple[int, bytes]]:
    num_bytes = layout.body_bytes if sections is Sections.ALL else layout.parameter_bytes
    bodies = {expert: bytearray(num_bytes) for expert in experts}
    fetched = store.fetch(bank, list(experts), into=lambda expert: memoryview(bodies[expert]), sections=sections)
    return {item.expert: (item.version, bytes(bodies[item.expert])) for item in fetched}


def test_both_planes_give_the_same_bytes(shared_daemon: DaemonProcess, bank: str, open_store):
    local, stream = (open_store(shared_daemon.target, plane=plane) for plane in PLANES)
    local.create_bank(spec(bank, layout=LARGE))
    rng, written = np.random.default_rng(0), {}
    for store, expert in ((local, 0), (stream, 1)):
        body = bytearray(LARGE.body_bytes)
        for array in LARGE.arrays(body).values():
            array[...] = rng.standard_normal(array.shape)
        for durability in Durability:
            version = written[expert][0] if expert in written else 0
            (version,) = store.push(bank, [Push(expert=expert, base_version=version, body=body)], durability=durability)
            written[expert] = version, bytes(body)
        store.release(bank)
    for sections in Sections:
        first, second = (fetch(store, bank, range(4), LARGE, sections) for store in (local, stream))
        assert first == second
        num_bytes = len(first[0][1])
        assert {expert: first[expert] for expert in written} == {
            expert: (version, body[:num_bytes]) for expert, (version, body) in written.items()
        }
    assert (local.plane, stream.plane) == (Plane.LOCAL, Plane.STREAM)


@pytest.mark.parametrize("target", ["target", "unix_target"])
def test_the_local_plane_is_chosen_where_there_is_one(shared_daemon: DaemonProcess, bank: str, open_store, target: str):
    store = open_store(getattr(shared_daemon, target))
    store.create_bank(spec(bank))
    before = store.stats()
    fetch(store, bank, [0, 1], spec(bank).layout)
    after = store.stats()
    assert after.total.leased_bytes - before.total.leased_bytes == 2 * spec(bank).layout.body_bytes
    assert after.queues.local_sessions == before.queues.local_sessions + 2  # One for pushes, one for fetches.


def test_a_daemon_without_a_local_plane_is_streamed_from(start_daemon, open_store):
    daemon = start_daemon(arguments=("--no-local",))
    store = open_store(daemon.target)
    store.create_bank(spec("b"))
    assert len(fetch(store, "b", [0, 1], spec("b").layout)) == 2
    assert store.plane is Plane.STREAM
    with pytest.raises(InvalidRequest, match=f"{daemon.target} has no local plane"):
        fetch(open_store(daemon.target, plane=Plane.LOCAL), "b", [0], spec("b").layout)


def value_of(body: bytes) -> float:
    """The value that every number of a body has."""
    numbers = CROWDED.arrays(np.frombuffer(body, np.uint8))["w"]
    assert numbers.min() == numbers.max()
    return float(numbers[0])


@pytest.mark.parametrize("plane", PLANES)
def test_under_eviction_no_fetch_gives_another_experts_bytes_or_torn_ones(start_daemon, open_store, plane: Plane):
    daemon = start_daemon(dram_bytes="4MiB")
    writer = open_store(daemon.target, plane=plane)
    writer.create_bank(spec("b", layout=CROWDED, num_experts=NUM_CROWDED))
    # Not verified: what the checksums would catch must not happen in the first place.
    readers = [open_store(daemon.target, plane=plane, verify=False) for _ in range(2)]
    versions = dict.fromkeys(range(NUM_CROWDED), 0)
    stop = threading.Event()

    def write_rounds() -> None:
        for round_ in range(1, NUM_ROUNDS + 1):
            for first in range(0, NUM_CROWDED, 4):
                experts = range(first, first + 4)
                pushes = []
                for expert in experts:
                    body = bytearray(CROWDED.body_bytes)
                    CROWDED.arrays(body)["w"][...] = expert + NUM_CROWDED * round_
                    pushes.append(Push(expert=expert, base_version=versions[expert], body=body))
                for expert, outcome in zip(experts, writer.push("b", pushes), strict=True):
                    assert isinstance(outcome, int), outcome
                    versions[expert] = outcome
        stop.set()

    def read_rounds(store: RemoteStore, seed: int) -> int:
        rng, newest, num_read = np.random.default_rng(seed), dict.fromkeys(range(NUM_CROWDED), 0), 0
        while not stop.is_set() or not num_read:
            experts = rng.choice(NUM_CROWDED, size=int(rng.integers(1, NUM_CROWDED + 1)), replace=False).tolist()
            for expert, (version, body) in fetch(store, "b", experts, CROWDED).items():
                assert value_of(body) % NUM_CROWDED == (expert if version else 0)
                assert version >= newest[expert]
                newest[expert], num_read = version, num_read + 1
        return num_read

    with futures.ThreadPoolExecutor() as pool:
        reading = [pool.submit(read_rounds, store, seed) for seed, store in enumerate(2 * readers)]
        try:
            write_rounds()
        finally:
            stop.set()
        assert all(call.result(timeout=60) for call in reading)
    final = fetch(readers[0], "b", range(NUM_CROWDED), CROWDED)
    assert {expert: version for expert, (version, _) in final.items()} == versions
    assert {expert: value_of(body) for expert, (_, body) in final.items()} == {
        expert: expert + NUM_CROWDED * NUM_ROUNDS for expert in range(NUM_CROWDED)
    }


@pytest.mark.parametrize("plane", PLANES)
def test_a_daemon_killed_in_the_middle_of_fetches_costs_no_expert(daemon: DaemonProcess, open_store, plane: Plane):
    store = open_store(daemon.target, plane=plane)
    store.create_bank(spec("b", layout=CROWDED, num_experts=NUM_CROWDED))
    expected = fetch(store, "b", range(NUM_CROWDED), CROWDED)
    memory = {expert: bytearray(CROWDED.body_bytes) for expert in range(NUM_CROWDED)}
    got = {}
    for item in store.fetch("b", range(NUM_CROWDED), into=lambda expert: memoryview(memory[expert])):
        if len(got) in (1, 8):
            daemon.restart()
        got[item.expert] = item.version, bytes(memory[item.expert])
    assert got == expected
    assert store.plane is plane

"""Helpers for the client's tests: a small layout, banks, stores in memory and behind a daemon, and a store that can hold calls back."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore, Plane, Priority, Push
from ooc_moe_wire.initializers import Initializer
from ooc_moe_wire.layout import BankSpec, Layout, TensorSpec
from tests.conftest import DaemonProcess

torch.set_num_threads(1)

LAYOUT = Layout(
    parameters=(
        TensorSpec(name="w1", shape=(3, 5), initializer=Initializer("uniform_v1", 0.5)),
        TensorSpec(name="b1", shape=(5,), initializer=Initializer("constant_v1", 2.0)),
    ),
    optimizer=(TensorSpec(name="w1.exp_avg", shape=(3, 5)), TensorSpec(name="step", shape=(1,), dtype="int64")),
)
NUM_EXPERTS = 6

Connect = Callable[..., ExpertStore]
_names = map("bank-{}".format, itertools.count())


def spec(name: str, **changes: Any) -> BankSpec:
    return BankSpec(**{"name": name, "num_experts": NUM_EXPERTS, "layout": LAYOUT, "seed": 7} | changes)


def read(store: ExpertStore, bank: str, experts: Sequence[int], **options: Any) -> dict[int, tuple[int, bytearray]]:
    """Fetches experts; returns, by expert, its version and its body."""
    bodies = {expert: bytearray(LAYOUT.body_bytes) for expert in experts}
    fetched = list(store.fetch(bank, experts, into=lambda expert: memoryview(bodies[expert]), **options))
    assert sorted(item.expert for item in fetched) == sorted(experts)
    return {item.expert: (item.version, bodies[item.expert]) for item in fetched}


def body(value: float, layout: Layout = LAYOUT) -> bytearray:
    """Returns a body of `layout` in which every number of every tensor is `value`."""
    made = bytearray(layout.body_bytes)
    for tensor in layout.tensors:
        layout.arrays(made)[tensor.name][...] = value
    return made


def write(store: ExpertStore, bank: str, values: dict[int, float], versions: dict[int, int] | None = None) -> dict[int, int | Exception]:
    """Pushes a body for each value, over `versions` (0 where none is given). Returns, by expert, the new version or the error."""
    pushes = [Push(expert=expert, base_version=(versions or {}).get(expert, 0), body=body(value)) for expert, value in values.items()]
    return dict(zip(values, store.push(bank, pushes), strict=True))


def step_of(store: ExpertStore, bank: str, expert: int) -> int:
    """Fetches an expert and returns the value of its `step` tensor."""
    return int(LAYOUT.arrays(np.frombuffer(read(store, bank, [expert])[expert][1], np.uint8))["step"][0])


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests that neither kill it nor need it to be empty."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("store")).start()
    yield daemon
    daemon.close()


@pytest.fixture(params=["memory", "tcp-stream", "unix-stream", "local"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A function that connects to a store: `connect(trainer)`. All connections of a test go to one store, and each is a writer of its own.

    Tests run once with a store in memory, and once with each data plane of a daemon.
    """
    handles: list[ExpertStore] = []
    if request.param == "memory":
        state = InMemoryStore()
        make: Connect = state.connect
    else:
        daemon: DaemonProcess = request.getfixturevalue("shared_daemon")
        target = daemon.unix_target if request.param == "unix-stream" else daemon.target
        plane = Plane.LOCAL if request.param == "local" else Plane.STREAM

        def make(trainer: str = "") -> ExpertStore:
            return RemoteStore(target, trainer=trainer, plane=plane)

    def connecting(trainer: str = "") -> ExpertStore:
        handles.append(make(trainer))
        return handles[-1]

    yield connecting
    for handle in handles:
        handle.close()


@pytest.fixture
def bank() -> str:
    """A bank's name that no other test uses."""
    return next(_names)


class GatedStore:
    """A store that can hold back fetches and pushes until the test lets them through. Other calls are passed on at once."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.fetches: list[list[int]] = []
        self.priorities: list[Priority] = []  # of these
        self.pushes: list[list[int]] = []
        self.promoted: list[list[int]] = []
        self.fetch_errors: dict[int, Exception] = {}  # by expert, until removed
        self.push_errors: dict[int, Exception] = {}
        self._changed = threading.Condition()
        self._open = {"fetch": True, "push": True}
        self._arrived = {"fetch": 0, "push": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def hold(self, kind: str) -> None:
        """Holds back all calls of `kind` ("fetch" or "push") that come from now on."""
        with self._changed:
            self._open[kind] = False

    def let(self, kind: str) -> None:
        """Lets through the calls of `kind` that are held back, and all later ones."""
        with self._changed:
            self._open[kind] = True
            self._changed.notify_all()

    def wait_for(self, kind: str, count: int) -> None:
        """Waits until `count` calls of `kind` have come in, counted from the start."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._arrived[kind] >= count, timeout=30), f"no {kind} number {count} came"

    def _pass(self, kind: str) -> None:
        with self._changed:
            self._arrived[kind] += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open[kind], timeout=30), f"a {kind} was never let through"

    def fetch(self, bank: str, experts: Sequence[int], **options: Any) -> Iterator[Any]:
        self.fetches.append(list(experts))
        self.priorities.append(options.get("priority", Priority.DEMAND))
        self._pass("fetch")
        for expert in experts:
            if expert in self.fetch_errors:
                raise self.fetch_errors[expert]
        yield from self._store.fetch(bank, experts, **options)

    def push(self, bank: str, pushes: Sequence[Push]) -> list[int | Exception]:
        self.pushes.append([push.expert for push in pushes])
        self._pass("push")
        good = [push for push in pushes if push.expert not in self.push_errors]
        outcomes = iter(self._store.push(bank, good) if good else [])
        return [self.push_errors[push.expert] if push.expert in self.push_errors else next(outcomes) for push in pushes]

    def prefetch(self, bank: str, experts: Sequence[int]) -> Any:
        self.promoted.append(list(experts))
        return self._store.prefetch(bank, experts)


@pytest.fixture
def gated(bank: str) -> GatedStore:
    """A GatedStore over a store in memory that has the bank `bank`."""
    store = GatedStore(InMemoryStore())
    store.create_bank(spec(bank))
    return store

"""Every thread of a cache on a second GPU works with that GPU. CUDA is played by functions that note the thread's current GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from ooc_moe_client.hbm import cuda_slots
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.slots import allocate
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.store import Sections
from tests.client.conftest import NUM_EXPERTS, spec


class DoneAtOnce:
    """A stream and an event in one: everything queued is done."""

    def __init__(self, device: object = None) -> None: ...
    def wait_stream(self, stream: DoneAtOnce) -> None: ...
    def wait_event(self, event: DoneAtOnce) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self) -> DoneAtOnce:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DoneAtOnce)  # There is one stream only.

    __hash__ = object.__hash__


class TwoGpus:
    """The current GPU of each thread, 0 at first, and on which one every thread allocated pinned memory."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.pinned_on: defaultdict[str, set[int]] = defaultdict(set)
        self.chosen_by: dict[str, int] = {}

    def current_device(self) -> int:
        return getattr(self._of_thread, "index", 0)

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None, "torch refuses a device without an index"
        self._of_thread.index = self.chosen_by[threading.current_thread().name] = device.index

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._of_thread.index = self.current_device(), device.index
        yield
        self._of_thread.index = before

    def empty(self, *sizes: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            self.pinned_on[threading.current_thread().name].add(self.current_device())
        return torch.zeros(*sizes, **options)  # type: ignore[call-overload]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> TwoGpus:
    gpus = TwoGpus()
    for name in ("current_device", "set_device", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpus, name))
    monkeypatch.setattr(torch.cuda, "Stream", DoneAtOnce)
    monkeypatch.setattr(torch.cuda, "current_stream", DoneAtOnce)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", gpus.empty)
    monkeypatch.setattr(cuda_slots, "allocate", lambda slots, size, device: allocate(slots, size, torch.device("cpu")))
    return gpus


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_every_thread_of_a_cache_works_with_the_caches_gpu(gpus: TwoGpus, device: str) -> None:
    store = InMemoryStore()
    store.create_bank(spec("b"))
    if device == "cuda":
        gpus.set_device(torch.device("cuda", 1))  # "cuda" is the GPU that is current where the cache is made.
    with ExpertCache(store, "b", capacity_experts=3, device=device) as cache:
        for first in (0, 3, 0):
            with cache.updating(range(first, first + 3)) as slots:
                cache.views["step"][slots] += 1
        cache.flush()
        assert cache._demand._fetcher.submit(gpus.current_device).result() == 1  # Its work depends on what is dirty when.
        cache.new_working_set()
        cache.prefetch([4])
        with cache._shared.changed:
            assert cache._shared.changed.wait_for(lambda: 4 in cache._table.residents, timeout=30)
        for expert in range(NUM_EXPERTS):
            with cache.reading([expert], sections=Sections.ALL) as (slot,):
                assert cache.views["step"][slot, 0] == (2 if expert < 3 else 1)
    by_task = {name.split(" b")[0]: index for name, index in gpus.chosen_by.items() if name != threading.current_thread().name}
    assert by_task == {"fetch": 1, "prefetch": 1, "write-back": 1}
    assert gpus.pinned_on
    assert set().union(*gpus.pinned_on.values()) == {1}, gpus.pinned_on

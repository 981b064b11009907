"""Many clients at once: every byte is checked, a bank has one writer, a repeated push is applied once, and memory does not grow.

python -m pytest tests/torture/test_concurrency.py -m slow --results tests/bench/results
"""

from __future__ import annotations

import inspect
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any

import psutil
import pytest

from ooc_moe_client import store as interface
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Push
from ooc_moe_wire.errors import InvalidRequest, NotTheWriter
from tests.torture.bodies import Tag, body_of, layout_of, spec_of
from tests.torture.ledger import Cell, Ledger, Write
from tests.torture.load import fetch
from tests.torture.proxy import LossyProxy

COMMAND = "python -m pytest tests/torture/test_concurrency.py -m slow --results tests/bench/results"
NUM_BANKS, READERS_PER_BANK = 8, 7
NUM_EXPERTS = 12
NUM_CUTS = 6
PLANES = ("STREAM", "LOCAL")
SAMPLES_MIN = 50


def connect(target: str, plane: str = "AUTO", **options: Any) -> RemoteStore:
    """Connects a store over a plane. A client without the local plane uses streams."""
    if "plane" in inspect.signature(RemoteStore).parameters:
        options["plane"] = getattr(interface, "Plane")[plane]  # noqa: B009
    elif plane == "LOCAL":
        pytest.skip("this client has no local plane")
    return RemoteStore(target, **options)


def run_all(*work: Callable[[], object]) -> None:
    """Runs each function in a thread; raises the first error."""
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(each) for each in work]
        wait(futures)
    for future in futures:
        future.result()


class BankUnderLoad:
    """A bank with one writer and its readers, each with its own connection."""

    def __init__(self, target: str, name: str, tag_bank: int, num_bytes: int, rounds: int, seed: int) -> None:
        self.name, self.num_fetched = name, 0
        self._target, self._tag_bank, self._rounds, self._seed = target, tag_bank, rounds, seed
        self._layout = layout_of(num_bytes)
        self._ledger = Ledger()
        self._cells = [Cell(Write(Tag(tag_bank, expert, 0), version=0)) for expert in range(NUM_EXPERTS)]
        self._done = threading.Event()
        with closing(connect(target, "AUTO")) as store:
            store.create_bank(spec_of(name, self._layout, tag_bank, NUM_EXPERTS))

    def write(self) -> None:
        """Pushes random experts, round after round."""
        chosen = random.Random(self._seed)
        numbers = itertools.count(1)
        try:
            with closing(connect(self._target, chosen.choice(("AUTO", "STREAM")))) as store:
                for _ in range(self._rounds):
                    self._push(store, {expert: next(numbers) for expert in chosen.sample(range(NUM_EXPERTS), chosen.randint(1, 4))})
        finally:
            self._done.set()

    def read(self, number: int) -> None:
        """Fetches random experts until the writer has finished, and once more then."""
        chosen = random.Random(self._seed + number)
        with closing(connect(self._target, chosen.choice(("AUTO", "STREAM")))) as store:
            last = False
            while not last:
                last = self._done.is_set()
                experts = chosen.sample(range(NUM_EXPERTS), chosen.randint(1, NUM_EXPERTS))
                with self._ledger.lock:
                    known = {expert: self._cells[expert].floor.version or 0 for expert in experts}
                for expert, (version, tag) in fetch(store, self.name, self._layout, self._tag_bank, experts).items():
                    self._ledger.seen(self.name, expert, self._cells[expert], version, tag, at_least=known[expert])

    def verify(self, store: RemoteStore) -> tuple[int, int]:
        """Checks that the bank holds exactly what was acknowledged last. Returns the numbers of pushes and of fetched experts."""
        found = fetch(store, self.name, self._layout, self._tag_bank, range(NUM_EXPERTS))
        assert found == {expert: (cell.floor.version, cell.floor.tag) for expert, cell in enumerate(self._cells)}
        assert not any(cell.later for cell in self._cells)
        return self._ledger.num_acknowledged, self._ledger.num_verified

    def _push(self, store: RemoteStore, numbers: dict[int, int]) -> None:
        writes = {expert: Write(Tag(self._tag_bank, expert, number), above=self._ledger.newest) for expert, number in numbers.items()}
        with self._ledger.lock:
            bases = {expert: self._cells[expert].newest.version or 0 for expert in writes}
            for expert, write in writes.items():
                self._cells[expert].later.append(write)
        pushes = [Push(expert=e, base_version=bases[e], body=body_of(self._layout, write.tag)) for e, write in writes.items()]
        for expert, outcome in zip(writes, store.push(self.name, pushes), strict=True):
            assert isinstance(outcome, int), f"bank {self.name}, expert {expert}: {outcome!r}"
            self._ledger.acknowledged(self.name, expert, self._cells[expert], writes[expert], outcome)


def load_of_64_clients(daemon: Any, seed: int, rounds: int) -> dict[str, object]:
    """Loads eight banks of different sizes, each with one writer and seven readers. Returns the counts."""
    sizes = [12_000, 12_000, 40_000, 40_000, 200_000, 200_000, 1_500_000, 1_500_000]
    banks = [BankUnderLoad(daemon.target, f"bank{n}", n + 1, size, rounds, seed + 100 * n) for n, size in enumerate(sizes)]
    work: list[Callable[[], object]] = [bank.write for bank in banks]
    work += [partial(bank.read, number) for bank in banks for number in range(1, READERS_PER_BANK + 1)]
    assert len(work) == 64
    began = time.monotonic()
    run_all(*work)
    took_s = time.monotonic() - began
    with closing(connect(daemon.target)) as store:
        counts = [bank.verify(store) for bank in banks]
        stats = store.stats()
    num_pushed, num_fetched = (sum(numbers) for numbers in zip(*counts, strict=True))
    assert stats.total.pushed_experts == num_pushed
    assert stats.total.push_refused == 0
    assert (stats.queues.pushes, stats.queues.demand_reads, stats.dram.pinned_bytes) == (0, 0, 0)
    return {
        "clients": 64,
        "banks": NUM_BANKS,
        "pushes acknowledged": num_pushed,
        "experts fetched": num_fetched,
        "seconds": f"{took_s:.0f}",
    }


@pytest.mark.timeout(120)
def test_64_clients_fetch_and_push_and_end_with_the_union_of_what_was_acknowledged(start_daemon: Callable[..., Any], seed: int) -> None:
    print(load_of_64_clients(start_daemon(dram_bytes="48MiB"), seed, rounds=6))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_64_clients_for_minutes(start_daemon: Callable[..., Any], seed: int, report: Any) -> None:
    counts = load_of_64_clients(start_daemon(dram_bytes="48MiB"), seed, rounds=100)
    report("concurrency_clients", COMMAND, {"seed": seed, **counts})


def test_of_two_writers_of_a_bank_the_second_is_refused_and_the_first_goes_on(daemon: Any) -> None:
    layout = layout_of(12_000)
    with closing(connect(daemon.target)) as first, closing(connect(daemon.target)) as second:
        first.create_bank(spec_of("b", layout, 1, 4))
        versions = [0] * 4
        for number in range(1, 20):
            for expert in range(4):
                [version] = first.push(
                    "b", [Push(expert=expert, base_version=versions[expert], body=body_of(layout, Tag(1, expert, number)))]
                )
                assert isinstance(version, int)
                versions[expert] = version
            with pytest.raises(NotTheWriter):
                second.push("b", [Push(expert=0, base_version=versions[0], body=body_of(layout, Tag(1, 0, 1000)))])
        assert fetch(second, "b", layout, 1, range(4)) == {expert: (versions[expert], Tag(1, expert, 19)) for expert in range(4)}
        first.release("b")
        [version] = second.push("b", [Push(expert=0, base_version=versions[0], body=body_of(layout, Tag(1, 0, 1000)))])
        assert isinstance(version, int)


def test_would_be_writers_take_turns_and_are_never_two(daemon: Any) -> None:
    layout = layout_of(12_000)
    with closing(connect(daemon.target)) as store:
        store.create_bank(spec_of("b", layout, 1, 1))
    lock = threading.Lock()
    holders: list[int] = []
    turns: list[int] = []
    refusals: list[int] = []

    def compete(number: int) -> None:
        with closing(connect(daemon.target)) as store:
            while len(turns) < 24:
                try:
                    store.open_for_writing("b")
                except NotTheWriter:
                    refusals.append(number)
                    continue
                with lock:
                    assert not holders, f"{number} opened the bank while {holders} had it"
                    holders.append(number)
                base = store.get_bank("b").newest_version
                [version] = store.push("b", [Push(expert=0, base_version=base, body=body_of(layout, Tag(1, 0, len(turns) + 1)))])
                assert isinstance(version, int), version
                with lock:
                    holders.clear()
                    turns.append(number)
                store.release("b")

    run_all(*(partial(compete, number) for number in range(6)))
    assert refusals
    with closing(connect(daemon.target)) as store:
        assert store.stats().total.pushed_experts == len(turns)


@pytest.fixture
def proxy(daemon: Any) -> Iterator[LossyProxy]:
    proxy = LossyProxy(daemon.target)
    yield proxy
    proxy.close()


def push_all(store: RemoteStore, versions: Sequence[int], number: int) -> list[int]:
    """Pushes body `number` to every expert; every push must be accepted."""
    layout = layout_of(12_000)
    pushes = [Push(expert=expert, base_version=base, body=body_of(layout, Tag(1, expert, number))) for expert, base in enumerate(versions)]
    outcomes = store.push("b", pushes)
    assert all(isinstance(outcome, int) for outcome in outcomes), outcomes
    return [int(str(outcome)) for outcome in outcomes]


def listed(store: RemoteStore) -> list[int]:
    return [info.version for info in store.list_experts("b")]


def test_pushes_whose_answers_were_lost_are_applied_once(daemon: Any, proxy: LossyProxy) -> None:
    with closing(connect(proxy.target)) as store, closing(connect(daemon.target)) as direct, ThreadPoolExecutor(1) as pool:
        store.create_bank(spec_of("b", layout_of(12_000), 1, NUM_EXPERTS))
        versions = push_all(store, [0] * NUM_EXPERTS, 1)
        for number in range(2, 6):
            proxy.lose_answers()
            answer = pool.submit(push_all, store, versions, number)
            while not all(new > old for new, old in zip(listed(direct), versions, strict=True)):
                assert not answer.done()
            committed = listed(direct)
            proxy.cut()
            assert answer.result() == committed == listed(direct)
            versions = committed
        stats = direct.stats().total
        assert (stats.pushed_experts, stats.push_repeats) == (5 * NUM_EXPERTS, 4 * NUM_EXPERTS)


def test_connections_that_break_at_random_instants_lose_and_repeat_nothing(daemon: Any, proxy: LossyProxy, seed: int) -> None:
    chosen = random.Random(seed)
    with closing(connect(proxy.target)) as store, closing(connect(daemon.target)) as direct, ThreadPoolExecutor(1) as pool:
        store.create_bank(spec_of("b", layout_of(12_000), 1, NUM_EXPERTS))
        versions = [0] * NUM_EXPERTS
        for number in range(1, NUM_CUTS + 1):
            answer = pool.submit(push_all, store, versions, number)
            time.sleep(chosen.uniform(0, 0.03))
            if chosen.random() < 0.5:
                proxy.lose_answers()
                time.sleep(chosen.uniform(0, 0.03))
            proxy.cut()
            versions = answer.result()
            assert versions == listed(direct)
        found = fetch(direct, "b", layout_of(12_000), 1, range(NUM_EXPERTS))
        assert found == {expert: (versions[expert], Tag(1, expert, NUM_CUTS)) for expert in range(NUM_EXPERTS)}
        assert direct.stats().total.pushed_experts == NUM_CUTS * NUM_EXPERTS


class Traffic:
    """Two writers and two readers of large records, which run until a number of bytes have moved."""

    NUM_EXPERTS = 12

    def __init__(self, target: str, plane: str) -> None:
        self._target, self._plane = target, plane
        self._layout = layout_of(8 << 20)
        self._bodies = [body_of(self._layout, Tag(1, 0, number)) for number in range(1, 4)]
        self._done = threading.Event()
        self.moved = dict.fromkeys(("push a", "push b", "fetch a", "fetch b"), 0)  # Bytes, as the clients see it.
        with closing(connect(target, plane)) as store:
            for bank in ("a", "b"):
                store.create_bank(spec_of(bank, self._layout, 1, self.NUM_EXPERTS))
            try:
                store.open_for_writing("a")
                fetch(store, "a", self._layout, 1, [0])
            except InvalidRequest as error:
                pytest.skip(str(error))

    def move(self, num_bytes: int, process: psutil.Process) -> tuple[list[int], list[int]]:
        """Moves at least a number of bytes. Returns samples of the daemon's own memory: of the traffic's fifth tenth, and of its last."""
        samples: list[int] = []

        def watch() -> None:
            with closing(connect(self._target)) as store:
                moved = 0
                while (moved < num_bytes or len(samples) < SAMPLES_MIN) and not self._done.is_set():
                    total = store.stats().total
                    moved = total.fetched_bytes + total.pushed_bytes
                    samples.append(own_bytes(process))
                    time.sleep(0.02)

        def guarded(work: Callable[..., None], *arguments: object) -> None:
            try:
                work(*arguments)
            finally:
                self._done.set()  # The first worker that ends, by success or failure, ends all.

        work = [(self._write, "a"), (self._write, "b"), (self._read, "a"), (self._read, "b")]
        run_all(lambda: guarded(watch), *(partial(guarded, *each) for each in work))
        tenth = len(samples) // 10
        return samples[4 * tenth : 5 * tenth], samples[-tenth:]

    def _write(self, bank: str) -> None:
        versions = [0] * self.NUM_EXPERTS
        with closing(connect(self._target, self._plane)) as store:
            for number in itertools.count():
                if self._done.is_set():
                    return
                experts = [(number * 4 + k) % self.NUM_EXPERTS for k in range(4)]
                body = self._bodies[number % len(self._bodies)]
                outcomes = store.push(bank, [Push(expert=expert, base_version=versions[expert], body=body) for expert in experts])
                for expert, outcome in zip(experts, outcomes, strict=True):
                    assert isinstance(outcome, int), outcome
                    versions[expert] = outcome
                self.moved[f"push {bank}"] += len(experts) * len(body)

    def _read(self, bank: str) -> None:
        memory = [bytearray(self._layout.body_bytes) for _ in range(self.NUM_EXPERTS)]
        with closing(connect(self._target, self._plane)) as store:
            while not self._done.is_set():
                for fetched in store.fetch(bank, range(self.NUM_EXPERTS), into=lambda expert: memoryview(memory[expert])):
                    assert not fetched.unchanged
                    self.moved[f"fetch {bank}"] += self._layout.body_bytes


def own_bytes(process: psutil.Process) -> int:
    """The daemon's resident memory without shared memory, such as the arena."""
    info = process.memory_info()
    return int(info.rss - info.shared)


def growth(start_daemon: Callable[..., Any], plane: str, num_bytes: int) -> tuple[float, str]:
    """The daemon's own memory in the last tenth of the traffic, as a ratio to the fifth tenth; and a text."""
    daemon = start_daemon(dram_bytes="160MiB")
    traffic = Traffic(daemon.target, plane)
    first, last = traffic.move(num_bytes, psutil.Process(daemon.pid))
    before, after = statistics.median(first), statistics.median(last)
    moved = {name: num_bytes / 2**30 for name, num_bytes in traffic.moved.items()}
    assert sum(traffic.moved.values()) > 0.9 * num_bytes, f"the daemon counted {num_bytes} bytes, its clients {moved} GiB"
    pushed, fetched = moved["push a"] + moved["push b"], moved["fetch a"] + moved["fetch b"]
    return after / before, f"{pushed:.1f} GiB pushed, {fetched:.1f} GiB fetched: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB"


@pytest.mark.parametrize("plane", PLANES)
def test_memory_does_not_grow_with_what_is_moved(start_daemon: Callable[..., Any], plane: str) -> None:
    ratio, numbers = growth(start_daemon, plane, 1 << 29)
    assert ratio < 1.5, numbers


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_within_5_percent_after_20_gib(start_daemon: Callable[..., Any], report: Any) -> None:
    grown = {plane: growth(start_daemon, plane, 20 << 30) for plane in PLANES}
    rows = {f"{plane.lower()} plane": numbers for plane, (_, numbers) in grown.items()}
    report("concurrency_memory", COMMAND, {**rows, "measured": "daemon's RSS less shared memory, medians of the fifth and the last tenth"})
    assert all(ratio < 1.05 for ratio, _ in grown.values()), grown

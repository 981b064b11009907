"""The in-memory store and a daemon under the same random calls: everything that a caller can see is the same.

Versions and snapshot ids are compared by their order, because a daemon that other tests use too does not begin at 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore, Push
from ooc_moe_wire.errors import OocMoeError
from tests.client.conftest import body, read, spec
from tests.conftest import DaemonProcess

NUM_CALLS = 80


@dataclass(frozen=True)
class Version:
    """A version, or the id of a snapshot, to be compared by its rank."""

    kind: str
    number: int


class Caller:
    """Two writers on one store, and the transcript of what they saw."""

    def __init__(self, connect: Callable[[], ExpertStore], prefix: str) -> None:
        self.stores = [connect(), connect()]
        self.names = [f"{prefix}/{letter}" for letter in "abcd"]
        self.transcript: list[Any] = []
        for name in self.names[:2]:
            self.stores[0].create_bank(spec(name))

    def call(self, rng: random.Random) -> None:
        """Makes one random call, and notes its result, or its error, and the state after it."""
        kinds = [self._create, self._grow, self._delete, self._fork, self._push, self._snapshot, self._restore, self._forget, self._release]
        call = rng.choices(kinds, weights=[2, 1, 3, 4, 12, 4, 4, 1, 6])[0]
        store, name = rng.choice(self.stores), rng.choice(self.names)
        try:
            result = call(rng, store, name)
        except OocMoeError as error:
            result = type(error).__name__
        self.transcript.append((call.__name__, result, self._state()))

    def _create(self, rng: random.Random, store: ExpertStore, name: str) -> Any:
        return self._bank(store.create_bank(spec(name, num_experts=rng.choice([4, 6]), seed=rng.choice([7, 7, 7, 8]))))

    def _grow(self, rng: random.Random, store: ExpertStore, name: str) -> Any:
        return self._bank(store.grow_bank(name, rng.choice([0, 5, 7, 1 << 41])))

    def _delete(self, rng: random.Random, store: ExpertStore, name: str) -> None:
        store.delete_bank(name)

    def _fork(self, rng: random.Random, store: ExpertStore, name: str) -> Any:
        snapshot = self._any_snapshot(rng) if rng.random() < 0.5 else None
        return self._bank(store.fork_bank(name, rng.choice(self.names), snapshot_id=snapshot))

    def _push(self, rng: random.Random, store: ExpertStore, name: str) -> list[Any]:
        drawn = {rng.randrange(8): (rng.choice([0, 0, 0, 0, -1, 1]), rng.randrange(100)) for _ in range(3)}
        current = {info.expert: info.version for info in store.list_experts(name)}
        pushes = [
            Push(expert=expert, base_version=max(0, current.get(expert, 0) + step), body=body(float(value)))
            for expert, (step, value) in drawn.items()
        ]
        outcomes = store.push(name, pushes)
        return [type(outcome).__name__ if isinstance(outcome, Exception) else Version("version", outcome) for outcome in outcomes]

    def _snapshot(self, rng: random.Random, store: ExpertStore, name: str) -> Any:
        label = rng.choice(["", "x", "y", "z" * 129])
        banks = rng.choice([[name], [name], self.names[:2], [name, name]])
        return self._public(store.create_snapshot(banks, name=label and f"{self.names[0]}{label}"))

    def _restore(self, rng: random.Random, store: ExpertStore, name: str) -> Any:
        return self._public(store.restore_snapshot(self._any_snapshot(rng)))

    def _forget(self, rng: random.Random, store: ExpertStore, name: str) -> None:
        store.delete_snapshot(self._any_snapshot(rng))

    def _release(self, rng: random.Random, store: ExpertStore, name: str) -> None:
        store.release(name)

    def _any_snapshot(self, rng: random.Random) -> int:
        taken = self._snapshots()
        place = rng.random()
        return taken[int(place * len(taken))].id if taken else 1 << 50

    def _snapshots(self) -> list[Any]:
        return [snapshot for snapshot in self.stores[0].list_snapshots() if set(snapshot.banks) & set(self.names)]

    def _state(self) -> Any:
        store = self.stores[0]
        banks = [bank for bank in store.list_banks() if bank.spec.name in self.names]
        experts = {
            bank.spec.name: [
                (info.expert, Version("version", info.version), info.record_bytes, info.parameter_xxh3, info.optimizer_xxh3)
                for info in store.list_experts(bank.spec.name)
            ]
            for bank in banks
        }
        bodies = {name: [bytes(read(store, name, [expert])[expert][1]) for expert in (0, 3)] for name in experts}
        return [self._bank(bank) for bank in banks], experts, bodies, [self._public(snapshot) for snapshot in self._snapshots()]

    def _bank(self, bank: Any) -> Any:
        newest = Version("version", bank.newest_version)
        return bank.spec, bank.num_written, newest, bank.writer_id != "", bank.record_bytes, bank.forked_from

    def _public(self, snapshot: Any) -> Any:
        automatic = snapshot.name == f"snapshot-{snapshot.id}"
        name = "automatic" if automatic else snapshot.name
        return Version("snapshot", snapshot.id), name, snapshot.banks, snapshot.num_experts, snapshot.bytes


def ranked(value: Any, ranks: dict[Version, int]) -> Any:
    """The value with each version replaced by its rank; 0 stays 0."""
    if isinstance(value, Version):
        return ranks[value]
    if isinstance(value, dict):
        return {key: ranked(item, ranks) for key, item in value.items()}
    return [ranked(item, ranks) for item in value] if isinstance(value, list | tuple) else value


def versions_in(value: Any) -> set[Version]:
    if isinstance(value, Version):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(versions_in, items))


def ranks_of(transcript: list[Any]) -> dict[Version, int]:
    ranks: dict[Version, int] = {}
    for kind in ("version", "snapshot"):
        known = sorted((item for item in versions_in(transcript) if item.kind == kind and item.number), key=lambda item: item.number)
        ranks |= {Version(kind, 0): 0} | {item: rank for rank, item in enumerate(known, start=1)}
    return ranks


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_are_answered_alike_in_memory_and_by_a_daemon(shared_daemon: DaemonProcess, bank: str, seed: int):
    state = InMemoryStore()
    callers = [Caller(connect, bank) for connect in (state.connect, lambda: RemoteStore(shared_daemon.target))]
    rngs = [random.Random(seed) for _ in callers]
    for _ in range(NUM_CALLS):
        for caller, rng in zip(callers, rngs, strict=True):
            caller.call(rng)
    transcripts = [ranked(caller.transcript, ranks_of(caller.transcript)) for caller in callers]
    for number, (ours, daemons) in enumerate(zip(*transcripts, strict=True)):
        assert ours == daemons, f"call {number}"
    for caller in callers:
        for store in caller.stores:
            store.close()

"""The mixed load under which the daemon is killed. Each worker has its own banks, knows what they must hold, and checks it after a crash.

    Pusher       one bank; several pushes at a time, durable and in memory; repeats the pushes that had no answer before the crash
    Keeper       a few small banks: creates, grows, forks and deletes them; creates, restores and deletes snapshots
    Reader       fetches what pushers push, whole or in part, and sometimes hangs up
    Prefetcher   asks for prefetches and cancels some
    Trainer      a RemoteStore with patience (it repeats failed calls for a while), for which a crash is only a pause

A worker's `run` ends with an error when the daemon dies. `verify` is called after each restart, while no worker runs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Priority, Push, Sections
from ooc_moe_wire.errors import Unavailable
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.v1 import expert_pb2
from tests.server.conftest import Client, PushStream
from tests.torture.bodies import Tag, body_of, layout_of, spec_of, tag_of
from tests.torture.ledger import Cell, Ledger, Write


def fetch(store: RemoteStore, bank: str, layout: Layout, tag_bank: int, experts: Sequence[int]) -> dict[int, tuple[int, Tag]]:
    """Fetches experts; returns, by expert, its version and the tag of its body. Checks every byte of the bodies."""
    bodies = {expert: bytearray(layout.body_bytes) for expert in experts}
    fetched = list(store.fetch(bank, experts, into=lambda expert: memoryview(bodies[expert])))
    assert sorted(item.expert for item in fetched) == sorted(experts)
    return {item.expert: (item.version, tag_of(layout, tag_bank, item.expert, bodies[item.expert])) for item in fetched}


def connected(target: str, trainer: str, dying: threading.Event) -> RemoteStore:
    """Connects a store that does not repeat failed calls, and returns it as soon as the daemon answers.

    Raises Unavailable if the daemon does not answer and `dying` is set, which means that the test has killed it.
    """
    store = RemoteStore(target, trainer=trainer, patience_s=0)
    while True:
        try:
            store.stats()
            return store
        except Unavailable:  # A busy machine may need longer than the client's first attempts.
            if dying.is_set():
                store.close()
                raise


@dataclass
class UnderWay:
    """A push that has been sent and has no answer yet."""

    header: expert_pb2.PushHeader
    write: Write


class Pusher:
    """Pushes to one bank, as its only writer, across all restarts of the daemon."""

    WINDOW = 6

    def __init__(self, name: str, tag_bank: int, ledger: Ledger, random: random.Random, *, num_experts: int, num_bytes: int) -> None:
        self.name, self.layout = name, layout_of(num_bytes)
        self.cells = [Cell(Write(Tag(tag_bank, expert, 0), version=0)) for expert in range(num_experts)]
        self.num_repeats = 0
        self._tag_bank, self._ledger, self._random = tag_bank, ledger, random
        self._number = 0
        self._unanswered: list[UnderWay] = []

    def prepare(self, store: RemoteStore) -> None:
        """Creates the pusher's bank."""
        store.create_bank(spec_of(self.name, self.layout, self._tag_bank, len(self.cells)))

    def run(self, target: str, dying: threading.Event) -> None:
        """Pushes to random experts until the daemon dies.

        Begins by repeating about half of the pushes that had no answer before the last crash.
        """
        client = Client(target, layout=self.layout)
        under_way: dict[int, UnderWay] = {}
        stream = client.stream(self.name, f"pusher of {self.name}", open_it=False)
        try:
            stream.send(open=expert_pb2.PushOpen(bank=self.name, writer_id=f"pusher of {self.name}"))
            next(stream.call)
            for push in self._unanswered:
                if self._random.random() < 0.5:
                    self._repeat(stream, push, under_way)
            self._unanswered = []
            while True:
                while len(under_way) < self.WINDOW:
                    self._send(stream, client, under_way)
                outcome = stream.outcome()
                self._settle(under_way.pop(outcome.expert), outcome)
        finally:
            self._unanswered = [*under_way.values()]
            stream.hang_up()
            client.channel.close()

    def verify(self, store: RemoteStore) -> None:
        """Checks after a restart that every expert is in its last durable state, or in one that was sent later."""
        found = fetch(store, self.name, self.layout, self._tag_bank, range(len(self.cells)))
        for expert, (version, tag) in found.items():
            self._ledger.found(self.name, expert, self.cells[expert], version, tag)
        assert [info.version for info in store.list_experts(self.name)] == [found[expert][0] for expert in range(len(self.cells))]

    def _send(self, stream: PushStream, client: Client, under_way: dict[int, UnderWay]) -> None:
        expert = self._random.choice([expert for expert in range(len(self.cells)) if expert not in under_way])
        self._number += 1
        durable = self._random.random() < 0.7
        with self._ledger.lock:
            cell = self.cells[expert]
            base = cell.newest.version
            assert base is not None
            write = Write(Tag(self._tag_bank, expert, self._number), durable=durable, above=self._ledger.newest)
            cell.later.append(write)
        body = body_of(self.layout, write.tag)
        header = client.push_header(expert, body, base_version=base, push_number=self._number)
        header.durability = expert_pb2.DURABLE if durable else expert_pb2.MEMORY
        under_way[expert] = UnderWay(header, write)
        stream.send(header=header)
        stream.body(body)

    def _repeat(self, stream: PushStream, push: UnderWay, under_way: dict[int, UnderWay]) -> None:
        """Sends a push again that had no answer. If the daemon had applied it, the answer must be the first outcome."""
        cell = self.cells[push.header.expert]
        if cell.floor is not push.write:
            push.write = Write(push.write.tag, durable=push.write.durable, above=self._ledger.newest)
            cell.later.append(push.write)
        under_way[push.header.expert] = push
        stream.send(header=push.header)
        stream.body(body_of(self.layout, push.write.tag))
        self.num_repeats += 1

    def _settle(self, push: UnderWay, outcome: expert_pb2.PushOutcome) -> None:
        assert outcome.push_number == push.header.push_number
        cell = self.cells[outcome.expert]
        if not outcome.HasField("error"):
            assert outcome.durable or push.header.durability == expert_pb2.MEMORY
            self._ledger.acknowledged(self.name, outcome.expert, cell, push.write, outcome.version)
            return
        with self._ledger.lock:
            assert push.write is not cell.floor, f"{push} was applied, and its repeat is refused: {outcome.error}"
            cell.later.remove(push.write)
            base_is_lost = push.header.base_version != cell.floor.version
        assert outcome.error.kind == "TierFull" or (base_is_lost and outcome.error.kind in ("StaleVersion", "LostUpdate")), outcome


class Reader:
    """Fetches what pushers push. Checks that no body is torn or older than known before, and that a durable push stays."""

    def __init__(self, pushers: Sequence[Pusher], ledger: Ledger, random: random.Random) -> None:
        self._pushers, self._ledger, self._random = pushers, ledger, random

    def run(self, target: str, dying: threading.Event) -> None:
        """Fetches random experts until the daemon dies."""
        store = connected(target, "reader", dying)
        try:
            while True:
                self._fetch(store, self._random.choice(self._pushers))
        finally:
            store.close()

    def _fetch(self, store: RemoteStore, pusher: Pusher) -> None:
        layout, cells = pusher.layout, pusher.cells
        sections = self._random.choice(list(Sections))
        num_bytes = layout.body_bytes if sections is Sections.ALL else layout.parameter_bytes
        experts = self._random.sample(range(len(cells)), self._random.randint(1, len(cells)))
        with self._ledger.lock:
            known = {expert: cells[expert].floor.version or 0 for expert in experts}
        bodies = {expert: bytearray(num_bytes) for expert in experts}
        priority = self._random.choice(list(Priority))
        enough = self._random.randint(1, 2 * len(experts))
        for fetched in store.fetch(pusher.name, experts, into=lambda e: memoryview(bodies[e]), sections=sections, priority=priority):
            tag = tag_of(layout, cells[0].floor.tag.bank, fetched.expert, bodies[fetched.expert])
            self._ledger.seen(pusher.name, fetched.expert, cells[fetched.expert], fetched.version, tag, at_least=known[fetched.expert])
            if (enough := enough - 1) == 0:
                break


class Prefetcher:
    """Asks for prefetches of the pushers' experts, and cancels some of them."""

    def __init__(self, pushers: Sequence[Pusher], random: random.Random) -> None:
        self._pushers, self._random = pushers, random

    def run(self, target: str, dying: threading.Event) -> None:
        """Asks for random prefetches until the daemon dies."""
        store = connected(target, "prefetcher", dying)
        try:
            while True:
                pusher = self._random.choice(self._pushers)
                store.prefetch(pusher.name, self._random.sample(range(len(pusher.cells)), len(pusher.cells) // 2))
                if self._random.random() < 0.3:
                    store.cancel_prefetch(pusher.name)
                store.stats()
        finally:
            store.close()


@dataclass
class BankModel:
    """What a keeper knows of one bank: its seed, which is `tag_bank` in tags, and the state of each expert.

    A bank that is created again under an old name has another seed.
    """

    tag_bank: int
    cells: list[Cell]


@dataclass
class World:
    """The banks and snapshots of a keeper, as they must be at one moment."""

    banks: dict[str, BankModel] = field(default_factory=dict)
    snapshots: dict[str, dict[str, list[Write]]] = field(default_factory=dict)  # name -> bank -> its experts then


class Keeper:
    """Changes its banks and snapshots one call at a time, so that a crash leaves the state before or after the interrupted call."""

    LAYOUT = layout_of(9000)
    NUM_BANKS, NUM_SNAPSHOTS = 3, 3

    def __init__(self, name: str, tag_banks: Iterable[int], ledger: Ledger, random: random.Random) -> None:
        self.num_changes = 0
        self._name, self._tag_banks, self._ledger, self._random = name, iter(tag_banks), ledger, random
        self._world = World()
        self._wanted: World | None = None  # The state after the call that was under way.
        self._ids: dict[str, int] = {}
        self._numbers = 0

    def run(self, target: str, dying: threading.Event) -> None:
        """Makes random changes until the daemon dies."""
        store = connected(target, "keeper", dying)
        client = Client(target, layout=self.LAYOUT)
        try:
            while True:
                if not self._world.banks:
                    self._create(store)
                elif self._random.random() < 0.5:
                    self._push(client)
                else:
                    changes = (
                        self._create,
                        self._grow,
                        self._delete,
                        self._fork,
                        self._snapshot,
                        self._snapshot,
                        self._restore,
                        self._drop,
                    )
                    self._random.choice(changes)(store)
        finally:
            store.close()
            client.channel.close()

    def verify(self, store: RemoteStore) -> None:
        """Checks after a restart that the daemon is in the state before or after the interrupted call.

        Also checks the content of a random snapshot.
        """
        found = {bank.spec.name: bank for bank in store.list_banks() if bank.spec.name.startswith(self._name)}
        contents = {name: fetch(store, name, self.LAYOUT, bank.spec.seed, range(bank.spec.num_experts)) for name, bank in found.items()}
        seeds = {name: bank.spec.seed for name, bank in found.items()}
        snapshots = {each.name: each for each in store.list_snapshots() if each.name.startswith(self._name)}
        shown = {name: sorted(snapshot.banks) for name, snapshot in snapshots.items()}
        worlds = [self._world] if self._wanted is None else [self._world, self._wanted]
        faults = [_fault(world, seeds, contents, shown) for world in worlds]
        assert None in faults, f"{self._name}: neither as before the last change nor as after it: {faults}"
        self._world, self._wanted = worlds[faults.index(None)], None
        for name, experts in contents.items():
            for expert, (version, tag) in experts.items():
                self._ledger.found(name, expert, self._world.banks[name].cells[expert], version, tag)
        self._ids = {name: snapshot.id for name, snapshot in snapshots.items()}
        if self._ids:
            self._verify_snapshot(store, self._random.choice(sorted(self._ids)))

    def _verify_snapshot(self, store: RemoteStore, name: str) -> None:
        for bank, writes in self._world.snapshots[name].items():
            store.fork_bank(bank, "check", snapshot_id=self._ids[name])
            tags = fetch(store, "check", self.LAYOUT, self._world.banks[bank].tag_bank, range(len(writes)))
            assert [tag for _, (_, tag) in sorted(tags.items())] == [write.tag for write in writes], f"snapshot {name} of {bank} changed"
            store.delete_bank("check")

    def _change(self, change: Callable[[World], None], call: Callable[[], object]) -> None:
        wanted = deepcopy(self._world)
        change(wanted)
        self._wanted = wanted
        call()
        self._world, self._wanted = wanted, None
        self.num_changes += 1

    def _learn(self, store: RemoteStore, name: str) -> None:
        """Fetches a bank after a change that gave its experts new versions; notes these versions, and checks the bytes."""
        model = self._world.banks[name]
        for expert, (version, tag) in fetch(store, name, self.LAYOUT, model.tag_bank, range(len(model.cells))).items():
            newest = model.cells[expert].newest
            assert newest.explains(version, tag), f"bank {name}, expert {expert}: version {version}, {tag} is not {newest}"
            self._ledger.note(name, expert, version, tag)
            newest.version = version

    def _bank(self) -> str:
        return self._random.choice(sorted(self._world.banks))

    def _free_name(self) -> str | None:
        names = {f"{self._name}-{number}" for number in range(self.NUM_BANKS)} - self._world.banks.keys()
        return self._random.choice(sorted(names)) if names else None

    def _push(self, client: Client) -> None:
        name = self._bank()
        cells = self._world.banks[name].cells
        stream = client.stream(name, f"keeper {self._name}", open_it=False)
        try:
            stream.send(open=expert_pb2.PushOpen(bank=name, writer_id=f"keeper {self._name}"))
            next(stream.call)
            for expert in self._random.sample(range(len(cells)), self._random.randint(1, min(3, len(cells)))):
                self._push_one(client, stream, name, expert)
            stream.close()
        finally:
            stream.hang_up()

    def _push_one(self, client: Client, stream: PushStream, name: str, expert: int) -> None:
        self._numbers += 1
        model = self._world.banks[name]
        cell = model.cells[expert]
        base = cell.newest.version
        assert base is not None
        durable = self._random.random() < 0.6
        write = Write(Tag(model.tag_bank, expert, self._numbers), durable=durable, above=self._ledger.newest)
        cell.later.append(write)
        body = body_of(self.LAYOUT, write.tag)
        header = client.push_header(expert, body, base_version=base, push_number=self._numbers)
        header.durability = expert_pb2.DURABLE if durable else expert_pb2.MEMORY
        stream.send(header=header)
        stream.body(body)
        outcome = stream.outcome()
        assert not outcome.HasField("error"), outcome
        assert outcome.durable or not durable
        self._ledger.acknowledged(name, expert, cell, write, outcome.version)

    def _create(self, store: RemoteStore) -> None:
        name = self._free_name()
        if name is None:
            return
        spec = spec_of(name, self.LAYOUT, next(self._tag_banks), self._random.randint(1, 6))

        def change(world: World) -> None:
            world.banks[name] = BankModel(spec.seed, [_untouched(spec.seed, expert) for expert in range(spec.num_experts)])

        self._change(change, lambda: store.create_bank(spec))

    def _grow(self, store: RemoteStore) -> None:
        name = self._bank()
        num_experts = len(self._world.banks[name].cells) + self._random.randint(1, 2)

        def change(world: World) -> None:
            model = world.banks[name]
            model.cells += [_untouched(model.tag_bank, expert) for expert in range(len(model.cells), num_experts)]

        if num_experts <= 10:
            self._change(change, lambda: store.grow_bank(name, num_experts))

    def _delete(self, store: RemoteStore) -> None:
        name = self._bank()

        def change(world: World) -> None:
            del world.banks[name]
            for snapshot in world.snapshots.values():
                snapshot.pop(name, None)
            world.snapshots = {name: banks for name, banks in world.snapshots.items() if banks}

        self._change(change, lambda: store.delete_bank(name))

    def _fork(self, store: RemoteStore) -> None:
        source, name = self._bank(), self._free_name()
        if name is None:
            return
        of_source = [snapshot for snapshot, banks in sorted(self._world.snapshots.items()) if source in banks]
        snapshot = self._random.choice([None, *of_source])
        above = self._ledger.newest

        def change(world: World) -> None:
            model = world.banks[source]
            if snapshot is None:
                _save_all(model)
            writes = [cell.newest for cell in model.cells] if snapshot is None else world.snapshots[snapshot][source]
            cells = [
                Cell(Write(write.tag, above=above)) if write.tag.number else _untouched(model.tag_bank, expert)
                for expert, write in enumerate(writes)
            ]
            world.banks[name] = BankModel(model.tag_bank, cells)

        self._change(change, lambda: store.fork_bank(source, name, snapshot_id=None if snapshot is None else self._ids[snapshot]))
        self._learn(store, name)

    def _snapshot(self, store: RemoteStore) -> None:
        if len(self._world.snapshots) >= self.NUM_SNAPSHOTS:
            return
        self._numbers += 1
        name = f"{self._name}-snapshot-{self._numbers}"
        banks = self._random.sample(sorted(self._world.banks), self._random.randint(1, len(self._world.banks)))

        def change(world: World) -> None:
            for bank in banks:
                _save_all(world.banks[bank])
            world.snapshots[name] = {bank: [deepcopy(cell.newest) for cell in world.banks[bank].cells] for bank in banks}

        def call() -> None:
            self._ids[name] = store.create_snapshot(banks, name=name).id

        self._change(change, call)

    def _restore(self, store: RemoteStore) -> None:
        if not self._world.snapshots:
            return
        name = self._random.choice(sorted(self._world.snapshots))
        above = self._ledger.newest

        def change(world: World) -> None:
            for bank, writes in world.snapshots[name].items():
                model = world.banks[bank]
                for expert, cell in enumerate(model.cells):
                    then = writes[expert] if expert < len(writes) else _untouched(model.tag_bank, expert).floor
                    if then.version or cell.newest.version:  # Otherwise it was never written.
                        model.cells[expert] = Cell(Write(then.tag, above=above))

        self._change(change, lambda: store.restore_snapshot(self._ids[name]))
        for bank in self._world.snapshots[name]:
            self._learn(store, bank)

    def _drop(self, store: RemoteStore) -> None:
        if not self._world.snapshots:
            return
        name = self._random.choice(sorted(self._world.snapshots))
        self._change(lambda world: world.snapshots.__delitem__(name), lambda: store.delete_snapshot(self._ids[name]))


class Trainer:
    """Pushes to a bank of its own and reads it back, through every crash; a crash only makes a call take longer."""

    NUM_EXPERTS = 8

    def __init__(self, name: str, tag_bank: int, ledger: Ledger, random: random.Random, target: str) -> None:
        self.num_pushes = 0
        self.done = threading.Event()
        self._name, self._tag_bank, self._ledger, self._random = name, tag_bank, ledger, random
        self._layout = layout_of(40_000)
        self._store = RemoteStore(target, trainer="trainer")

    def run(self) -> None:
        """Pushes and reads back until `done` is set."""
        self._store.create_bank(spec_of(self._name, self._layout, self._tag_bank, self.NUM_EXPERTS))
        versions, tags = [0] * self.NUM_EXPERTS, [Tag(self._tag_bank, expert, 0) for expert in range(self.NUM_EXPERTS)]
        while not self.done.is_set():
            experts = self._random.sample(range(self.NUM_EXPERTS), self._random.randint(1, 4))
            self.num_pushes += 1
            for expert in experts:
                tags[expert] = Tag(self._tag_bank, expert, self.num_pushes)
            pushes = [Push(expert=e, base_version=versions[e], body=body_of(self._layout, tags[e])) for e in experts]
            for expert, outcome in zip(experts, self._store.push(self._name, pushes), strict=True):
                assert isinstance(outcome, int), f"bank {self._name}, expert {expert}: {outcome!r}"
                assert outcome > versions[expert]
                versions[expert] = outcome
                with self._ledger.lock:
                    self._ledger.note(self._name, expert, outcome, tags[expert])
                    self._ledger.num_acknowledged += 1
            found = fetch(self._store, self._name, self._layout, self._tag_bank, experts)
            assert found == {expert: (versions[expert], tags[expert]) for expert in experts}
        self._store.close()


def _untouched(tag_bank: int, expert: int) -> Cell:
    return Cell(Write(Tag(tag_bank, expert, 0), version=0))


def _save_all(model: BankModel) -> None:
    """Notes that the newest states of a bank's experts must survive from now on, because a snapshot or a fork has them."""
    for cell in model.cells:
        cell.save(cell.newest)


def _fault(
    world: World, seeds: dict[str, int], contents: dict[str, dict[int, tuple[int, Tag]]], snapshots: dict[str, list[str]]
) -> str | None:
    """Describes how the state that was found in the daemon differs from `world`; None if it does not.

    Args:
        world: the state that is compared.
        seeds: by bank, its seed.
        contents: by bank and expert, the version and the tag that were fetched.
        snapshots: by name, the banks that a snapshot has.
    """
    if seeds != (expected := {name: model.tag_bank for name, model in world.banks.items()}):
        return f"banks (with their seeds) {seeds}, not {expected}"
    if snapshots != (shown := {name: sorted(banks) for name, banks in world.snapshots.items()}):
        return f"snapshots {snapshots}, not {shown}"
    for name, experts in contents.items():
        cells = world.banks[name].cells
        if len(experts) != len(cells):
            return f"bank {name}: {len(experts)} experts, not {len(cells)}"
        for expert, (version, tag) in experts.items():
            if cells[expert].explanation(version, tag) is None:
                return f"bank {name}, expert {expert}: version {version}, {tag} is explained by none of {cells[expert]}"
    return None

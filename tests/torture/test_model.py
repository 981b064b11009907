"""The real engine is compared with a dict, under random sequences of operations that Hypothesis makes.

python -m pytest tests/torture/test_model.py -m slow
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from ooc_moe_server.engine.engine import Engine
from ooc_moe_wire.errors import BankExists, OocMoeError, UnknownBank, UnknownExpert
from ooc_moe_wire.layout import BankSpec, Layout
from ooc_moe_wire.v1 import expert_pb2
from tests.torture.killed import Threads
from tests.torture.promises import LARGE, SMALL, fetch, push, random_body, seeded, send, write_back, writing
from tests.torture.workload import ram_directory, small_files

NAMES = st.sampled_from(["a", "b", "c"])
EXPERTS = st.sets(st.integers(0, 5), min_size=1, max_size=4)
DURABILITIES = st.sampled_from([expert_pb2.DURABLE, expert_pb2.MEMORY])
ANY = st.integers(0, 11)  # Chooses one of the existing things by index.
DRAM_BYTES = 64 << 10  # About five small records: fewer than the banks hold.


@dataclass(frozen=True, kw_only=True)
class Value:
    """The state of an expert. `origin` names the push that made its bytes, also across forks and restores; 0 is the seed."""

    body: bytes
    version: int
    origin: int = 0
    push: tuple[int, int] | None = None  # The push number and base version; None for a restored or forked value.


@dataclass(kw_only=True)
class ModelBank:
    spec: BankSpec
    num_experts: int
    records: dict[int, list[Value]] = field(default_factory=dict)  # The durable value, then those that a crash may lose.

    @property
    def layout(self) -> Layout:
        return self.spec.layout

    def value(self, expert: int) -> Value:
        return self.records[expert][-1] if expert in self.records else Value(body=seeded(self.spec, expert), version=0)

    def values(self) -> dict[int, Value]:
        return {expert: self.value(expert) for expert in self.records}

    def settle(self) -> None:
        self.records = {expert: [values[-1]] for expert, values in self.records.items()}


class StoreMachine(RuleBasedStateMachine):
    """A store and its model. Above 250 lines, because Hypothesis wants all rules of a state machine in one class."""

    def __init__(self) -> None:
        super().__init__()
        self.banks: dict[str, ModelBank] = {}
        self.snapshots: dict[int, dict[str, tuple[int, dict[int, Value]]]] = {}  # id -> bank -> experts, values
        self.newest = 0
        self.numbers = itertools.count(1)
        self.stack = ExitStack()
        self.root = self.stack.enter_context(ram_directory())
        self.stack.enter_context(small_files())
        self.threads = self.stack.enter_context(Threads().watched())
        self.loop = asyncio.new_event_loop()
        self.directory = self.root / "store0"
        self.directory.mkdir()
        self.engine: Engine

    @initialize()
    def open(self) -> None:
        self.engine = self.run(Engine.open(self.directory, DRAM_BYTES, patience_s=30.0))

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def refused(self, work: Any, *kinds: type[OocMoeError]) -> None:
        with pytest.raises(kinds):
            self.run(work)

    # Banks.

    @rule(name=NAMES, size=st.integers(1, 6), layout=st.sampled_from([SMALL, LARGE]), seed=st.integers(0, 1))
    def create(self, name: str, size: int, layout: Layout, seed: int) -> None:
        spec = BankSpec(name=name, num_experts=size, layout=layout, seed=seed)
        present = self.banks.get(name)
        if present and (present.spec.layout, present.spec.seed) != (layout, seed):
            self.refused(self.engine.changes.create_bank(spec), BankExists)
            return
        self.run(self.engine.changes.create_bank(spec))
        if not present:
            self.banks[name] = ModelBank(spec=spec, num_experts=size)

    @rule(name=NAMES, size=st.integers(1, 8))
    def grow(self, name: str, size: int) -> None:
        if name not in self.banks:
            self.refused(self.engine.changes.grow_bank(name, size), UnknownBank)
            return
        self.run(self.engine.changes.grow_bank(name, size))
        self.banks[name].num_experts = max(size, self.banks[name].num_experts)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.banks:
            self.refused(self.engine.changes.delete_bank(name), UnknownBank)
            return
        self.run(self.engine.changes.delete_bank(name))
        del self.banks[name]
        for number, contents in list(self.snapshots.items()):
            if contents.pop(name, None) and not contents:
                del self.snapshots[number]

    @precondition(lambda self: self.banks)
    @rule(which=ANY, name=NAMES, of=ANY, from_present=st.booleans())
    def fork(self, which: int, name: str, of: int, from_present: bool) -> None:
        source = sorted(self.banks)[which % len(self.banks)]
        numbers = [number for number, contents in sorted(self.snapshots.items()) if source in contents]
        number = 0 if from_present or not numbers else numbers[of % len(numbers)]
        if name in self.banks:
            self.refused(self.engine.changes.fork_bank(source, name, number), BankExists)
            return
        size, values = self.snapshots[number][source] if number else (self.banks[source].num_experts, self.banks[source].values())
        fork = self.run(self.engine.changes.fork_bank(source, name, number))
        spec = BankSpec(name=name, num_experts=size, layout=fork.layout, seed=self.banks[source].spec.seed)
        self.banks[name] = ModelBank(spec=spec, num_experts=size)
        self._take_over(name, {expert: value for expert, value in values.items() if value.origin})

    # Pushes.

    @precondition(lambda self: self.banks)
    @rule(which=ANY, experts=EXPERTS, durability=DURABILITIES)
    def push(self, which: int, experts: set[int], durability: int) -> None:
        bank = self._bank(which)
        wanted = sorted(expert for expert in experts if expert < bank.num_experts)
        numbers = {expert: next(self.numbers) for expert in wanted}
        sent = {expert: (bank.value(expert).version, random_body(bank.layout, numbers[expert])) for expert in wanted}
        outcomes = self.run(push(self.engine, bank.spec.name, sent, numbers.values(), durability=durability))
        assert {expert: outcome.error.kind for expert, outcome in outcomes.items()} == dict.fromkeys(wanted, "")
        before = self.newest
        for expert, outcome in outcomes.items():
            assert outcome.version > before, "a version was used before"
            assert outcome.durable or durability == expert_pb2.MEMORY
            self.newest = max(self.newest, outcome.version)
            base, body = sent[expert]
            value = Value(body=body, version=outcome.version, origin=numbers[expert], push=(numbers[expert], base))
            older = [] if outcome.durable else bank.records.get(expert) or [bank.value(expert)]
            bank.records[expert] = [*older, value]
        assert len({outcome.version for outcome in outcomes.values()}) == len(wanted)

    @rule(which=ANY, durability=DURABILITIES)
    def repeat(self, which: int, durability: int) -> None:
        if not self._pushed():  # Not a precondition: what a crash left depends on timing, and Hypothesis wants the same rules again.
            return
        bank, expert, value = self._pushed()[which % len(self._pushed())]
        assert value.push is not None
        number, base = value.push
        outcomes = self.run(push(self.engine, bank.spec.name, {expert: (base, value.body)}, [number], durability=durability))
        assert outcomes[expert].version == value.version, outcomes
        if outcomes[expert].durable:
            bank.records[expert] = [value]

    @rule(which=ANY, base=st.sampled_from(["older", "newer"]))
    def conflict(self, which: int, base: str) -> None:
        if not self._written():
            return
        bank, expert, value = self._written()[which % len(self._written())]
        wrong = value.version - 1 if base == "older" else value.version + 1_000_000_000
        outcomes = self.run(push(self.engine, bank.spec.name, {expert: (wrong, random_body(bank.layout, 0))}, self.numbers))
        assert outcomes[expert].error.kind in ("StaleVersion", "LostUpdate"), outcomes
        assert outcomes[expert].error.kind == "StaleVersion" or base == "newer"

    @precondition(lambda self: self.banks)
    @rule(which=ANY, other=ANY, durability=DURABILITIES)
    def two_pushes_of_one_expert_at_once(self, which: int, other: int, durability: int) -> None:
        """The second push of the stream is refused, or committed after the first. It is never lost."""
        bank = self._bank(which)
        expert = other % bank.num_experts
        base, numbers = bank.value(expert), [next(self.numbers), next(self.numbers)]
        bodies = [random_body(bank.layout, number) for number in numbers]

        async def both() -> list[expert_pb2.PushOutcome]:
            async with writing(self.engine, bank.spec.name) as writer:
                for number, body in zip(numbers, bodies, strict=True):
                    await send(writer, bank.layout, expert, body, base_version=base.version, push_number=number, durability=durability)
                return [await writer.outcomes.get() for _ in numbers]

        outcomes = {outcome.push_number: outcome for outcome in self.run(both())}
        first, second = outcomes[numbers[0]], outcomes[numbers[1]]
        assert (first.error.kind, second.error.kind) == ("", "StaleVersion")
        assert first.version > self.newest
        self.newest = first.version
        value = Value(body=bodies[0], version=first.version, origin=numbers[0], push=(numbers[0], base.version))
        bank.records[expert] = [*([] if first.durable else bank.records.get(expert) or [base]), value]

    # Snapshots.

    @precondition(lambda self: self.banks)
    @rule(chosen=st.sets(ANY, min_size=1, max_size=3))
    def snapshot(self, chosen: set[int]) -> None:
        names = sorted({sorted(self.banks)[which % len(self.banks)] for which in chosen})
        number = self.run(self.engine.changes.create_snapshot(names, "")).id
        assert number not in self.snapshots
        self.snapshots[number] = {name: (self.banks[name].num_experts, self.banks[name].values()) for name in names}
        for name in names:
            self.banks[name].settle()

    @precondition(lambda self: self.snapshots)
    @rule(which=ANY)
    def restore(self, which: int) -> None:
        number = sorted(self.snapshots)[which % len(self.snapshots)]
        self.run(self.engine.changes.restore_snapshot(number, ""))
        for name, (_, values) in self.snapshots[number].items():
            bank = self.banks[name]
            seeds = {expert: Value(body=seeded(bank.spec, expert), version=0) for expert in bank.records}
            self._take_over(name, seeds | values)

    @precondition(lambda self: self.snapshots)
    @rule(which=ANY)
    def drop(self, which: int) -> None:
        number = sorted(self.snapshots)[which % len(self.snapshots)]
        self.run(self.engine.changes.delete_snapshot(number))
        del self.snapshots[number]

    # Reading.

    @precondition(lambda self: self.banks)
    @rule(which=ANY, experts=EXPERTS)
    def fetch(self, which: int, experts: set[int]) -> None:
        bank = self._bank(which)
        if max(experts) >= bank.num_experts:
            self.refused(fetch(self.engine, bank.spec.name, experts), UnknownExpert)
            return
        for expert, got in self.run(fetch(self.engine, bank.spec.name, experts)).items():
            assert got == (bank.value(expert).version, bank.value(expert).body)

    @precondition(lambda self: self.banks)
    @rule(which=ANY, known=st.sets(st.integers(0, 5)))
    def fetch_what_is_not_known(self, which: int, known: set[int]) -> None:
        """Fetches parameters only. Some known versions are current, others outdated."""
        bank = self._bank(which)
        versions = [bank.value(expert).version + (expert not in known) for expert in range(bank.num_experts)]
        got = self.run(self._fetch_parameters(bank, versions))
        wanted = {
            expert: None if expert in known else bank.value(expert).body[: bank.layout.parameter_bytes]
            for expert in range(bank.num_experts)
        }
        assert got == wanted

    async def _fetch_parameters(self, bank: ModelBank, versions: list[int]) -> dict[int, bytes | None]:
        present = self.engine.catalog.bank(bank.spec.name)
        wanted = self.engine.fetch(
            present,
            range(len(versions)),
            known_versions=versions,
            demand=False,
            section_bytes=bank.layout.parameter_bytes,
            scopes=self.engine.stats.scopes("t", present.access),
        )
        async with aclosing(wanted.experts()) as served:
            return {each.expert: bytes(each.entry.body[: bank.layout.parameter_bytes]) if each.entry else None async for each in served}

    @precondition(lambda self: self.banks)
    @rule(which=ANY, experts=EXPERTS, cancel=st.booleans())
    def prefetch(self, which: int, experts: set[int], cancel: bool) -> None:
        """Queues a prefetch, which may or may not have ended by the next operation."""
        bank = self._bank(which)
        present = self.engine.catalog.bank(bank.spec.name)
        wanted = sorted(expert for expert in experts if expert < bank.num_experts)

        async def ask() -> None:
            self.engine.prefetch(present, wanted, deadline_s=None, scopes=self.engine.stats.scopes("t", present.access))
            if cancel:
                self.engine.promotions.cancel(present, set(wanted))

        self.run(ask())

    # Ends.

    @rule()
    def settle(self) -> None:
        """Writes back what was acknowledged in memory."""
        self.run(self.engine.promotions.drain())
        self.run(write_back(self.engine))
        for bank in self.banks.values():
            bank.settle()
        self._compare_slots()

    @rule()
    def restart(self) -> None:
        self.run(self.engine.close())
        for bank in self.banks.values():
            bank.settle()
        self.open()
        self._compare_slots()

    @rule()
    def crash(self) -> None:
        """Kills and restarts the store. An expert acknowledged in memory only may have an older state now."""
        before, self.directory = self.directory, self.root / f"store{next(self.numbers)}"
        self.threads.copy(before, self.directory)
        self.run(self.engine.close())
        shutil.rmtree(before)
        self.open()
        for name, bank in self.banks.items():
            for expert, values in list(bank.records.items()):
                version = self.engine.catalog.bank(name).record(expert).version
                kept = [value for value in values if value.version == version]
                assert kept, f"version {version} is none of {[value.version for value in values]}"
                bank.records[expert] = kept
                if not version:
                    del bank.records[expert]
        self._compare_slots()

    @invariant()
    def the_catalog_is_the_models(self) -> None:
        if not hasattr(self, "engine"):
            return
        present = self.engine.catalog.banks
        assert {name: bank.num_experts for name, bank in present.items()} == {name: bank.num_experts for name, bank in self.banks.items()}
        assert set(self.engine.catalog.snapshots) == set(self.snapshots)
        for name, bank in self.banks.items():
            versions = [bank.value(expert).version for expert in range(bank.num_experts)]
            assert [present[name].record(expert).version for expert in range(bank.num_experts)] == versions

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                if sys.exc_info()[0] is None:  # Otherwise a rule has failed, and its error says more.
                    self._compare_all()
            finally:
                self.run(self.engine.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.stack.close()

    def _compare_all(self) -> None:
        """Compares every expert of every bank and snapshot; checks that no other pin or slot is left."""
        for name, bank in self.banks.items():
            got = self.run(fetch(self.engine, name, range(bank.num_experts)))
            assert got == {expert: (bank.value(expert).version, bank.value(expert).body) for expert in range(bank.num_experts)}
        for number, contents in self.snapshots.items():
            for name, (size, values) in contents.items():
                fork = self.run(self.engine.changes.fork_bank(name, "fork", number))
                bodies = {expert: body for expert, (_, body) in self.run(fetch(self.engine, "fork", range(size))).items()}
                assert fork.num_experts == size
                spec = self.banks[name].spec
                assert bodies == {expert: values[expert].body if expert in values else seeded(spec, expert) for expert in range(size)}
                self.run(self.engine.changes.delete_bank("fork"))
        self.settle()
        assert self.engine.snapshot_stats().dram.pinned_bytes == 0

    def _compare_slots(self) -> None:
        """Checks that the used bytes are those of the slots that banks and snapshots refer to, each counted once."""
        values = [(bank.layout, value) for bank in self.banks.values() for value in bank.values().values()]
        for contents in self.snapshots.values():
            values += [(self.banks[name].layout, value) for name, (_, kept) in contents.items() for value in kept.values()]
        live = {value.origin: layout.record_bytes for layout, value in values if value.origin}
        assert self.engine.snapshot_stats().nvme.used_bytes == sum(live.values())

    def _take_over(self, name: str, values: dict[int, Value]) -> None:
        """Copies the values of a restore or fork, under new versions."""
        bank, before = self.banks[name], self.newest
        for expert, value in values.items():
            version = self.engine.catalog.bank(name).record(expert).version
            assert version > before, "a version was used before"
            bank.records[expert] = [Value(body=value.body, version=version, origin=value.origin)]
            self.newest = max(self.newest, version)

    def _bank(self, which: int) -> ModelBank:
        return self.banks[sorted(self.banks)[which % len(self.banks)]]

    def _written(self) -> list[tuple[ModelBank, int, Value]]:
        return [(bank, expert, value) for _, bank in sorted(self.banks.items()) for expert, value in bank.values().items()]

    def _pushed(self) -> list[tuple[ModelBank, int, Value]]:
        return [each for each in self._written() if each[2].push]


SETTINGS = settings(
    max_examples=30,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # Shrinking opens a store thousands of times; add Phase.shrink to study a failure.
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_the_engine_is_a_dict():
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_engine_is_a_dict_for_much_longer():
    run_state_machine_as_test(StoreMachine, settings=settings(SETTINGS, max_examples=600, stateful_step_count=50, derandomize=False))

"""The states of a push: the order in which each kind of push passes them, and that no other step is possible."""

import asyncio
import errno

import pytest

from ooc_moe_server.catalog.catalog import Bank
from ooc_moe_server.engine import write_behind
from ooc_moe_server.engine.push import Push, PushState
from ooc_moe_server.nvme.slab import Slab
from ooc_moe_wire.layout import BankSpec
from tests.server.engine_store import LAYOUT, body_of, failing, opened, until

SPEC = BankSpec(name="b", num_experts=1, layout=LAYOUT)
DURABLE = ["RECEIVED", "WRITING", "IN_ROUND", "COMMITTED"]
MEMORY = ["RECEIVED", "UNSAVED", "WRITING_BACK", "SAVING", "COMMITTED"]


@pytest.fixture
def passed(monkeypatch):
    """The states that each push passed, by the expert and the order of the pushes."""
    states: dict[Push, list[str]] = {}
    real_enter = Push.enter

    def enter(push, state):
        states.setdefault(push, [push.state.name]).append(state.name)
        real_enter(push, state)

    monkeypatch.setattr(Push, "enter", enter)
    return states


def test_a_durable_push_and_a_memory_push_pass_their_states_in_order(tmp_path, passed):
    async def scenario():
        async with opened(tmp_path) as store:
            await store.push_one(0, 1)
            await store.push_one(1, 2, in_memory=True)

    asyncio.run(scenario())
    assert list(passed.values()) == [DURABLE, MEMORY]


def test_a_push_from_a_stale_version_is_refused_from_the_round(tmp_path, passed):
    async def scenario():
        async with opened(tmp_path) as store:
            async with store.engine.committer.exclusive():  # No round can begin.
                pushing = asyncio.create_task(store.push_one(0, 1))
                await until(lambda: store.waiting)
                store.bank.put(0, store.waiting[0].record())  # Stands for a restore that came first.
                store.engine.nvme.hold(store.waiting[0].slot)
            assert (await pushing).error.kind == "StaleVersion"

    asyncio.run(scenario())
    assert list(passed.values()) == [["RECEIVED", "WRITING", "IN_ROUND", "REFUSED"]]


def test_a_failed_write_back_goes_back_to_unsaved_and_a_replaced_record_is_dropped(tmp_path, passed, monkeypatch):
    monkeypatch.setattr(write_behind, "RETRY_S_MIN", 60.0)  # The second try would come after the test.

    async def scenario():
        async with opened(tmp_path) as store:
            with monkeypatch.context() as broken:
                broken.setattr(Slab, "write", failing(OSError(errno.EIO, "injected")))
                await store.push_one(0, 1, in_memory=True)
                (push,) = passed
                await until(lambda: len(passed[push]) == 4)
            await store.push_one(0, 2)
            assert await store.bodies(0) == {0: body_of(2)}

    asyncio.run(scenario())
    assert list(passed.values()) == [["RECEIVED", "UNSAVED", "WRITING_BACK", "UNSAVED", "DROPPED"], DURABLE]


def test_a_state_cannot_be_skipped_or_left_after_the_end():
    async def scenario():
        bank = Bank(id=1, uuid=b"", spec=SPEC, num_experts=1, created_unix_ms=0, forked_from="")
        push = Push(bank=bank, expert=0, base_version=0, writer_id="w", push_number=1, checksums=None, entry=None)
        for state in (PushState.RECEIVED, PushState.IN_ROUND, PushState.SAVING, PushState.COMMITTED):
            push.state = PushState.RECEIVED
            with pytest.raises(AssertionError):
                push.enter(state)
        for end in (PushState.COMMITTED, PushState.REFUSED, PushState.DROPPED):
            for state in PushState:
                push.state = end
                with pytest.raises(AssertionError):
                    push.enter(state)

    asyncio.run(scenario())

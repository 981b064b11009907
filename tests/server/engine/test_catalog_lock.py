"""The lock of the catalog: which of rounds, changes and acknowledgements may run at the same time."""

import asyncio

from ooc_moe_server.engine.catalog_lock import CatalogLock


class Stage:
    """Tasks that enter a context of the lock, note it in `events`, and stay inside until they are let go."""

    def __init__(self) -> None:
        self.lock, self.events = CatalogLock(), []
        self._gates: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, context) -> None:
        """Starts a task, and lets it go as far as it can."""

        async def stay() -> None:
            async with context:
                self.events.append(name)
                await self._gates[name].wait()

        self._gates[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(stay())
        await self.go_on()

    async def end(self, name: str) -> None:
        """Lets a task leave its context, and others go as far as they can."""
        self._gates[name].set()
        await self._tasks[name]
        await self.go_on()

    async def go_on(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_a_round_and_a_change_never_run_together():
    async def scenario():
        stage = Stage()
        await stage.begin("round", stage.lock.round())
        await stage.begin("change", stage.lock.change())
        await stage.begin("second round", stage.lock.round())
        assert stage.events == ["round"]
        await stage.end("round")
        assert stage.events == ["round", "change"]
        await stage.end("change")
        assert stage.events == ["round", "change", "second round"]
        await stage.end("second round")

    asyncio.run(scenario())


def test_a_change_that_lends_the_lock_lets_rounds_run_but_no_other_change():
    async def scenario():
        stage = Stage()
        async with stage.lock.change():
            async with stage.lock.lent_to_rounds():
                await stage.begin("change", stage.lock.change())
                await stage.begin("round", stage.lock.round())
                assert stage.events == ["round"]
                await stage.end("round")
                assert stage.events == ["round"]
            await stage.begin("second round", stage.lock.round())
            assert stage.events == ["round"]
        await asyncio.gather(stage.end("second round"), stage.end("change"))  # Either may come first.
        assert sorted(stage.events) == ["change", "round", "second round"]

    asyncio.run(scenario())


def test_an_acknowledgement_waits_for_the_end_of_a_change_even_while_the_lock_is_lent():
    async def scenario():
        stage = Stage()
        async with stage.lock.change():
            waiting = asyncio.create_task(stage.lock.wait_until_unchanging())
            async with stage.lock.lent_to_rounds():
                await stage.go_on()
            assert not waiting.done()
            assert stage.lock.is_changing
        await waiting
        assert not stage.lock.is_changing

    asyncio.run(scenario())

"""The pacer of large messages: one turn in each iteration of the loop, in order, and no turn is lost."""

import asyncio

from ooc_moe_server.rpc.pacing import MessagePacer


def test_each_iteration_of_the_loop_has_at_most_one_turn_and_all_come_in_order():
    async def scenario():
        pacer, taken, iteration = MessagePacer(), [], 0

        async def stream(name: int) -> None:
            with pacer.counted_stream():
                for _ in range(3):
                    await pacer.wait_turn()
                    taken.append((iteration, name))

        streams = [asyncio.create_task(stream(name)) for name in range(4)]
        while not all(each.done() for each in streams):
            iteration += 1
            await asyncio.sleep(0)
        assert len({when for when, _ in taken}) == 12
        assert [name for _, name in taken] == [0, 1, 2, 3] * 3
        assert pacer.num_streams == 0

    asyncio.run(scenario())


def test_a_caller_that_leaves_does_not_keep_the_turn():
    async def scenario():
        pacer = MessagePacer()
        tasks = [asyncio.create_task(pacer.wait_turn()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()
        async with asyncio.timeout(5):
            await tasks[2]
            await pacer.wait_turn()

    asyncio.run(scenario())

"""The loop of a worker process: it runs what threads ask for, and it ends."""

import asyncio

from worker.loop import LoopThread, cancel_surely


async def deaf(times, began):
    began.set()
    while times:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            times -= 1


def test_a_task_that_missed_its_cancel_is_told_again():
    async def story():
        began = asyncio.Event()
        task = asyncio.create_task(deaf(2, began))
        await began.wait()
        await cancel_surely([task, None])
        assert task.done()

    asyncio.run(story())


def test_a_loop_ends_with_everything_that_runs_on_it():
    loop = LoopThread()
    began, endless = asyncio.Event(), asyncio.Event()

    async def wait_for_ever():
        began.set()
        await endless.wait()

    left = loop.submit(wait_for_ever())
    assert loop.submit(began.wait()).result() is True
    loop.stop()
    assert left.cancelled()

"""The loop of a worker process: it runs what threads ask for, and it ends."""

import asyncio
import queue
import threading

from worker import loop as loop_module
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


def test_a_loop_that_is_held_up_is_found_with_the_place_where_it_stands(monkeypatch):
    monkeypatch.setattr(loop_module, "LOOK_S", 0.02)
    loop, release, found = LoopThread(), threading.Event(), queue.Queue()

    async def hold_up():
        release.wait()

    loop.watch(0.06, found.put)
    held = loop.submit(hold_up())
    assert "hold_up" in found.get(timeout=30)
    release.set()
    held.result()
    loop.stop()


def test_a_loop_that_is_busy_or_ends_is_not_taken_for_one_that_is_held_up(monkeypatch):
    monkeypatch.setattr(loop_module, "LOOK_S", 0.5)
    loop, found = LoopThread(), queue.Queue()
    loop.watch(0.5, found.put)

    async def turn(times):
        for _ in range(times):
            await asyncio.sleep(0)

    loop.submit(turn(50_000)).result()
    loop.stop()
    assert found.empty()

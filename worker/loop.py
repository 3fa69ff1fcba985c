"""The one asyncio loop of a worker process, in a thread of its own: it owns all HTTP and database clients."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

LOOK_S = 1.0

Value = TypeVar("Value")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it exists, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class LoopThread:
    """Runs coroutines for threads that have no loop."""

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop) -> None:
        self._loop = factory()
        self._thread = threading.Thread(target=self._run, name="backstop-loop", daemon=True)
        self._thread.start()
        self._ending = threading.Event()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, Value]) -> Future[Value]:
        """The coroutine runs on the loop; its future may be waited for in any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def watch(self, limit_s: float, blocked: Callable[[str], None]) -> None:
        """From now on: once the loop has been held up for `limit_s`, another thread calls `blocked` with the place where it stands."""
        threading.Thread(target=self._watch, args=(limit_s, blocked), name="backstop-watch", daemon=True).start()

    def _watch(self, limit_s: float, blocked: Callable[[str], None]) -> None:
        # Told by looks and not by a clock: a process that was frozen for an hour has a loop that is well.
        held_up_s = 0.0
        while not self._ending.wait(LOOK_S):
            held_up_s = 0.0 if self._passes() else held_up_s + LOOK_S
            if held_up_s >= limit_s:
                blocked(self._place())
                return

    def _passes(self) -> bool:
        passed = threading.Event()
        self._loop.call_soon_threadsafe(passed.set)
        return passed.wait(LOOK_S)

    def _place(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._thread.ident or 0])[-3:]
        return " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)

    def stop(self) -> None:
        """The loop has ended. What was still running on it has been cancelled."""
        self._ending.set()
        self.submit(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    await cancel_surely(list(asyncio.all_tasks() - {asyncio.current_task()}))


async def cancel_surely(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    """All of them have ended. Told again every second: on Python 3.11 `wait_for`, which redis-py sends with, forgets a cancel
    that comes at the same moment as its result."""
    while left := [task for task in tasks if task is not None and not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1)

"""The one asyncio loop of a worker process, in a thread of its own: it owns all HTTP and database clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

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

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, Value]) -> Future[Value]:
        """The coroutine runs on the loop; its future may be waited for in any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """The loop has ended. What was still running on it has been cancelled."""
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

"""How many jobs of a lane run at once in one worker process."""

from __future__ import annotations

import asyncio


class Slots:
    """A counted semaphore that is taken by the pack, first come first served, and given back job by job."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    async def take(self, wanted: int) -> None:
        """`wanted` slots are ours. Two packs never wait for each other's: who comes first takes all of its slots first."""
        async with self._turn:
            taken = 0
            try:
                while taken < wanted:
                    await self._free.acquire()
                    taken += 1
            except asyncio.CancelledError:
                self.give_back(taken)
                raise

    def give_back(self, count: int = 1) -> None:
        for _ in range(count):
            self._free.release()

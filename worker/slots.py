"""How many jobs of a lane run at once in one worker process."""

from __future__ import annotations

import asyncio


class Slots:
    """A counted semaphore that is taken by the pack, first come first served, and given back job by job."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._given_back = asyncio.Event()
        self._turn = asyncio.Lock()

    async def take(self, wanted: int) -> None:
        """`wanted` slots are ours, all at once. A pack that is larger than the lane has the whole lane to itself."""
        async with self._turn:
            while self._free < min(wanted, self.count):
                self._given_back.clear()
                await self._given_back.wait()
            self._free -= wanted

    def give_back(self, count: int = 1) -> None:
        self._free += count
        self._given_back.set()

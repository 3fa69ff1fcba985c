"""Group commit: what many coroutines ask at the same time goes out as one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Group(Generic[Item, Answer]):
    """Collects items while the round trip before is under way, then sends them together.

    An idle group sends at once, a busy one grows its groups by itself, so it adds no wait of its own. `send` gets 1 to
    `most` items and returns one answer for each, in order; what it raises is raised to every caller of that group. A
    caller that is cancelled does not take its item back; when the sending itself is cancelled, so are all who wait.
    """

    def __init__(self, send: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], *, most: int = 500) -> None:
        self._send = send
        self._most = most
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def ask(self, item: Item) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                await self._send_group(group)
        finally:
            self._sender = None
            for _, future in self._waiting:  # left only when this task was cancelled: nobody may wait for ever
                future.cancel()
            self._waiting = []

    async def _send_group(self, group: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._send([item for item, _ in group])
            if len(answers) != len(group):
                raise ValueError(f"{len(group)} items were sent, {len(answers)} answers came back")
        except Exception as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        finally:
            for _, future in group:
                future.cancel()  # what is done stays as it is

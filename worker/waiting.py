"""Waiting for jobs to end, thousands at once: Redis says when, Postgres says whether.

A settle announces what ended on one Redis channel; each process that waits has one subscription to it. An announcement
may be lost, so every second the database is asked once for all jobs still waited for. No connection is held in between.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import run
from worker.grouping import Group

CHANNEL = "backstop:ended"
POLL_S = 1.0
_RESUBSCRIBE_S = 1.0
_IDLE_S = 30.0

_ENDED = text("SELECT id FROM jobs WHERE id = ANY(:ids) AND finished_at IS NOT NULL")


async def announce(redis: Redis, job_ids: Iterable[UUID]) -> None:
    """Whoever waits for these jobs wakes; call it after the commit.

    Raises nothing: with Redis down they wake up to a second later.
    """
    payload = " ".join(job_id.hex for job_id in job_ids)
    if payload:
        with suppress(RedisError, OSError, RuntimeError):  # the last is uvloop's, of a transport that is closing
            await redis.publish(CHANNEL, payload)


class _Wait:
    def __init__(self, job_ids: Collection[UUID]) -> None:
        self.pending = set(job_ids)
        self.over = asyncio.Event()

    def over_with(self, job_id: UUID) -> None:
        self.pending.discard(job_id)
        if not self.pending:
            self.over.set()


class _Each(_Wait):
    def __init__(self, job_ids: Collection[UUID]) -> None:
        super().__init__(job_ids)
        self.ended: set[UUID] = set()
        self.some = asyncio.Event()

    def over_with(self, job_id: UUID) -> None:
        self.pending.discard(job_id)
        self.ended.add(job_id)
        self.some.set()


class Endings:
    """One per process, entered on the event loop that waits. Redis down means polling only, never an error."""

    def __init__(self, db: AsyncEngine, redis: Redis) -> None:
        self._db = db
        self._redis = redis
        self._waits: defaultdict[UUID, set[_Wait]] = defaultdict(set)
        self._waited_for = asyncio.Event()
        self._first_looks: Group[Collection[UUID], set[UUID]] = Group(self._look)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._poll())]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing = True  # redis-py swallows a cancellation that meets it while it connects
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait(self, job_ids: Collection[UUID], timeout_s: float) -> set[UUID]:
        """Returns as soon as all of them have ended, or after `timeout_s`: those that have not. Unknown ids never end.

        The database is asked once in any case; what it raises then is raised here.
        """
        wait = _Wait(job_ids)
        self._register(wait)  # before the first look, so that nothing ends unseen between the two
        try:
            self._ended(await self._first_looks.ask(frozenset(job_ids)))
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    if wait.pending:
                        await wait.over.wait()
        finally:
            self._forget(wait)
        return wait.pending

    async def each(self, job_ids: Collection[UUID], timeout_s: float) -> AsyncGenerator[set[UUID], None]:
        """Those that have ended, as soon as there are some, until all have or `timeout_s` is over. One wait, however many they are.

        The database is asked once in any case; what it raises then is raised here.
        """
        wait, until = _Each(job_ids), asyncio.get_running_loop().time() + timeout_s
        self._register(wait)
        try:
            self._ended(await self._first_looks.ask(frozenset(job_ids)))
            while wait.pending or wait.ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await wait.some.wait()
                if not wait.ended:
                    return
                some, wait.ended = wait.ended, set()
                wait.some.clear()
                yield some
        finally:
            self._forget(wait)

    def _register(self, wait: _Wait) -> None:
        for job_id in wait.pending:
            self._waits[job_id].add(wait)
        self._waited_for.set()

    def _forget(self, wait: _Wait) -> None:
        for job_id in wait.pending:
            self._waits[job_id].discard(wait)
            if not self._waits[job_id]:
                del self._waits[job_id]
        if not self._waits:
            self._waited_for.clear()

    def _ended(self, job_ids: Iterable[UUID]) -> None:
        for job_id in job_ids:
            for wait in self._waits.pop(job_id, ()):
                wait.over_with(job_id)

    async def _look(self, asked: Sequence[Collection[UUID]]) -> list[set[UUID]]:
        ended = await self._ended_among({job_id for job_ids in asked for job_id in job_ids})
        return [ended.intersection(job_ids) for job_ids in asked]

    async def _ended_among(self, job_ids: Collection[UUID]) -> set[UUID]:
        return {row.id for row in await run(self._db, _ENDED, ids=list(job_ids))}

    async def _poll(self) -> None:
        while True:
            await self._waited_for.wait()
            await asyncio.sleep(POLL_S)
            with suppress(SQLAlchemyError, OSError):  # the next round asks again
                self._ended(await self._ended_among(self._waits.keys()))

    async def _listen(self) -> None:
        while not self._closing:
            with suppress(RedisError, OSError):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await self._hear(channel)
            if not self._closing:
                await asyncio.sleep(_RESUBSCRIBE_S)

    async def _hear(self, channel: PubSub) -> None:
        await channel.subscribe(CHANNEL)
        while not self._closing:
            message = await channel.get_message(timeout=_IDLE_S)
            if message is not None:
                self._ended(_job_ids(message["data"]))


def _job_ids(payload: bytes | str) -> list[UUID]:
    words = payload.split() if isinstance(payload, str) else payload.decode("ascii", "replace").split()
    ids = []
    for word in words:
        with suppress(ValueError):
            ids.append(UUID(hex=word))
    return ids

"""Following a job or a batch by server-sent events (WHATWG HTML, section 9.2).

An event's id says how things stood, so a follower that comes back with the last one it saw is told only of what differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from fastapi import Response
from fastapi.sse import EventSourceResponse, format_sse_event
from sqlalchemy.ext.asyncio import AsyncEngine

from api.schemas import BatchOut, JobOut, JobProgress
from api.spelling import Spelled
from worker import reads
from worker.grouping import Group
from worker.job import TERMINAL
from worker.views import BatchView, Standing

TICK_S = 1.0
BEAT_S = 15.0  # proxies hang up after 60 s of silence, some after 30

JobEventId = Spelled(r"^([0-9]{1,18}\.(queued|running|succeeded|failed|cancelled|expired))?$", "the id of an event of this job")
BatchEventId = Spelled(r"^((loading|open|finished)(\.[0-9]{1,18}){5})?$", "the id of an event of this batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """How something stands. `data` is JSON; behind the `last` nothing comes."""

    id: str
    name: str
    data: str
    last: bool

    def encoded(self) -> bytes:
        return format_sse_event(event=self.name, id=self.id, data_str=self.data)


Look = Callable[[], Awaitable[Event | None]]


class Looks:
    """How jobs and batches stand. One per process: those who follow look in the same moment, 500 with one statement."""

    def __init__(self, db: AsyncEngine) -> None:
        self._db = db
        self._standings: Group[UUID, Standing | None] = Group(self._look_at_jobs)
        self._batches: Group[UUID, BatchView | None] = Group(self._look_at_batches)

    async def job(self, job_id: UUID) -> Event | None:
        """`queued`, `running`, or how it ended, with the whole job then. None when it is not there any more."""
        standing = await self._standings.ask(job_id)
        if standing is None:
            return None
        last = standing.state in TERMINAL
        data: JobOut | JobProgress = JobProgress.model_validate(standing)
        if last:
            job = await reads.job(self._db, job_id)
            if job is None or job.state is not standing.state:  # requeued meanwhile
                return await self.job(job_id)
            data = JobOut.of(job)
        return Event(id=f"{standing.attempt}.{standing.state}", name=standing.state, data=data.model_dump_json(), last=last)

    async def batch(self, batch_id: UUID) -> Event | None:
        """`progress`, or `finished`; its counts in either. None when it is not there any more."""
        batch = await self._batches.ask(batch_id)
        if batch is None:
            return None
        counts = (batch.total, batch.succeeded, batch.failed, batch.cancelled, batch.expired)
        last = batch.state == "finished"
        event_id = ".".join([batch.state, *map(str, counts)])
        return Event(id=event_id, name="finished" if last else "progress", data=BatchOut.of(batch).model_dump_json(), last=last)

    async def _look_at_jobs(self, ids: Sequence[UUID]) -> list[Standing | None]:
        found = await reads.standings(self._db, ids)
        return [found.get(job_id) for job_id in ids]

    async def _look_at_batches(self, ids: Sequence[UUID]) -> list[BatchView | None]:
        found = await reads.batches(self._db, ids)
        return [found.get(batch_id) for batch_id in ids]


def until_next_look_s() -> float:
    """Seconds to the moment in which all look."""
    return TICK_S - asyncio.get_running_loop().time() % TICK_S


async def followed(look: Look, pause: Callable[[], Awaitable[object]], seen: str) -> Response:
    """A stream of what differs from the event `seen`, up to the last; 204 when that was the last."""
    first = await look()
    if first is None or (first.last and first.id == seen):
        return Response(status_code=204)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventSourceResponse(events(first, look, pause, seen), headers=headers)


async def events(first: Event, look: Look, pause: Callable[[], Awaitable[object]], seen: str) -> AsyncIterator[bytes]:
    """Each that differs from the one before, a comment after `BEAT_S` without any."""
    clock = asyncio.get_running_loop().time
    now: Event | None = first
    said_at = clock()
    while now is not None:
        if now.id != seen:
            yield now.encoded()
            seen, said_at = now.id, clock()
        elif clock() - said_at >= BEAT_S:
            yield format_sse_event(comment="still here")
            said_at = clock()
        if now.last:
            return
        await pause()
        now = await look()

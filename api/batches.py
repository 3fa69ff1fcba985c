"""What becomes of a batch: its results as its jobs end, and how far it is."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from api import follow
from api.auth import Reads
from api.examples import BATCH_EVENTS, RESULT_LINE
from api.parts import Opened
from api.problems import documented
from api.schemas import ResultLine
from worker import reads
from worker.errors import NotFound
from worker.export import ExportRow
from worker.job import TERMINAL
from worker.views import BatchView

_PAGE = 500
_FOLLOW_S = 1.0
_BEAT_S = 15.0
_MOST_MISSING = 10_000
_NAMED = 10

_CURSOR = r"^[0-9]{1,18}(\.[0-9]{1,18}){0,10}$"
_LINES = {"application/x-ndjson": {"schema": {"type": "string"}, "example": RESULT_LINE}}
_RESULTS: dict[int | str, dict[str, Any]] = {200: {"description": "Lines of JSON, see the schema `ResultLine`", "content": _LINES}}

router = APIRouter(prefix="/v1", tags=["batches"], responses=documented(401, 403, 404, 422, 503))


@dataclass(slots=True)
class Sent:
    """Which rows of a batch were sent: all up to `front`, but for the `missing`, ascending."""

    front: int = 0
    missing: list[int] = field(default_factory=list)

    @classmethod
    def until(cls, cursor: str) -> Self:
        front, *missing = map(int, cursor.split("."))
        return cls(front, sorted({ordinal for ordinal in missing if ordinal <= front}))

    @property
    def cursor(self) -> str:
        """The front, and up to ten rows that are missing; where there are more, the front is the last before the eleventh."""
        more = self.missing[_NAMED : _NAMED + 1]
        front = more[0] - 1 if more else self.front
        return ".".join(map(str, [front, *self.missing[:_NAMED]]))

    def found(self, ordinal: int) -> None:
        del self.missing[bisect_left(self.missing, ordinal)]


@router.get("/batches/{name_or_id}/results", response_class=StreamingResponse, responses=_RESULTS)
async def batch_results(
    name_or_id: str,
    caller: Reads,
    parts: Opened,
    cursor: Annotated[str, Query(pattern=_CURSOR, description="That of the last whole line that was read.")] = "0",
) -> StreamingResponse:
    """NDJSON, one line for each job of the batch as it ends; the response ends when all have.

    Cut off, ask again with the `cursor` of the last line that came with its line end: no job is left out. One may come
    twice then, by the same `id`, if more than ten rows before it had not ended yet. While nothing ends a space is
    sent every 15 s, which JSON allows in front of the next line.
    """
    batch = await known_batch(parts.db, name_or_id, caller.tenant)
    return StreamingResponse(_lines(parts.db, batch.id, Sent.until(cursor)), media_type="application/x-ndjson")


@router.get(
    "/batches/{name_or_id}/events",
    response_class=StreamingResponse,
    responses=follow.documented_events(BATCH_EVENTS),
)
async def batch_events(
    name_or_id: str,
    caller: Reads,
    parts: Opened,
    last_event_id: Annotated[str | None, Header(pattern=follow.BATCH_EVENT_ID, description="What was seen last.")] = None,
) -> Response:
    """Server-sent events: `progress` when the counts have changed, looked at once a second, and `finished` at the end."""
    batch = await known_batch(parts.db, name_or_id, caller.tenant)

    async def pause() -> None:
        await asyncio.sleep(follow.until_next_look_s())

    return await follow.followed(lambda: parts.looks.batch(batch.id), pause, last_event_id)


async def known_batch(db: AsyncEngine, name_or_id: str, tenant: str) -> BatchView:
    """The tenant's batch of that id or name. Raises NotFound."""
    batch = await reads.batch(db, name_or_id, tenant)
    if batch is None:
        raise NotFound("there is no batch of that name or id")
    return batch


async def _lines(db: AsyncEngine, batch_id: UUID, sent: Sent) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    said_at = clock()
    async for row in _as_they_end(db, batch_id, sent):
        if row is not None:
            yield ResultLine.of(row, sent.cursor).model_dump_json() + "\n"
        elif clock() - said_at < _BEAT_S:
            continue
        else:
            yield " "
        said_at = clock()


async def _as_they_end(db: AsyncEngine, batch_id: UUID, sent: Sent) -> AsyncIterator[ExportRow | None]:
    """Each job of the batch once, as soon as it has ended, until all have; None in each second that goes by.

    Goes through the file page by page, as long as a page holds a job that has ended, and remembers the ordinals it
    passed over. Dispatch goes by ordinal, so these are about the jobs in flight, however large the batch is; where
    many are parked it goes no further than `_MOST_MISSING` of them, until some have ended.
    """
    while (batch := await reads.batch(db, batch_id)) is not None:
        async for row in _found(db, batch_id, sent):
            yield row
        page: list[ExportRow] | None = None
        while len(sent.missing) < _MOST_MISSING:
            page = await reads.batch_results(db, batch_id, sent.front, _PAGE)
            if not any(row.state in TERMINAL for row in page):
                break
            for row in page:
                sent.front = row.ordinal or 0
                if row.state in TERMINAL:
                    yield row
                else:
                    sent.missing.append(sent.front)
        # A batch that is finished has no job that could still end: what is missing then was never in it.
        if page == [] and (batch.state == "finished" or (batch.state == "open" and not sent.missing)):
            return
        if page or sent.missing:  # else there may be no next line to put a space in front of
            yield None
        await asyncio.sleep(_FOLLOW_S)


async def _found(db: AsyncEngine, batch_id: UUID, sent: Sent) -> AsyncIterator[ExportRow]:
    """Of the missing rows those that have ended."""
    missing = list(sent.missing)
    for start in range(0, len(missing), _PAGE):
        for row in await reads.batch_endings(db, batch_id, missing[start : start + _PAGE]):
            sent.found(row.ordinal or 0)
            yield row

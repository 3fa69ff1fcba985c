"""What becomes of a batch: its results as its jobs end, and how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from api import follow
from api.auth import Reads
from api.examples import BATCH_EVENTS, RESULT_LINE
from api.parts import Opened
from api.problems import KnownParameters, documented
from api.results import Sent, as_they_end
from api.schemas import BatchOut, ResultLine
from api.spelling import Spelled
from api.streams import documented_events, documented_lines
from worker import reads
from worker.errors import NotFound
from worker.views import BatchView

_Cursor = Spelled(r"^[0-9]{1,18}(\.[0-9]{1,18}){0,10}$", "the `cursor` of a line that was read, or 0")

router = APIRouter(prefix="/v1", tags=["batches"], responses=documented(401, 403, 404, 422, 503), dependencies=[KnownParameters])


@router.get("/batches/{name_or_id}/results", response_class=StreamingResponse, responses=documented_lines(ResultLine, RESULT_LINE))
async def batch_results(
    name_or_id: str,
    caller: Reads,
    parts: Opened,
    cursor: Annotated[str, _Cursor, Query(description="That of the last whole line that was read.")] = "0",
) -> StreamingResponse:
    """NDJSON, one line for each job of the batch as it ends; the response ends when all have.

    Cut off, ask again with the `cursor` of the last line that came with its line end: no job is left out. One may come
    twice then, by the same `id`, if more than ten rows before it had not ended yet. While nothing ends a space is
    sent every 15 s, which JSON allows in front of the next line; not while every job that is loaded has been sent, for
    then the batch may end with no further line.
    """
    batch = await known_batch(parts.db, name_or_id, caller.tenant)
    return StreamingResponse(_lines(parts.db, batch.id, Sent.until(cursor)), media_type="application/x-ndjson")


@router.get(
    "/batches/{name_or_id}/events",
    response_class=StreamingResponse,
    responses=documented_events(BATCH_EVENTS, BatchOut),
)
async def batch_events(
    name_or_id: str,
    caller: Reads,
    parts: Opened,
    last_event_id: Annotated[str, follow.BatchEventId, Header(description="What was seen last.")] = "",
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
    async for row in as_they_end(db, batch_id, sent):
        if row is not None:
            yield ResultLine.of(row, sent.cursor).model_dump_json() + "\n"
        elif clock() - said_at < follow.BEAT_S:
            continue
        else:
            yield " "
        said_at = clock()

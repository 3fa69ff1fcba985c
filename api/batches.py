"""Results of a batch, one line for each job as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from api.auth import Reads
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

router = APIRouter(prefix="/v1", tags=["batches"], responses=documented(401, 404, 503))


@router.get("/batches/{name_or_id}/results", response_class=StreamingResponse)
async def batch_results(name_or_id: str, caller: Reads, parts: Opened) -> StreamingResponse:
    """NDJSON, one line for each job of the batch as it ends; the response ends when all have. Cut off: ask again."""
    batch = await known_batch(parts.db, name_or_id, caller.tenant)
    return StreamingResponse(_lines(parts.db, batch.id), media_type="application/x-ndjson")


async def known_batch(db: AsyncEngine, name_or_id: str, tenant: str) -> BatchView:
    """The tenant's batch of that id or name. Raises NotFound."""
    batch = await reads.batch(db, name_or_id, tenant)
    if batch is None:
        raise NotFound("there is no batch of that name or id")
    return batch


async def _lines(db: AsyncEngine, batch_id: UUID) -> AsyncIterator[str]:
    async for row in _as_they_end(db, batch_id):
        yield ResultLine.of(row).model_dump_json() + "\n"


async def _as_they_end(db: AsyncEngine, batch_id: UUID) -> AsyncIterator[ExportRow]:
    """Each job of the batch once, as soon as it has ended, until all have.

    Goes through the file page by page, as long as a page holds a job that has ended, and remembers the ordinals it
    passed over. Dispatch goes by ordinal, so these are about the jobs in flight, however large the batch is.
    """
    front, passed = 0, set[int]()
    while (batch := await reads.batch(db, batch_id)) is not None:
        waiting = sorted(passed)
        for start in range(0, len(waiting), _PAGE):
            for row in await reads.batch_endings(db, batch_id, waiting[start : start + _PAGE]):
                passed.discard(row.ordinal or 0)
                yield row
        while page := await reads.batch_results(db, batch_id, front, _PAGE):
            ended = [row for row in page if row.state in TERMINAL]
            if not ended:
                break
            passed.update(row.ordinal or 0 for row in page if row.state not in TERMINAL)
            front = page[-1].ordinal or 0
            for row in ended:
                yield row
        if not page and not passed and batch.state != "loading":
            return
        await asyncio.sleep(_FOLLOW_S)

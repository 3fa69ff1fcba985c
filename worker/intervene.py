"""What people do to jobs from outside: cancel them, requeue them. Whole or not at all, guarded like everything in `ledger`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import run
from worker.errors import UsageError
from worker.job import JobState
from worker.selection import ALL, Selection
from worker.tally import CLOSE_BATCH, COUNTED

# A running job has not ended by this: `moved` calls it queued, for COUNTED counts those as not ended.
_CANCEL = text(f"""
WITH target AS (
    SELECT id FROM jobs
    WHERE (id = ANY(CAST(:ids AS uuid[])) OR batch_id = :batch
        OR delivery_id = :delivery AND (state = 'running' OR state = 'queued' AND dispatched_at IS NOT NULL))
      AND state IN ('queued', 'running') AND NOT (state = 'running' AND cancel_requested)
      AND (CAST(:tenant AS text) IS NULL OR tenant = :tenant)
    ORDER BY id LIMIT :most FOR NO KEY UPDATE
), moved AS (
    UPDATE jobs j SET
        cancel_requested = true,
        state = CASE WHEN j.state = 'queued' THEN 'cancelled' ELSE j.state END,
        finished_at = CASE WHEN j.state = 'queued' THEN now() END
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, CASE WHEN j.state = 'running' THEN 'queued' ELSE j.state END AS state,
        false AS degraded
), {COUNTED}
SELECT count(*) FILTER (WHERE state = 'cancelled') AS cancelled, count(*) FILTER (WHERE state = 'queued') AS flagged FROM moved
""")


@dataclass(frozen=True, slots=True)
class Cancelled:
    """`cancelled` ended at once; `flagged` are running: their worker is told within a heartbeat, a success before that wins."""

    cancelled: int
    flagged: int


async def cancel(
    db: AsyncEngine,
    *,
    job_ids: Sequence[UUID] = (),
    batch_id: UUID | None = None,
    delivery_id: UUID | None = None,
    tenant: str | None = None,
    chunk: int = 10_000,
) -> Cancelled:
    """The named jobs, those of a batch, or those of one Celery message end cancelled, unless they have ended already.

    A batch that was still being submitted takes no more rows.
    """
    if batch_id is not None:
        await run(db, CLOSE_BATCH, id=batch_id)
    cancelled = flagged = 0
    while True:
        (row,) = await run(db, _CANCEL, ids=list(job_ids), batch=batch_id, delivery=delivery_id, tenant=tenant, most=chunk)
        cancelled, flagged = cancelled + row.cancelled, flagged + row.flagged
        if row.cancelled + row.flagged < chunk:
            return Cancelled(cancelled, flagged)


# What ended without an answer and can be sent. Rows of a file that could not be used have no request. The files of answers that a
# batch of a file has written stay as they are.
_OVER = "f.state <> 'in_progress'"
_REQUEUEABLE = f"""
j.state IN ('failed', 'cancelled', 'expired') AND EXISTS (SELECT FROM job_requests r WHERE r.job_id = j.id AND r.request IS NOT NULL)
    AND NOT EXISTS (SELECT FROM file_batches f WHERE f.batch_id = j.batch_id AND {_OVER})
"""

_REQUEUE = """
WITH target AS (
    SELECT j.id, j.state AS was FROM jobs j WHERE {which} AND j.id > :after ORDER BY j.id LIMIT :most FOR NO KEY UPDATE
), moved AS (
    UPDATE jobs j SET state = 'queued', finished_at = NULL, error = NULL, attempts = 0, deaths = 0, walk_fence = j.fence + 1,
        cancel_requested = false, dispatched_at = NULL, run_at = now(), deadline_at = now() + make_interval(secs => j.deadline_s)
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, t.was
), uncounted AS (
    UPDATE batches b SET failed = b.failed - n.failed, cancelled = b.cancelled - n.cancelled, expired = b.expired - n.expired,
        state = CASE b.state WHEN 'finished' THEN 'open' ELSE b.state END, finished_at = NULL
    FROM (
        SELECT o.id, m.* FROM (
            SELECT batch_id, count(*) FILTER (WHERE was = 'failed') AS failed, count(*) FILTER (WHERE was = 'cancelled') AS cancelled,
                count(*) FILTER (WHERE was = 'expired') AS expired
            FROM moved WHERE batch_id IS NOT NULL GROUP BY batch_id
        ) m JOIN batches o ON o.id = m.batch_id ORDER BY o.id FOR NO KEY UPDATE OF o
    ) n WHERE b.id = n.id
)
SELECT id FROM moved ORDER BY id
"""


async def requeue(
    db: AsyncEngine,
    *,
    job_ids: Sequence[UUID] | None = None,
    batch_id: UUID | None = None,
    which: Selection = ALL,
    chunk: int = 10_000,
) -> int:
    """Failed, cancelled and expired jobs are queued once more, with fresh attempts and their full time; how many.

    Those of the named jobs, of the batch, or of all that `which` selects, each once. Rows that never could be sent (no request)
    stay failed, and jobs of a file's batch that is over are passed over. What a call of theirs has cost is not had back: asked again,
    it may be paid twice. Raises UsageError when neither jobs nor a batch nor a selection is named, and when those are of such a batch.
    """
    await _refuse_over(db, job_ids, batch_id)
    where, values = _requeueable(job_ids, batch_id, which)
    statement = text(_REQUEUE.format(which=where))
    total, after = 0, UUID(int=0)
    while rows := await run(db, statement, after=after, most=chunk, **values):
        total, after = total + len(rows), rows[-1].id  # not from the start: some may have failed again meanwhile
    return total


async def requeueable(
    db: AsyncEngine, *, job_ids: Sequence[UUID] | None = None, batch_id: UUID | None = None, which: Selection = ALL
) -> Mapping[JobState, int]:
    """How many jobs `requeue` would reach now, by the state they ended in. Raises UsageError as it does."""
    await _refuse_over(db, job_ids, batch_id)
    where, values = _requeueable(job_ids, batch_id, which)
    rows = await run(db, text(f"SELECT j.state, count(*) AS jobs FROM jobs j WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1"), **values)
    return {JobState(row.state): row.jobs for row in rows}


_NAMED_OVER = text(f"""
SELECT b.name, f.state FROM file_batches f JOIN batches b ON b.id = f.batch_id
WHERE {_OVER} AND (f.batch_id = :batch OR f.batch_id IN (SELECT j.batch_id FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])))) LIMIT 1
""")


async def _refuse_over(db: AsyncEngine, job_ids: Sequence[UUID] | None, batch_id: UUID | None) -> None:
    for row in await run(db, _NAMED_OVER, batch=batch_id, ids=list(job_ids or ())):
        raise UsageError(f"{row.name} is {row.state}, its files of answers are not written anew: send those lines as another batch")


def _requeueable(job_ids: Sequence[UUID] | None, batch_id: UUID | None, which: Selection) -> tuple[str, dict[str, Any]]:
    if job_ids is None and batch_id is None and which == ALL:
        raise UsageError("requeue which jobs? Name a batch, a job, or what they have in common")
    where, values = _REQUEUEABLE + which.conditions, which.values
    if job_ids is not None:
        where, values = f"{where} AND j.id = ANY(CAST(:ids AS uuid[]))", {**values, "ids": list(job_ids)}
    if batch_id is not None:
        where, values = f"{where} AND j.batch_id = :batch", {**values, "batch": batch_id}
    return where, values

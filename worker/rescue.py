"""What the leader mends: deadlines that passed, jobs of dead workers, claims whose reply was lost."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.tally import COUNTED

# So many workers have died holding a job, and it is given up. Most were innocent, held beside the one that kills; who has been there
# twice is a suspect, and `dispatch` lets fewer of those run at once, until the guilty one dies alone.
MAX_DEATHS = 4

_EXPIRE = text(f"""
WITH target AS (
    SELECT id FROM jobs WHERE id = ANY(ARRAY(
        SELECT id FROM jobs WHERE state = 'queued' AND deadline_at <= now() ORDER BY deadline_at LIMIT :most
    )) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), moved AS (
    UPDATE jobs j SET state = 'expired', finished_at = now(), error = jsonb_build_object('code', 'deadline',
        'message', 'the deadline passed before any provider answered', 'providers', coalesce(j.error -> 'providers', '[]'))
    FROM target t WHERE j.id = t.id AND j.state = 'queued' RETURNING j.id, j.batch_id, j.state, false AS degraded
), {COUNTED}
SELECT id FROM moved
""")


async def expire(db: AsyncConnection, *, most: int = 10_000) -> list[UUID]:
    """Queued jobs whose deadline has passed have ended as expired."""
    return [row.id for row in await db.execute(_EXPIRE, {"most": most})]


_RESCUE = text(f"""
WITH target AS (
    SELECT j.id, j.fence, j.worker_id, j.deaths + (w.state = 'dead')::int AS deaths FROM jobs j JOIN workers w ON w.id = j.worker_id
    WHERE j.state = 'running' AND w.state IN ('dead', 'gone') ORDER BY j.id LIMIT :most FOR NO KEY UPDATE OF j SKIP LOCKED
), moved AS (
    UPDATE jobs j SET
        state = CASE WHEN j.cancel_requested THEN 'cancelled' WHEN t.deaths >= :max_deaths THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN j.cancel_requested OR t.deaths >= :max_deaths THEN now() END,
        error = CASE WHEN NOT j.cancel_requested AND t.deaths >= :max_deaths THEN jsonb_build_object(
            'code', 'worker_died', 'message', format('%s workers died while they held it', t.deaths), 'providers', '[]'::jsonb) END,
        deaths = t.deaths, worker_id = NULL, dispatched_at = NULL, run_at = now()
    FROM target t WHERE j.id = t.id AND j.fence = t.fence AND j.state = 'running' AND j.worker_id = t.worker_id
    RETURNING j.id, j.batch_id, j.state, false AS degraded
), orphaned AS (
    UPDATE provider_calls p SET outcome = 'orphaned', ended_at = now()
    FROM moved m WHERE p.job_id = m.id AND p.outcome IS NULL
), {COUNTED}
SELECT id, state FROM moved
""")


async def rescue(db: AsyncConnection, *, most: int = 1_000) -> list[UUID]:
    """Jobs held by workers that are dead, or left without them, are queued again, their open calls booked as orphaned, billing unknown."""
    return [row.id for row in await db.execute(_RESCUE, {"most": most, "max_deaths": MAX_DEATHS})]


_RELEASE = text(f"""
WITH target AS (
    SELECT j.id FROM jobs j
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[])) AS t(id, fence) ON t.id = j.id AND t.fence = j.fence
    WHERE j.state = 'running' AND j.worker_id = :worker ORDER BY j.id FOR NO KEY UPDATE OF j SKIP LOCKED
), moved AS (
    UPDATE jobs j SET
        state = CASE WHEN j.cancel_requested THEN 'cancelled' ELSE 'queued' END,
        finished_at = CASE WHEN j.cancel_requested THEN now() END, worker_id = NULL, dispatched_at = NULL, run_at = now()
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, j.state, false AS degraded
), orphaned AS (
    UPDATE provider_calls p SET outcome = 'orphaned', ended_at = now()
    FROM moved m WHERE p.job_id = m.id AND p.outcome IS NULL
), {COUNTED}
SELECT id FROM moved
""")


async def release(db: AsyncConnection, worker_id: UUID, strays: Mapping[UUID, int]) -> list[UUID]:
    """Jobs that stand under this worker's name (by fence) although it does not hold them are queued again: a claim whose reply was lost."""
    values = {"ids": list(strays), "fences": list(strays.values()), "worker": worker_id}
    return [row.id for row in await db.execute(_RELEASE, values)]

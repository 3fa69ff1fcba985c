"""What the leader mends: deadlines that passed, jobs of dead workers, claims whose reply was lost."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.ledger import COUNTED
from worker.settlement import MAX_ATTEMPTS

# A worker that died over a job costs it so many of its attempts: a poison job must not take the fleet along.
DEATH_COSTS = 3

_EXPIRE = text(f"""
WITH target AS (
    SELECT id FROM jobs WHERE state = 'queued' AND deadline_at <= now() ORDER BY deadline_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
), moved AS (
    UPDATE jobs j SET state = 'expired', finished_at = now(), error = jsonb_build_object('code', 'deadline',
        'message', 'the deadline passed before any provider answered', 'providers', coalesce(j.error -> 'providers', '[]'))
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, j.state
), {COUNTED}
SELECT id FROM moved
""")


async def expire(db: AsyncConnection, *, most: int = 10_000) -> list[UUID]:
    """Queued jobs whose deadline has passed have ended as expired."""
    return [row.id for row in await db.execute(_EXPIRE, {"most": most})]


_RESCUE = text(f"""
WITH target AS (
    SELECT j.id, j.fence, j.worker_id FROM jobs j JOIN workers w ON w.id = j.worker_id
    WHERE j.state = 'running' AND w.state IN ('dead', 'gone') ORDER BY j.id LIMIT :most FOR NO KEY UPDATE OF j SKIP LOCKED
), moved AS (
    UPDATE jobs j SET
        state = CASE WHEN j.cancel_requested THEN 'cancelled'
            WHEN j.attempts + :death_costs >= :max_attempts THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN j.cancel_requested OR j.attempts + :death_costs >= :max_attempts THEN now() END,
        error = CASE WHEN NOT j.cancel_requested AND j.attempts + :death_costs >= :max_attempts THEN jsonb_build_object(
            'code', 'worker_died', 'message', format('worker after worker died over it, or it went unanswered, until fence %s', j.fence),
            'providers', '[]'::jsonb) END,
        attempts = j.attempts + :death_costs, worker_id = NULL, dispatched_at = NULL, run_at = now()
    FROM target t WHERE j.id = t.id AND j.fence = t.fence AND j.state = 'running' AND j.worker_id = t.worker_id
    RETURNING j.id, j.batch_id, j.state
), orphaned AS (
    UPDATE provider_calls p SET outcome = 'orphaned', ended_at = now()
    FROM moved m WHERE p.job_id = m.id AND p.outcome IS NULL
), {COUNTED}
SELECT id, state FROM moved
""")


async def rescue(db: AsyncConnection, *, most: int = 1_000) -> list[UUID]:
    """Jobs held by workers that are dead are queued again, their open calls booked as orphaned, billing unknown."""
    return [row.id for row in await db.execute(_RESCUE, {"most": most, "max_attempts": MAX_ATTEMPTS, "death_costs": DEATH_COSTS})]


_RELEASE = text(f"""
WITH target AS (
    SELECT j.id FROM jobs j
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[])) AS t(id, fence) ON t.id = j.id AND t.fence = j.fence
    WHERE j.state = 'running' AND j.worker_id = :worker FOR NO KEY UPDATE OF j SKIP LOCKED
), moved AS (
    UPDATE jobs j SET
        state = CASE WHEN j.cancel_requested THEN 'cancelled' ELSE 'queued' END,
        finished_at = CASE WHEN j.cancel_requested THEN now() END, worker_id = NULL, dispatched_at = NULL, run_at = now()
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, j.state
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

"""The life of a claimed job, from claim to settle; `calls` opens its calls in between.

`intervene` holds what people do to jobs, `rescue` what mends.

Each is one statement, so it happens whole or not at all, and each carries its guard: a write says which state, owner and fence it
expects, and matching nothing is a legal answer (somebody else was faster, or the message was a duplicate).

Nobody deadlocks: whoever locks several rows takes those of jobs first, in the order of their ids, then those of batches, in the order
of theirs. So does what skips locked rows: in Postgres it still waits for one that changes between its two looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.calls import BOOK, ENDED, Call
from worker.database import jsonb, run
from worker.errors import Unreadable
from worker.job import Answer, ChatRequest, JobState, Lane, new_id
from worker.tally import COUNTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An earlier call in the present walk of the chain. `answer`: paid for, but its settle came too late."""

    provider: str
    outcome: str
    answer: Answer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job in the hands of this worker, until the fence is raised again. `opened`: the first provider's call row."""

    job_id: UUID
    worker_id: UUID
    fence: int
    attempts: int
    chain: str
    lane: Lane
    tenant: str
    request: ChatRequest
    remaining_s: float
    asked: tuple[Asked, ...]
    opened_id: UUID | None
    opened_provider: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How an attempt ends. `state` is QUEUED when it is to be attempted again, `run_after_s` from now.

    `counted`: it costs one of MAX_ATTEMPTS. `new_walk`: the chain starts at its beginning next time. `calls` are booked whether
    or not the fence still holds; `unsent` are call rows opened for requests that never left.
    """

    job_id: UUID
    fence: int
    lane: Lane
    state: JobState
    answer: Answer | None = None
    error: Mapping[str, Any] | None = None
    run_after_s: float = 0
    counted: bool = False
    new_walk: bool = False
    calls: tuple[Call, ...] = ()
    unsent: tuple[UUID, ...] = ()


_CLAIM = text("""
WITH wanted AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:call_ids AS uuid[])) AS t(id, call_id)
), first AS (
    SELECT * FROM unnest(CAST(:chains AS text[]), CAST(:providers AS text[]), CAST(:models AS text[])) AS t(chain, provider, model)
), ready AS (  -- what is locked is being claimed by another, cancelled, expired or withdrawn
    SELECT id FROM jobs
    WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'queued' AND run_at <= now() AND deadline_at > now() AND NOT cancel_requested
      AND EXISTS (SELECT FROM workers w WHERE w.id = :worker AND w.state IN ('live', 'draining'))
      AND NOT EXISTS (SELECT FROM lanes l WHERE l.name = jobs.lane AND l.paused)
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE jobs j SET state = 'running', fence = j.fence + 1, worker_id = :worker
    FROM ready r JOIN wanted w ON w.id = r.id WHERE j.id = r.id
    RETURNING j.id, j.fence, j.walk_fence, j.attempts, j.chain, j.lane, j.tenant, j.deadline_at, w.call_id
), opened AS (
    INSERT INTO provider_calls (id, job_id, fence, provider, model)
    SELECT c.call_id, c.id, c.fence, f.provider, f.model
    FROM claimed c JOIN first f ON f.chain = c.chain WHERE c.fence = c.walk_fence
    RETURNING id, job_id, provider
)
SELECT c.id, c.fence, c.attempts, c.chain, c.lane, c.tenant, r.request,
    extract(epoch FROM c.deadline_at - now())::float8 AS remaining_s,
    o.id AS opened_id, o.provider AS opened_provider,
    CASE WHEN c.fence > c.walk_fence THEN (
        SELECT jsonb_agg(jsonb_build_array(p.provider, p.outcome, p.answer) ORDER BY p.opened_at, p.id)
        FROM provider_calls p WHERE p.job_id = c.id AND p.fence >= c.walk_fence AND p.outcome IS NOT NULL
    ) END AS asked
FROM claimed c LEFT JOIN job_requests r ON r.job_id = c.id LEFT JOIN opened o ON o.job_id = c.id
""")


async def claim(db: AsyncEngine, job_ids: Sequence[UUID], worker_id: UUID, first_calls: Mapping[str, tuple[str, str]]) -> list[Claim]:
    """Those of the jobs that are ready are ours now, their fence raised; the others are done, cancelled or somebody else's.

    `first_calls` names by chain the provider and model that will most likely be asked first: their call rows are opened at once,
    so that a fresh job needs no further round trip before its request leaves. A job whose request cannot be read has failed.
    """
    rows = await run(
        db,
        _CLAIM,
        ids=list(job_ids),
        call_ids=[new_id() for _ in job_ids],
        worker=worker_id,
        chains=list(first_calls),
        providers=[provider for provider, _ in first_calls.values()],
        models=[model for _, model in first_calls.values()],
    )
    claims: list[Claim] = []
    unreadable: list[Settlement] = []
    for row in rows:
        try:
            claims.append(_claim(row, worker_id))
        except Unreadable as error:
            unreadable.append(_failed(row, error))
    if unreadable:
        await settle(db, unreadable)
    return claims


def _claim(row: Any, worker_id: UUID) -> Claim:
    return Claim(
        job_id=row.id,
        worker_id=worker_id,
        fence=row.fence,
        attempts=row.attempts,
        chain=row.chain,
        lane=Lane(row.lane),
        tenant=row.tenant,
        request=ChatRequest.from_json(row.request),
        remaining_s=row.remaining_s,
        asked=tuple(Asked(provider=provider, outcome=outcome, answer=_readable(answer)) for provider, outcome, answer in row.asked or ()),
        opened_id=row.opened_id,
        opened_provider=row.opened_provider,
    )


def _readable(answer: Any) -> Answer | None:
    """An answer that another version wrote is paid for and lost."""
    try:
        return Answer.from_json(answer) if answer else None
    except Unreadable:
        return None


def _failed(row: Any, error: Unreadable) -> Settlement:
    return Settlement(
        job_id=row.id,
        fence=row.fence,
        lane=Lane(row.lane),
        state=JobState.FAILED,
        error={"code": "unreadable_request", "message": str(error), "providers": []},
        unsent=(row.opened_id,) if row.opened_id else (),
    )


_SETTLE = text(f"""
WITH ending AS (
    SELECT * FROM json_to_recordset(CAST(:endings AS json)) AS t(
        id uuid, fence bigint, state text, answer jsonb, error jsonb, run_after_s float8, counted int, new_walk bool)
), held AS (
    SELECT j.id, j.fence FROM jobs j JOIN ending e ON e.id = j.id AND e.fence = j.fence
    WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.state = 'running' ORDER BY j.id FOR NO KEY UPDATE OF j
), moved AS (
    UPDATE jobs j SET
        state = CASE WHEN e.state = 'queued' AND j.cancel_requested THEN 'cancelled' ELSE e.state END,
        finished_at = CASE WHEN e.state = 'queued' AND NOT j.cancel_requested THEN NULL ELSE now() END,
        run_at = CASE WHEN e.state = 'queued' THEN now() + make_interval(secs => e.run_after_s) ELSE j.run_at END,
        walk_fence = CASE WHEN e.new_walk THEN j.fence + 1 ELSE j.walk_fence END,
        attempts = j.attempts + e.counted, error = e.error, worker_id = NULL, dispatched_at = NULL
    FROM held h JOIN ending e ON e.id = h.id AND e.fence = h.fence WHERE j.id = h.id
    RETURNING j.id, j.fence, j.state, j.batch_id, e.state = 'succeeded' AND e.answer ->> 'degraded' IS NOT NULL AS degraded
), ours AS (
    SELECT id, fence FROM moved
    UNION ALL  -- a commit whose reply was lost is found done when it is sent again
    SELECT e.id, e.fence FROM ending e JOIN jobs j ON j.id = e.id AND j.fence = e.fence AND j.state = e.state
    WHERE :again AND j.id = ANY(CAST(:ids AS uuid[]))
), answered AS (
    INSERT INTO results (job_id, fence, answer)
    SELECT m.id, m.fence, e.answer FROM moved m JOIN ending e ON e.id = m.id AND e.fence = m.fence
    WHERE m.state = 'succeeded'
), call AS (
    SELECT * FROM json_to_recordset(CAST(:calls AS json)) AS t({ENDED})
), booked AS (
    UPDATE provider_calls p SET {BOOK},
        answer = CASE WHEN o.id IS NOT NULL THEN NULL WHEN c.settled THEN e.answer ELSE c.answer END
    FROM call c JOIN ending e ON e.id = c.job_id AND e.fence = c.fence
        LEFT JOIN ours o ON o.id = c.job_id AND o.fence = c.fence
    WHERE p.id = ANY(CAST(:call_ids AS uuid[])) AND p.id = c.id
), unsent AS (
    DELETE FROM provider_calls WHERE id = ANY(CAST(:unsent AS uuid[]))
), {COUNTED}
SELECT id, fence FROM ours
""")


async def settle(db: AsyncEngine, settlements: Sequence[Settlement], *, again: bool = False) -> list[bool]:
    """State, result, call rows and batch counters of all of them, at once. True for each whose fence still held.

    A late one is refused: its job stays as it is, its calls are booked all the same, and a paid answer is kept with its call for
    the next attempt to find. `again` says that an earlier try may have been committed although no reply came.
    """
    return await settle_documents(db, [document(settlement) for settlement in settlements], again=again)


async def settle_documents(db: AsyncEngine, documents: Sequence[Mapping[str, Any]], *, again: bool) -> list[bool]:
    """Like `settle`, from what `document` made of them."""
    held = await _settle_documents(db, documents, again=again)
    if again and not all(held):  # the earlier try may have been committed just now: this one waited for it, and cannot see it
        held = await _settle_documents(db, documents, again=again)
    return held


async def _settle_documents(db: AsyncEngine, documents: Sequence[Mapping[str, Any]], *, again: bool) -> list[bool]:
    endings = [one["ending"] for one in documents]
    calls = [call for one in documents for call in one["calls"]]
    rows = await run(
        db,
        _SETTLE,
        again=again,
        ids=[UUID(ending["id"]) for ending in endings],
        endings=jsonb(endings),
        unsent=[UUID(call_id) for one in documents for call_id in one["unsent"]],
        call_ids=[UUID(call["id"]) for call in calls],
        calls=jsonb(calls),
    )
    ours = {(str(row.id), row.fence) for row in rows}
    return [(ending["id"], ending["fence"]) in ours for ending in endings]


def document(settlement: Settlement) -> dict[str, Any]:
    """A settlement as JSON: how its job ends, the bookings of its calls, the rows of calls that were never made."""
    s = settlement
    ending = {
        "id": str(s.job_id),
        "fence": s.fence,
        "state": s.state.value,
        "answer": s.answer.to_json() if s.answer else None,
        "error": s.error,
        "run_after_s": s.run_after_s,
        "counted": int(s.counted),
        "new_walk": s.new_walk,
    }
    return {"ending": ending, "calls": [_booking(s, call) for call in s.calls], "unsent": [str(call_id) for call_id in s.unsent]}


def _booking(s: Settlement, call: Call) -> dict[str, Any]:
    """`settled`: its answer is the one the job is settled with, and travels once."""
    settled = call.answer is s.answer
    own = {"job_id": str(s.job_id), "fence": s.fence, "settled": settled}
    return {**call.to_json(), **own, "answer": call.answer.to_json() if call.answer and not settled else None}

"""What is stuck in the ledger, and how it is mended. Nothing that is healthy is touched, however busy the ledger is.

Statements are whole or not at all, and the leader mends what crashes leave behind. So what is found here was brought in from outside, by
a restored backup or by hand, or nobody is left to mend it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import promptly, run
from worker.job import Lane
from worker.keeper import LEADER_LOCK
from worker.rescue import rescue
from worker.tally import COUNTED, TOLD

AGAIN_S = 2.0  # what is still so after this time is stuck; a leader mends within one
LOOK_S = 60.0  # for one look: it may have to read every job
CHUNK = 1_000

Mend = Callable[[AsyncEngine], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Check:
    """`look` gives one row: `count`, and `example`, which names one of them. `then`: what `mend` does, or without it a person."""

    name: str
    words: str
    look: TextClause
    then: str
    mend: Mend | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """What a check has found: `count` of them, of which `mended` were put right, and `left` are as they were."""

    check: Check
    count: int
    example: str
    mended: int
    left: int


async def examine(db: AsyncEngine, *, heartbeat_ttl_s: float, repair: bool = False, again_s: float = AGAIN_S) -> list[Stuck]:
    """What is stuck now and `again_s` later, in the order it is mended where `repair` says so. Raises DBAPIError."""

    async def look(check: Check) -> Any:
        (row,) = await _look(db, check.look, {"ttl_s": heartbeat_ttl_s})
        return row

    suspects = [check for check in CHECKS if (await look(check)).count]
    if suspects:
        await asyncio.sleep(again_s)
    stuck = []
    for check in suspects:
        row = await look(check)
        if not row.count:
            continue
        mended, left = 0, row.count
        if repair and check.mend:
            mended = await check.mend(db)
            left = (await look(check)).count
        stuck.append(Stuck(check=check, count=row.count, example=row.example, mended=mended, left=left))
    return stuck


async def _look(db: AsyncEngine, statement: TextClause, values: dict[str, Any]) -> list[Any]:
    async def asked() -> list[Any]:
        async with db.connect() as connection:
            return list(await connection.execute(statement, values))

    return await promptly(asked(), LOOK_S)


def _by(statement: TextClause) -> Mend:
    """Runs the statement until it finds nothing more."""

    async def mend(db: AsyncEngine) -> int:
        total = 0
        while rows := await run(db, statement, most=CHUNK):
            total += len(rows)
        return total

    return mend


_KNOWN = f"ARRAY[{', '.join(repr(lane.value) for lane in Lane)}]"

_ADD_LANES = text(f"INSERT INTO lanes (name) SELECT unnest({_KNOWN}) LIMIT :most ON CONFLICT DO NOTHING RETURNING name")


# A worker that nobody knows is one that is gone.
_NAME_UNKNOWN = text("""
INSERT INTO workers (id, host, pid, lanes, slots, state)
SELECT DISTINCT j.worker_id, 'unknown', 0, '', 0, 'gone' FROM jobs j
WHERE j.state = 'running' AND NOT EXISTS (SELECT FROM workers w WHERE w.id = j.worker_id) ON CONFLICT DO NOTHING
""")


async def _rescue(db: AsyncEngine) -> int:
    await run(db, _NAME_UNKNOWN)
    total = 0
    async with db.connect() as connection:
        while rescued := await rescue(connection, most=CHUNK):
            total += len(rescued)
    return total


_DEGRADED = "EXISTS (SELECT FROM results r WHERE r.job_id = j.id AND r.answer ->> 'degraded' IS NOT NULL)"


def _end(which: str, state: str, error: str = "NULL") -> TextClause:
    """Jobs that would be waiting for ever end."""
    return text(f"""
WITH target AS (
    SELECT j.id FROM jobs j WHERE {which} ORDER BY j.id LIMIT :most FOR NO KEY UPDATE OF j SKIP LOCKED
), moved AS (
    UPDATE jobs j SET state = '{state}', finished_at = now(), error = {error}, worker_id = NULL, dispatched_at = NULL
    FROM target t WHERE j.id = t.id RETURNING j.id, j.batch_id, j.state, {_DEGRADED} AS degraded
), orphaned AS (
    UPDATE provider_calls p SET outcome = 'orphaned', ended_at = now()
    FROM moved m WHERE p.job_id = m.id AND p.outcome IS NULL
), {COUNTED}
SELECT id FROM moved
""")


_NO_REQUEST = """
j.state IN ('queued', 'running') AND NOT EXISTS (SELECT FROM job_requests r WHERE r.job_id = j.id AND r.request IS NOT NULL)
"""
_REQUEST_MISSING = """jsonb_build_object(
    'code', 'request_missing', 'message', 'its request is not in the ledger any more: submit it anew', 'providers', '[]'::jsonb)"""
_ANSWERED = "j.state = 'queued' AND EXISTS (SELECT FROM results r WHERE r.job_id = j.id)"
_UNWANTED = "j.state = 'queued' AND j.cancel_requested"


# Longer than any call may take: one that is under way is not touched, even where its job was taken from its worker.
_OVER = """
p.outcome IS NULL AND p.opened_at < now() - interval '10 minutes'
    AND NOT EXISTS (SELECT FROM jobs j WHERE j.id = p.job_id AND j.fence = p.fence AND j.state = 'running')
"""
_ORPHAN = text(f"""
WITH target AS (
    SELECT p.id FROM provider_calls p WHERE {_OVER} ORDER BY p.id LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE provider_calls p SET outcome = 'orphaned', ended_at = now() FROM target t WHERE p.id = t.id RETURNING p.id
""")


_COUNTS = f"""
count(*) AS total, count(*) FILTER (WHERE j.state = 'succeeded') AS succeeded, count(*) FILTER (WHERE {_DEGRADED}) AS degraded,
    count(*) FILTER (WHERE j.state = 'failed') AS failed,
    count(*) FILTER (WHERE j.state = 'cancelled') AS cancelled, count(*) FILTER (WHERE j.state = 'expired') AS expired,
    count(*) FILTER (WHERE j.finished_at IS NULL) AS unfinished, max(j.finished_at) AS finished_at
"""
_MISCOUNTED = f"""
FROM batches b LEFT JOIN (SELECT j.batch_id, {_COUNTS} FROM jobs j WHERE j.batch_id IS NOT NULL GROUP BY 1) n ON n.batch_id = b.id
WHERE (b.total, b.succeeded, b.degraded, b.failed, b.cancelled, b.expired) <> (coalesce(n.total, 0), coalesce(n.succeeded, 0),
        coalesce(n.degraded, 0), coalesce(n.failed, 0), coalesce(n.cancelled, 0), coalesce(n.expired, 0))
    OR b.state <> 'loading' AND (b.state = 'finished') <> (coalesce(n.unfinished, 0) = 0)
    OR (b.state = 'finished') <> (b.finished_at IS NOT NULL)
"""
_LOCK_BATCH = text("SELECT FROM batches WHERE id = :id FOR NO KEY UPDATE")
_RECOUNT = text(f"""
WITH was AS (SELECT id, state FROM batches WHERE id = :id), counted AS (
    UPDATE batches b SET
        total = n.total, succeeded = n.succeeded, degraded = n.degraded, failed = n.failed, cancelled = n.cancelled, expired = n.expired,
        state = CASE WHEN b.state = 'loading' THEN 'loading' WHEN n.unfinished = 0 THEN 'finished' ELSE 'open' END,
        finished_at = CASE WHEN b.state <> 'loading' AND n.unfinished = 0 THEN coalesce(b.finished_at, n.finished_at, now()) END
    FROM was w, (SELECT {_COUNTS} FROM jobs j WHERE j.batch_id = :id) n WHERE b.id = w.id
    RETURNING b.id, b.tenant, b.state = 'finished' AND w.state <> 'finished' AS ends
), news AS (
    SELECT tenant, 'batch.finished' AS event, id AS subject_id FROM counted WHERE ends
), {TOLD}
SELECT id FROM counted
""")


async def _recount(db: AsyncEngine) -> int:
    """Two statements each: the second sees all that was counted before the lock, and what comes later waits for it."""
    miscounted = await _look(db, text(f"SELECT b.id {_MISCOUNTED} ORDER BY 1"), {})
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        for batch in miscounted:
            async with connection.begin():
                await connection.execute(_LOCK_BATCH, {"id": batch.id})
                await connection.execute(_RECOUNT, {"id": batch.id})
    return len(miscounted)


_BROKEN_OFF = """
FROM batches b WHERE b.state = 'loading' AND now() - interval '1 hour' > coalesce(
    (SELECT j.created_at FROM jobs j WHERE j.batch_id = b.id ORDER BY j.ordinal DESC LIMIT 1), b.created_at)
"""
_READY = "j.state = 'queued' AND j.run_at <= now()"
_OVERDUE = "j.deadline_at < now() - interval '10 minutes'"
_HELD = "JOIN workers w ON w.id = j.worker_id"
_LIVE = "w.state = 'live' AND w.seen_at > now() - make_interval(secs => :ttl_s)"
# A leader needs one TTL to find out, and buries them then.
_SILENT = "w.state IN ('live', 'draining') AND w.seen_at < now() - make_interval(secs => 3 * :ttl_s)"
_LEADER = f"""
SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
WHERE l.locktype = 'advisory' AND l.objid = {LEADER_LOCK} AND l.granted AND d.datname = current_database()
"""


def _jobs(which: str, example: str = "j.id::text", joined: str = "") -> TextClause:
    return text(f"SELECT count(*) AS count, min({example}) AS example FROM jobs j {joined} WHERE {which}")


CHECKS = (
    Check(
        "missing lanes",
        "lanes without a row, so that their jobs never start",
        text(f"SELECT count(*) AS count, min(k) AS example FROM unnest({_KNOWN}) k WHERE NOT EXISTS (SELECT FROM lanes WHERE name = k)"),
        "added",
        _by(_ADD_LANES),
    ),
    Check(
        "abandoned jobs",
        "running jobs of workers that are dead, gone or unknown",
        _jobs("j.state = 'running' AND (w.id IS NULL OR w.state IN ('dead', 'gone'))", joined=f"LEFT {_HELD}"),
        "rescued",
        _rescue,
    ),
    Check("answered jobs", "queued jobs whose answer is there", _jobs(_ANSWERED), "succeeded", _by(_end(_ANSWERED, "succeeded"))),
    Check("cancelled jobs", "queued jobs that are to be cancelled", _jobs(_UNWANTED), "cancelled", _by(_end(_UNWANTED, "cancelled"))),
    Check(
        "jobs without request",
        "jobs that have not ended although their request is gone",
        _jobs(_NO_REQUEST),
        "failed with code request_missing",
        _by(_end(_NO_REQUEST, "failed", _REQUEST_MISSING)),
    ),
    Check(
        "open calls",
        "calls that stand open although their attempt is over",
        text(f"SELECT count(*) AS count, min(p.id::text) AS example FROM provider_calls p WHERE {_OVER}"),
        "booked as orphaned, billing unknown",
        _by(_ORPHAN),
    ),
    Check(
        "batch counters",
        "batches whose counters or state do not fit their jobs",
        text(f"SELECT count(*) AS count, min(b.name) AS example {_MISCOUNTED}"),
        "counted again",
        _recount,
    ),
    Check(
        "broken-off batches",
        "batches that were never completed, and got no row for an hour",
        text(f"SELECT count(*) AS count, min(b.name) AS example {_BROKEN_OFF}"),
        "run the same `backstop enqueue` with --batch NAME to go on, or `backstop cancel NAME`",
    ),
    Check(
        "paused lanes",
        "ready jobs in a lane that is paused",
        _jobs(_READY, "j.lane", "JOIN lanes l ON l.name = j.lane AND l.paused"),
        "`backstop lanes resume LANE`, when they may run",
    ),
    Check(
        "unknown lanes",
        "lanes that this version does not know",
        text(f"SELECT count(*) AS count, min(name) AS example FROM lanes WHERE name <> ALL ({_KNOWN})"),
        "its workers dispatch nothing: run a newer version, or delete that row of the table `lanes`",
    ),
    Check(
        "workers",
        "ready jobs in a lane that no worker serves",
        _jobs(f"{_READY} AND j.lane NOT IN (SELECT unnest(string_to_array(w.lanes, ',')) FROM workers w WHERE {_LIVE})", "j.lane"),
        "no worker runs: start one with `backstop up` or `backstop worker`",
    ),
    Check(
        "silent workers",
        "running jobs of workers that are not heard of any more",
        _jobs(f"j.state = 'running' AND {_SILENT}", joined=_HELD),
        "start a worker: it tells whether they are dead, and takes over",
    ),
    Check(
        "leader",
        "workers live, and none of them leads",
        text(f"SELECT count(*) AS count, min(w.host) AS example FROM workers w WHERE {_LIVE} AND NOT EXISTS ({_LEADER})"),
        "look for `leadership_lost` in their logs, and restart them",
    ),
    Check(
        "overdue jobs",
        "running jobs far past their deadline, of workers that live",
        _jobs(f"j.state = 'running' AND {_LIVE} AND {_OVERDUE}", "w.host || ' process ' || w.pid", _HELD),
        "restart that worker: others take over",
    ),
)

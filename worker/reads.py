"""Every read the API and the CLI make, one statement each. Nothing here changes a row.

Where `tenant` is given, rows of others do not exist; None (the operator at the CLI) sees all. A call is *possibly
billed* unless its billing is `free`; sums of money leave out the possibly billed calls whose cost is not known, say how
many those are, and are None when none is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.database import run
from worker.errors import Unreadable, UsageError
from worker.export import ExportRow
from worker.job import Answer, JobState, Lane
from worker.selection import ALL, Selection
from worker.views import (
    BatchView,
    CallView,
    CostKey,
    CostRow,
    DeadLetters,
    Failover,
    JobView,
    ProviderDay,
    Standing,
    WorkerView,
)

READ_S = 30.0  # a read that takes longer is given up: figures of many months take a while

_MAYBE_BILLED = "c.billing <> 'free'"
_UNKNOWN = f"count(*) FILTER (WHERE {_MAYBE_BILLED} AND c.cost_usd IS NULL)"
# NULL: possibly billed, but nothing is known; 0: nothing can have been billed.
_COST = f"CASE WHEN bool_or({_MAYBE_BILLED}) THEN sum(c.cost_usd) FILTER (WHERE {_MAYBE_BILLED}) ELSE 0 END"

_JOB = f"""
SELECT j.id, j.tenant, j.state, j.lane, j.chain, j.batch_id, j.ordinal, j.custom_id, j.attempts, j.metadata,
       j.created_at, j.deadline_at, j.finished_at, j.error, r.answer, k.calls, k.unknown_calls, k.cost_usd
FROM jobs j LEFT JOIN results r ON r.job_id = j.id
CROSS JOIN LATERAL (
    SELECT count(*) AS calls, {_UNKNOWN} AS unknown_calls, {_COST} AS cost_usd
    FROM provider_calls c WHERE c.job_id = j.id
) k
"""


async def job(db: AsyncEngine, job_id: UUID, tenant: str | None = None) -> JobView | None:
    """The job, or None when there is none of that id in the tenant."""
    rows = await _rows(db, f"{_JOB} WHERE j.id = :id {_of('j', tenant)}", id=job_id, tenant=tenant)
    return _job(rows[0]) if rows else None


async def job_views(db: AsyncEngine, job_ids: Sequence[UUID]) -> Sequence[JobView | None]:
    """The job of each id, whoever's it is, or None."""
    found = {row["id"]: _job(row) for row in await _rows(db, f"{_JOB} WHERE j.id = ANY(:ids)", ids=list(set(job_ids)))}
    return [found.get(job_id) for job_id in job_ids]


async def jobs(
    db: AsyncEngine,
    *,
    which: Selection = ALL,
    tenant: str | None = None,
    batch_id: UUID | None = None,
    lane: Lane | None = None,
    custom_id: str | None = None,
    before: UUID | None = None,
    limit: int = 50,
) -> list[JobView]:
    """Up to `limit` jobs, newest first. The next page is `before` the last id of this one."""
    given = {"j.batch_id =": batch_id, "j.lane =": lane, "j.custom_id =": custom_id, "j.id <": before}
    named = {f"given_{n}": (condition, value) for n, (condition, value) in enumerate(given.items()) if value is not None}
    where = which.conditions + "".join(f" AND {condition} :{name}" for name, (condition, _) in named.items())
    sql = f"{_JOB} WHERE true {_of('j', tenant)} {where} ORDER BY j.id DESC LIMIT :limit"
    values = {name: value for name, (_, value) in named.items()}
    rows = await _rows(db, sql, tenant=tenant, limit=limit, **values, **which.values)
    return [_job(row) for row in rows]


async def standings(db: AsyncEngine, job_ids: Sequence[UUID]) -> dict[UUID, Standing]:
    """Where those of the jobs are that there are."""
    sql = "SELECT id, state, fence AS attempt, error ->> 'code' AS code FROM jobs WHERE id = ANY(:ids)"
    rows = await _rows(db, sql, ids=list(job_ids))
    return {row["id"]: Standing(**{**row, "state": JobState(row["state"])}) for row in rows}


async def queued(db: AsyncEngine, tenant: str, most: int) -> int:
    """How many interactive jobs of the tenant are queued, counted up to `most`. Each half has its index."""
    half = "SELECT FROM jobs WHERE tenant = :tenant AND lane = 'interactive' AND state = 'queued' AND dispatched_at IS"
    sql = f"SELECT count(*) AS jobs FROM ({half} NULL UNION ALL {half} NOT NULL LIMIT :most) AS found"
    (row,) = await _rows(db, sql, tenant=tenant, most=most)
    return int(row["jobs"])


async def dead_letters(db: AsyncEngine, *, which: Selection = ALL, batch_id: UUID | None = None, limit: int = 50) -> list[DeadLetters]:
    """What ended without an answer, by how and why: up to `limit` groups, the largest first."""
    where = which.conditions + (" AND j.batch_id = :batch" if batch_id else "")
    sql = f"""
    SELECT j.state, j.error ->> 'code' AS code, (
               SELECT string_agg(concat_ws(': ', p ->> 'provider', p ->> 'reason'), ', ' ORDER BY place)
               FROM jsonb_array_elements(j.error -> 'providers') WITH ORDINALITY AS providers(p, place)
           ) AS providers, count(*) AS jobs, max(j.id::text)::uuid AS newest_id, max(j.finished_at) AS last_at
    FROM jobs j WHERE j.state IN ('failed', 'expired', 'cancelled') {where}
    GROUP BY 1, 2, 3 ORDER BY jobs DESC, last_at DESC LIMIT :limit
    """
    rows = await _rows(db, sql, batch=batch_id, limit=limit, **which.values)
    return [DeadLetters(**{**row, "state": JobState(row["state"])}) for row in rows]


async def calls(db: AsyncEngine, job_id: UUID) -> list[CallView]:
    """Every request sent for the job, in the order they left. Whose job it is, the caller has asked `job` before."""
    sql = """
    SELECT id, provider, model, fence AS attempt, opened_at, started_at, ended_at, latency_ms, outcome, http_status,
           error_code, input_tokens, output_tokens, cached_tokens, reasoning_tokens, estimated, billing, cost_usd, price_source
    FROM provider_calls WHERE job_id = :id ORDER BY coalesce(started_at, opened_at), id
    """
    return [CallView(**row) for row in await _rows(db, sql, id=job_id)]


_BATCH = """
SELECT id, tenant, name, state, columns, coalesce(fields, '[]') AS fields,
       total, succeeded, degraded, failed, cancelled, expired, created_at, finished_at
FROM batches b
"""


async def batch(db: AsyncEngine, name_or_id: str | UUID, tenant: str | None = None) -> BatchView | None:
    """The batch of that id, else the newest of that name, or None."""
    sql = f"{_BATCH} WHERE (id = :id OR name = :name) {_of('b', tenant)} ORDER BY id = :id DESC, created_at DESC LIMIT 1"
    name = str(name_or_id).replace("\x00", "").encode("utf-8", "replace").decode()  # what no batch can be called
    rows = await _rows(db, sql, id=uuid_or_none(name), name=name, tenant=tenant)
    return BatchView(**rows[0]) if rows else None


async def batches(db: AsyncEngine, batch_ids: Sequence[UUID]) -> dict[UUID, BatchView]:
    """Those of the batches that there are."""
    return {row["id"]: BatchView(**row) for row in await _rows(db, f"{_BATCH} WHERE id = ANY(:ids)", ids=list(batch_ids))}


_RESULT = f"""
SELECT j.id AS job_id, j.ordinal, j.custom_id, q.row, j.state, r.answer, j.error,
       (SELECT {_COST} FROM provider_calls c WHERE c.job_id = j.id) AS cost_usd
FROM jobs j LEFT JOIN results r ON r.job_id = j.id LEFT JOIN job_requests q ON q.job_id = j.id
"""


async def batch_results(db: AsyncEngine, batch_id: UUID, after_ordinal: int = 0, limit: int = 1000) -> list[ExportRow]:
    """Up to `limit` rows of the batch behind that ordinal, in the order of its file, ended or not."""
    where = "WHERE j.batch_id = :batch AND j.ordinal > :after ORDER BY j.ordinal LIMIT :limit"
    return [_result(row) for row in await _rows(db, _RESULT + where, batch=batch_id, after=after_ordinal, limit=limit)]


async def batch_marks(db: AsyncEngine, batch_id: UUID, after_ordinal: int, limit: int) -> list[tuple[int, bool]]:
    """Ordinals of up to `limit` rows of the batch behind that one, and whether each has ended. Their answers are not touched."""
    sql = """
    SELECT ordinal, finished_at IS NOT NULL AS ended FROM jobs WHERE batch_id = :batch AND ordinal > :after ORDER BY ordinal LIMIT :limit
    """
    return [(row["ordinal"], row["ended"]) for row in await _rows(db, sql, batch=batch_id, after=after_ordinal, limit=limit)]


async def batch_ended(db: AsyncEngine, batch_id: UUID, ordinals: Sequence[int]) -> list[int]:
    """Those of the ordinals whose rows have ended."""
    sql = "SELECT ordinal FROM jobs WHERE batch_id = :batch AND ordinal = ANY(:ordinals) AND finished_at IS NOT NULL ORDER BY ordinal"
    return [row["ordinal"] for row in await _rows(db, sql, batch=batch_id, ordinals=list(ordinals))]


async def batch_rows(db: AsyncEngine, batch_id: UUID, until_ordinal: int) -> int:
    """How many rows of the batch there are up to that ordinal."""
    sql = "SELECT count(*) AS jobs FROM jobs WHERE batch_id = :batch AND ordinal <= :until"
    (row,) = await _rows(db, sql, batch=batch_id, until=until_ordinal)
    return int(row["jobs"])


async def batch_endings(db: AsyncEngine, batch_id: UUID, ordinals: Sequence[int]) -> list[ExportRow]:
    """Those of the rows that have ended."""
    where = "WHERE j.batch_id = :batch AND j.ordinal = ANY(:ordinals) AND j.finished_at IS NOT NULL ORDER BY j.ordinal"
    return [_result(row) for row in await _rows(db, _RESULT + where, batch=batch_id, ordinals=list(ordinals))]


_COST_KEYS = {
    CostKey.PROVIDER: "c.provider",
    CostKey.MODEL: "c.model",
    CostKey.BATCH: "b.name",
    CostKey.DAY: "to_char(c.opened_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
}


async def costs(db: AsyncEngine, by: CostKey, since: datetime, tenant: str | None = None) -> list[CostRow]:
    """What calls opened since then cost, the dearest first (days: the newest first)."""
    order = "1 DESC" if by is CostKey.DAY else "cost_usd DESC NULLS FIRST, 1"
    sql = f"""
    SELECT {_COST_KEYS[by]} AS key, count(*) AS calls, count(*) FILTER (WHERE c.billing = 'billed') AS billed,
           {_UNKNOWN} AS unknown, coalesce(sum(c.input_tokens), 0) AS input_tokens,
           coalesce(sum(c.output_tokens), 0) AS output_tokens, {_COST} AS cost_usd,
           coalesce(1 - {_UNKNOWN}::float8 / nullif(count(*) FILTER (WHERE {_MAYBE_BILLED}), 0), 1) AS coverage,
           count(*) FILTER (WHERE c.estimated) AS estimated_calls,
           CASE WHEN bool_or(c.estimated) THEN sum(c.cost_usd) FILTER (WHERE c.estimated) ELSE 0 END AS estimated_usd
    FROM provider_calls c JOIN jobs j ON j.id = c.job_id LEFT JOIN batches b ON b.id = j.batch_id
    WHERE c.opened_at >= :since {_of("j", tenant)} GROUP BY 1 ORDER BY {order}
    """
    return [CostRow(**row) for row in await _rows(db, sql, since=since, tenant=tenant)]


async def providers_today(db: AsyncEngine, since: datetime | None = None, tenant: str | None = None) -> list[ProviderDay]:
    """The calls of each provider that was asked since then; None is the last UTC midnight."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    sql = f"""
    SELECT c.provider, count(*) AS calls, count(*) FILTER (WHERE c.outcome = 'answered') AS answered,
           count(*) FILTER (WHERE c.outcome NOT IN ('answered', 'cancelled')) AS failed,
           percentile_disc(0.5) WITHIN GROUP (ORDER BY c.latency_ms) FILTER (WHERE c.outcome = 'answered') AS p50_ms,
           percentile_disc(0.95) WITHIN GROUP (ORDER BY c.latency_ms) FILTER (WHERE c.outcome = 'answered') AS p95_ms,
           {_UNKNOWN} AS unknown, {_COST} AS cost_usd
    FROM provider_calls c JOIN jobs j ON j.id = c.job_id
    WHERE c.opened_at >= :since {_of("j", tenant)} GROUP BY 1 ORDER BY 1
    """
    return [ProviderDay(**row) for row in await _rows(db, sql, since=since or midnight, tenant=tenant)]


async def failover(db: AsyncEngine, batch_id: UUID) -> Failover:
    """How long the batch's jobs stayed with a provider once it had failed, by the workers' clocks: see `Failover`."""
    sql = """
    SELECT count(*) AS switches, percentile_disc(0.5) WITHIN GROUP (ORDER BY gap_ms) AS p50_ms,
           percentile_disc(0.95) WITHIN GROUP (ORDER BY gap_ms) AS p95_ms,
           percentile_disc(0.99) WITHIN GROUP (ORDER BY gap_ms) AS p99_ms, max(gap_ms) AS max_ms
    FROM (
        SELECT extract(epoch FROM began - lag(failed) OVER steps)::float8 * 1000 AS gap_ms
        FROM (
            SELECT c.job_id, c.fence, c.provider, min(c.started_at) AS began,
                   min(c.ended_at) FILTER (WHERE c.outcome NOT IN ('answered', 'cancelled')) AS failed
            FROM provider_calls c JOIN jobs j ON j.id = c.job_id
            WHERE j.batch_id = :batch AND c.started_at IS NOT NULL GROUP BY 1, 2, 3
        ) step
        WINDOW steps AS (PARTITION BY job_id, fence ORDER BY began)
    ) s WHERE gap_ms IS NOT NULL
    """
    return Failover(**(await _rows(db, sql, batch=batch_id))[0])


async def workers(db: AsyncEngine) -> list[WorkerView]:
    """Worker processes and what they hold, those seen last first; the long gone are not listed."""
    sql = """
    SELECT id, host, pid, lanes, slots, cardinality(waiting) AS waiting, state, started_at, seen_at,
           (SELECT count(*) FROM jobs j WHERE j.worker_id = w.id AND j.state = 'running') AS running
    FROM workers w WHERE state IN ('live', 'draining') OR seen_at > now() - interval '1 day' ORDER BY seen_at DESC
    """
    return [WorkerView(**row) for row in await _rows(db, sql)]


_SPAN = re.compile(r"([0-9]{1,4})([mhdw])")


def ago(span: str, now: datetime | None = None) -> datetime:
    """The moment `span` ago: a number and m, h, d or w, as in "7d". Raises UsageError."""
    match = _SPAN.fullmatch(span)
    if match is None:
        raise UsageError(f"since: {span[:40]!r} is not a span of time; write a number and m, h, d or w, as in 7d")
    unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[match[2]]
    return (now or datetime.now(UTC)) - timedelta(**{unit: int(match[1])})


def uuid_or_none(value: str) -> UUID | None:
    """The id that `value` spells, or None."""
    try:
        return UUID(value)
    except ValueError:
        return None


def _result(row: RowMapping) -> ExportRow:
    return ExportRow(**{**row, "state": JobState(row["state"]), **_said(row)})


def _job(row: RowMapping) -> JobView:
    return JobView(**{**row, "state": JobState(row["state"]), "lane": Lane(row["lane"]), **_said(row)})


def _said(row: RowMapping) -> dict[str, Any]:
    """Its answer and its error. One answer that cannot be read is that job's error, and hides no other job."""
    if row["answer"] is None:
        return {}
    try:
        return {"answer": Answer.from_json(row["answer"])}
    except Unreadable as error:
        return {"answer": None, "error": {"code": "unreadable_answer", "message": str(error), "providers": []}}


def _of(table: str, tenant: str | None) -> str:
    return "" if tenant is None else f"AND {table}.tenant = :tenant"


async def _rows(db: AsyncEngine, sql: str, **values: Any) -> Sequence[RowMapping]:
    return [row._mapping for row in await run(db, text(sql), limit_s=READ_S, **values)]

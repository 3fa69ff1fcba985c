"""Reads against a real Postgres: what is counted, what is unknown, and whose rows they are."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import database, reads
from worker.errors import UsageError
from worker.job import JobState, new_id
from worker.selection import Selection
from worker.views import CostKey

NOON = datetime.now(UTC).replace(microsecond=0)
ANSWER = {
    "content": "hi",
    "finish_reason": "stop",
    "provider": "a",
    "model": "m-a",
    "usage": {"input_tokens": 3, "output_tokens": 5, "cached_tokens": None, "reasoning_tokens": None},
    "tool_calls": None,
    "degraded": None,
}


def run(database_url: str, story: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def told() -> None:
        db = database.engine(database_url)
        try:
            await story(db)
        finally:
            await db.dispose()

    asyncio.run(told())


async def execute(db: AsyncEngine, sql: str, **values: object) -> None:
    async with db.connect() as connection:
        await connection.execute(text(sql), values)


def node_types(plan: dict[str, Any]) -> set[tuple[str, str | None]]:
    return {(plan["Node Type"], plan.get("Index Name"))}.union(*(node_types(part) for part in plan.get("Plans", [])))


async def plans(db: AsyncEngine, ask: Callable[[], Awaitable[object]]) -> list[set[tuple[str, str | None]]]:
    """How Postgres finds the rows of each statement of `ask`: the nodes of its plan, and their indexes."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        sent.append((statement, parameters))

    event.listen(db.sync_engine, "before_cursor_execute", note)
    await ask()
    event.remove(db.sync_engine, "before_cursor_execute", note)
    async with db.connect() as connection:
        explained = [await connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", values) for statement, values in sent]
        return [node_types(result.scalar_one()[0]["Plan"]) for result in explained]


async def a_job(
    db: AsyncEngine,
    state: str = "queued",
    *,
    tenant: str = "default",
    batch_id: UUID | None = None,
    ordinal: int | None = None,
) -> UUID:
    job_id = new_id()
    await execute(
        db,
        """INSERT INTO jobs (id, tenant, chain, lane, state, deadline_at, finished_at, batch_id, ordinal)
           VALUES (:id, :tenant, 'default', 'bulk', :state, now() + interval '1 hour',
                   CASE WHEN :state <> 'queued' THEN now() END, :batch, :ordinal)""",
        id=job_id,
        tenant=tenant,
        state=state,
        batch=batch_id,
        ordinal=ordinal,
    )
    if state == "succeeded":
        sql = "INSERT INTO results (job_id, fence, answer) VALUES (:id, 1, CAST(:answer AS jsonb))"
        await execute(db, sql, id=job_id, answer=json.dumps(ANSWER))
    return job_id


async def a_batch(db: AsyncEngine, name: str = "monday", tenant: str = "default") -> UUID:
    batch_id = new_id()
    sql = "INSERT INTO batches (id, tenant, name, state, fingerprint, total) VALUES (:id, :tenant, :name, 'open', '', 3)"
    await execute(db, sql, id=batch_id, tenant=tenant, name=name)
    return batch_id


async def a_call(db: AsyncEngine, job_id: UUID, provider: str = "a", **columns: object) -> None:
    values = {
        "id": new_id(),
        "job_id": job_id,
        "fence": 1,
        "provider": provider,
        "model": f"m-{provider}",
        "outcome": "answered",
        "billing": "billed",
        "cost_usd": Decimal("0.25"),
        "input_tokens": 10,
        "output_tokens": 2,
        "latency_ms": 100,
        "started_at": NOON,
        "ended_at": NOON,
        **columns,
    }
    names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
    await execute(db, f"INSERT INTO provider_calls ({names}) VALUES ({marks})", **values)


FREE = {"billing": "free", "cost_usd": Decimal(0), "outcome": "server_error"}
UNKNOWN = {"billing": "unknown", "cost_usd": None, "outcome": "timed_out"}
UNPRICED = {"billing": "billed", "cost_usd": None}


COSTS_OF_JOBS = [
    ([], Decimal(0), 0),
    ([{}, {}], Decimal("0.5"), 0),
    ([FREE], Decimal(0), 0),
    ([FREE, {}], Decimal("0.25"), 0),
    ([UNKNOWN], None, 1),
    ([FREE, UNKNOWN], None, 1),
    ([UNPRICED], None, 1),
    ([UNKNOWN, {}], Decimal("0.25"), 1),
]


def test_the_cost_of_a_job_never_counts_unknown_as_zero(database_url):
    async def story(db: AsyncEngine) -> None:
        for calls, cost_usd, unknown in COSTS_OF_JOBS:
            job_id = await a_job(db, "failed")
            for call in calls:
                await a_call(db, job_id, **call)
            job = await reads.job(db, job_id)
            assert job is not None
            assert (job.calls, job.cost_usd, job.unknown_calls) == (len(calls), cost_usd, unknown)

    run(database_url, story)


def test_a_job_carries_its_answer_and_is_nobody_elses(database_url):
    async def story(db: AsyncEngine) -> None:
        job_id = await a_job(db, "succeeded", tenant="acme")
        job = await reads.job(db, job_id, "acme")
        assert job is not None
        assert job.answer is not None
        assert (job.answer.content, job.answer.usage.output_tokens, job.ended) == ("hi", 5, True)
        assert await reads.job(db, job_id) == job
        assert await reads.job(db, job_id, "other") is None
        assert await reads.job(db, new_id()) is None

    run(database_url, story)


def test_pages_of_jobs_hold_each_job_once_newest_first(database_url):
    async def story(db: AsyncEngine) -> None:
        ids = [await a_job(db) for _ in range(7)]
        await a_job(db, tenant="other")
        pages, before = [], None
        while page := await reads.jobs(db, tenant="default", before=before, limit=3):
            pages.append([job.id for job in page])
            before = page[-1].id
        assert [len(page) for page in pages] == [3, 3, 1]
        assert [job_id for page in pages for job_id in page] == sorted(ids, reverse=True)

    run(database_url, story)


def test_jobs_are_found_by_state_and_batch(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db)
        failed = await a_job(db, "failed", batch_id=batch_id, ordinal=1)
        queued = await a_job(db, batch_id=batch_id, ordinal=2)
        await a_job(db, "failed")
        assert [job.id for job in await reads.jobs(db, batch_id=batch_id)] == [queued, failed]
        assert [job.id for job in await reads.jobs(db, batch_id=batch_id, which=Selection(state=JobState.FAILED))] == [failed]

    run(database_url, story)


async def fail(db: AsyncEngine, job_id: UUID, code: str, *providers: tuple[str, str], **columns: object) -> None:
    error = {"code": code, "message": "", "providers": [{"provider": name, "reason": reason} for name, reason in providers]}
    values = {"error": json.dumps(error), **columns}
    assigned = ", ".join(f"{name} = CAST(:{name} AS jsonb)" if name == "error" else f"{name} = :{name}" for name in values)
    await execute(db, f"UPDATE jobs SET {assigned} WHERE id = :id", id=job_id, **values)


def test_jobs_are_found_by_error_code_chain_and_when_they_ended(database_url):
    async def story(db: AsyncEngine) -> None:
        died, doubtful, old, waiting = [await a_job(db, state) for state in ("failed", "failed", "expired", "queued")]
        await fail(db, died, "worker_died")
        await fail(db, doubtful, "billing_unknown", chain="careful")
        await fail(db, old, "deadline", finished_at=NOON - timedelta(hours=3))
        await fail(db, waiting, "parked", created_at=NOON - timedelta(hours=3))

        async def found(**fields: Any) -> set[UUID]:
            return {job.id for job in await reads.jobs(db, which=Selection(**fields))}

        assert await found() == {waiting, old, doubtful, died}
        assert await found(code="worker_died") == {died}
        assert await found(code="parked") == {waiting}
        assert await found(chain="careful") == {doubtful}
        assert await found(chain="careful", code="worker_died") == set()
        assert await found(since=NOON - timedelta(hours=1)) == {doubtful, died}

    run(database_url, story)


def test_dead_letters_are_grouped_by_how_and_why_the_most_first(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db)
        full = (("a", "rate_limited"), ("b", "server_error"))
        ids = [await a_job(db, "failed", batch_id=batch_id, ordinal=n) for n in (1, 2, 3)]
        for job_id in ids[:2]:
            await fail(db, job_id, "all_providers_failed", *full, finished_at=NOON)
        await fail(db, ids[2], "all_providers_failed", *reversed(full), finished_at=NOON - timedelta(minutes=1))
        expired, cancelled = await a_job(db, "expired"), await a_job(db, "cancelled")
        await fail(db, expired, "deadline", finished_at=NOON - timedelta(minutes=2))
        await execute(db, "UPDATE jobs SET finished_at = :at WHERE id = :id", at=NOON - timedelta(minutes=3), id=cancelled)
        await a_job(db, "succeeded")
        await fail(db, await a_job(db), "parked", *full)
        letters = await reads.dead_letters(db)
        assert [(d.state, d.code, d.providers, d.jobs, d.newest_id) for d in letters] == [
            ("failed", "all_providers_failed", "a: rate_limited, b: server_error", 2, ids[1]),
            ("failed", "all_providers_failed", "b: server_error, a: rate_limited", 1, ids[2]),
            ("expired", "deadline", None, 1, expired),
            ("cancelled", None, None, 1, cancelled),
        ]
        assert letters[0].last_at == NOON
        assert await reads.dead_letters(db, limit=1) == letters[:1]
        assert await reads.dead_letters(db, batch_id=batch_id) == letters[:2]
        assert await reads.dead_letters(db, which=Selection(code="deadline")) == letters[2:3]

    run(database_url, story)


def test_calls_come_in_the_order_they_left(database_url):
    async def story(db: AsyncEngine) -> None:
        job_id = await a_job(db)
        await a_call(db, job_id, "second", started_at=NOON + timedelta(seconds=1))
        await a_call(db, job_id, "first")
        await a_call(db, await a_job(db), "not-ours")
        assert [call.provider for call in await reads.calls(db, job_id)] == ["first", "second"]

    run(database_url, story)


def test_a_batch_is_found_by_name_and_id_in_its_tenant_only(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db, tenant="acme")
        for name in ("monday", str(batch_id), batch_id):
            batch = await reads.batch(db, name, "acme")
            assert batch is not None
            assert (batch.id, batch.unfinished) == (batch_id, 3)
            assert await reads.batch(db, name, "other") is None
        assert await reads.batch(db, "mon\x00day", "other") is None

    run(database_url, story)


def test_results_come_in_the_order_of_the_file_and_endings_only_when_ended(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db)
        for ordinal, state in ((3, "failed"), (1, "succeeded"), (2, "queued")):
            job_id = await a_job(db, state, batch_id=batch_id, ordinal=ordinal)
            sql = "INSERT INTO job_requests (job_id, row) VALUES (:id, jsonb_build_object('title', 'no ' || :n))"
            await execute(db, sql, id=job_id, n=str(ordinal))
        rows = await reads.batch_results(db, batch_id)
        assert [(row.ordinal, row.state, row.row) for row in rows] == [
            (1, "succeeded", {"title": "no 1"}),
            (2, "queued", {"title": "no 2"}),
            (3, "failed", {"title": "no 3"}),
        ]
        assert [row.ordinal for row in await reads.batch_results(db, batch_id, after_ordinal=1, limit=1)] == [2]
        assert [row.ordinal for row in await reads.batch_endings(db, batch_id, [2, 3])] == [3]

    run(database_url, story)


def test_costs_keep_known_unknown_and_free_apart(database_url):
    async def story(db: AsyncEngine) -> None:
        job_id = await a_job(db)
        for call in ({}, {}, UNKNOWN, FREE):
            await a_call(db, job_id, **call)
        await a_call(db, job_id, "free", **FREE)
        await a_call(db, job_id, "dark", **UNPRICED)
        await a_call(db, job_id, opened_at=NOON - timedelta(days=8))
        await a_call(db, await a_job(db, tenant="other"))
        rows = {row.key: row for row in await reads.costs(db, CostKey.PROVIDER, reads.ago("7d"), "default")}
        a, free, dark = rows["a"], rows["free"], rows["dark"]
        assert (a.calls, a.billed, a.unknown, a.cost_usd) == (4, 2, 1, Decimal("0.5"))
        assert (a.input_tokens, a.output_tokens) == (40, 8)
        assert a.coverage == pytest.approx(2 / 3)
        assert (free.cost_usd, free.coverage) == (0, 1)
        assert (dark.cost_usd, dark.coverage) == (None, 0)
        assert sum(row.calls for row in await reads.costs(db, CostKey.PROVIDER, reads.ago("9d"))) == 8

    run(database_url, story)


def test_costs_go_by_model_batch_and_utc_day(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db)
        opened_at = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
        await a_call(db, await a_job(db, batch_id=batch_id, ordinal=1), opened_at=opened_at)
        await a_call(db, await a_job(db), opened_at=opened_at + timedelta(hours=1))
        keys = {by: {row.key for row in await reads.costs(db, by, opened_at)} for by in CostKey}
        assert keys == {
            CostKey.PROVIDER: {"a"},
            CostKey.MODEL: {"m-a"},
            CostKey.BATCH: {"monday", None},
            CostKey.DAY: {"2026-03-01", "2026-03-02"},
        }

    run(database_url, story)


def test_a_providers_day_counts_failures_but_not_what_we_cancelled(database_url):
    async def story(db: AsyncEngine) -> None:
        job_id = await a_job(db)
        for latency_ms in (100, 200, 300):
            await a_call(db, job_id, latency_ms=latency_ms)
        await a_call(db, job_id, latency_ms=9_000, **UNKNOWN)
        await a_call(db, job_id, billing="unknown", cost_usd=None, outcome="cancelled")
        await a_call(db, job_id, billing="unknown", cost_usd=None, outcome=None, ended_at=None)
        await a_call(db, job_id, "b", opened_at=NOON - timedelta(days=2))
        (day,) = await reads.providers_today(db)
        assert (day.provider, day.calls, day.answered, day.failed) == ("a", 6, 3, 1)
        assert (day.p50_ms, day.p95_ms, day.unknown, day.cost_usd) == (200, 300, 3, Decimal("0.75"))
        assert await reads.providers_today(db, tenant="other") == []
        assert len(await reads.providers_today(db, NOON - timedelta(days=3))) == 2

    run(database_url, story)


def test_failover_is_measured_from_a_failure_to_the_next_provider_of_the_same_attempt(database_url):
    async def story(db: AsyncEngine) -> None:
        batch_id = await a_batch(db)
        failed = {"outcome": "server_error"}

        def at(ms: int) -> datetime:
            return NOON + timedelta(milliseconds=ms)

        job_id = await a_job(db, batch_id=batch_id, ordinal=1)
        await a_call(db, job_id, "a", started_at=at(0), ended_at=at(100), **failed)
        await a_call(db, job_id, "a", started_at=at(400), ended_at=at(500), **failed)  # a retry prolongs it
        await a_call(db, job_id, "b", started_at=at(540), ended_at=at(600), **failed)
        await a_call(db, job_id, "c", started_at=at(9_000), ended_at=at(9_100), fence=2)  # attempted again
        other = await a_job(db, batch_id=batch_id, ordinal=2)
        await a_call(db, other, "a", started_at=at(0), ended_at=at(10), **failed)
        await a_call(db, other, "b", started_at=at(20), ended_at=at(30))
        measured = await reads.failover(db, batch_id)
        assert (measured.switches, measured.p50_ms, measured.max_ms) == (2, pytest.approx(10), pytest.approx(440))
        assert (await reads.failover(db, new_id())).max_ms is None

    run(database_url, story)


def test_workers_are_listed_with_what_they_hold(database_url):
    async def story(db: AsyncEngine) -> None:
        worker_id = new_id()
        sql = """INSERT INTO workers (id, host, pid, lanes, slots, state, seen_at)
                 VALUES (:id, 'here', 7, 'bulk', 400, :state, now() - CAST(:silent AS interval))"""
        await execute(db, sql, id=worker_id, state="live", silent="0 s")
        await execute(db, sql, id=new_id(), state="gone", silent="2 days")
        job_id = await a_job(db)
        await execute(db, "UPDATE jobs SET state = 'running', worker_id = :w WHERE id = :id", w=worker_id, id=job_id)
        (worker,) = await reads.workers(db)
        assert (worker.id, worker.running, worker.waiting, worker.slots) == (worker_id, 1, 0, 400)

    run(database_url, story)


def test_a_span_of_time_is_a_number_and_a_unit():
    assert reads.ago("90m", NOON) == NOON - timedelta(minutes=90)
    assert reads.ago("24h", NOON) == reads.ago("1d", NOON)
    assert reads.ago("2w", NOON) == NOON - timedelta(days=14)


@given(st.text().filter(lambda span: not re.fullmatch("[0-9]{1,4}[mhdw]", span)))
def test_any_other_span_is_a_usage_error(span):
    with pytest.raises(UsageError, match="as in 7d"):
        reads.ago(span, NOON)


def test_the_jobs_of_a_small_tenant_are_found_without_a_look_at_those_of_a_large_one(database_url):
    async def story(db: AsyncEngine) -> None:
        await execute(
            db,
            """INSERT INTO jobs (id, tenant, chain, lane, state, deadline_at)
               SELECT gen_random_uuid(), CASE WHEN n % 5000 = 0 THEN 'small' ELSE 'large' END, 'default', 'bulk', 'queued', now()
               FROM generate_series(1, 20000) n""",
        )
        await execute(db, "ANALYZE jobs")
        for before in (None, UUID(int=2**128 - 1)):
            (plan,) = await plans(db, lambda before=before: reads.jobs(db, tenant="small", before=before, limit=51))  # type: ignore[misc]
            assert {index for _, index in plan} & {"ix_jobs_tenant"}, plan
            assert len(await reads.jobs(db, tenant="small", before=before)) == 4

    run(database_url, story)


def test_a_read_that_postgres_does_not_answer_is_given_up(database_url, monkeypatch):
    monkeypatch.setattr("worker.reads.READ_S", 0.2)

    async def story(db: AsyncEngine) -> None:
        async with db.connect() as holder:
            await holder.execution_options(isolation_level="READ COMMITTED")
            async with holder.begin():
                await holder.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
                with pytest.raises(OperationalError, match="no reply within"):
                    await reads.jobs(db)
        assert await reads.jobs(db) == []

    run(database_url, story)

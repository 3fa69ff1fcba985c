"""A stage for stories about the ledger: jobs are brought to where a story begins by the ledger's own statements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker import database, schema
from worker.calls import Call
from worker.cost import Usage
from worker.embedded.servers import Endpoints
from worker.job import Answer, ChatRequest, JobState, Lane, new_id
from worker.ledger import Claim, Settlement, claim
from worker.signals import Billing, Signal
from worker.submit import Batch, NewJob, Row, add_rows, close_batch, open_batch, submit

FIRST = {"default": ("first", "m-first")}
HELLO = ChatRequest([{"role": "user", "content": "hello"}])


@contextmanager
def own_database(servers: Endpoints, name: str) -> Iterator[str]:
    """The URL of a database of that name with the schema in it, for processes of their own."""
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        url = urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
        asyncio.run(schema.upgrade(url))
        yield url
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def play(database_url: str, story: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def played() -> None:
        db = database.engine(database_url)
        try:
            async with asyncio.timeout(60):
                await story(db)
        finally:
            await db.dispose()

    asyncio.run(played())


async def rows(db: AsyncEngine | AsyncConnection, sql: str, **values: Any) -> list[Any]:
    if isinstance(db, AsyncConnection):
        result = await db.execute(text(sql), values)
        return list(result) if result.returns_rows else []
    async with db.connect() as connection:
        return await rows(connection, sql, **values)


async def job(db: AsyncEngine, job_id: UUID) -> Any:
    (row,) = await rows(db, "SELECT * FROM jobs WHERE id = :id", id=job_id)
    return row


async def calls(db: AsyncEngine, job_id: UUID) -> list[Any]:
    return await rows(db, "SELECT * FROM provider_calls WHERE job_id = :id ORDER BY opened_at, id", id=job_id)


async def results(db: AsyncEngine, job_id: UUID) -> list[Any]:
    return await rows(db, "SELECT * FROM results WHERE job_id = :id", id=job_id)


async def batch(db: AsyncEngine, batch_id: UUID) -> Any:
    (row,) = await rows(db, "SELECT * FROM batches WHERE id = :id", id=batch_id)
    return row


class Mailbox:
    """Stands where Redis stands for `submit` and `dispatch`: keeps what was published, or refuses."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.messages: list[tuple[Lane, UUID, list[UUID]]] = []

    def publish(self, lane: Lane, delivery_id: UUID, job_ids: Sequence[UUID]) -> None:
        if self.broken:
            raise ConnectionError("nobody there")
        self.messages.append((lane, delivery_id, list(job_ids)))


async def a_job(db: AsyncEngine, *, lane: Lane = Lane.BULK, deadline_s: float = 3600) -> UUID:
    submitted = await submit(db, Mailbox().publish, NewJob(request=HELLO, lane=lane, deadline_s=deadline_s))
    return submitted.job_id


async def a_batch(db: AsyncEngine, count: int, name: str = "monday", *, closed: bool = True) -> tuple[Batch, list[UUID]]:
    """A batch of `count` jobs, and their ids in the order of the file."""
    opened = await open_batch(db, name, fingerprint=[name], columns=None)
    wanted = (Row(ordinal=n, custom_id=f"{name}-{n}", request=HELLO, chain="default") for n in range(1, count + 1))
    async for _ in add_rows(db, opened, wanted):
        pass
    if closed:
        await close_batch(db, opened)
    ids = await rows(db, "SELECT id FROM jobs WHERE batch_id = :id ORDER BY ordinal", id=opened.id)
    return opened, [row.id for row in ids]


async def a_worker(db: AsyncEngine, *, slots: int = 100, state: str = "live") -> UUID:
    worker_id = new_id()
    sql = "INSERT INTO workers (id, host, pid, lanes, slots, state) VALUES (:id, 'here', 1, 'interactive,bulk', :slots, :state)"
    await rows(db, sql, id=worker_id, slots=slots, state=state)
    return worker_id


async def take(db: AsyncEngine, job_ids: Sequence[UUID], worker_id: UUID | None = None) -> list[Claim]:
    """The claims of these jobs, in their order, by a worker of their own unless it is named."""
    claims = await claim(db, job_ids, worker_id or await a_worker(db), FIRST)
    return sorted(claims, key=lambda claimed: job_ids.index(claimed.job_id))


def an_answer(content: str = "hi", **fields: Any) -> Answer:
    return Answer(content=content, finish_reason="stop", provider="first", model="m-first", usage=Usage(3, 5), **fields)


def a_call(call_id: UUID, signal: Signal = Signal.ANSWERED, answer: Answer | None = None) -> Call:
    """A billed call of 0.25 USD."""
    now = datetime.now(UTC)
    return Call(
        id=call_id,
        provider="first",
        model="m-first",
        started_at=now,
        ended_at=now,
        latency_ms=7,
        signal=signal,
        http_status=200,
        error_code=None,
        usage=Usage(3, 5),
        billing=Billing.BILLED,
        cost_usd=Decimal("0.25"),
        price_source="config",
        answer=answer,
    )


def ending(claimed: Claim, state: JobState = JobState.FAILED, **fields: Any) -> Settlement:
    return Settlement(job_id=claimed.job_id, fence=claimed.fence, lane=claimed.lane, state=state, **fields)


def answered(claimed: Claim, content: str = "hi") -> Settlement:
    """Succeeded by the one call that the claim has opened, or by none where it opened none."""
    answer = an_answer(content)
    booked = (a_call(claimed.opened_id, answer=answer),) if claimed.opened_id else ()
    return ending(claimed, JobState.SUCCEEDED, answer=answer, calls=booked)


async def until(db: AsyncEngine, sql: str, **values: Any) -> list[Any]:
    """The rows of the query, as soon as there are any."""
    async with db.connect() as connection:
        while not (found := await rows(connection, sql, **values)):  # noqa: ASYNC110 - the event is another process's
            await asyncio.sleep(0.005)
        return found


async def blocked(db: AsyncEngine, count: int) -> None:
    """Returns once so many statements wait for a lock in this database."""
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' HAVING count(*) >= :n"
    await until(db, sql, n=count)


@asynccontextmanager
async def transaction(db: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection in a transaction that commits at the end, so that a story decides when."""
    async with db.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        async with connection.begin():
            yield connection


async def one_after_the_other(db: AsyncEngine, locked: str, row_id: UUID, *statements: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Their values. All of them began, in this order, while somebody held the row of the table `locked`."""
    tasks: list[asyncio.Future[Any]] = []
    async with transaction(db) as holder:
        await rows(holder, f"SELECT FROM {locked} WHERE id = :id FOR UPDATE", id=row_id)
        for position, statement in enumerate(statements, 1):
            tasks.append(asyncio.ensure_future(statement()))
            await blocked(db, position)
    return list(await asyncio.gather(*tasks))


async def counters_are_exact(db: AsyncEngine) -> None:
    """Every batch's counters are the counts of its jobs, and it is finished exactly when it is complete and all have ended."""
    sql = """
    SELECT b.*, count(j.id) AS n_total,
        count(*) FILTER (WHERE j.state = 'succeeded') AS n_succeeded, count(r.answer ->> 'degraded') AS n_degraded,
        count(*) FILTER (WHERE j.state = 'failed') AS n_failed,
        count(*) FILTER (WHERE j.state = 'cancelled') AS n_cancelled, count(*) FILTER (WHERE j.state = 'expired') AS n_expired
    FROM batches b LEFT JOIN jobs j ON j.batch_id = b.id LEFT JOIN results r ON r.job_id = j.id GROUP BY b.id
    """
    for row in await rows(db, sql):
        counted = (row.total, row.succeeded, row.degraded, row.failed, row.cancelled, row.expired)
        assert counted == (row.n_total, row.n_succeeded, row.n_degraded, row.n_failed, row.n_cancelled, row.n_expired), row.name
        over = sum(counted[1:]) - row.degraded == row.total
        assert (row.state == "finished") == (over and row.state != "loading"), row.name
        assert (row.finished_at is not None) == (row.state == "finished"), row.name

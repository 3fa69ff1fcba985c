"""Waiting for jobs to end, against real servers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import database, waiting
from worker.job import new_id
from worker.waiting import CHANNEL, Endings, announce

LONG_S = 30.0  # never waited out by a test that passes
NOWHERE = "redis://127.0.0.1:1/0"


async def queued_jobs(db: AsyncEngine, count: int = 1) -> list[UUID]:
    ids = [new_id() for _ in range(count)]
    sql = """INSERT INTO jobs (id, chain, lane, state, deadline_at)
             SELECT id, 'default', 'interactive', 'queued', now() + interval '1 hour'
             FROM unnest(CAST(:ids AS uuid[])) AS t(id)"""
    await execute(db, sql, ids=ids)
    return ids


async def end(db: AsyncEngine, *ids: UUID) -> None:
    await execute(db, "UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = ANY(:ids)", ids=list(ids))


async def execute(db: AsyncEngine, sql: str, **values: object) -> None:
    async with db.connect() as connection:
        await connection.execute(text(sql), values)


@asynccontextmanager
async def opened(database_url: str, redis_url: str) -> AsyncIterator[tuple[AsyncEngine, Redis, Endings]]:
    db, redis = database.engine(database_url), Redis.from_url(redis_url)
    try:
        async with Endings(db, redis) as endings:
            yield db, redis, endings
    finally:
        await redis.aclose()
        await db.dispose()


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(LONG_S):
        while not await condition():  # noqa: ASYNC110 - what is awaited is in a server
            await asyncio.sleep(0.005)


async def subscribed(redis: Redis) -> bool:
    return bool((await redis.pubsub_numsub(CHANNEL))[0][1])


def test_an_announcement_wakes_who_waits_without_the_fallback(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, redis, endings):
            await until(lambda: subscribed(redis))
            (job_id,) = await queued_jobs(db)
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            await end(db, job_id)
            await announce(redis, [job_id])
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()

    asyncio.run(story())


def test_what_has_ended_before_is_seen_without_any_announcement(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, _, endings):
            ids = await queued_jobs(db, 3)
            await end(db, *ids)
            assert await asyncio.wait_for(endings.wait(ids, LONG_S), LONG_S / 2) == set()

    asyncio.run(story())


def test_an_ending_between_the_first_look_and_the_wait_is_not_missed(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, redis, endings):
            await until(lambda: subscribed(redis))
            (job_id,) = await queued_jobs(db)
            look = endings._ended_among

            async def ends_right_after(ids):
                found = await look(ids)
                await end(db, job_id)
                await announce(redis, [job_id])
                await until(forgotten(endings, job_id))
                return found

            monkeypatch.setattr(endings, "_ended_among", ends_right_after)
            assert await asyncio.wait_for(endings.wait([job_id], LONG_S), LONG_S / 2) == set()

    asyncio.run(story())


@pytest.mark.parametrize("redis_there", [True, False])
def test_a_lost_announcement_or_no_redis_costs_one_poll(database_url, redis_url, monkeypatch, redis_there):
    monkeypatch.setattr(waiting, "POLL_S", 0.02)

    async def story() -> None:
        async with opened(database_url, redis_url if redis_there else NOWHERE) as (db, redis, endings):
            (job_id,) = await queued_jobs(db)
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            await end(db, job_id)
            if not redis_there:
                await announce(redis, [job_id])  # raises nothing
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()

    asyncio.run(story())


def test_those_that_have_not_ended_are_named_when_the_time_is_over(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0.02)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, _, endings):
            ended, queued = await queued_jobs(db, 2)
            await end(db, ended)
            unknown = new_id()
            assert await endings.wait([ended, queued, unknown], 0.05) == {queued, unknown}
            assert not endings._waits

    asyncio.run(story())


def test_who_gives_up_leaves_others_waiting_for_the_same_job(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0.02)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, _, endings):
            (job_id,) = await queued_jobs(db)
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            assert await endings.wait([job_id], 0.01) == {job_id}
            await end(db, job_id)
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()

    asyncio.run(story())


def test_anything_else_on_the_channel_is_ignored(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, redis, endings):
            await until(lambda: subscribed(redis))
            (job_id,) = await queued_jobs(db)
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            for noise in (b"\xff\x00", b"not-an-id", b"", new_id().hex.encode()):
                await redis.publish(CHANNEL, noise)
            await end(db, job_id)
            await redis.publish(CHANNEL, f"nonsense {job_id.hex}")
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()

    asyncio.run(story())


def test_the_poll_outlives_a_database_that_goes_away_and_comes_back(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0.02)

    async def story() -> None:
        outside = database.engine(database_url)
        async with opened(database_url, redis_url) as (db, _, endings):
            (job_id,) = await queued_jobs(outside)
            failed = asyncio.Event()
            event.listen(db.sync_engine, "handle_error", lambda _: failed.set())
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            await execute(outside, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
            await asyncio.wait_for(failed.wait(), LONG_S)
            await end(outside, job_id)
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()
        await outside.dispose()

    asyncio.run(story())


def test_a_subscription_that_is_cut_is_renewed(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)
    monkeypatch.setattr(waiting, "_RESUBSCRIBE_S", 0.01)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, redis, endings):
            await until(lambda: subscribed(redis))
            (first,) = await redis.client_list(_type="pubsub")
            await redis.client_kill_filter(_type="pubsub")
            await until(lambda: subscribed_anew(redis, first["id"]))
            (job_id,) = await queued_jobs(db)
            wait = asyncio.create_task(endings.wait([job_id], LONG_S))
            await until(registered(endings))
            await end(db, job_id)
            await announce(redis, [job_id])
            assert await asyncio.wait_for(wait, LONG_S / 2) == set()

    asyncio.run(story())


async def subscribed_anew(redis: Redis, first_id: str) -> bool:
    clients = await redis.client_list(_type="pubsub")
    return bool(clients) and all(client["id"] != first_id for client in clients)


def test_it_closes_at_whatever_moment_redis_is_being_connected(database_url, redis_url):
    async def story() -> None:
        async with asyncio.timeout(LONG_S):
            for turns in range(40):
                async with opened(database_url, redis_url):
                    for _ in range(turns):
                        await asyncio.sleep(0)

    asyncio.run(story())


def test_a_thousand_waits_share_their_queries_and_hold_no_connection(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0.05)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, _, endings):
            ids = await queued_jobs(db, 1_000)
            statements = 0

            def count(*_: object) -> None:
                nonlocal statements
                statements += 1

            event.listen(db.sync_engine, "before_cursor_execute", count)
            waits = [asyncio.create_task(endings.wait([job_id], LONG_S)) for job_id in ids]
            await until(lambda: answered(len(endings._waits) == len(ids)))
            assert statements <= 4  # first looks: the one that found the group idle, then groups of 500
            await until(lambda: answered(db.pool.checkedout() == 0))
            await end(db, *ids)
            assert all(pending == set() for pending in await asyncio.wait_for(asyncio.gather(*waits), LONG_S / 2))
            assert statements < 100

    asyncio.run(story())


async def answered(value: bool) -> bool:
    return value


def registered(endings: Endings) -> Callable[[], Awaitable[bool]]:
    """The wait is past its first look: only an announcement or a poll can wake it now."""
    return lambda: answered(bool(endings._waits) and endings._first_looks._sender is None)


def forgotten(endings: Endings, job_id: UUID) -> Callable[[], Awaitable[bool]]:
    return lambda: answered(job_id not in endings._waits)


def test_who_waits_for_several_waits_for_all_of_them(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 3600)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, redis, endings):
            first, second = await queued_jobs(db, 2)
            waiter = asyncio.create_task(endings.wait([first, second], LONG_S))
            await until(lambda: subscribed(redis))
            await end(db, first)
            await announce(redis, [first])
            await endings.wait([first], LONG_S)
            assert not waiter.done()
            await end(db, second)
            await announce(redis, [second])
            assert await waiter == set()

    asyncio.run(story())


def test_while_nobody_waits_the_database_is_left_alone(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0)

    async def story() -> None:
        async with opened(database_url, redis_url) as (db, _, endings):
            (job,) = await queued_jobs(db)
            await endings.wait([job], 0)
            asked, looked = [], endings._ended_among
            monkeypatch.setattr(endings, "_ended_among", lambda ids: asked.append(ids) or looked(ids))
            for _ in range(20):  # time enough for many looks
                (other,) = await queued_jobs(db)
            assert asked == []
            await endings.wait([other], 0)
            assert asked

    asyncio.run(story())

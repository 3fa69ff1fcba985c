"""What is stuck is found and mended, what cannot be mended is told, and what is healthy is left alone."""

import asyncio
import itertools
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from stage import (
    HELLO,
    a_batch,
    a_call,
    a_job,
    a_worker,
    answered,
    batch,
    calls,
    counters_are_exact,
    ending,
    job,
    one_after_the_other,
    play,
    results,
    rows,
    take,
)

from worker import database, webhooks
from worker.intervene import cancel, requeue
from worker.job import Answer, JobState, Lane, new_id
from worker.keeper import LEADER_LOCK
from worker.ledger import settle
from worker.repair import examine
from worker.rescue import rescue
from worker.signals import Signal
from worker.submit import Row, add_rows, close_batch, open_batch

LONG_AGO = "UPDATE provider_calls SET opened_at = now() - interval '11 minutes'"


@asynccontextmanager
async def a_leader(db):
    async with db.connect() as connection:
        await rows(connection, f"SELECT pg_advisory_lock({LEADER_LOCK})")
        yield
        await rows(connection, f"SELECT pg_advisory_unlock({LEADER_LOCK})")


async def served(db):
    """A worker that lives, so that nothing is said about jobs that wait for one."""
    return await a_worker(db)


async def look(db, **options):
    """What is stuck, by the name of its check; nobody has to lead for that."""
    async with a_leader(db):
        stuck = await examine(db, heartbeat_ttl_s=10, again_s=0, **options)
    return {one.check.name: (one.count, one.mended, one.left) for one in stuck}


async def mended(db):
    """What was found and mended. Looked at once more, nothing is left."""
    found = await look(db, repair=True)
    assert await look(db, repair=True) == {}
    await counters_are_exact(db)
    return found


async def everything(db):
    tables = ("lanes", "batches", "jobs", "job_requests", "results", "provider_calls", "workers")
    return [sorted(map(repr, await rows(db, f"SELECT * FROM {table}"))) for table in tables]


def test_a_ledger_at_work_has_nothing_stuck_and_is_not_touched(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 60)
        turns = itertools.cycle([JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED, JobState.EXPIRED])
        over, settled = asyncio.Event(), 0

        async def work(worker):
            nonlocal settled
            sql = "SELECT id FROM jobs WHERE state = 'queued' AND run_at <= now() ORDER BY random() LIMIT 9"
            while not over.is_set():
                claims = await take(db, [row.id for row in await rows(db, sql)], worker)
                states = [next(turns) for _ in claims]
                await settle(db, [
                    answered(one) if state is JobState.SUCCEEDED
                    else ending(one, state, calls=(a_call(one.opened_id),) if one.opened_id else ())
                    for one, state in zip(claims, states, strict=True)
                ])  # fmt: skip
                settled += len(claims)

        async def intervene():
            while not over.is_set():
                await cancel(db, job_ids=ids[::5])
                await requeue(db, batch_id=opened.id)

        async def produce():
            tuesday = await open_batch(db, "tuesday", fingerprint=[], columns=None)
            for ordinal in itertools.takewhile(lambda _: not over.is_set(), itertools.count(1)):
                async for _ in add_rows(db, tuesday, [Row(ordinal=ordinal, custom_id=None, request=HELLO, chain="default")]):
                    pass
            await close_batch(db, tuesday)

        async with a_leader(db):
            workers = [await served(db) for _ in range(2)]
            at_work = asyncio.gather(*map(work, workers), intervene(), produce())
            looks = [await examine(db, heartbeat_ttl_s=10, repair=True, again_s=0) for _ in range(12)]
            over.set()
            await at_work
        assert settled > 12
        assert not any(looks)
        await counters_are_exact(db)
        assert await rows(db, "SELECT FROM provider_calls WHERE outcome = 'orphaned'") == []

    play(database_url, story)


def test_jobs_of_workers_that_ended_or_that_nobody_knows_are_queued_again(database_url):
    async def story(db):
        await served(db)
        _, ids = await a_batch(db, 4)
        dead, gone, unknown = [await a_worker(db) for _ in range(3)]
        for job_id, worker in zip(ids, (dead, gone, unknown, await served(db)), strict=True):
            await take(db, [job_id], worker)
        await rows(db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=dead)
        await rows(db, "UPDATE workers SET state = 'gone' WHERE id = :id", id=gone)
        await rows(db, "DELETE FROM workers WHERE id = :id", id=unknown)
        assert await mended(db) == {"abandoned jobs": (3, 3, 0)}
        assert [(await job(db, job_id)).state for job_id in ids] == ["queued", "queued", "queued", "running"]
        assert [(await job(db, job_id)).deaths for job_id in ids] == [1, 0, 0, 0]
        assert [(await calls(db, job_id))[0].outcome for job_id in ids] == ["orphaned"] * 3 + [None]

    play(database_url, story)


def test_what_the_leader_mends_by_itself_is_not_called_stuck(database_url, monkeypatch):
    async def story(db):
        worker = await served(db)
        await take(db, [await a_job(db)], worker)
        await rows(db, "UPDATE workers SET state = 'dead'")
        await served(db)

        async def meanwhile(_):
            async with db.connect() as leader:
                assert len(await rescue(leader)) == 1

        monkeypatch.setattr("worker.repair.asyncio", SimpleNamespace(sleep=meanwhile))
        async with a_leader(db):
            assert await examine(db, heartbeat_ttl_s=10) == []

    play(database_url, story)


def test_lanes_that_are_missing_are_added_and_the_others_stay_as_they_are(database_url):
    async def story(db):
        await rows(db, "UPDATE lanes SET paused = true WHERE name = 'interactive'")
        await rows(db, "DELETE FROM lanes WHERE name = 'bulk'")
        assert await mended(db) == {"missing lanes": (1, 1, 0)}
        assert await rows(db, "SELECT name, paused FROM lanes ORDER BY 1") == [("bulk", False), ("interactive", True)]

    play(database_url, story)


def test_a_job_that_was_queued_by_hand_although_it_is_answered_keeps_its_answer(database_url):
    async def story(db):
        await served(db)
        opened, ids = await a_batch(db, 2)
        await settle(db, [answered(one, "paid for") for one in await take(db, ids)])
        await rows(db, "UPDATE jobs SET state = 'queued', finished_at = NULL WHERE id = :id", id=ids[0])
        assert await mended(db) == {"answered jobs": (1, 1, 0), "batch counters": (1, 1, 0)}
        assert ((await job(db, ids[0])).state, (await batch(db, opened.id)).state) == ("succeeded", "finished")
        (kept,) = await results(db, ids[0])
        assert Answer.from_json(kept.answer).content == "paid for"

    play(database_url, story)


def test_a_queued_job_that_is_to_be_cancelled_is_cancelled(database_url):
    async def story(db):
        await served(db)
        opened, ids = await a_batch(db, 2)
        await rows(db, "UPDATE jobs SET cancel_requested = true WHERE id = :id", id=ids[0])
        assert await mended(db) == {"cancelled jobs": (1, 1, 0)}
        assert [(await job(db, job_id)).state for job_id in ids] == ["cancelled", "queued"]
        assert (await batch(db, opened.id)).cancelled == 1

    play(database_url, story)


def test_jobs_whose_request_is_gone_fail_with_a_code_of_their_own(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 5)
        await take(db, ids[:1], await served(db))
        await settle(db, [answered(one) for one in await take(db, ids[1:2])])
        await rows(db, "DELETE FROM job_requests WHERE job_id = ANY(:ids)", ids=ids[:3])
        await rows(db, "UPDATE job_requests SET request = NULL WHERE job_id = :id", id=ids[3])
        assert await mended(db) == {"jobs without request": (3, 3, 0)}
        stored = [await job(db, job_id) for job_id in ids]
        assert [one.state for one in stored] == ["failed", "succeeded", "failed", "failed", "queued"]
        assert [one.error["code"] for one in stored if one.error] == ["request_missing"] * 3
        assert [call.outcome for call in await calls(db, ids[0])] == ["orphaned"]
        assert (await batch(db, opened.id)).failed == 3
        assert await requeue(db, batch_id=opened.id) == 0

    play(database_url, story)


def test_a_row_of_a_file_that_could_not_be_used_is_not_stuck(database_url):
    async def story(db):
        opened = await open_batch(db, "b", fingerprint=[], columns=None)
        async for _ in add_rows(db, opened, [Row(ordinal=1, custom_id=None, request=None, chain="default", problem="no body")]):
            pass
        await close_batch(db, opened)
        assert await look(db) == {}

    play(database_url, story)


async def an_open_call(db, job_id, fence):
    sql = "INSERT INTO provider_calls (id, job_id, fence, provider, model) VALUES (:id, :job_id, :fence, 'late', 'm')"
    await rows(db, sql, id=(call_id := new_id()), job_id=job_id, fence=fence)
    return call_id


def test_calls_that_nobody_can_close_any_more_are_booked_as_orphaned_and_of_unknown_cost(database_url):
    async def story(db):
        worker = await served(db)
        ids = [await a_job(db) for _ in range(4)]
        running, waiting, ended, deleted = ids
        first = await take(db, ids, worker)
        await settle(db, [ending(one, JobState.QUEUED, calls=(a_call(one.opened_id, Signal.SERVER_ERROR),)) for one in first])
        (second,) = await take(db, [running], worker)
        await settle(db, [answered(one) for one in await take(db, [ended], worker)])
        await rows(db, "DELETE FROM jobs WHERE id = :id", id=deleted)
        over = [await an_open_call(db, job_id, 1) for job_id in ids]
        under_way = await an_open_call(db, running, second.fence)
        await rows(db, LONG_AGO)
        recent = await an_open_call(db, waiting, 1)
        assert await mended(db) == {"open calls": (4, 4, 0)}
        booked = await rows(db, "SELECT id, billing, cost_usd FROM provider_calls WHERE outcome = 'orphaned'")
        assert {row.id for row in booked} == set(over)
        assert {(row.billing, row.cost_usd) for row in booked} == {("unknown", None)}
        assert {row.id for row in await rows(db, "SELECT id FROM provider_calls WHERE outcome IS NULL")} == {under_way, recent}

    play(database_url, story)


@pytest.mark.parametrize(
    "hand",
    [
        "UPDATE batches SET succeeded = succeeded + 1",
        "UPDATE batches SET degraded = degraded + 1",
        "UPDATE batches SET total = total + 5, state = 'open', finished_at = NULL",
        "UPDATE batches SET failed = 0",
        "UPDATE batches SET state = 'open', finished_at = NULL",
        "UPDATE batches SET finished_at = NULL",
        "UPDATE batches SET state = 'loading', cancelled = 9",
        "UPDATE jobs SET state = 'queued', finished_at = NULL WHERE state = 'failed'",
        "UPDATE jobs SET state = 'expired' WHERE state = 'failed'",
        "DELETE FROM jobs WHERE state = 'failed'",
        "DELETE FROM jobs",
    ],
)
def test_a_batch_that_does_not_fit_its_jobs_is_counted_again(hand, database_url):
    async def story(db):
        await served(db)
        _, ids = await a_batch(db, 3)
        await a_batch(db, 2, "tuesday")
        good, bad, other = await take(db, ids)
        await settle(db, [answered(good), ending(bad), ending(other, JobState.CANCELLED)])
        await rows(db, hand + (" AND " if "WHERE" in hand else " WHERE ") + ("batch_id" if "jobs" in hand else "id") + " <> :other",
                   other=(await rows(db, "SELECT id FROM batches WHERE name = 'tuesday'"))[0].id)  # fmt: skip
        assert await look(db) == {"batch counters": (1, 0, 1)}
        assert await mended(db) == {"batch counters": (1, 1, 0)}

    play(database_url, story)


def test_a_batch_that_turns_out_to_be_finished_is_told_once(database_url):
    async def story(db):
        await webhooks.create(db, tenant="default", url="https://example.com/told")
        opened, ids = await a_batch(db, 2)
        await settle(db, [answered(one) for one in await take(db, ids, await served(db))])
        await rows(db, "DELETE FROM deliveries")
        await rows(db, "UPDATE batches SET state = 'open', finished_at = NULL, succeeded = 1")
        for _ in range(2):
            await mended(db)
            await rows(db, "UPDATE batches SET succeeded = 1")  # counted again, but finished before
        told = await rows(db, "SELECT event, subject_id FROM deliveries")
        assert [(row.event, row.subject_id) for row in told] == [("batch.finished", opened.id)]

    play(database_url, story)


def test_a_batch_that_still_loads_is_counted_and_goes_on_loading(database_url):
    async def story(db):
        loading, ids = await a_batch(db, 2, closed=False)
        await settle(db, [answered(one) for one in await take(db, ids, await served(db))])
        await rows(db, "UPDATE batches SET total = 7")
        assert await mended(db) == {"batch counters": (1, 1, 0)}
        assert ((await batch(db, loading.id)).state, (await batch(db, loading.id)).total) == ("loading", 2)
        await close_batch(db, loading)
        assert (await batch(db, loading.id)).state == "finished"

    play(database_url, story)


def test_what_is_settled_while_a_batch_is_counted_again_is_counted_once(database_url):
    async def story(db):
        worker = await served(db)
        opened, ids = await a_batch(db, 4)
        claims = await take(db, ids, worker)
        await rows(db, "UPDATE batches SET succeeded = 3, total = 9")
        await one_after_the_other(
            db,
            "batches",
            opened.id,
            lambda: settle(db, [answered(one) for one in claims[:2]]),
            lambda: examine(db, heartbeat_ttl_s=10, repair=True, again_s=0),
            lambda: settle(db, [answered(one) for one in claims[2:]]),
        )
        await counters_are_exact(db)
        stored = await batch(db, opened.id)
        assert (stored.succeeded, stored.state) == (4, "finished")

    play(database_url, story)


async def paused(db):
    await served(db)
    await a_job(db)
    await rows(db, "UPDATE lanes SET paused = true WHERE name = 'bulk'")


async def unserved(db):
    worker = await served(db)
    await a_job(db)
    await a_job(db, lane=Lane.INTERACTIVE)
    await rows(db, "UPDATE workers SET lanes = 'interactive' WHERE id = :id", id=worker)


async def without_a_worker(db):
    await served(db)
    await a_job(db)
    await rows(db, "UPDATE workers SET seen_at = now() - interval '11 s'")


async def silent(db):
    await served(db)
    await take(db, [await a_job(db)])
    await rows(db, "UPDATE workers SET seen_at = now() - interval '31 s'")


async def overdue(db):
    await take(db, [await a_job(db)], await served(db))
    await rows(db, "UPDATE jobs SET deadline_at = now() - interval '11 minutes'")


async def broken_off(db):
    await a_batch(db, 2, closed=False)
    await a_batch(db, 0, "empty", closed=False)
    await a_batch(db, 2, "still coming", closed=False)
    await served(db)
    ages = "UPDATE jobs SET created_at = now() - interval '61 minutes' FROM batches b WHERE b.id = jobs.batch_id AND ordinal < {}"
    await rows(db, ages.format(9) + " AND b.name = 'monday'")
    await rows(db, ages.format(2) + " AND b.name = 'still coming'")
    await rows(db, "UPDATE batches SET created_at = now() - interval '61 minutes'")


async def of_another_version(db):
    await rows(db, "INSERT INTO lanes (name) VALUES ('express')")


@pytest.mark.parametrize(
    ("scene", "name", "count"),
    [
        (paused, "paused lanes", 1),
        (unserved, "workers", 1),
        (without_a_worker, "workers", 1),
        (silent, "silent workers", 1),
        (overdue, "overdue jobs", 1),
        (broken_off, "broken-off batches", 2),
        (of_another_version, "unknown lanes", 1),
    ],
)
def test_what_a_person_has_to_decide_is_told_and_left_as_it_is(scene, name, count, database_url):
    async def story(db):
        await scene(db)
        before = await everything(db)
        assert await look(db, repair=True) == {name: (count, 0, count)}
        assert await everything(db) == before

    play(database_url, story)


def test_workers_without_a_leader_are_told_of_and_none_where_nobody_lives(database_url, servers):
    async def story(db):
        assert await examine(db, heartbeat_ttl_s=10, again_s=0) == []
        await served(db)
        elsewhere = database.engine(servers.database_url)
        async with a_leader(elsewhere):
            (found,) = await examine(db, heartbeat_ttl_s=10, again_s=0)
        await elsewhere.dispose()
        assert (found.check.name, found.count, found.example) == ("leader", 1, "here")
        assert await look(db) == {}

    play(database_url, story)


def test_more_is_mended_than_one_statement_reaches(database_url, monkeypatch):
    monkeypatch.setattr("worker.repair.CHUNK", 2)

    async def story(db):
        await served(db)
        _, ids = await a_batch(db, 9)
        await take(db, ids[:5], gone := await a_worker(db))
        await rows(db, "UPDATE workers SET state = 'gone' WHERE id = :id", id=gone)
        await rows(db, "UPDATE jobs SET cancel_requested = true WHERE id = ANY(:ids)", ids=ids[5:])
        assert await mended(db) == {"abandoned jobs": (5, 5, 0), "cancelled jobs": (4, 4, 0)}

    play(database_url, story)

"""What the leader mends: deadlines, jobs of the dead, claims whose reply was lost."""

import pytest
from stage import a_batch, a_call, a_job, a_worker, batch, calls, counters_are_exact, ending, job, play, rows, take

from worker.intervene import cancel
from worker.job import JobState
from worker.ledger import settle
from worker.rescue import MAX_DEATHS, expire, release, rescue
from worker.signals import Signal


async def lost(db, job_ids, state):
    """The claims of a worker that is in this state by now."""
    worker = await a_worker(db)
    claims = await take(db, job_ids, worker)
    await rows(db, "UPDATE workers SET state = :state WHERE id = :id", state=state, id=worker)
    return claims


async def by_the_leader(db, mend, *arguments, **options):
    async with db.connect() as connection:
        return await mend(connection, *arguments, **options)


@pytest.mark.parametrize(("state", "rescued"), [("live", False), ("draining", False), ("dead", True), ("gone", True)])
def test_only_jobs_of_workers_that_ended_are_rescued(database_url, state, rescued):
    async def story(db):
        job_id = await a_job(db)
        (claimed,) = await lost(db, [job_id], state)
        assert await by_the_leader(db, rescue) == ([job_id] if rescued else [])
        stored, (call,) = await job(db, job_id), await calls(db, job_id)
        assert (stored.state, stored.fence) == ("queued" if rescued else "running", claimed.fence)
        assert (call.outcome, call.billing, call.cost_usd) == ("orphaned" if rescued else None, "unknown", None)

    play(database_url, story)


def test_a_closed_call_of_a_dead_worker_stays_as_it_was_booked(database_url):
    async def story(db):
        job_id = await a_job(db)
        (first,) = await take(db, [job_id])
        await settle(db, [ending(first, JobState.QUEUED, calls=(a_call(first.opened_id, Signal.SERVER_ERROR),))])
        await lost(db, [job_id], "dead")
        assert await by_the_leader(db, rescue) == [job_id]
        assert [call.outcome for call in await calls(db, job_id)] == ["server_error"]

    play(database_url, story)


def test_a_job_that_kills_its_workers_is_given_up(database_url):
    async def story(db):
        opened, (job_id,) = await a_batch(db, 1)
        for deaths in range(MAX_DEATHS):
            assert (await job(db, job_id)).state == "queued"
            await lost(db, [job_id], "dead")
            assert await by_the_leader(db, rescue) == [job_id]
            assert (await job(db, job_id)).deaths == deaths + 1
        stored = await job(db, job_id)
        assert (stored.state, stored.error["code"], stored.attempts) == ("failed", "worker_died", 0)
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)


def test_a_job_that_was_left_behind_by_a_worker_that_retired_is_no_suspect(database_url):
    async def story(db):
        job_id = await a_job(db)
        await lost(db, [job_id], "gone")
        assert await by_the_leader(db, rescue) == [job_id]
        assert (await job(db, job_id)).deaths == 0

    play(database_url, story)


def test_a_job_that_was_to_be_cancelled_when_its_worker_died_is_cancelled(database_url):
    async def story(db):
        _, ids = await a_batch(db, 1)
        await lost(db, ids, "dead")
        await cancel(db, job_ids=ids)
        assert await by_the_leader(db, rescue) == ids
        assert (await job(db, ids[0])).state == "cancelled"
        await counters_are_exact(db)

    play(database_url, story)


def test_no_more_is_rescued_at_once_than_asked_for(database_url):
    async def story(db):
        _, ids = await a_batch(db, 5)
        await lost(db, ids, "dead")
        assert [len(await by_the_leader(db, rescue, most=2)) for _ in range(4)] == [2, 2, 1, 0]

    play(database_url, story)


def test_a_queued_job_past_its_deadline_expires_and_a_running_one_does_not(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 3)
        await take(db, ids[:1])
        await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = ANY(:ids)", ids=ids[:2])
        assert await by_the_leader(db, expire) == [ids[1]]
        assert [(await job(db, job_id)).state for job_id in ids] == ["running", "expired", "queued"]
        assert (await job(db, ids[1])).error == {
            "code": "deadline",
            "message": "the deadline passed before any provider answered",
            "providers": [],
        }
        assert (await batch(db, opened.id)).expired == 1
        await counters_are_exact(db)

    play(database_url, story)


def test_only_strays_of_the_worker_and_the_fence_named_are_released(database_url):
    async def story(db):
        ids = [await a_job(db) for _ in range(3)]
        mine, theirs = await a_worker(db), await a_worker(db)
        await take(db, ids[:2], mine)
        await take(db, ids[2:], theirs)
        assert await by_the_leader(db, release, mine, {ids[0]: 1, ids[1]: 2, ids[2]: 1}) == ids[:1]
        assert [(await job(db, job_id)).state for job_id in ids] == ["queued", "running", "running"]
        assert [call.outcome for call in await calls(db, ids[0])] == ["orphaned"]
        assert (await job(db, ids[0])).attempts == 0

    play(database_url, story)


def test_a_stray_that_was_to_be_cancelled_ends_cancelled(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 1)
        mine = await a_worker(db)
        await take(db, ids, mine)
        await cancel(db, job_ids=ids)
        assert await by_the_leader(db, release, mine, {ids[0]: 1}) == ids
        assert ((await job(db, ids[0])).state, (await batch(db, opened.id)).state) == ("cancelled", "finished")
        await counters_are_exact(db)

    play(database_url, story)

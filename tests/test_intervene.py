"""Cancel and requeue: what they reach, what they leave alone, and that they count."""

import pytest
from stage import HELLO, Mailbox, a_batch, a_job, a_worker, answered, batch, counters_are_exact, ending, job, play, rows, take

from worker.errors import UsageError
from worker.intervene import Cancelled, cancel, requeue
from worker.job import JobState, Lane, new_id
from worker.ledger import settle
from worker.submit import NewJob, Row, add_rows, close_batch, open_batch, submit


def test_a_cancel_ends_what_is_queued_and_flags_what_runs_whatever_the_chunk(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 11)
        await take(db, ids[:3])
        await settle(db, [answered(claimed) for claimed in await take(db, ids[3:5])])
        assert await cancel(db, batch_id=opened.id, chunk=2) == Cancelled(cancelled=6, flagged=3)
        assert await cancel(db, batch_id=opened.id, chunk=2) == Cancelled(cancelled=0, flagged=0)
        await counters_are_exact(db)

    play(database_url, story)


def test_a_batch_whose_last_jobs_are_cancelled_is_finished(database_url):
    async def story(db):
        opened, _ = await a_batch(db, 3)
        await cancel(db, batch_id=opened.id)
        stored = await batch(db, opened.id)
        assert (stored.cancelled, stored.state) == (3, "finished")

    play(database_url, story)


def test_a_cancel_of_nothing_does_nothing(database_url):
    async def story(db):
        job_id = await a_job(db)
        assert await cancel(db) == Cancelled(0, 0)
        assert await cancel(db, job_ids=[new_id()]) == Cancelled(0, 0)
        assert await cancel(db, job_ids=[job_id], tenant="somebody else") == Cancelled(0, 0)
        assert (await job(db, job_id)).state == "queued"

    play(database_url, story)


def test_a_revoked_message_cancels_its_jobs_running_or_not(database_url):
    async def story(db):
        mailbox = Mailbox()
        job_id = (await submit(db, mailbox.publish, NewJob(request=HELLO, lane=Lane.INTERACTIVE))).job_id
        ids = [await a_job(db) for _ in range(3)]
        sql = "UPDATE jobs SET delivery_id = :d, dispatched_at = now() WHERE id = ANY(:ids)"
        await rows(db, sql, d=(delivery := new_id()), ids=ids[:2])
        await take(db, ids[:1], await a_worker(db))
        assert await cancel(db, delivery_id=delivery) == Cancelled(cancelled=1, flagged=1)
        assert await cancel(db, delivery_id=mailbox.messages[0][1]) == Cancelled(cancelled=1, flagged=0)
        assert (await job(db, job_id)).state == "cancelled"
        assert (await job(db, ids[2])).state == "queued"

    play(database_url, story)


def test_a_requeue_gives_fresh_attempts_and_a_new_walk_and_reopens_the_batch(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 4)
        claims = await take(db, ids)
        states = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]
        group = [ending(claimed, state, counted=True) for claimed, state in zip(claims[1:], states[1:], strict=True)]
        await settle(db, [answered(claims[0]), *group])
        assert (await batch(db, opened.id)).state == "finished"
        assert await requeue(db, batch_id=opened.id, chunk=2) == 3
        stored = await batch(db, opened.id)
        assert (stored.succeeded, stored.failed, stored.cancelled, stored.expired) == (1, 0, 0, 0)
        await counters_are_exact(db)
        again = await take(db, ids)
        assert [(claimed.fence, claimed.attempts, claimed.asked) for claimed in again] == [(2, 0, ())] * 3
        assert all(claimed.opened_id for claimed in again)
        await settle(db, [answered(claimed) for claimed in again])
        assert (await batch(db, opened.id)).state == "finished"

    play(database_url, story)


def test_a_row_that_never_could_be_sent_stays_failed(database_url):
    async def story(db):
        opened = await open_batch(db, "b", fingerprint=[], columns=None)
        async for _ in add_rows(db, opened, [Row(ordinal=1, custom_id=None, request=None, chain="default", problem="no body")]):
            pass
        await close_batch(db, opened)
        assert await requeue(db, batch_id=opened.id) == 0
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)


def test_each_requeue_gives_the_full_time_anew_and_no_more(database_url):
    async def story(db):
        job_id = await a_job(db)
        for _ in range(3):
            await cancel(db, job_ids=[job_id])
            assert await requeue(db, job_ids=[job_id]) == 1
            (row,) = await rows(db, "SELECT deadline_at - run_at = make_interval(secs => deadline_s) AS exact FROM jobs")
            assert row.exact

    play(database_url, story)


def test_a_batch_that_is_cancelled_while_it_is_submitted_takes_no_more_rows(database_url):
    async def story(db):
        opened = await open_batch(db, "one", fingerprint=["x"], columns=None)
        rows_ = [Row(ordinal=n, custom_id=None, request=HELLO, chain="default") for n in (1, 2)]
        assert [added async for added in add_rows(db, opened, rows_[:1])] == [1]
        await cancel(db, batch_id=opened.id)
        with pytest.raises(UsageError, match="'one' was cancelled"):
            _ = [added async for added in add_rows(db, opened, rows_[1:])]
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)

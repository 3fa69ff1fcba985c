"""Cancel and requeue: what they reach, what they leave alone, and that they count."""

from datetime import UTC, datetime, timedelta

import pytest
from stage import HELLO, Mailbox, a_batch, a_job, a_worker, answered, batch, counters_are_exact, ending, job, play, rows, take

from worker.errors import UsageError
from worker.intervene import Cancelled, cancel, requeue, requeueable
from worker.job import JobState, Lane, new_id
from worker.ledger import settle
from worker.selection import Selection
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


async def ended(db, job_ids, state, code, **columns):
    """These jobs ended so, with an error of that code."""
    error = {"code": code, "message": "", "providers": []}
    await settle(db, [ending(one, state, error=error) for one in await take(db, job_ids)])
    for name, value in columns.items():
        await rows(db, f"UPDATE jobs SET {name} = {value} WHERE id = ANY(:ids)", ids=job_ids)


async def queued(db):
    return {row.id for row in await rows(db, "SELECT id FROM jobs WHERE state = 'queued'")}


async def a_bad_night(db):
    """Jobs by the code they ended with; those of two batches among them."""
    _, monday = await a_batch(db, 4)
    _, tuesday = await a_batch(db, 2, "tuesday")
    loose = [await a_job(db) for _ in range(3)]
    await ended(db, [*monday[:2], tuesday[0]], JobState.FAILED, "worker_died")
    await ended(db, monday[2:3], JobState.FAILED, "billing_unknown", chain="'careful'")
    await ended(db, [monday[3], tuesday[1]], JobState.EXPIRED, "deadline", finished_at="now() - interval '3 hours'")
    await ended(db, loose[:1], JobState.CANCELLED, "cancelled")
    await settle(db, [answered(one) for one in await take(db, loose[1:2])])
    return monday, tuesday, loose


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (Selection(code="worker_died"), lambda monday, tuesday, loose: [*monday[:2], tuesday[0]]),
        (Selection(chain="careful"), lambda monday, tuesday, loose: monday[2:3]),
        (Selection(state=JobState.EXPIRED), lambda monday, tuesday, loose: [monday[3], tuesday[1]]),
        (Selection(state=JobState.FAILED, chain="default"), lambda monday, tuesday, loose: [*monday[:2], tuesday[0]]),
        (Selection(since=datetime.now(UTC) - timedelta(hours=2)), lambda monday, tuesday, loose: [*monday[:3], tuesday[0], loose[0]]),
        (Selection(state=JobState.SUCCEEDED), lambda monday, tuesday, loose: []),
        (Selection(code="' OR true"), lambda monday, tuesday, loose: []),
    ],
)
def test_exactly_the_selected_jobs_are_counted_and_requeued(which, expected, database_url):
    async def story(db):
        night = await a_bad_night(db)
        before, wanted = await queued(db), set(expected(*night))
        counts = await requeueable(db, which=which)
        assert await queued(db) == before
        assert sum(counts.values()) == await requeue(db, which=which, chunk=2) == len(wanted)
        assert await queued(db) - before == wanted
        assert await requeueable(db, which=which) == {}
        await counters_are_exact(db)

    play(database_url, story)


def test_a_selection_within_a_batch_reaches_no_other_and_counts_by_state(database_url):
    async def story(db):
        monday, _, _ = await a_bad_night(db)
        (stored,) = await rows(db, "SELECT id FROM batches WHERE name = 'monday'")
        assert await requeueable(db, batch_id=stored.id) == {JobState.FAILED: 3, JobState.EXPIRED: 1}
        before = await queued(db)
        assert await requeue(db, batch_id=stored.id, which=Selection(code="worker_died")) == 2
        assert await queued(db) - before == set(monday[:2])
        assert await requeue(db, job_ids=monday, which=Selection(code="billing_unknown")) == 1
        await counters_are_exact(db)

    play(database_url, story)


def test_a_requeue_of_nothing_in_particular_is_refused(database_url):
    async def story(db):
        await a_bad_night(db)
        before = await queued(db)
        for refused in (requeue(db), requeueable(db), requeue(db, which=Selection())):
            with pytest.raises(UsageError, match="requeue which jobs"):
                await refused
        assert await requeue(db, job_ids=[]) == 0
        assert await queued(db) == before

    play(database_url, story)


def test_a_job_that_fails_again_at_once_is_requeued_once_by_one_command(database_url):
    async def story(db):
        await a_bad_night(db)
        again = """CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            NEW.state := 'failed'; NEW.finished_at := now(); NEW.error := OLD.error; RETURN NEW; END $$"""
        await rows(db, again)
        await rows(db, "CREATE TRIGGER again BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.state = 'queued') EXECUTE FUNCTION again()")
        assert await requeue(db, which=Selection(code="worker_died"), chunk=1) == 3

    play(database_url, story)

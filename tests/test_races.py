"""Two statements on the same jobs at the same moment, in either order; and all of them at once, without one deadlock."""

import asyncio
import random
import re
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from stage import (
    FIRST,
    HELLO,
    Mailbox,
    a_batch,
    a_call,
    a_job,
    a_worker,
    answered,
    batch,
    blocked,
    calls,
    counters_are_exact,
    ending,
    job,
    play,
    results,
    rows,
    take,
    transaction,
    until,
)

import worker
from worker.calls import NewCall, open_calls
from worker.dispatch import Dispatcher, withdraw
from worker.errors import UsageError
from worker.intervene import Cancelled, cancel, requeue
from worker.job import JobState, new_id
from worker.ledger import claim, settle
from worker.loop import cancel_surely
from worker.rescue import expire, release, rescue
from worker.signals import Signal
from worker.submit import Row, add_rows, close_batch
from worker.wiring import redis_client

QUEUED, FAILED = JobState.QUEUED, JobState.FAILED


class Pinned:
    """An engine of one connection: what runs on it commits when the story says so."""

    def __init__(self, connection: AsyncConnection):
        self.connection = connection

    @asynccontextmanager
    async def connect(self):
        yield self.connection


async def meet(db, first, second):
    """Their values, and whether the second, which came while the first was done and not yet committed, waited for it."""
    async with transaction(db) as connection:
        value = await first(Pinned(connection))
        coming = asyncio.create_task(second(db))
        waiting = asyncio.create_task(blocked(db, 1))
        await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waited = waiting.done()
    await cancel_surely([waiting])
    return value, await coming, waited


def by_the_leader(mend, *arguments):
    async def mended(db):
        async with db.connect() as connection:
            return await mend(connection, *arguments)

    return mended


async def held_by(db, ids, state="live"):
    """The worker that is in this state by now, and its claims."""
    worker_id = await a_worker(db)
    claims = await take(db, ids, worker_id)
    await rows(db, "UPDATE workers SET state = :state WHERE id = :id", state=state, id=worker_id)
    return worker_id, claims


def test_a_claim_passes_by_a_job_that_is_being_rescued_and_finds_it_afterwards(database_url):
    async def story(db):
        job_id, other = await a_job(db), await a_worker(db)
        await held_by(db, [job_id], "dead")
        meeting = await meet(db, by_the_leader(rescue), lambda db: claim(db, [job_id], other, FIRST))
        assert meeting == ([job_id], [], False)
        assert [claimed.fence for claimed in await take(db, [job_id])] == [2]

    play(database_url, story)


def test_a_claim_that_commits_after_its_worker_was_buried_and_the_jobs_rescued_is_found_by_the_next_rescue(database_url):
    async def story(db):
        job_id, worker_id = await a_job(db), await a_worker(db)

        async def bury(db):
            await rows(db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=worker_id)
            return await by_the_leader(rescue)(db)

        claims, rescued, waited = await meet(db, lambda db: claim(db, [job_id], worker_id, FIRST), bury)
        assert (len(claims), rescued, waited) == (1, [], False)
        assert await by_the_leader(rescue)(db) == [job_id]
        assert [call.outcome for call in await calls(db, job_id)] == ["orphaned"]

    play(database_url, story)


def test_a_cancel_that_waits_for_a_claim_flags_what_runs_by_then(database_url):
    async def story(db):
        (_, ids), worker_id = await a_batch(db, 1), await a_worker(db)
        claims, *rest = await meet(db, lambda db: claim(db, ids, worker_id, FIRST), lambda db: cancel(db, job_ids=ids))
        assert (len(claims), *rest) == (1, Cancelled(cancelled=0, flagged=1), True)
        assert (await job(db, ids[0])).cancel_requested
        await counters_are_exact(db)

    play(database_url, story)


@pytest.mark.parametrize("closing_first", [True, False])
def test_a_cancel_of_a_batch_and_the_end_of_its_file_finish_it_in_either_order(database_url, closing_first):
    async def story(db):
        opened, _ = await a_batch(db, 3, closed=False)
        pair = [lambda db: close_batch(db, opened), lambda db: cancel(db, batch_id=opened.id)]
        assert Cancelled(cancelled=3, flagged=0) in await meet(db, *(pair if closing_first else reversed(pair)))
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)


async def add_more(db, opened):
    wanted = [Row(ordinal=n, custom_id=None, request=HELLO, chain="default") for n in range(3, 6)]
    with suppress(UsageError):
        return [added async for added in add_rows(db, opened, wanted)]


def test_a_cancel_of_a_batch_reaches_rows_that_were_just_being_added(database_url):
    async def story(db):
        opened, _ = await a_batch(db, 2, closed=False)
        meeting = await meet(db, lambda db: add_more(db, opened), lambda db: cancel(db, batch_id=opened.id))
        assert meeting == ([3], Cancelled(cancelled=5, flagged=0), True)
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)


def test_rows_that_come_while_their_batch_is_cancelled_are_refused(database_url):
    async def story(db):
        opened, _ = await a_batch(db, 2, closed=False)
        meeting = await meet(db, lambda db: cancel(db, batch_id=opened.id), lambda db: add_more(db, opened))
        assert meeting == (Cancelled(cancelled=2, flagged=0), None, True)
        assert (await batch(db, opened.id)).total == 2
        await counters_are_exact(db)

    play(database_url, story)


def test_two_leaders_at_once_put_no_job_into_two_messages_and_exceed_the_window_by_one_tick_at_most(database_url, redis_url):
    async def story(db):
        _, ids = await a_batch(db, 50)
        await a_worker(db, slots=20)
        redis, mailbox = redis_client(redis_url), Mailbox()

        async def tick(db):
            async with db.connect() as connection:
                return await Dispatcher(connection, redis, mailbox.publish, pack_size=10, dispatch_ttl_s=30).tick()

        first, second, waited = await meet(db, tick, tick)
        published = [job_id for _, _, job_ids in mailbox.messages for job_id in job_ids]
        assert first == 20 >= second
        assert not waited
        assert len(set(published)) == len(published) == first + second
        assert await tick(db) == 20  # by a third, which trusts neither
        assert set(published) <= set(ids)
        await redis.aclose()

    play(database_url, story)


def test_a_settle_sent_again_while_the_first_is_still_under_way_changes_nothing(database_url):
    async def story(db):
        _, ids = await a_batch(db, 2)
        claims = await take(db, ids)
        group = [answered(claims[0]), ending(claims[1], FAILED, counted=True)]
        meeting = await meet(db, lambda db: settle(db, group), lambda db: settle(db, group, again=True))
        assert meeting == ([True, True], [True, True], True)
        assert [len(await results(db, job_id)) for job_id in ids] == [1, 0]
        assert [call.answer for call in await calls(db, ids[0])] == [None]
        assert (await job(db, ids[1])).attempts == 1
        await counters_are_exact(db)

    play(database_url, story)


def test_a_late_settle_is_refused_while_its_job_is_requeued(database_url):
    async def story(db):
        _, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        await settle(db, [ending(claimed, FAILED)])
        meeting = await meet(db, lambda db: requeue(db, job_ids=ids), lambda db: settle(db, [answered(claimed)]))
        assert meeting == (1, [False], False)
        assert ((await job(db, ids[0])).state, await results(db, ids[0])) == ("queued", [])
        await counters_are_exact(db)

    play(database_url, story)


def test_a_claim_passes_by_a_job_that_is_expiring(database_url):
    async def story(db):
        (_, ids), worker_id = await a_batch(db, 1), await a_worker(db)
        await rows(db, "UPDATE jobs SET deadline_at = clock_timestamp() + interval '50 ms'")
        await until(db, "SELECT FROM jobs WHERE deadline_at <= now()")
        meeting = await meet(db, by_the_leader(expire), lambda db: claim(db, ids, worker_id, FIRST))
        assert meeting == (ids, [], False)
        await counters_are_exact(db)

    play(database_url, story)


def test_a_settle_that_waits_for_a_release_is_refused(database_url):
    async def story(db):
        _, ids = await a_batch(db, 1)
        worker_id, (claimed,) = await held_by(db, ids)
        meeting = await meet(db, by_the_leader(release, worker_id, {ids[0]: 1}), lambda db: settle(db, [answered(claimed)]))
        assert meeting == (ids, [False], True)
        assert ((await job(db, ids[0])).state, await results(db, ids[0])) == ("queued", [])

    play(database_url, story)


def test_a_release_passes_by_a_job_that_is_being_settled(database_url):
    async def story(db):
        _, ids = await a_batch(db, 1)
        worker_id, (claimed,) = await held_by(db, ids)
        meeting = await meet(db, lambda db: settle(db, [answered(claimed)]), by_the_leader(release, worker_id, {ids[0]: 1}))
        assert meeting == ([True], [], False)
        assert [call.outcome for call in await calls(db, ids[0])] == ["answered"]

    play(database_url, story)


def a_new_call(claimed):
    return NewCall(id=new_id(), job_id=claimed.job_id, fence=claimed.fence, provider="second", model="m")


def test_no_call_is_opened_while_its_job_is_rescued(database_url):
    async def story(db):
        _, claims = await held_by(db, [await a_job(db)], "dead")
        meeting = await meet(db, by_the_leader(rescue), lambda db: open_calls(db, [a_new_call(claims[0])]))
        assert meeting == ([claims[0].job_id], [False], False)
        assert [call.outcome for call in await calls(db, claims[0].job_id)] == ["orphaned"]

    play(database_url, story)


def test_a_rescue_passes_by_a_job_whose_call_is_being_opened_and_orphans_the_call_next_time(database_url):
    async def story(db):
        _, claims = await held_by(db, [await a_job(db)], "dead")
        meeting = await meet(db, lambda db: open_calls(db, [a_new_call(claims[0])]), by_the_leader(rescue))
        assert meeting == ([True], [], False)
        assert await by_the_leader(rescue)(db) == [claims[0].job_id]
        assert [call.outcome for call in await calls(db, claims[0].job_id)] == ["orphaned", "orphaned"]

    play(database_url, story)


def unanswered(claimed, state):
    booked = (a_call(claimed.opened_id, Signal.SERVER_ERROR),) if claimed.opened_id else ()
    return ending(claimed, state, calls=booked)


class Scene:
    """A batch with jobs in every state, so that each of `ACTS` has something to do, mostly with the same rows."""

    async def set(self, db):
        for table in ("provider_calls", "jobs", "batches", "workers"):
            await rows(db, f"DELETE FROM {table}")
        self.batch, self.ids = await a_batch(db, 8, closed=False)
        self.other = await a_worker(db)
        failed = await take(db, self.ids[:1])
        await settle(db, [unanswered(failed[0], FAILED)])
        self.worker, self.claims = await held_by(db, self.ids[1:4])
        _, self.late = await held_by(db, self.ids[4:5], "dead")
        await cancel(db, job_ids=self.ids[3:4])
        await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = :id", id=self.ids[5])
        await rows(db, "UPDATE jobs SET dispatched_at = now(), delivery_id = :d WHERE id = :id", d=self.other, id=self.ids[6])

    def ends(self):
        return [answered(self.claims[0]), *(unanswered(claimed, QUEUED) for claimed in self.claims[1:]), answered(self.late[0])]


ACTS = {
    "claim": lambda scene, db: claim(db, scene.ids, scene.other, FIRST),
    "open calls": lambda scene, db: open_calls(db, [a_new_call(claimed) for claimed in scene.claims + scene.late]),
    "settle": lambda scene, db: settle(db, scene.ends()),
    "settle again": lambda scene, db: settle(db, scene.ends(), again=True),
    "rescue": lambda scene, db: by_the_leader(rescue)(db),
    "release": lambda scene, db: by_the_leader(release, scene.worker, dict.fromkeys(scene.ids[1:4], 1))(db),
    "expire": lambda scene, db: by_the_leader(expire)(db),
    "withdraw": lambda scene, db: withdraw(db, [scene.other]),
    "cancel jobs": lambda scene, db: cancel(db, job_ids=scene.ids[::-1]),
    "cancel batch": lambda scene, db: cancel(db, batch_id=scene.batch.id),
    "requeue": lambda scene, db: requeue(db, batch_id=scene.batch.id),
    "close": lambda scene, db: close_batch(db, scene.batch),
    "add rows": lambda scene, db: add_more(db, scene.batch),
}


async def the_ledger_is_sound(db):
    await counters_are_exact(db)
    sql = """
    SELECT j.id FROM jobs j FULL JOIN results r ON r.job_id = j.id
    WHERE (coalesce(j.state, '') = 'succeeded') <> (r.job_id IS NOT NULL) OR r.fence <> j.fence OR j.state = 'queued' AND j.cancel_requested
    """
    assert await rows(db, sql) == []
    sql = """
    SELECT p.id FROM provider_calls p JOIN jobs j ON j.id = p.job_id
    WHERE p.outcome IS NULL AND (j.state <> 'running' OR j.fence <> p.fence)
    """
    assert await rows(db, sql) == []


@pytest.mark.parametrize("first", ACTS)
def test_whatever_comes_while_something_else_is_under_way_the_ledger_stays_sound(database_url, first):
    async def story(db):
        scene = Scene()
        for second in ACTS:
            if first == "open calls" and second.startswith("settle"):
                continue  # no worker settles before its calls are opened
            await scene.set(db)
            await meet(db, lambda db: ACTS[first](scene, db), lambda db, second=second: ACTS[second](scene, db))
            await the_ledger_is_sound(db)

    play(database_url, story)


WAIT = {
    "settle": lambda db, claims: settle(db, [unanswered(claimed, QUEUED) for claimed in claims]),
    "cancel": lambda db, claims: cancel(db, job_ids=[claimed.job_id for claimed in claims]),
    "requeue": lambda db, claims: requeue(db, job_ids=[claimed.job_id for claimed in claims]),
}


@pytest.mark.parametrize("what", WAIT)
def test_who_waits_for_a_job_holds_those_with_lower_ids_and_no_other(database_url, what):
    async def story(db):
        _, ids = await a_batch(db, 9)
        claims = await take(db, ids)
        if what == "requeue":
            await settle(db, [unanswered(claimed, FAILED) for claimed in claims])
        for job_id in reversed(ids):  # so that they do not lie in the order of their ids
            await rows(db, "UPDATE jobs SET metadata = '{}' WHERE id = :id", id=job_id)
        async with transaction(db) as holder:
            await rows(holder, "SELECT FROM jobs WHERE id = :id FOR UPDATE", id=ids[4])
            waiting = asyncio.create_task(WAIT[what](db, claims[::-1]))
            await blocked(db, 1)
            free = await rows(db, "SELECT id FROM jobs FOR UPDATE SKIP LOCKED")
            assert {row.id for row in free} == set(ids[5:])
        await waiting

    play(database_url, story)


def test_who_waits_for_a_batch_holds_those_with_lower_ids_and_no_other(database_url):
    async def story(db):
        opened = [await a_batch(db, 1, str(number)) for number in range(5)]
        claims = await take(db, [ids[0] for _, ids in reversed(opened)])
        for one, _ in reversed(opened):
            await rows(db, "UPDATE batches SET weight = 2 WHERE id = :id", id=one.id)
        async with transaction(db) as holder:
            await rows(holder, "SELECT FROM batches WHERE id = :id FOR UPDATE", id=opened[2][0].id)
            settling = asyncio.create_task(settle(db, [answered(claimed) for claimed in claims]))
            await blocked(db, 1)
            free = await rows(db, "SELECT id FROM batches FOR UPDATE SKIP LOCKED")
            assert {row.id for row in free} == {one.id for one, _ in opened[3:]}
        assert all(await settling)

    play(database_url, story)


async def deadlocks(db):
    """So many there were in this database. Postgres counts those of a connection when it ends, at the latest."""
    await db.dispose()
    others = "SELECT WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid())"
    await until(db, others)
    (row,) = await rows(db, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return row.deadlocks


def test_a_storm_of_everything_on_the_same_jobs_knows_no_deadlock(database_url):
    async def story(db):
        dice = random.Random(5)
        opened = [await a_batch(db, 100, name, closed=False) for name in ("one", "two")]
        ids = [job_id for _, of_batch in opened for job_id in of_batch]
        workers = [await a_worker(db) for _ in range(2)]

        async def work():
            claims = await take(db, dice.sample(ids, 100), dice.choice(workers))
            dice.shuffle(claims)
            await open_calls(db, [a_new_call(claimed) for claimed in claims])
            await settle(db, [answered(claimed) if dice.random() < 0.05 else ending(claimed, QUEUED) for claimed in claims[10:]])

        async def mend():
            await rows(db, "UPDATE workers SET state = CASE state WHEN 'live' THEN 'dead' ELSE 'live' END")
            await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = :id AND state = 'queued'", id=dice.choice(ids))
            for act in (rescue, expire):
                await by_the_leader(act)(db)
            await by_the_leader(release, workers[0], dict.fromkeys(dice.sample(ids, 30), 1))(db)

        async def meddle():
            await cancel(db, job_ids=ids)
            await requeue(db, batch_id=dice.choice(opened)[0].id)
            await requeue(db, job_ids=ids)
            await withdraw(db, [new_id()])

        async def turns(act, count):
            for _ in range(count):
                await act()

        await asyncio.gather(*(turns(act, 12) for act in (work, work, mend, meddle, meddle, meddle, meddle, meddle)))
        for one, _ in opened:
            await cancel(db, batch_id=one.id)
        await counters_are_exact(db)
        assert await deadlocks(db) == 0

    play(database_url, story)


def test_whoever_locks_several_rows_locks_them_in_the_order_of_their_ids():
    """Also where what is locked is skipped: Postgres waits even then for one that was changed and locked anew in the same moment."""
    locks = [
        (path.name, " ".join(before.split())[-80:])
        for path in sorted(Path(worker.__file__).parent.rglob("*.py"))
        for before in re.split(r"FOR (?:NO KEY UPDATE|UPDATE|SHARE)\b", path.read_text())[:-1]
    ]
    in_order = re.compile(r"ORDER BY (\w\.)?id( LIMIT [\w:.]+)?$|WHERE id = :\w+( AND state = 'loading')?$")
    assert len(locks) > 10
    assert [lock for lock in locks if not in_order.search(lock[1])] == []

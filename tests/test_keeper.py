"""Heartbeat, leadership, rescue, by keepers that run: stories wait for rows and events, never for a time."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

from stage import Mailbox, a_batch, a_job, a_worker, job, play, rows, take, until

from worker import database
from worker.intervene import cancel
from worker.job import Lane
from worker.keeper import LEADER_LOCK, Keeper
from worker.loop import cancel_surely
from worker.settings import Settings
from worker.settlement import Cancelled
from worker.wiring import redis_client


class Hands:
    """What a heartbeat sees of `Attempts`: the jobs in hand, and who was told to stop."""

    def __init__(self):
        self.held, self.waiting, self.draining = {}, set(), False
        self.stopped = asyncio.Queue()

    def holds(self, job_id):
        return job_id in self.held

    def take(self, job_id):
        self.held[job_id] = SimpleNamespace(stop=lambda why: self.stopped.put_nowait((job_id, why)))


@asynccontextmanager
async def a_keeper(database_url, redis_url, mailbox=None, **settings):
    db, redis = database.engine(database_url, pooled=False), redis_client(redis_url)
    chosen = Settings(**{"heartbeat_s": 0.02, "heartbeat_ttl_s": 60, "pack_size": 10, "bulk_slots": 20, **settings})
    keeper = Keeper(db, redis, (mailbox or Mailbox()).publish, chosen, list(Lane))
    await keeper.register()
    try:
        yield keeper
    finally:
        await redis.aclose()
        await db.dispose()


@asynccontextmanager
async def at_work(*loops):
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        await cancel_surely(tasks)


async def leader_pid(db, *, other_than=0):
    sql = """
    SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database
    WHERE l.locktype = 'advisory' AND l.objid = :lock AND l.granted AND l.pid <> :pid AND d.datname = current_database()
    """
    return (await until(db, sql, lock=LEADER_LOCK, pid=other_than))[0].pid


def test_a_heartbeat_brings_a_cancel_to_the_job_and_the_waiting_messages_to_the_ledger(database_url, redis_url):
    async def story(db):
        async with a_keeper(database_url, redis_url) as keeper:
            kept, unwanted = await a_job(db), await a_job(db)
            mine, _ = await take(db, [kept, unwanted], keeper.worker_id)
            hands = Hands()
            hands.take(kept)
            hands.take(unwanted)
            hands.waiting.add(kept)
            async with at_work(keeper.beat(hands)):
                await until(db, "SELECT FROM workers WHERE waiting = ARRAY[CAST(:id AS uuid)]", id=kept)
                await cancel(db, job_ids=[unwanted])
                assert await hands.stopped.get() == (unwanted, Cancelled())
                hands.draining = True
                await until(db, "SELECT FROM workers WHERE state = 'draining'")
            assert keeper.may_call(mine)

    play(database_url, story)


def test_a_worker_that_was_declared_dead_comes_back_under_a_new_id_and_lets_go_of_its_jobs(database_url, redis_url):
    async def story(db):
        async with a_keeper(database_url, redis_url) as keeper:
            before = keeper.worker_id
            (mine,) = await take(db, [await a_job(db)], before)
            await rows(db, "UPDATE workers SET state = 'dead'")
            async with at_work(keeper.beat(Hands())):
                await until(db, "SELECT FROM workers WHERE state = 'live'")
            states = {row.id: row.state for row in await rows(db, "SELECT id, state FROM workers")}
            assert states == {before: "dead", keeper.worker_id: "live"}
            assert not keeper.may_call(mine)  # somebody else has it

    play(database_url, story)


def test_a_job_under_its_name_that_it_does_not_hold_is_released_and_one_that_it_holds_is_not(database_url, redis_url):
    async def story(db):
        async with a_keeper(database_url, redis_url) as keeper:
            held, stray = await a_job(db), await a_job(db)
            await take(db, [held, stray], keeper.worker_id)
            hands = Hands()
            hands.take(held)
            async with at_work(keeper.beat(hands)):
                await until(db, "SELECT FROM jobs WHERE id = :id AND state = 'queued'", id=stray)
            assert (await job(db, held)).state == "running"

    play(database_url, story)


def test_a_job_not_held_at_one_beat_only_is_no_stray(database_url, redis_url):
    async def story(db):
        async with a_keeper(database_url, redis_url) as keeper, db.connect() as connection:
            job_id = await a_job(db)
            hands = Hands()
            for _ in range(3):
                await take(db, [job_id], keeper.worker_id)
                await keeper._beat_once(connection, hands)
                assert (await job(db, job_id)).state == "running"
                await rows(db, "UPDATE jobs SET state = 'queued', worker_id = NULL, dispatched_at = NULL")

    play(database_url, story)


def test_of_two_keepers_one_leads_and_the_other_follows_when_its_connection_is_cut(database_url, redis_url):
    async def story(db):
        keepers = a_keeper(database_url, redis_url), a_keeper(database_url, redis_url)
        async with keepers[0] as one, keepers[1] as other, at_work(one.lead(), other.lead()):
            first = await leader_pid(db)
            await rows(db, "SELECT pg_terminate_backend(:pid)", pid=first)
            assert await leader_pid(db, other_than=first) != first
            await a_batch(db, 20)
            await until(db, "SELECT FROM jobs WHERE dispatched_at IS NOT NULL HAVING count(*) = 20")

    play(database_url, story)


async def held_by_two(db):
    """Two workers, and the job that each of them holds."""
    workers = await a_worker(db), await a_worker(db)
    ids = [await a_job(db), await a_job(db)]
    for job_id, worker in zip(ids, workers, strict=True):
        await take(db, [job_id], worker)
    return ids, workers


async def speaking(db, worker):
    while True:
        await rows(db, "UPDATE workers SET seen_at = clock_timestamp() WHERE id = :id", id=worker)
        await asyncio.sleep(0.02)


def test_a_leader_mends_at_once_but_takes_nobody_for_dead_whose_heartbeat_is_only_old(database_url, redis_url):
    async def story(db):
        ids, _ = await held_by_two(db)
        await rows(db, "UPDATE workers SET seen_at = now() - interval '1 hour'")
        async with a_keeper(database_url, redis_url, heartbeat_ttl_s=60) as keeper, at_work(keeper.lead()):
            for _ in range(2):
                late = await a_job(db)
                await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = :id", id=late)
                await until(db, "SELECT FROM jobs WHERE id = :id AND state = 'expired'", id=late)
            assert [(await job(db, job_id)).state for job_id in ids] == ["running", "running"]

    play(database_url, story)


def test_a_leader_declares_dead_who_is_silent_for_a_ttl_and_rescues_its_jobs(database_url, redis_url):
    async def story(db):
        ids, (silent, heard) = await held_by_two(db)
        await rows(db, "UPDATE workers SET seen_at = now() + interval '1 hour' WHERE id = :id", id=silent)  # a clock that jumped
        async with a_keeper(database_url, redis_url, heartbeat_ttl_s=2) as keeper, at_work(keeper.lead(), speaking(db, heard)):
            await until(db, "SELECT FROM jobs WHERE id = :id AND state = 'queued'", id=ids[0])
            assert (await job(db, ids[1])).state == "running"
            known = {row.id: row.state for row in await rows(db, "SELECT id, state FROM workers")}
            assert (known[silent], known[heard]) == ("dead", "live")

    play(database_url, story)


def test_a_leader_whose_connection_gives_no_sign_of_life_loses_its_lock(database_url, redis_url):
    async def story(db):
        async with db.connect() as frozen, a_keeper(database_url, redis_url, heartbeat_ttl_s=0.3) as keeper:
            pid = (await rows(frozen, "SELECT pg_backend_pid() AS pid FROM pg_advisory_lock(:lock)", lock=LEADER_LOCK))[0].pid
            async with at_work(keeper.lead()):
                assert await leader_pid(db, other_than=pid) != pid
                await a_batch(db, 20)
                await until(db, "SELECT FROM jobs WHERE dispatched_at IS NOT NULL HAVING count(*) = 20")

    play(database_url, story)


def test_a_worker_that_retired_is_known_at_once_and_stays_dead_when_it_was(database_url, redis_url):
    async def story(db):
        async with a_keeper(database_url, redis_url) as keeper:
            await keeper.retire()
            assert [row.state for row in await rows(db, "SELECT state FROM workers")] == ["gone"]
            await rows(db, "UPDATE workers SET state = 'dead'")
            await keeper.retire()
            assert [row.state for row in await rows(db, "SELECT state FROM workers")] == ["dead"]

    play(database_url, story)


def test_packs_are_never_larger_than_what_a_worker_runs_at_once(database_url, redis_url):
    async def story(db):
        loop, published = asyncio.get_running_loop(), asyncio.Queue()

        class Bell(Mailbox):
            def publish(self, lane, delivery_id, job_ids):
                loop.call_soon_threadsafe(published.put_nowait, len(job_ids))

        async with a_keeper(database_url, redis_url, Bell(), bulk_slots=4) as keeper:
            await a_batch(db, 12)
            async with at_work(keeper.lead()):
                assert await published.get() == 4

    play(database_url, story)


def test_a_worker_that_cannot_reach_the_ledger_makes_no_new_call(database_url, redis_url, monkeypatch):
    async def story(db):
        async with a_keeper(database_url, redis_url, heartbeat_ttl_s=10) as keeper:
            (mine,) = await take(db, [await a_job(db)], keeper.worker_id)
            assert keeper.may_call(mine)
            seen_s = keeper._seen_s
            for silent_s, allowed in ((6.9, True), (7.1, False)):
                monkeypatch.setattr("time.monotonic", lambda silent_s=silent_s: seen_s + silent_s)
                assert keeper.may_call(mine) is allowed
            monkeypatch.undo()

    play(database_url, story)

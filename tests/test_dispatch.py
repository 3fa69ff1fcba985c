"""What is published, when, and in whose turn, against a real Postgres and a real Valkey."""

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import RedisError
from stage import HELLO, Mailbox, a_batch, a_job, a_worker, answered, ending, job, play, rows, take

from worker.dispatch import EPOCH_KEY, LOOKS, SUSPECTS, Dispatcher, queue_name, shares, withdraw
from worker.job import Lane
from worker.ledger import settle
from worker.rescue import MAX_DEATHS, rescue
from worker.submit import NewJob, submit
from worker.wiring import redis_client


@asynccontextmanager
async def a_leader(db, redis_url, mailbox, *, pack_size=10, dispatch_ttl_s=30.0):
    redis = redis_client(redis_url)
    async with db.connect() as connection:
        yield Dispatcher(connection, redis, mailbox.publish, pack_size=pack_size, dispatch_ttl_s=dispatch_ttl_s)
    await redis.aclose()


@asynccontextmanager
async def a_redis(redis_url):
    redis = redis_client(redis_url)
    yield redis
    await redis.aclose()


@given(
    free=st.integers(0, 300),
    batches=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), min_size=1, max_size=8),
)
def test_every_place_is_given_while_anybody_is_ready_and_nobody_gets_more_than_that(free, batches):
    ready, weights = dict(enumerate(r for r, _ in batches)), dict(enumerate(w for _, w in batches))
    ready = {batch: count for batch, count in ready.items() if count}
    given_ = shares(free, ready, weights, {})
    assert sum(given_.values()) == min(free, sum(ready.values()))
    assert all(given_[batch] <= count for batch, count in ready.items())


@settings(max_examples=50)
@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    rounds=st.lists(st.integers(1, 60), min_size=1, max_size=20),
)
def test_over_many_rounds_every_batch_gets_its_due_to_within_one_turn(weights, rounds):
    everyone = dict(enumerate(weights))
    paid, total = {}, Counter()
    for free in rounds:
        total.update(shares(free, dict.fromkeys(everyone, 10_000), everyone, paid))
    for one, weight in everyone.items():
        for other, weight_of_other in everyone.items():
            assert abs(total[one] / weight - total[other] / weight_of_other) <= 1 / weight + 1 / weight_of_other


def test_a_batch_that_comes_late_starts_level_with_the_others():
    paid = {}
    for _ in range(100):
        shares(10, {"old": 1000}, {"old": 1}, paid)
    assert shares(10, {"old": 1000, "new": 1000}, {"old": 1, "new": 1}, paid) == {"old": 5, "new": 5}


def test_the_window_is_filled_with_full_packs_and_never_exceeded(database_url, redis_url):
    async def story(db):
        await a_batch(db, 300)
        worker_id, mailbox = await a_worker(db, slots=100), Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert [await leader.tick() for _ in range(3)] == [100, 0, 0]
            assert {len(ids) for _, _, ids in mailbox.messages} == {10}
            await take(db, mailbox.messages[0][2] + mailbox.messages[1][2][:5], worker_id)
            assert await leader.tick() == 10  # room for 15, and packs are of 10
            for _, _, ids in list(mailbox.messages):
                await take(db, ids, worker_id)
                await leader.tick()
                (window,) = await rows(db, "SELECT count(*) AS n FROM jobs WHERE state = 'queued' AND dispatched_at IS NOT NULL")
                assert window.n <= 100
        published = [job_id for _, _, ids in mailbox.messages for job_id in ids]
        assert len(published) == len(set(published))

    play(database_url, story)


def test_a_small_batch_is_published_at_once_beside_a_large_one_and_nothing_is_wasted(database_url, redis_url):
    async def story(db):
        _, large = await a_batch(db, 10_000, "large")
        _, small = await a_batch(db, 10, "small")
        await a_worker(db, slots=100)
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 100
        published = {job_id for _, _, ids in mailbox.messages for job_id in ids}
        assert published == set(small) | set(large[:90])

    play(database_url, story)


def test_loose_jobs_get_their_share_and_all_of_it_when_they_are_alone(database_url, redis_url):
    async def story(db):
        loose = [await a_job(db) for _ in range(30)]
        await a_worker(db, slots=20)
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 20
            assert [job_id for _, _, ids in mailbox.messages for job_id in ids] == loose[:20]
            await rows(db, "UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE dispatched_at IS NOT NULL")
            await a_batch(db, 50)
            assert await leader.tick() == 20
        assert len([job_id for _, _, ids in mailbox.messages[2:] for job_id in ids if job_id in loose]) == 10

    play(database_url, story)


def test_what_is_due_first_is_published_first_and_what_is_not_due_not_at_all(database_url, redis_url):
    async def story(db):
        ids = [await a_job(db, lane=Lane.INTERACTIVE) for _ in range(6)]
        for minutes, job_id in enumerate(ids):
            sql = "UPDATE jobs SET dispatched_at = NULL, run_at = now() - make_interval(mins => :m) WHERE id = :id"
            await rows(db, sql, m=minutes, id=job_id)
        await rows(db, "UPDATE jobs SET run_at = now() + interval '1 minute' WHERE id = :id", id=ids[2])
        await rows(db, "UPDATE jobs SET deadline_at = now() WHERE id = :id", id=ids[4])
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 4
        assert [pack for _, _, pack in mailbox.messages] == [[ids[5]], [ids[3]], [ids[1]], [ids[0]]]

    play(database_url, story)


def test_a_lane_that_this_version_does_not_know_is_left_alone(database_url, redis_url):
    async def story(db):
        await rows(db, "INSERT INTO lanes (name) VALUES ('express')")
        await a_batch(db, 10)
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 10

    play(database_url, story)


async def _in_flight(db):
    sql = "SELECT deaths, count(*) AS n FROM jobs WHERE state = 'running' OR dispatched_at IS NOT NULL GROUP BY deaths ORDER BY deaths"
    return {row.deaths: row.n for row in await rows(db, sql)}


def test_of_jobs_over_which_workers_died_few_are_in_flight_and_of_the_worst_one(database_url, redis_url):
    async def story(db):
        _, ids = await a_batch(db, 60)
        for deaths, some in {1: ids[:15], 2: ids[15:30], 3: ids[30:45]}.items():
            await rows(db, "UPDATE jobs SET deaths = :deaths WHERE id = ANY(:ids)", deaths=deaths, ids=some)
        await a_worker(db, slots=100)
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 15 + 15 + SUSPECTS + 1
            assert await _in_flight(db) == {0: 15, 1: 15, 2: SUSPECTS, 3: 1}
            claims = await take(db, [job_id for _, _, packed in mailbox.messages for job_id in packed])
            assert await leader.tick() == 0  # those that run keep their places
            suspects = [claimed for claimed in claims if claimed.job_id in ids[15:]]
            await settle(db, [ending(claimed) for claimed in suspects[1:]])
            await leader.tick()
            assert await _in_flight(db) == {1: 15, 2: 1 + 15 - SUSPECTS, 3: 1}

    play(database_url, story)


def test_a_suspect_in_a_paused_lane_takes_no_place_from_others(database_url, redis_url):
    async def story(db):
        for lane in Lane:
            job_id = await a_job(db, lane=lane)
            await rows(db, "UPDATE jobs SET deaths = 3, dispatched_at = NULL WHERE id = :id", id=job_id)
        await rows(db, "UPDATE lanes SET paused = true WHERE name = 'interactive'")
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 1

    play(database_url, story)


def test_one_job_that_kills_every_worker_ends_alone(database_url, redis_url):
    """A fleet of workers that hold all there is; whoever holds the poison dies. The others' jobs are all answered."""

    async def story(db):
        _, ids = await a_batch(db, 80)
        poison, mailbox, funerals = ids[37], Mailbox(), 0
        async with a_leader(db, redis_url, mailbox) as leader, db.connect() as mender:
            while (await job(db, poison)).state != "failed":
                worker = await a_worker(db, slots=40)
                await leader.tick()
                claims = await take(db, [job_id for _, _, packed in mailbox.messages for job_id in packed], worker)
                mailbox.messages.clear()
                if poison in [claimed.job_id for claimed in claims]:
                    funerals += 1
                    await rows(db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=worker)
                    await rescue(mender)
                else:
                    assert claims
                    assert all(await settle(db, [answered(claimed) for claimed in claims]))
            assert (await job(db, poison)).error["code"] == "worker_died"
            assert funerals == MAX_DEATHS
            while await leader.tick():
                claims = await take(db, [job_id for _, _, packed in mailbox.messages for job_id in packed])
                mailbox.messages.clear()
                assert all(await settle(db, [answered(claimed) for claimed in claims]))
        assert [row.id for row in await rows(db, "SELECT id FROM jobs WHERE state <> 'succeeded'")] == [poison]

    play(database_url, story)


def test_a_paused_lane_is_left_alone(database_url, redis_url):
    async def story(db):
        await a_job(db)
        await rows(db, "UPDATE lanes SET paused = true WHERE name = 'bulk'")
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader:
            assert await leader.tick() == 0
            await rows(db, "UPDATE lanes SET paused = false")
            assert await leader.tick() == 1

    play(database_url, story)


def test_what_is_published_is_in_the_ledger_before(database_url, redis_url):
    async def story(db):
        job_id = await a_job(db)
        loop = asyncio.get_running_loop()
        seen = []

        class Witness(Mailbox):
            def publish(self, lane, delivery_id, job_ids):
                stored = asyncio.run_coroutine_threadsafe(job(db, job_ids[0]), loop).result()
                seen.append((stored.delivery_id == delivery_id, stored.dispatched_at is not None))

        async with a_leader(db, redis_url, Witness()) as leader:
            await leader.tick()
        assert seen == [(True, True)]
        assert (await job(db, job_id)).state == "queued"

    play(database_url, story)


def test_what_could_not_be_published_is_withdrawn_and_published_later(database_url, redis_url):
    async def story(db):
        await a_batch(db, 40)
        await a_worker(db, slots=40)
        mailbox = Mailbox(broken=True)
        async with a_leader(db, redis_url, mailbox) as leader:
            with pytest.raises(RedisError):
                await leader.tick()
            assert await rows(db, "SELECT id FROM jobs WHERE dispatched_at IS NOT NULL") == []
            mailbox.broken = False
            assert await leader.tick() == 40

    play(database_url, story)


@pytest.mark.parametrize("loss", ["epoch", "everything"])
def test_a_redis_that_lost_its_memory_gets_everything_again(database_url, redis_url, loss):
    async def story(db):
        await a_batch(db, 20)
        await a_worker(db, slots=20)
        mailbox = Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader, a_redis(redis_url) as redis:
            assert [await leader.tick() for _ in range(2)] == [20, 0]
            await (redis.delete(EPOCH_KEY) if loss == "epoch" else redis.flushall())
            assert [await leader.tick() for _ in range(2)] == [20, 0]

    play(database_url, story)


def test_a_new_leader_publishes_again_what_it_did_not_publish_itself(database_url, redis_url):
    async def story(db):
        await a_batch(db, 20)
        await a_worker(db, slots=20)
        for _ in range(2):
            async with a_leader(db, redis_url, Mailbox()) as leader:
                assert [await leader.tick() for _ in range(2)] == [20, 0]

    play(database_url, story)


async def _age(db, seconds):
    await rows(db, "UPDATE jobs SET dispatched_at = dispatched_at - make_interval(secs => :s)", s=seconds)


def test_messages_of_a_queue_that_was_deleted_are_missed_after_two_looks(database_url, redis_url):
    async def story(db):
        await a_batch(db, 20)
        worker_id, mailbox = await a_worker(db, slots=20), Mailbox()
        async with a_leader(db, redis_url, mailbox) as leader, a_redis(redis_url) as redis:
            await leader.tick()
            await _age(db, 4)
            waiting = mailbox.messages[0][1]
            await rows(db, "UPDATE workers SET waiting = ARRAY[CAST(:d AS uuid)] WHERE id = :id", d=waiting, id=worker_id)
            await redis.lpush(queue_name(Lane.BULK), "a message")
            for _ in range(LOOKS + 1):
                await leader.look_for_losses()
            assert await leader.tick() == 0
            await redis.delete(queue_name(Lane.BULK))
            for _ in range(LOOKS - 1):
                await leader.look_for_losses()
                assert await leader.tick() == 0
            await leader.look_for_losses()
            assert await leader.tick() == 10
        assert not set(mailbox.messages[2][2]) & set(mailbox.messages[0][2])

    play(database_url, story)


def test_what_nobody_claimed_for_the_dispatch_ttl_is_published_again(database_url, redis_url):
    async def story(db):
        await a_job(db)
        async with a_leader(db, redis_url, Mailbox(), dispatch_ttl_s=30) as leader, a_redis(redis_url) as redis:
            await redis.lpush(queue_name(Lane.BULK), "a message")
            assert await leader.tick() == 1
            for age_s, published in ((29, 0), (2, 1)):
                await _age(db, age_s)
                await leader.look_for_losses()
                assert await leader.tick() == published

    play(database_url, story)


def test_losses_are_looked_for_by_the_tick_itself(database_url, redis_url, monkeypatch):
    async def story(db):
        await a_job(db)
        async with a_leader(db, redis_url, Mailbox(), dispatch_ttl_s=1) as leader:
            await leader.tick()
            await _age(db, 5)
            now_s = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now_s + 2)
            assert [await leader.tick(), await leader.tick()] == [0, 1]

    play(database_url, story)


def test_a_withdrawal_passes_by_what_is_claimed(database_url):
    async def story(db):
        mailbox = Mailbox()
        ids = [(await submit(db, mailbox.publish, NewJob(request=HELLO))).job_id for _ in range(2)]
        await take(db, ids[:1])
        await withdraw(db, ids)
        assert [((await job(db, i)).state, (await job(db, i)).dispatched_at) for i in ids[1:]] == [("queued", None)]
        assert (await job(db, ids[0])).state == "running"

    play(database_url, story)

"""Redis forgets, dies, freezes, is full, refuses or cannot be reached: nothing is lost and no request is sent twice.

Faults of the table held here: 6 to 15 for Redis, its password changed, and 39.

Of 9, what Celery keeps beside the queues goes together with all keys but the epoch. Left out: of 10 DEBUG SLEEP, to clients the same as
SIGSTOP; of 14 a silence that outlasts Celery's own limit (20 s); of 15 the lost reply to a BRPOP alone, which is lost with all others
by a Redis that obeys in silence.
"""

import asyncio
import signal
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from fleet import start
from redis.exceptions import RedisError

from worker.dispatch import EPOCH_KEY, queue_name
from worker.job import Lane

JOBS = 200
SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}
BULK = queue_name(Lane.BULK)
PATIENT = {"BACKSTOP_HEARTBEAT_TTL_S": "60"}  # a worker that is stopped for a moment is not dead
ROOMY = {"BACKSTOP_BULK_SLOTS": "300"}  # whatever comes runs at once
# Three messages at a time, which fill its slots: what is published beyond that waits in Redis.
UNHURRIED = {"BACKSTOP_PACK_SIZE": "30", "BACKSTOP_INTERACTIVE_SLOTS": "1"}


async def under_load(lab, **how):
    """A worker in its stride, and it alone: whatever ends later has gone through it."""
    (worker,) = await lab.workers("worker", **how)
    await lab.submit_batch(JOBS)
    await lab.until_ended(20)
    return worker


async def two_roles(lab):
    """A leader that takes no bulk jobs, and a worker that takes nothing else, in its stride."""
    (leader,) = await lab.workers("leader", lanes=[Lane.INTERACTIVE])
    await lab.until_true(lambda: leader.said("leading"))
    (consumer,) = await lab.workers("consumer", lanes=[Lane.BULK], environment=UNHURRIED)
    await lab.submit_batch(JOBS)
    await lab.until_ended(20)
    return leader, consumer


@asynccontextmanager
async def messages_waiting(lab, consumer, *, more=0):
    """Messages lie in the queue, and nobody takes one. `more` jobs are submitted for it, where there may be none left."""
    consumer.freeze()
    if more:
        await lab.submit_batch(more)
    await until(lambda: lab.redis.llen(BULK))
    yield
    consumer.thaw()


@asynccontextmanager
async def answers_under_way(lab, worker):
    """It is stopped while it waits for answers: going on, it has to tell Redis how they were."""
    await lab.until_true(lambda: any(totals.unfinished for totals in lab.bill.totals().values()))
    worker.freeze()
    yield
    worker.thaw()


async def until(look):
    """Redis says what is looked for; one that is away is waited for."""
    async with asyncio.timeout(60):
        while True:
            with suppress(RedisError):
                if await look():
                    return
            await asyncio.sleep(0.01)


async def missed_by(lab, worker, fault=None):
    """The leader waits for Redis, and the gates go on without it; in a full one they still find room, for they take some away first."""
    await lab.until_true(lambda: (fault is full or worker.said("coordination_lost")) and worker.said("dispatch_waits"))


async def accepted_meanwhile(lab):
    """Jobs are taken without Redis: a person's, and a file."""
    await asyncio.gather(lab.submit_one("meanwhile"), lab.submit_batch(20))


async def each_was_answered_once(lab, *workers):
    """So were the jobs that came afterwards, in both lanes, by the same processes, which nobody ever held dead."""
    await lab.all_ended()
    await lab.submit_batch(20)
    await lab.submit_one("afterwards")
    await lab.assert_sound()
    (jobs,) = await lab.rows("SELECT count(*) AS n, count(*) FILTER (WHERE state = 'succeeded') AS succeeded FROM jobs")
    assert len(lab.bill) == jobs.succeeded == jobs.n
    for worker in workers:
        assert worker.alive()
        assert len(await worker.ids()) == 1


def test_a_redis_that_forgets_everything_while_nothing_happens_is_told_its_epoch_again(laboratory):
    async def story(lab):
        (worker,) = await lab.workers("worker")
        await until(lambda: lab.redis.get(EPOCH_KEY))
        async with lab.fault("flushall"):
            await lab.redis.flushall()
        await until(lambda: lab.redis.get(EPOCH_KEY))
        await each_was_answered_once(lab, worker)

    laboratory(story)


def test_messages_that_redis_forgets_over_and_over_are_published_again(laboratory):
    async def story(lab):
        leader, consumer = await two_roles(lab)
        for already in (40, 80, 120):
            await lab.until_ended(already)
            async with messages_waiting(lab, consumer), lab.fault("flushall"):
                await lab.redis.flushall()
        await each_was_answered_once(lab, leader, consumer)
        assert leader.said('"new epoch"')

    laboratory(story, script=SLOW, environment=PATIENT)


def test_a_redis_that_forgets_everything_while_the_leader_publishes_costs_no_call(laboratory):
    async def story(lab):
        plan = {"after_dispatch_commit": 2, "before_publish": 8, "after_publish": 14}
        worker = await lab.worker("worker", failing=",".join(f"{point}:stop@{n}" for point, n in plan.items()))
        await worker.live()
        await lab.submit_batch(JOBS)
        for point in plan:
            await lab.until_true(lambda point=point: worker.said(f"failed {point} stop"))
            async with lab.fault(f"flushall {point}"):
                await lab.redis.flushall()
            worker.thaw()
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW, environment=PATIENT)


def test_jobs_are_accepted_while_redis_is_down_and_answered_once_it_is_back_empty(laboratory):
    async def story(lab):
        worker = await under_load(lab)
        async with lab.fault("down"):
            async with answers_under_way(lab, worker):
                await lab.valkey.stop()
            await missed_by(lab, worker)
            await accepted_meanwhile(lab)
            await lab.valkey.start()
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW, environment=PATIENT)


def test_a_redis_that_goes_whenever_it_was_found_again_holds_up_but_loses_nothing(laboratory):
    async def story(lab):
        worker = await under_load(lab)
        for _ in range(4):
            async with lab.fault("flapping"):
                lab.valkey.kill()
                await lab.valkey.start()
            await until(lambda: lab.redis.get(EPOCH_KEY))
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW)


async def remember(lab):
    """What Redis holds now is what `back_then` brings back."""
    await lab.redis.save()
    data = lab.valkey.recipe.home / "data"
    (data / "dump.rdb").rename(data / "older.rdb")  # where no later server finds it by itself


async def back_then(lab):
    async with lab.fault("older snapshot"):
        lab.valkey.kill()
        await lab.valkey.start(dbfilename="older.rdb")


def test_a_redis_that_comes_back_as_it_was_before_the_workers_brings_messages_that_match_nothing(laboratory):
    async def story(lab):
        _, ids = await lab.submit_batch(JOBS)
        for first in range(0, JOBS, 10):
            await lab.deliver(ids[first : first + 10])
        await remember(lab)
        (worker,) = await lab.workers("worker")
        await lab.until_ended(JOBS // 2)
        await back_then(lab)
        await each_was_answered_once(lab, worker)
        assert worker.said('"new epoch"')

    laboratory(story, script=SLOW)


def test_a_redis_that_comes_back_with_the_right_epoch_and_old_messages_is_not_believed_either(laboratory):
    async def story(lab):
        leader, consumer = await two_roles(lab)
        async with messages_waiting(lab, consumer):
            await remember(lab)
        await lab.until_ended(JOBS // 2)
        async with messages_waiting(lab, consumer):
            await back_then(lab)
        await each_was_answered_once(lab, leader, consumer)
        assert not leader.said('"new epoch"')

    laboratory(story, script=SLOW, environment=PATIENT)


def test_a_queue_an_epoch_and_all_but_the_epoch_may_be_deleted_under_load(laboratory):
    async def story(lab):
        leader, consumer = await two_roles(lab)
        async with messages_waiting(lab, consumer, more=50), lab.fault("queue deleted"):
            assert await lab.redis.delete(BULK) == 1
        await lab.until_true(lambda: leader.said('"message lost"'))
        async with messages_waiting(lab, consumer, more=50), lab.fault("epoch deleted"):
            assert await lab.redis.delete(EPOCH_KEY) == 1
        await lab.until_true(lambda: leader.said('"new epoch"'))
        async with messages_waiting(lab, consumer, more=50), lab.fault("all but the epoch deleted"):
            assert await lab.redis.delete(*{key async for key in lab.redis.scan_iter()} - {EPOCH_KEY.encode()}) > 1
        await each_was_answered_once(lab, leader, consumer)

    laboratory(story, script=SLOW, environment=PATIENT)


@asynccontextmanager
async def frozen(lab):
    lab.valkey.freeze()
    yield
    lab.valkey.thaw()


@asynccontextmanager
async def paused(lab):
    """Reads are answered, writes wait."""
    await lab.redis.client_pause(600_000, all=False)
    yield
    await lab.redis.client_unpause()


@asynccontextmanager
async def full(lab):
    await lab.redis.config_set("maxmemory", 1)
    yield
    await lab.redis.config_set("maxmemory", 0)


@asynccontextmanager
async def read_only(lab):
    await lab.redis.replicaof("127.0.0.1", 1)  # where nobody listens
    yield
    await lab.redis.replicaof("NO", "ONE")


@asynccontextmanager
async def silent(lab):
    lab.valkey.proxy.blackhole()
    yield
    await lab.valkey.proxy.thaw()


@asynccontextmanager
async def obeying_in_silence(lab):
    """What was asked for is done, and whoever asked never hears of it."""
    lab.valkey.proxy.deafen()
    yield
    lab.valkey.proxy.reset()
    await lab.valkey.proxy.thaw()


@asynccontextmanager
async def locked(lab):
    """The password was changed, and whoever knew the old one was sent away."""
    async with lab.redis.client() as operator:
        known = (await operator.config_get("requirepass"))["requirepass"]
        await operator.config_set("requirepass", "another")
        await operator.client_kill_filter(_type="normal")
        yield
        await operator.config_set("requirepass", known)


@pytest.mark.parametrize("fault", [frozen, paused, full, read_only, silent, obeying_in_silence, locked])
def test_a_redis_of_no_use_for_a_while_stops_neither_workers_nor_those_who_submit(laboratory, fault):
    async def story(lab):
        worker = await under_load(lab)
        async with lab.fault(fault.__name__), AsyncExitStack() as heals:
            async with answers_under_way(lab, worker):
                await heals.enter_async_context(fault(lab))
            await missed_by(lab, worker, fault)
            await accepted_meanwhile(lab)
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW, environment=PATIENT)


def test_what_the_dead_held_is_rescued_although_redis_is_frozen(laboratory):
    async def story(lab):
        (survivor,) = await lab.workers("survivor")
        (victim,) = await lab.workers("victim")
        await lab.submit_batch(JOBS)
        await lab.until("SELECT FROM jobs WHERE worker_id = (SELECT id FROM workers WHERE pid = :pid)", pid=victim.pid)
        async with lab.fault("frozen"), frozen(lab):
            await victim.kill()
            await lab.until_true(lambda: survivor.said('"rescued"'))
        await lab.assert_sound()
        assert survivor.alive()

    laboratory(story, script=SLOW)


@pytest.mark.parametrize("kind", ["normal", "pubsub"])
def test_connections_that_are_killed_whenever_they_are_back_cost_no_call(laboratory, kind):
    async def story(lab):
        worker = await under_load(lab)

        async def are_back():
            """The worker waits for messages, or listens to its operators."""
            return any(kind == "pubsub" or client["cmd"] == "brpop" for client in await lab.redis.client_list(kind))

        for _ in range(5):
            await until(are_back)
            async with lab.fault(f"{kind} connections killed"):
                await lab.redis.client_kill_filter(_type=kind)
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW)


def test_a_message_whose_reply_was_lost_is_sent_twice_and_obeyed_once(laboratory):
    async def story(lab):
        leader, consumer = await lab.workers("leader", lanes=[Lane.INTERACTIVE]), await lab.workers("consumer", lanes=[Lane.BULK])
        workers = [*leader, *consumer]
        await each_was_answered_once(lab, *workers)
        consumer[0].freeze()
        lost = lab.valkey.proxy.lose_reply(b"LPUSH")
        await lab.submit_batch(50)
        await lost.wait()
        await until(lambda: twice(lab))
        consumer[0].thaw()
        await lab.all_ended()
        lost = lab.valkey.proxy.lose_reply(b"LPUSH")  # of a producer's own message
        await lab.submit_one()
        assert lost.is_set()
        await each_was_answered_once(lab, *workers)

    async def twice(lab):
        return await lab.redis.llen(BULK) > 5

    laboratory(story, script=SLOW, environment=PATIENT | ROOMY)


def test_messages_that_come_again_while_their_jobs_run_match_nothing(laboratory):
    async def story(lab):
        (worker,) = await lab.workers("worker")
        _, ids = await lab.submit_batch(50)
        await lab.until_asked(50)
        for first in range(0, 50, 10):
            await lab.deliver(ids[first : first + 10])
        await each_was_answered_once(lab, worker)

    laboratory(story, script={"providers": {"first": {"model": "sim", "latency": {"ms": 2000}}}}, environment=ROOMY)


def test_flower_may_come_freeze_and_go(laboratory, tmp_path):
    async def story(lab):
        arguments = ["-m", "celery", "-A", "worker.app", "flower", "--address=127.0.0.1", "--port=0"]
        flower = await start(arguments, lab.environment, tmp_path / "flower.log")
        try:
            await until(lab.redis.pubsub_numpat)  # it listens
            worker = await under_load(lab)
            flower.send_signal(signal.SIGSTOP)
            await lab.until_ended(JOBS // 2)
            flower.send_signal(signal.SIGCONT)
        finally:
            flower.kill()
            await flower.wait()
        await each_was_answered_once(lab, worker)

    laboratory(story, script=SLOW)

"""Leaders die, freeze and are cut off, loops stand still, whole fleets are restarted, and a job kills whoever touches it.

Faults of the table held here: 3 ghosts, 4 the leader's death, 5 two leaders, 20 deadlocks and serialization failures, 22 a loop that
stands still and goes on, 26 rolling restarts, 27 a stop with a hung call, 33 what people do in Flower, 35 and 36 poison.

Left out: the messages and jobs of other versions (37), in `test_messages` and `test_ledger`; of 22 a loop that never goes on, whose
process ends itself after so long that a test would only wait: `test_loop` has the watch that finds it; of 20 the SQLSTATEs at other
statements than a worker's own, whose loops begin anew after any error of Postgres.
"""

import asyncio

import pytest
from celery import Celery
from stage import batch, job, results

from worker import intervene
from worker.app import DELIVERY
from worker.dispatch import queue_name
from worker.job import Lane
from worker.keeper import LEADER_LOCK
from worker.rescue import MAX_DEATHS

JOBS = 200
SLOTS = 30  # of each worker in the lab
BULK = queue_name(Lane.BULK)
SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}
VERY_SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 500}}}}
PATIENT = {"providers.first": {"timeout_s": 300}}  # only what a test does ends a call early

LEADS = """
SELECT a.pid FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.objid = :lock AND l.granted AND a.datname = current_database()
"""


async def a_leader(lab, **how):
    """It takes no bulk jobs: what befalls it kills no call."""
    (leader,) = await lab.workers("leader", lanes=[Lane.INTERACTIVE], **how)
    await lab.until_true(lambda: leader.said("leading"))
    return leader


async def each_was_asked_once(lab, jobs=JOBS):
    await lab.assert_sound()
    assert len(await lab.rows("SELECT FROM results")) == jobs
    assert len(lab.bill) == jobs


def under_way(lab):
    return sum(totals.unfinished for totals in lab.bill.totals().values())


def test_a_ghost_that_comes_back_is_refused_and_its_calls_are_paid_for_all_the_same(laboratory):
    async def story(lab):
        (ghost,) = await lab.workers("ghost")
        opened, _ = await lab.submit_batch(JOBS)
        await lab.until_true(lambda: under_way(lab) >= SLOTS)
        ghost.freeze()
        (other,) = await lab.workers("other")  # a leader that is frozen loses its lock
        await ghost.outlived()
        (note,) = lab.history.events("killed")
        await lab.until("SELECT FROM jobs WHERE finished_at IS NOT NULL HAVING count(*) = :jobs", jobs=JOBS)
        ghost.thaw()
        await lab.until_true(lambda: ghost.said("settle_refused"))
        await ghost.live()
        await lab.assert_sound()
        assert other.said("leading")
        assert ghost.said("declared_dead")
        assert (await batch(lab.db, opened.id)).succeeded == len(await lab.rows("SELECT FROM results")) == JOBS
        late = "SELECT c.* FROM provider_calls c JOIN results r ON r.job_id = c.job_id WHERE c.fence < r.fence AND c.billing = 'billed'"
        booked = await lab.rows(late)
        assert len(booked) > 0
        assert all(row.cost_usd > 0 for row in booked)
        assert {str(row.job_id) for row in booked} <= set(note["held"])

    laboratory(story, script=VERY_SLOW, config=PATIENT)


def test_what_a_ghost_had_been_answered_is_not_bought_again(laboratory):
    async def story(lab):
        leader = await a_leader(lab)
        (ghost,) = await lab.workers("ghost", lanes=[Lane.BULK])
        await lab.submit_batch(SLOTS)
        await lab.until_true(lambda: under_way(lab) == SLOTS)
        await ghost.freeze_until_dead()
        await lab.until("SELECT WHERE NOT EXISTS (SELECT FROM jobs WHERE state = 'running')")
        ghost.thaw()
        await each_was_asked_once(lab, SLOTS)
        assert ghost.said("settle_refused")
        assert len(await lab.rows("SELECT FROM jobs WHERE fence > 1 AND deaths = 1")) == SLOTS
        assert leader.alive()

    laboratory(story, script=VERY_SLOW, config=PATIENT)


@pytest.mark.parametrize("point", ["after_dispatch_commit:kill@3", "before_publish:kill@5", "after_publish:kill@5", "before_beat:kill@25"])
def test_a_leader_that_dies_while_it_publishes_loses_no_job_and_repeats_no_call(laboratory, point):
    async def story(lab):
        leader = await a_leader(lab, failing=point)
        consumer = await lab.worker("consumer", lanes=[Lane.BULK])
        await lab.submit_batch(JOBS)
        assert await leader.ended() == -9
        assert lab.history.events("killed")[0]["held"] == []
        await each_was_asked_once(lab)
        await lab.until_true(lambda: consumer.said("leading"))

    laboratory(story, script=SLOW)


def test_a_leader_that_dies_before_it_rescues_whom_it_buried_leaves_that_to_the_next(laboratory):
    async def story(lab):
        (killed,) = await lab.workers("killed")
        await lab.submit_batch(JOBS)
        await lab.until_ended(20)
        await killed.kill()
        held = await killed.holds()
        await lab.rows("UPDATE workers SET state = 'dead'")
        leader = await lab.worker("leader", failing="in_rescue:kill")
        assert await leader.ended() == -9
        assert set(await killed.holds()) == set(held) != set()
        await lab.workers("next")
        await lab.assert_sound()
        assert len(lab.bill) - JOBS <= len(held)

    laboratory(story, script=SLOW)


def test_a_leadership_that_is_cut_off_again_and_again_fills_no_window_twice(laboratory):
    async def story(lab):
        workers = await lab.workers("one", "two")
        await lab.submit_batch(JOBS * 2)
        for already in (40, 120, 200):
            await lab.until_ended(already)
            (leader,) = await lab.until(LEADS, lock=LEADER_LOCK)
            async with lab.fault("leader cut off"):
                await lab.rows("SELECT pg_terminate_backend(:pid)", pid=leader.pid)
            await lab.until(f"{LEADS} AND a.pid <> :before", lock=LEADER_LOCK, before=leader.pid)
            (window,) = await lab.rows("SELECT count(*) AS jobs FROM jobs WHERE state = 'queued' AND dispatched_at IS NOT NULL")
            assert window.jobs <= 2 * len(workers) * SLOTS
        await each_was_asked_once(lab, JOBS * 2)
        assert any(worker.said("leadership_lost") for worker in workers)
        assert all([worker.alive() and len(await worker.ids()) == 1 for worker in workers])

    laboratory(story, script=SLOW)


def test_a_leader_that_is_frozen_loses_its_office_and_comes_back_without_it(laboratory):
    async def story(lab):
        leader = await a_leader(lab)
        (consumer,) = await lab.workers("consumer", lanes=[Lane.BULK])
        await lab.submit_batch(JOBS)
        await lab.until_ended(20)
        async with lab.fault("leader frozen"):
            await leader.freeze_until_dead()
        assert consumer.said("leading")
        await lab.submit_batch(JOBS)
        leader.thaw()
        await lab.until_true(lambda: leader.said("leadership_lost") and leader.said("declared_dead"))
        await each_was_asked_once(lab, 2 * JOBS)
        assert leader.alive()

    laboratory(story, script=SLOW)


def test_deadlocks_and_serialization_failures_cost_time_and_no_call(laboratory):
    plan = [
        "before_statement:raise:40P01@2",
        "before_claim:raise:40001@3",
        "after_claim:raise:40001@5",
        "before_settle:raise:40P01@2",
        "before_settle:raise:40001@4",
        "after_settle:raise:40001@6",
    ]

    async def story(lab):
        (worker,) = await lab.workers("worker", failing=",".join(plan))
        await lab.submit_batch(JOBS)
        await each_was_asked_once(lab)
        assert [one for one in plan if not worker.said(f"failed {one.replace(':', ' ', 1).partition('@')[0]}")] == []
        assert worker.said("strays_released")
        assert len(await worker.ids()) == 1

    laboratory(story, script=SLOW)


def test_a_worker_whose_loop_stands_still_is_given_up_and_comes_back_as_another(laboratory):
    async def story(lab):
        await a_leader(lab)
        (blocked,) = await lab.workers("blocked", lanes=[Lane.BULK], failing="after_request:block:8@20")
        await lab.submit_batch(JOBS)
        await lab.until_true(lambda: blocked.said("failed after_request"))
        await blocked.outlived()
        await lab.workers("other")
        await blocked.live()
        await lab.assert_sound()
        assert blocked.said("declared_dead")
        assert len(await blocked.ids()) == 2
        assert len(await lab.rows("SELECT FROM results")) == JOBS

    laboratory(story, script=SLOW, config=PATIENT)


def test_a_fleet_that_is_restarted_under_load_repeats_no_call(laboratory):
    async def story(lab):
        enough = asyncio.Event()
        feeding = asyncio.create_task(fed(lab, enough))
        first = await lab.workers("a1", "b1", "c1")
        await lab.until_ended(50)
        second = []
        for old, name in zip(first, ("a2", "b2", "c2"), strict=True):  # one after the other
            second += await lab.workers(name)
            assert await retired(lab, old) == [0]
        await lab.until("SELECT FROM jobs WHERE state = 'running' HAVING count(*) > 0")
        third = await lab.workers("a3", "b3", "c3")
        assert await retired(lab, *second) == [0, 0, 0]  # all at once
        enough.set()
        jobs = await feeding
        await each_was_asked_once(lab, jobs)
        assert lab.history.events("killed") == []
        assert await lab.rows("SELECT FROM provider_calls WHERE outcome <> 'answered'") == []
        assert all(worker.alive() for worker in third)

    laboratory(story, script={"providers": {"first": {"model": "sim", "latency": {"ms": 1000}}}}, config=PATIENT)


async def fed(lab, enough):
    """Until it is enough there is always work; how many jobs that were."""
    jobs = 0
    while not enough.is_set():
        await lab.submit_batch(100)
        jobs += 100
        await lab.until("SELECT FROM jobs WHERE state = 'queued' HAVING count(*) < 100")
    return jobs


async def retired(lab, *workers):
    """Their exit codes. Each of them held jobs when it was told to stop."""
    for worker in workers:
        await lab.until("SELECT FROM jobs j JOIN workers w ON w.id = j.worker_id WHERE w.pid = :pid", pid=worker.pid)
    for worker in workers:
        worker.terminate()
    return [await worker.ended() for worker in workers]


def test_a_call_that_hangs_does_not_keep_a_worker_from_stopping(laboratory):
    hangs = {"kind": "hang", "seconds": 300, "to_request": 6}

    async def story(lab):
        (stopped,) = await lab.workers("stopped")
        await lab.submit_batch(5)
        await lab.until_asked(5)
        other = await lab.worker("other")
        await other.live()
        stopped.terminate()
        assert await stopped.ended() == 0
        await lab.assert_sound()
        hung = await lab.rows("SELECT * FROM provider_calls WHERE fence = 1")
        assert [(row.outcome, row.billing, row.cost_usd) for row in hung] == [("cancelled", "unknown", None)] * 5
        assert len(await lab.rows("SELECT FROM jobs WHERE state = 'succeeded' AND fence = 2 AND attempts = 0 AND deaths = 0")) == 5
        assert len(lab.bill) == 10

    script = {"providers": {"first": {"model": "sim", "outages": [hangs]}}}
    laboratory(story, script=script, config=PATIENT, environment={"BACKSTOP_DRAIN_S": "0.5"})


async def by_flower(lab, command, *args, **kwargs):
    """A command to the workers, as Flower sends it."""

    def send():
        with Celery("flower", broker=lab.environment["REDIS_URL"], set_as_current=False) as flower:
            flower.conf.update(DELIVERY)
            return getattr(flower.control, command)(*args, **kwargs)

    return await asyncio.to_thread(send)


def test_a_message_that_is_revoked_in_flower_is_cancelled_and_no_other(laboratory):
    async def story(lab):
        await lab.workers("worker")
        await lab.submit_batch(SLOTS * 2)
        await lab.until_true(lambda: under_way(lab) >= SLOTS)
        (chosen, *_) = await lab.rows("SELECT delivery_id FROM jobs WHERE state = 'running' ORDER BY id")
        await by_flower(lab, "revoke", str(chosen.delivery_id))
        await lab.assert_sound()
        ended = await lab.rows(
            "SELECT state, delivery_id = :chosen AS chosen, count(*) AS n FROM jobs GROUP BY 1, 2", chosen=chosen.delivery_id
        )
        assert {(row.state, row.chosen): row.n for row in ended} == {("cancelled", True): 10, ("succeeded", False): SLOTS * 2 - 10}

    laboratory(story, script={"providers": {"first": {"model": "sim", "latency": {"ms": 3000}}}}, config=PATIENT)


def test_queues_that_are_purged_in_flower_are_filled_again(laboratory):
    async def story(lab):
        leader = await a_leader(lab)
        (consumer,) = await lab.workers("consumer", lanes=[Lane.BULK])
        await lab.submit_batch(JOBS)
        await lab.until_ended(20)
        consumer.freeze()
        while not await lab.redis.llen(BULK):  # noqa: ASYNC110 - the event is another process's
            await asyncio.sleep(0.01)
        async with lab.fault("purged"):
            assert await by_flower(lab, "purge") > 0
        consumer.thaw()
        await each_was_asked_once(lab)
        assert leader.said("published_again")

    laboratory(story, script=SLOW, environment={"BACKSTOP_HEARTBEAT_TTL_S": "20"})


def test_a_worker_that_is_shut_down_in_flower_drains(laboratory):
    async def story(lab):
        stopped, other = await lab.workers("stopped", "other")
        await lab.submit_batch(JOBS)
        await lab.until("SELECT FROM jobs WHERE worker_id = (SELECT id FROM workers WHERE pid = :pid)", pid=stopped.pid)
        await by_flower(lab, "shutdown", destination=["stopped@lab"])
        assert await stopped.ended() == 0
        await each_was_asked_once(lab)
        assert other.alive()

    laboratory(story, script=SLOW)


def test_a_job_that_kills_every_worker_is_given_up_while_the_other_lane_never_notices(laboratory):
    async def story(lab):
        (bulk,) = await lab.workers("bulk", lanes=[Lane.BULK])
        await lab.until_true(lambda: bulk.said("leading"))
        victims = await lab.workers(*"abcd", lanes=[Lane.INTERACTIVE], poison="arsenic")
        poison = await lab.submit_one("arsenic")
        await lab.submit_batch(JOBS)
        assert [await victim.ended() for victim in victims] == [-9] * MAX_DEATHS
        await lab.assert_sound()
        ended = await job(lab.db, poison)
        assert (ended.state, ended.error["code"], ended.deaths, ended.fence) == ("failed", "worker_died", MAX_DEATHS, MAX_DEATHS)
        assert await results(lab.db, poison) == []
        assert len(lab.bill) == len(await lab.rows("SELECT FROM jobs WHERE state = 'succeeded' AND deaths = 0")) == JOBS
        assert bulk.alive()

    laboratory(story, script=SLOW)


def test_of_a_pack_with_one_poisoned_job_all_others_are_answered(laboratory):
    async def story(lab):
        over = asyncio.Event()
        opened, _ = await lab.submit_batch(60)
        guard = [asyncio.create_task(replaced(lab, name, over)) for name in ("left", "right")]
        await lab.all_ended()
        over.set()
        await asyncio.gather(*guard)
        await lab.assert_sound()
        (given_up,) = await lab.rows("SELECT j.* FROM jobs j WHERE state = 'failed'")
        assert (given_up.ordinal, given_up.error["code"], given_up.deaths) == (33, "worker_died", MAX_DEATHS)
        assert len(lab.history.events("killed")) == MAX_DEATHS
        assert (await batch(lab.db, opened.id)).succeeded == 59

    laboratory(story, script=SLOW)


async def replaced(lab, place, over):
    """Until it is over, a worker is at this place, as a supervisor would have it."""
    deaths = 0
    while not over.is_set():
        worker = await lab.worker(f"{place}-{deaths}", poison="ticket 33")
        ended, done = asyncio.create_task(worker.ended()), asyncio.create_task(over.wait())
        await asyncio.wait({ended, done}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        done.cancel()
        deaths += 1


def test_of_a_pack_with_one_call_that_hangs_the_others_settle_at_once_and_it_can_be_cancelled(laboratory):
    hangs = {"kind": "hang", "seconds": 300, "from_request": 5, "to_request": 6}

    async def story(lab):
        await lab.workers("worker")
        await lab.submit_batch(10)
        await lab.until_ended(9)
        (hung,) = await lab.rows("SELECT id FROM jobs WHERE state = 'running'")
        cancelled = await intervene.cancel(lab.db, job_ids=[hung.id])
        assert (cancelled.cancelled, cancelled.flagged) == (0, 1)
        await lab.assert_sound()
        assert (await job(lab.db, hung.id)).state == "cancelled"
        assert len(await lab.rows("SELECT FROM results")) == 9
        assert len(lab.bill) == 10

    script = {"providers": {"first": {"model": "sim", "outages": [hangs]}}}
    laboratory(story, script=script, config=PATIENT)

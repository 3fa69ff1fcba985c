"""Real workers under load lose their lives, their manners or their Redis: every job is answered once, and the bill is the books."""

from stage import batch

JOBS = 200
SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}


async def under_load(lab, *names):
    """So many workers in their stride, and the batch they work on."""
    workers = await lab.workers(*names)
    opened, _ = await lab.submit_batch(JOBS)
    for worker in workers:
        await lab.until("SELECT FROM jobs WHERE worker_id = (SELECT id FROM workers WHERE pid = :pid)", pid=worker.pid)
    return workers, opened


async def each_was_answered(lab, opened):
    """Every job has its one answer and the books are sound; the rows of requests that brought none."""
    await lab.assert_sound()
    assert (await batch(lab.db, opened.id)).succeeded == JOBS
    assert len(await lab.rows("SELECT FROM results")) == JOBS
    assert len(await lab.rows("SELECT FROM provider_calls WHERE outcome = 'answered'")) == JOBS
    return await lab.rows("SELECT * FROM provider_calls WHERE outcome <> 'answered'")


def test_what_a_killed_worker_held_is_answered_by_another(laboratory):
    async def story(lab):
        (killed, _), opened = await under_load(lab, "killed", "other")
        await killed.kill()
        assert await killed.ended() == -9
        repeated = await each_was_answered(lab, opened)
        assert all((row.outcome, row.billing, row.cost_usd) == ("orphaned", "unknown", None) for row in repeated)
        (note,) = lab.history.events("killed")
        assert {str(row.job_id) for row in repeated} <= set(note["held"])
        assert len(repeated) <= note["open_calls"] <= len(note["held"]) <= 30

    laboratory(story, script=SLOW)


def test_a_worker_that_is_told_to_stop_finishes_what_it_holds_and_nothing_is_repeated(laboratory):
    async def story(lab):
        (stopped, _), opened = await under_load(lab, "stopped", "other")
        stopped.terminate()
        assert await stopped.ended() == 0
        assert await lab.rows("SELECT FROM jobs JOIN workers w ON w.id = worker_id WHERE w.state = 'gone'") == []
        assert await each_was_answered(lab, opened) == []
        assert len(lab.bill) == JOBS

    laboratory(story, script=SLOW)


def test_a_redis_that_forgets_everything_under_load_costs_no_call(laboratory):
    async def story(lab):
        _, opened = await under_load(lab, "worker")
        for already in (20, 60, 100):
            await lab.until_ended(already)
            await lab.redis.flushall()
        assert await each_was_answered(lab, opened) == []
        assert len(lab.bill) == JOBS

    laboratory(story, script=SLOW)

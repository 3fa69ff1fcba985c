"""Real workers under load lose their lives, their manners or their Redis: every job is answered once, and the bill is the books."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
from redis import Redis
from stage import a_batch, batch, counters_are_exact, play, rows, until

from worker.simulator.script import parse
from worker.simulator.server import Simulator

JOBS = 200
CONFIG = """
[providers.first]
base_url = "{url}"
model = "sim"
price = {{ input = "1", output = "2" }}
[chains.default]
providers = ["first"]
"""


@contextmanager
def a_worker_process(environment, log):
    with open(log, "ab") as out:
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle"]
        process = subprocess.Popen([*command, "-n", f"{log.stem}@here"], env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


@pytest.fixture
def environment(database_url, redis_url, tmp_path):
    return os.environ | {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "BACKSTOP_CONFIG": str(tmp_path / "backstop.toml"),
        "BACKSTOP_DATA": str(tmp_path),
        "BACKSTOP_HEARTBEAT_S": "0.2",
        "BACKSTOP_HEARTBEAT_TTL_S": "3",
        "BACKSTOP_BULK_SLOTS": "30",
        "BACKSTOP_PACK_SIZE": "10",
    }


@asynccontextmanager
async def under_load(db, environment, tmp_path, workers):
    """The simulator, so many worker processes in their stride, and the batch they work on."""
    script = parse({"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}, "test")
    async with Simulator(script) as simulator:
        (tmp_path / "backstop.toml").write_text(CONFIG.format(url=simulator.base_url("first")))
        with ExitStack() as stack:
            processes = [stack.enter_context(a_worker_process(environment, tmp_path / f"worker{number}.log")) for number in range(workers)]
            await until(db, "SELECT FROM workers WHERE state = 'live' HAVING count(*) = :n", n=workers)
            opened, _ = await a_batch(db, JOBS)
            for position in range(workers):
                sql = "SELECT FROM jobs WHERE worker_id = (SELECT id FROM workers WHERE pid = :pid)"
                await until(db, sql, pid=processes[position].pid)
            yield simulator, processes, opened


async def the_books(db, simulator, opened):
    """Every job is answered once, every request of the bill is one call row; the rows of requests beyond one for each job."""
    await until(db, "SELECT FROM batches WHERE id = :id AND state = 'finished'", id=opened.id)
    assert (await batch(db, opened.id)).succeeded == JOBS
    assert len(await rows(db, "SELECT FROM results")) == JOBS
    await counters_are_exact(db)
    calls = {str(row.id): row for row in await rows(db, "SELECT * FROM provider_calls")}
    billed = [line.call_id for line in simulator.bill.lines()]
    assert len(billed) == len(set(billed))
    assert set(billed) <= set(calls)
    assert {row.outcome for call_id, row in calls.items() if call_id not in set(billed)} <= {"orphaned"}
    answered = {row.job_id for row in calls.values() if row.outcome == "answered"}
    assert len(answered) == JOBS
    return [row for call_id, row in calls.items() if row.outcome != "answered"]


def test_what_a_killed_worker_held_is_answered_by_another(database_url, environment, tmp_path):
    async def story(db):
        async with under_load(db, environment, tmp_path, 2) as (simulator, (killed, _), opened):
            os.kill(killed.pid, signal.SIGKILL)
            repeated = await the_books(db, simulator, opened)
            assert len(repeated) <= 30  # what can have been open at that moment
            assert all((row.outcome, row.billing, row.cost_usd) == ("orphaned", "unknown", None) for row in repeated)

    play(database_url, story)


def test_a_worker_that_is_told_to_stop_finishes_what_it_holds_and_nothing_is_repeated(database_url, environment, tmp_path):
    async def story(db):
        async with under_load(db, environment, tmp_path, 2) as (simulator, (stopped, _), opened):
            stopped.terminate()
            assert await asyncio.to_thread(stopped.wait, 30) == 0
            assert await rows(db, "SELECT FROM jobs JOIN workers w ON w.id = worker_id WHERE w.state = 'gone'") == []
            assert await the_books(db, simulator, opened) == []
            assert len(simulator.bill) == JOBS

    play(database_url, story)


def test_a_redis_that_forgets_everything_under_load_costs_no_call(database_url, redis_url, environment, tmp_path):
    async def story(db):
        async with under_load(db, environment, tmp_path, 1) as (simulator, _, opened):
            with Redis.from_url(redis_url) as redis:
                for already in (20, 60, 100):
                    await until(db, "SELECT FROM results HAVING count(*) >= :n", n=already)
                    redis.flushall()
            assert await the_books(db, simulator, opened) == []
            assert len(simulator.bill) == JOBS

    play(database_url, story)

"""The laboratory itself: what it breaks is broken, what it mends is mended, and nothing outlives it."""

import ast
import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from worker import database
from worker.job import Lane

HERE = Path(__file__).parent
TWO_VENDORS = {
    "providers": {
        "ill": {"model": "m-ill", "faults": [{"kind": "status", "status": 500, "rate": 1}]},
        "good": {"model": "m-good", "latency": {"ms": 50}},
    }
}


def failing(code="import failing", **environment):
    """`failing` is imported as a worker would with this environment."""
    environ = os.environ | {f"BACKSTOP_{name}": value for name, value in environment.items()} | {"PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)


def names(what):
    """The keys of a dictionary in failing.py, which is not for import: it changes the process that does."""
    tree = ast.parse((HERE / "failing.py").read_text())
    (found,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == what)
    return {ast.literal_eval(key) for key in found.keys}


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_servers_that_are_killed_frozen_and_started_again_are_missed_and_found_by_workers(laboratory):
    async def story(lab):
        (worker,) = await lab.workers("worker")
        await lab.submit_batch(400)
        await lab.until_ended(20)
        async with lab.fault("postgres killed"):
            lab.postgres.kill()
            with pytest.raises(DBAPIError):
                await lab.rows("SELECT")
            await lab.postgres.start()
        await lab.until_ended(100)
        async with lab.fault("valkey killed"):
            lab.valkey.kill()
            await lab.valkey.start()
        await lab.until_ended(200)
        async with lab.fault("both frozen"):
            lab.postgres.freeze()
            lab.valkey.freeze()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await lab.rows("SELECT")
            with pytest.raises(RedisError):
                await lab.redis.ping()
            lab.postgres.thaw()
            lab.valkey.thaw()
        await lab.assert_sound()
        assert worker.alive()
        assert lab.history.events("killed") == []

    laboratory(story)


def test_a_commit_whose_reply_is_lost_was_a_commit_and_a_statement_is_known_although_it_is_prepared(laboratory):
    async def story(lab):
        sql = text("UPDATE lanes SET paused = NOT paused WHERE name = 'bulk' RETURNING paused")
        through_proxy = database.engine(lab.environment["DATABASE_URL"])
        async with through_proxy.connect() as connection:
            for _ in range(9):  # an odd number, and enough for the driver to prepare it
                await connection.execute(sql)
            assert await lab.rows("SELECT FROM lanes WHERE name = 'bulk' AND paused") != []
            lost = lab.postgres.proxy.lose_reply(b"NOT paused")
            with pytest.raises(DBAPIError):
                await connection.execute(sql)
            assert lost.is_set()
        await through_proxy.dispose()
        assert await lab.rows("SELECT FROM lanes WHERE name = 'bulk' AND paused") == []

    laboratory(story)


def test_a_settle_whose_reply_was_lost_is_found_done(laboratory):
    async def story(lab):
        (worker,) = await lab.workers("worker")
        lost = lab.postgres.proxy.lose_reply(b"WITH ending AS")
        await lab.submit_batch(100)
        await lost.wait()
        await lab.assert_sound()
        assert worker.said("settle_waits")
        assert len(lab.bill) == 100

    laboratory(story)


def test_one_worker_can_be_cut_off_while_the_others_go_on(laboratory):
    async def story(lab):
        environment, way_to_postgres, _ = await lab.own_network()
        cut_off = await lab.worker("cut_off", environment=environment)
        (other,) = await lab.workers("other")
        await cut_off.live()
        way_to_postgres.blackhole()
        await lab.until("SELECT FROM workers WHERE pid = :pid AND state = 'dead'", pid=cut_off.pid)
        await lab.submit_batch(20)
        await lab.until_ended(20)
        assert other.alive()
        await way_to_postgres.thaw()
        await cut_off.live()
        assert len(await cut_off.ids()) == 2
        await lab.assert_sound()

    laboratory(story)


def test_every_failpoint_lies_on_the_way_of_a_job(laboratory):
    async def story(lab):
        dying = await lab.worker("dying", failing="after_request:kill@3", lanes=[Lane.BULK])
        await dying.live()
        await lab.submit_batch(20)
        assert await dying.ended() == -9
        (note,) = lab.history.events("killed")
        assert note["worker"] == "dying"
        assert len(note["held"]) == note["open_calls"] == 20
        (worker,) = await lab.workers("worker", failing="before_statement:raise:40P01@2")
        await lab.submit_one()
        await lab.assert_sound()
        assert worker.said("failed before_statement raise:40P01")
        assert {point for point in names("POINTS") if not worker.said(f"passed {point}")} == set()

    laboratory(story, script=TWO_VENDORS)


def test_a_poisoned_job_kills_whoever_sends_it(laboratory):
    async def story(lab):
        worker = await lab.worker("worker", poison="arsenic")
        await worker.live()
        await lab.submit_one("milk")
        await lab.until_ended(1)
        await lab.submit_one("arsenic")
        assert await worker.ended() == -9
        assert len(lab.bill) == 1
        assert len(lab.history.events("killed")[0]["held"]) == 1

    laboratory(story)


def test_every_guard_can_be_switched_off_and_says_so():
    everything = failing(SABOTAGE=",".join(names("SABOTAGES")))
    assert everything.returncode == 0
    assert {line.removeprefix("off ") for line in everything.stderr.splitlines()} == names("SABOTAGES")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SABOTAGE": "gravity"}, "no guard 'gravity'"),
        ({"FAILPOINT": "nowhere:kill"}, "no point 'nowhere:kill'"),
        ({"FAILPOINT": "after_claim"}, "no point 'after_claim'"),
    ],
)
def test_what_cannot_be_broken_is_refused(environment, words):
    refused = failing(**environment)
    assert refused.returncode == 1
    assert words in refused.stderr


def test_a_guard_that_is_written_otherwise_by_now_is_not_switched_off_in_silence():
    rewritten = "from sqlalchemy import text; from worker import ledger; ledger._SETTLE = text('SELECT 1'); import failing"
    refused = failing(rewritten, SABOTAGE="fence")
    assert refused.returncode == 1
    assert "worker.ledger._SETTLE has 0 times" in refused.stderr


def test_jobs_come_through_the_api_as_well(laboratory):
    async def story(lab):
        await lab.workers("worker")
        api = await lab.api()
        async with api.client() as http:
            reply = await http.post("/v1/jobs", json={"messages": [{"role": "user", "content": "hello"}]})
            assert reply.status_code == 202
        await lab.until_ended(1)

    laboratory(story)


def test_a_ledger_that_was_tampered_with_is_not_sound(laboratory):
    async def story(lab):
        await lab.workers("worker")
        await lab.submit_batch(5)
        await lab.assert_sound()
        await lab.rows("DELETE FROM results")
        with pytest.raises(AssertionError, match="I2"):
            await lab.assert_sound()

    laboratory(story)


async def left_over(lab):
    await lab.valkey.restart(maxmemory="100mb", appendonly="yes")
    await lab.redis.set("left", "over")
    await lab.submit_batch(3)


async def other_options(lab):
    await lab.postgres.restart(max_connections=20)


async def altered(lab):
    await lab.rows("ALTER SYSTEM SET default_transaction_read_only = on")


async def dead_and_frozen(lab):
    lab.postgres.freeze()
    lab.valkey.kill()


@pytest.mark.parametrize("mess", [left_over, other_options, altered, dead_and_frozen])
def test_the_next_lab_finds_nothing_of_one_whose_test_failed(laboratory, mess):
    pids = []

    async def messy(lab):
        worker = await lab.worker("worker")
        worker.freeze()
        pids.append(worker.pid)
        await mess(lab)
        raise RuntimeError("the test fails")

    async def clean(lab):
        assert (await lab.rows("SHOW max_connections"))[0].max_connections == "100"
        assert (await lab.rows("SHOW default_transaction_read_only"))[0].default_transaction_read_only == "off"
        assert (await lab.redis.config_get("maxmemory"))["maxmemory"] == "0"
        assert await lab.redis.dbsize() == 0
        assert await lab.rows("SELECT FROM jobs") == []

    with pytest.raises(RuntimeError):
        laboratory(messy)
    assert gone(pids[0])
    laboratory(clean)

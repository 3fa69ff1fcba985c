"""Postgres falls silent, dies, refuses and fills up under load: no job is lost, and no call is made twice that a death does not explain.

The numbers are those of the forty faults: 14 half-open connections, 15 lost replies, 16 the server gone, 17 sessions ended, 18 read-only,
locked, slow and full, 19 too few connections, 21 clocks, 28 a worker stopped without it, 29 everything dead at once. The last tests are
of what stands beside the list: the API meanwhile, and a transaction that stays open.

Left out: of 16 and 18 absences and locks of minutes, to which longer than the TTL is the same; of 18 a full disk under the WAL, which ends
the server as in 16; of 21 the clocks of workers, which nobody asks.
"""

import asyncio
import os
import signal
import stat
from contextlib import asynccontextmanager
from urllib.parse import urlsplit
from uuid import uuid4

from stage import rows, transaction

JOBS = 200
SLOW = {"providers": {"first": {"model": "sim", "latency": {"ms": 150}}}}
# The first vendor has no use for what it is asked, which says nothing of its health; the second answers.
TWO = {
    "providers": {
        "first": {"model": "m-first", "latency": {"ms": 300}, "faults": [{"kind": "status", "status": 409, "rate": 1}]},
        "second": {"model": "m-second", "latency": {"ms": 50}},
    }
}
ASKED_ONCE = {"providers.first": {"max_retries": 0}}
# Every heartbeat is older than the TTL of the lab.
ALL_SILENT = "SELECT FROM workers HAVING bool_and(seen_at < now() - interval '3.5 s')"
SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT :most
"""
EVERY = 1000
# How each statement is known on its way.
CLAIM, SETTLE, BEAT, LEAD = b"WITH wanted AS", b"WITH ending AS", b"WITH me AS", b"pg_try_advisory_lock"
OPEN_CALLS, SUBMIT = b"ON CONFLICT (id) DO NOTHING", b"INSERT INTO job_requests"


async def under_load(lab, *names, jobs=JOBS, **how):
    """So many workers in their stride."""
    workers = await lab.workers(*names, **how)
    await lab.submit_batch(jobs)
    for worker in workers:
        await lab.until("SELECT FROM jobs WHERE worker_id = (SELECT id FROM workers WHERE pid = :pid)", pid=worker.pid)
    return workers


async def nothing_was_repeated(lab, jobs=JOBS):
    await lab.assert_sound()
    assert len(await lab.rows("SELECT FROM results")) == jobs
    assert len(lab.bill) == jobs


async def nobody_was_buried(lab):
    assert await lab.rows("SELECT FROM workers WHERE state = 'dead'") == []


async def said(lab, words, times=1):
    """The workers, taken together, have said this so many times more."""

    def so_often():
        return sum(worker.log.read_text().count(words) for worker in lab.processes)

    before = so_often()
    await lab.until_true(lambda: so_often() >= before + times)


def under_way(lab):
    """So many requests have not been answered yet."""
    return sum(totals.unfinished for totals in lab.bill.totals().values())


# 14 ----------------------------------------------------------------------------------------------------------------------------


def test_a_postgres_that_falls_silent_for_all_costs_no_call_however_long(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two", jobs=2 * JOBS)
        async with lab.fault("replies held back"):
            lab.postgres.proxy.deafen()
            await said(lab, "heartbeat_failed")
            await lab.postgres.proxy.thaw()
        await lab.until_ended(100)
        async with lab.fault("silent"):
            lab.postgres.proxy.blackhole()
            await lab.until(ALL_SILENT)
            await lab.postgres.proxy.thaw()
        await nothing_was_repeated(lab, jobs=2 * JOBS)
        await nobody_was_buried(lab)

    laboratory(story, script=SLOW)


def test_a_worker_that_was_cut_off_keeps_its_answers_to_itself_and_their_costs_in_the_books(laboratory):
    async def story(lab):
        cut_off, way = await alone_with(lab, 10)
        way.blackhole()
        await lab.workers("other")
        await cut_off.outlived()
        await lab.until_ended(10)
        await way.thaw()
        await cut_off.live()
        await lab.until("SELECT FROM provider_calls WHERE outcome = 'answered' HAVING count(*) = 20")
        await lab.assert_sound()
        assert len(lab.bill) == 20
        assert len(await lab.rows("SELECT FROM results")) == 10
        assert cut_off.log.read_text().count("settle_refused") == 10

    laboratory(story, script=SLOW)


def test_a_worker_that_was_cut_off_asks_nobody_for_jobs_that_may_be_another_s_by_now(laboratory):
    async def story(lab):
        cut_off, way = await alone_with(lab, 10)
        way.blackhole()
        await lab.until_true(lambda: not under_way(lab))
        await lab.workers("other")
        await cut_off.outlived()
        await lab.until_ended(10)
        await way.thaw()
        await cut_off.live()
        await lab.until("SELECT FROM provider_calls WHERE outcome = 'conflict' HAVING count(*) = 20")
        await lab.assert_sound()
        assert lab.bill.totals()["second"].requests == 10

    laboratory(story, script=TWO, config=ASKED_ONCE)


async def alone_with(lab, jobs):
    """A worker that has a way to Postgres of its own, and a vendor working on each of its jobs."""
    environment, way, _ = await lab.own_network()
    (cut_off,) = await lab.workers("cut_off", environment=environment)
    await lab.submit_batch(jobs)
    await lab.until_asked(jobs)
    return cut_off, way


# 15 ----------------------------------------------------------------------------------------------------------------------------


def test_a_claim_a_settle_or_a_heartbeat_whose_reply_is_lost_is_repeated_without_a_call(laboratory):
    async def story(lab):
        await lab.workers("one", "two")
        lost = [lab.postgres.proxy.lose_reply(statement) for statement in (CLAIM, SETTLE, BEAT, LEAD)]
        await lab.submit_batch(JOBS)
        await asyncio.gather(*(one.wait() for one in lost))
        await nothing_was_repeated(lab)

    laboratory(story, script=SLOW)


def test_a_call_whose_opening_was_not_confirmed_is_made_once_and_booked_once(laboratory):
    async def story(lab):
        await lab.workers("worker")
        lost = lab.postgres.proxy.lose_reply(OPEN_CALLS)
        await lab.submit_batch(20)
        await lost.wait()
        await lab.assert_sound()
        assert {name: totals.requests for name, totals in lab.bill.totals().items()} == {"first": 20, "second": 20}
        assert len(await lab.rows("SELECT FROM provider_calls")) == 40

    laboratory(story, script=TWO, config=ASKED_ONCE)


def test_a_job_whose_acceptance_was_not_confirmed_is_there_once_when_it_is_sent_again(laboratory):
    async def story(lab):
        await lab.workers("worker")
        api = await lab.api()
        lost = lab.postgres.proxy.lose_reply(SUBMIT)
        asked = {"json": {"messages": [{"role": "user", "content": "hello"}]}, "headers": {"Idempotency-Key": "once"}}
        async with api.client() as http:
            unsure = await http.post("/v1/jobs", **asked)
            assert lost.is_set()
            assert (unsure.status_code, unsure.headers["Retry-After"]) == (503, "1")
            again = await http.post("/v1/jobs", **asked)
            assert again.status_code == 202
        lab.history.note("accepted", job_ids=[again.json()["id"]])
        await nothing_was_repeated(lab, jobs=1)

    laboratory(story)


# 16 ----------------------------------------------------------------------------------------------------------------------------


def test_a_postgres_that_stops_in_whatever_way_and_comes_back_costs_no_call(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two", jobs=2 * JOBS)
        for already, how in enumerate(["killed", "postmaster killed", "immediate", "fast"]):
            await lab.until_ended(already * 80)
            await lab.until_true(lambda: under_way(lab))
            async with lab.fault(how):
                await gone(lab, how)
                await said(lab, "settle_waits")
                await lab.postgres.start()
        await nothing_was_repeated(lab, jobs=2 * JOBS)

    laboratory(story, script=SLOW)


async def gone(lab, how):
    if how == "killed":
        lab.postgres.kill()
    elif how == "postmaster killed":  # its children find out by themselves
        os.kill(lab.postgres.pid, signal.SIGKILL)
        await lab.until_true(lambda: not lab.postgres.running())
    else:
        await lab.postgres.stop(how)


def test_after_an_absence_longer_than_the_ttl_who_comes_back_late_is_not_held_dead_and_settles_what_it_kept(laboratory):
    async def story(lab):
        (leader,) = await lab.workers("leader")
        await lab.until_true(lambda: leader.said("leading"))
        environment, way, _ = await lab.own_network()
        await under_load(lab, "late", environment=environment)
        async with lab.fault("away"):
            lab.postgres.kill()
            way.refuse()
            await said(lab, "heartbeat_failed", times=40)  # two workers, 0.2 s apart
            await lab.postgres.start()
            await said(lab, "new leader")
            await way.thaw()
        await nothing_was_repeated(lab)
        await nobody_was_buried(lab)

    laboratory(story, script=SLOW)


# 17 ----------------------------------------------------------------------------------------------------------------------------


def test_sessions_that_are_ended_many_times_a_second_cost_no_call(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two", jobs=2 * JOBS)
        async with lab.fault("sessions ended"):
            while not await lab.rows("SELECT FROM jobs WHERE finished_at IS NOT NULL HAVING count(*) >= 300"):
                await lab.rows(SESSIONS, most=1)
                await asyncio.sleep(0.05)
        await nothing_was_repeated(lab, jobs=2 * JOBS)

    laboratory(story, script=SLOW)


# 18 ----------------------------------------------------------------------------------------------------------------------------


def test_a_postgres_that_is_read_only_costs_no_call(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two")
        async with lab.fault("read-only"):
            await read_only(lab, "SET default_transaction_read_only = on")
            await asyncio.gather(said(lab, "settle_waits"), said(lab, "heartbeat_failed", times=5))
            await read_only(lab, "RESET default_transaction_read_only")
        await nothing_was_repeated(lab)
        await nobody_was_buried(lab)

    laboratory(story, script=SLOW)


async def read_only(lab, setting):
    """For all sessions, as of their next statement."""
    await lab.rows(f"ALTER SYSTEM {setting}")
    await lab.rows("SELECT pg_reload_conf()")


def test_a_lock_on_all_jobs_for_longer_than_the_ttl_costs_no_call(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two")
        async with lab.fault("locked"), transaction(lab.db) as holder:
            await rows(holder, "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            await lab.until(ALL_SILENT)
        await nothing_was_repeated(lab)
        await nobody_was_buried(lab)

    laboratory(story, script=SLOW)


def test_a_slow_postgres_costs_no_call(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two")
        async with lab.fault("slow"):
            lab.postgres.proxy.delay(0.1)
            await lab.until_ended(150)
            await lab.postgres.proxy.thaw()
        await nothing_was_repeated(lab)

    laboratory(story, script=SLOW)


def test_answers_that_find_no_room_on_the_disk_are_kept_until_there_is_some(laboratory):
    async def story(lab):
        await lab.workers("worker")
        async with lab.fault("disk full"), no_room_for_results(lab):
            await lab.submit_batch(JOBS)
            await said(lab, "DiskFull", times=3)
            assert await lab.rows("SELECT FROM jobs WHERE finished_at IS NOT NULL") == []
        await nothing_was_repeated(lab)

    laboratory(story)


@asynccontextmanager
async def no_room_for_results(lab):
    """The table, empty so far, lies where nothing can be written."""
    (found,) = await lab.rows("SELECT pg_relation_filepath('results') AS path")
    file = lab.postgres.recipe.home / "data" / found.path
    empty = file.rename(file.with_suffix(".empty"))
    file.symlink_to("/dev/full")
    await lab.rows(SESSIONS, most=EVERY)  # they have it open
    yield
    empty.replace(file)
    await lab.rows(SESSIONS, most=EVERY)


# 19 ----------------------------------------------------------------------------------------------------------------------------


def test_with_too_few_connections_workers_wait_and_nothing_is_repeated(laboratory):
    async def story(lab):
        await lab.rows("CREATE ROLE limited LOGIN PASSWORD 'limited' IN ROLE pg_read_all_data, pg_write_all_data")
        url = urlsplit(lab.environment["DATABASE_URL"])
        lab.environment["DATABASE_URL"] = url._replace(netloc=f"limited:limited@127.0.0.1:{url.port}").geturl()
        await under_load(lab, "one", "two")
        async with lab.fault("few connections"):
            await lab.rows("ALTER ROLE limited CONNECTION LIMIT 3")
            await lab.rows(SESSIONS, most=EVERY)
            await said(lab, "OperationalError", times=20)
            await lab.rows("ALTER ROLE limited CONNECTION LIMIT -1")
        await nothing_was_repeated(lab)

    laboratory(story, script=SLOW)


# 21 ----------------------------------------------------------------------------------------------------------------------------


def test_heartbeats_from_the_past_or_the_future_bury_nobody(laboratory):
    async def story(lab):
        await under_load(lab, "one", "two")
        async with lab.fault("clocks an hour apart"):
            await shift(lab, "-1 hour")
            await lab.rows("CREATE TRIGGER shifted BEFORE UPDATE ON workers FOR EACH ROW EXECUTE FUNCTION shifted()")
            await lab.until_ended(JOBS // 2)
            await shift(lab, "1 hour")
        await nothing_was_repeated(lab)
        await nobody_was_buried(lab)

    laboratory(story, script=SLOW)


async def shift(lab, by):
    """What a heartbeat says of the time is wrong by so much."""
    body = f"BEGIN NEW.seen_at = now() + interval '{by}'; RETURN NEW; END"
    await lab.rows(f"CREATE OR REPLACE FUNCTION shifted() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")


def test_a_dead_worker_is_found_although_its_last_heartbeat_is_in_the_future(laboratory):
    async def story(lab):
        killed, _ = await under_load(lab, "killed", "other")
        await killed.kill()
        await lab.rows("UPDATE workers SET seen_at = now() + interval '1 hour' WHERE pid = :pid", pid=killed.pid)
        await lab.assert_sound()

    laboratory(story, script=SLOW)


# 28 ----------------------------------------------------------------------------------------------------------------------------


def test_what_a_worker_had_to_keep_when_it_was_stopped_is_settled_at_the_next_start(laboratory):
    async def story(lab):
        (stopped,) = await under_load(lab, "stopped", broken="patience")
        async with lab.fault("postgres away"):
            await lab.postgres.stop("immediate")
            stopped.terminate()
            assert await stopped.ended() == 0
            (file,) = (lab.directory / "data" / "spool").iterdir()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            await lab.postgres.start()
        await lab.workers("next")
        await nothing_was_repeated(lab)
        assert list((lab.directory / "data" / "spool").iterdir()) == []

    laboratory(story, script=SLOW, environment={"BACKSTOP_DRAIN_S": "1"})


# 29 ----------------------------------------------------------------------------------------------------------------------------


def test_after_a_power_cut_the_ledger_knows_all_and_no_more_is_repeated_than_was_under_way(laboratory):
    async def story(lab):
        workers = await under_load(lab, "one", "two")
        await lab.until_ended(50)
        async with lab.fault("power cut"):
            for worker in workers:
                worker.freeze()
            for worker in workers:
                await worker.kill()
            lab.postgres.kill()
            lab.valkey.kill()
            await lab.postgres.start()
            await lab.valkey.start()
        await lab.workers("three", "four")
        await lab.assert_sound()
        assert len(await lab.rows("SELECT FROM results")) == JOBS

    laboratory(story, script=SLOW)


# Beside the list ---------------------------------------------------------------------------------------------------------------


def test_without_postgres_the_api_asks_to_come_back_and_takes_the_job_then(laboratory):
    async def story(lab):
        api = await lab.api()
        asked = {"messages": [{"role": "user", "content": "a secret"}]}
        async with api.client() as http:
            lab.postgres.proxy.refuse()
            for reply in [await http.post("/v1/jobs", json=asked), await http.get(f"/v1/jobs/{uuid4()}"), await http.get("/readyz")]:
                assert reply.status_code == 503
                assert reply.headers["Content-Type"] == "application/problem+json"
                assert reply.headers["Retry-After"] == "1"
                assert "secret" not in reply.text
            await lab.postgres.proxy.thaw()
            assert (await http.post("/v1/jobs", json=asked)).status_code == 202
        assert "Traceback" not in api.log.read_text()
        assert "secret" not in api.log.read_text()

    laboratory(story)


def test_a_transaction_that_stays_open_over_all_tables_does_no_harm(laboratory):
    async def story(lab):
        await lab.workers("worker")
        async with lab.db.connect() as dump:
            await dump.execution_options(isolation_level="REPEATABLE READ")
            async with dump.begin():
                tables = [row.tablename for row in await rows(dump, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
                await rows(dump, f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE")
                await lab.submit_batch(JOBS)
                await nothing_was_repeated(lab)

    laboratory(story)

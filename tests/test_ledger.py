"""Claim, open, settle, against a real Postgres: who wins, what is refused, what stays on the books."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from decimal import Decimal

import pytest
from sqlalchemy import text
from stage import (
    FIRST,
    a_batch,
    a_call,
    a_job,
    a_worker,
    an_answer,
    answered,
    batch,
    blocked,
    calls,
    counters_are_exact,
    ending,
    job,
    one_after_the_other,
    play,
    results,
    rows,
    take,
    transaction,
    until,
)

from worker import reads
from worker.calls import NewCall, open_calls
from worker.database import jsonb, run
from worker.intervene import cancel, requeue
from worker.job import JobState, new_id
from worker.ledger import claim, settle
from worker.rescue import expire, rescue
from worker.signals import Signal
from worker.submit import close_batch

QUEUED, SUCCEEDED, FAILED = JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED
CANCELLED, EXPIRED = JobState.CANCELLED, JobState.EXPIRED


def test_a_claim_raises_the_fence_once_and_opens_the_first_call(database_url):
    async def story(db):
        job_id, worker_id = await a_job(db), await a_worker(db)
        (claimed,) = await take(db, [job_id], worker_id)
        stored = await job(db, job_id)
        (call,) = await calls(db, job_id)
        assert (claimed.fence, claimed.attempts, claimed.asked) == (1, 0, ())
        assert (stored.state, stored.fence, stored.worker_id) == ("running", 1, worker_id)
        assert (call.id, call.fence, call.provider, call.model) == (claimed.opened_id, 1, "first", "m-first")
        assert (call.outcome, call.billing, call.cost_usd) == (None, "unknown", None)
        assert 0 < claimed.remaining_s <= 3600

    play(database_url, story)


def test_of_a_message_that_comes_twice_only_one_claims(database_url):
    async def story(db):
        ids = [await a_job(db) for _ in range(20)]
        packs = [random.Random(n).sample(ids, 20) for n in range(6)]
        taken = await asyncio.gather(*(take(db, pack) for pack in packs))
        assert sorted(claimed.job_id for pack in taken for claimed in pack) == sorted(ids)
        assert {row.fence for row in await rows(db, "SELECT fence FROM jobs")} == {1}

    play(database_url, story)


def test_a_claim_of_ids_that_do_not_exist_or_stand_there_twice_takes_each_job_once(database_url):
    async def story(db):
        job_id = await a_job(db)
        claims = await claim(db, [new_id(), job_id, job_id, new_id()], await a_worker(db), FIRST)
        assert [claimed.job_id for claimed in claims] == [job_id]
        assert len(await calls(db, job_id)) == 1
        assert await claim(db, [], await a_worker(db), {}) == []

    play(database_url, story)


@pytest.mark.parametrize(
    "change",
    [
        "run_at = now() + interval '1 minute'",
        "cancel_requested = true",
        "deadline_at = now()",
        "state = 'running', worker_id = gen_random_uuid()",
        "state = 'cancelled', finished_at = now()",
        "state = 'expired', finished_at = now()",
    ],
)
def test_a_job_that_is_not_ready_is_not_claimed(database_url, change):
    async def story(db):
        job_id = await a_job(db)
        await rows(db, f"UPDATE jobs SET {change} WHERE id = :id", id=job_id)
        assert await take(db, [job_id]) == []
        assert (await job(db, job_id)).fence == 0
        assert await calls(db, job_id) == []

    play(database_url, story)


def test_a_chain_without_a_healthy_provider_opens_no_call(database_url):
    async def story(db):
        (claimed,) = await claim(db, [await a_job(db)], await a_worker(db), {"other": ("first", "m-first")})
        assert (claimed.opened_id, claimed.opened_provider) == (None, None)

    play(database_url, story)


def test_a_parked_job_goes_on_in_its_walk_and_a_new_walk_forgets_it(database_url):
    async def story(db):
        job_id = await a_job(db)
        (first,) = await take(db, [job_id])
        told = a_call(first.opened_id, Signal.SERVER_ERROR)
        await settle(db, [ending(first, QUEUED, calls=(told,), error={"code": "parked"})])
        (second,) = await take(db, [job_id])
        assert (second.fence, second.attempts, second.opened_id) == (2, 0, None)
        assert [(asked.provider, asked.outcome, asked.answer) for asked in second.asked] == [("first", "server_error", None)]
        await settle(db, [ending(second, QUEUED, counted=True, new_walk=True)])
        (third,) = await take(db, [job_id])
        assert (third.fence, third.attempts, third.asked) == (3, 1, ())
        assert third.opened_id is not None
        await settle(db, [ending(third, QUEUED, calls=(a_call(third.opened_id, Signal.OVERLOADED),))])
        (fourth,) = await take(db, [job_id])
        assert [asked.outcome for asked in fourth.asked] == ["overloaded"]

    play(database_url, story)


def test_calls_are_opened_once_however_often_they_are_sent(database_url):
    async def story(db):
        (claimed,) = await take(db, [await a_job(db)])
        call = NewCall(id=new_id(), job_id=claimed.job_id, fence=1, provider="second", model="m")
        await open_calls(db, [call])
        await open_calls(db, [call])
        assert [row.provider for row in await calls(db, claimed.job_id)] == ["first", "second"]

    play(database_url, story)


def test_a_success_stores_answer_state_and_cost_together(database_url):
    async def story(db):
        (claimed,) = await take(db, [await a_job(db)])
        assert await settle(db, [answered(claimed, "well")]) == [True]
        stored = await job(db, claimed.job_id)
        (result,) = await results(db, claimed.job_id)
        (call,) = await calls(db, claimed.job_id)
        assert (stored.state, stored.worker_id, result.fence) == ("succeeded", None, 1)
        assert (result.answer["content"], call.outcome, call.cost_usd) == ("well", "answered", Decimal("0.25"))
        assert call.answer is None

    play(database_url, story)


def test_a_late_success_is_refused_but_its_cost_is_booked_and_its_answer_is_found_by_the_next_attempt(database_url):
    async def story(db):
        job_id, dead = await a_job(db), await a_worker(db)
        (late,) = await take(db, [job_id], dead)
        await rows(db, "UPDATE workers SET state = 'dead'")
        async with db.connect() as leader:
            assert await rescue(leader) == [job_id]
        before = await job(db, job_id)
        assert await settle(db, [answered(late, "paid for")]) == [False]
        assert await job(db, job_id) == before
        assert await results(db, job_id) == []
        (call,) = await calls(db, job_id)
        assert (call.outcome, call.billing, call.cost_usd) == ("answered", "billed", Decimal("0.25"))
        (claimed,) = await take(db, [job_id])
        assert [(asked.outcome, asked.answer) for asked in claimed.asked] == [("answered", an_answer("paid for"))]

    play(database_url, story)


def test_a_late_settle_cannot_touch_a_job_that_runs_under_a_higher_fence(database_url):
    async def story(db):
        job_id = await a_job(db)
        (old,) = await take(db, [job_id])
        await settle(db, [ending(old, QUEUED)])
        (new,) = await take(db, [job_id])
        for state in JobState:
            if state is not JobState.RUNNING:
                late = ending(old, state, answer=an_answer("old") if state is SUCCEEDED else None)
                assert await settle(db, [late]) == [False]
        assert ((await job(db, job_id)).state, (await job(db, job_id)).fence) == ("running", 2)
        assert await settle(db, [answered(new)]) == [True]
        assert [row.fence for row in await results(db, job_id)] == [2]

    play(database_url, story)


def test_an_old_and_a_new_fence_in_one_group_are_told_apart(database_url):
    async def story(db):
        job_id = await a_job(db)
        (old,) = await take(db, [job_id])
        await settle(db, [ending(old, QUEUED)])
        (new,) = await take(db, [job_id])
        late, right = ending(old, SUCCEEDED, answer=an_answer("old")), ending(new, SUCCEEDED, answer=an_answer("new"))
        assert await settle(db, [late, right]) == [False, True]
        assert [row.answer["content"] for row in await results(db, job_id)] == ["new"]

    play(database_url, story)


@pytest.mark.parametrize("state", [SUCCEEDED, FAILED, EXPIRED, CANCELLED, QUEUED])
def test_a_settle_whose_reply_was_lost_is_sent_again_and_changes_nothing(database_url, state):
    async def story(db):
        _, ids = await a_batch(db, 2)
        (claimed, _) = await take(db, ids)
        settlement = ending(claimed, state, answer=an_answer() if state is SUCCEEDED else None, counted=True)
        settlement = replace(settlement, calls=(a_call(claimed.opened_id, answer=settlement.answer),))
        assert await settle(db, [settlement]) == [True]
        before = await job(db, claimed.job_id)
        assert await settle(db, [settlement], again=True) == [True]
        assert await job(db, claimed.job_id) == before
        assert len(await results(db, claimed.job_id)) == (state is SUCCEEDED)
        assert [row.answer for row in await calls(db, claimed.job_id)] == [None]
        await counters_are_exact(db)

    play(database_url, story)


def test_a_settle_is_not_taken_for_a_repetition_of_somebody_elses(database_url):
    async def story(db):
        job_id = await a_job(db)
        (old,) = await take(db, [job_id])
        await settle(db, [ending(old, QUEUED)])
        (new,) = await take(db, [job_id])
        await settle(db, [answered(new)])
        assert await settle(db, [ending(old, SUCCEEDED, answer=an_answer("old"))], again=True) == [False]

    play(database_url, story)


def test_a_group_may_end_in_every_way_at_once(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 6)
        loose = await a_job(db)
        claims = await take(db, [*ids, loose])
        states = [SUCCEEDED, FAILED, CANCELLED, EXPIRED, QUEUED, SUCCEEDED, SUCCEEDED]
        group = [answered(c) if s is SUCCEEDED else ending(c, s) for c, s in zip(claims, states, strict=True)]
        assert await settle(db, group) == [True] * 7
        assert [(await job(db, claimed.job_id)).state for claimed in claims] == [state.value for state in states]
        stored = await batch(db, opened.id)
        counters = (stored.succeeded, stored.failed, stored.cancelled, stored.expired, stored.state)
        assert counters == (2, 1, 1, 1, "open")
        await counters_are_exact(db)

    play(database_url, story)


def test_a_job_that_would_be_attempted_again_ends_cancelled_when_that_was_asked_for(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 2)
        claims = await take(db, ids)
        assert (await cancel(db, batch_id=opened.id)).flagged == 2
        group = [ending(claims[0], QUEUED, counted=True, run_after_s=60), answered(claims[1])]
        assert await settle(db, group) == [True, True]
        assert [(await job(db, job_id)).state for job_id in ids] == ["cancelled", "succeeded"]
        assert (await batch(db, opened.id)).state == "finished"

    play(database_url, story)


def test_a_call_row_whose_request_never_left_is_gone_after_the_settle(database_url):
    async def story(db):
        kept, rescued = await take(db, [await a_job(db), await a_job(db)], dead := await a_worker(db))
        assert await settle(db, [ending(kept, QUEUED, unsent=(kept.opened_id,))]) == [True]
        await rows(db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=dead)
        async with db.connect() as leader:
            await rescue(leader)
        assert await settle(db, [ending(rescued, QUEUED, unsent=(rescued.opened_id,))]) == [False]
        assert await rows(db, "SELECT id FROM provider_calls") == []

    play(database_url, story)


NASTY = "a\x00b\x00\x00\\u0000 \\\\\x00 \ud800 \udfff\U0001f600 \\"
CLEAN = "a\ufffdb\ufffd\ufffd\\u0000 \\\\\ufffd \ufffd \ufffd\U0001f600 \\"


def test_what_postgres_cannot_store_is_replaced_in_answers_and_errors(database_url):
    async def story(db):
        claims = await take(db, [await a_job(db), await a_job(db)])
        answer = an_answer(NASTY, tool_calls=[{NASTY: NASTY}])
        group = [
            ending(claims[0], SUCCEEDED, answer=answer),
            ending(claims[1], FAILED, error={"code": NASTY, "providers": [{"reason": NASTY}]}),
        ]
        assert await settle(db, group) == [True, True]
        ((_, _, stored),) = await results(db, claims[0].job_id)
        assert (stored["content"], stored["tool_calls"]) == (CLEAN, [{CLEAN: CLEAN}])
        assert (await job(db, claims[1].job_id)).error == {"code": CLEAN, "providers": [{"reason": CLEAN}]}

    play(database_url, story)


def test_json_without_anything_to_replace_is_left_alone():
    assert jsonb({"a": "\\u0000 ü \U0001f600"}) == '{"a": "\\\\u0000 ü \U0001f600"}'
    assert jsonb(None) is None


def test_eight_connections_settling_three_batches_at_random_leave_exact_counters(database_url):
    async def story(db):
        seed = random.Random(7)
        opened = [await a_batch(db, count, f"batch {count}") for count in (97, 130, 173)]
        ids = [job_id for _, of_batch in opened for job_id in of_batch]
        seed.shuffle(ids)
        claims = await take(db, ids)
        groups: list[list] = [[] for _ in range(80)]
        for claimed in claims:
            state = seed.choice([SUCCEEDED, SUCCEEDED, FAILED, CANCELLED, EXPIRED])
            groups[seed.randrange(80)].append(answered(claimed) if state is SUCCEEDED else ending(claimed, state))

        async def connection(mine):
            for group in mine:
                assert all(await settle(db, group))

        await asyncio.gather(*(connection(groups[n::8]) for n in range(8)))
        await counters_are_exact(db)
        assert [(await batch(db, one.id)).state for one, _ in opened] == ["finished"] * 3

    play(database_url, story)


def test_a_degraded_answer_is_counted_as_one(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 3)
        full, lesser, failed = await take(db, ids)
        settled = answered(lesser)
        lesser_answer = replace(settled.answer, degraded="static")
        await settle(db, [answered(full), replace(settled, answer=lesser_answer), ending(failed, FAILED)])
        stored = await batch(db, opened.id)
        assert (stored.succeeded, stored.degraded, stored.failed, stored.state) == (2, 1, 1, "finished")
        await counters_are_exact(db)
        assert (await reads.batch(db, opened.id)).lacking == 2

    play(database_url, story)


def test_the_last_two_jobs_settled_at_the_same_time_close_the_batch_once(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 2)
        first, last = await take(db, ids)
        held = await one_after_the_other(
            db, "batches", opened.id, lambda: settle(db, [answered(first)]), lambda: settle(db, [ending(last, FAILED)])
        )
        assert held == [[True], [True]]
        stored = await batch(db, opened.id)
        assert (stored.succeeded, stored.failed, stored.state) == (1, 1, "finished")

    play(database_url, story)


@pytest.mark.parametrize("closing_first", [True, False])
def test_the_last_settle_and_the_end_of_the_file_close_the_batch_in_either_order(database_url, closing_first):
    async def story(db):
        opened, ids = await a_batch(db, 1, closed=False)
        (claimed,) = await take(db, ids)
        pair = [lambda: close_batch(db, opened), lambda: settle(db, [answered(claimed)])]
        await one_after_the_other(db, "batches", opened.id, *(pair if closing_first else reversed(pair)))
        stored = await batch(db, opened.id)
        assert (stored.succeeded, stored.total, stored.state) == (1, 1, "finished")

    play(database_url, story)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_and_a_success_at_the_same_time_the_success_wins(database_url, cancel_first):
    async def story(db):
        opened, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        pair = [lambda: cancel(db, job_ids=ids), lambda: settle(db, [answered(claimed)])]
        values = await one_after_the_other(db, "jobs", ids[0], *(pair if cancel_first else reversed(pair)))
        assert [True] in values
        assert (await job(db, ids[0])).state == "succeeded"
        assert len(await results(db, ids[0])) == 1
        assert (await batch(db, opened.id)).state == "finished"
        await counters_are_exact(db)

    play(database_url, story)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_and_an_attempt_that_gives_up_at_the_same_time_end_cancelled(database_url, cancel_first):
    async def story(db):
        _, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        pair = [lambda: cancel(db, job_ids=ids), lambda: settle(db, [ending(claimed, QUEUED, run_after_s=60)])]
        await one_after_the_other(db, "jobs", ids[0], *(pair if cancel_first else reversed(pair)))
        assert (await job(db, ids[0])).state == "cancelled"
        await counters_are_exact(db)

    play(database_url, story)


def test_a_claim_passes_by_a_job_that_is_being_cancelled(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 2)
        async with transaction(db) as holder:
            await rows(holder, "SELECT FROM batches FOR UPDATE")
            cancelling = asyncio.create_task(cancel(db, job_ids=ids[:1]))
            await blocked(db, 1)
            assert [claimed.job_id for claimed in await take(db, ids)] == ids[1:]
        assert (await cancelling).cancelled == 1
        assert ((await job(db, ids[0])).state, (await job(db, ids[0])).fence) == ("cancelled", 0)
        assert (await batch(db, opened.id)).cancelled == 1

    play(database_url, story)


def test_a_settle_that_waits_for_a_rescue_is_refused(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        await rows(db, "UPDATE workers SET state = 'dead'")
        async with transaction(db) as leader:
            assert await rescue(leader) == ids
            settling = asyncio.create_task(settle(db, [answered(claimed)]))
            await blocked(db, 1)
        assert await settling == [False]
        assert ((await job(db, ids[0])).state, (await batch(db, opened.id)).succeeded) == ("queued", 0)

    play(database_url, story)


def test_a_rescue_passes_by_a_job_that_is_being_settled(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        await rows(db, "UPDATE workers SET state = 'dead'")
        async with transaction(db) as holder, db.connect() as leader:
            await rows(holder, "SELECT FROM batches FOR UPDATE")
            settling = asyncio.create_task(settle(db, [answered(claimed)]))
            await blocked(db, 1)
            assert await rescue(leader) == []
        assert await settling == [True]
        async with db.connect() as leader:
            assert await rescue(leader) == []
        assert (await batch(db, opened.id)).state == "finished"

    play(database_url, story)


def test_an_expiry_passes_by_a_job_that_is_being_claimed(database_url):
    async def story(db):
        job_id = await a_job(db)
        async with transaction(db) as claiming:
            await rows(claiming, "UPDATE jobs SET state = 'running', fence = 1, worker_id = gen_random_uuid()")
            async with db.connect() as leader:
                await rows(leader, "SELECT set_config('lock_timeout', '1s', false)")
                assert await expire(leader) == []
        assert (await job(db, job_id)).state == "running"

    play(database_url, story)


def test_a_late_settle_cannot_end_a_job_that_was_requeued(database_url):
    async def story(db):
        opened, ids = await a_batch(db, 1)
        (claimed,) = await take(db, ids)
        await settle(db, [ending(claimed, FAILED)])
        assert await requeue(db, batch_id=opened.id) == 1
        assert await settle(db, [ending(claimed, FAILED)], again=True) == [False]
        assert (await job(db, ids[0])).state == "queued"
        await counters_are_exact(db)

    play(database_url, story)


def test_settles_cancels_claims_rescues_and_expiries_of_the_same_jobs_do_not_deadlock(database_url):
    """Locks are always taken jobs first, in the order of their ids, then batches, in the order of theirs."""

    async def story(db):
        seed = random.Random(3)
        opened = [await a_batch(db, 150, name) for name in ("one", "two")]
        ids = [job_id for _, of_batch in opened for job_id in of_batch]
        dying = await a_worker(db)
        done = Counter()

        async def work():
            for _ in range(12):
                pack = seed.sample(ids, 120)
                claims = await take(db, pack, dying)
                seed.shuffle(claims)
                done["claimed"] += len(claims)
                again = [ending(claimed, QUEUED) for claimed in claims]
                done["settled"] += sum(await settle(db, again))

        async def meddle():
            for turn in range(12):
                await cancel(db, job_ids=seed.sample(ids, 20))
                await requeue(db, batch_id=opened[turn % 2][0].id)
                await requeue(db, job_ids=ids)

        async def lead():
            async with db.connect() as leader:
                for state in ["dead", "live"] * 10:
                    await rows(leader, "UPDATE workers SET state = :state", state=state)
                    await rescue(leader)
                    await expire(leader)

        await asyncio.gather(work(), work(), work(), work(), meddle(), meddle(), lead())
        assert done["claimed"] >= done["settled"] > 0
        # Without the order there are dozens. One was seen in some hundred runs, its cause not found; `run` tries again after one.
        assert (await rows(db, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))[0].deadlocks == 0
        await counters_are_exact(db)

    play(database_url, story)


def test_a_statement_undone_to_end_a_deadlock_is_run_again(database_url):
    async def story(db):
        one, two = [await a_job(db) for _ in range(2)]
        lock = text("UPDATE jobs SET chain = chain WHERE id = :id")
        async with db.connect() as other:
            await other.execution_options(isolation_level="READ COMMITTED")
            await other.execute(text("SET deadlock_timeout = '1min'"))  # so that it is ours that is undone
            await other.execute(lock, {"id": two})
            both = text(
                "WITH a AS (UPDATE jobs SET chain = chain WHERE id = :one RETURNING id) "
                "SELECT id FROM jobs WHERE id = :two AND EXISTS (SELECT FROM a) FOR UPDATE"
            )
            ours = asyncio.create_task(run(db, both, one=one, two=two))
            await until(db, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
            await other.execute(lock, {"id": one})
            await other.rollback()
        assert [row.id for row in await ours] == [two]

    play(database_url, story)


def test_a_worker_held_dead_claims_nothing(database_url):
    async def story(db):
        job_id, worker = await a_job(db), await a_worker(db, state="dead")
        assert await take(db, [job_id], worker) == []
        assert (await job(db, job_id)).state == "queued"

    play(database_url, story)


def test_nothing_is_claimed_from_a_paused_lane(database_url):
    async def story(db):
        job_id = await a_job(db)
        await rows(db, "UPDATE lanes SET paused = true")
        assert await take(db, [job_id]) == []
        await rows(db, "UPDATE lanes SET paused = false")
        assert len(await take(db, [job_id])) == 1

    play(database_url, story)


@pytest.mark.parametrize("request_", ["null", "[]", '{"messages": "hello"}', '{"messages": [{}], "tools": 3}'])
def test_a_request_that_cannot_be_read_fails_its_own_job_and_leaves_the_others_of_the_pack_alone(database_url, request_):
    async def story(db):
        _, ids = await a_batch(db, 3)
        await rows(db, "UPDATE job_requests SET request = CAST(:request AS jsonb) WHERE job_id = :id", request=request_, id=ids[1])
        claims = await take(db, ids)
        assert [claimed.job_id for claimed in claims] == [ids[0], ids[2]]
        failed = await job(db, ids[1])
        assert (failed.state, failed.error["code"]) == ("failed", "unreadable_request")
        assert await calls(db, ids[1]) == []
        await counters_are_exact(db)

    play(database_url, story)


def test_a_kept_answer_that_cannot_be_read_is_passed_over(database_url):
    async def story(db):
        job_id = await a_job(db)
        await take(db, [job_id])
        await rows(db, "UPDATE provider_calls SET outcome = 'answered', answer = '{\"content\": 3}'")
        await rows(db, "UPDATE jobs SET state = 'queued', worker_id = NULL")
        (again,) = await take(db, [job_id])
        assert [(asked.outcome, asked.answer) for asked in again.asked] == [("answered", None)]

    play(database_url, story)


def test_a_call_of_a_job_that_was_lost_meanwhile_is_not_opened(database_url):
    async def story(db):
        lost, ours = await take(db, [await a_job(db), await a_job(db)])
        await rows(db, "UPDATE jobs SET state = 'queued', worker_id = NULL WHERE id = :id", id=lost.job_id)
        wanted = [NewCall(id=new_id(), job_id=one.job_id, fence=one.fence, provider="second", model="m") for one in (lost, ours)]
        assert await open_calls(db, wanted) == [False, True]
        await take(db, [lost.job_id])  # under a higher fence
        assert await open_calls(db, wanted) == [False, True]
        assert [call.provider for call in await calls(db, lost.job_id)] == ["first"]
        assert [call.provider for call in await calls(db, ours.job_id)] == ["first", "second"]

    play(database_url, story)


def test_a_call_of_a_job_that_is_just_being_rescued_is_not_opened(database_url):
    async def story(db):
        (claimed,) = await take(db, [await a_job(db)])
        wanted = [NewCall(id=new_id(), job_id=claimed.job_id, fence=claimed.fence, provider="second", model="m")]
        async with transaction(db) as rescuer:
            await rows(rescuer, "SELECT FROM jobs WHERE id = :id FOR NO KEY UPDATE", id=claimed.job_id)
            assert await open_calls(db, wanted) == [False]
        assert await open_calls(db, wanted) == [True]

    play(database_url, story)


def test_what_an_earlier_provider_said_is_booked_when_the_next_call_is_opened_and_known_after_a_crash(database_url):
    async def story(db):
        worker = await a_worker(db)
        (claimed,) = await take(db, [await a_job(db)], worker)
        failed = a_call(claimed.opened_id, Signal.SERVER_ERROR)
        after = NewCall(id=new_id(), job_id=claimed.job_id, fence=claimed.fence, provider="second", model="m", ended=(failed,))
        assert await open_calls(db, [after]) == [True]
        await rows(db, "UPDATE workers SET state = 'dead' WHERE id = :id", id=worker)
        async with db.connect() as connection:
            await rescue(connection)
        booked = [(call.outcome, call.cost_usd) for call in await calls(db, claimed.job_id)]
        assert booked == [("server_error", Decimal("0.25")), ("orphaned", None)]
        (again,) = await take(db, [claimed.job_id])
        assert [(asked.provider, asked.outcome) for asked in again.asked] == [("first", "server_error"), ("second", "orphaned")]
        assert await settle(db, [ending(claimed, calls=(failed, a_call(after.id)))]) == [False]
        assert [call.outcome for call in await calls(db, claimed.job_id)] == ["server_error", "answered"]

    play(database_url, story)


def test_a_job_whose_request_is_gone_fails_and_is_not_claimed_for_ever(database_url):
    async def story(db):
        _, ids = await a_batch(db, 2)
        await rows(db, "DELETE FROM job_requests WHERE job_id = :id", id=ids[0])
        assert [claimed.job_id for claimed in await take(db, ids)] == [ids[1]]
        assert (await job(db, ids[0])).error["code"] == "unreadable_request"

    play(database_url, story)

"""The chain with the real gates, asked of scripted providers; time is virtual where it matters."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from scripted import (
    CALL_USD,
    FAILED,
    USAGE,
    Overheard,
    Stage,
    a_claim,
    answered,
    failed,
    hangs,
    lasting,
    reasons,
    virtual_time,
    virtually,
    walked,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from worker.chain import PARKED_S
from worker.job import ChatRequest, Lane, new_id
from worker.ledger import Asked, Claim
from worker.providers.provider import Reply
from worker.resilience.breaker_rules import RULES
from worker.resilience.gate import Ending, Gates, Limits
from worker.signals import POLICIES, Billing, Signal, Verdict
from worker.step import FAILOVER_S, LEAST_CALL_S, MOST_EXTRAS, RETRY_CAP_S
from worker.walk import Answered, Doubtful, Exhausted, Outcome, OutOfTime, Parked, Refused, Walk

SCHEMA = {"type": "object", "required": ["label"], "properties": {"label": {"type": "string"}}}
WITH_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}

# --- order, reasons, costs ---


def test_providers_are_asked_in_order_until_the_first_answer():
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "b": [failed(Signal.DROPPED)], "c": [answered()], "d": [answered()]})
    outcome, walk = walked(stage)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a", "b", "c"]
    assert reasons(walk) == [("a", "overloaded"), ("b", "dropped")]


def test_a_failed_provider_leaves_status_code_and_wait_in_its_reason():
    stage = Stage({"a": [failed(Signal.OVERLOADED, http_status=503, error_code="busy", retry_after_s=7)], "b": [answered()]})
    _, walk = walked(stage)
    assert walk.reasons[0].to_json() == {
        "provider": "a", "reason": "overloaded", "http_status": 503, "error_code": "busy", "retry_after_s": 7,
    }  # fmt: skip


def test_every_call_is_booked_with_its_cost_also_the_failed_ones():
    billed_and_useless = Reply(signal=Signal.MALFORMED, usage=USAGE)
    stage = Stage({"a": [billed_and_useless], "b": [failed(Signal.DROPPED)], "c": [answered()]})
    _, walk = walked(stage)
    assert [(call.provider, call.cost_usd) for call in walk.calls] == [("a", CALL_USD), ("b", None), ("c", CALL_USD)]


def test_a_call_is_on_the_books_before_its_request_leaves():
    stage = Stage({"a": [failed()], "b": [answered()]})
    walked(stage)
    events = [entry[:3] for entry in stage.diary if entry[0] in ("opened", "sent")]
    assert [entry[0] for entry in events] == ["opened", "sent"] * 3  # a, a again, b
    assert all(events[i][1:] == events[i + 1][1:] for i in (0, 2, 4))


def test_the_row_opened_by_the_claim_is_used_for_its_provider_only_once():
    row = new_id()
    stage = Stage({"a": [failed()], "b": [answered()]})
    _, walk = walked(stage, opened_id=row, opened_provider="a")
    assert [call.id == row for call in walk.calls] == [True, False, False]
    assert walk.unsent == []


def test_a_row_opened_for_a_provider_that_was_not_asked_is_unsent():
    row = new_id()
    stage = Stage({"a": [answered()]})
    _, walk = walked(stage, opened_id=row, opened_provider="z")
    assert walk.unsent == [row]


def test_an_adapter_that_breaks_its_contract_is_its_providers_fault_not_the_jobs():
    stage = Stage({"a": [KeyError("usage")], "b": [answered()]})
    outcome, walk = walked(stage)
    assert isinstance(outcome, Answered)
    assert (walk.calls[0].signal, walk.calls[0].cost_usd) == (Signal.DROPPED, None)
    assert stage.told("a") == [Verdict.FAILURE]


# --- what signals do ---


@pytest.mark.parametrize("signal", [Signal.INVALID_REQUEST, Signal.CONTENT_POLICY])
def test_a_request_nobody_may_answer_ends_the_walk(signal):
    stage = Stage({"a": [failed(signal)], "b": [answered()]})
    outcome, _ = walked(stage)
    assert outcome == Refused(signal)
    assert stage.said("sent") == ["a"]


@pytest.mark.parametrize("signal", [Signal.UNAUTHORIZED, Signal.QUOTA_EXHAUSTED, Signal.MODEL_NOT_FOUND])
def test_a_fault_of_key_quota_or_model_isolates_the_provider_for_everyone_and_the_chain_goes_on(signal, redis_url):
    async def main() -> None:
        here, there = Redis.from_url(redis_url), Redis.from_url(redis_url)
        async with here, there:
            await play(here, there)

    async def play(here: Redis, there: Redis) -> None:
        one = Stage({"a": [failed(signal)], "b": [answered()]}, gates=Overheard(here))
        other = Stage({"a": [answered()], "b": [answered()]}, gates=Overheard(there))
        assert isinstance(await one.run(Walk(a_claim())), Answered)
        walk = Walk(a_claim())
        assert isinstance(await other.run(walk), Answered)
        assert reasons(walk) == [("a", "isolated")]
        assert other.said("sent") == ["b"]

    asyncio.run(main())


def test_a_request_too_long_goes_only_to_larger_windows():
    windows = {"a": {"context_tokens": 8_000}, "b": {"context_tokens": 8_000}, "c": {"context_tokens": 128_000}}
    too_long = failed(Signal.CONTEXT_TOO_LONG)
    outcome, walk = walked(Stage({"a": [too_long], "b": [answered()], "c": [answered()]}, config=windows))
    assert isinstance(outcome, Answered)
    assert [call.provider for call in walk.calls] == ["a", "c"]
    assert reasons(walk) == [("a", "context_too_long"), ("b", "window_too_small")]


def test_a_request_too_long_for_all_windows_is_refused_at_once():
    windows = {"a": {"context_tokens": 8_000}, "b": {"context_tokens": 4_000}}
    outcome, _ = walked(Stage({"a": [failed(Signal.CONTEXT_TOO_LONG)], "b": [answered()]}, config=windows))
    assert outcome == Refused(Signal.CONTEXT_TOO_LONG)


def test_an_answer_that_does_not_fit_is_paid_and_the_next_provider_is_asked():
    stage = Stage({"a": [answered('{"label": 1}')], "b": [answered('{"label": "x"}')]})
    outcome, walk = walked(stage, request=ChatRequest([], WITH_SCHEMA))
    assert isinstance(outcome, Answered)
    assert outcome.answer.content == '{"label": "x"}'
    assert [(c.signal, c.cost_usd, c.answer is None) for c in walk.calls] == [
        (Signal.UNFIT, CALL_USD, True),
        (Signal.ANSWERED, CALL_USD, False),
    ]
    assert stage.told("a") == [Verdict.SUCCESS]


def test_when_nobody_answers_in_the_wanted_shape_the_job_is_refused():
    outcome, _ = walked(Stage({"a": [answered("no")], "b": [answered("nor I")]}), request=ChatRequest([], WITH_SCHEMA))
    assert outcome == Refused(Signal.UNFIT)


def test_a_schema_that_is_none_is_refused_before_anything_is_paid():
    parameters = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}
    stage = Stage({"a": [answered()]})
    outcome, walk = walked(stage, request=ChatRequest([], parameters))
    assert outcome == Refused(Signal.INVALID_REQUEST)
    assert stage.said("sent") == []
    assert walk.calls == []


def test_everyone_asked_and_failed_is_exhausted_with_a_reason_each():
    outcome, walk = walked(Stage({"a": [failed()], "b": [failed(Signal.UNREACHABLE)]}))
    assert outcome == Exhausted()
    assert reasons(walk) == [("a", "server_error"), ("b", "unreachable")]


# --- retries ---


def test_a_passing_fault_is_asked_once_more_and_counts_as_success():
    stage = Stage({"a": [failed(), answered()], "b": [answered()]})
    outcome, walk = walked(stage)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a", "a"]
    assert stage.told("a") == [Verdict.FAILURE, Verdict.SUCCESS]
    assert [call.signal for call in walk.calls] == [FAILED, Signal.ANSWERED]


@pytest.mark.parametrize("signal", [s for s, policy in POLICIES.items() if not policy.retry and s is not Signal.ANSWERED])
def test_what_a_retry_cannot_help_is_not_retried(signal):
    stage = Stage({"a": [failed(signal)]}, config={"a": {"max_retries": 5}})
    walked(stage)
    assert stage.said("sent") == ["a"]


def test_no_retry_when_the_next_provider_is_nearer():
    slow = lasting(FAILOVER_S * 0.6, failed())
    outcome, walk, took_s = virtually(Stage({"a": [slow], "b": [answered()]}))
    assert isinstance(outcome, Answered)
    assert [call.provider for call in walk.calls] == ["a", "b"]
    assert took_s < FAILOVER_S


def test_the_last_provider_is_retried_however_long_its_failure_took():
    stage = Stage({"a": [lasting(3, failed()), answered()]})
    outcome, walk, _ = virtually(stage)
    assert isinstance(outcome, Answered)
    assert len(walk.calls) == 2


def test_a_retry_waits_as_long_as_the_provider_asked():
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=4), answered()]})
    outcome, _, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert took_s == pytest.approx(4)


def test_a_wait_too_long_for_a_slot_is_left_to_the_breaker():
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=RETRY_CAP_S + 1), answered()]})
    outcome, _, took_s = virtually(stage, remaining_s=86_400)
    assert outcome == Parked(RETRY_CAP_S + 1, new_walk=True)
    assert took_s == 0


def test_no_retry_that_would_begin_past_the_deadline():
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=4), answered()]})
    outcome, walk, took_s = virtually(stage, remaining_s=4 + LEAST_CALL_S / 2)
    assert outcome == Parked(4, new_walk=True)
    assert len(walk.calls) == 1
    assert took_s == 0


def test_providers_without_room_park_the_job_until_the_first_of_them_has_some():
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=30)], "b": [failed(Signal.SLOW_DOWN, retry_after_s=20)]})
    assert walked(stage)[0] == Parked(20, new_walk=True)


@pytest.mark.parametrize("wait_s", [None, 0])
def test_one_without_room_that_names_no_wait_is_asked_again_when_its_gate_lets_it(wait_s):
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=3_000)], "b": [failed(Signal.SLOW_DOWN, retry_after_s=wait_s)]})
    assert walked(stage)[0] == Parked(POLICIES[Signal.SLOW_DOWN].block_s, new_walk=True)


def test_one_that_failed_among_those_without_room_costs_an_attempt():
    stage = Stage({"a": [failed(Signal.RATE_LIMITED, retry_after_s=30)], "b": [failed(Signal.OVERLOADED)]})
    assert walked(stage)[0] == Exhausted()


def test_who_could_not_be_reached_is_left_at_once_while_there_are_others():
    stage = Stage({"a": [failed(Signal.UNREACHABLE), answered()], "b": [answered()]})
    outcome, walk = walked(stage)
    assert isinstance(outcome, Answered)
    assert [call.provider for call in walk.calls] == ["a", "b"]


def test_a_worker_that_lost_its_heartbeat_while_waiting_does_not_retry():
    alive = iter([True, True, False])
    stage = Stage({"a": [failed(), answered()]}, may_call=lambda _: next(alive))
    outcome, walk = walked(stage)
    assert outcome == Exhausted()
    assert [call.signal for call in walk.calls] == [FAILED]
    assert len(walk.unsent) == 1
    assert stage.told("a") == [Verdict.FAILURE, Verdict.NEUTRAL]


def test_a_worker_without_a_heartbeat_asks_nobody():
    stage = Stage({"a": [answered()]}, may_call=lambda _: False)
    assert walked(stage)[0] == Parked(PARKED_S, ours=True)
    assert stage.diary == []


# --- the breaker ---


def test_the_gate_is_told_of_every_call():
    stage = Stage({"a": [failed()], "b": [failed(Signal.UNREACHABLE)]}, config={"a": {"max_retries": 2}})
    walked(stage)
    assert stage.said("sent") == stage.said("told") == ["a"] * 3 + ["b"] * 2


def test_an_attempt_makes_so_many_extra_calls_and_a_later_one_none():
    for attempts, sent in ((0, 1 + MOST_EXTRAS), (1, 1 + MOST_EXTRAS), (2, 1)):
        stage = Stage({"a": [failed()]}, config={"a": {"max_retries": 5}})
        walked(stage, attempts=attempts)
        assert stage.said("sent") == ["a"] * sent


def with_redis(redis_url: str, main: Callable[[Redis], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Redis.from_url(redis_url) as redis:
            await main(redis)

    asyncio.run(run())


async def opened(gates: Gates, provider: str) -> None:
    """Its breaker is open, by failures in a row."""
    for _ in range(RULES.fails_in_a_row):
        admission = await gates.admit(provider, lease_s=1)
        await gates.report(provider, admission, Ending(verdict=Verdict.FAILURE))


async def half_open(gates: Gates, provider: str) -> None:
    """Its next call is the probe."""
    admission = await gates.admit(provider, lease_s=1)
    await gates.report(provider, admission, Ending(verdict=Verdict.NEUTRAL, isolate_s=0.001))
    gates._seen.clear()  # another process has not heard of it either


def test_when_all_are_denied_the_job_is_parked_until_the_first_may_be_asked(redis_url):
    async def main(redis: Redis) -> None:
        gates = Overheard(redis)
        stage = Stage({"a": [answered()], "b": [answered()]}, gates=gates)
        for name, wait_s in (("a", 50), ("b", 20)):
            admission = await gates.admit(name, lease_s=1)
            await gates.report(name, admission, Ending(verdict=Verdict.NEUTRAL, block_s=wait_s))
        walk = Walk(a_claim(opened_id=new_id(), opened_provider="a"))
        outcome = await stage.run(walk)
        assert isinstance(outcome, Parked)
        assert 19 < outcome.retry_after_s <= 20
        assert [provider for provider, _ in reasons(walk)] == ["a", "b"]
        assert walk.unsent == [walk.claim.opened_id]
        assert stage.said("sent") == []

    with_redis(redis_url, main)


def test_who_was_denied_is_skipped_with_the_breakers_state_as_reason(redis_url):
    async def main(redis: Redis) -> None:
        stage = Stage({"a": [answered()], "b": [failed()]}, gates=Overheard(redis))
        await opened(stage.gates, "a")
        walk = Walk(a_claim())
        assert await stage.run(walk) == Exhausted()  # b could be asked, so this is no parking
        assert reasons(walk) == [("a", "open"), ("b", "server_error")]

    with_redis(redis_url, main)


def test_a_probe_is_not_retried(redis_url):
    async def main(redis: Redis) -> None:
        stage = Stage({"a": [failed()]}, gates=Overheard(redis), config={"a": {"max_retries": 3}})
        await half_open(stage.gates, "a")
        await asyncio.sleep(0.002)
        await stage.run(Walk(a_claim()))
        assert stage.said("sent") == ["a"]

    with_redis(redis_url, main)


def test_a_cancelled_walk_books_its_call_and_frees_the_probe(redis_url):
    async def main(redis: Redis) -> None:
        stage = Stage({"a": [hangs, answered()]}, gates=Overheard(redis))
        await half_open(stage.gates, "a")
        await asyncio.sleep(0.002)
        walk = Walk(a_claim())
        task = asyncio.create_task(stage.run(walk))
        await until(lambda: stage.said("sent"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [(call.signal, call.cost_usd) for call in walk.calls] == [(Signal.CANCELLED, None)]
        assert stage.told("a")[-1] is Verdict.NEUTRAL
        admission = await stage.gates.admit("a", lease_s=1)
        assert admission.allowed
        assert admission.probe

    with_redis(redis_url, main)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# --- the limiter ---


def limited(limits: dict[str, Limits], **changes: Any) -> Stage:
    gates = Overheard(None, limits)
    return Stage({"a": [answered("from a")], "b": [answered("from b")]}, gates=gates, **changes)


def one_after_the_other(stage: Stage, *claims: Claim) -> list[tuple[Outcome, Walk]]:
    with virtual_time() as runner:

        async def main() -> list[tuple[Outcome, Walk]]:
            walks = [Walk(claim) for claim in claims]
            return [(await stage.run(walk), walk) for walk in walks]

        return runner.run(main())


SCARCE = {"a": Limits(rpm=6)}  # a burst of one, the next after 11 s


def test_a_person_is_not_kept_waiting_for_room_but_asks_the_next_provider():
    stage = limited(SCARCE)
    (_, first), (_, second) = one_after_the_other(stage, a_claim(lane=Lane.INTERACTIVE), a_claim(lane=Lane.INTERACTIVE))
    assert [call.provider for call in first.calls] == ["a"]
    assert [call.provider for call in second.calls] == ["b"]
    assert reasons(second) == [("a", "limited")]


def test_a_bulk_job_waits_for_room_at_a_provider_that_is_well_rather_than_ask_a_dearer_one():
    for changes, sent in (({}, ["a"]), ({"route": {"overflow": True}}, ["a", "b"])):
        stage = limited(SCARCE, **changes)
        (_, (outcome, walk)) = one_after_the_other(stage, a_claim(lane=Lane.INTERACTIVE), a_claim(remaining_s=86_400))
        assert stage.said("sent") == sent
        assert isinstance(outcome, Parked if sent == ["a"] else Answered)
        assert reasons(walk) == [("a", "limited")]


def test_but_not_past_half_of_its_time():
    stage = limited(SCARCE)
    (_, (outcome, _)) = one_after_the_other(stage, a_claim(lane=Lane.INTERACTIVE), a_claim(remaining_s=15))
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a", "b"]


def test_a_moment_for_room_is_waited_in_place():
    stage = limited({"a": Limits(rpm=600)})  # ten at once, then one every 111 ms
    walks = one_after_the_other(stage, *(a_claim(lane=Lane.INTERACTIVE) for _ in range(12)))
    assert [call.provider for _, walk in walks for call in walk.calls] == ["a"] * 12


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (answered(), {"tokens": 1_100, "sent": True, "ease": 1.0, "cost_usd": CALL_USD}),
        (failed(Signal.UNREACHABLE), {"tokens": None, "sent": False, "took_ms": None}),
        (failed(Signal.INVALID_REQUEST), {"tokens": 0, "sent": True}),
        (failed(Signal.OVERLOADED), {"tokens": None, "ease": 0.7, "block_s": 1}),
        (failed(Signal.RATE_LIMITED), {"block_s": 1, "named": False}),
        (failed(Signal.SLOW_DOWN, retry_after_s=9), {"ease": 0.5, "block_s": 9, "named": True}),
        (failed(Signal.UNAUTHORIZED), {"isolate_s": 300, "tokens": 0}),
        (failed(Signal.TIMED_OUT), {"tokens": None, "slow": True}),
        (failed(remaining_requests=3, remaining_tokens=4), {"remaining_requests": 3, "remaining_tokens": 4}),
    ],
)
def test_what_a_reply_means_for_the_limits_of_its_provider(reply, told):
    stage = Stage({"a": [reply]}, config={"a": {"max_retries": 0}})
    walked(stage, remaining_s=600)
    (ending,) = [entry[3] for entry in stage.diary if entry[0] == "told"]
    assert {name: getattr(ending, name) for name in told} == told


# --- the books ---


@pytest.mark.parametrize("error", [OperationalError("x", {}, Exception()), NoConnection("pool is empty")])
def test_without_the_books_no_request_leaves_and_the_job_is_parked(error):
    stage = Stage({"a": [answered()], "b": [answered()]}, opening=error)
    outcome, walk = walked(stage)
    assert isinstance(outcome, Parked)
    assert stage.said("sent") == []
    assert stage.told("a") == [Verdict.NEUTRAL]
    assert len(walk.unsent) == 1  # committed or not is not known: it is removed either way


def test_a_walk_cancelled_while_its_call_is_put_on_the_books_leaves_no_row_behind():
    async def main() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def opening() -> None:
            begun.set()
            await go.wait()

        stage = Stage({"a": [answered()]}, opening=opening)
        walk = Walk(a_claim())
        task = asyncio.create_task(stage.run(walk))
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()  # the row has to be there before it can be removed
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [str(row) for row in walk.unsent] == [entry[2] for entry in stage.diary if entry[0] == "opened"]
        assert walk.calls == []

    asyncio.run(main())


def test_books_that_took_until_the_deadline_stop_the_call():
    async def slowly() -> None:
        await asyncio.sleep(10)

    stage = Stage({"a": [answered()], "b": [answered()]}, opening=slowly)
    outcome, walk, _ = virtually(stage, remaining_s=5)
    assert outcome == OutOfTime()
    assert stage.said("sent") == []
    assert len(walk.unsent) == 1
    assert stage.told("a") == [Verdict.NEUTRAL]


# --- time ---


def test_a_deadline_shorter_than_the_reserves_still_gives_everyone_a_turn():
    stage = Stage({"a": [lasting(60, answered())], "b": [lasting(60, answered())], "c": [lasting(0.01, answered())]})
    outcome, walk, took_s = virtually(stage, remaining_s=1)
    assert isinstance(outcome, Answered)
    assert [call.signal for call in walk.calls] == [Signal.OUT_OF_TIME, Signal.OUT_OF_TIME, Signal.ANSWERED]
    assert took_s < 1


def test_what_our_deadline_cut_short_does_not_count_against_the_provider():
    stage = Stage({"a": [lasting(60, answered())]})
    outcome, walk, took_s = virtually(stage, remaining_s=1)
    assert outcome == OutOfTime()
    assert stage.told("a") == [Verdict.NEUTRAL]
    assert walk.calls[0].cost_usd is None
    assert took_s == pytest.approx(1)


def test_a_providers_own_limit_counts_against_it():
    stage = Stage({"a": [lasting(60, answered())]}, config={"a": {"timeout_s": 3}})
    outcome, walk, took_s = virtually(stage)
    assert outcome == Exhausted()
    assert walk.calls[0].signal is Signal.TIMED_OUT
    assert stage.told("a") == [Verdict.FAILURE]
    assert took_s == pytest.approx(3)


def test_a_retry_leaves_the_others_their_reserve():
    stage = Stage({"a": [lasting(0.1, failed()), lasting(60, answered())], "b": [answered()]})
    _, walk, _ = virtually(stage, remaining_s=3)
    sent = [entry for entry in stage.diary if entry[0] == "sent"]
    assert [entry[1] for entry in sent] == ["a", "a", "b"]
    assert walk.ends_at_s - sent[2][3] >= 1.39  # half of what was left when the retry began


def test_with_no_time_left_nobody_is_asked():
    stage = Stage({"a": [answered()]})
    assert walked(stage, remaining_s=LEAST_CALL_S / 2)[0] == OutOfTime()
    assert stage.diary == []


# --- going on where an earlier attempt ended ---


def test_a_walk_goes_on_after_those_who_have_answered_for_themselves():
    asked = (
        Asked(provider="a", outcome="server_error", answer=None),
        Asked(provider="b", outcome="orphaned", answer=None),
    )
    stage = Stage({"a": [answered()], "b": [failed()], "c": [answered()]})
    outcome, walk = walked(stage, asked=asked)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["b", "b", "c"]
    assert reasons(walk) == [("a", "server_error"), ("b", "server_error")]


def test_an_answer_that_was_paid_for_is_used_and_no_call_is_made():
    answer = answered("bought earlier").answer
    asked = (Asked(provider="a", outcome="server_error", answer=None), Asked(provider="b", outcome="answered", answer=answer))
    stage = Stage({"a": [answered()], "b": [answered()]})
    outcome, walk = walked(stage, asked=asked)
    assert outcome == Answered(answer)
    assert stage.diary == []
    assert walk.calls == []


@pytest.mark.parametrize("signal", [Signal.INVALID_REQUEST, Signal.CONTENT_POLICY])
def test_what_ended_the_earlier_attempt_ends_this_one_too(signal):
    stage = Stage({"a": [answered()], "b": [answered()]})
    outcome, walk = walked(stage, asked=(Asked(provider="a", outcome=signal.value, answer=None),))
    assert outcome == Refused(signal)
    assert stage.said("sent") == []
    assert reasons(walk) == [("a", signal.value)]


def test_an_earlier_attempt_with_all_others_denied_is_exhausted_not_parked(redis_url):
    async def main(redis: Redis) -> None:
        stage = Stage({"a": [answered()], "b": [answered()]}, gates=Overheard(redis))
        await opened(stage.gates, "b")
        walk = Walk(a_claim(asked=(Asked(provider="a", outcome="overloaded", answer=None),)))
        assert await stage.run(walk) == Exhausted()

    with_redis(redis_url, main)


# --- calls that may have been billed without an answer ---


@pytest.mark.parametrize("signal", [signal for signal in Signal if POLICIES[signal].billing is Billing.UNKNOWN])
def test_a_chain_that_parks_doubts_asks_nobody_after_a_call_that_may_have_been_billed(signal):
    stage = Stage({"one": [failed(signal), answered()], "two": [answered()]}, route={"on_unknown": "fail"})
    outcome, walk = walked(stage)
    assert outcome == Doubtful()
    assert stage.said("sent") == ["one"]
    assert [call.billing for call in walk.calls] == [Billing.UNKNOWN]


@pytest.mark.parametrize("outcome", ["orphaned", "cancelled", "timed_out"])
def test_nor_after_an_attempt_that_left_one_behind(outcome):
    asked = (Asked(provider="one", outcome=outcome, answer=None),)
    for on_unknown, expected, sent in (("fail", Doubtful(), []), ("retry", Answered(answered().answer), 1)):
        stage = Stage({"one": [answered()], "two": [answered()]}, route={"on_unknown": on_unknown})
        assert walked(stage, asked=asked, fence=2)[0] == expected
        assert len(stage.said("sent")) == (sent or 0)


def test_but_uses_the_answer_of_one_that_came_late_and_goes_on_after_free_failures():
    late = (Asked(provider="one", outcome="answered", answer=answered().answer), Asked(provider="two", outcome="orphaned", answer=None))
    stage = Stage({"one": [answered()], "two": [answered()]}, route={"on_unknown": "fail"})
    assert walked(stage, asked=late, fence=3)[0] == Answered(answered().answer)
    stage = Stage({"one": [failed(Signal.OVERLOADED)], "two": [answered()]}, route={"on_unknown": "fail"})
    assert walked(stage)[0] == Answered(answered().answer)
    assert stage.said("sent") == ["one", "two"]


def test_a_job_that_is_somebody_elses_by_now_is_not_asked_of_anybody():
    stage = Stage({"one": [answered()], "two": [answered()]}, ours=False)
    assert walked(stage)[0] == Parked(PARKED_S, ours=True)
    assert stage.said("sent") == []

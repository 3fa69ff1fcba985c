"""A slow provider is hedged within a budget; a race asks all. The first answer wins, and who lost is on the books."""

import asyncio
from decimal import Decimal

import pytest
from scripted import Overheard, Stage, a_claim, answered, failed, hangs, lasting, reasons, virtually, walked

from worker.hedge import RACE_S, first_answer
from worker.signals import Billing, Signal, Verdict
from worker.step import OVERTAKEN
from worker.walk import Answered, Exhausted, OutOfTime, Parked, Refused, Walk

ELSEWHERE = {"b": {"base_url": "http://127.0.0.2:1/v1"}, "c": {"base_url": "http://127.0.0.3:1/v1"}}
HEDGE = {"strategy": "hedge"}
RACE = {"strategy": "race"}


class Known(Overheard):
    """Gates that know how long answers take, and allow so many hedges."""

    allowance = 100
    p95 = 1.0
    asked: list[tuple[str, Decimal | None]]

    async def p95_s(self, provider):
        return self.p95

    async def may_hedge(self, provider, *, cost_usd):
        self.asked = [*getattr(self, "asked", []), (provider, cost_usd)]
        self.allowance -= 1
        return self.allowance >= 0


def known(**changes):
    gates = Known(None)
    for name, value in changes.items():
        setattr(gates, name, value)
    return gates


def hedging(script, **changes):
    gates = changes.pop("gates", None) or known()
    config = {name: dict(ELSEWHERE.get(name, {})) | changes.get("config", {}).get(name, {}) for name in script}
    return Stage(script, gates=gates, config=config, route=HEDGE | changes.get("route", {}))


def outcomes(walk):
    return [(call.provider, call.signal, call.error_code) for call in walk.calls]


def test_a_provider_slower_than_95_of_100_calls_is_hedged_by_the_next_and_the_loser_is_booked():
    stage = hedging({"a": [hangs], "b": [lasting(0.5, answered())]})
    outcome, walk, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert took_s == pytest.approx(1.5)
    assert outcomes(walk) == [("b", Signal.ANSWERED, None), ("a", Signal.CANCELLED, OVERTAKEN)]
    assert [call.billing for call in walk.calls] == [Billing.BILLED, Billing.UNKNOWN]
    assert stage.told("a") == [Verdict.NEUTRAL]
    assert walk.unsent == []


def test_the_slow_one_still_wins_when_it_answers_first():
    stage = hedging({"a": [lasting(2, answered())], "b": [lasting(5, answered())]})
    outcome, walk, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert took_s == pytest.approx(2)
    assert outcomes(walk) == [("a", Signal.ANSWERED, None), ("b", Signal.CANCELLED, OVERTAKEN)]


def test_one_that_is_not_slow_is_not_hedged():
    stage = hedging({"a": [lasting(0.9, answered())], "b": [answered()]})
    outcome, _, _ = virtually(stage)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a"]


def test_one_that_fails_before_it_is_slow_is_followed_by_the_next_as_ever():
    stage = hedging({"a": [failed(Signal.OVERLOADED)], "b": [answered()]})
    outcome, walk, _ = virtually(stage)
    assert isinstance(outcome, Answered)
    assert reasons(walk) == [("a", "overloaded")]
    assert not hasattr(stage.gates, "asked")


def test_a_hedge_that_fails_cancels_nobody():
    stage = hedging({"a": [lasting(3, answered())], "b": [failed(Signal.OVERLOADED)], "c": [answered()]})
    outcome, walk, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert took_s == pytest.approx(3)
    assert outcomes(walk) == [("b", Signal.OVERLOADED, None), ("a", Signal.ANSWERED, None)]


def test_when_both_fail_the_chain_goes_on_with_those_not_yet_asked():
    stage = hedging({"a": [lasting(3, failed(Signal.OVERLOADED))], "b": [failed(Signal.OVERLOADED)], "c": [answered()]})
    outcome, walk, _ = virtually(stage)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a", "b", "c"]
    assert reasons(walk) == [("b", "overloaded"), ("a", "overloaded")]


def test_a_refusal_of_the_slow_one_ends_the_job_unless_the_hedge_answers():
    for hedge, ending in ((answered(), Answered), (failed(Signal.OVERLOADED), Refused)):
        stage = hedging({"a": [lasting(3, failed(Signal.CONTENT_POLICY))], "b": [lasting(3, hedge)]})
        assert isinstance(virtually(stage)[0], ending)


@pytest.mark.parametrize(
    ("gates", "config", "route"),
    [
        ({"p95": None}, {}, {}),  # too little is known of its latency
        ({"allowance": 0}, {}, {}),
        ({}, {"b": {"base_url": "http://127.0.0.1:1/v1"}}, {}),  # the same endpoint would be as slow
        ({}, {"b": {"price": {"input": "2", "output": "4"}}}, {}),  # too dear
    ],
)
def test_no_hedge_is_made(gates, config, route):
    stage = hedging({"a": [lasting(3, answered())], "b": [answered()]}, gates=known(**gates), config=config, route=route)
    outcome, _, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a"]
    assert took_s == pytest.approx(3)


def test_a_dearer_one_is_asked_where_the_chain_says_so_and_its_cost_is_drawn():
    config = {"b": {"price": {"input": "20", "output": "40"}}}
    stage = hedging({"a": [hangs], "b": [answered()]}, config=config, route={"hedge_dearer": True})
    assert isinstance(virtually(stage)[0], Answered)
    ((slow, cost_usd),) = stage.gates.asked
    assert slow == "a"
    assert cost_usd > Decimal("0.01")


def test_a_walk_makes_so_many_hedges_and_an_attempt_again_none():
    stage = hedging({"a": [lasting(60, answered())], "b": [answered()]}, config={"a": {"timeout_s": 4}})
    outcome, _, _ = virtually(stage, attempts=2)
    assert isinstance(outcome, Answered)
    assert stage.said("sent") == ["a", "b"]
    assert not hasattr(stage.gates, "asked")


def test_a_hedge_goes_to_nobody_whose_window_is_known_to_be_too_small():
    script = {"a": [failed(Signal.CONTEXT_TOO_LONG)], "b": [lasting(3, answered())], "c": [answered()]}
    config = {"a": {"context_tokens": 100}, "b": {"context_tokens": 1000}, "c": {"context_tokens": 100}}
    stage = hedging(script, config=config)
    assert isinstance(virtually(stage)[0], Answered)
    assert stage.said("sent") == ["a", "b"]


def test_a_race_asks_all_at_once_and_the_first_success_wins_not_the_first_failure():
    script = {"a": [failed()], "b": [lasting(2, answered())], "c": [lasting(4, answered())]}
    stage = Stage(script, route=RACE)
    outcome, walk, took_s = virtually(stage)
    assert isinstance(outcome, Answered)
    assert took_s == pytest.approx(2)
    assert outcomes(walk) == [("a", Signal.SERVER_ERROR, None), ("b", Signal.ANSWERED, None), ("c", Signal.CANCELLED, OVERTAKEN)]
    assert len(stage.said("opened")) == 3
    assert stage.said("told") == ["a", "b", "c"]


def test_a_race_ends_after_its_limit_which_counts_against_who_did_not_answer():
    stage = Stage({"a": [lasting(60, answered())], "b": [lasting(60, answered())]}, route=RACE)
    outcome, walk, took_s = virtually(stage)
    assert outcome == Exhausted()
    assert took_s == pytest.approx(RACE_S)
    assert [call.signal for call in walk.calls] == [Signal.TIMED_OUT] * 2
    assert stage.told("a") == [Verdict.FAILURE]


def test_a_race_cut_short_by_the_deadline_counts_against_nobody():
    stage = Stage({"a": [lasting(60, answered())], "b": [lasting(60, answered())]}, route=RACE)
    outcome, _, _ = virtually(stage, remaining_s=3)
    assert outcome == OutOfTime()
    assert stage.told("a") == [Verdict.NEUTRAL]


def test_a_race_without_an_answer_says_why_of_each_of_them():
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "b": [lasting(1, failed(Signal.UNFIT))]}, route=RACE)
    outcome, walk, _ = virtually(stage)
    assert outcome == Exhausted()
    assert reasons(walk) == [("a", "overloaded"), ("b", "unfit")]


def test_in_a_race_without_the_books_no_request_leaves():
    stage = Stage({"a": [answered()], "b": [answered()]}, route=RACE, ours=False)
    outcome, _ = walked(stage)
    assert isinstance(outcome, Parked)
    assert stage.said("sent") == []


def test_a_cancelled_race_leaves_no_task_and_no_call_off_the_books():
    async def main():
        stage = Stage({"a": [hangs], "b": [hangs]}, route=RACE)
        walk = Walk(a_claim())
        task = asyncio.create_task(stage.run(walk))

        async with asyncio.timeout(20):
            while len(stage.said("sent")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [call.signal for call in walk.calls] == [Signal.CANCELLED] * 2
        assert [call.error_code for call in walk.calls] == [None, None]  # nobody was faster
        assert sorted(stage.said("told")) == ["a", "b"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_what_breaks_one_rival_ends_nobody_and_is_raised_when_nobody_answers():
    async def breaks():
        raise ConnectionResetError

    async def says(reply):
        await asyncio.sleep(0.01)
        return reply

    async def main():
        assert await first_answer([says(answered()), breaks()]) == [answered()]
        with pytest.raises(ConnectionResetError):
            await first_answer([breaks(), says(failed()), breaks()])

    asyncio.run(main())

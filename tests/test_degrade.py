"""What a job gets when nobody answered: the rungs in their order, marked, and only when waiting is no use."""

from dataclasses import replace

import pytest
from scripted import FAILED, Stage, a_claim, answered, failed, lasting, virtual_time, virtually
from sqlalchemy.exc import OperationalError

from worker.degrade import PATIENCE_S
from worker.job import ChatRequest, Lane
from worker.ledger import Asked
from worker.resilience.cache import key
from worker.signals import Signal
from worker.walk import MAX_ATTEMPTS, Answered, Doubtful, Exhausted, OutOfTime, Parked, Walk

COLD = ChatRequest([{"role": "user", "content": "hi"}], {"temperature": 0})
WARM = ChatRequest([{"role": "user", "content": "hi"}], {"temperature": 1})
PERSON = {"lane": Lane.INTERACTIVE}
SMALLER = {"providers": ["a"], "degrade": ["smaller"], "smaller": "s"}
STATIC = {"providers": ["a"], "degrade": ["static"], "static_text": "We will write to you."}
CACHE = {"providers": ["a"], "degrade": ["cache"]}


def answer_of(outcome):
    assert isinstance(outcome, Answered)
    return outcome.answer


def test_a_smaller_model_answers_when_nobody_of_the_chain_did_and_its_answer_is_marked():
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "s": [answered("short")]}, route=SMALLER)
    outcome, walk, _ = virtually(stage, **PERSON)
    assert (answer_of(outcome).content, answer_of(outcome).degraded) == ("short", "smaller")
    assert walk.calls[-1].answer is answer_of(outcome)  # booked and settled as the same, so that it travels once
    assert stage.said("sent") == ["a", "s"]


def test_a_full_answer_is_not_marked_and_asks_no_rung():
    stage = Stage({"a": [answered()], "s": [answered("short")]}, route=SMALLER)
    outcome, _, _ = virtually(stage, **PERSON)
    assert answer_of(outcome).degraded is None
    assert stage.said("sent") == ["a"]


def test_the_rungs_come_in_their_order():
    route = SMALLER | {"degrade": ["smaller", "cache", "static"], "static_text": "later"}
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "s": [failed(Signal.OVERLOADED)]}, route=route)
    outcome, walk, _ = virtually(stage, request=COLD, **PERSON)
    assert (answer_of(outcome).content, answer_of(outcome).degraded, answer_of(outcome).provider) == ("later", "static", "static")
    assert [reason.provider for reason in walk.reasons] == ["a", "s"]


def test_a_job_nobody_waits_for_is_attempted_again_and_takes_less_only_in_the_end():
    for attempts, ending in ((0, Exhausted), (MAX_ATTEMPTS - 2, Exhausted), (MAX_ATTEMPTS - 1, Answered)):
        stage = Stage({"a": [failed(FAILED)]}, route=STATIC)
        assert isinstance(virtually(stage, lane=Lane.BULK, attempts=attempts, remaining_s=86_400)[0], ending)


def test_a_person_waits_a_moment_for_a_full_answer_before_less_is_given():
    for wait_s, ending in ((PATIENCE_S, Parked), (PATIENCE_S + 1, Answered)):
        stage = Stage({"a": [failed(Signal.SLOW_DOWN, retry_after_s=wait_s)]}, route=STATIC)
        assert isinstance(virtually(stage, **PERSON)[0], ending)


def test_a_job_whose_next_attempt_may_come_after_its_deadline_takes_less_now():
    for remaining_s, ending in ((60, Answered), (70, Exhausted)):  # after the sixth attempt it waits up to 64 s
        stage = Stage({"a": [failed(Signal.OVERLOADED)]}, route=STATIC)
        assert isinstance(virtually(stage, lane=Lane.BULK, attempts=5, remaining_s=remaining_s)[0], ending)


def test_a_rung_has_no_last_word_about_a_job_and_costs_it_no_attempt():
    asked = (Asked(provider="s", outcome="invalid_request", answer=None),)
    stage = Stage({"a": [answered()], "s": [answered("short")]}, route=SMALLER)
    assert answer_of(virtually(stage, asked=asked, **PERSON)[0]).degraded is None


def test_a_rung_that_may_have_been_billed_is_for_a_person_to_look_at_where_the_chain_says_so():
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "s": [failed(Signal.TIMED_OUT)]}, route=SMALLER | {"on_unknown": "fail"})
    assert virtually(stage, **PERSON)[0] == Doubtful()


def test_a_rung_that_cannot_be_put_on_the_books_is_passed_over():
    route = SMALLER | {"degrade": ["smaller", "static"], "static_text": "later"}
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "s": [answered("short")]}, route=route)

    async def opening():
        if "a" in stage.said("sent"):
            raise OperationalError("x", {}, Exception())

    stage.opening = opening
    assert answer_of(virtually(stage, **PERSON)[0]).degraded == "static"


def test_who_would_have_to_wait_past_the_deadline_takes_less_now():
    stage = Stage({"a": [failed(Signal.SLOW_DOWN, retry_after_s=30)]}, route=STATIC)
    assert answer_of(virtually(stage, lane=Lane.BULK, remaining_s=20)[0]).degraded == "static"


def test_when_the_time_is_over_less_is_given_than_asked_for_rather_than_nothing():
    stage = Stage({"a": [lasting(60, answered())]}, route=STATIC)
    assert answer_of(virtually(stage, lane=Lane.BULK, remaining_s=2)[0]).degraded == "static"
    stage = Stage({"a": [lasting(60, answered())], "s": [answered()]}, route=SMALLER)
    assert virtually(stage, remaining_s=2)[0] == OutOfTime()


@pytest.mark.parametrize("signal", [Signal.INVALID_REQUEST, Signal.CONTENT_POLICY, Signal.CONTEXT_TOO_LONG])
def test_a_request_that_nobody_may_answer_gets_no_lesser_answer(signal):
    stage = Stage({"a": [failed(signal)]}, route=STATIC)
    assert not isinstance(virtually(stage, **PERSON)[0], Answered)


def test_a_worker_that_may_not_call_gives_no_lesser_answer_either():
    stage = Stage({"a": [answered()]}, route=STATIC, may_call=lambda _: False)
    assert isinstance(virtually(stage, **PERSON)[0], Parked)


def test_patience_until_the_deadline_is_a_rung_too():
    stage = Stage({"a": [failed(FAILED)]}, route={"degrade": ["park"]})
    assert virtually(stage, attempts=MAX_ATTEMPTS + 5)[0] == Exhausted(patient=True)


def run(stage, *walks):
    """Outcomes of these walks, one after the other, of one worker."""
    with virtual_time() as runner:

        async def main():
            return [await stage.run(Walk(claim)) for claim in walks]

        return runner.run(main())


def test_an_answer_is_kept_and_given_again_when_nobody_answers():
    stage = Stage({"a": [answered("well"), failed(Signal.OVERLOADED)]}, route=CACHE)
    first, second = run(stage, a_claim(request=COLD, **PERSON), a_claim(request=COLD, **PERSON))
    assert answer_of(first).degraded is None
    assert (answer_of(second).content, answer_of(second).degraded) == ("well", "cache")
    assert answer_of(second).age_s >= 0
    assert stage.said("sent") == ["a", "a"]


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another", "request": COLD},
        {"chain": "another", "request": COLD},
        {"request": ChatRequest([{"role": "user", "content": "ho"}], {"temperature": 0})},
        {"request": replace(COLD, parameters={"temperature": 0, "max_tokens": 5})},
    ],
)
def test_to_nobody_who_asked_for_something_else(other):
    stage = Stage({"a": [answered("well"), failed(Signal.OVERLOADED)]}, route=CACHE)
    assert isinstance(run(stage, a_claim(request=COLD, **PERSON), a_claim(**PERSON | other))[1], Exhausted)


def test_where_each_answer_would_be_another_nothing_is_kept_unless_the_chain_says_so():
    for cache, ending in (({}, Exhausted), ({"cache": {"any_temperature": True}}, Answered)):
        stage = Stage({"a": [answered("well"), failed(Signal.OVERLOADED)]}, route=CACHE | cache)
        assert isinstance(run(stage, a_claim(request=WARM, **PERSON), a_claim(request=WARM, **PERSON))[1], ending)


def test_a_fresh_answer_is_given_instead_of_asking_and_is_no_lesser_one():
    stage = Stage({"a": [answered("well"), answered("other")]}, route={"cache": {"fresh_s": 60}})
    first, second = run(stage, a_claim(request=COLD), a_claim(request=COLD))
    assert answer_of(first).age_s is None
    assert (answer_of(second).content, answer_of(second).degraded) == ("well", None)
    assert answer_of(second).age_s >= 0
    assert stage.said("sent") == ["a"]


def test_a_lesser_answer_is_never_kept():
    route = SMALLER | {"degrade": ["smaller", "cache"]}
    stage = Stage({"a": [failed(Signal.OVERLOADED)], "s": [answered("short")]}, route=route)

    with virtual_time() as runner:

        async def main():
            claim = a_claim(request=COLD, **PERSON)
            await stage.run(Walk(claim))
            return await stage.cache.get(key(claim.tenant, claim.chain, claim.request), at_most_s=1000)

        assert runner.run(main()) is None

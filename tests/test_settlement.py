"""From the outcome of a walk to its settlement: one table."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cost import Usage
from worker.job import TRANSITIONS, Answer, ChatRequest, JobState, Lane, new_id
from worker.ledger import Claim
from worker.settlement import AGAIN_CAP_S, MAX_ATTEMPTS, PARK_JITTER, Cancelled, Released, decide
from worker.signals import Signal
from worker.walk import Answered, Exhausted, OutOfTime, Parked, Reason, Refused, Walk

ANSWER = Answer(content="x", finish_reason="stop", provider="p", model="m", usage=Usage())
CLAIM = Claim(
    job_id=new_id(),
    worker_id=new_id(),
    fence=3,
    attempts=0,
    chain="default",
    lane=Lane.INTERACTIVE,
    tenant="default",
    request=ChatRequest([]),
    remaining_s=60,
    asked=(),
    opened_id=new_id(),
    opened_provider="a",
)
OUTCOMES = [
    Answered(ANSWER),
    Refused(Signal.INVALID_REQUEST),
    Exhausted(),
    Parked(3),
    OutOfTime(),
    Cancelled(),
    Released(),
]


def walk(attempts: int = 0) -> Walk:
    made = Walk(replace(CLAIM, attempts=attempts))
    made.reasons.append(Reason("a", "server_error", 500, "boom", None))
    return made


@pytest.mark.parametrize(
    ("outcome", "state", "code", "counted", "new_walk"),
    [
        (Answered(ANSWER), "succeeded", None, False, False),
        (Refused(Signal.INVALID_REQUEST), "failed", "invalid_request", False, False),
        (Refused(Signal.UNFIT), "failed", "unfit", False, False),
        (Exhausted(), "queued", "all_providers_failed", True, True),
        (Parked(3), "queued", "parked", False, False),
        (Parked(3, new_walk=True), "queued", "parked", False, True),
        (OutOfTime(), "expired", "deadline", False, False),
        (Cancelled(), "cancelled", None, False, False),
        (Released(), "queued", None, False, False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | bool | None) else None,
)
def test_each_outcome_has_one_settlement(outcome, state, code, counted, new_walk):
    settlement = decide(outcome, walk())
    assert (settlement.state, settlement.counted, settlement.new_walk) == (state, counted, new_walk)
    assert (settlement.error or {}).get("code") == code
    assert settlement.answer == (ANSWER if state == "succeeded" else None)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_settlement_carries_fence_calls_and_rows_to_remove(outcome):
    made = walk()
    settlement = decide(outcome, made)
    assert (settlement.job_id, settlement.fence, settlement.lane) == (CLAIM.job_id, 3, Lane.INTERACTIVE)
    assert settlement.unsent == (CLAIM.opened_id,)
    assert settlement.calls == tuple(made.calls)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_settlement_is_a_legal_move_of_a_running_job(outcome):
    assert decide(outcome, walk()).state in TRANSITIONS[JobState.RUNNING]


@pytest.mark.parametrize(("attempts", "state"), [(MAX_ATTEMPTS - 2, "queued"), (MAX_ATTEMPTS - 1, "failed"), (MAX_ATTEMPTS + 5, "failed")])
def test_exhausted_jobs_are_given_up_after_so_many_attempts(attempts, state):
    settlement = decide(Exhausted(), walk(attempts))
    assert (settlement.state, settlement.counted) == (state, True)
    assert settlement.error["code"] == "all_providers_failed"


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_parked_and_released_jobs_are_never_given_up(attempts, draw):
    for outcome in (Parked(1), Released()):
        settlement = decide(outcome, walk(attempts), rng=lambda: draw)
        assert settlement.state == "queued"
        assert not settlement.counted


@given(st.floats(0, 86_400), st.floats(0, 1, exclude_max=True))
def test_a_parked_job_comes_back_never_sooner_and_little_later_than_it_may(wait_s, draw):
    run_after_s = decide(Parked(wait_s), walk(), rng=lambda: draw).run_after_s
    assert wait_s <= run_after_s <= wait_s * (1 + PARK_JITTER)


@pytest.mark.parametrize(("attempts", "most_s"), [(0, 2), (1, 4), (4, 32), (8, AGAIN_CAP_S)])
def test_attempts_are_spread_over_a_doubling_time(attempts, most_s):
    assert decide(Exhausted(), walk(attempts), rng=lambda: 1.0).run_after_s == most_s
    assert decide(Exhausted(), walk(attempts), rng=lambda: 0.0).run_after_s == 0


@pytest.mark.parametrize("outcome", [Refused(Signal.CONTENT_POLICY), Exhausted(), Parked(1), OutOfTime()])
def test_an_error_says_of_each_provider_why_it_gave_no_answer(outcome):
    error: Any = decide(outcome, walk()).error
    assert error["providers"] == [{"provider": "a", "reason": "server_error", "http_status": 500, "error_code": "boom"}]
    assert error["message"]

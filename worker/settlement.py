"""What becomes of a job after an attempt: pure, from the outcome of its walk to one settlement."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

from worker.job import JobState
from worker.ledger import Settlement
from worker.resilience.backoff import delay_s
from worker.walk import (
    AGAIN_BASE_S,
    AGAIN_CAP_S,
    MAX_ATTEMPTS,
    PARK_JITTER,
    Answered,
    Doubtful,
    Exhausted,
    Outcome,
    OutOfTime,
    Parked,
    Refused,
    Walk,
)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A person wanted it no more."""


@dataclass(frozen=True, slots=True)
class Released:
    """This worker may not go on; somebody else should, at once."""


def decide(outcome: Outcome | Cancelled | Released, walk: Walk, *, rng: Callable[[], float] = random.random) -> Settlement:
    """The settlement of an attempt.

    Attempted again after `delay_s(attempts, base 2 s, cap 300 s)`, at most MAX_ATTEMPTS times; parked and released
    attempts cost none of these.
    """
    match outcome:
        case Answered(answer):
            return _settlement(walk, JobState.SUCCEEDED, answer=answer)
        case Refused(signal):
            return _settlement(walk, JobState.FAILED, error=_error(walk, signal.value, "no provider may answer it"))
        case Doubtful():
            error = _error(walk, "billing_unknown", "a call may have been answered and billed; requeue it to ask again")
            return _settlement(walk, JobState.FAILED, error=error)
        case OutOfTime():
            return _settlement(walk, JobState.EXPIRED, error=_error(walk, "deadline", "the deadline passed first"))
        case Exhausted(patient=False) if walk.claim.attempts + 1 >= MAX_ATTEMPTS:
            error = _error(walk, "all_providers_failed", f"all providers failed in {MAX_ATTEMPTS} attempts")
            return _settlement(walk, JobState.FAILED, error=error, counted=True)
        case Exhausted():
            error = _error(walk, "all_providers_failed", "all providers failed, to be attempted again")
            after_s = delay_s(walk.claim.attempts + 1, base_s=AGAIN_BASE_S, cap_s=AGAIN_CAP_S, rng=rng)
            return _settlement(walk, JobState.QUEUED, error=error, run_after_s=after_s, counted=True, new_walk=True)
        case Parked(retry_after_s, new_walk):
            error = _error(walk, "parked", "no provider could be asked or had room for it, to be attempted again")
            after_s = retry_after_s * (1 + PARK_JITTER * rng())
            return _settlement(walk, JobState.QUEUED, error=error, run_after_s=after_s, new_walk=new_walk)
        case Cancelled():
            return _settlement(walk, JobState.CANCELLED)
        case Released():
            return _settlement(walk, JobState.QUEUED)
        case _ as never:
            assert_never(never)


def _settlement(walk: Walk, state: JobState, **ending: Any) -> Settlement:
    claim = walk.claim
    return Settlement(
        job_id=claim.job_id,
        fence=claim.fence,
        lane=claim.lane,
        state=state,
        calls=tuple(walk.calls),
        unsent=tuple(walk.unsent),
        **ending,
    )


def _error(walk: Walk, code: str, message: str) -> dict[str, Any]:
    """AllProvidersFailed in words: the code, and for each provider why it gave no answer."""
    return {"code": code, "message": message, "providers": [reason.to_json() for reason in walk.reasons]}

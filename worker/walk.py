"""One attempt's way through the chain, step by step, and how it can end. Endings are values; no exception carries one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from worker.calls import Call
from worker.job import Answer
from worker.ledger import Claim
from worker.signals import POLICIES, Billing, Signal

MAX_ATTEMPTS = 10  # ended without an answer so often, a job is given up
AGAIN_BASE_S = 2.0
AGAIN_CAP_S = 300.0
PARK_JITTER = 0.2  # parked jobs come back spread over so much more than the wait, never sooner


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a provider gave no answer: a signal when it was asked, else what kept it from being asked."""

    provider: str
    reason: str
    http_status: int | None = None
    error_code: str | None = None
    retry_after_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v for k in self.__slots__ if (v := getattr(self, k)) is not None}


@dataclass(slots=True)
class Walk:
    """One attempt's way through the chain, kept outside of it so that a cancelled walk is booked as well."""

    claim: Claim
    calls: list[Call] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    unsent: list[UUID] = field(default_factory=list)  # call rows whose requests have not left
    asks_twice: bool = True  # also when an earlier call may have been answered and billed
    takes_truncated: bool = True  # also an answer that max_tokens cut off
    strained: bool = False  # a provider that had no room has been shrinking its limits
    extras: int = 0  # retries and hedges
    ends_at_s: float = 0

    def __post_init__(self) -> None:
        if self.claim.opened_id is not None:
            self.unsent.append(self.claim.opened_id)
        self.ends_at_s = time.monotonic() + self.claim.remaining_s

    def remaining_s(self) -> float:
        return self.ends_at_s - time.monotonic()

    def may_have_extra(self, most: int) -> bool:
        """Whether one more retry or hedge may be made: so many in an attempt, and none after the second attempt."""
        return self.extras < most and self.claim.attempts < 2

    def in_doubt(self) -> bool:
        """Whether a call of this walk may have been billed without an answer, and that is for a person to look at."""
        outcomes = {call.signal.value for call in self.calls} | {asked.outcome for asked in self.claim.asked}
        return not self.asks_twice and any(POLICIES[Signal(outcome)].billing is Billing.UNKNOWN for outcome in outcomes)

    def paid(self) -> Answered | None:
        """The answer that is in hand although the walk was cut short before it could say so."""
        return next((Answered(call.answer) for call in self.calls if call.answer is not None), None)


@dataclass(frozen=True, slots=True)
class Answered:
    answer: Answer


@dataclass(frozen=True, slots=True)
class Refused:
    """No provider may or can answer this request as it is: attempting it again would not help."""

    signal: Signal


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A call may have been answered and billed, and its chain rather asks a person than a provider again."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Everyone who could be asked was asked, and failed in a way that may pass. `patient`: only the deadline ends the job."""

    patient: bool = False


@dataclass(frozen=True, slots=True)
class Parked:
    """Nobody could be asked, or all who were had no room for more; the earliest that can change is in `retry_after_s`.

    `new_walk`: then those who were asked may be asked again. `ours`: the providers have no part in it.
    """

    retry_after_s: float
    new_walk: bool = False
    ours: bool = False


@dataclass(frozen=True, slots=True)
class OutOfTime:
    """The job's deadline came first."""


Outcome = Answered | Refused | Doubtful | Exhausted | Parked | OutOfTime

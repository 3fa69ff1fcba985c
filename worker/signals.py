"""What an answer or an error of a provider means: one signal for each case, and one table of what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Signal(StrEnum):
    """How one call ended. The value is what `provider_calls.outcome` records."""

    ANSWERED = "answered"
    MALFORMED = "malformed"  # 200, but no JSON, no choices, nothing in them
    UNFIT = "unfit"  # answered, but not in the JSON Schema the job asked for, or cut off before the first word
    CONTENT_POLICY = "content_policy"
    INVALID_REQUEST = "invalid_request"
    CONTEXT_TOO_LONG = "context_too_long"
    UNSUPPORTED = "unsupported"  # this provider cannot serve such a request, another one may
    UNAUTHORIZED = "unauthorized"
    QUOTA_EXHAUSTED = "quota_exhausted"
    MODEL_NOT_FOUND = "model_not_found"
    REQUEST_TIMEOUT = "request_timeout"  # 408, 504, 524: the provider's own, and it may have worked on it
    CONFLICT = "conflict"
    RATE_LIMITED = "rate_limited"
    SLOW_DOWN = "slow_down"
    SERVER_ERROR = "server_error"
    OVERLOADED = "overloaded"
    UNREACHABLE = "unreachable"  # DNS, refused, TLS, connect timeout: the request was never sent
    DROPPED = "dropped"  # connection lost after the request was sent
    TIMED_OUT = "timed_out"  # the provider's own total time ran out
    OUT_OF_TIME = "out_of_time"  # our deadline cut it short, earlier than the provider's own limit
    CANCELLED = "cancelled"  # by the user, by a faster answer, by a shutdown
    ORPHANED = "orphaned"  # its worker died; whether it was billed is not known


class Verdict(StrEnum):
    """What a call says about its provider's health."""

    SUCCESS = "S"
    FAILURE = "F"
    NEUTRAL = "X"


class Next(StrEnum):
    """Where the chain goes from here."""

    STOP = "stop"  # the job has its answer, or no provider may give one
    ONWARD = "onward"  # to the next provider
    LARGER = "larger"  # only to providers with a larger context window


class Billing(StrEnum):
    BILLED = "billed"
    FREE = "free"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What follows from a signal.

    `retry`: one more call to the same provider may help. `slow`: it counts as a slow call as well. `block_s`: shut the
    provider to all workers for its Retry-After, or for this long when it names none. `isolate_s`: take it out (a fault
    of key, quota or configuration) and alert. `billing`: whether such a call costs money. `ease`: ask it less by this factor.
    `metered`: the vendor counts the call's tokens against its rate limit. `interrupted`: it says nothing about the provider, which
    may be asked again in the same walk. `hopeless`: asked again as it is, the provider would say the same. `full`: it is well and
    has no room, which costs the job no attempt.
    """

    verdict: Verdict
    next: Next
    billing: Billing
    retry: bool = False
    slow: bool = False
    block_s: float | None = None
    isolate_s: float | None = None
    ease: float = 1.0
    metered: bool = True
    interrupted: bool = False
    hopeless: bool = False
    full: bool = False


_S, _F, _X = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEUTRAL
_BILLED, _FREE, _UNKNOWN = Billing.BILLED, Billing.FREE, Billing.UNKNOWN

POLICIES: Mapping[str, Policy] = {
    Signal.ANSWERED: Policy(verdict=_S, next=Next.STOP, billing=_BILLED),
    Signal.MALFORMED: Policy(verdict=_F, next=Next.ONWARD, billing=_BILLED),
    Signal.UNFIT: Policy(verdict=_S, next=Next.ONWARD, billing=_BILLED, hopeless=True),
    Signal.CONTENT_POLICY: Policy(verdict=_X, next=Next.STOP, billing=_BILLED),
    Signal.INVALID_REQUEST: Policy(verdict=_X, next=Next.STOP, billing=_FREE, metered=False),
    Signal.CONTEXT_TOO_LONG: Policy(verdict=_X, next=Next.LARGER, billing=_FREE, metered=False, hopeless=True),
    Signal.UNSUPPORTED: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, metered=False, hopeless=True),
    Signal.UNAUTHORIZED: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, isolate_s=300, metered=False),
    Signal.QUOTA_EXHAUSTED: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, isolate_s=900, metered=False),
    Signal.MODEL_NOT_FOUND: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, isolate_s=900, metered=False),
    Signal.REQUEST_TIMEOUT: Policy(verdict=_F, next=Next.ONWARD, billing=_UNKNOWN, retry=True),
    Signal.CONFLICT: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, retry=True),
    Signal.RATE_LIMITED: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, retry=True, block_s=1, ease=0.7, full=True),
    Signal.SLOW_DOWN: Policy(verdict=_X, next=Next.ONWARD, billing=_FREE, block_s=5, ease=0.5, full=True),
    Signal.SERVER_ERROR: Policy(verdict=_F, next=Next.ONWARD, billing=_FREE, retry=True),
    Signal.OVERLOADED: Policy(verdict=_F, next=Next.ONWARD, billing=_FREE, block_s=1, ease=0.7),
    Signal.UNREACHABLE: Policy(verdict=_F, next=Next.ONWARD, billing=_FREE, retry=True),
    Signal.DROPPED: Policy(verdict=_F, next=Next.ONWARD, billing=_UNKNOWN),
    Signal.TIMED_OUT: Policy(verdict=_F, next=Next.ONWARD, billing=_UNKNOWN, slow=True),
    Signal.OUT_OF_TIME: Policy(verdict=_X, next=Next.ONWARD, billing=_UNKNOWN, interrupted=True),
    Signal.CANCELLED: Policy(verdict=_X, next=Next.ONWARD, billing=_UNKNOWN, interrupted=True),
    Signal.ORPHANED: Policy(verdict=_X, next=Next.ONWARD, billing=_UNKNOWN, interrupted=True),
}

_SILENT = Policy(verdict=_X, next=Next.ONWARD, billing=_FREE)


def policy(outcome: str) -> Policy:
    """Of a signal by its value; of any other word (why a provider was not asked) one from which nothing follows."""
    return POLICIES.get(outcome, _SILENT)

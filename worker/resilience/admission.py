"""What is said at the gate of a provider: who may pass, why somebody may not, and how a call that passed ended."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from worker.resilience.circuit import BreakerState
from worker.signals import Verdict


class Denial(StrEnum):
    """Why a call may not go out now."""

    BREAKER = "breaker"  # open, isolated, forced open, or its probe is under way
    BLOCKED = "blocked"  # the provider asked all of us to wait
    RAMPING = "ramping"  # closed a moment ago, and lets in a share of the calls
    LIMITED = "limited"  # no room in the configured limits for requests, tokens or calls in flight
    CONGESTED = "congested"  # it refused calls a moment ago, and takes fewer at once until it answers well again
    BUDGET = "budget"  # no retry is left


class Extra(StrEnum):
    """A call made besides a job's first one to the provider; it draws on the retry budget."""

    RETRY = "retry"  # costs 1
    AFTER_TIMEOUT = "after_timeout"  # costs 2: the call before may still be worked on


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to `admit`; give it back to `report`, once.

    `retry_after_s`: 0 when allowed, else when to ask again. `probe`: this one call decides whether the provider is well
    again. `lease`: the id of what is reserved for the call, set when allowed. `tokens`: as reserved. `strained`: the
    provider is in trouble itself, waiting for it is no plan. `extra`: as it was asked for. A negative `generation` was
    given by this process alone, without Redis.
    """

    allowed: bool
    probe: bool
    generation: int
    retry_after_s: float
    state: BreakerState
    lease: str
    tokens: int = 0
    denied: Denial | None = None
    strained: bool = False
    extra: Extra | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an admitted call ended, as far as its provider's gate is concerned.

    `block_s`: the provider asked all of us to wait so long (at most an hour). `named`: it said so itself; else that is our guess,
    doubled with each in a row (at most a minute) until a call is answered. `isolate_s`: it refuses us for a fault of
    key, quota or configuration (at most a day). `reason`: a short code for `Status`, no provider's text. `tokens`: really
    used, 0 when none were charged, None to keep the estimate. `sent`: False when the provider never saw the call: request
    and tokens are given back. `ease`: below 1 after congestion; rate and concurrency are multiplied by it, at most once in
    10 s. `remaining_*`: what the provider says is left of its own limits. `took_ms`: of an answered call, for the
    histogram. `cost_usd`: what it cost, for the hedge allowance.
    """

    verdict: Verdict
    slow: bool = False
    block_s: float = 0
    named: bool = True
    isolate_s: float = 0
    reason: str = ""
    tokens: int | None = None
    sent: bool = True
    ease: float = 1.0
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    took_ms: int | None = None
    cost_usd: Decimal | None = None

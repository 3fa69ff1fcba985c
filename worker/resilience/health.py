"""How a provider's gate looks to people: the state in their words, and the numbers behind it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.resilience.breaker_rules import RULES
from worker.resilience.circuit import BreakerState, Circuit, Look
from worker.resilience.gate_store import Snapshot
from worker.resilience.limits import Bucket

NOTICEABLE_PERCENT = 10  # of the last minute's calls failed or were slow: degraded
NOTICEABLE_IN_A_ROW = 4


class Health(StrEnum):
    """A provider as users know it.

    Degraded: half-open, ramping, blocked by its own Retry-After, or noticeably failing or slow.
    Failed: open, isolated, forced open.
    """

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """One provider's gate. Counts are of the last minute; `opened_times` is forgotten after 10 minutes closed.

    `in_flight`: calls under way, of all workers. `requests_left`, `tokens_left`: of the configured limits, now; None when
    there is none. `rate_multiplier`: 1, or what congestion has left of the configured rates. `local`: as this process sees
    it, because Redis does not answer.
    """

    provider: str
    state: BreakerState
    health: Health
    retry_after_s: float
    reason: str | None
    successes: int
    failures: int
    slow: int
    opened_times: int
    in_flight: int
    requests_left: int | None
    tokens_left: int | None
    rate_multiplier: float
    local: bool


def describe(provider: str, snapshot: Snapshot, now: int, *, local: bool) -> Status:
    """The gate as the next call would find it at `now` (ms)."""
    circuit, meter = snapshot.circuit.awake(now), snapshot.meter
    meter.refresh(now)
    look, window = circuit.look(now), circuit.window(now)
    return Status(
        provider=provider,
        state=look.state,
        health=_health(circuit, look, now),
        retry_after_s=look.retry_ms / 1000,
        reason=_reason(circuit, look),
        successes=window.successes,
        failures=window.failures,
        slow=window.slow,
        opened_times=look.opens,
        in_flight=snapshot.in_flight,
        requests_left=_left(meter.requests),
        tokens_left=_left(meter.tokens),
        rate_multiplier=round(meter.multiplier, 3),
        local=local,
    )


def _left(bucket: Bucket | None) -> int | None:
    return None if bucket is None else max(0, int(bucket.level))


def _health(circuit: Circuit, look: Look, now: int) -> Health:
    if look.state in (BreakerState.OPEN, BreakerState.ISOLATED, BreakerState.FORCED_OPEN):
        return Health.FAILED
    if look.state is BreakerState.HALF_OPEN or look.retry_ms or look.permille < 1000:
        return Health.DEGRADED
    window = circuit.window(now)
    worst = max(window.failures, window.slow)
    many = window.total >= RULES.min_calls and worst * 100 >= NOTICEABLE_PERCENT * window.total
    return Health.DEGRADED if many or circuit.fails >= NOTICEABLE_IN_A_ROW else Health.HEALTHY


def _reason(circuit: Circuit, look: Look) -> str | None:
    if look.state is BreakerState.CLOSED and not look.retry_ms:
        return "ramping up after a pause" if look.permille < 1000 else None
    return circuit.reason or None

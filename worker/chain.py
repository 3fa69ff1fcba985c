"""Walks a chain of providers until one answers.

    for provider in chain: breaker( retry( call ))

The breaker is outermost: it is asked once a step and told once how the step ended, so a call that was retried and
then answered counts as a success. Inside it stands the only retry loop of the system. What a reply means is
`signals.POLICIES`; what a whole walk without an answer means is `_unanswered`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from worker.calls import NewCall, Stopwatch
from worker.config import ChainConfig, ProviderConfig
from worker.cost import Pricing
from worker.events import origin
from worker.grouping import Group
from worker.job import new_id
from worker.ledger import Claim
from worker.providers.provider import Provider, Reply
from worker.resilience.backoff import delay_s
from worker.resilience.breaker import Admission, Breakers, BreakerState
from worker.signals import POLICIES, Next, Signal, Verdict
from worker.validation import fits, usable
from worker.walk import Answered, Doubtful, Exhausted, Outcome, OutOfTime, Parked, Reason, Refused, Walk

FAILOVER_S = 0.4  # a failing provider may cost a job 500 ms before the next one is asked; the rest is for a busy loop
RESERVE_S = 2.0  # kept for each provider that has not been asked yet
RETRY_BASE_S = 0.1
RETRY_CAP_S = 8.0  # a longer wait is the breaker's business: it would hold a slot
LEAST_CALL_S = 0.05  # with less time left no request is sent
PARKED_S = 1.0  # when nobody says how long to wait

# Outcomes of an interrupted attempt that say nothing about the provider: it may be asked again.
_INTERRUPTED = frozenset({Signal.ORPHANED, Signal.CANCELLED, Signal.OUT_OF_TIME})
# Outcomes that end the job, whoever else might be asked.
_FINAL = frozenset(signal for signal, policy in POLICIES.items() if policy.next is Next.STOP) - {Signal.ANSWERED}
_TOO_LONG = frozenset(signal for signal, policy in POLICIES.items() if policy.next is Next.LARGER)
# Asked again as they are, the same providers would say the same.
_HOPELESS = _TOO_LONG | {Signal.UNFIT, "window_too_small"}
# The provider is well and has no room: such a walk costs no attempt.
_FULL = frozenset({Signal.RATE_LIMITED, Signal.SLOW_DOWN})
# Its breaker let nobody ask it.
_SKIPPED = frozenset(state.value for state in BreakerState)

Value = TypeVar("Value")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A provider with all that is needed to ask it."""

    provider: Provider
    config: ProviderConfig
    pricing: Pricing


class Chain:
    """Asks providers in order. `may_call`: whether this worker may still send requests for a claim."""

    def __init__(
        self,
        stations: Mapping[str, Station],
        breakers: Breakers,
        open_call: Group[NewCall, bool],
        may_call: Callable[[Claim], bool],
        *,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._stations = stations
        self._breakers = breakers
        self._open_call = open_call
        self._may_call = may_call
        self._rng = rng

    async def answer(self, walk: Walk, route: ChainConfig) -> Outcome:
        """The first answer along the route, or how the walk ended without one; calls and reasons are left in `walk`."""
        for asked in walk.claim.asked:
            if asked.answer is not None:
                return Answered(asked.answer)
        for asked in walk.claim.asked:
            if asked.outcome in _FINAL:
                walk.reasons.append(Reason(asked.provider, asked.outcome))
                return Refused(Signal(asked.outcome))
        if not usable(walk.claim.request):
            return Refused(Signal.INVALID_REQUEST)
        walk.asks_twice = route.on_unknown == "retry"
        stations = list(self._untried(walk, route))
        for position, station in enumerate(stations):
            if walk.remaining_s() <= LEAST_CALL_S:
                return OutOfTime()
            if walk.in_doubt():
                return Doubtful()
            if not self._may_call(walk.claim):
                return Parked(PARKED_S)
            if not _window_fits(walk, station, self._stations):
                continue
            try:
                reply = await self._step(walk, station, untried=len(stations) - position - 1)
            except SQLAlchemyError:
                return Parked(PARKED_S)  # a call that cannot be put on the books is not made
            if reply is None:
                continue
            if reply.signal is Signal.ANSWERED and reply.answer is not None:
                return Answered(reply.answer)
            if reply.signal in _FINAL:
                return Refused(reply.signal)
        return Doubtful() if walk.in_doubt() else _unanswered(walk)

    def _untried(self, walk: Walk, route: ChainConfig) -> Iterator[Station]:
        done = {asked.provider: asked.outcome for asked in walk.claim.asked if asked.outcome not in _INTERRUPTED}
        for name in route.providers:
            if name in done:
                walk.reasons.append(Reason(name, done[name]))
            else:
                yield self._stations[name]

    async def _step(self, walk: Walk, station: Station, *, untried: int) -> Reply | None:
        name = station.provider.name
        admission = await self._breakers.admit(name, lease_s=_timeout_s(walk, station, untried) + 5)
        if not admission.allowed:
            walk.reasons.append(Reason(name, admission.state.value, retry_after_s=round(admission.retry_after_s, 3)))
            return None
        try:
            reply = await self._ask(walk, station, admission, untried)
        except BaseException:
            await self._breakers.report(name, admission, Verdict.NEUTRAL)
            raise
        if reply is None:
            await self._breakers.report(name, admission, Verdict.NEUTRAL)
            walk.reasons.append(Reason(name, "not_sent"))
            return None
        await self._report(name, admission, reply)
        if reply.signal is not Signal.ANSWERED:
            walk.reasons.append(Reason(name, reply.signal.value, reply.http_status, reply.error_code, reply.retry_after_s))
        return reply

    async def _ask(self, walk: Walk, station: Station, admission: Admission, untried: int) -> Reply | None:
        began_s = time.monotonic()
        reply = await self._call(walk, station, untried)
        retries = 0 if admission.probe else station.config.max_retries
        for retry in range(1, retries + 1):
            if reply is None or not POLICIES[reply.signal].retry or walk.in_doubt():
                break
            if untried and reply.signal is Signal.UNREACHABLE:
                break  # who cannot be reached now will not be in a moment
            took_s = time.monotonic() - began_s
            wait_s = max(delay_s(retry, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng), reply.retry_after_s or 0)
            if untried and took_s + wait_s + took_s / retry > FAILOVER_S:
                break  # the next provider is nearer than this one's recovery
            if wait_s > min(RETRY_CAP_S, walk.remaining_s() - LEAST_CALL_S) or not self._breakers.seems_closed(station.provider.name):
                break
            await asyncio.sleep(wait_s)
            again = await self._call(walk, station, untried)
            if again is None:
                break
            reply = again
        return reply

    async def _call(self, walk: Walk, station: Station, untried: int) -> Reply | None:
        """One request and its reply, booked; None when it may not be sent any more once it stands on the books."""
        provider = station.provider
        call_id = await self._opened(walk, station)
        if call_id is None or walk.remaining_s() <= LEAST_CALL_S or not self._may_call(walk.claim):
            return None
        timeout_s = _timeout_s(walk, station, untried)
        walk.unsent.remove(call_id)
        watch = Stopwatch(call_id, provider.name, provider.model)
        try:
            reply = await provider.complete(walk.claim.request, timeout_s=timeout_s, call_id=str(call_id))
        except asyncio.CancelledError:
            walk.calls.append(watch.book(Reply(signal=Signal.CANCELLED), station.pricing))
            raise
        except Exception as error:  # a fault of ours, met with one provider: the others may still answer
            log.error("provider_broke", provider=provider.name, error=type(error).__name__, origin=origin(error))
            reply = Reply(signal=Signal.DROPPED, error_code="provider_broke")
        if reply.signal is Signal.TIMED_OUT and timeout_s < station.config.timeout_s:
            reply = replace(reply, signal=Signal.OUT_OF_TIME)
        if reply.answer is not None and not fits(walk.claim.request, reply.answer):
            reply = replace(reply, signal=Signal.UNFIT, answer=None)
        walk.calls.append(watch.book(reply, station.pricing))
        return reply

    async def _opened(self, walk: Walk, station: Station) -> UUID | None:
        """The row of the call about to be made, on the books before its request leaves; None when the job is ours no more."""
        claim, provider = walk.claim, station.provider
        if claim.opened_id in walk.unsent and claim.opened_provider == provider.name:
            return claim.opened_id
        call = NewCall(
            id=new_id(),
            job_id=claim.job_id,
            fence=claim.fence,
            provider=provider.name,
            model=provider.model,
            ended=tuple(walk.calls),
        )
        walk.unsent.append(call.id)
        return call.id if await _to_its_end(self._open_call.ask(call)) else None

    async def _report(self, name: str, admission: Admission, reply: Reply) -> None:
        policy = POLICIES[reply.signal]
        await self._breakers.report(
            name,
            admission,
            policy.verdict,
            slow=policy.slow,
            block_s=0 if policy.block_s is None else reply.retry_after_s or policy.block_s,
            isolate_s=policy.isolate_s or 0,
            reason=reply.error_code or reply.signal.value,
        )


async def _to_its_end(work: Awaitable[Value]) -> Value:
    """What `work` returns. Cancelled meanwhile, it is waited for all the same: the row must not come after its removal."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _timeout_s(walk: Walk, station: Station, untried: int) -> float:
    """The provider's own limit, or what the deadline leaves once each untried provider has kept its reserve."""
    remaining_s = walk.remaining_s()
    reserve_s = min(RESERVE_S, remaining_s / (untried + 1)) * untried
    return min(station.config.timeout_s, remaining_s - reserve_s)


def _window_fits(walk: Walk, station: Station, stations: Mapping[str, Station]) -> bool:
    """Whether a request that was too long for others may fit here; True where windows are not configured."""
    too_small = [
        stations[reason.provider].config.context_tokens
        for reason in walk.reasons
        if reason.reason in _TOO_LONG and reason.provider in stations
    ]
    if not too_small:
        return True
    own = station.config.context_tokens
    fits_here = own is None or all(other is None or own > other for other in too_small)
    if not fits_here:
        walk.reasons.append(Reason(station.provider.name, "window_too_small"))
    return fits_here


def _unanswered(walk: Walk) -> Outcome:
    asked = walk.calls or any(asked.outcome not in _INTERRUPTED for asked in walk.claim.asked)
    full = [reason for reason in walk.reasons if reason.reason in _FULL]
    if not asked or (full and all(reason.reason in _FULL | _SKIPPED for reason in walk.reasons)):
        waits = [reason.retry_after_s for reason in walk.reasons if reason.retry_after_s is not None]
        silent = any(reason.retry_after_s is None for reason in full)  # full, and did not say for how long
        return Parked(PARKED_S if silent else min(waits, default=PARKED_S), new_walk=bool(full))
    if walk.remaining_s() <= LEAST_CALL_S:
        return OutOfTime()
    if walk.reasons and all(reason.reason in _HOPELESS for reason in walk.reasons):
        return Refused(Signal(next(reason.reason for reason in walk.reasons if reason.reason != "window_too_small")))
    return Exhausted()

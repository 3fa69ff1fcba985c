"""A step: one provider tried. Admitted by its gate, called, booked and reported; retried where that can help.

The only retry loop of the system stands here. Every call passes the gate for itself, so the breaker counts calls and the
limiter sees all of them.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar
from uuid import UUID

import structlog

from worker.calls import Call, NewCall, Stopwatch
from worker.config import ProviderConfig
from worker.cost import Pricing, estimated_tokens
from worker.events import origin
from worker.grouping import Group
from worker.job import ChatRequest, new_id
from worker.ledger import Claim
from worker.providers.provider import Provider, Reply
from worker.reach import Reach
from worker.resilience.backoff import delay_s
from worker.resilience.gate import Admission, Denial, Ending, Extra, Gates
from worker.signals import POLICIES, Signal, Verdict
from worker.validation import fits
from worker.walk import Reason, Walk

FAILOVER_S = 0.4  # a failing provider may cost a job 500 ms before the next one is asked; the rest is for a busy loop
RESERVE_S = 2.0  # kept for each provider that has not been asked yet
RETRY_BASE_S = 0.1
RETRY_CAP_S = 8.0  # a longer wait is the breaker's business: it would hold a slot
LEAST_CALL_S = 0.05  # with less time left no request is sent
INLINE_WAIT_S = 0.25  # for room at a provider; who has to wait longer asks another one or parks
LEASE_MORE_S = 5.0  # a call is given up for lost so long after its own limit
MOST_EXTRAS = 3  # retries and hedges in one attempt, and only in the first two attempts: six over a job's life
USUAL_OUTPUT = 256  # tokens, reserved where the request sets no limit

OVERTAKEN = "overtaken"  # error code of a call that was cancelled because another one answered first
NOT_SENT = "not_sent"  # admitted, and then this worker or its time came to an end
_NO_ROOM = frozenset({Denial.LIMITED, Denial.CONGESTED})

Value = TypeVar("Value")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A provider with all that is needed to ask it."""

    provider: Provider
    config: ProviderConfig
    pricing: Pricing


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Which provider, and how. `untried`: providers that may still be asked after it, and for whom time is kept.

    `most_s`: a limit besides the provider's own. `degraded`: what its answer is marked as.
    """

    station: Station
    untried: int = 0
    most_s: float = math.inf
    retries: bool = True
    degraded: str | None = None


class Steps:
    """Takes steps, for all chains of a worker process. `may_call`: whether it may still send requests for a claim."""

    def __init__(
        self,
        gates: Gates,
        open_call: Group[NewCall, bool],
        may_call: Callable[[Claim], bool],
        *,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.gates = gates
        self.may_call = may_call
        self.reach = Reach()
        self._open_call = open_call
        self._rng = rng

    async def take(self, walk: Walk, step: Step) -> Reply | None:
        """How the provider's last call ended; None when it was not asked. Without an answer its reason is left in `walk`."""
        began_s = time.monotonic()
        admission = await self._admitted(walk, step)
        reply = await self._once(walk, step, admission) if admission else None
        retries = 0 if admission is None or admission.probe or not step.retries else step.station.config.max_retries
        for retry in range(1, retries + 1):
            if reply is None or not self._worth_again(walk, step, reply):
                break
            wait_s = self._wait_s(walk, step, reply, retry, time.monotonic() - began_s)
            if wait_s is None:
                break
            await asyncio.sleep(wait_s)
            again = await self._again(walk, step, reply)
            if again is None:
                break
            reply = again
        if reply is not None and reply.signal is not Signal.ANSWERED:
            name = step.station.provider.name
            walk.reasons.append(Reason(name, reply.signal.value, reply.http_status, reply.error_code, reply.retry_after_s))
        return reply

    async def _admitted(self, walk: Walk, step: Step) -> Admission | None:
        admission = await self._admit(walk, step)
        if admission.denied in _NO_ROOM and admission.retry_after_s <= min(INLINE_WAIT_S, walk.remaining_s() - LEAST_CALL_S):
            await asyncio.sleep(admission.retry_after_s)
            admission = await self._admit(walk, step)
        if admission.allowed:
            return admission
        walk.reasons.append(_refused_entry(step, admission))
        walk.strained = walk.strained or admission.strained
        return None

    async def _admit(self, walk: Walk, step: Step, extra: Extra | None = None) -> Admission:
        station = step.station
        return await self.gates.admit(
            station.provider.name,
            lease_s=_timeout_s(walk, step) + LEASE_MORE_S,
            tokens=_tokens(walk.claim.request) if station.config.tpm else 0,
            lane=walk.claim.lane,
            extra=extra,
        )

    @staticmethod
    def _worth_again(walk: Walk, step: Step, reply: Reply) -> bool:
        hopeless = step.untried > 0 and reply.signal is Signal.UNREACHABLE  # who cannot be reached now will not be in a moment
        return POLICIES[reply.signal].retry and not hopeless and not walk.in_doubt() and walk.may_have_extra(MOST_EXTRAS)

    def _wait_s(self, walk: Walk, step: Step, reply: Reply, retry: int, took_s: float) -> float | None:
        """Before the retry; None when the next provider is nearer than this one's recovery, or the wait would hold a slot too long."""
        wait_s = max(delay_s(retry, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, rng=self._rng), reply.retry_after_s or 0)
        if step.untried and took_s + wait_s + took_s / retry > FAILOVER_S:
            return None
        return wait_s if wait_s <= min(RETRY_CAP_S, walk.remaining_s() - LEAST_CALL_S) else None

    async def _again(self, walk: Walk, step: Step, before: Reply) -> Reply | None:
        """The retry, when the retry budget and the gate allow it; what they say else is no reason of its own."""
        extra = Extra.AFTER_TIMEOUT if before.signal is Signal.REQUEST_TIMEOUT else Extra.RETRY
        admission = await self._admit(walk, step, extra)
        if not admission.allowed:
            return None
        walk.extras += 1
        return await self._once(walk, step, admission, again=True)

    async def _once(self, walk: Walk, step: Step, admission: Admission, *, again: bool = False) -> Reply | None:
        """One call under its admission, reported to the gate however it ends; None when it was not sent."""
        name, call_id = step.station.provider.name, None
        try:
            call_id = await self._opened(walk, step.station.provider)
            called = await self._call(walk, step, call_id) if call_id else None
        except BaseException:
            left = call_id is not None and call_id not in walk.unsent
            await self.gates.report(name, admission, Ending(verdict=Verdict.NEUTRAL, sent=left))
            raise
        if called is None:
            await self.gates.report(name, admission, Ending(verdict=Verdict.NEUTRAL, sent=False))
            if not again:
                walk.reasons.append(Reason(name, NOT_SENT))
            return None
        reply, call = called
        self.reach.heard(step.station.config.host, reply)
        await self.gates.report(name, admission, _ending(reply, call, ours=self.reach.is_ours(reply)))
        return reply

    async def _call(self, walk: Walk, step: Step, call_id: UUID) -> tuple[Reply, Call] | None:
        """One request and its reply, booked; None when it may not be sent any more although it stands on the books."""
        station, provider = step.station, step.station.provider
        if walk.remaining_s() <= LEAST_CALL_S or not self.may_call(walk.claim):
            return None
        timeout_s = _timeout_s(walk, step)
        walk.unsent.remove(call_id)
        watch = Stopwatch(call_id, provider.name, provider.model)
        try:
            reply = await provider.complete(walk.claim.request, timeout_s=timeout_s, call_id=str(call_id))
        except asyncio.CancelledError as stop:
            walk.calls.append(watch.book(Reply(signal=Signal.CANCELLED, error_code=_cancelled_by(stop)), station.pricing))
            raise
        except Exception as error:  # a fault of ours, met with one provider: the others may still answer
            log.error("provider_broke", provider=provider.name, error=type(error).__name__, origin=origin(error))
            reply = Reply(signal=Signal.DROPPED, error_code="provider_broke")
        reply = _judged(walk, step, reply, timeout_s)
        call = watch.book(reply, station.pricing)
        walk.calls.append(call)
        return reply, call

    async def _opened(self, walk: Walk, provider: Provider) -> UUID | None:
        """The row of the call about to be made, on the books before its request leaves; None when the job is ours no more."""
        claim = walk.claim
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


def _cancelled_by(stop: asyncio.CancelledError) -> str | None:
    return OVERTAKEN if stop.args == (OVERTAKEN,) else None


async def _to_its_end(work: Awaitable[Value]) -> Value:
    """What `work` returns. Cancelled meanwhile, it is waited for all the same: the row must not come after its removal."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


def _judged(walk: Walk, step: Step, reply: Reply, timeout_s: float) -> Reply:
    """What the reply means for this job: cut short by us, not in the shape asked for, or the answer, marked as degraded."""
    if reply.signal is Signal.TIMED_OUT and reply.error_code is None and timeout_s < min(step.station.config.timeout_s, step.most_s):
        return replace(reply, signal=Signal.OUT_OF_TIME)
    if reply.answer is None:
        return reply
    if not fits(walk.claim.request, reply.answer):
        return replace(reply, signal=Signal.UNFIT, answer=None)
    if reply.answer.finish_reason == "length" and not walk.takes_truncated:
        return replace(reply, signal=Signal.UNFIT, answer=None, error_code="truncated_answer")
    return replace(reply, answer=replace(reply.answer, degraded=step.degraded)) if step.degraded else reply


def _timeout_s(walk: Walk, step: Step) -> float:
    """The provider's own limit, or what the deadline leaves once each untried provider has kept its reserve."""
    remaining_s = walk.remaining_s()
    reserve_s = min(RESERVE_S, remaining_s / (step.untried + 1)) * step.untried
    return min(step.station.config.timeout_s, remaining_s - reserve_s, step.most_s)


def _tokens(request: ChatRequest) -> int:
    """What a request may use, for the limiter: its estimated input and the most it may be answered with."""
    limits = (request.parameters.get(name) for name in ("max_completion_tokens", "max_tokens"))
    output = next((limit for limit in limits if isinstance(limit, int) and limit > 0), USUAL_OUTPUT)
    return estimated_tokens(request.messages) + output


def _refused_entry(step: Step, admission: Admission) -> Reason:
    by_state = admission.denied is Denial.BREAKER
    why = admission.state.value if by_state or admission.denied is None else admission.denied.value
    return Reason(step.station.provider.name, why, retry_after_s=round(admission.retry_after_s, 3))


def _ending(reply: Reply, call: Call, *, ours: bool) -> Ending:
    """What the gate is told. `ours`: the fault is this machine's, and says nothing about the provider."""
    policy = POLICIES[reply.signal]
    usage = reply.usage
    used = (usage.input_tokens or 0) + (usage.output_tokens or 0) if usage else 0
    answered = reply.signal is Signal.ANSWERED
    return Ending(
        verdict=Verdict.NEUTRAL if ours else policy.verdict,
        slow=policy.slow,
        block_s=reply.retry_after_s or policy.block_s or 0,
        named=bool(reply.retry_after_s),
        isolate_s=policy.isolate_s or 0,
        reason=reply.error_code or reply.signal.value,
        tokens=used or (None if policy.metered else 0),
        sent=reply.signal is not Signal.UNREACHABLE and (reply.signal is not Signal.UNSUPPORTED or reply.http_status is not None),
        ease=policy.ease,
        remaining_requests=reply.remaining_requests,
        remaining_tokens=reply.remaining_tokens,
        took_ms=call.latency_ms if answered else None,
        cost_usd=call.cost_usd,
    )


def shared_fate(failed: Station, reply: Reply, other: Station) -> bool:
    """Whether what this provider just met will most likely be met at the other one too: the same host, the same account."""
    same_host = failed.config.host == other.config.host
    if reply.signal is Signal.UNREACHABLE:
        return same_host
    by_account = reply.signal is Signal.QUOTA_EXHAUSTED or (reply.signal is Signal.UNAUTHORIZED and reply.http_status == 401)
    return by_account and same_host and failed.config.api_key == other.config.api_key

"""Walks a chain of providers until one answers.

    for provider in chain: gate( breaker, limiter )( call, retry )

Who is asked and in what order is told here; `step` asks one of them, `hedge` several at once, and `degrade` has what is given when
nobody answered. What a reply means is `signals.POLICIES`; what a whole walk without an answer means is `_unanswered`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy.exc import SQLAlchemyError

from worker.config import ChainConfig
from worker.degrade import Ladder
from worker.hedge import hedged, race
from worker.job import Lane
from worker.providers.provider import Reply
from worker.reach import WINDOW_S
from worker.resilience.cache import AnswerCache, cacheable, key
from worker.resilience.gate import BreakerState, Denial
from worker.signals import Next, Signal, policy
from worker.step import LEAST_CALL_S, NOT_SENT, Station, Step, Steps, shared_fate
from worker.validation import usable
from worker.walk import Answered, Doubtful, Exhausted, Outcome, OutOfTime, Parked, Reason, Refused, Walk

PARKED_S = 1.0  # when nobody says how long to wait

# The gate let nobody ask it.
_SKIPPED = frozenset({*(state.value for state in BreakerState), *(denial.value for denial in Denial)})


class Chain:
    """Asks providers along a route. One for all chains of a worker process."""

    def __init__(self, stations: Mapping[str, Station], steps: Steps, cache: AnswerCache) -> None:
        self._stations = stations
        self._steps = steps
        self._cache = cache
        self._ladder = Ladder(stations, steps, cache)

    async def answer(self, walk: Walk, route: ChainConfig) -> Outcome:
        """The answer of this job, or how the walk ended without one; calls and reasons are left in `walk`."""
        earlier = _earlier(walk, route)
        if earlier is not None:
            return earlier
        if not usable(walk.claim.request):
            return Refused(Signal.INVALID_REQUEST)
        walk.asks_twice = route.on_unknown == "retry"
        walk.takes_truncated = route.on_truncated == "accept"
        if not (route.caches and cacheable(walk.claim.request, any_temperature=route.cache.any_temperature)):
            return await self._ladder.degraded(walk, route, await self._walked(walk, route))
        return await self._cached(walk, route)

    async def _cached(self, walk: Walk, route: ChainConfig) -> Outcome:
        """A fresh answer of the cache, or a new one, which is kept; of those who want the same at once, one asks for all."""
        name, wait_s = key(walk.claim.tenant, walk.claim.chain, walk.claim.request), walk.remaining_s() / 2
        if not route.cache.fresh_s:
            return await self._ladder.degraded(walk, route, await self._kept(walk, route, name))
        async with self._cache.alone(name, at_most_s=route.cache.fresh_s, wait_s=wait_s) as found:
            if found is not None:
                return Answered(replace(found.answer, age_s=round(found.age_s, 3)))
            outcome = await self._kept(walk, route, name)
        return await self._ladder.degraded(walk, route, outcome)

    async def _kept(self, walk: Walk, route: ChainConfig, name: str) -> Outcome:
        outcome = await self._walked(walk, route)
        if isinstance(outcome, Answered):
            await self._cache.put(name, outcome.answer, keep_s=max(route.cache.fresh_s, route.cache.stale_s))
        return outcome

    async def _walked(self, walk: Walk, route: ChainConfig) -> Outcome:
        try:
            if route.strategy == "race":
                return await self._race(walk, route)
            return await self._in_order(walk, route)
        except SQLAlchemyError:
            return Parked(PARKED_S, ours=True)  # a call that cannot be put on the books is not made

    async def _in_order(self, walk: Walk, route: ChainConfig) -> Outcome:
        untried = self._untried(walk, route)
        while untried:
            barred = self._barred(walk)
            if barred is not None:
                return barred
            station = untried.pop(0)
            if not _window_fits(walk, station, self._stations):
                continue
            step = Step(station=station, untried=len(untried))
            if route.strategy == "hedge":
                fitting = [other for other in untried if _fits_window(walk, other, self._stations)]
                left = list(fitting)
                replies = await hedged(self._steps, walk, route, step, left)
                untried = [other for other in untried if other not in fitting or other in left]
            else:
                replies = [await self._steps.take(walk, step)]
            ending = _ending(replies)
            if ending is not None:
                return ending
            if replies == [None] and _waits_for_room(walk, route):
                return Parked(walk.reasons[-1].retry_after_s or PARKED_S)
            untried = _shared_fates_last(station, replies, untried)
        return self._without_answer(walk, route)

    async def _race(self, walk: Walk, route: ChainConfig) -> Outcome:
        stations = [station for station in self._untried(walk, route) if _window_fits(walk, station, self._stations)]
        barred = self._barred(walk)
        if barred is not None:
            return barred
        return _ending(await race(self._steps, walk, stations)) or self._without_answer(walk, route)

    def _barred(self, walk: Walk) -> Outcome | None:
        """Why nobody may be asked any more, or None."""
        if walk.in_doubt():
            return Doubtful()
        if walk.remaining_s() <= LEAST_CALL_S:
            return OutOfTime()
        if not self._steps.may_call(walk.claim):
            return Parked(PARKED_S, ours=True)
        return None

    def _untried(self, walk: Walk, route: ChainConfig) -> list[Station]:
        done = {asked.provider: asked.outcome for asked in walk.claim.asked if not policy(asked.outcome).interrupted}
        walk.reasons += [Reason(name, done[name]) for name in route.providers if name in done]
        return [self._stations[name] for name in route.providers if name not in done]

    def _without_answer(self, walk: Walk, route: ChainConfig) -> Outcome:
        if walk.in_doubt():
            return Doubtful()
        unheard = all(reason.reason == Signal.UNREACHABLE or reason.reason in _SKIPPED for reason in walk.reasons)
        if unheard and self._steps.reach.is_lost():
            return Parked(WINDOW_S, new_walk=True)
        if walk.remaining_s() > LEAST_CALL_S and any(reason.reason == NOT_SENT for reason in walk.reasons):
            return Parked(PARKED_S, ours=True)
        return _unanswered(walk, route)


def _earlier(walk: Walk, route: ChainConfig) -> Outcome | None:
    """What an earlier attempt of the same walk has found out already: an answer that is paid for, or that nobody may answer."""
    for asked in walk.claim.asked:
        if asked.answer is not None:
            return Answered(asked.answer)
    for asked in walk.claim.asked:
        if _is_final(asked.outcome) and asked.provider in route.providers:  # a rung of the ladder has no last word
            walk.reasons.append(Reason(asked.provider, asked.outcome))
            return Refused(Signal(asked.outcome))
    return None


def _ending(replies: Sequence[Reply | None]) -> Outcome | None:
    """The answer among them, or that nobody may answer; None: the walk goes on."""
    heard = [reply for reply in replies if reply is not None]
    for reply in heard:
        if reply.signal is Signal.ANSWERED and reply.answer is not None:
            return Answered(reply.answer)
    return next((Refused(reply.signal) for reply in heard if _is_final(reply.signal)), None)


def _waits_for_room(walk: Walk, route: ChainConfig) -> bool:
    """Whether the job rather waits for the provider that just had no room by its own limits, and is well otherwise."""
    last = walk.reasons[-1]
    if walk.claim.lane is not Lane.BULK or route.overflow or last.reason != Denial.LIMITED.value or walk.strained:
        return False
    return (last.retry_after_s or 0) <= walk.remaining_s() / 2


def _shared_fates_last(failed: Station, replies: Sequence[Reply | None], untried: list[Station]) -> list[Station]:
    reply = replies[0] if len(replies) == 1 else None
    return untried if reply is None else sorted(untried, key=lambda other: shared_fate(failed, reply, other))


def _window_fits(walk: Walk, station: Station, stations: Mapping[str, Station]) -> bool:
    """Whether a request that was too long for others may fit here; if not, that is this provider's reason."""
    fits = _fits_window(walk, station, stations)
    if not fits:
        walk.reasons.append(Reason(station.provider.name, "window_too_small"))
    return fits


def _fits_window(walk: Walk, station: Station, stations: Mapping[str, Station]) -> bool:
    """True where windows are not configured."""
    too_small = [
        stations[reason.provider].config.context_tokens
        for reason in walk.reasons
        if reason.reason == Signal.CONTEXT_TOO_LONG and reason.provider in stations
    ]
    own = station.config.context_tokens
    return not too_small or own is None or all(other is None or own > other for other in too_small)


def _unanswered(walk: Walk, route: ChainConfig) -> Outcome:
    asked = walk.calls or any(asked.provider in route.providers and not policy(asked.outcome).interrupted for asked in walk.claim.asked)
    full = [reason for reason in walk.reasons if policy(reason.reason).full]
    if not asked or (full and all(reason in full or reason.reason in _SKIPPED for reason in walk.reasons)):
        waits = [reason.retry_after_s or policy(reason.reason).block_s or PARKED_S for reason in walk.reasons]
        return Parked(min(waits, default=PARKED_S), new_walk=bool(full))
    if walk.remaining_s() <= LEAST_CALL_S:
        return OutOfTime()
    if walk.reasons and all(_is_hopeless(reason) for reason in walk.reasons):
        return Refused(Signal(next(reason.reason for reason in walk.reasons if reason.reason != "window_too_small")))
    return Exhausted()


def _is_final(outcome: str) -> bool:
    return outcome != Signal.ANSWERED and policy(outcome).next is Next.STOP


def _is_hopeless(reason: Reason) -> bool:
    return reason.reason == "window_too_small" or policy(reason.reason).hopeless

"""The ladder: what a job gets when nobody answered it in full. Each rung is marked on the answer, and none is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError

from worker.config import ChainConfig
from worker.cost import Usage
from worker.job import Answer, Lane
from worker.resilience.cache import AnswerCache, cacheable, key
from worker.step import LEAST_CALL_S, Station, Step, Steps
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
    Walk,
)

DISPATCH_S = 1.0  # from when a job may be attempted again until it is
PATIENCE_S = 2.0  # who waits on a job would rather have a full answer so much later than a lesser one now

log = structlog.get_logger(__name__)


class Ladder:
    """The rungs of all chains: a smaller model, a stale answer of the cache, a fixed text, patience until the deadline."""

    def __init__(self, stations: Mapping[str, Station], steps: Steps, cache: AnswerCache) -> None:
        self._stations = stations
        self._steps = steps
        self._cache = cache

    async def degraded(self, walk: Walk, route: ChainConfig, outcome: Outcome) -> Outcome:
        """The outcome of the walk; or, when waiting for a better one is no use any more, what the chain's ladder has instead."""
        if not _is_time(walk, outcome):
            return _patient(outcome) if "park" in route.degrade else outcome
        for rung in route.degrade:
            answer = await self._answer(walk, route, rung)
            if answer is not None:
                log.warning("degraded", job_id=str(walk.claim.job_id), rung=rung, reasons=[reason.to_json() for reason in walk.reasons])
                return Answered(answer)
        if walk.in_doubt():
            return Doubtful()
        return _patient(outcome) if "park" in route.degrade else outcome

    async def _answer(self, walk: Walk, route: ChainConfig, rung: str) -> Answer | None:
        match rung:
            case "smaller" if route.smaller is not None:
                return await self._smaller(walk, route.smaller)
            case "cache":
                return await self._stale(walk, route)
            case "static":
                nothing = Usage(input_tokens=0, output_tokens=0)
                return Answer(
                    content=route.static_text, finish_reason="stop", provider="static", model="static", usage=nothing, degraded="static"
                )
        return None

    async def _smaller(self, walk: Walk, provider: str) -> Answer | None:
        asked = any(asked.provider == provider for asked in walk.claim.asked)
        if asked or walk.remaining_s() <= LEAST_CALL_S or walk.in_doubt():
            return None
        try:
            reply = await self._steps.take(walk, Step(station=self._stations[provider], degraded="smaller"))
        except SQLAlchemyError:  # a call that cannot be put on the books is not made
            return None
        return reply.answer if reply else None

    async def _stale(self, walk: Walk, route: ChainConfig) -> Answer | None:
        claim = walk.claim
        if not cacheable(claim.request, any_temperature=route.cache.any_temperature):
            return None
        found = await self._cache.get(key(claim.tenant, claim.chain, claim.request), at_most_s=route.cache.stale_s)
        return replace(found.answer, degraded="cache", age_s=round(found.age_s, 3)) if found else None


def _is_time(walk: Walk, outcome: Outcome) -> bool:
    """Whether to take less: a person waits and nobody can answer soon, or no later attempt will be made."""
    person = walk.claim.lane is Lane.INTERACTIVE
    match outcome:
        case Exhausted():
            last = walk.claim.attempts + 1 >= MAX_ATTEMPTS
            return person or last or _too_late(walk, min(AGAIN_CAP_S, AGAIN_BASE_S * 2**walk.claim.attempts))
        case Parked(retry_after_s, ours=ours):
            return _too_late(walk, retry_after_s * (1 + PARK_JITTER)) or (person and not ours and retry_after_s > PATIENCE_S)
        case OutOfTime():
            return True
        case _:
            return False


def _too_late(walk: Walk, wait_s: float) -> bool:
    """Whether the next attempt may come after the deadline."""
    return wait_s + DISPATCH_S >= walk.remaining_s()


def _patient(outcome: Outcome) -> Outcome:
    return replace(outcome, patient=True) if isinstance(outcome, Exhausted) else outcome

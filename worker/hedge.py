"""Several providers at once: a hedge against a slow one, and the race of all. The first answer wins; who lost is cancelled and booked."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from decimal import Decimal
from typing import Any

from worker.config import ChainConfig
from worker.cost import Usage, estimated_tokens
from worker.providers.provider import Reply
from worker.signals import Signal
from worker.step import LEAST_CALL_S, MOST_EXTRAS, OVERTAKEN, USUAL_OUTPUT, Station, Step, Steps
from worker.walk import Walk

RACE_S = 8.0
DEARER = Decimal("1.5")  # a hedge may cost so many times what the slow provider does

Replies = list[Reply | None]


async def race(steps: Steps, walk: Walk, stations: Sequence[Station]) -> Replies:
    """What all of them said within 8 s, the first answer last. None for who was not asked."""
    return await first_answer([steps.take(walk, Step(station=station, most_s=RACE_S, retries=False)) for station in stations])


async def hedged(steps: Steps, walk: Walk, route: ChainConfig, step: Step, others: list[Station]) -> Replies:
    """What the step's provider said, and the one of `others` that was asked as well, when it was slow; that one is taken out of them."""
    first = asyncio.create_task(steps.take(walk, step))
    try:
        if await _answers_in_time(steps, walk, step, first):
            return [await first]
        hedge = _candidate(steps, walk, route, step.station, others)
        if hedge is None or not await steps.gates.may_hedge(step.station.provider.name, cost_usd=estimated_cost(walk, hedge)):
            return [await first]
    except BaseException:
        await _ended([first])
        raise
    others.remove(hedge)
    walk.extras += 1
    return await first_answer([first, steps.take(walk, Step(station=hedge, untried=len(others), retries=False))])


async def first_answer(rivals: Sequence[asyncio.Task[Reply | None] | Coroutine[Any, Any, Reply | None]]) -> Replies:
    """What they said until one answered, that one last. The others are cancelled and have ended; nobody is after a failure alone.

    Raises what one of them raised, when nobody answered.
    """
    tasks = [asyncio.ensure_future(rival) for rival in rivals]
    replies: Replies = []
    faults: list[BaseException] = []
    running = set(tasks)
    try:
        while running and not any(map(_answered, replies)):
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            faults += [fault for task in done if (fault := task.exception())]
            replies += [task.result() for task in tasks if task in done and not task.exception()]
    finally:
        await _ended(running, OVERTAKEN if any(map(_answered, replies)) else None)
    if faults and not any(map(_answered, replies)):
        raise faults[0]
    return sorted(replies, key=_answered)


async def _answers_in_time(steps: Steps, walk: Walk, step: Step, first: asyncio.Task[Reply | None]) -> bool:
    """Whether it has ended before a hedge is due; True when none may be made at all."""
    delay_s = await steps.gates.p95_s(step.station.provider.name)
    if delay_s is None or delay_s >= walk.remaining_s() - LEAST_CALL_S or not walk.may_have_extra(MOST_EXTRAS):
        return True
    done, _ = await asyncio.wait({first}, timeout=delay_s)
    return bool(done) or not walk.may_have_extra(MOST_EXTRAS)


def _candidate(steps: Steps, walk: Walk, route: ChainConfig, slow: Station, others: Sequence[Station]) -> Station | None:
    """Somewhere else, taking calls, and not too dear."""
    own = estimated_cost(walk, slow)
    for other in others:
        cost = estimated_cost(walk, other)
        cheap = own is not None and cost is not None and cost <= own * DEARER
        elsewhere = other.config.base_url != slow.config.base_url
        if elsewhere and (cheap or route.hedge_dearer) and steps.gates.seems_closed(other.provider.name):
            return other
    return None


def estimated_cost(walk: Walk, station: Station) -> Decimal | None:
    """USD of this request at that provider, of its estimated input and the usual output; None where its price is not known."""
    return station.pricing.cost(Usage(input_tokens=estimated_tokens(walk.claim.request.messages), output_tokens=USUAL_OUTPUT))


def _answered(reply: Reply | None) -> bool:
    return reply is not None and reply.signal is Signal.ANSWERED


async def _ended(tasks: Collection[asyncio.Task[Reply | None]], why: str | None = None) -> None:
    """They are cancelled, and each is on the books: a step that is cancelled books its call."""
    for task in tasks:
        task.cancel(why)
    await asyncio.gather(*tasks, return_exceptions=True)

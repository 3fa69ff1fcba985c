"""Jobs that come to one chain with a cache, one after the other and at the same time; and what the cache may give them."""

import asyncio
from dataclasses import dataclass, replace

from chain_story import now_s
from scripted import Stage, a_claim, answered, failed

from worker.job import Answer, ChatRequest, Lane
from worker.signals import Signal
from worker.walk import Answered, Walk

FRESH_S, STALE_S = 60, 600


@dataclass(frozen=True)
class Visit:
    """After `wait_s` a job comes that asks for this; `up`: the provider is well then. `takes_s`: it takes so long to say anything."""

    wait_s: float = 0
    tenant: str = "one"
    chain: str = "default"
    prompt: str = "hi"
    parameters: tuple[tuple[str, object], ...] = (("temperature", 0),)
    up: bool = True
    takes_s: float = 0
    finish_reason: str = "stop"

    @property
    def cacheable(self) -> bool:
        given = dict(self.parameters)
        return (given.get("temperature", 1) <= 0.3 or "seed" in given) and given.get("n", 1) == 1

    @property
    def key(self) -> tuple[object, ...]:
        shaping = tuple(sorted((name, value) for name, value in self.parameters if name != "user"))
        return self.tenant, self.chain, self.prompt, shaping


@dataclass(frozen=True)
class Visited:
    visit: Visit
    came_s: float
    left_s: float
    answer: Answer | None
    calls: int


async def visited(visits: list[Visit], fresh: bool) -> list[Visited]:
    """Each answer of the provider says another thing, so that whence one came is told by what it says."""
    number, here = iter(range(10_000)), {"visit": Visit()}

    async def act(timeout_s: float):
        visit = here["visit"]
        await asyncio.sleep(min(visit.takes_s, timeout_s))
        if not visit.up:
            return failed(Signal.OVERLOADED)
        reply = answered(f"answer {next(number)}")
        return replace(reply, answer=replace(reply.answer, finish_reason=visit.finish_reason))

    async def smaller(timeout_s: float):
        return answered(f"small answer {next(number)}") if here["visit"].prompt == "ho" else failed(Signal.OVERLOADED)

    cache = {"stale_s": STALE_S, "fresh_s": FRESH_S if fresh else 0}
    route = {"providers": ["a"], "degrade": ["cache", "smaller"], "smaller": "s", "cache": cache}
    stage = Stage({"a": [act], "s": [smaller]}, route=route, config={"a": {"max_retries": 0}, "s": {"max_retries": 0}})

    async def come(visit: Visit) -> Visited:
        came_s, here["visit"] = now_s(), visit
        request = ChatRequest([{"role": "user", "content": visit.prompt}], dict(visit.parameters))
        walk = Walk(a_claim(request=request, tenant=visit.tenant, chain=visit.chain, lane=Lane.INTERACTIVE))
        outcome = await stage.run(walk)
        return Visited(visit, came_s, now_s(), outcome.answer if isinstance(outcome, Answered) else None, len(walk.calls))

    coming = []
    for visit in visits:
        await asyncio.sleep(visit.wait_s)
        coming.append(asyncio.ensure_future(come(visit)))
        await asyncio.sleep(0)
    return list(await asyncio.gather(*coming))


def check_visits(story: list[Visited], fresh: bool) -> None:
    """X11, X12: from the cache comes only what was answered in full, to the same request of the same tenant, not too long ago."""
    first = {done.answer.content: done for done in story if done.answer and done.answer.age_s is None}
    for done in story:
        answer = done.answer
        if answer is None or answer.age_s is None:
            assert answer is None or answer.degraded == ("smaller" if answer.content.startswith("small") else None)
            continue
        origin = first[answer.content]
        assert origin.visit.key == done.visit.key
        assert done.visit.cacheable
        assert origin.answer is not None
        assert (origin.answer.degraded, origin.answer.finish_reason) == (None, "stop")
        age_s = done.left_s - origin.left_s
        assert abs(answer.age_s - age_s) < 0.3
        if answer.degraded:
            assert answer.degraded == "cache"
            assert age_s <= STALE_S + 0.01
            assert not done.visit.up or done.visit.takes_s >= 60
        else:
            assert fresh
            assert age_s <= FRESH_S + 0.01
            assert done.calls == 0
    _given_when_it_could_be(story, fresh)


def _given_when_it_could_be(story: list[Visited], fresh: bool) -> None:
    """The newest answer of the same request, young enough, is given to who got none otherwise; a fresh one instead of asking."""
    for done in story:
        kept = [d for d in story if d.visit.key == done.visit.key and d.answer and not d.answer.degraded and d.answer.age_s is None]
        kept = [d for d in kept if d.left_s < done.came_s and d.answer and d.answer.finish_reason == "stop"]
        if not done.visit.cacheable or not kept:
            continue
        youngest_s = done.came_s - max(d.left_s for d in kept)
        if youngest_s < STALE_S - 100:
            assert done.answer is not None
        if fresh and youngest_s < FRESH_S - 1:
            assert done.calls == 0

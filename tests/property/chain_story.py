"""A play performed: scripted providers at the real gates and the real cache, in virtual time; and all that was seen of it."""

import asyncio
import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import scripted
from chainmodel import SECRET, SMALLER, Play
from scripted import USAGE, Stage, a_claim, virtual_time
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from worker.job import Answer
from worker.ledger import Asked
from worker.resilience.budget import nano
from worker.resilience.cache import Cached, key
from worker.resilience.gate import Ending, Gates, Limits
from worker.resilience.local import Ask, Tell
from worker.settlement import decide
from worker.signals import Verdict
from worker.walk import Outcome, Parked, Walk

ROOM = {"full": Limits(rpm=6), "scarce": Limits(rpm=600)}  # who comes next waits 11 s; 0.11 s, and bulk 3.4 s
EARLIER = Ask("before the play", 1000)
SHUT_S = {"isolated": 86_400, "shut": 30, "probe": 0.001}


class Watched(Gates):
    """The real gates of one process, with all that is asked of them and told to them; hedges are drawn by the local rules."""

    diary: list[tuple[Any, ...]]

    def __init__(self, play: Play) -> None:
        limits = {name: ROOM[play.part(name).gate] for name in _all(play) if play.part(name).gate in ROOM}
        super().__init__(None, limits, rng=random.Random(play.seed).random)
        self._play = play

    async def admit(self, provider, **asked):
        if self._play.gate_s:
            await asyncio.sleep(self._play.gate_s)
        admission = await super().admit(provider, **asked)
        self.diary.append(("admitted", provider, admission, asked))
        return admission

    async def report(self, provider, admission, ending):
        self.diary.append(("told", provider, ending.verdict, ending, admission.lease, now_s()))
        await super().report(provider, admission, ending)
        if self._play.gate_s:
            await asyncio.sleep(self._play.gate_s)

    async def p95_s(self, provider):
        return self._play.p95

    async def may_hedge(self, provider, *, cost_usd):
        if self._play.gate_s:
            await asyncio.sleep(self._play.gate_s)
        allowed = cost_usd is not None and self._gate(provider).budget.hedge(int(now_s() * 1000), nano(cost_usd))
        self.diary.append(("hedge", provider, allowed, cost_usd))
        return allowed

    def prepare(self, provider: str, gate: str) -> None:
        """Its gate as the play finds it."""
        local, now = self._gate(provider), int(now_s() * 1000)
        local.budget.hedges, local.budget.money = self._play.hedges, 1e12
        if gate == "well":
            return
        (answer,) = local.admit(now, [EARLIER])
        admission = answer.admission(local.circuit.look(now), 1.0, EARLIER.lease, None)
        isolate_s, block_s = SHUT_S.get(gate, 0), 3 if gate == "blocked" else 0
        left = 0 if gate in ROOM else None
        ending = Ending(verdict=Verdict.NEUTRAL, isolate_s=isolate_s, block_s=block_s, remaining_requests=left)
        local.report(now, [Tell.of(admission, ending)], 0)

    def in_flight(self, provider: str) -> int:
        return self._gate(provider).meter.in_flight(int(now_s() * 1000))


@dataclass
class Story:
    """What came of a play. `outcome` None: it was cancelled, or `error` escaped. `later`: what a parked job met when its wait was over."""

    play: Play
    walk: Walk
    began_s: float
    ended_s: float = 0
    outcome: Outcome | None = None
    error: BaseException | None = None
    diary: list[tuple[Any, ...]] = field(default_factory=list)
    in_flight: dict[str, int] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    logs: list[Any] = field(default_factory=list)
    kept: Cached | None = None
    later: tuple[Outcome, list[tuple[Any, ...]]] | None = None

    def sent(self, name: str | None = None) -> list[tuple[Any, ...]]:
        """(sent, provider, call id, when, timeout_s) of each request."""
        return [entry for entry in self.diary if entry[0] == "sent" and name in (None, entry[1])]

    def said(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.diary if entry[0] == kind]

    @property
    def by_route(self):
        return [call for call in self.walk.calls if call.provider != SMALLER]


def _all(play: Play) -> tuple[str, ...]:
    return (*play.names, SMALLER) if play.smaller else play.names


def now_s() -> float:
    return scripted.step_module.time.monotonic()


def perform(play: Play) -> Story:
    with swift_time() as runner, capture_logs() as logs:
        story = runner.run(_performed(play))
        story.logs = list(logs)
    return story


@contextmanager
def swift_time() -> Iterator[asyncio.Runner]:
    """All clocks the chain, its gates and its cache look at are the loop's."""
    with virtual_time() as runner, pytest.MonkeyPatch.context() as patch:
        _same_time(patch)
        yield runner


def _same_time(patch: pytest.MonkeyPatch) -> None:
    clock = scripted.step_module.time
    for module in ("worker.calls", "worker.resilience.cache"):
        patch.setattr(sys.modules[module], "time", clock)
    for module in ("fakeredis._helpers", "fakeredis.commands_mixins.server_mixin"):
        patch.setattr(sys.modules[module], "time", SimpleNamespace(time=clock.monotonic))


def staged(play: Play) -> Stage:
    """The chain of the play, its gates as the play finds them."""
    stage = Stage(
        {name: list(play.part(name).acts) for name in _all(play)},
        gates=Watched(play),
        config={name: play.part(name).config() for name in _all(play)},
        rng=random.Random(play.seed).random,
        route=play.route(),
    )
    words, began_s = list(play.books), now_s()

    async def opening() -> None:
        await asyncio.sleep(play.books_s)
        word = words.pop(0) if len(words) > 1 else words[0]
        if word == "error":
            raise OperationalError(SECRET, {}, Exception(SECRET))
        stage.ours = word != "gone"

    stage.opening = opening
    steps = stage.chain._steps
    steps.may_call = lambda _: now_s() < began_s + play.hush_s
    steps.reach = type(steps.reach)(now_s)
    for name in _all(play):
        stage.gates.prepare(name, play.part(name).gate)
    return stage


async def _performed(play: Play) -> Story:
    strays: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: strays.append(context["message"]))
    stage = staged(play)
    name = key("default", "default", play.request())
    if play.kept:
        kept = Answer(content="kept", finish_reason="stop", provider="p", model="m", usage=USAGE)
        await stage.cache.put(name, kept, keep_s=86_400)
    await asyncio.sleep(0.002)  # the isolation of a probe's gate is over
    story = Story(play, Walk(a_claim(**play.claim())), now_s())
    task = asyncio.ensure_future(stage.run(story.walk))
    await _played(task, play, story)
    del task
    story.ended_s, story.diary, story.strays = now_s(), list(stage.diary), strays
    turns = 100  # what was cancelled with it takes a few of them to end
    while turns and (left := asyncio.all_tasks() - {asyncio.current_task()}):
        await asyncio.sleep(0)
        turns, story.leaks = turns - 1, [repr(task) for task in left] if turns == 1 else []
    story.in_flight = {name: stage.gates.in_flight(name) for name in _all(play)}
    story.kept = await stage.cache.get(name, at_most_s=1e9)
    if "error" in play.books:
        gc.collect(1)  # then the loop hears of what nobody has asked for
    if isinstance(story.outcome, Parked):
        try:
            story.later = await _later(stage, story)
        except Exception as error:
            story.error = error
    return story


async def _played(task: asyncio.Task[Outcome], play: Play, story: Story) -> None:
    if play.cancel:
        await asyncio.wait({task}, timeout=play.cancel[0])
        for _ in range(play.cancel[1]):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        story.error = task.exception()
        story.outcome = None if story.error else task.result()


async def _later(stage: Stage, story: Story) -> tuple[Outcome, list[tuple[Any, ...]]]:
    """The attempt that follows when the wait is over, as the ledger hands it out."""
    assert story.outcome is not None
    settlement = decide(story.outcome, story.walk, rng=lambda: 0.0)
    await asyncio.sleep(settlement.run_after_s + 0.002)
    calls = tuple(Asked(provider=call.provider, outcome=call.signal.value, answer=None) for call in story.walk.calls)
    asked = () if settlement.new_walk else (*story.walk.claim.asked, *calls)
    stage.diary.clear()
    claim = replace(story.walk.claim, asked=asked, remaining_s=story.walk.remaining_s(), fence=2, opened_id=None, opened_provider=None)
    return await stage.run(Walk(claim)), list(stage.diary)
